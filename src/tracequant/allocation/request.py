"""Checks of a request for a plan, before any sensitivity is looked at, and the request in words."""

from __future__ import annotations

from collections.abc import Iterable

from tracequant.allocation.problem import Problem
from tracequant.core.errors import BudgetError
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings

WEIGHT_LIMITS = ("max_size_mib", "compression", "average_bits", "max_bops_g", "max_latency_ms")
LOSS_LIMITS = ("max_accuracy_drop", "max_loss_increase")
ACTIVATION_LIMITS = ("average_activation_bits", "activation_compression", "max_activation_mib")


def check_request(request: PlanSettings) -> None:
    """Raise `BudgetError` for limits that make no sense together, whatever the sensitivities are."""
    given = [name for name in WEIGHT_LIMITS if getattr(request, name) is not None]
    if request.by_accuracy:
        if given:
            raise BudgetError(
                f"the smallest plan within a loss of accuracy was asked for, and {', '.join(given)} too; give either"
                " limits on what a plan loses or limits on what it costs"
            )
        if request.solver != "exact":
            raise BudgetError("solving by accuracy walks the exact frontier; leave the solver at 'exact'")
        return
    if not given and all(getattr(request, name) is None for name in ACTIVATION_LIMITS):
        raise BudgetError(f"give at least one budget: {', '.join((*WEIGHT_LIMITS, *ACTIVATION_LIMITS))}")
    if request.solver == "pareto" and (len(given) != 1 or given[0] in ("max_bops_g", "max_latency_ms")):
        raise BudgetError(
            "Appendix E's search (solver='pareto') takes exactly one of max_size_mib, compression and average_bits,"
            f" got {', '.join(given) or 'none'}; leave the solver at 'exact'"
        )


def check_criterion(request: PlanSettings, sensitivity: Sensitivity) -> None:
    """Raise `BudgetError` if the plan was asked for by another criterion than the sensitivities'."""
    if request.criterion not in (None, sensitivity.criterion):
        raise BudgetError(
            f"the sensitivities are by criterion {sensitivity.criterion!r}, the plan was asked for by"
            f" {request.criterion!r}; measure the sensitivities by that one"
        )


def describe(request: PlanSettings, problems: Iterable[Problem]) -> str:
    """The budget in words."""
    asked = [limit.asked for problem in problems for limit in problem.limits]
    if request.max_activation_mib is not None:
        asked.append(f"no activation above {request.max_activation_mib:g} MiB")
    return ", ".join(asked)
