"""The report's pictures, drawn from artifacts alone (matplotlib, no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tracequant.allocation.explain import LayerRow
from tracequant.allocation.frontier import Frontier
from tracequant.core.curvature import Curvature, Spectrum
from tracequant.core.evaluations import Check, LayerCheck, PlanCheck
from tracequant.core.plan import MIB, BitPlan
from tracequant.report.drawing import BIT_COLORS, GREY, RED, despine, name_axis, running_means, trace_bars


@dataclass(frozen=True)
class Marker:
    """A plan to point out in the frontier figure: `label` in the legend, `note` next to the point."""

    label: str
    note: str
    plan: BitPlan
    style: str
    color: str


def layers_figure(rows: Sequence[LayerRow], curvature: Curvature) -> Figure:
    """Average trace, number of weights and chosen bits of every layer, stacked (after the paper's Figure 2)."""
    figure, axes = _stack(len(rows), 3, (3.2, 1.6, 1.8))
    positions = range(len(rows))
    colors = [BIT_COLORS[row.num_bits] for row in rows]
    estimates = [curvature.weights[row.name] for row in rows]
    trace_bars(axes[0], estimates, colors)
    axes[0].set_ylabel("average Hessian trace\nTr(H)/n (loss per weight²)")
    axes[1].bar(positions, [row.numel for row in rows], color=GREY)
    axes[1].set_yscale("log")
    axes[1].set_ylabel("weights")
    axes[2].bar(positions, [row.num_bits for row in rows], color=colors)
    for position, row in enumerate(rows):
        if len(rows) <= 60:
            axes[2].text(position, row.num_bits + 0.15, str(row.num_bits), ha="center", va="bottom", fontsize=8)
    axes[2].set_ylim(0, max(row.num_bits for row in rows) + 1.5)
    axes[2].set_ylabel("weight bits")
    name_axis(axes[2], [row.name for row in rows])
    return figure


def activations_figure(curvature: Curvature, plan: BitPlan) -> Figure:
    """Average trace and bits of every quantized activation (as the paper's Figure 8, left)."""
    names = list(plan.activation_bits)
    figure, axes = _stack(len(names), 2, (3.2, 1.8))
    bits = [plan.activation_bits[name] for name in names]
    colors = [BIT_COLORS[b] for b in bits]
    trace_bars(axes[0], [curvature.activations[name] for name in names], colors)
    axes[0].set_ylabel("average Hessian trace\nTr(H)/|a| (loss per activation²)")
    axes[1].bar(range(len(names)), bits, color=colors)
    axes[1].set_ylabel("activation bits")
    axes[1].set_ylim(0, max(bits) + 1.5)
    name_axis(axes[1], [f"input of {name}" for name in names])
    return figure


def convergence_figure(curvature: Curvature) -> Figure | None:
    """Every trace by the samples, and by the probes, used so far, over its final value (as Figures 5 and 8, right).

    None where each has one value only. The dashed lines are ± the median layer's error after as many samples or probes:
    an honest reader should expect as much of the full lines.
    """
    unit = "samples" if curvature.estimator == "gauss_newton" else "batches"
    families = (
        ("weights", curvature.weight_values, curvature.weight_probes),
        ("activations", curvature.activation_values, curvature.activation_probes),
    )
    panels = [
        (f"traces of {family}", f"{name} used", list(series.values()))
        for family, values, by_probe in families
        for name, series in ((unit, values), ("probes", by_probe))
        if series and max(len(row) for row in series.values()) > 2
    ]
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10 if len(panels) > 1 else 6, 3.2 * rows), layout="constrained")
    for number, (title, label, series) in enumerate(panels):
        axes = figure.add_subplot(rows, min(2, len(panels)), number + 1)
        running_means(axes, series)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylabel("running mean / final value")
        despine(axes)
    return figure


