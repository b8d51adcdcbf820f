"""Whether a model's Gauss-Newton traces are the Hessian's, at the cost of a forward pass over two samples.

The graph of that pass says which operations bend (`bending`). For operations that it cannot judge, such as a custom
function, a second derivative is measured: that of wᵀz by the weights of one layer that has them behind it, for random
w, along a random direction. It vanishes exactly where the identity H_ii = G_ii holds whatever the loss is. This takes
less than one plain pass over eight samples.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from tracequant.core.errors import SecondDerivativeError
from tracequant.core.points import QuantizationPoints
from tracequant.curvature.bending import Bends, find_bends
from tracequant.curvature.output_hessian import differentiable
from tracequant.curvature.products import check_differentiable, generator, reading_variables, require_grad
from tracequant.model.batches import Batch, Batches
from tracequant.model.device import arithmetic, model_device
from tracequant.model.memory import out_of_memory
from tracequant.model.state import double_backward, frozen_evaluation
from tracequant.model.task import Task, checked, forward

CHECKED_SAMPLES = 2
# ‖∂²(wᵀz)/∂W² v‖ ‖W‖ over ‖∂(wᵀz)/∂W‖ ‖v‖: rounding leaves 1e-6 in float32, a GELU or SiLU 1e-2 and more.
TOLERANCE = 1e-4
# Operations that a reason names.
NAMED = 5


def identity(model: nn.Module, batches: Batches, task: Task, points: QuantizationPoints, seed: int) -> str:
    """Whether Gauss-Newton traces are the Hessian's traces of this model, in words for `Curvature.reason`."""
    batch = next(iter(checked(batches, task, model)))
    try:
        with arithmetic("float32", model):
            if task.batch_size(batch) > CHECKED_SAMPLES:
                with suppress(Exception):  # a batch, a model or a loss that knows one size only
                    return _verdict(model, task.select(batch, 0, CHECKED_SAMPLES), task, points, seed)
            return _verdict(model, batch, task, points, seed)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return "Gauss-Newton traces; memory did not suffice to see whether they equal the Hessian's"


def _verdict(model: nn.Module, batch: Batch, task: Task, points: QuantizationPoints, seed: int) -> str:
    with frozen_evaluation(model), double_backward():
        parameters = require_grad(model, points)
        with reading_variables(model, points) as variables:
            outputs, loss = forward(task, model, batch)
        tensors = _read_by_the_loss(differentiable(outputs), loss)
        sources = {f"weights:{name}": [parameter] for name, parameter in parameters.items()}
        sources.update({f"activations:{name}": nodes for name, nodes in variables.items()})
        bends = find_bends(tensors, sources)
        return _in_words(bends, tensors, parameters, seed, model_device(model))


def _read_by_the_loss(tensors: list[Tensor], loss: Tensor) -> list[Tensor]:
    """The outputs that the loss reads: what bends on the way to others does not matter."""
    if not loss.requires_grad:
        return tensors
    read = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return [tensor for tensor, gradient in zip(tensors, read, strict=True) if gradient is not None] or tensors


def _in_words(
    bends: Bends, tensors: list[Tensor], parameters: dict[str, Tensor], seed: int, device: torch.device
) -> str:
    if bends.bent:
        operations = sorted(bends.bent, key=lambda name: len(bends.bent[name]), reverse=True)
        shown = [*operations[:NAMED], *(["others"] if len(operations) > NAMED else [])]
        text = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
        layers = {name for names in bends.bent.values() for name in names if name.startswith("weights:")}
        return (
            f"Gauss-Newton traces, not the Hessian's: {text} bend{'s' if len(shown) == 1 else ''} behind"
            f" {len(layers)} of {len(parameters)} layers"
        )
    if not bends.unknown:
        return "these Gauss-Newton traces equal the Hessian's: no operation behind a layer bends"
    operation, behind = max(bends.unknown.items(), key=lambda item: len(item[1]))
    name = next((name for name in parameters if f"weights:{name}" in behind), None)
    if name is None:
        return f"Gauss-Newton traces, which may differ from the Hessian's: it is not known whether {operation} bends"
    try:
        size = second_derivative(tensors, parameters[name], generator(seed, 0, device=device))
    except SecondDerivativeError:
        return (
            f"Gauss-Newton traces, which may differ from the Hessian's: {operation} or another operation has no second"
            " derivative"
        )
    if size <= TOLERANCE:
        return f"these Gauss-Newton traces equal the Hessian's: {operation} was measured, and does not bend"
    return f"Gauss-Newton traces, not the Hessian's: {operation} was measured behind layer {name}, and bends"


def second_derivative(tensors: list[Tensor], weight: Tensor, random: torch.Generator) -> float:
    """‖∂²(wᵀz)/∂W² v‖ ‖W‖ / (‖∂(wᵀz)/∂W‖ ‖v‖) for random w and v; `SecondDerivativeError` where there is none."""

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random, dtype=like.dtype, device=like.device)

    (slope,) = torch.autograd.grad(tensors, weight, [drawn(z) for z in tensors], create_graph=True)
    if not slope.requires_grad:
        return 0.0
    check_differentiable([slope])
    direction = drawn(weight)
    try:
        (bend,) = torch.autograd.grad(slope, weight, direction, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise SecondDerivativeError(str(error)) from error
    if bend is None:
        return 0.0
    tiny = torch.finfo(weight.dtype).tiny
    size = bend.norm() * weight.norm() / (slope.norm() * direction.norm()).clamp_min(tiny)
    return float(size.detach())
