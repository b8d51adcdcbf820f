"""The paper's Figures 2, 5, 6, 7 and 8 as pictures, from what was measured (matplotlib, no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from tracequant.core.curvature import Curvature, Landscape, Landscapes
from tracequant.report.blocks import Block
from tracequant.report.drawing import BIT_COLORS, GREY, RED, despine, name_axis, running_means, shortened, trace_bars

_COLORS = (RED, BIT_COLORS[3], BIT_COLORS[6], "#b07aa1", "#e9a03b", GREY)
# A bar with its name needs so many inches; wider than a page's width twice, letters get too small.
_INCHES_PER_BAR, _WIDEST = 0.2, 13.0


def figure_2(blocks: Sequence[Block], landscapes: Landscapes) -> Figure:
    """Average trace of every block, and below it the loss around some layers' weights."""
    count = len(landscapes.layers)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    width = _width(len(blocks), 3.6 * columns)
    bars = 2.8 + _names_height(blocks)
    figure = Figure(figsize=(width, bars + 3.5 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(bars, 3.5 * rows), squeeze=False)[:, 0]
    axes = above.subplots()
    marked = {landscape.layer for landscape in landscapes.layers}
    colors = [RED if marked & set(block.members) else BIT_COLORS[3] for block in blocks]
    trace_bars(axes, [block.estimate for block in blocks], colors)
    axes.set_ylabel("average Hessian trace\nTr(H)/n (loss per weight²)")
    _block_axis(axes, blocks, width)
    despine(axes)
    for number, landscape in enumerate(landscapes.layers):
        _surface(below.add_subplot(rows, columns, number + 1, projection="3d"), landscape, landscapes)
    return figure


def _surface(axes: Any, landscape: Landscape, landscapes: Landscapes) -> None:
    """The loss over both directions, heights and colours alike in all of the figure's landscapes."""
    every = np.array([layer.losses for layer in landscapes.layers], dtype=float)
    finite = every[np.isfinite(every)]
    low, high = float(finite.min()), float(finite.max())
    losses = np.array(landscape.losses, dtype=float)
    losses[~np.isfinite(losses)] = np.nan  # a hole where the network overflows
    u, v = np.meshgrid(landscapes.steps, landscapes.steps, indexing="ij")
    axes.plot_surface(
        u, v, losses, cmap=mpl.colormaps["viridis"], norm=Normalize(low, high), rstride=1, cstride=1, linewidth=0.2,
        edgecolor="white", antialiased=True,
    )  # fmt: skip
    axes.set_zlim(low, high if high > low else low + 1)
    values = ", ".join(f"λ{'₁₂'[i]} = {value:.3g}" for i, value in enumerate(landscape.eigenvalues[:2]))
    axes.set_title(f"{shortened(landscape.layer)}\n{values}", fontsize=10, y=0.97)
    axes.set_xlabel("ε₁ along u₁ (‖ΔW‖)", fontsize=8)
    axes.set_ylabel("ε₂ along u₂ (‖ΔW‖)", fontsize=8)
    # The layout has no room for a label of the third axis: it stands above the axis.
    axes.text2D(0.87, 0.79, "loss", transform=axes.transAxes, fontsize=8, ha="center")
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, prune="both"))  # at the corner their labels would meet
    axes.zaxis.set_major_locator(MaxNLocator(5))
    axes.view_init(elev=25, azim=-60)
    axes.set_box_aspect((1, 1, 0.75), zoom=0.9)


def figure_5(curvature: Curvature, drawn: Mapping[str, Sequence[float]], samples: int) -> Figure:
    """Traces by the samples used (left, all layers), and by Hutchinson's iterations (right, some layers).

    `drawn` are a layer's traces by each random vector alone, on `samples` samples.
    """
    values = curvature.weight_values or {}
    left = len(next(iter(values.values()), ())) > 2
    figure = Figure(figsize=(10 if left else 5.4, 3.8), layout="constrained")
    panels = figure.subplots(1, 2 if left else 1, squeeze=False)[0]
    if left:
        _samples_axis(panels[0], curvature.estimator, list(values.values()))
        panels[0].set_title(f"all {len(values)} layers, by {curvature.estimator}", fontsize=10)
    axes = panels[-1]
    for color, (name, traces) in zip(_colors(len(drawn)), drawn.items(), strict=True):
        row = np.array(traces)
        counts = np.arange(1, len(row) + 1)
        means = np.cumsum(row) / counts
        final = abs(means[-1]) or 1.0
        axes.plot(counts, means / final, color=color, label=shortened(name))
        # The spread of single probes comes from all of them: the first few do not show it.
        error = row.std(ddof=1) / np.sqrt(counts) / final
        axes.fill_between(counts, (means / final - error), (means / final + error), color=color, alpha=0.15, lw=0)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xlabel("Hutchinson iterations (random vectors)")
    axes.set_ylabel("running mean / final value")
    axes.set_title(f"± standard error, {samples:,} samples", fontsize=10)
    axes.legend(fontsize=8)
    despine(axes)
    return figure


