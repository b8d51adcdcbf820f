"""A batch, or a microbatch of one that fits into memory, with the loss of the whole batch.

The loss is always computed on the outputs of all samples, of which only the microbatch's have a graph. Whatever the
loss makes of its batch (a mean weighted by classes, say), the microbatches' Hessians therefore add up to that of the
whole, as long as no term of it has two samples in it, which is checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.core.errors import TaskError
from tracequant.model.batches import Batch, join
from tracequant.model.device import Precision, model_device
from tracequant.model.task import Task, checked_loss, total_loss


@dataclass(frozen=True)
class Microbatch:
    """Samples `start` to `stop` of batch number `index`, which has `size` samples.

    `others` are the outputs of the samples before and after it, as constants; None where it is the whole batch.
    """

    batch: Batch
    index: int
    start: int
    stop: int
    size: int
    precision: Precision = "float32"
    others: tuple[Any, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether no sample is left out."""
        return self.others is None

    @property
    def samples(self) -> int:
        """Number of samples that have a graph."""
        return self.stop - self.start

    def sample(self, task: Task, row: int) -> Microbatch:
        """One sample of the batch, as a batch of its own."""
        batch = self.batch if self.size == 1 else task.select(self.batch, row, row + 1)
        return Microbatch(batch, self.index, 0, 1, 1, self.precision)

    def outputs(self, model: nn.Module, task: Task) -> Any:
        """The outputs of the microbatch's samples."""
        samples = self.batch if self.others is None else task.select(self.batch, self.start, self.stop)
        return _outputs(model, task, samples, self.precision)

    def forward(self, model: nn.Module, task: Task) -> tuple[Any, Tensor]:
        """Outputs and loss of the whole batch, in which only the microbatch's outputs depend on the model."""
        outputs = self.outputs(model, task)
        if self.others is not None:
            before, after = self.others
            parts = ((before, self.start), (outputs, self.samples), (after, self.size - self.stop))
            outputs = join([p for p, length in parts if length], [length for _, length in parts if length])
        return outputs, checked_loss(task, outputs, self.batch)


def divide(model: nn.Module, task: Task, whole: Microbatch, count: int) -> Iterator[Microbatch]:
    """The batch in `count` microbatches of nearly the same number of samples; the outputs of all are computed first.

    Raises `TaskError` where batch or outputs cannot be divided by samples.
    """
    bounds = [whole.size * i // count for i in range(count + 1)]
    outputs = []
    with torch.no_grad():
        for start, stop in itertools.pairwise(bounds):
            outputs.append(_outputs(model, task, task.select(whole.batch, start, stop), whole.precision))
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    _check_separable(task, outputs, lengths, whole.batch)
    for i in range(count):
        others = tuple(
            join(outputs[part], lengths[part]) if lengths[part] else None for part in (slice(i), slice(i + 1, None))
        )
        yield Microbatch(whole.batch, whole.index, bounds[i], bounds[i + 1], whole.size, whole.precision, others)


def _check_separable(task: Task, outputs: Sequence[Any], lengths: Sequence[int], batch: Batch) -> None:
    """Raise `TaskError` if the loss has second derivatives by two microbatches' outputs, which the sum would leave out.

    Two microbatches differ in a bit of their numbers. So a vector that is zero where a bit is 0, and random elsewhere,
    may have no image there, for every bit.
    """
    free = [pytree.tree_map(lambda x: x.detach().requires_grad_() if _is_floating(x) else x, own) for own in outputs]
    leaves = [[x for x in pytree.tree_leaves(own) if _is_floating(x)] for own in free]
    flat = [x for own in leaves for x in own]
    numbers = [number for number, own in enumerate(leaves) for _ in own]
    slopes = torch.autograd.grad(
        total_loss(task, join(free, lengths), batch), flat, create_graph=True, allow_unused=True
    )
    bent = [slope for slope in slopes if slope is not None and slope.requires_grad]
    owners = [n for n, slope in zip(numbers, slopes, strict=True) if slope is not None and slope.requires_grad]
    for bit in range(len(outputs).bit_length() if bent else 0):
        vectors = [
            torch.randn(g.shape, generator=torch.Generator(g.device).manual_seed(bit), device=g.device, dtype=g.dtype)
            * (n >> bit & 1)
            for g, n in zip(bent, owners, strict=True)
        ]
        images = torch.autograd.grad(bent, flat, vectors, retain_graph=True, allow_unused=True)
        sizes = [0.0 if image is None else float(image.abs().sum()) for image in images]
        if sum(size for size, n in zip(sizes, numbers, strict=True) if not n >> bit & 1) > 1e-6 * sum(sizes):
            raise TaskError("the loss of one sample depends on others, so that the batch cannot be divided")


def _outputs(model: nn.Module, task: Task, batch: Batch, precision: Precision) -> Any:
    """The model's outputs; under autocast for bfloat16, and then in float32 again, since the loss needs its digits."""
    if precision != "bfloat16":
        return task.outputs(model, batch)
    context: AbstractContextManager[Any] = torch.autocast(model_device(model).type, torch.bfloat16)
    with context:
        outputs = task.outputs(model, batch)
    return pytree.tree_map(lambda x: x.float() if _is_half(x) else x, outputs)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
