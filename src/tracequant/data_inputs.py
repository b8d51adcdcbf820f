"""Which modules read the data themselves: tensors that no weight has had a part in."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tracequant.model_state import frozen_evaluation
from tracequant.task import Batch, Task


def data_readers(model: nn.Module, batch: Batch, task: Task, modules: Iterable[str]) -> set[str]:
    """Those of `modules` that read a tensor which depends on no parameter, by one forward pass over the batch.

    The storage of the batch's own tensors does not tell: a model or a task that scales, normalises or pads its images
    hands its first layer a tensor of another storage, with the same 8 bits of information. None for a model that
    cannot be run with gradients.
    """
    found: set[str] = set()

    def reader(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            read = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)
            if read is not None and torch.is_grad_enabled() and not read.requires_grad:
                found.add(name)

        return hook

    with ExitStack() as stack:
        stack.enter_context(frozen_evaluation(model))
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for name in modules:
            handle = model.get_submodule(name).register_forward_pre_hook(reader(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        # The graph is looked at, never gone back through.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing))
        try:
            task.outputs(model, batch)
        except RuntimeError:  # it writes into its own weights, say
            return set()
    return found
