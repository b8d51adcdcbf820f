"""BatchNorm's running statistics in fine-tuning: kept, measured anew, averaged over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tracequant.model import distributed
from tracequant.model.batches import Batch
from tracequant.model.task import Task
from tracequant.quantization.quantizer import Quantizer


def set_batchnorm_mode(model: nn.Module, training: bool) -> list[_BatchNorm]:
    """All BatchNorm layers of the model, now in this mode."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for module in layers:
        module.train(training)
    return layers


def reestimate_statistics(model: nn.Module, task: Task, batches: Iterable[Batch]) -> None:
    """Replace running statistics by their means over `batches`, with everything quantized and dropout off."""
    model.eval()
    norms = [module for module in set_batchnorm_mode(model, training=True) if module.track_running_stats]
    momenta = [module.momentum for module in norms]
    try:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the plain mean of all batches
        with torch.no_grad():
            for batch in batches if norms else ():
                task.outputs(model, batch)
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum


def average_statistics(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics.

    Grids are left out: they are equal in all processes, and the mean of zero points need not be a whole number.
    """
    distributed.average(
        buffer
        for module in model.modules()
        if not isinstance(module, Quantizer)
        for buffer in module.buffers(recurse=False)
        if buffer.is_floating_point()
    )
