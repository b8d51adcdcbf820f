"""What the frontier figure shows of a run: all plans worth having, and some to point out."""

from __future__ import annotations

import math
from contextlib import suppress

from tracequant.allocation.frontier import Frontier, frontier
from tracequant.allocation.solve import solve
from tracequant.allocation.uniform import uniform_plan
from tracequant.core.errors import BudgetError
from tracequant.core.evaluations import EvaluatedPlan, Evaluations
from tracequant.core.plan import MIB, BitPlan
from tracequant.core.reasons import in_bits
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings
from tracequant.report import figures
from tracequant.run.directory import RunDirectory


def evaluated_plans(sensitivity: Sensitivity, evaluations: Evaluations | None) -> list[tuple[EvaluatedPlan, float]]:
    """Evaluated plans of this run's layers and weight grid with their Ω by the plan's criterion, by size."""
    plans = []
    for row in evaluations.plans if evaluations is not None else ():
        same_layers = row.weight_bits.keys() == sensitivity.weight_omega.keys()
        known = same_layers and row.weight_grid == sensitivity.weight_grid
        if known and all(b in sensitivity.weight_omega[name] for name, b in row.weight_bits.items()):
            omega = math.fsum(sensitivity.weight_omega[name][b] for name, b in row.weight_bits.items())
            plans.append((row, omega))
    return sorted(plans, key=lambda entry: entry[0].size_bytes)


def frontiers(sensitivity: Sensitivity, plan: BitPlan, settings: PlanSettings | None) -> dict[str, Frontier]:
    """The frontiers at the plan's activations and within its rules: all plans, and what Appendix E finds of them."""
    rules = settings or PlanSettings()
    fronts: dict[str, Frontier] = {}
    for solver in ("exact", "pareto"):
        with suppress(BudgetError):  # the exact tables may not fit into memory
            fronts[solver] = frontier(
                sensitivity,
                solver=solver,
                activation_bits=plan.activation_bits,
                fixed_bits=rules.fixed_bits,
                min_bits=rules.min_bits,
                allowed_bits=rules.allowed_bits,
            )
    return fronts


def markers(run: RunDirectory, sensitivity: Sensitivity, plan: BitPlan) -> list[figures.Marker]:
    """The chosen plan, uniform ones, and the best that HAWQ's order of layers allows at the same size."""
    marked = [figures.Marker("this plan", "", plan, style="*", color="#ffd166")]
    label = "uniform"
    for num_bits in sorted({b for options in sensitivity.weight_omega.values() for b in options}):
        uniform = uniform_plan(sensitivity, num_bits, activation_bits=plan.activation_bits)
        if uniform.omega > 0 and uniform.size_bytes <= 2 * plan.size_bytes:
            marked.append(figures.Marker(label, in_bits(num_bits), uniform, style="s", color="#b8bec9"))
            label = ""
    eigenvalues = run.curvature().top_eigenvalues
    if eigenvalues:
        ranking = {layer.name: eigenvalues[layer.name] / layer.numel for layer in sensitivity.points.layers}
        try:
            hawq = solve(
                sensitivity,
                max_size_mib=plan.size_bytes / MIB,
                space="monotone",
                ranking=ranking,
            )
            label = "best plan in HAWQ's order (λ/n)"
            marked.append(figures.Marker(label, "", hawq, style="^", color="#2a9d8f"))
        except BudgetError:
            pass  # no plan in that order is as small
    return marked
