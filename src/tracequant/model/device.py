"""The device and the arithmetic that a model is measured with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from tracequant.core.errors import ModelError, ResourceError, RunError
from tracequant.model.state import frozen_evaluation

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def measuring(model: nn.Module, precision: Precision = "float32") -> Iterator[None]:
    """The state in which everything is measured: evaluation mode, and products of float32 in this precision.

    Afterwards the model is as it was (see `frozen_evaluation`), and so are torch's settings.
    """
    with frozen_evaluation(model), arithmetic(precision, model):
        yield


@contextmanager
def arithmetic(precision: Precision, model: nn.Module) -> Iterator[None]:
    """On a GPU compute float32 products in TF32 inside the block where that is asked for, and else in float32.

    By default torch computes convolutions in TF32. Recurrent networks are computed by torch's own kernels, because
    cuDNN's have no backward pass in evaluation mode.
    """
    device = model_device(model)
    if precision not in get_args(Precision):
        raise ResourceError(f"unknown precision {precision!r}; choose {', '.join(get_args(Precision))}")
    if precision == "tf32" and device.type != "cuda":
        raise ResourceError("precision='tf32' is for CUDA devices; use float32 or bfloat16 here")
    if device.type != "cuda":
        yield
        return
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    switches = _tf32_switches()
    before = [getattr(backend, name) for backend, name, _, _ in switches]
    enabled = torch.backends.cudnn.enabled
    try:
        for backend, name, on, off in switches:
            setattr(backend, name, on if precision == "tf32" else off)
        torch.backends.cudnn.enabled = enabled and not recurrent
        yield
    finally:
        for (backend, name, _, _), value in zip(switches, before, strict=True):
            setattr(backend, name, value)
        torch.backends.cudnn.enabled = enabled


def _tf32_switches() -> list[tuple[Any, str, Any, Any]]:
    """The settings that decide about TF32: object, name of its attribute, values for TF32 and for float32."""
    cudnn: Any = torch.backends.cudnn
    if hasattr(cudnn, "conv") and hasattr(cudnn.conv, "fp32_precision"):
        # Where these are, the older ones cannot always be read.
        backends = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        return [(backend, "fp32_precision", "tf32", "ieee") for backend in backends]
    return [(backend, "allow_tf32", True, False) for backend in (torch.backends.cuda.matmul, cudnn)]


def check_parameters(model: nn.Module, advice: str = "model.float()") -> None:
    """Raise `ModelError` if parameters have too few digits for curvature; `advice` says what to use."""
    reduced = {str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if reduced:
        raise ModelError(
            f"the model has {', '.join(sorted(reduced))} parameters, too coarse for curvature; use {advice}"
        )


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


def choose_device(name: torch.device | str) -> torch.device:
    """The device of this name, "auto" for a GPU where there is one; `RunError` where it cannot be used."""
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device {name!r} cannot be used: {error}") from None
