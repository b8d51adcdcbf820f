"""Budgets that no plan meets: errors that name the nearest one. Budgets that every plan meets: a warning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from tracequant.allocation import exact
from tracequant.allocation.problem import Problem
from tracequant.allocation.request import WEIGHT_LIMITS
from tracequant.core.errors import BudgetError
from tracequant.core.settings import PlanSettings

# How far above the largest plan a budget may be without a remark: as far as rounding it to a readable number takes it.
SLACK = 1e-3


def warn_of_slack(problems: Sequence[Problem], request: PlanSettings) -> None:
    """Warn the caller of `solve` where the largest plan is within all limits on weights: they limit nothing."""
    limits = [(limit, problem) for problem in problems for limit in problem.limits if limit.name in WEIGHT_LIMITS]
    largest = [limit.amounts.most() for limit, _ in limits]
    idle = [
        limit.bound > most * (1 + SLACK) + (1 if isinstance(most, int) else 0)
        for (limit, _), most in zip(limits, largest, strict=True)
    ]
    if not limits or not all(idle):
        return
    needs = ", ".join(limit.say(most) for (limit, _), most in zip(limits, largest, strict=True))
    asked = ", ".join(limit.asked for limit, _ in limits)
    rules = [name for name in ("fixed_bits", "allowed_bits") if getattr(request, name)]
    after_rules = f" that {' and '.join(rules)} leave" if rules else ""
    larger = f"looser {' and '.join(rules)}" if rules else "measuring more bits (weight_bits)"
    warnings.warn(
        f"the budget, {asked}, is above the largest plan{after_rules}, which has {needs} with the most bits of"
        f" {offered_bits(limits[0][1])} in every layer; it limits nothing, and only {larger} would give a larger plan",
        stacklevel=3,
    )


def refuse(problem: Problem) -> NoReturn:
    """Raise `BudgetError` with the limits that cannot be met, alone or together, and the nearest that can."""
    if exact.minimise(replace(problem, limits=())) is None:
        raise BudgetError(
            "no plan keeps to the monotone space under these rules: a layer of larger average trace may not have fewer"
            " bits than one of smaller; change fixed_bits, min_bits or allowed_bits, or search the full space"
        )
    alone = [exact.nearest(replace(problem, limits=(limit,)), limit) for limit in problem.limits]
    broken = [
        (limit, least)
        for limit, least in zip(problem.limits, alone, strict=True)
        if least is not None and not limit.allows(least)
    ]
    weights = any(decision.weights for decision in problem.decisions)
    offer = "weight_bits" if weights else "activation_bits"
    if broken:
        asked = ", ".join(limit.asked for limit, _ in broken)
        reached = ", ".join(limit.say(least) for limit, least in broken)
        kept = "" if weights else " (the model's input keeps 8)"
        raise BudgetError(
            f"no plan fits the budget, {asked}: with the fewest bits of {offered_bits(problem)}{kept} the nearest is"
            f" {reached}; ask for that or more room, or measure fewer bits ({offer})"
        )
    ways = []
    for limit in problem.limits:
        least = exact.nearest(problem, limit)
        if least is not None and not limit.allows(least):
            ways.append(f"instead of {limit.asked}, {limit.say(least)}")
    raise BudgetError(
        f"no plan fits the budget: {', '.join(limit.asked for limit in problem.limits)} can each be met, but not"
        f" together; the nearest with the others as they are: {'; or '.join(ways) or 'none by changing a single limit'}"
    )


def offered_bits(problem: Problem) -> list[int]:
    """The weight bits that a problem has on offer; activation bits if it is about those alone."""
    about_weights = any(decision.weights for decision in problem.decisions)
    return sorted({b for decision in problem.decisions for b in decision.bits if decision.weights or not about_weights})
