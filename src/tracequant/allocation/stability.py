"""How firmly the samples decide a plan: the plan solved again for resampled traces.

The same few uncertain inputs dominate the traces of all layers, so that the ratios between layers, which decide the
plan, are known better than any single trace. The honest measure of convergence is therefore the plan itself: draw the
samples anew with replacement (bootstrap), work out the traces, solve for the same budget, and see how often a layer
keeps its bits.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from tracequant.allocation.build import build
from tracequant.allocation.solve import solve
from tracequant.core.curvature import Curvature
from tracequant.core.errors import BudgetError
from tracequant.core.plan import BitPlan
from tracequant.core.sensitivity import Sensitivity, combine
from tracequant.core.settings import PlanSettings
from tracequant.core.weight_grid import WeightGrid

# The rule is applied after every batch, which leaves less time than a report has.
STOP_RESAMPLES = 40
# Criteria whose Ω follows from the traces.
_RESAMPLED = ("trace", "l2", "quadratic")


def is_stable(
    curvature: Curvature,
    weight_errors: dict[str, dict[int, float]],
    weight_grid: WeightGrid,
    *,
    settings: PlanSettings | None,
    share: float,
) -> bool:
    """Whether every layer keeps its bits in at least `share` of the resamples, for a rule when to stop measuring.

    Only limits on weights count here; without any the plan is the one half way between the least and the most bits that
    the rules leave. Where no plan is within the limits, nothing is stable.
    """
    asked = settings or PlanSettings()
    weights_only = PlanSettings(
        max_size_mib=asked.max_size_mib,
        compression=asked.compression,
        average_bits=asked.average_bits,
        fixed_bits=asked.fixed_bits,
        min_bits=asked.min_bits,
        allowed_bits=asked.allowed_bits,
        space=asked.space,
        solver=asked.solver,
    )
    sensitivity = combine(curvature, weight_errors, {}, weight_grid, criterion="trace")
    try:
        if not (weights_only.max_size_mib or weights_only.compression or weights_only.average_bits):
            weights_only = replace(weights_only, average_bits=_half_way(sensitivity, weights_only))
        plan = _solve_silently(sensitivity, weights_only)
    except BudgetError:
        return False
    kept = plan_stability(sensitivity, plan, curvature, weights_only, resamples=STOP_RESAMPLES)
    return kept is not None and min(kept.values()) >= share


def _half_way(sensitivity: Sensitivity, rules: PlanSettings) -> float:
    """Half way between the least and the most bits for each weight, on average, that the rules leave."""
    # A size that no plan exceeds: only the choices of bits are wanted.
    decisions = build(sensitivity, replace(rules, max_size_mib=1e12))[0].decisions
    by_name = sensitivity.points.by_name
    numels = [sum(by_name[name].numel for name in decision.weights) for decision in decisions]
    ends = [min(decision.bits) + max(decision.bits) for decision in decisions]
    return sum(numel * end for numel, end in zip(numels, ends, strict=True)) / (2 * sum(numels))


def plan_stability(
    sensitivity: Sensitivity,
    plan: BitPlan,
    curvature: Curvature,
    settings: PlanSettings,
    *,
    resamples: int = 100,
    seed: int = 0,
) -> dict[str, float] | None:
    """Layer name → share of `resamples` in which it gets the bits it has in `plan`; None without values to draw from.

    `plan` was solved from `sensitivity` for `settings`, and `curvature` is what the sensitivity was measured with: it
    holds the traces by sample. Traces of weights are drawn anew, samples together for all layers; perturbations and
    activations stay as they are. By "quadratic", which is the trace's Ω with the direction of each rounding, a layer's
    Ω is drawn in proportion to its trace. None too for criteria that do not rest on either, and for a plan that was
    found by evaluations.
    """
    if curvature.weight_values is None or sensitivity.criterion not in _RESAMPLED or settings.by_accuracy:
        return None
    names = list(plan.weight_bits)
    values = np.array([curvature.weight_values[name] for name in names])
    if values.shape[1] < 2:
        return None
    generator = np.random.default_rng(seed)
    kept = dict.fromkeys(names, 0)
    for _ in range(resamples):
        drawn = values[:, generator.integers(0, values.shape[1], values.shape[1])].mean(axis=1)
        resampled = _resampled(sensitivity, curvature, dict(zip(names, map(float, drawn), strict=True)))
        try:
            again = _solve_silently(replace(resampled, trace_covariance=()), settings)
        except BudgetError:  # the drawn traces have an order that the rules forbid: no layer keeps its bits
            continue
        for name in names:
            kept[name] += again.weight_bits[name] == plan.weight_bits[name]
    return {name: count / resamples for name, count in kept.items()}


def _resampled(sensitivity: Sensitivity, curvature: Curvature, traces: dict[str, float]) -> Sensitivity:
    """The sensitivity as it would be with these traces of weights."""
    if sensitivity.criterion == "quadratic":
        shares = {
            name: max(trace, 0.0) / curvature.weights[name].trace if curvature.weights[name].trace > 0 else 1.0
            for name, trace in traces.items()
        }
        omega = {
            name: {num_bits: shares[name] * value for num_bits, value in options.items()}
            for name, options in sensitivity.weight_omega.items()
        }
        return replace(sensitivity, weight_omega=omega)
    weights = {
        name: replace(curvature.weights[name], trace=trace, average_trace=trace / curvature.weights[name].numel)
        for name, trace in traces.items()
    }
    return combine(
        replace(curvature, weights=weights),
        sensitivity.weight_errors,
        sensitivity.activation_errors,
        sensitivity.weight_grid,
        criterion=sensitivity.criterion,
    )


def _solve_silently(sensitivity: Sensitivity, settings: PlanSettings) -> BitPlan:
    """The plan, without the warning about a budget that limits nothing: who solved first has seen it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solve(sensitivity, settings)
