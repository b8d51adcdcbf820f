"""What commands print: tables, JSON, notes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tracequant.allocation.explain import exchange_rates, explain
from tracequant.allocation.space import counted, full_space, monotone_space
from tracequant.core import cost
from tracequant.core.evaluations import Check, with_unit
from tracequant.core.plan import MIB, BitPlan
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings
from tracequant.run.directory import RunDirectory

_errors = Console(stderr=True, highlight=False)


def open_run(path: Path, quiet: bool) -> RunDirectory:
    """The run directory, which says what it does on standard error unless `quiet`."""

    def say(text: str) -> None:
        if not quiet:
            _errors.print(escape(text), style="dim")

    # In a message "seed=1" would be taken for an option; after a slash it is a path.
    return RunDirectory(path.absolute() if "=" in str(path) else path, say, progress=not quiet)


def escape(text: str) -> str:
    """Text in which rich sees no markup."""
    return text.replace("[", r"\[")


def note(text: str) -> None:
    """Print a remark on standard error."""
    _errors.print(escape(text), style="yellow", soft_wrap=True)


def print_json(value: object) -> None:
    """Print a result for programs."""
    print(json.dumps(value, indent=1))


def print_sensitivity(run: RunDirectory) -> None:
    """Print every layer's trace, its errors, and Ω by bits."""
    curvature, sensitivity = run.curvature(), run.sensitivity()
    widths = sorted({b for options in sensitivity.weight_omega.values() for b in options})
    table = Table(title="Sensitivity by layer", title_justify="left")
    for column in ("layer", "weights", "Tr(H)/n", "± probes", "± samples", *(f"Ω {b} bit" for b in widths)):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for layer in sensitivity.points.layers:
        trace = curvature.weights[layer.name]
        errors = (_error(trace.standard_error / layer.numel), _error(trace.sampling_error / layer.numel))
        omegas = (f"{sensitivity.weight_omega[layer.name][b]:.3g}" for b in widths)
        table.add_row(layer.name, f"{layer.numel:,}", f"{trace.average_trace:.3g}", *errors, *omegas)
    Console().print(table)
    print(f"Next: tracequant plan {run.path} --max-size-mib X (or --compression X, --average-bits X)")


def print_check(run: RunDirectory, check: Check) -> None:
    """Print how well each criterion ranks, what its own plans lose, and which one to trust."""
    where = f"on the first {check.samples:,} samples of the evaluation data"
    table = Table(title=f"Rank correlation with the loss {where}", title_justify="left")
    table.add_column("criterion")
    for group in check.groups:
        table.add_column(group, justify="right")
    for name, values in check.correlations.items():
        cells = (f"{values[group]:.2f}" if group in values else "" for group in check.groups)
        table.add_row(name, *cells, style="bold" if name == check.trusted else None)
    Console().print(table)
    sizes = list(dict.fromkeys((plan.offered, plan.average_bits) for plan in check.plans))
    if sizes:
        table = Table(title=f"Change of the loss by the optimal plans of each criterion {where}", title_justify="left")
        table.add_column("criterion")
        for offered, average_bits in sizes:
            table.add_column(f"{average_bits:.2f} bits of {','.join(map(str, offered))}", justify="right")
        for name in check.correlations:
            changes = {(plan.offered, plan.average_bits): plan.loss_change for plan in check.optimal_plans(name)}
            if changes:
                cells = (f"{changes[size]:+.4f}" if size in changes else "" for size in sizes)
                table.add_row(name, *cells, style="bold" if name == check.trusted else None)
        Console().print(table)
    print(f"Trust most: {check.trusted}. tracequant plan {run.path} --criterion {check.trusted} ... solves by it.")
    print(f"Figure: {run.path / 'figures' / 'check.png'}; `tracequant report {run.path}` includes it")


