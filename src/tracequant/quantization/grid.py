"""Uniform affine grids, 1 to 8 bits (HAWQ-V2, Appendix A)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tracequant.core.errors import ModelError
from tracequant.core.packed_layout import symmetric_zero_point
from tracequant.core.weight_grid import WeightGrid

MAX_BITS = 8


# The scale of a tensor of zeros, and the least that training may reach.
SMALLEST_SCALE = 1e-8


# A range of least squared error is one of so many shares of the whole range; every so many are tried first.
SHARES, STRIDE = 80, 4
# Values that are rounded by one call at most, where several shares are tried together.
TOGETHER = 1 << 18


RangeMethod = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True)
class Grid:
    """A uniform grid: `scale` and `zero_point` (in units of the scale) broadcast against the tensor they quantize."""

    scale: Tensor
    zero_point: Tensor
    num_bits: int

    def quantize(self, values: Tensor) -> Tensor:
        """Codes 0 ... 2^bits - 1 as floats, shape of `values`."""
        codes = values / self.scale
        if self.num_bits <= 2:
            # The levels of a balanced grid lie between the multiples of its scale.
            balanced = self.zero_point != self.zero_point.floor()
            before = torch.where(balanced, self.zero_point, 0.0)
            codes.add_(before).round_().add_(self.zero_point - before)
        else:
            codes.round_().add_(self.zero_point)
        return codes.clamp_(0, 2**self.num_bits - 1)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values that codes stand for. `quantize` gives exactly the same codes back."""
        return (codes - self.zero_point) * self.scale

    def round(self, values: Tensor) -> Tensor:
        """Each value replaced by its nearest on the grid, values outside the range by the grid's ends."""
        # `dequantize` in place: the same operations, and so the same bits.
        return self.quantize(values).sub_(self.zero_point).mul_(self.scale)


def check_bits(num_bits: int) -> None:
    """Raise `ModelError` unless 1 <= num_bits <= 8."""
    if not 1 <= num_bits <= MAX_BITS:
        raise ModelError(f"bit widths go from 1 to {MAX_BITS}, got {num_bits}")


def grid_for_range(low: Tensor, high: Tensor, num_bits: int, symmetric: bool) -> Grid:
    """The grid that covers `[low, high]`; ranges are widened to contain 0; one of zero width gets the least scale."""
    check_bits(num_bits)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    levels = 2**num_bits - 1
    if symmetric:
        zero_point = torch.full_like(low, symmetric_zero_point(num_bits))
        if num_bits <= 2:
            scale = 2 * torch.maximum(-low, high) / levels
        else:
            # Two's complement reaches one step further down than up.
            scale = torch.maximum(-low / 2 ** (num_bits - 1), high / (2 ** (num_bits - 1) - 1))
    else:
        scale = (high - low) / levels
    # A tensor of zeros, or so small that 1 / scale overflows. Balanced grids have no zero: theirs must be close to it.
    scale = torch.where(scale > 1e-30, scale, torch.full_like(scale, SMALLEST_SCALE))
    if not symmetric:
        zero_point = torch.round(-low / scale).clamp(0, levels)
    return Grid(scale, zero_point, num_bits)


def choose_grid(
    values: Tensor,
    num_bits: int,
    symmetric: bool = True,
    channel_axis: int | None = None,
    method: RangeMethod = "mse",
    percentile: float = 99.9,
    importance: Tensor | None = None,
) -> Grid:
    """The grid for `values`, one per slice along `channel_axis`, or one for the whole tensor if that is None.

    `method`: "minmax" covers all values; "percentile" covers the central `percentile` % of them; "mse" covers the
    share of the min-max range with the least squared error, one for each channel, to 1 / `SHARES`. `importance`, of the
    shape of `values`, weights these squares.
    """
    check_bits(num_bits)
    rows = _as_rows(values.detach(), channel_axis)
    if rows.numel() == 0:
        raise ModelError("cannot choose a quantization range for a tensor without elements")
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if method == "percentile":
        # kthvalue rather than quantile, which refuses tensors of more than 16 million elements.
        below = max(1, math.ceil(rows.shape[1] * (100 - percentile) / 200))
        low = rows.kthvalue(below, 1, keepdim=True).values
        high = rows.kthvalue(rows.shape[1] - below + 1, 1, keepdim=True).values
    if method == "mse":
        weights = None if importance is None else _as_rows(importance, channel_axis)
        shrink = _best_shrink(rows, low, high, num_bits, symmetric, weights)
        low, high = low * shrink, high * shrink
    grid = grid_for_range(low, high, num_bits, symmetric)
    shape = [1] * values.ndim
    if channel_axis is not None:
        shape[channel_axis] = -1
    return Grid(grid.scale.reshape(shape), grid.zero_point.reshape(shape), num_bits)


def _best_shrink(
    rows: Tensor, low: Tensor, high: Tensor, num_bits: int, symmetric: bool, weights: Tensor | None
) -> Tensor:
    """The share of each row's range `[rows, 1]` that gives the least squared error, weighted where there are weights.

    Every `STRIDE`-th share is tried first, then those around the best one of each row. Shares that cut off more than
    the least error so far are left out, as all smaller ones are: most of them at many bits.
    """
    group = max(1, TOGETHER // rows.numel())
    reach = torch.maximum(-low, high) if symmetric else high.clamp(min=0) - low.clamp(max=0)

    def best_of(steps: Tensor) -> Tensor:
        """Of increasing steps `[k, rows, 1]` the best one for each row, several at a time where there are few values.

        A share cuts this length off one extreme of a row, or off both together: half of its square is the least error,
        which leaves room for the step by which two's complement reaches further down than up. With weights the extremes
        may count for nothing, and all shares are tried.
        """
        grids = grid_for_range(low * (1 - steps / SHARES), high * (1 - steps / SHARES), num_bits, symmetric)
        cut = (steps / SHARES * reach).square() / 2
        least, best = torch.full_like(low, torch.inf), steps[0]
        for start in range(0, len(steps), group):
            some = slice(start, start + group)
            if weights is None and start and bool((cut[start] > least).all()):
                break
            grid = Grid(grids.scale[some], grids.zero_point[some], num_bits)
            squares = grid.round(rows).sub_(rows).square_()
            squares = squares if weights is None else squares.mul_(weights)
            errors, position = squares.sum(-1, keepdim=True).min(0, keepdim=True)
            best = torch.where(errors[0] < least, steps[some].gather(0, position)[0], best)
            least = torch.minimum(errors[0], least)
        return best

    coarse = torch.arange(0, SHARES, STRIDE, dtype=low.dtype, device=low.device).view(-1, 1, 1)
    centre = best_of(coarse.expand(-1, *low.shape))
    around = torch.arange(1 - STRIDE, STRIDE, dtype=low.dtype, device=low.device).view(-1, 1, 1)
    return 1 - best_of((centre + around).clamp(0, SHARES - 1)) / SHARES


def choose_weight_grid(
    weight: Tensor, num_bits: int, channel_axis: int, settings: WeightGrid, *, importance: Tensor | None = None
) -> Grid:
    """The grid for a weight tensor under `settings`; of the least squared error where `importance` weights it."""
    axis = channel_axis if settings.per_channel else None
    method = settings.range if importance is None else "mse"
    return choose_grid(weight, num_bits, settings.symmetric, axis, method, importance=importance)


def _as_rows(values: Tensor, axis: int | None) -> Tensor:
    """Values with those of one scale in a row: all of them where `axis` is None."""
    if axis is None:
        return values.reshape(1, -1)
    return values.movedim(axis, 0).flatten(1) if values.ndim > 1 else values.reshape(-1, 1)
