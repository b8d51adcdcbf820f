"""Plans whose Ω has products between layers: a local search on top of the exact solver.

With products Σ_{i<j} P(option of i, option of j) the objective is a quadratic form in the choice, for which no proof is
attempted. The search starts at the exact optimum of the layers' own Ω, takes the best change of one decision or of two
together that the limits allow until there is none, and then asks the exact solver for the optimum of the objective made
linear at the plan it has reached, from where it searches again, as long as that helps. Last, a few decisions are
changed at random and the search goes on from there, which may lead out of a plan that no two changes improve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tracequant.allocation import exact
from tracequant.allocation.problem import Amounts, Problem
from tracequant.sensitivity_result import Sensitivity

# How often the exact solver is asked again, and how many changes a search may make.
ROUNDS = 8
MOST_CHANGES = 10_000
# How often a few decisions are changed at random, and how many.
KICKS, KICKED = 20, 3


def improve(problem: Problem, sensitivity: Sensitivity, choice: Sequence[int]) -> tuple[int, ...]:
    """The best choice that the search finds from `choice`, which keeps to the limits; never a worse one."""
    form = _Form(problem, sensitivity)
    best = form.search(list(choice))
    for _ in range(ROUNDS):
        solution = exact.minimise(replace(problem, objective=form.linear(best)))
        if solution is None:
            break
        found = form.search(list(solution.choice))
        if form.value(found) >= form.value(best):
            break
        best = found
    random = np.random.default_rng(0)
    for _ in range(KICKS):
        kicked = list(best)
        for d in random.choice(len(best), min(KICKED, len(best)), replace=False):
            kicked[d] = int(random.integers(len(problem.decisions[d].bits)))
        if problem.allows(kicked):
            found = form.search(kicked)
            if form.value(found) < form.value(best):
                best = found
    return tuple(best)


class _Form:
    """The objective over options, all decisions' options one after the other."""

    def __init__(self, problem: Problem, sensitivity: Sensitivity) -> None:
        assert sensitivity.interactions is not None
        self._problem = problem
        sizes = [len(decision.bits) for decision in problem.decisions]
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._owner = np.repeat(np.arange(len(sizes)), sizes)
        number = {
            option: i
            for i, option in enumerate((n, b) for n, by_bits in sensitivity.weight_omega.items() for b in by_bits)
        }
        lower = np.zeros((len(number), len(number)))
        for i, row in enumerate(sensitivity.interactions):
            lower[i, : i + 1] = row
        products = lower + np.tril(lower, -1).T
        self._own = np.concatenate(problem.objective.single)
        # Row for row the options of the measurement that an option of the problem stands for, several where tied.
        members = np.zeros((len(self._own), len(number)))
        for d, decision in enumerate(problem.decisions):
            for k, num_bits in enumerate(decision.bits):
                chosen = [number[name, num_bits] for name in decision.weights]
                members[self._first[d] + k, chosen] = 1.0
                block = products[np.ix_(chosen, chosen)]
                self._own[self._first[d] + k] += (block.sum() - np.trace(block)) / 2
        self._products = members @ products @ members.T
        self._products[self._owner[:, None] == self._owner[None, :]] = 0.0
        # Limits without products bound every change at once; the others are asked about one change at a time.
        self._limits = [
            (np.concatenate(limit.amounts.single), limit) for limit in problem.limits if not limit.amounts.pairs
        ]

    def value(self, choice: Sequence[int]) -> float:
        """Ω of a choice, products included."""
        chosen = self._first[:-1] + np.asarray(choice)
        return float(self._own[chosen].sum() + self._products[np.ix_(chosen, chosen)].sum() / 2)

    def linear(self, choice: Sequence[int]) -> Amounts:
        """The objective's slope at a choice: what each option adds to the others as they are."""
        slope = self._slope(self._first[:-1] + np.asarray(choice))
        single = tuple(slope[a:b] for a, b in zip(self._first[:-1], self._first[1:], strict=True))
        return Amounts(single, self._problem.objective.pairs)

    def search(self, choice: list[int]) -> list[int]:
        """`choice` after the best change of one or two decisions again and again, until none is left."""
        for _ in range(MOST_CHANGES):
            change = self._best_change(choice)
            if change is None:
                break
            choice = change
        return choice

    def _slope(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        slope: NDArray[np.float64] = self._own + self._products[:, chosen].sum(1)
        return slope

    def _best_change(self, choice: list[int]) -> list[int] | None:
        chosen = self._first[:-1] + np.asarray(choice)
        now = chosen[self._owner]
        slope = self._slope(chosen)
        gain = slope - slope[now]
        # Option a and option b together; the diagonal is option a alone, since an option has no product with itself.
        cross = self._products
        both = gain[:, None] + gain[None, :] + cross - cross[:, now] - cross[now] + cross[np.ix_(now, now)]
        same = self._owner[:, None] == self._owner[None, :]
        both[same] = np.inf
        np.fill_diagonal(both, gain)
        for amounts, limit in self._limits:
            more = amounts - amounts[now]
            total = more[:, None] + more[None, :]
            np.fill_diagonal(total, more)
            room = limit.bound - amounts[chosen].sum()
            both[total > room + 1e-9 * abs(limit.bound)] = np.inf
        scale = abs(self.value(choice)) + float(np.abs(self._own).max())
        rows, columns = np.nonzero(both < -1e-12 * scale)
        for i in np.argsort(both[rows, columns], kind="stable"):
            changed = list(choice)
            for option in (rows[i], columns[i]):
                changed[self._owner[option]] = int(option - self._first[self._owner[option]])
            if self._problem.allows(changed):
                return changed
        return None