def print_plan(
    sensitivity: Sensitivity, plan: BitPlan, settings: PlanSettings, stability: dict[str, float] | None = None
) -> None:
    """Print a plan layer by layer, what it uses, what is proven about it, and what a little more would bring."""
    console = Console()
    latency = settings.latency if settings.latency is not None else sensitivity.latency
    console.print(_plan_table(sensitivity, plan, settings, stability, wide=console.width >= 160))
    if plan.model_size is not None and plan.model_size.in_float:
        print(f"{plan.model_size.in_float}.")
    if stability:
        print("Stable: the share of 100 resamples of the calibration data in which the layer keeps its bits.")
    points = sensitivity.points
    spent = [f"{cost.bit_operations(points, plan.weight_bits, plan.activation_bits) / 1e9:.4g} G BOPs"]
    if settings.max_latency_ms is not None:
        spent.append(f"{cost.latency_ms(points, plan.weight_bits, plan.activation_bits, latency):.4g} ms")
    if plan.activation_bits and not sensitivity.same_bits:
        average = cost.average_activation_bits(points, plan.activation_bits)
        spent.append(f"activations {average:.2f} bits on average, Ω activations {plan.activation_omega:.4g}")
    print(f"Asked for: {plan.budget}. Uses {plan.size_bytes:,} bytes, {', '.join(spent)}.")
    units, options = len(points.weight_units), max(len(omega) for omega in sensitivity.weight_omega.values())
    print(
        f"Search space: {counted(full_space(units, options))} assignments of weight bits,"
        f" {counted(monotone_space(units, options))} of them monotone."
    )
    parts = " (weights + activations)" if plan.activation_bits else ""
    if plan.gap is None:
        print(f"Found by {plan.solver}; nothing is proven about better plans.")
    elif plan.gap == 0:
        print(f"Proven: no plan within the budget has a lower Ω total than {plan.total_omega:.6g}{parts}.")
    else:
        limits = f"{plan.bound:.6g} and {plan.total_omega:.6g}"
        print(f"Not proven within the time: the best Ω total is between {limits}{parts}.")
    for rate in exchange_rates(plan):
        print(f"Rate of exchange: {rate}.")
    if plan.doubt:
        print(f"Not decided: {plan.doubt}.")


def print_results(run: RunDirectory, quiet: bool, as_json: bool) -> None:
    """Print the result table, as far as it exists."""
    rows = run.result_rows()
    if as_json:
        page = run.path / "report.html"
        print_json({"rows": [asdict(row) for row in rows], "report": str(page) if page.is_file() else None})
    elif not quiet:
        table = Table(title=f"Results ({run.quantize_result().samples:,} evaluation samples)", title_justify="left")
        for column in ("model", run.quantize_result().metric_name, "MiB on disk", "bits per weight"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in rows:
            size = f"{row.size_bytes / MIB:.4f}"
            table.add_row(row.name, f"{row.metric:.2f}", size, f"{row.average_bits:.2f}")
        Console().print(table)


def print_packed(run: RunDirectory) -> None:
    """Print what is in the packed file and what it gives when it is loaded."""
    packed, plan = run.pack_result(), run.plan()
    kind = "" if packed.fine_tuned else " (not fine-tuned)"
    gives = with_unit(run.quantize_result().metric_name, packed.evaluation.metric)
    print(
        f"Packed{kind}: {run.path / 'model.safetensors'}, {packed.file_bytes:,} bytes ({packed.promised_bytes:,}"
        f" promised); loaded again it gives {gives}"
    )
    print(f"Size: {plan.whole_size}")


def _plan_table(
    sensitivity: Sensitivity,
    plan: BitPlan,
    settings: PlanSettings,
    stability: dict[str, float] | None,
    wide: bool,
) -> Table:
    """A row for every layer; a wide one says why the layer has its bits."""
    table = Table(title=plan.summary, title_justify="left")
    stable = ["stable"] if stability else []
    columns = [
        "layer",
        "weights",
        "Tr(H)/n",
        "bits",
        *stable,
        "input bits",
        "Ω",
        "share of Ω",
        *(["why"] if wide else []),
    ]
    for column in columns:
        table.add_column(column, justify="left" if column in ("layer", "why") else "right", overflow="fold")
    for row in explain(sensitivity, plan, latency=settings.latency).rows:
        cells = [
            row.name,
            f"{row.numel:,}",
            f"{row.average_trace:.3g}",
            str(row.num_bits),
            *([f"{stability[row.name]:.0%}"] if stability else []),
            str(row.activation_bits or "float"),
            f"{row.omega:.2g}",
            f"{row.omega_share:.1%}",
        ]
        table.add_row(*cells, row.why) if wide else table.add_row(*cells)
    return table


def _error(value: float) -> str:
    return "–" if math.isinf(value) else f"{value:.1g}"
