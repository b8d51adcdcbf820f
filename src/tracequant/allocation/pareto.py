"""The Pareto frontier of cost against Ω, found as in HAWQ-V2's Appendix E.

Layers are taken in groups of `group` (a). After each group the cost axis is cut into `intervals` (b), and in each
interval only the `keep` (t) partial assignments of least Ω go on. The result is exact where nothing had to be dropped
and close to it otherwise; the paper uses a = 5, b = 200, t = 5.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracequant.allocation.problem import Problem
from tracequant.core.errors import BudgetError

MAX_GROUP_CONFIGURATIONS = 1 << 16


@dataclass(frozen=True)
class Unit:
    """One decision: a layer or a tie, with its options (bits, cost, Ω) by increasing bits."""

    name: str
    bits: tuple[int, ...]
    cost: tuple[int, ...]
    omega: tuple[float, ...]


@dataclass(frozen=True)
class Assignment:
    """One option index per unit, with summed cost and Ω."""

    choice: tuple[int, ...]
    cost: int
    omega: float


def pareto_frontier(
    units: Sequence[Unit],
    monotone: bool = False,
    group: int = 5,
    intervals: int = 200,
    keep: int = 5,
) -> list[Assignment]:
    """Non-dominated assignments by increasing cost and decreasing Ω.

    With `monotone`, bits never increase along `units`, which the caller has sorted by decreasing average trace (the
    space 𝓑 of Section 2.3); otherwise all of m^L is searched. The cheapest assignment is always among the result.
    """
    if not units:
        return [Assignment((), 0, 0.0)]
    cost = np.zeros(1, dtype=np.int64)
    omega = np.zeros(1)
    last = np.full(1, np.iinfo(np.int64).max)
    choices = np.zeros((1, 0), dtype=np.int8)
    done = 0
    while done < len(units):
        members = _next_group(units[done:], group)
        done += len(members)
        table = _group_configurations(members, monotone)
        if not monotone:
            table = _undominated(*table)
        group_choice, group_cost, group_omega, first_bits, last_bits = table
        new_cost = (cost[:, None] + group_cost[None, :]).ravel()
        new_omega = (omega[:, None] + group_omega[None, :]).ravel()
        index = np.arange(len(new_cost))
        if monotone:
            index = np.flatnonzero((last[:, None] >= first_bits[None, :]).ravel())
        new_cost, new_omega = new_cost[index], new_omega[index]
        before, configuration = np.divmod(index, len(group_cost))
        # In the monotone space a cheap partial assignment that ends on few bits cannot stand in for one that ends on
        # many, so each last bit width is thinned out by itself.
        label = last_bits[configuration] if monotone else np.zeros(len(index), dtype=np.int64)
        kept = _thin_out(new_cost, new_omega, label, intervals, keep)
        cost, omega = new_cost[kept], new_omega[kept]
        last = last_bits[configuration[kept]]
        choices = np.concatenate([choices[before[kept]], group_choice[configuration[kept]]], axis=1)
    order = _frontier_order(cost, omega)
    return [Assignment(tuple(int(c) for c in choices[i]), int(cost[i]), float(omega[i])) for i in order]


def best_choice(problem: Problem) -> tuple[int, ...] | None:
    """The best choice that Appendix E finds within the problem's one limit on weights; None if it finds none."""
    units, members = weight_units(problem)
    feasible = [a for a in pareto_frontier(units, bool(problem.chain)) if a.cost <= problem.limits[0].bound]
    if not feasible:
        return None
    found = dict(zip(members, feasible[-1].choice, strict=True))
    return tuple(found.get(d, 0) for d in range(len(problem.decisions)))


def weight_units(problem: Problem) -> tuple[list[Unit], list[int]]:
    """The decisions about weights as units of the frontier searches, in the chain's order, and which they are.

    The cost is that of the problem's one limit on weights.
    """
    if len(problem.limits) != 1:
        raise BudgetError(
            "a frontier and Appendix E's search take one limit, on size or weight bits, got"
            f" {', '.join(limit.name for limit in problem.limits)}; leave the solver at 'exact'"
        )
    (limit,) = problem.limits
    members = list(problem.chain) or [d for d, decision in enumerate(problem.decisions) if decision.weights]
    units = [
        Unit(
            problem.decisions[d].weights[0],
            problem.decisions[d].bits,
            tuple(int(amount) for amount in limit.amounts.single[d]),
            tuple(float(omega) for omega in problem.objective.single[d]),
        )
        for d in members
    ]
    return units, members


def _next_group(units: Sequence[Unit], group: int) -> Sequence[Unit]:
    """The next `group` units, fewer where their configurations would be too many to enumerate."""
    size, configurations = 0, 1
    for unit in units[:group]:
        configurations *= len(unit.bits)
        if size > 0 and configurations > MAX_GROUP_CONFIGURATIONS:
            break
        size += 1
    return units[:size]


_Table = tuple[NDArray[np.int8], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def _group_configurations(members: Sequence[Unit], monotone: bool) -> _Table:
    """All configurations of a group: choices, cost, Ω, bits of its first and of its last member."""
    choice = np.array(list(itertools.product(*(range(len(unit.bits)) for unit in members))), dtype=np.int8)
    bits = np.stack([np.array(unit.bits)[choice[:, i]] for i, unit in enumerate(members)], axis=1)
    if monotone:
        falling = (np.diff(bits, axis=1) <= 0).all(axis=1)
        choice, bits = choice[falling], bits[falling]
    cost = np.zeros(len(choice), dtype=np.int64)
    omega = np.zeros(len(choice))
    for i, unit in enumerate(members):
        cost += np.array(unit.cost, dtype=np.int64)[choice[:, i]]
        omega += np.array(unit.omega)[choice[:, i]]
    return choice, cost, omega, bits[:, 0].astype(np.int64), bits[:, -1].astype(np.int64)


def _undominated(
    choice: NDArray[np.int8],
    cost: NDArray[np.int64],
    omega: NDArray[np.float64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
) -> _Table:
    """The configurations of a group that some frontier can use: dropping the rest loses nothing."""
    order = _frontier_order(cost, omega)
    return choice[order], cost[order], omega[order], first[order], last[order]


def _frontier_order(cost: NDArray[np.int64], omega: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the non-dominated entries, by increasing cost."""
    order = np.lexsort((omega, cost))
    best = np.minimum.accumulate(omega[order])
    strictly = np.concatenate([[True], best[1:] < best[:-1]])
    return np.asarray(order[strictly], dtype=np.int64)


def _thin_out(
    cost: NDArray[np.int64],
    omega: NDArray[np.float64],
    label: NDArray[np.int64],
    intervals: int,
    keep: int,
) -> NDArray[np.int64]:
    """Indices of the `keep` entries of least Ω in every interval of cost, by label, and of the cheapest entry."""
    low, high = int(cost.min()), int(cost.max())
    width = max((high - low) / intervals, 1e-9)
    interval = np.minimum(((cost - low) / width).astype(np.int64), intervals - 1)
    order = np.lexsort((cost, omega, interval, label))
    key = label[order] * intervals + interval[order]
    start = np.concatenate([[True], key[1:] != key[:-1]])
    position = np.arange(len(key)) - np.maximum.accumulate(np.where(start, np.arange(len(key)), 0))
    kept = order[position < keep]
    cheapest = int(np.lexsort((omega, cost))[0])
    return kept if cheapest in kept else np.append(kept, cheapest)
