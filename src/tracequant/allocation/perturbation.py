"""Among plans of equal Ω the one of least ‖ΔW‖²: what Ω cannot tell apart, and bytes that are left over, go by that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tracequant.allocation import exact
from tracequant.allocation.problem import ROUNDING, Amounts, Decision, Problem
from tracequant.core.sensitivity import Sensitivity


def least_perturbation(sensitivity: Sensitivity, problem: Problem, choice: Sequence[int]) -> tuple[int, ...]:
    """The choice of least ‖ΔW‖² (and ‖Δa‖²) within the limits, in which no decision's Ω is above that of `choice`.

    `choice` itself where no other has less. So Ω never rises, and what was proven of it stays proven. Only decisions
    that Ω leaves open have more than one option here: layers whose Ω is zero, or equal at several widths, or so small
    that the solver's tolerance does not see it. Plans whose Ω is equal by a coincidence of different layers stay as
    they are.
    """
    options = [
        [j for j in range(len(omega)) if omega[j] <= omega[chosen]]
        for omega, chosen in zip(problem.objective.single, choice, strict=True)
    ]
    options = _affordable(problem, options)
    if all(len(of) == 1 for of in options):
        return tuple(choice)
    errors = Amounts(
        tuple(np.array([_error(sensitivity, decision, b) for b in decision.bits]) for decision in problem.decisions),
        problem.objective.pairs,
    )
    open_problem = exact.restricted(replace(problem, objective=errors), options)
    solution = exact.minimise(open_problem)
    if solution is None:
        return tuple(choice)
    better = tuple(of[j] for of, j in zip(options, solution.choice, strict=True))
    return better if errors.total(better, problem.pairs) < errors.total(choice, problem.pairs) else tuple(choice)


def _affordable(problem: Problem, options: list[list[int]]) -> list[list[int]]:
    """Options without those that exceed a limit even where all other decisions take what uses least of it."""
    if problem.pairs:
        return options
    for limit in problem.limits:
        single = limit.amounts.single
        least = [amounts[of].min() for amounts, of in zip(single, options, strict=True)]
        room = limit.bound * (1 + ROUNDING) - sum(least)
        options = [
            [j for j in of if amounts[j] - low <= room] for amounts, of, low in zip(single, options, least, strict=True)
        ]
    return options


def _error(sensitivity: Sensitivity, decision: Decision, bits: int) -> float:
    """‖ΔW‖² and ‖Δa‖² of a decision; zero where a published table does not give it."""
    tables = (
        (sensitivity.weight_errors, decision.weights),
        (sensitivity.activation_errors, decision.activations),
    )
    return math.fsum(table.get(name, {}).get(bits, 0.0) for table, names in tables for name in names)
