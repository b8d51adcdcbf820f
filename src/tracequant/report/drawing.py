"""What several figures have in common."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from tracequant.core.curvature import TraceEstimate

# One colour for each bit width, dark for few and bright for many, the same in every figure.
BIT_COLORS = {bits: to_hex(mpl.colormaps["viridis"](0.05 + 0.9 * (bits - 1) / 7)) for bits in range(1, 9)}
GREY = "#8a8f98"
RED = "#d1495b"
# Longer names are shortened, and more of them than this are not all written.
NAME_LENGTH, NAMES = 32, 120


def trace_bars(axes: Axes, estimates: Sequence[TraceEstimate], colors: Sequence[str]) -> None:
    """Bars with the sampling error, on a logarithmic axis where all traces are positive."""
    values = [estimate.average_trace for estimate in estimates]
    errors = [known_error(estimate) / estimate.numel for estimate in estimates]
    positive = all(value > 0 for value in values)
    # On a logarithmic axis the lower end of a bar may not reach zero.
    lower = [min(error, 0.95 * value) if positive else error for error, value in zip(errors, values, strict=True)]
    axes.bar(range(len(values)), values, color=colors)
    axes.errorbar(
        range(len(values)), values, yerr=[lower, errors], fmt="none", ecolor="black", elinewidth=0.8, capsize=2
    )
    if positive:
        axes.set_yscale("log")


def known_error(estimate: TraceEstimate) -> float:
    """The larger of the errors that are known."""
    known = [e for e in (estimate.standard_error, estimate.sampling_error) if e != float("inf")]
    return max(known, default=0.0)


def name_axis(axes: Axes, names: Sequence[str], most: int = NAMES) -> None:
    """Names below the bars 0, 1, ...; of more than `most`, which would run into each other, every second, third, ..."""
    step = 1 + (len(names) - 1) // most
    axes.set_xticks(range(0, len(names), step), [shortened(n) for n in names[::step]], rotation=90, fontsize=8)
    axes.set_xlim(-0.7, len(names) - 0.3)


def shortened(name: str) -> str:
    """A name of at most `NAME_LENGTH` characters that keeps its numbers, which tell layers apart, as long as it can.

    >>> shortened("backbone.body.layer4.2.downsample.convolution")
    'bac.bod.layer4.2.dow.convolution'
    """
    words = name.split(".")
    for i, word in enumerate(words):
        if len(".".join(words)) > NAME_LENGTH and word.isalpha():
            words[i] = word[:3]
    short = ".".join(words)
    if len(short) <= NAME_LENGTH:
        return short
    return f"{short[: NAME_LENGTH // 3]}…{short[NAME_LENGTH // 3 + 1 - NAME_LENGTH :]}"


def despine(axes: Axes) -> None:
    """Leave out the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)


def running_means(axes: Axes, series: Sequence[Sequence[float]]) -> None:
    """Running means of each row over its last one, and the median row's standard error around 1, with labels."""
    errors: list[float] = []
    for row in series:
        values = np.array(row)
        final = values.mean()
        if len(values) < 2 or final == 0:
            continue
        means = np.cumsum(values) / np.arange(1, len(values) + 1) / final
        label = "" if errors else "each"
        axes.plot(range(1, len(values) + 1), means, color=GREY, linewidth=0.7, alpha=0.6, label=label)
        errors.append(float(values.std(ddof=1)) / abs(float(final)))
    if not errors:
        return
    counts = np.arange(1, max(len(row) for row in series) + 1)
    band = np.median(errors) / np.sqrt(counts)
    for sign, label in ((1, "± standard error, median"), (-1, "")):
        axes.plot(counts, 1 + sign * band, "--", color=RED, linewidth=1.2, label=label)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-0.2, 2.2)
