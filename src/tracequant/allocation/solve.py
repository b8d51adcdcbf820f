"""From sensitivities and a budget to a bit plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tracequant.allocation import exact
from tracequant.allocation.build import build
from tracequant.allocation.pareto import best_choice
from tracequant.allocation.problem import Problem, chosen_bits
from tracequant.allocation.refuse import refuse, refuse_too_large
from tracequant.allocation.request import Method, Space, check, describe, listed, plain
from tracequant.core.plan import BitPlan, priced
from tracequant.core.reasons import in_bits
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import Latency, PlanSettings


def solve(
    sensitivity: Sensitivity,
    *,
    max_size_mb: float | None = None,
    compression: float | None = None,
    average_bits: float | None = None,
    average_activation_bits: float | None = None,
    activation_compression: float | None = None,
    max_activation_mb: float | None = None,
    max_bops_g: float | None = None,
    max_latency_ms: float | None = None,
    latency: Latency | None = None,
    fixed_bits: Mapping[str, int] | None = None,
    min_bits: Mapping[str, int] | None = None,
    allowed_bits: Mapping[str, Iterable[int]] | None = None,
    allowed_activation_bits: Mapping[str, Iterable[int]] | None = None,
    space: Space = "full",
    ranking: dict[str, float] | None = None,
    method: Method = "exact",
) -> BitPlan:
    """The plan of least Ω, of weights and activations together, within all the limits that are given.

    Limits, at least one: `max_size_mb`, every byte of the packed file in MB of 2^20 bytes; `compression` and
    `average_bits` of the weights of quantized layers, the paper's W-Comp; `activation_compression` and
    `average_activation_bits`, over elements for one sample; `max_activation_mb`, the largest tensor that a layer reads,
    for one sample (`cost.peak_activation_bytes`); `max_bops_g`, 10^9 times multiply-accumulates times weight bits times
    activation bits for one sample; `max_latency_ms`, a sum over layers of `latency`, a table layer → weight bits →
    input bits → milliseconds (`read_latency`).

    Bits: `fixed_bits`, `min_bits` and `allowed_bits` go from a shell pattern of layer names to bits, and all rules that
    match a layer hold; `allowed_activation_bits` is for activation points, except the model's input, which keeps its 8
    bits. Activations take the most bits allowed, unless a limit on average activation bits, BOPs or latency makes them
    part of the choice.

    `method` "exact" finds a proven optimum with HiGHS; "pareto" is the search of HAWQ-V2's Appendix E, for one limit on
    size or weight bits. `space` "monotone" keeps to 𝓑 (Section 2.3): no layer has fewer bits than one of smaller
    average trace, or of smaller `ranking` (a value per layer, such as HAWQ's λ/n) where that is given.

    Raises `BudgetError` if no plan is within the limits, naming the ones that bind and the nearest that can be met, or
    if even the largest plan is.
    """
    request = PlanSettings(
        max_size_mb=max_size_mb,
        compression=compression,
        average_bits=average_bits,
        average_activation_bits=average_activation_bits,
        activation_compression=activation_compression,
        max_activation_mb=max_activation_mb,
        max_bops_g=max_bops_g,
        max_latency_ms=max_latency_ms,
        latency=latency,
        fixed_bits=plain(fixed_bits),
        min_bits=plain(min_bits),
        allowed_bits=listed(allowed_bits),
        allowed_activation_bits=listed(allowed_activation_bits),
        space=space,
        method=method,
    )
    check(request)
    problems = build(sensitivity, request, ranking)
    choices: list[tuple[int, ...]] = []
    bounds: list[float] = []
    prices: dict[str, float] = {}
    for problem in problems:
        if method == "pareto" and any(decision.weights for decision in problem.decisions):
            choice = best_choice(problem)
            if choice is None:
                refuse(problem)
            choices.append(choice)
            continue
        solution = exact.minimise(problem)
        if solution is None:
            refuse(problem)
        choices.append(solution.choice)
        bounds.append(solution.bound)
        for limit, price in zip(problem.limits, solution.prices, strict=True):
            if price > 0:
                prices[limit.resource] = prices.get(limit.resource, 0.0) + price * limit.price_unit
    refuse_too_large(problems)
    weight_bits, activation_bits = chosen_bits(problems, choices)
    plan = priced(
        sensitivity,
        weight_bits,
        activation_bits,
        method=f"{method}, {space} space",
        budget=describe(request, problems),
        notes=_notes(sensitivity, problems),
    )
    if method == "pareto":
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
