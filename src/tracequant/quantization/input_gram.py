"""Grams of what layers read: E[x xᵀ] over calibration inputs, for every operation that reads a layer's weight.

Layers are found in autograd's graph (`curvature.operations`): a convolution that pads inside its forward pass, a matrix
product written by hand and the projections of an attention are all seen. One forward pass over the inputs gives the
Grams of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracequant.core.errors import ModelError
from tracequant.core.points import QuantizationPoints
from tracequant.core.progress import track
from tracequant.curvature.operations import Convolution, Graph, Operation, Product
from tracequant.curvature.output_hessian import differentiable
from tracequant.curvature.passes import in_operations
from tracequant.curvature.products import require_grad
from tracequant.model.batches import Batch, Batches
from tracequant.model.device import measuring, model_device
from tracequant.model.memory import Microbatches
from tracequant.model.task import Task, checked

# Positions of a sample that a Gram is summed over, drawn at random where an operation has more.
POSITIONS = 256
# Columns of a Gram at most: a weight of longer rows is compensated in pieces, each within itself.
COLUMNS = 8192
# Elements of the unfolded inputs that are formed at a time.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class InputGram:
    """The Gram of the inputs of a weight, or of a part of it.

    `positions` `[g, R, K]` says which elements of the flattened weight stand in which row and column: g groups of R
    outputs that read K inputs. `gram` is E[x xᵀ] `[g, K, K]`, a mean over `rows` positions of all samples.
    """

    positions: Tensor
    gram: Tensor
    rows: int


def input_grams(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, tuple[InputGram, ...]]:
    """Layer → Grams of what its weight is multiplied with, from one forward pass over `batches`.

    Several calls of a layer, and several layers with one weight, are summed. Lookups (embeddings) have no Gram: each
    row of their weight is read alone, and nothing can be compensated. Layers that no batch reaches, and weights that an
    unknown operation reads, are left out. The model is left as it was.

    Raises `ModelError` for inputs of a layer that are NaN or infinite.
    """
    sums: dict[str, list[InputGram]] = {}
    microbatches = Microbatches(task)
    random = torch.Generator(model_device(model)).manual_seed(seed)
    with measuring(model):
        weights = require_grad(model, points)

        def measure(batch: Batch) -> dict[str, list[InputGram]]:
            with torch.enable_grad(), in_operations(model):
                outputs = task.outputs(model, batch)
            samples = task.batch_size(batch)
            operations, _ = Graph(differentiable(outputs), samples).find_operations(weights)
            return {
                name: [part for use in uses for part in _measured(use, weights[name], samples, random)]
                for name, uses in operations.items()
            }

        for batch in track(checked(batches, task, model), "Inputs of layers", progress):
            for found in microbatches.run(batch, measure):
                for name, parts in found.items():
                    for part in parts:
                        _add(sums.setdefault(name, []), part)
    for name, parts in sums.items():
        if not all(bool(part.gram.isfinite().all()) for part in parts):
            raise ModelError(f"the input of layer {name} is NaN or infinite on some batch")
    return {
        name: tuple(replace(part, gram=part.gram / part.rows) for part in _disjoint(parts, weights[name].numel()))
        for name, parts in sums.items()
    }


def _add(parts: list[InputGram], new: InputGram) -> None:
    """Add a sum to that of the same elements of the weight, where there is one."""
    for number, part in enumerate(parts):
        if part.positions.shape == new.positions.shape and torch.equal(part.positions, new.positions):
            parts[number] = InputGram(part.positions, part.gram + new.gram, part.rows + new.rows)
            return
    parts.append(new)


def _disjoint(parts: Sequence[InputGram], numel: int) -> Iterator[InputGram]:
    """The parts with the most rows first; those are left out that hold elements which stand in a part before."""
    taken = torch.zeros(numel, dtype=torch.bool, device=parts[0].positions.device)
    for part in sorted(parts, key=lambda part: -part.rows):
        if not bool(taken[part.positions].any()):
            taken[part.positions.flatten()] = True
            yield part


def _measured(operation: Operation, weight: Tensor, samples: int, random: torch.Generator) -> Iterator[InputGram]:
    """The sums over one operation's positions, in pieces of at most `COLUMNS` columns."""
    geometry = operation.geometry
    numbers = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    if isinstance(geometry, Convolution):
        positions = _convolution_matrix(operation.operand(numbers), geometry)
        rows = _windows(operation.read, geometry, random)
    elif isinstance(geometry, Product):
        operand = operation.operand(numbers)
        operand = operand if operand.ndim == 3 else operand[None]
        positions = (operand if geometry.first else operand.mT).contiguous()
        read = operation.read.to(weight.dtype)
        limit = samples * POSITIONS
        if read.shape[1] > limit:
            read = read[:, torch.randperm(read.shape[1], generator=random, device=read.device)[:limit]]
        rows = iter([read])
    else:
        return
    count, columns = 0, positions.shape[-1]
    cuts = [(start, min(start + COLUMNS, columns)) for start in range(0, columns, COLUMNS)]
    grams = [
        torch.zeros(len(positions), stop - start, stop - start, device=weight.device, dtype=weight.dtype)
        for start, stop in cuts
    ]
    for chunk in rows:
        chunk = chunk.to(weight.dtype)
        count += chunk.shape[1]
        for gram, (start, stop) in zip(grams, cuts, strict=True):
            piece = chunk[..., start:stop]
            gram += torch.matmul(piece.mT, piece)
    if count:
        for gram, (start, stop) in zip(grams, cuts, strict=True):
            yield InputGram(positions[..., start:stop].contiguous(), gram, count)


