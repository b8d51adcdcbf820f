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
    """Codes `[..., g, R, K]` by GPTQ, for an arranged weight and a grid in its order; leading axes are alternatives."""
    weight = weight.expand(*grid.scale.shape[:-1], weight.shape[-1]).clone()
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[-1], BLOCK):
        stop = min(start + BLOCK, weight.shape[-1])
        block, upper = weight[..., start:stop], factor.upper[:, start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            levels = _column(grid, start + j)
            column = block[..., j : j + 1]
            rounded = levels.quantize(column)
            codes[..., start + j : start + j + 1] = rounded
            error = (column - levels.dequantize(rounded)).div_(upper[:, j : j + 1, j : j + 1])
            errors[..., j : j + 1] = error
            block[..., j + 1 :] -= error * upper[:, j : j + 1, j + 1 :]
        weight[..., stop:] -= torch.matmul(errors, factor.upper[:, start:stop, stop:])
    return codes


def descend(weight: Tensor, codes: Tensor, factor: Factor, grid: Grid) -> Tensor:
    """Codes after one pass of coordinate descent: each takes the level that is best while all others stay."""
    codes = codes.clone()
    slopes = torch.matmul(grid.dequantize(codes) - weight, factor.gram)
    for start in range(0, weight.shape[-1], BLOCK):
        stop = min(start + BLOCK, weight.shape[-1])
        gram, local = factor.gram[:, start:stop, start:stop], slopes[..., start:stop].clone()
        changes = torch.empty_like(local)
        for j in range(stop - start):
            levels = _column(grid, start + j)
            values = levels.dequantize(codes[..., start + j : start + j + 1])
            best = levels.quantize(values - local[..., j : j + 1] / gram[:, j : j + 1, j : j + 1])
            change = levels.dequantize(best) - values
            codes[..., start + j : start + j + 1] = best
            changes[..., j : j + 1] = change
            local += change * gram[:, j : j + 1, :]
        slopes += torch.matmul(changes, factor.gram[:, start:stop])
    return codes


def _column(grid: Grid, number: int) -> Grid:
    """The grid of one column; scales are one for each row, or one for each element."""
    if grid.scale.shape[-1] == 1:
        return grid
    return Grid(grid.scale[..., number : number + 1], grid.zero_point[..., number : number + 1], grid.num_bits)
