"""One self-contained HTML page that explains a run, and its figures as PNG and SVG files."""

from __future__ import annotations

import base64
import io
import math
from importlib.metadata import version
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from tracequant.allocation.explain import explain
from tracequant.allocation.space import counted, full_space, monotone_space
from tracequant.core import cost
from tracequant.core.evaluations import with_unit
from tracequant.core.files import replace_file, write_text
from tracequant.core.plan import MIB
from tracequant.core.version import VERSION
from tracequant.report import figures
from tracequant.report.frontiers import evaluated_plans, frontiers, markers
from tracequant.run.directory import RunDirectory
from tracequant.run.stages import stability

# The figures of a report by the names of their files.
FIGURES = ("layers", "frontier", "check", "convergence", "spectrum", "activations", "accuracy", "loss")
_SUFFIXES = (".png", ".svg")


def write_report(run: RunDirectory | str | Path) -> Path:
    """The path of `report.html`, written with `figures/*.png|svg` into the run directory from what is finished.

    `run` is a run directory or its path. Raises `RunError` where the run has no plan yet. Other files in RUN/figures
    stay as they are.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    run.need("plan")
    start = run.begin("report")
    settings, curvature, sensitivity, plan = run.settings(), run.curvature(), run.sensitivity(), run.plan()
    points = sensitivity.points
    explanation = explain(sensitivity, plan, latency=settings.plan.latency if settings.plan else None)
    rows = explanation.rows
    results = run.result_rows()
    fronts = frontiers(sensitivity, plan, settings.plan)
    evaluations = run.evaluations()
    evaluated = evaluated_plans(sensitivity, evaluations)
    pictures: dict[str, Figure] = {
        "layers": figures.layers_figure(rows, curvature),
        "frontier": figures.frontier_figure(
            fronts,
            markers(run, sensitivity, plan),
            [(row.size_bytes, omega, row.metric) for row, omega in evaluated],
            metric_name=evaluations.metric_name if evaluations is not None else "",
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
        table = [(row.name, row.metric, row.size_bytes / MIB) for row in results]
        pictures["accuracy"] = figures.accuracy_figure(table, run.quantize_result().metric_name)
    losses = run.finetune_outcome().losses if run.done("finetune") else ()
    if losses:
        pictures["loss"] = figures.loss_figure(losses)
    for name in FIGURES:
        for suffix in _SUFFIXES:
            path = run.path / "figures" / f"{name}{suffix}"
            if name not in pictures and path.is_file():
                path.unlink()  # of an earlier plan
    embedded = {name: save_figure(figure, run.path / "figures" / name) for name, figure in pictures.items()}

    template = jinja2.Environment(
        loader=jinja2.PackageLoader("tracequant", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html.j2")
    units = len(points.weight_units)
    options = max(len(omega) for omega in sensitivity.weight_omega.values())
    packed = run.pack_result() if run.done("pack") else None
    page = template.render(
        settings=settings,
        curvature=curvature,
        stability=stability(run),
        points=points,
        plan=plan,
        rates=explanation.rates,
        rows=rows,
        results=results,
        metric_name=run.quantize_result().metric_name if results else "",
        evaluation_samples=run.quantize_result().samples if results else 0,
        packed=packed,
        packed_metric=with_unit(run.quantize_result().metric_name, packed.evaluation.metric) if packed else "",
        figures=embedded,
        criterion=sensitivity.criterion,
        evaluations=evaluations,
        evaluated=evaluated,
        check=check,
        float_bytes=cost.float_bytes(points),
        bops=cost.bit_operations(points, plan.weight_bits, plan.activation_bits),
        float_bops=cost.bit_operations(points, {}, {}),
        activation_average=cost.average_activation_bits(points, plan.activation_bits),
        full_space=counted(full_space(units, options)),
        monotone_space=counted(monotone_space(units, options)),
        mib=MIB,
        isinf=math.isinf,
        versions={"tracequant": VERSION, **{name: version(name) for name in ("torch", "numpy", "scipy")}},
    )
    path = run.path / "report.html"
    write_text(path, page)
    run.finish("report", start)
    return path


def save_figure(figure: Figure, stem: Path) -> str:
    """Write the figure as PNG and SVG; the SVG comes back as a data URI."""
    for suffix in _SUFFIXES:
        with replace_file(stem.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=130)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
