"""Plans by the metrics of the paper's ablations, those included that the library does not offer.

Besides the library's metrics there are "inverted" (Table 3a: the traces handed out in reverse order, the least to the
layer that has the largest), "random" (the traces dealt out at random by a seed), and "cross" and "first+cross", whose Ω
has products between layers (`cross_terms.py`).
"""

from __future__ import annotations

import random
from dataclasses import replace

import cross_terms
import tracequant as tq
from tracequant.core.sensitivity import combine
from tracequant.core.settings import CRITERIA, PlanSettings

ABLATION_METRICS: tuple[str, ...] = (*CRITERIA, *cross_terms.CROSS_METRICS, "inverted", "random")


def plan_by(
    metric: str,
    request: PlanSettings,
    *,
    curvature: tq.Curvature,
    measured: tq.Sensitivity,
    perturbation: tq.Perturbation,
    seed: int = 0,
) -> tq.BitPlan:
    """The plan for `request` by one of `ABLATION_METRICS`, from the roundings that `measured` holds."""
    if metric in cross_terms.CROSS_METRICS:
        table = sensitivity_by(
            cross_terms.CROSS_METRICS[metric], curvature=curvature, measured=measured, perturbation=perturbation
        )
        return cross_terms.solve(table, perturbation, request)
    table = sensitivity_by(metric, curvature=curvature, measured=measured, perturbation=perturbation, seed=seed)
    return tq.solve(table, request)


def sensitivity_by(
    metric: str,
    *,
    curvature: tq.Curvature,
    measured: tq.Sensitivity,
    perturbation: tq.Perturbation | None = None,
    seed: int = 0,
) -> tq.Sensitivity:
    """Ω by a metric that is a sum over layers: the library's, "inverted" and "random"."""
    errors = (measured.weight_errors, measured.activation_errors, measured.weight_grid)
    if metric not in ("inverted", "random"):
        return combine(curvature, *errors, criterion=metric, perturbation=perturbation)
    order = None if metric == "inverted" else random.Random(seed)
    moved = replace(
        curvature,
        weights=dealt_out(curvature.weights, order),
        activations=dealt_out(curvature.activations, order),
    )
    # The layers' own traces stay those that were measured.
    return replace(combine(moved, *errors, criterion="trace"), criterion=metric, average_traces=measured.average_traces)


def dealt_out(estimates: dict[str, tq.TraceEstimate], order: random.Random | None) -> dict[str, tq.TraceEstimate]:
    """The same average traces for other layers: in reverse order, or shuffled by `order`."""
    ranked = sorted(estimates, key=lambda name: estimates[name].average_trace)
    receivers = ranked[::-1] if order is None else order.sample(ranked, len(ranked))
    dealt = {receiver: estimates[name].average_trace for name, receiver in zip(ranked, receivers, strict=True)}
    return {name: replace(estimates[name], average_trace=dealt[name]) for name in estimates}