def _convolution_matrix(operand: Tensor, geometry: Convolution) -> Tensor:
    """A convolution's weight as `[g, outputs, inputs · kernel]`."""
    groups = geometry.groups
    if geometry.transposed:  # [C, O / g, ...]
        split = operand.reshape(groups, -1, *operand.shape[1:]).transpose(1, 2)
        return split.flatten(2)
    return operand.reshape(groups, -1, operand[0].numel())


def _windows(read: Tensor, geometry: Convolution, random: torch.Generator) -> Iterator[Tensor]:
    """What positions of a convolution's output read, `[g, positions, inputs · kernel]`, a few samples at a time."""
    kernel = geometry.weight_shape[2:]
    size = [1] * len(kernel)
    pads: list[int] = []
    stride = list(geometry.stride)
    if geometry.transposed:
        # The same as a convolution of what is read with zeros in between, by the kernel turned round.
        spread = [(length - 1) * step + 1 for length, step in zip(read.shape[2:], stride, strict=True)]
        wide = read.new_zeros(*read.shape[:2], *spread)
        every: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
        wide[every] = read
        read, stride = wide, size
        for pad, extra, length, step in zip(
            geometry.padding, geometry.output_padding, kernel, geometry.dilation, strict=True
        ):
            pads = [step * (length - 1) - pad, step * (length - 1) - pad + extra, *pads]
    else:
        for pad in geometry.padding:
            pads = [pad, pad, *pads]
    read = F.pad(read, pads)
    for dim, (length, step, dilation) in enumerate(zip(kernel, stride, geometry.dilation, strict=True), start=2):
        read = read.unfold(dim, dilation * (length - 1) + 1, step)[..., ::dilation]
    places = read.shape[2 : 2 + len(kernel)]
    if geometry.transposed:
        read = read.flip([-1 - axis for axis in range(len(kernel))])
    total = places.numel()
    chosen = torch.arange(total, device=read.device)
    if total > POSITIONS:
        chosen = torch.randperm(total, generator=random, device=read.device)[:POSITIONS]
    coordinates = torch.unravel_index(chosen, places)
    per_sample = len(chosen) * read.shape[1] * math.prod(kernel)
    for part in read.split(max(1, CHUNK_ELEMENTS // max(1, per_sample))):  # type: ignore[no-untyped-call]
        windows = part[(slice(None), slice(None), *coordinates)].flatten(3)  # [N, C, P, kernel]
        count, channels = windows.shape[:2]
        windows = windows.reshape(count, geometry.groups, channels // geometry.groups, len(chosen), -1)
        yield windows.permute(1, 0, 3, 2, 4).reshape(geometry.groups, count * len(chosen), -1)
