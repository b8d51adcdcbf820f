"""Rounding that repairs itself: GPTQ (Frantar et al. 2023) on one weight, for any uniform grid.

A weight is a matrix `[g, R, K]` here: g groups, R outputs in each, K inputs of an output. With A = E[x xᵀ] `[g, K, K]`
the mean over all positions of the products of these inputs (the Gram), rounding W to Ŵ changes the outputs by

    E‖(Ŵ − W) x‖² = Σ_rows (ŵ − w) A (ŵ − w)ᵀ.

GPTQ rounds one column after another, the largest of diag(A) first, and moves the columns that are still to come so that
they repair what they can. With U the upper Cholesky factor of A⁻¹, a column's error e = (w_j − ŵ_j) / U_jj moves the
others by −e · U_j,:, and the sum of all e² is the error above. What remains can be lowered further: codes one at a
time, each with all others held (coordinate descent), and scales by least squares for given codes. Both never raise the
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracequant.quantization.grid import Grid

# Added to the diagonal of a Gram, as a share of its mean: GPTQ's own choice.
DAMPING = 0.01
# Columns that are rounded before those after them are moved, all in one product.
BLOCK = 64


@dataclass(frozen=True)
class Factor:
    """A damped Gram in the order in which columns are rounded, and what rounding needs of it. It serves all widths.

    `order` `[g, K]` holds the column that is rounded first, second, ...; `gram` and `upper` are `[g, K, K]` in that
    order, in the precision of the weight.
    """

    order: Tensor
    gram: Tensor
    upper: Tensor

    def arranged(self, matrix: Tensor) -> Tensor:
        """A matrix `[g, R, K]` with its columns in the order of rounding."""
        return matrix.gather(-1, self.order[:, None, :].expand_as(matrix))

    def restored(self, matrix: Tensor) -> Tensor:
        """The inverse of `arranged`."""
        return torch.empty_like(matrix).scatter_(-1, self.order[:, None, :].expand_as(matrix), matrix)

    def error(self, change: Tensor) -> Tensor:
        """Mean squared error of each output, `[..., g, R]`, for an arranged change `[..., g, R, K]` of the weight."""
        return (torch.matmul(change, self.gram) * change).sum(-1)


def factorize(gram: Tensor, dtype: torch.dtype, damping: float = DAMPING) -> Factor:
    """The factor of a Gram `[g, K, K]`, worked out in float64.

    `damping` is a share of the diagonal's mean. Inputs that are always zero get that mean: they repair nothing and are
    rounded to the nearest.
    """
    gram = gram.double().clone()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal.add_(torch.where(diagonal > 0, damping * mean, mean))
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    rows = order[:, :, None].expand_as(gram)
    gram = gram.gather(1, rows).gather(2, rows.mT)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return Factor(order, gram.to(dtype), torch.linalg.cholesky(inverse, upper=True).to(dtype))


def sweep(weight: Tensor, factor: Factor, grid: Grid) -> Tensor:
    """Codes `[a, g, R, K]` by GPTQ for an arranged weight `[g, R, K]` and alternative grids `[a, g, R, 1 or K]`."""
    shape = (*grid.scale.shape[:-1], weight.shape[-1])
    values = _by_column(weight.expand(shape))
    scale, step, zero_point = (_by_column(part) for part in (grid.scale, grid.scale.reciprocal(), grid.zero_point))
    codes, largest = torch.empty_like(values), 2**grid.num_bits - 1
    for start in range(0, values.shape[1], BLOCK):
        stop = min(start + BLOCK, values.shape[1])
        block, upper = values[:, start:stop], factor.upper[:, start:stop, start:stop]
        inverse = upper.diagonal(dim1=-2, dim2=-1).reciprocal()[..., None]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            # `Grid.quantize` and `dequantize` of one column, in as few operations as it takes: there are many columns.
            k = start + j if scale.shape[1] > 1 else 0
            position = torch.addcmul(zero_point[:, k], block[:, j], step[:, k])
            code = torch.round(position, out=codes[:, start + j]).clamp_(0, largest)
            error = torch.mul(position.sub_(code), scale[:, k], out=errors[:, j]).mul_(inverse[:, j])
            block[:, j + 1 :].addcmul_(upper[:, j, j + 1 :, None], error[:, None], value=-1)
        values[:, stop:].baddbmm_(factor.upper[:, start:stop, stop:].mT, errors, alpha=-1)
    return _by_row(codes, shape)


def descend(weight: Tensor, codes: Tensor, factor: Factor, grid: Grid) -> Tensor:
    """Codes `[a, g, R, K]` after a pass of coordinate descent: each takes the level that is best while others stay."""
    slopes = _by_column(torch.matmul(grid.dequantize(codes) - weight, factor.gram))
    shape, codes = codes.shape, _by_column(codes)
    scale, step, largest = _by_column(grid.scale), _by_column(grid.scale.reciprocal()), 2**grid.num_bits - 1
    for start in range(0, codes.shape[1], BLOCK):
        stop = min(start + BLOCK, codes.shape[1])
        gram, local = factor.gram[:, start:stop, start:stop], slopes[:, start:stop].clone()
        inverse = gram.diagonal(dim1=-2, dim2=-1).reciprocal()[..., None]
        changes = torch.empty_like(local)
        for j in range(stop - start):
            k = start + j if scale.shape[1] > 1 else 0
            code = codes[:, start + j]
            best = torch.addcmul(code, local[:, j] * inverse[:, j], step[:, k], value=-1)
            best.round_().clamp_(0, largest)
            change = torch.mul(best - code, scale[:, k], out=changes[:, j])
            code.copy_(best)
            local.addcmul_(gram[:, j, :, None], change[:, None])
        slopes.baddbmm_(factor.gram[:, start:stop].mT, changes)
    return _by_row(codes, shape)


def _by_column(matrix: Tensor) -> Tensor:
    """`[a, g, R, K]` as `[g, K, rows]`, each column of all alternatives in one stretch of memory."""
    return matrix.permute(1, 3, 0, 2).flatten(2).contiguous()


def _by_row(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `_by_column`."""
    groups, rows, columns = shape[-3:]
    return matrix.view(groups, columns, -1, rows).permute(2, 0, 3, 1).reshape(shape)
