"""The best choice within any limits, proven: mixed-integer programming with HiGHS on a core that provably suffices.

The linear relaxation gives a price for every limit. With those prices each option has a penalty, and any choice that
takes an option costs at least the relaxation's bound plus that penalty. So options whose penalty is above the
distance from the bound to a known choice are out, whatever else is chosen. What is left, the core, is mostly one to
three options for a decision: a small and well scaled integer programme. Products of weight and activation bits are
written with one variable for each pair of options, which is exact.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracequant.allocation.problem import Amounts, Decision, Limit, Problem
from tracequant.core.errors import BudgetError

# The share of Ω within which a choice counts as proven: HiGHS works with tolerances of 1e-6 and less of the core.
TOLERANCE = 1e-9
TIME_LIMIT_S = 120.0
# By how much the core's reach grows at a time, and how often it may shrink.
GROWTH = 4.0
FINER = 5


@dataclass(frozen=True)
class Solution:
    """A choice, its objective, a proven lower bound on any choice's, and a price for one unit of every limit."""

    choice: tuple[int, ...]
    value: float
    bound: float
    prices: tuple[float, ...]


def minimise(problem: Problem) -> Solution | None:
    """The choice of least objective within the limits, or None if there is none.

    The bound equals the value up to `TOLERANCE`, unless HiGHS needs more than `TIME_LIMIT_S`: then it is below. Raises
    `BudgetError` if not even a choice was found in that time.
    """
    merged, split = _merge_lone_pairs(problem)
    kept = _undominated(merged)
    solution = _solve(restricted(merged, kept))
    if solution is None:
        return None
    choice = [options[j] for options, j in zip(kept, solution.choice, strict=True)]
    return replace(solution, choice=split(choice))


def nearest(problem: Problem, limit: Limit) -> float | None:
    """The least that any choice within the other limits needs of this one's resource; None if there is no choice."""
    others = tuple(other for other in problem.limits if other is not limit)
    solution = minimise(replace(problem, objective=limit.amounts, limits=others))
    return None if solution is None else solution.value


def _merge_lone_pairs(problem: Problem) -> tuple[Problem, Callable[[Sequence[int]], tuple[int, ...]]]:
    """Two decisions that meet in one pair and nowhere else, as one: a layer that alone reads its input.

    The options of the merged decision are all pairs. Also returns the way back from a choice.
    """
    meetings = Counter(itertools.chain(*problem.pairs))
    lone = [i for i, (d, e) in enumerate(problem.pairs) if meetings[d] == meetings[e] == 1 and not problem.chain]
    taken = {d for i in lone for d in problem.pairs[i]}
    rest = [d for d in range(len(problem.decisions)) if d not in taken]
    others = [i for i in range(len(problem.pairs)) if i not in lone]

    def of(amounts: Amounts) -> Amounts:
        return Amounts(
            tuple(amounts.single[d] for d in rest)
            + tuple(
                (amounts.single[d][:, None] + amounts.single[e][None, :] + amounts.pairs[i]).ravel()
                for i, (d, e) in ((i, problem.pairs[i]) for i in lone)
            ),
            tuple(amounts.pairs[i] for i in others),
        )

    def split(choice: Sequence[int]) -> tuple[int, ...]:
        found = dict(zip(rest, choice, strict=False))
        for i, j in zip(lone, choice[len(rest) :], strict=True):
            d, e = problem.pairs[i]
            found[d], found[e] = divmod(j, len(problem.decisions[e].bits))
        return tuple(found[d] for d in range(len(problem.decisions)))

    combined = tuple(
        Decision((), (), tuple(range(math.prod(len(problem.decisions[d].bits) for d in problem.pairs[i]))))
        for i in lone
    )
    place = {d: position for position, d in enumerate(rest)}
    merged = Problem(
        decisions=tuple(problem.decisions[d] for d in rest) + combined,
        pairs=tuple((place[d], place[e]) for d, e in (problem.pairs[i] for i in others)),
        objective=of(problem.objective),
        limits=tuple(replace(limit, amounts=of(limit.amounts)) for limit in problem.limits),
        chain=problem.chain,
    )
    return merged, split


