"""One self-contained HTML page that explains a run, and its figures as PNG and SVG files."""

from __future__ import annotations

import base64
import io
import math
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from matplotlib.figure import Figure

from tracequant import __version__, allocation, cost
from tracequant.allocation import Frontier
from tracequant.artifact import replace_file, write_text
from tracequant.errors import BudgetError
from tracequant.evaluated import EvaluatedPlan, Evaluations
from tracequant.explain import exchange_rates, explain
from tracequant.plan import MEGABYTE, BitPlan
from tracequant.report import figures
from tracequant.sensitivity_result import Sensitivity
from tracequant.settings import PlanSettings

if TYPE_CHECKING:
    from tracequant.run import Run


def write_report(run: Run) -> Path:
    """Write `report.html` and `figures/*.png|svg` into the run directory, from the artifacts that exist."""
    settings, curvature, sensitivity, plan = run.settings(), run.curvature(), run.sensitivity(), run.plan()
    points = sensitivity.points
    rows = explain(sensitivity, plan, settings.plan.latency if settings.plan else None)
    results = run.result_rows()
    fronts = _frontiers(sensitivity, plan, settings.plan)
    evaluations = run.evaluations()
    evaluated = _evaluated(sensitivity, evaluations)
    pictures: dict[str, Figure] = {
        "layers": figures.layers_figure(rows, curvature),
        "frontier": figures.frontier_figure(
            fronts, _markers(run, sensitivity, plan), [(row.size_bytes, omega, row.metric) for row, omega in evaluated]
        ),
    }
    check = run.check_result()
    if check is not None:
        pictures["check"] = figures.check_figure(check)
    if (convergence := figures.convergence_figure(curvature)) is not None:
        pictures["convergence"] = convergence
    if (spectrum := run.spectrum()) is not None:
        pictures["spectrum"] = figures.spectrum_figure(spectrum, curvature)
    if plan.activation_bits:
        pictures["activations"] = figures.activations_figure(curvature, plan)
    if results:
        table = [(row.name, row.metric, row.size_bytes / MEGABYTE) for row in results]
        pictures["accuracy"] = figures.accuracy_figure(table, run.quantize_result().metric_name)
    losses = run.finetune_outcome().losses if run.done("finetune") else ()
    if losses:
        pictures["loss"] = figures.loss_figure(losses)
    for stale in (run.path / "figures").glob("*"):
        if stale.stem not in pictures:
            stale.unlink()
    embedded = {name: save_figure(figure, run.path / "figures" / name) for name, figure in pictures.items()}

    template = jinja2.Environment(
        loader=jinja2.PackageLoader("tracequant", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html.j2")
    units = len(points.weight_units)
    options = max(len(omega) for omega in sensitivity.weight_omega.values())
    page = template.render(
        settings=settings,
        curvature=curvature,
        stability=run.stability(),
        points=points,
        plan=plan,
        rates=exchange_rates(plan),
        rows=rows,
        results=results,
        metric_name=run.quantize_result().metric_name if results else "",
        evaluation_samples=run.quantize_result().samples if results else 0,
        packed=run.pack_result() if run.done("pack") else None,
        figures=embedded,
        metric=sensitivity.metric,
        evaluations=evaluations,
        evaluated=evaluated,
        check=check,
        float_bytes=cost.float_bytes(points),
        bops=cost.bit_operations(points, plan.weight_bits, plan.activation_bits),
        float_bops=cost.bit_operations(points, {}, {}),
        activation_average=cost.average_activation_bits(points, plan.activation_bits),
        full_space=allocation.full_space(units, options),
        monotone_space=allocation.monotone_space(units, options),
        megabyte=MEGABYTE,
        isinf=math.isinf,
        versions={"tracequant": __version__, **{name: version(name) for name in ("torch", "numpy", "scipy")}},
    )
    path = run.path / "report.html"
    write_text(path, page)
    return path


def _evaluated(sensitivity: Sensitivity, evaluations: Evaluations | None) -> list[tuple[EvaluatedPlan, float]]:
    """Evaluated plans of this run's layers with their Ω in the plan's metric, by size."""
    found = []
    for row in evaluations.plans if evaluations is not None else ():
        known = row.weight_bits.keys() == sensitivity.weight_omega.keys()
        if known and all(b in sensitivity.weight_omega[name] for name, b in row.weight_bits.items()):
            omega = math.fsum(sensitivity.weight_omega[name][b] for name, b in row.weight_bits.items())
            found.append((row, omega + sensitivity.interaction(row.weight_bits)))
    return sorted(found, key=lambda entry: entry[0].size_bytes)


def _frontiers(sensitivity: Sensitivity, plan: BitPlan, settings: PlanSettings | None) -> dict[str, Frontier]:
    """The frontiers at the plan's activations and within its rules: all plans, and what Appendix E finds of them."""
    rules = settings or PlanSettings()
    found: dict[str, Frontier] = {}
    methods: tuple[allocation.Method, ...] = ("exact", "pareto")
    for method in methods:
        with suppress(BudgetError):  # the exact tables may not fit into memory
            found[method] = allocation.frontier(
                sensitivity,
                method=method,
                activation_bits=plan.activation_bits,
                fixed_bits=rules.fixed_bits,
                min_bits=rules.min_bits,
                allowed_bits=rules.allowed_bits,
            )
    return found


def _markers(run: Run, sensitivity: Sensitivity, plan: BitPlan) -> list[figures.Marker]:
    """The chosen plan, uniform ones, and the best that HAWQ's order of layers allows at the same size."""
    markers = [figures.Marker("this plan", "", plan, "*", "#ffd166")]
    label = "uniform"
    for num_bits in sorted({b for options in sensitivity.weight_omega.values() for b in options}):
        uniform = allocation.uniform_plan(sensitivity, num_bits, activation_bits=plan.activation_bits)
        if uniform.omega > 0 and uniform.size_bytes <= 2 * plan.size_bytes:
            markers.append(figures.Marker(label, f"{num_bits} bits", uniform, "s", "#b8bec9"))
            label = ""
    eigenvalues = run.curvature().top_eigenvalues
    if eigenvalues:
        ranking = {layer.name: eigenvalues[layer.name] / layer.numel for layer in sensitivity.points.layers}
        try:
            hawq = allocation.solve(
                sensitivity,
                max_size_mb=plan.size_bytes / MEGABYTE,
                space="monotone",
                ranking=ranking,
            )
            markers.append(figures.Marker("best plan in HAWQ's order (λ/n)", "", hawq, "^", "#2a9d8f"))
        except BudgetError:
            pass  # no plan in that order is as small
    return markers


def save_figure(figure: Figure, stem: Path) -> str:
    """Write the figure as PNG and SVG; the SVG comes back as a data URI."""
    for suffix in (".png", ".svg"):
        with replace_file(stem.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=130)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
