"""From sensitivities and a budget to a bit plan."""

from __future__ import annotations

import math
from dataclasses import replace

from tracequant.allocation import exact
from tracequant.allocation.build import build
from tracequant.allocation.pareto import best_choice
from tracequant.allocation.perturbation import least_perturbation
from tracequant.allocation.problem import Problem, chosen_bits
from tracequant.allocation.refuse import refuse, warn_of_slack
from tracequant.allocation.request import check_criterion, check_request, describe
from tracequant.allocation.undecided import undecided
from tracequant.core.errors import BudgetError
from tracequant.core.options import resolve, takes
from tracequant.core.plan import BitPlan, priced
from tracequant.core.reasons import in_bits
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings


@takes(PlanSettings)
def solve(
    sensitivity: Sensitivity,
    settings: PlanSettings | None = None,
    *,
    ranking: dict[str, float] | None = None,
    **fields: object,
) -> BitPlan:
    """The plan of least Ω, of weights and activations together, within all the limits that are given.

    What Ω leaves open goes to the least ‖ΔW‖². `BitPlan.undecided` names layers whose bits the data do not decide.

    Limits and rules are the fields of `PlanSettings`, given as an object or by keyword: `solve(sensitivity,
    average_bits=3)`. At least one limit is needed, and all of them hold together. `max_size_mib` counts every byte of
    the packed file; `compression` and `average_bits` count the weights of quantized layers alone, as the paper does;
    `activation_compression` and `average_activation_bits` count elements for one sample; `max_activation_mib` is the
    largest tensor that a layer reads, for one sample (`cost.peak_activation_bytes`).

    All rules that match a layer hold. Activations take the most bits allowed, unless a limit on average activation
    bits, BOPs or latency makes them part of the choice. `space` "monotone" keeps to 𝓑 (Section 2.3): no layer has fewer
    bits than one of smaller average trace, or of smaller `ranking` (a value for each layer, such as HAWQ's λ/n) where
    that is given.

    Raises `SettingsError` for options that do not exist or are out of range, and `BudgetError` if no plan is within the
    limits, naming the ones that bind and the nearest that can be met. Warns if every plan is within the limits on
    weights.
    """
    request = resolve(PlanSettings, settings, fields)
    if request.by_accuracy:
        raise BudgetError("max_accuracy_drop and max_loss_increase need the model: use solve_by_accuracy")
    check_criterion(request, sensitivity)
    check_request(request)
    problems = build(sensitivity, request, ranking)
    choices: list[tuple[int, ...]] = []
    bounds: list[float] = []
    prices: dict[str, float] = {}
    for problem in problems:
        if request.solver == "pareto" and any(decision.weights for decision in problem.decisions):
            choice = best_choice(problem)
            if choice is None:
                refuse(problem)
            choices.append(choice)
            continue
        solution = exact.minimise(problem)
        if solution is None:
            refuse(problem)
        choices.append(least_perturbation(sensitivity, problem, solution.choice))
        bounds.append(solution.bound)
        for limit, price in zip(problem.limits, solution.prices, strict=True):
            if price > 0:
                prices[limit.resource] = prices.get(limit.resource, 0.0) + price * limit.price_unit
    warn_of_slack(problems, request)
    weight_bits, activation_bits = chosen_bits(problems, choices)
    plan = priced(
        sensitivity,
        weight_bits,
        activation_bits,
        solver=f"{request.solver}, {request.space} space",
        budget=describe(request, problems),
        notes=_notes(sensitivity, problems),
    )
    doubts: dict[str, str] = {}
    for problem, chosen in zip(problems, choices, strict=True):
        doubts |= undecided(sensitivity, problem, chosen, plan.total_omega)
    plan = replace(plan, undecided={name: doubts[name] for name in plan.weight_bits if name in doubts})
    if request.solver == "pareto":
        return plan
    bound = math.fsum(bounds)
    proven = plan.total_omega - bound <= exact.TOLERANCE * abs(plan.total_omega)
    return replace(plan, bound=plan.total_omega if proven else bound, prices=prices)


def _notes(sensitivity: Sensitivity, problems: list[Problem]) -> dict[str, str]:
    """Layer name → what the rules leave it, where that is a single width of several that were measured."""
    return {
        name: f"only {in_bits(decision.bits[0])} allowed"
        for problem in problems
        for decision in problem.decisions
        for name in decision.weights
        if len(decision.bits) == 1 and len(sensitivity.weight_omega[name]) > 1
    }