def spectrum_figure(spectrum: Spectrum, curvature: Curvature) -> Figure:
    """The largest eigenvalues of each layer with its average trace (as Figure 6), and densities of all of them."""
    count = (1 if spectrum.eigenvalues else 0) + len(spectrum.densities)
    figure = Figure(figsize=(10, 3.6 * count), layout="constrained")
    panels = [figure.add_subplot(count, 1, number + 1) for number in range(count)]
    if spectrum.eigenvalues:
        axes = panels.pop(0)
        names = list(spectrum.eigenvalues)
        for position, name in enumerate(names):
            sizes = [abs(value) for value in spectrum.eigenvalues[name]]
            axes.plot([position] * len(sizes), sizes, "_", color=BIT_COLORS[3], markersize=9)
        averages = [curvature.weights[name].average_trace for name in names]
        axes.plot(range(len(names)), averages, "o", color=RED, markersize=4, label="average trace Tr(H)/n")
        axes.plot([], [], "_", color=BIT_COLORS[3], markersize=9, label="largest eigenvalues, magnitude")
        axes.set_yscale("log")
        axes.set_ylabel("loss per weight²")
        axes.legend(fontsize=9)
        name_axis(axes, names)
        despine(axes)
    for axes, density in zip(panels, spectrum.densities, strict=True):
        nodes = [node for probe in density.nodes for node in probe]
        low, high = min(nodes), max(nodes)
        margin = 0.05 * (high - low or 1.0)
        at = [low - margin + (high - low + 2 * margin) * i / 600 for i in range(601)]
        axes.plot(at, density.smoothed(at, margin / 5), color=BIT_COLORS[3])
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(1e-3 / density.numel / (high - low or 1.0), axes.get_ylim()[0]))
        axes.set_title(f"eigenvalues of {density.layer or 'all layers together'} ({density.numel:,})", fontsize=10)
        axes.set_xlabel("eigenvalue (loss per weight²)")
        axes.set_ylabel("density")
        despine(axes)
    return figure


