"""Squared norms of each sample's weight gradient, without forming the gradients of a whole batch.

A convolution or linear layer's gradient for sample n is G_n = D_n A_nᵀ, with A_n `[k, T]` the unfolded input and D_n
`[o, T]` the gradient of the output, T positions. Then ‖G_n‖² costs o·k·T multiplications by forming G_n, or T²(o + k)
by the Gram form Σ (AᵀA) ⊙ (DᵀD). A lookup is a product with unit vectors, of which the Gram form needs no product.
Positions of several operations of one layer are laid side by side along T, which adds their gradients up before
squaring. The forms of a convolution are in `convolution_norms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tracequant.curvature import convolution_norms
from tracequant.curvature.matrix_norms import Factors, product_norms, side_by_side
from tracequant.curvature.operations import Convolution, Geometry, Lookup, Product, View

# Elements of the largest intermediate: samples are taken in chunks that stay below it.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Call:
    """An operation on N samples, which lie along the first axis of what it read and of the gradient of its output.

    Convolution: `[N, C, ...]` and `[N, O, ...]`. Product: `[N, g, k, T]` and `[N, g, o, T]`. Lookup: indices `[N, T]`
    and `[N, T, C]`. `operand` is that of the operation.
    """

    geometry: Geometry
    read: Tensor
    gradient: Tensor
    operand: View

    def rows(self, start: int, stop: int) -> Call:
        """The same for some of the samples."""
        return replace(self, read=self.read[start:stop], gradient=self.gradient[start:stop])

    def cast(self, dtype: torch.dtype) -> Call:
        """The same in the weight's precision, which autocast may have left."""
        read = self.read if isinstance(self.geometry, Lookup) else self.read.to(dtype)
        return replace(self, read=read, gradient=self.gradient.to(dtype))


def squared_norms(calls: Sequence[Call], dtype: torch.dtype) -> Tensor:
    """‖Σ_calls G_n‖² for every sample, float64 `[N]`, computed in `dtype`, the weight's precision.

    All calls are convolutions of one shape of weight, or products and lookups.
    """
    calls = [call.cast(dtype) for call in calls]
    step = max(1, int(CHUNK_ELEMENTS / max(1.0, _largest_intermediate(calls))))
    chunks = range(0, len(calls[0].gradient), step)
    return torch.cat([_norms_of([call.rows(n, n + step) for call in calls]).double() for n in chunks])


def inner_products(calls: Sequence[Call], directions: Tensor) -> Tensor:
    """⟨Σ_calls G_n, V⟩ for every sample and direction, float64 `[N, V]`; directions are `[V, *shape of the weight]`."""
    total = torch.zeros(len(calls[0].gradient), len(directions), dtype=torch.float64, device=directions.device)
    for call in calls:
        call = call.cast(directions.dtype)
        size = directions[0].numel() if not isinstance(call.geometry, Lookup) else call.gradient[0].numel()
        step = max(1, CHUNK_ELEMENTS // max(size, call.read[0].numel()))
        for n in range(0, len(total), step):
            total[n : n + step] += _products_of(call.rows(n, n + step), directions).double()
    return total


def _products_of(call: Call, directions: Tensor) -> Tensor:
    """`inner_products` of one call, by forming each sample's gradient."""
    if isinstance(call.geometry, Lookup):
        index, values = _entries(call)
        rows = [call.operand(direction)[index.clamp_min(0)] for direction in directions]
        return torch.stack([(row * values).sum((1, 2)) for row in rows], 1)
    if isinstance(call.geometry, Convolution):
        pair = convolution_norms.pair(call.geometry, call.read, call.gradient)
        gradients = convolution_norms.gradients(pair)
    else:
        left, right = _factors(replace(call, geometry=replace(call.geometry, flip=False)))
        operand = call.operand(directions[0])
        if _is_whole(operand.mT, directions[0]):  # the gradient in the order of the weight: no direction is copied
            return torch.matmul(torch.matmul(right, left.mT).flatten(1), directions.flatten(1).T)
        gradients = torch.matmul(left, right.mT).flatten(1)
    if _is_whole(call.operand(directions[0]), directions[0]):
        return torch.matmul(gradients, directions.flatten(1).T)
    return torch.matmul(gradients, torch.stack([call.operand(v).flatten() for v in directions], 1))


def _is_whole(operand: Tensor, weight: Tensor) -> bool:
    """Whether an operand is all of the weight in its own order, a view of it and no reordered copy."""
    alike = operand.data_ptr() == weight.data_ptr() and operand.numel() == weight.numel()
    return alike and operand.is_contiguous()


def _norms_of(calls: Sequence[Call]) -> Tensor:
    if isinstance(calls[0].geometry, Convolution):
        return convolution_norms.squared_norms(_convolutions(calls))
    products = [_factors(call) for call in calls if isinstance(call.geometry, Product)]
    lookups = [_entries(call) for call in calls if isinstance(call.geometry, Lookup)]
    if not lookups:
        return product_norms(*side_by_side(products))
    index = torch.cat([i for i, _ in lookups], 1)
    values = torch.cat([v for _, v in lookups], 1)
    same = index.unsqueeze(2) == index.unsqueeze(1)
    total = (torch.matmul(values, values.mT) * same).sum((1, 2))
    if products:
        left, right = (factor.squeeze(1) for factor in side_by_side(products))
        # Of the product's gradient only the rows that were looked up meet the lookup's.
        rows = left.gather(1, index.unsqueeze(2).expand(-1, -1, left.shape[2]))
        total = total + product_norms(left.unsqueeze(1), right.unsqueeze(1))
        total = total + 2 * (rows * torch.matmul(values, right)).sum((1, 2))
    return total


def _factors(call: Call) -> Factors:
    """The factors of a product's gradient that belong to the rows and to the columns of the weight."""
    assert isinstance(call.geometry, Product)
    gradient = call.gradient if call.geometry.scale == 1 else call.gradient * call.geometry.scale
    straight = call.geometry.first == call.geometry.flip
    return (call.read, gradient) if straight else (gradient, call.read)


def _entries(call: Call) -> tuple[Tensor, Tensor]:
    """Indices of a lookup and their gradients, zero at the padding index."""
    assert isinstance(call.geometry, Lookup)
    trained = (call.read != call.geometry.padding).unsqueeze(-1)
    return call.read, call.gradient * trained


def _convolutions(calls: Sequence[Call]) -> list[convolution_norms.Pair]:
    return [convolution_norms.pair(call.geometry, call.read, call.gradient) for call in calls]  # type: ignore[arg-type]


def _largest_intermediate(calls: Sequence[Call]) -> float:
    """Elements of the largest tensor that the norm of one sample makes."""
    if isinstance(calls[0].geometry, Convolution):
        return convolution_norms.largest_intermediate(_convolutions(calls))
    positions = sum(call.gradient.shape[1 if isinstance(call.geometry, Lookup) else 3] for call in calls)
    largest = 0.0
    for call in calls:
        if isinstance(call.geometry, Lookup):
            largest = max(largest, float(positions * max(positions, call.gradient.shape[2])))
        else:
            g, k, o = call.read.shape[1], call.read.shape[2], call.gradient.shape[2]
            product = positions**2 if positions * (o + k) < o * k else o * k
            largest = max(largest, float(g * max(product, positions * max(o, k))))
    return largest
