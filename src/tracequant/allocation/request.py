"""Checks of a request for a plan, before any sensitivity is looked at, and the request in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from tracequant.allocation.problem import Problem
from tracequant.errors import BudgetError
from tracequant.settings import PlanSettings

Space = Literal["full", "monotone"]
Method = Literal["exact", "pareto"]

WEIGHT_LIMITS = ("max_size_mb", "compression", "average_bits", "max_bops_g", "max_latency_ms")
ACTIVATION_LIMITS = ("average_activation_bits", "activation_compression", "max_activation_mb")


def check(request: PlanSettings) -> None:
    """Raise `BudgetError` for a request that makes no sense whatever the sensitivities are."""
    if request.by_accuracy:
        check_losses(request)
        return
    check_numbers(request)
    if request.method not in ("exact", "pareto"):
        raise BudgetError(f"unknown method {request.method!r}; choose 'exact' or 'pareto'")
    if request.method == "pareto":
        given = [name for name in WEIGHT_LIMITS if getattr(request, name) is not None]
        if len(given) != 1 or given[0] in ("max_bops_g", "max_latency_ms"):
            raise BudgetError(
                "Appendix E's search (method 'pareto') takes exactly one of max_size_mb, compression and average_bits,"
                f" got {', '.join(given) or 'none'}; leave the method at 'exact'"
            )


def check_numbers(request: PlanSettings) -> None:
    """Raise `BudgetError` unless there is a limit on something and every limit is a positive number."""
    given = {name: getattr(request, name) for name in (*WEIGHT_LIMITS, *ACTIVATION_LIMITS)}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        raise BudgetError("give at least one budget: " + ", ".join((*WEIGHT_LIMITS, *ACTIVATION_LIMITS)))
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise BudgetError(f"{name} must be a positive number, got {value}")


def check_losses(request: PlanSettings) -> None:
    """Raise `BudgetError` for limits on what a plan loses that are no numbers, or that come with one on its cost."""
    for name in ("max_accuracy_drop", "max_loss_increase"):
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BudgetError(f"{name} must be a number from 0, got {value}")
    if given := [name for name in WEIGHT_LIMITS if getattr(request, name) is not None]:
        raise BudgetError(
            "max_accuracy_drop and max_loss_increase ask for the smallest plan that loses no more, in place of a limit"
            f" on what it costs; leave out {', '.join(given)}"
        )
    if request.method != "exact":
        raise BudgetError("solving by accuracy walks the exact frontier; leave the method at 'exact'")


def describe(request: PlanSettings, problems: Iterable[Problem]) -> str:
    """The budget in words."""
    asked = [limit.asked for problem in problems for limit in problem.limits]
    if request.max_activation_mb is not None:
        asked.append(f"no activation above {request.max_activation_mb:g} MB")
    return ", ".join(asked)


def plain(rules: Mapping[str, int] | None) -> dict[str, int] | None:
    """Rules of one bit width each, as the request stores them."""
    return None if rules is None else dict(rules)


def listed(rules: Mapping[str, Iterable[int]] | None) -> dict[str, tuple[int, ...]] | None:
    """Rules of several bit widths each, as the request stores them."""
    return None if rules is None else {pattern: tuple(sorted(bits)) for pattern, bits in rules.items()}
