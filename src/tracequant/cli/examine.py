"""The commands that explain a run: check, compare, spectrum, report, figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tracequant.cli.options import AsJson, Quiet, RunPath, Without
from tracequant.cli.printing import note, open_run, print_check, print_json
from tracequant.cli.requests import parse_bits, parse_criteria
from tracequant.core.plan import MIB
from tracequant.core.settings import PlanSettings
from tracequant.run import examine

# `compare` takes budgets of size and rules of weight bits; the criterion is what it compares.
_SizeBudget = Annotated[
    PlanSettings,
    Without((
        "average_activation_bits", "activation_compression", "max_activation_mib", "max_bops_g", "max_latency_ms",
        "latency", "max_accuracy_drop", "max_loss_increase", "allowed_activation_bits", "space", "solver", "criterion",
    )),
]  # fmt: skip


def check(
    run_path: RunPath,
    samples: Annotated[
        int, typer.Option(min=1, help="evaluation inputs to measure the loss on, the first ones")
    ] = 1000,
    plans: Annotated[int, typer.Option(min=0, help="whole plans for each --plan-bits")] = 80,
    plan_bits: Annotated[
        list[str] | None, typer.Option(help="bits of the whole plans; may be repeated [all]", metavar="LIST")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure which criterion ranks layers and plans best.

    Single layers, and whole plans near the optimal ones of all criteria, are quantized. Their loss is measured on the
    first samples of the evaluation data, which served neither the criteria nor the rounding. The result is in
    RUN/check.json and RUN/figures/check.png. If it is interrupted, the same command resumes.
    """
    run = open_run(run_path, quiet)
    result = examine.check(run, samples, plans, [parse_bits(text, "--plan-bits") for text in plan_bits or ()])
    from tracequant.report.figures import check_figure
    from tracequant.report.html import save_figure

    save_figure(check_figure(result), run.path / "figures" / "check")
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        print_check(run, result)


def compare(
    run_path: RunPath,
    budget: _SizeBudget,
    criteria: Annotated[str | None, typer.Option(help="compare these [all that were measured]", metavar="LIST")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Solve one budget by every criterion and evaluate the plans.

    The plans are calibrated and not fine-tuned (Tables 3 and 5 of the paper).
    """
    run = open_run(run_path, quiet)
    rows = examine.compare(run, budget, parse_criteria(criteria) if criteria is not None else run.criteria())
    evaluations = run.evaluations()
    assert evaluations is not None
    if as_json:
        print_json({name: {"plan": p.to_json(), "evaluation": asdict(row)} for name, (p, row) in rows.items()})
    elif not quiet:
        name = evaluations.metric_name
        table = Table(title=f"Plans by criterion ({evaluations.samples:,} evaluation samples)", title_justify="left")
        for column in ("criterion", name, "loss", "MiB on disk", "file smaller", "W-Comp"):
            table.add_column(column, justify="left" if column == "criterion" else "right")
        for label, (plan, row) in rows.items():
            sizes = f"{plan.size_mib:.4f}", f"{plan.file_compression:.2f}x", f"{plan.compression:.2f}x"
            table.add_row(label, f"{row.metric:.2f}", f"{row.loss:.4f}", *sizes)
        whole = next(iter(rows.values()))[0].model_size
        float_size = "" if whole is None else f"{whole.float_bytes / MIB:.4f}"
        table.add_row("float", f"{evaluations.float_metric:.2f}", f"{evaluations.float_loss:.4f}", float_size, "", "")
        Console().print(table)
        if criteria is None:
            for text in run.missing_criteria():
                note(f"Left out: {text}")


def spectrum(
    run_path: RunPath,
    layer: Annotated[
        list[str] | None, typer.Option(help="only layers matching this pattern; may be repeated [all]")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="eigenvalues of each layer, the largest in magnitude")] = 20,
    density: Annotated[
        list[str] | None,
        typer.Option(help="also the density of all eigenvalues of a layer, or '*' of the whole model; may be repeated"),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure eigenvalues of the Hessian by Lanczos' method.

    The result is in RUN/spectrum.json and RUN/figures/spectrum.png.
    """
    run = open_run(run_path, quiet)
    result = examine.measure_spectrum(run, layer or ["*"], top, density or [])
    from tracequant.report.figures import spectrum_figure
    from tracequant.report.html import save_figure

    curvature = run.curvature()
    save_figure(spectrum_figure(result, curvature), run.path / "figures" / "spectrum")
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        table = Table(title="Largest eigenvalues", title_justify="left")
        for column in ("layer", "λ₁", "λ₁/n", "Tr(H)/n", "λ₂, λ₃, ..."):
            table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
        for name, values in result.eigenvalues.items():
            trace = curvature.weights[name]
            others = ", ".join(f"{value:.3g}" for value in values[1:6]) + (", ..." if len(values) > 6 else "")
            first = (f"{values[0]:.4g}", f"{values[0] / trace.numel:.3g}", f"{trace.average_trace:.3g}")
            table.add_row(name, *first, others)
        Console().print(table)
        print(f"Figure: {run.path / 'figures' / 'spectrum.png'}; `tracequant report {run.path}` includes it")


def report(run_path: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Write RUN/report.html and its figures from what is finished."""
    from tracequant.report.html import write_report

    path = write_report(open_run(run_path, quiet))
    if as_json:
        print_json({"report": str(path)})
    elif not quiet:
        print(f"Report: {path}")


def figures(
    run_path: RunPath,
    figure: Annotated[
        list[int] | None, typer.Option(help="2, 4, 5, 6, 7 or 8; may be repeated [all that can be drawn]", metavar="N")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="layers of Figures 2, 5 and 6; may be repeated [of largest, middle and smallest trace]"),
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(help="layers matching this pattern are one bar; 'blocks': the task's own; may be repeated"),
    ] = None,
    grid: Annotated[int | None, typer.Option(min=3, help="points to a side of a loss landscape, odd [15]")] = None,
    radius: Annotated[
        float | None, typer.Option(min=0, help="how far a landscape reaches, in units of the weights [by curvature]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the figures [RUN/paper]", metavar="DIR", rich_help_panel="Output")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw the paper's figures of this run.

    Each figure-N.png has its data in figure-N.json.

    \b
    2: average traces, and the loss around a sharp and a flat layer
    4: the Pareto frontier
    5: how the traces converge
    6: the 20 largest eigenvalues and the average trace
    7: traces and bits of weights
    8: traces and bits of activations

    What is missing is measured and kept in the run. If it is interrupted, the same command resumes.
    """
    from tracequant.report.paper import FigureOptions, draw_figures

    run = open_run(run_path, quiet)
    options = FigureOptions(tuple(layer or ()), tuple(block or ()), grid, radius)
    drawn = draw_figures(run, figure, out, options)
    for number, reason in drawn.left_out.items():
        if not quiet:
            note(f"Figure {number} is left out: {reason}")
    if as_json:
        print_json({str(number): str(path) for number, path in drawn.files.items()})
    elif not quiet:
        for number, path in drawn.files.items():
            print(f"Figure {number}: {path}")
