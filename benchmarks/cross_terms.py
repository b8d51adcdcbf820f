"""Products between layers: plans ranked and solved with the whole quadratic form ½ E[(Σ_i u_i · ΔW_i)²].

The library's Ω is a sum over layers. The metrics "cross" and "first+cross" of the benchmarks add the products of every
two layers, Σ_{i<j} E[(u_i · ΔW_i)(u_j · ΔW_j)], which `tracequant.Perturbation` holds. The objective is then a
quadratic form in the choice of bits, and nothing is proven about the plans. The search starts at the plan of
`tracequant.solve`. It takes the best change of one decision or of two together that the limits allow until there is
none. Then it asks the exact solver for the optimum of the objective made linear at the plan it has reached, and
searches again from there, as long as that helps. At the end it changes a few decisions at random and searches from
there, which may lead out of a plan that no two changes improve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

import tracequant as tq
from tracequant.allocation import exact
from tracequant.allocation.build import build
from tracequant.allocation.problem import Amounts, Problem, chosen_bits
from tracequant.core.plan import reprice
from tracequant.core.settings import PlanSettings

# Criterion with products → the library's metric that has the same terms without them.
CROSS_METRICS = {"cross": "quadratic", "first+cross": "first+quadratic"}

# How often the exact solver is asked again, and how many changes a search may make.
ROUNDS = 8
MOST_CHANGES = 10_000
# How often a few decisions are changed at random, and how many.
KICKS, KICKED = 20, 3


def interaction(perturbation: tq.Perturbation, weight_bits: Mapping[str, int]) -> float:
    """What the products between layers add to a plan's Ω: Σ_{i<j} E[(u_i · ΔW_i)(u_j · ΔW_j)]."""
    chosen = [i for i, (name, b) in enumerate(_options(perturbation)) if weight_bits[name] == b]
    return math.fsum(perturbation.products[i][j] for i in chosen for j in chosen if j < i)


def scores(perturbation: tq.Perturbation) -> dict[str, Callable[[dict[str, int]], float]]:
    """The `extra_scores` of `tracequant.check_criteria`: Ω of a plan by each metric with products."""

    def omega(first_order: bool) -> Callable[[dict[str, int]], float]:
        table = perturbation.omega(first_order)
        return lambda bits: math.fsum(table[n][b] for n, b in bits.items()) + interaction(perturbation, bits)

    return {"cross": omega(False), "first+cross": omega(True)}


def solve(sensitivity: tq.Sensitivity, perturbation: tq.Perturbation, request: PlanSettings) -> tq.BitPlan:
    """The best plan found within the limits of `request`, its Ω with the products; never worse than `tq.solve`'s.

    `sensitivity` has the terms of single layers: metric "quadratic" or "first+quadratic" of the same `perturbation`.
    """
    start = tq.solve(sensitivity, request)
    problems = build(sensitivity, request)
    choices = []
    for problem in problems:
        choice = tuple(
            decision.bits.index(
                start.weight_bits[decision.weights[0]]
                if decision.weights
                else start.activation_bits[decision.activations[0]]
            )
            for decision in problem.decisions
        )
        has_weights = any(decision.weights for decision in problem.decisions)
        choices.append(improve(problem, perturbation, choice) if has_weights else choice)
    weight_bits, activation_bits = chosen_bits(problems, choices)
    plan = reprice(sensitivity, replace(start, weight_bits=weight_bits, activation_bits=activation_bits))
    return replace(
        plan,
        omega=plan.omega + interaction(perturbation, weight_bits),
        solver=f"{request.solver} and local search, {request.space} space",
        bound=None,
        prices={},
    )


def improve(problem: Problem, perturbation: tq.Perturbation, choice: Sequence[int]) -> tuple[int, ...]:
    """The best choice that the search finds from `choice`, which keeps to the limits; never a worse one."""
    form = _Form(problem, perturbation)
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


def _options(perturbation: tq.Perturbation) -> list[tuple[str, int]]:
    """The options (layer, bits) in the order of the perturbation's products."""
    return [(layer.name, b) for layer in perturbation.points.layers for b in perturbation.weight_bits]


class _Form:
    """The objective over options, all decisions' options one after the other."""

    def __init__(self, problem: Problem, perturbation: tq.Perturbation) -> None:
        self._problem = problem
        sizes = [len(decision.bits) for decision in problem.decisions]
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._owner = np.repeat(np.arange(len(sizes)), sizes)
        number = {option: i for i, option in enumerate(_options(perturbation))}
        lower = np.zeros((len(number), len(number)))
        for i, row in enumerate(perturbation.products):
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
