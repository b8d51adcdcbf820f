"""A weight's codes and scales of the least error that compensation leaves in the layer's outputs.

Scales are chosen before the codes, and a range that is best for rounding to the nearest is not best once the columns
repair each other. So several scales around it are tried with the compensation itself, each output taking its own best,
and then scales and codes are improved in turns: least squares for the scale, a new sweep, coordinate descent. An output
keeps what it has unless its error falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracequant.core.weight_grid import WeightGrid
from tracequant.quantization.gptq import Factor, descend, factorize, sweep
from tracequant.quantization.grid import SMALLEST_SCALE, Grid, choose_weight_grid
from tracequant.quantization.input_gram import InputGram

# Scales that are tried, as shares of the one that is best for rounding to the nearest.
SHARES = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
# Rounds of scale, sweep and descent that follow: one lowers the error by 3 %, and three more by another 0.5 %.
REFINEMENTS = 1
# Elements of the alternatives that are swept together.
TOGETHER = 1 << 24


@dataclass(frozen=True)
class Piece:
    """A part of a weight whose columns repair each other: its elements `[g, R, K]`, and the factor of their Gram."""

    positions: Tensor
    factor: Factor

    @classmethod
    def of(cls, gram: InputGram, dtype: torch.dtype) -> Piece:
        """The piece that a Gram belongs to."""
        return cls(gram.positions, factorize(gram.gram, dtype))

    def arranged(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of the weight's shape, in the order of rounding."""
        return self.factor.arranged(tensor.flatten()[self.positions])

    def output_error(self, change: Tensor) -> float:
        """The mean squared change of the outputs that a change of the weight, of its shape, brings."""
        return float(self.factor.error(self.arranged(change)).double().sum())


def compensate(
    weight: Tensor, pieces: Sequence[Piece], num_bits: int, channel_axis: int, settings: WeightGrid
) -> tuple[Tensor, Grid]:
    """Codes 0 ... 2^bits - 1 of the weight's shape, as floats, and their grid.

    Elements that stand in no piece are rounded to the nearest.
    """
    start = choose_weight_grid(weight, num_bits, channel_axis, settings, importance=_importance(weight, pieces))
    search = _Search(weight, pieces, start)
    search.try_shares(torch.tensor(SHARES, dtype=weight.dtype, device=weight.device))
    for _ in range(REFINEMENTS):
        search.refine()
    grid = Grid(start.scale * search.shares(), start.zero_point, num_bits)
    codes = grid.quantize(weight).contiguous()
    for piece, arranged in zip(pieces, search.codes, strict=True):
        codes.view(-1)[piece.positions] = piece.factor.restored(arranged)
    return codes, grid