def frontier_figure(
    fronts: Mapping[str, Frontier],
    markers: Sequence[Marker],
    evaluated: Sequence[tuple[float, float, float]] = (),
    *,
    metric_name: str = "",
) -> Figure:
    """File size against the sum of Ω (as the paper's Figure 4): the frontiers and the plans to point out.

    The exact frontier is a line, what Appendix E's search finds are dots on or above it. `evaluated` are plans whose
    metric, called `metric_name`, was measured: (bytes, Ω, metric), the metric as their colour.
    """
    figure = Figure(figsize=(8, 5.0), layout="constrained")
    axes = figure.subplots()
    positive = all(float(front.omega.min()) > 0 for front in fronts.values())
    if "exact" in fronts:
        front = fronts["exact"]
        shown = np.unique(np.linspace(0, len(front) - 1, 2000).round().astype(int))
        axes.step(
            front.size_bytes[shown] / MIB, front.omega[shown], where="post",
            color=BIT_COLORS[2], linewidth=1.2, label=f"exact frontier ({len(front):,} plans)", zorder=1,
        )  # fmt: skip
    if "pareto" in fronts:
        front = fronts["pareto"]
        label = f"Appendix E's search ({len(front):,} plans{_loss(fronts)})"
        axes.plot(front.size_bytes / MIB, front.omega, ".", color=RED, markersize=4, label=label, zorder=2)
    for marker in markers:
        position = (marker.plan.size_bytes / MIB, marker.plan.omega)
        axes.plot(
            *position, marker.style, color=marker.color, markersize=14 if marker.style == "*" else 8,
            markeredgecolor="black", label=marker.label or None, linestyle="none", zorder=3,
        )  # fmt: skip
        axes.annotate(marker.note, position, xytext=(7, 5), textcoords="offset points", fontsize=9)
    if evaluated:
        sizes, omegas, metrics = zip(*evaluated, strict=True)
        positive = positive and min(omegas) > 0
        drawn = axes.scatter(
            [size / MIB for size in sizes],
            omegas,
            c=metrics,
            cmap="viridis",
            edgecolors="black",
            zorder=2.5,
            label="evaluated plans",
        )
        figure.colorbar(drawn, ax=axes, label=f"{metric_name}, evaluated without fine-tuning")
    if positive:
        axes.set_yscale("log")
    axes.set_xlabel("size of the packed file (MiB)")
    axes.set_ylabel("total perturbation Σ Ω (loss)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)  # inside it would hide plans
    return figure


def _loss(fronts: Mapping[str, Frontier]) -> str:
    """By how much Appendix E's plans are worse than the best of their size."""
    if "exact" not in fronts:
        return ""
    exact, pareto = fronts["exact"], fronts["pareto"]
    best = exact.omega[np.searchsorted(exact.size_bytes, pareto.size_bytes, side="right") - 1]
    excess = (pareto.omega[best > 0] / best[best > 0] - 1) * 100
    if not len(excess):
        return ""
    return f"; Ω too high by {np.median(excess):.3f} % (median), {max(excess.max(), 0):.3f} % (worst)"


# What the self-check's figure shows of single layers and of plans; the table next to it has all.
_LAYER_PANELS = ("l2", "eigenvalue", "trace", "first+quadratic")
_PLAN_PANELS = ("trace", "quadratic", "first+quadratic", "response")


def check_figure(check: Check) -> Figure:
    """Measured changes of the loss against what criteria say: layers above, plans below, with their correlations.

    Colours stand for bits: a layer's, or a plan's on average.
    """
    kinds: list[tuple[str, tuple[str, ...], Sequence[LayerCheck] | Sequence[PlanCheck]]] = [
        ("one layer", _LAYER_PANELS, check.layers)
    ]
    if check.plans:
        kinds.append(("plans", _PLAN_PANELS, check.plans))
    figure = Figure(figsize=(13, 3.2 * len(kinds)), layout="constrained")
    for row, (kind, names, entries) in enumerate(kinds):
        shown = [name for name in names if name in entries[0].scores]
        colors = [_check_color(entry) for entry in entries]
        changes = [entry.loss_change for entry in entries]
        for column, name in enumerate(shown):
            axes = figure.add_subplot(len(kinds), len(names), row * len(names) + column + 1)
            scores = [entry.scores[name] for entry in entries]
            axes.scatter(scores, changes, s=12, c=colors, alpha=0.8)
            for values, scale in ((scores, axes.set_xscale), (changes, axes.set_yscale)):
                # Values may be negative, and mostly go over many powers of ten.
                if max(map(abs, values)) > 30 * _smallest_shown(values):
                    scale("symlog", linthresh=_smallest_shown(values))
            axes.minorticks_off()
            correlations = [
                f"{value:.2f}"
                for group, value in check.correlations[name].items()
                if (group == "all bits" if kind == "one layer" else group.startswith("plans"))
            ]
            axes.set_title(f"{kind}: {name} ({', '.join(correlations)})", fontsize=9)
            axes.tick_params(labelsize=7)
            despine(axes)
    figure.supylabel("measured change of the loss", fontsize=10)
    figure.supxlabel("what the criterion says", fontsize=10)
    return figure


def _check_color(row: LayerCheck | PlanCheck) -> str:
    if isinstance(row, LayerCheck):
        return BIT_COLORS[row.num_bits]
    return BIT_COLORS[round(sum(row.weight_bits.values()) / len(row.weight_bits))]


def _smallest_shown(values: Sequence[float]) -> float:
    """The size below which an axis is linear: that of the smallest tenth of the values."""
    sizes = np.abs(values)
    return float(np.quantile(sizes[sizes > 0], 0.1)) if (sizes > 0).any() else 1.0


def accuracy_figure(rows: Sequence[tuple[str, float, float]], metric_name: str) -> Figure:
    """Metric of each model (name, metric, size in MiB) as bars with the sizes next to them."""
    figure = Figure(figsize=(8, 0.9 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _, _ in rows]
    colors = [GREY if name.startswith(("float", "uniform")) else BIT_COLORS[5] for name in names]
    axes.barh(range(len(rows)), [metric for _, metric, _ in rows], color=colors)
    for position, (_, metric, size_mib) in enumerate(rows):
        axes.annotate(
            f"{metric:.2f}, {size_mib:.3g} MiB",
            (metric, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel(metric_name)
    axes.margins(x=0.22)
    despine(axes)
    if metric_name.endswith("%"):  # the room for the text to the right of the bars is not part of the scale
        low, high = axes.get_xlim()
        axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= min(high, 100)])
        axes.spines["bottom"].set_bounds(low, min(high, 100))
    return figure


def loss_figure(losses: Sequence[float]) -> Figure:
    """Training loss of every fine-tuning step, with a running mean."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color=GREY, linewidth=0.6, alpha=0.7, label="each step")
    smooth, value = [], losses[0]
    for loss in losses:
        value += 0.05 * (loss - value)
        smooth.append(value)
    axes.plot(smooth, color=BIT_COLORS[4], label="running mean")
    axes.set_xlabel("fine-tuning step")
    axes.set_ylabel("training loss")
    axes.legend(fontsize=9)
    despine(axes)
    return figure


def _stack(columns: int, count: int, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    width = min(max(8.0, 2.0 + 0.26 * columns), 24.0)
    figure = Figure(figsize=(width, sum(heights) + 1.6), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, height_ratios=heights)
    for axis in axes:
        despine(axis)
    return figure, list(axes)