def _undominated(problem: Problem) -> list[list[int]]:
    """Options of each decision without those that another one equals or beats in every respect.

    In a chain an option that is worse by itself may be the only one that lets the others be good.
    """
    tables = (problem.objective, *(limit.amounts for limit in problem.limits))
    kept = []
    for d, decision in enumerate(problem.decisions):
        columns = [amounts.single[d][:, None] for amounts in tables]
        for i, (first, second) in enumerate(problem.pairs):
            columns += [amounts.pairs[i] for amounts in tables if first == d]
            columns += [amounts.pairs[i].T for amounts in tables if second == d]
        matrix = np.concatenate(columns, axis=1)
        options = range(len(decision.bits))

        def beaten(j: int, matrix: NDArray[np.float64] = matrix, options: Sequence[int] = options) -> bool:
            return any(
                (matrix[k] <= matrix[j]).all() and (k < j or (matrix[k] < matrix[j]).any()) for k in options if k != j
            )

        kept.append([j for j in options if d in problem.chain or not beaten(j)])
    return kept


def restricted(problem: Problem, kept: list[list[int]]) -> Problem:
    """The problem with some options of each decision only."""

    def of(amounts: Amounts) -> Amounts:
        return Amounts(
            tuple(values[options] for values, options in zip(amounts.single, kept, strict=True)),
            tuple(table[np.ix_(kept[d], kept[e])] for table, (d, e) in zip(amounts.pairs, problem.pairs, strict=True)),
        )

    return replace(
        problem,
        decisions=tuple(
            replace(decision, bits=tuple(decision.bits[j] for j in options))
            for decision, options in zip(problem.decisions, kept, strict=True)
        ),
        objective=of(problem.objective),
        limits=tuple(replace(limit, amounts=of(limit.amounts)) for limit in problem.limits),
    )


def _solve(problem: Problem) -> Solution | None:
    """Bound, core, proof: the core grows until what it leaves out cannot be better than what it holds."""
    from tracequant.allocation.milp import Programme

    deadline = time.monotonic() + TIME_LIMIT_S
    only = tuple(0 for _ in problem.decisions)
    if all(len(decision.bits) == 1 for decision in problem.decisions):
        value = problem.objective.total(only, problem.pairs)
        return Solution(only, value, value, (0.0,) * len(problem.limits)) if problem.allows(only) else None
    if any(limit.amounts.least() > limit.bound * (1 + 1e-9) + 1e-9 for limit in problem.limits):
        return None
    programme = Programme(problem)
    relaxed = programme.relax()
    if relaxed is None:
        return None
    bound, penalty, prices = relaxed
    # To begin with about half as many options again as there are decisions.
    options = penalty[: programme.options]
    wanted = min(len(options) - 1, len(problem.decisions) + len(problem.decisions) // 2 + 50)
    reach = max(float(np.partition(options, wanted)[wanted]), 1e-9 * abs(bound))
    finer = 0
    while True:
        core = penalty <= reach
        found, core_bound, finished = programme.solve_core(core, reach, deadline)
        if found is None and not finished:
            raise BudgetError(
                f"no plan within these limits was found in {TIME_LIMIT_S:g} s, nor proven impossible; give fewer"
                " limits, or allow fewer bits (allowed_bits, allowed_activation_bits)"
            )
        whole = bool(core.all())
        if found is None:
            if whole:
                return None
            reach = max(GROWTH * reach, float(penalty[~core].min()))
            continue
        value = problem.objective.total(found, problem.pairs)
        gap = value - bound
        if finished and not whole and gap > reach:
            reach = min(gap * (1 + 1e-9), max(GROWTH * reach, float(penalty[~core].min())))
            continue
        if finished and finer < FINER and reach > max(GROWTH * gap, 0.1 * abs(value)):
            # HiGHS's tolerance is a share of the reach: a smaller core is solved more finely.
            reach = max(gap * (1 + 1e-9), 1e-9 * abs(value))
            finer += 1
            continue
        lowest = max(bound, core_bound if whole else min(core_bound, bound + reach))
        close = value - lowest <= TOLERANCE * abs(value)
        return Solution(found, value, value if close else lowest, prices)