class _Search:
    """The best codes and scales of every unit so far: of each output that has a scale of its own, or of all together.

    A scale is a share of that of the `start`, `_best` `[units]`.
    """

    def __init__(self, weight: Tensor, pieces: Sequence[Piece], start: Grid) -> None:
        self._pieces, self._start = pieces, start
        self._weights = [piece.arranged(weight) for piece in pieces]
        numbers = torch.arange(start.scale.numel(), device=weight.device).view(start.scale.shape)
        units = [piece.arranged(numbers.expand(weight.shape)) for piece in pieces]
        # A scale of a row's own, or scales that lie across rows and then change by one factor.
        self._by_row = all(bool((unit == unit[..., :1]).all()) for unit in units)
        self._units = [unit[..., 0] if self._by_row else torch.zeros_like(unit[..., 0]) for unit in units]
        count = start.scale.numel() if self._by_row else 1
        self._grids = []
        for piece in pieces:
            scale, zero = (piece.arranged(t.expand(weight.shape)) for t in (start.scale, start.zero_point))
            cut = 1 if self._by_row else scale.shape[-1]
            self._grids.append(Grid(scale[..., :cut], zero[..., :cut], start.num_bits))
        self._best = torch.ones(count, dtype=weight.dtype, device=weight.device)
        self._errors = torch.full((count,), torch.inf, dtype=torch.float64, device=weight.device)
        self.codes = [torch.zeros_like(own) for own in self._weights]

    def shares(self) -> Tensor:
        """The best shares, in the shape of the start's scale."""
        return self._best.view(self._start.scale.shape) if self._by_row else self._best

    def try_shares(self, shares: Tensor) -> None:
        """Sweep with each of these shares of the start's scales."""
        largest = max(own.numel() for own in self._weights)
        for some in shares.split(max(1, TOGETHER // largest)):  # type: ignore[no-untyped-call]
            trial = some[:, None].expand(-1, len(self._best))
            codes = [
                sweep(own, piece.factor, self._grid(number, trial))
                for number, (own, piece) in enumerate(zip(self._weights, self._pieces, strict=True))
            ]
            self._keep_best(trial, codes)

    def refine(self) -> None:
        """Scales of least squares for the codes, and for these scales descents from the present codes and a sweep's."""
        trial = self._refitted()[None].expand(2, -1)
        codes = []
        for number, (own, piece) in enumerate(zip(self._weights, self._pieces, strict=True)):
            both = torch.cat([self.codes[number][None], sweep(own, piece.factor, self._grid(number, trial[:1]))])
            codes.append(descend(own, both, piece.factor, self._grid(number, trial)))
        self._keep_best(trial, codes)

    def _refitted(self) -> Tensor:
        """The share for each unit that has the least error with the present codes."""
        upper, lower = torch.zeros_like(self._errors), torch.zeros_like(self._errors)
        for number, (own, piece) in enumerate(zip(self._weights, self._pieces, strict=True)):
            grid = self._grid(number, torch.ones_like(self._best))
            values = grid.dequantize(self.codes[number])
            seen = torch.matmul(values, piece.factor.gram)
            units = self._units[number].flatten()
            upper.index_add_(0, units, (seen * own).sum(-1).flatten().double())
            lower.index_add_(0, units, (seen * values).sum(-1).flatten().double())
        share = upper / lower.clamp_min(1e-300)
        smallest = SMALLEST_SCALE / self._start.scale.min().double()
        return torch.where((lower > 0) & (share > smallest), share.to(self._best.dtype), self._best)

    def _grid(self, number: int, shares: Tensor) -> Grid:
        """A piece's grid with shares `[..., units]` of the start's scales."""
        grid = self._grids[number]
        scale = grid.scale * shares[..., self._units[number]][..., None]
        return Grid(scale, grid.zero_point.expand(scale.shape), grid.num_bits)

    def _keep_best(self, shares: Tensor, codes: Sequence[Tensor]) -> None:
        """Take what errs less than before, of alternative shares `[a, units]` and codes `[a, g, R, K]`."""
        errors = torch.zeros(len(shares), len(self._best), dtype=torch.float64, device=shares.device)
        for number, (own, piece) in enumerate(zip(self._weights, self._pieces, strict=True)):
            change = self._grid(number, shares).dequantize(codes[number]) - own
            errors.index_add_(1, self._units[number].flatten(), piece.factor.error(change).double().flatten(1))
        for row, error in enumerate(errors):
            better = error < self._errors
            self._best = torch.where(better, shares[row], self._best)
            self._errors = torch.where(better, error, self._errors)
            for number, units in enumerate(self._units):
                chosen = better[units][..., None]
                self.codes[number] = torch.where(chosen, codes[number][row], self.codes[number])


def _importance(weight: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """The mean square of what each element of the weight is multiplied with, of the weight's shape; 1 where unknown."""
    importance = torch.ones_like(weight).flatten()
    for piece in pieces:
        squares = piece.factor.gram.diagonal(dim1=-2, dim2=-1)[:, None, :].expand(piece.positions.shape)
        importance[piece.positions] = piece.factor.restored(squares.contiguous())
    return importance.view(weight.shape)