def figure_6(
    eigenvalues: Mapping[str, Sequence[float]],
    average_traces: Mapping[str, float],
    weights: Mapping[str, int],
    samples: int | None,
) -> Figure:
    """The largest eigenvalues of layers' blocks, and their average traces on the same samples as dotted lines.

    `weights` are how many each layer has.
    """
    layers = list(eigenvalues)
    columns = min(len(layers), 3)
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(0.6 + 3.8 * columns, 3.3 * rows), layout="constrained")
    for number, name in enumerate(layers):
        axes = figure.add_subplot(rows, columns, number + 1)
        values = np.array(eigenvalues[name])
        places = np.arange(1, len(values) + 1)
        for side, color, label in ((1, BIT_COLORS[3], "eigenvalue"), (-1, RED, "negative eigenvalue (magnitude)")):
            chosen = values * side > 0
            if chosen.any():
                axes.plot(places[chosen], np.abs(values[chosen]), "o", color=color, markersize=4, label=label)
        average = average_traces[name]
        sign = "" if average >= 0 else ", negative"
        axes.axhline(abs(average), linestyle=":", color="black", label=f"average trace Tr(H)/n{sign}")
        if average and (values != 0).any():
            axes.set_yscale("log")
        axes.set_xticks([place for place in (1, *range(5, len(values) + 1, 5)) if place <= len(values)])
        axes.set_title(f"{shortened(name)} ({weights[name]:,} weights)", fontsize=9)
        axes.tick_params(labelsize=8)
        despine(axes)
        if number == 0:
            axes.legend(fontsize=8)
    on = f" (on {samples:,} samples)" if samples is not None else ""
    figure.supxlabel(f"number of the eigenvalue, by magnitude{on}", fontsize=9)
    figure.supylabel("loss per weight²", fontsize=9)
    return figure


def figure_7(blocks: Sequence[Block]) -> Figure:
    """Average trace of every block's weights, and the bits that the plan gives them."""
    width = _width(len(blocks), 7.0)
    figure = Figure(figsize=(width, 4.9 + _names_height(blocks)), layout="constrained")
    _traces_and_bits(figure, blocks, width, unit="Tr(H)/n (loss per weight²)", bits_label="weight bits")
    return figure


def figure_8(blocks: Sequence[Block], curvature: Curvature) -> Figure:
    """Average trace and bits of every block's activations (left), traces by the samples used (right)."""
    values = curvature.activation_values or {}
    right = len(next(iter(values.values()), ())) > 2
    width = _width(len(blocks), 6.0)
    figure = Figure(figsize=(width + (4.4 if right else 0), 4.9 + _names_height(blocks)), layout="constrained")
    left: Figure | SubFigure = figure
    if right:
        left, right = figure.subfigures(1, 2, width_ratios=(width, 4.4), squeeze=False)[0]
        axes = right.subplots()
        _samples_axis(axes, curvature.estimator, list(values.values()))
        axes.set_title(f"all {len(values)} activations, by {curvature.estimator}", fontsize=10)
    below = _traces_and_bits(left, blocks, width, unit="Tr(H)/|a| (loss per activation²)", bits_label="activation bits")
    below.set_xlabel("first reader of the activation")
    return figure


def _samples_axis(axes: Axes, estimator: str, series: Sequence[Sequence[float]]) -> None:
    """Running means by the samples used so far; Hutchinson's values are means of batches."""
    running_means(axes, series)
    axes.set_xlabel("samples used" if estimator == "gauss_newton" else "batches used")
    axes.set_ylabel("running mean / final value")
    axes.legend(fontsize=8)
    despine(axes)


def _traces_and_bits(
    figure: Figure | SubFigure, blocks: Sequence[Block], width: float, *, unit: str, bits_label: str
) -> Axes:
    """Traces above bits; returns the axes of the bits."""
    panels: list[Axes] = list(figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.8)))
    above, below = panels
    bits = [block.num_bits or 0.0 for block in blocks]
    colors = [BIT_COLORS[round(b)] if b else GREY for b in bits]
    trace_bars(above, [block.estimate for block in blocks], colors)
    above.set_ylabel(f"average Hessian trace\n{unit}")
    below.bar(range(len(blocks)), bits, color=colors)
    if len(blocks) * _INCHES_PER_BAR <= width:
        for position, value in enumerate(bits):
            below.text(position, value + 0.15, f"{value:.2g}", ha="center", va="bottom", fontsize=7)
    below.set_ylim(0, max(bits) + 1.5)
    below.set_yticks(range(0, 9, 2))
    mean = any(len(block.members) > 1 for block in blocks)
    below.set_ylabel(f"{bits_label}\n(mean of the block)" if mean else bits_label)
    _block_axis(below, blocks, width)
    for axes in (above, below):
        despine(axes)
    return below


def _block_axis(axes: Axes, blocks: Sequence[Block], width: float) -> None:
    name_axis(axes, [block.name for block in blocks], most=int(width / _INCHES_PER_BAR))


def _names_height(blocks: Sequence[Block]) -> float:
    """Inches that the names below the bars take."""
    return 0.075 * max(len(shortened(block.name)) for block in blocks)


def _width(bars: int, least: float) -> float:
    return min(max(least, 1.5 + _INCHES_PER_BAR * bars), _WIDEST)


def _colors(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]
