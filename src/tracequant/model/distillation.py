"""The distance of a student's outputs to its teacher's, for any loss and any nesting of outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tracequant.core.errors import TaskError
from tracequant.model.batches import describe
from tracequant.model.memory import out_of_memory
from tracequant.model.softmax import softmax_scale

# Probabilities of logits up to this size are far enough from 0 and 1 to recognise a softmax by them in float32.
LARGEST_LOGIT = 2.0


@dataclass(frozen=True)
class _Bend:
    """How the loss bends in one output tensor: `axis` and `scale` of a softmax, None where it is of another kind."""

    softmax: tuple[int, Tensor] | None


def output_distance(loss: Callable[[Any], Tensor], outputs: Any, teacher_outputs: Any) -> Tensor:
    """The distance between two models' outputs, summed over the output tensors that the loss depends on.

    Where the loss's Hessian by a tensor is that of a softmax, α (diag(p) − p pᵀ) at every position, the distance is
    Σ α · KL(teacher ‖ student) over positions. For cross-entropy α is the position's weight in the mean, so that the
    distance is averaged as the loss is, and positions that the loss ignores count nothing. Elsewhere it is the mean
    squared difference. The loss itself says what applies: it is differentiated at the student's outputs alone.

    Raises `TaskError` if the outputs of the two differ in structure or shape, or hold no tensor that the loss uses.
    """
    leaves, structure = pytree.tree_flatten(outputs)
    teacher_leaves, teacher_structure = pytree.tree_flatten(teacher_outputs)
    if len(leaves) != len(teacher_leaves) or structure != teacher_structure:
        raise TaskError(
            f"the student returns {describe(outputs)} and the teacher {describe(teacher_outputs)}, expected outputs of"
            " the same structure; give the task a distillation_loss that compares them"
        )
    bends = _bends(loss, leaves, structure)
    if not any(bends):
        raise TaskError(
            f"the loss uses no tensor of the outputs ({describe(outputs)}; custom classes are not looked into), so that"
            " they cannot be compared with a teacher's; give the task a distillation_loss, or fine-tune without a"
            " teacher (distillation=0)"
        )
    distances = []
    for bend, student, teacher in zip(bends, leaves, teacher_leaves, strict=True):
        if bend is None:
            continue
        if student.shape != teacher.shape:
            raise TaskError(
                f"an output of the student has shape {list(student.shape)} and the teacher's {list(teacher.shape)},"
                " expected the same; give the task a distillation_loss that compares them"
            )
        distances.append(_distance(bend, student, teacher))
    return torch.stack(distances).sum()


def softmax_axis(loss: Callable[[Any], Tensor], outputs: Tensor) -> int | None:
    """The axis of the classes if the loss bends in the outputs as a softmax along it does, else None."""
    (bend,) = _bends(loss, [outputs], pytree.tree_structure(outputs))
    return None if bend is None or bend.softmax is None else bend.softmax[0]


def divergence(student: Tensor, teacher: Tensor, axis: int) -> Tensor:
    """KL(teacher ‖ student) of the class probabilities along `axis`, which stays with length 1."""
    terms = F.kl_div(student.log_softmax(axis), teacher.log_softmax(axis), reduction="none", log_target=True)
    return terms.sum(axis, keepdim=True)


def _distance(bend: _Bend, student: Tensor, teacher: Tensor) -> Tensor:
    if bend.softmax is None:
        return (student - teacher).square().mean()
    axis, scale = bend.softmax
    return (scale * divergence(student, teacher, axis)).sum()


def _bends(loss: Callable[[Any], Tensor], leaves: Sequence[Any], structure: Any) -> list[_Bend | None]:
    """What the loss makes of every leaf, None for those that it does not depend on, and for repetitions."""
    numbers = {
        id(x): i for i, x in reversed(list(enumerate(leaves))) if isinstance(x, Tensor) and x.is_floating_point()
    }
    first = sorted(numbers.values())
    bends: list[_Bend | None] = [None] * len(leaves)
    if not first:
        return bends
    with torch.enable_grad():
        points = {i: _shrunk(leaves[i]).requires_grad_() for i in first}
        # A copy for the loss, which may work in place.
        free = [points[numbers[id(x)]].clone() if id(x) in numbers else x for x in leaves]
        value = loss(pytree.tree_unflatten(free, structure))
        if not value.requires_grad:
            return bends
        inputs = list(points.values())
        slopes = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
        for i, slope in zip(first, slopes, strict=True):
            if slope is not None:
                bends[i] = _Bend(_softmax(points[i], slope))
    return bends


def _softmax(point: Tensor, slope: Tensor) -> tuple[int, Tensor] | None:
    """Axis and scale of the softmax whose Hessian the loss has by one tensor, `slope` being its gradient there."""
    if not slope.requires_grad:
        return None
    generator = torch.Generator(point.device).manual_seed(0)
    vector = torch.randn(point.shape, generator=generator, dtype=point.dtype, device=point.device)
    try:
        (image,) = torch.autograd.grad(slope, point, vector, retain_graph=True, allow_unused=True)
    except RuntimeError as error:  # a loss without a second derivative
        if out_of_memory(error):
            raise
        return None
    if image is None or not image.any():
        return None
    return softmax_scale(point.detach(), vector, image)


def _shrunk(outputs: Tensor) -> Tensor:
    """Outputs made smaller where they are large: the kind of a Hessian does not depend on the point.

    Multiplied by a factor below 1, probabilities and other positive outputs stay in the domain of their loss.
    """
    outputs = outputs.detach()
    largest = outputs.abs().amax() if outputs.numel() else outputs.new_zeros(())
    return outputs * (LARGEST_LOGIT / largest.clamp_min(LARGEST_LOGIT))
