"""The whole frontier of cost against Ω, exactly, by dynamic programming over the cost.

`best[c]` is the least Ω of the units so far at a cost of at most c. Adding a unit takes, for every c, the best of its
options: best'[c] = min over options j of best[c − cost_j] + Ω_j. Costs have a common measure, for a network usually
hundreds of bytes, and units are added from the coarsest to the finest, so that tables stay short until the end. The
choices are remembered, one byte for each cell, and followed back only for the plans that somebody looks at.

Sums are in float64, in which L additions of values that are not negative err by at most L · 1.1e-16 of the sum; a plan
counts as better than a cheaper one only if its Ω is lower by more than `RESOLUTION` of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracequant.allocation.pareto import Unit
from tracequant.core.errors import BudgetError

RESOLUTION = 1e-12
MEMORY = 1 << 31


@dataclass(frozen=True, eq=False)
class Points:
    """The non-dominated assignments by increasing cost; `choice(i)` gives the option indices of one of them."""

    cost: NDArray[np.int64]
    omega: NDArray[np.float64]
    choice: Callable[[int], tuple[int, ...]]


def exact_frontier(units: Sequence[Unit], monotone: bool = False) -> Points:
    """Every assignment that no other beats in cost or Ω without being worse in the other.

    With `monotone`, bits never increase along `units` (the space 𝓑 of HAWQ-V2, Section 2.3). Raises `BudgetError` where
    the costs have so little in common that the tables would not fit into 2 GiB.
    """
    order = range(len(units)) if monotone else sorted(range(len(units)), key=lambda i: -_measure(units[i]))
    steps = _steps([units[i] for i in order], monotone)
    least = sum(min(unit.cost) for unit in units)
    best, back = (_fill_monotone if monotone else _fill)(steps)
    measure = steps[-1].measure if steps else 1
    start = int(np.isfinite(best).argmax())  # in the monotone space the cheapest options may not go together
    before = best[start:-1]
    better = np.flatnonzero(best[start + 1 :] < before - RESOLUTION * np.abs(before))
    cells = start + np.concatenate([[0], better + 1])

    def choice(i: int) -> tuple[int, ...]:
        found = [0] * len(units)
        for position, j in zip(order, back(int(cells[i])), strict=True):
            found[position] = j
        return tuple(found)

    return Points(least + cells * measure, best[cells], choice)


@dataclass(frozen=True)
class _Step:
    """A unit's options (index, bits, cost above its cheapest in units of `measure`, Ω) and the table's length after."""

    options: tuple[tuple[int, int, int, float], ...]
    measure: int
    length: int


def _measure(unit: Unit) -> int:
    return math.gcd(*(cost - unit.cost[0] for cost in unit.cost))


def _steps(units: Sequence[Unit], monotone: bool) -> list[_Step]:
    common, reach, steps = 0, 0, []
    for unit in units:
        common = math.gcd(common, _measure(unit))
        least = min(unit.cost)
        reach += max(unit.cost) - least
        measure = common or 1
        options = [(j, unit.bits[j], (unit.cost[j] - least) // measure, unit.omega[j]) for j in range(len(unit.bits))]
        steps.append(_Step(tuple(options), measure, reach // measure + 1))
    cells = sum(step.length * (len(step.options) if monotone else 1) for step in steps)
    if cells > MEMORY:
        raise BudgetError(
            f"the exact frontier would take {cells / (1 << 30):.1f} GiB, because the layers' sizes have no large common"
            ' measure; use solver="pareto", or solve single budgets, which has no such limit'
        )
    return steps


_Back = Callable[[int], list[int]]


def _finer(best: NDArray[np.float64], ratio: int) -> NDArray[np.float64]:
    """The same table on a measure `ratio` times finer."""
    return best if ratio == 1 else np.repeat(best, ratio, axis=-1)[..., : (best.shape[-1] - 1) * ratio + 1]


def _fill(steps: Sequence[_Step]) -> tuple[NDArray[np.float64], _Back]:
    best, measure = np.zeros(1), steps[0].measure if steps else 1
    chosen: list[NDArray[np.int8]] = []
    lengths: list[int] = []
    for step in steps:
        best, measure = _finer(best, max(measure // step.measure, 1)), step.measure
        # Beyond its end the table stays at its last value.
        best = np.concatenate([best, np.full(step.length - len(best), best[-1])])
        after = np.full(step.length, np.inf)
        choice = np.zeros(step.length, dtype=np.int8)
        candidate = np.empty(step.length)
        for j, _, shift, omega in sorted(step.options, key=lambda option: (option[2], option[3])):
            part = candidate[: step.length - shift]
            np.add(best[: step.length - shift], omega, out=part)
            improved = part < after[shift:]
            np.copyto(after[shift:], part, where=improved)
            np.copyto(choice[shift:], np.int8(j), where=improved)
        best = after
        chosen.append(choice)
        lengths.append(step.length)

    def back(cell: int) -> list[int]:
        found = []
        for i in range(len(steps) - 1, -1, -1):
            j = int(chosen[i][cell])
            found.append(j)
            cell -= next(shift for index, _, shift, _ in steps[i].options if index == j)
            if i:
                # The table of the units before, on their own coarser measure and no longer than it is.
                cell = min(cell * steps[i].measure // steps[i - 1].measure, lengths[i - 1] - 1)
        return found[::-1]

    return best, back


def _fill_monotone(steps: Sequence[_Step]) -> tuple[NDArray[np.float64], _Back]:
    """As `_fill`, with a row for the bits of the last unit: an option follows rows of at least as many bits."""
    widths = sorted({bits for step in steps for _, bits, _, _ in step.options}, reverse=True)
    row_of = {bits: row for row, bits in enumerate(widths)}
    best, measure = np.zeros((1, 1)), steps[0].measure if steps else 1
    before_of: list[NDArray[np.int8]] = []
    for step in steps:
        best, measure = _finer(best, max(measure // step.measure, 1)), step.measure
        # Least over the rows down to each one, and which row that is.
        lowest, source = best.copy(), np.zeros(best.shape, dtype=np.int8)
        for row in range(1, len(best)):
            worse = lowest[row] >= lowest[row - 1]
            source[row] = np.where(worse, source[row - 1], np.int8(row))
            np.copyto(lowest[row], lowest[row - 1], where=worse)
        after = np.full((len(widths), step.length), np.inf)
        for _, bits, shift, omega in step.options:
            row = min(row_of[bits], len(best) - 1)
            end = min(shift + best.shape[1], step.length)
            after[row_of[bits], shift:end] = lowest[row, : end - shift] + omega
            after[row_of[bits], end:] = lowest[row, -1] + omega
        before_of.append(source)
        best = after

    last = best.argmin(axis=0)

    def back(cell: int) -> list[int]:
        found, row = [], int(last[cell])
        for i in range(len(steps) - 1, -1, -1):
            j, _, shift, _ = next(option for option in steps[i].options if row_of[option[1]] == row)
            found.append(j)
            source = before_of[i]
            cell = min(cell - shift, source.shape[1] - 1)
            row = int(source[min(row, len(source) - 1), cell])
            if i:
                cell = cell * steps[i].measure // steps[i - 1].measure
        return found[::-1]

    return best.min(axis=0), back
