"""What an estimator of curvature returns. Plain data, no torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from tracequant.core.files import Saveable
from tracequant.core.points import QuantizationPoints
from tracequant.core.weight_grid import WeightGrid

# What `print(curvature)` may take of a screen.
SCREEN_COLUMNS, SCREEN_LAYERS, SCREEN_NAME = 100, 20, 38


@dataclass(frozen=True)
class TraceEstimate:
    """The trace of one diagonal block of the Hessian of the mean loss.

    `trace` is in loss units per squared unit of the tensor; `average_trace` is it divided by `numel`, the number of
    elements (for activations: of one sample, averaged over the samples). `standard_error` is the error of `trace` due
    to the random probes, on the samples that were used; it is 0 for an exact estimator and infinite where one probe
    leaves it unknown. `sampling_error` is the spread between batches divided by the square root of their number: how
    far another set of samples of this size may lie, probe error included; infinite for a single batch.
    """

    trace: float
    average_trace: float
    standard_error: float
    sampling_error: float
    numel: float
    num_probes: int
    samples: int

    @property
    def relative_error(self) -> float:
        """Standard error divided by the absolute value of the trace."""
        return self.standard_error / abs(self.trace) if self.trace else math.inf


@dataclass(frozen=True)
class Curvature(Saveable):
    """Traces of all layers (`weights`) and activation points (`activations`), by name, and how they were made.

    `points` are the layers and tensors that were looked at; later stages take them from here.

    `reason` says why `estimator` was chosen. `weight_values` and `activation_values` are the single values that a trace
    is the mean of, one for each sample (Hutchinson: each batch), for resampling; `weight_probes` and
    `activation_probes` the trace by each probe alone, to see it converge. `top_eigenvalues` holds the largest
    eigenvalue of each layer's block where it was asked for, HAWQ's older measure; it serves comparison only.
    """

    points: QuantizationPoints
    weights: dict[str, TraceEstimate]
    activations: dict[str, TraceEstimate]
    estimator: str
    reason: str
    seed: int
    samples: int
    weight_values: dict[str, tuple[float, ...]] | None = None
    activation_values: dict[str, tuple[float, ...]] | None = None
    weight_probes: dict[str, tuple[float, ...]] | None = None
    activation_probes: dict[str, tuple[float, ...]] | None = None
    top_eigenvalues: dict[str, float] | None = None

    def __str__(self) -> str:
        """A table that fits a screen: the layers of the largest and the smallest average traces."""
        kind, main = ("weights", self.weights) if self.weights else ("activations", self.activations)
        exact = all(estimate.standard_error == 0 for estimate in main.values())
        num_probes = max((estimate.num_probes for estimate in main.values()), default=0)
        probes = "exact on these samples" if exact else f"{num_probes} probe{'s' if num_probes != 1 else ''}"
        reason = textwrap.wrap(
            self.reason, SCREEN_COLUMNS, initial_indent="  ", subsequent_indent="  ", max_lines=4, placeholder=" ..."
        )
        lines = [
            f"Curvature by {self.estimator}: {self.samples} samples, {probes}, seed {self.seed}",
            *reason,
            *_table(kind, main),
        ]
        if self.weights and self.activations:
            ranked = sorted(self.activations, key=lambda name: self.activations[name].average_trace)
            ends = [f"{self.activations[n].average_trace:.3g} ({_shortened(n, 22)})" for n in (ranked[0], ranked[-1])]
            lines.append(f"Activations: {len(ranked)} average traces from {ends[0]} to {ends[1]}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"<Curvature by {self.estimator} on {self.samples} samples: {len(self.weights)} layers,"
            f" {len(self.activations)} activations>"
        )


@dataclass(frozen=True)
class Perturbation(Saveable):
    """The expansion of the mean loss in the roundings ΔW of all layers at all of `weight_bits`.

    Options are the pairs (layer, bits), layers in the order of `points` and for each of them the bits in increasing
    order. `first_order[a]` is E[g · ΔW_a], in units of the loss, and `products[a][b]`, b ≤ a, is E[Σ_k s_k (u_k · ΔW_a)
    (u_k · ΔW_b)], of which the halves on the diagonal are the second-order terms of single layers. Of activations,
    where they were measured, `activation_first` and `activation_second` have E[g · Δa] and ½ E[(u · Δa)²] by point and
    bits.
    """

    points: QuantizationPoints
    weight_bits: tuple[int, ...]
    weight_grid: WeightGrid
    first_order: tuple[float, ...]
    products: tuple[tuple[float, ...], ...]
    samples: int
    reason: str
    activation_first: dict[str, dict[int, float]] = field(default_factory=dict)
    activation_second: dict[str, dict[int, float]] = field(default_factory=dict)

    def activation_omega(self, first_order: bool) -> dict[str, dict[int, float]]:
        """½ E[(u · Δa)²] by activation and bits, with E[g · Δa] added where that is asked for."""
        return {
            name: {b: value + (self.activation_first[name][b] if first_order else 0.0) for b, value in options.items()}
            for name, options in self.activation_second.items()
        }

    def omega(self, first_order: bool) -> dict[str, dict[int, float]]:
        """½ E[(u · ΔW)²] by layer and bits, with E[g · ΔW] added where that is asked for."""
        values = [
            0.5 * row[-1] + (slope if first_order else 0.0)
            for slope, row in zip(self.first_order, self.products, strict=True)
        ]
        width = len(self.weight_bits)
        return {
            layer.name: dict(zip(self.weight_bits, values[i * width : (i + 1) * width], strict=True))
            for i, layer in enumerate(self.points.layers)
        }


@dataclass(frozen=True)
class Density(Saveable):
    """The density of the eigenvalues of a layer's Hessian block, or of all `numel` weights together (`layer` None).

    `nodes[draw]` and `weights[draw]` are a quadrature rule: the density is the mean over probes of Σ weight ·
    δ(λ − node).
    """

    layer: str | None
    numel: int
    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    @property
    def trace(self) -> float:
        """The trace that the density implies, an estimate as Hutchinson's."""
        rules = zip(self.nodes, self.weights, strict=True)
        moments = [math.fsum(n * w for n, w in zip(nodes, weights, strict=True)) for nodes, weights in rules]
        return self.numel * math.fsum(moments) / len(moments)

    def smoothed(self, at: Sequence[float], width: float) -> list[float]:
        """The density at the eigenvalues `at`, every node a Gaussian of standard deviation `width`."""
        rules = [
            (node, weight / len(self.nodes))
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
            for node, weight in zip(nodes, weights, strict=True)
        ]
        scale = 1 / (width * math.sqrt(2 * math.pi))
        return [math.fsum(w * scale * math.exp(-0.5 * ((x - n) / width) ** 2) for n, w in rules) for x in at]


@dataclass(frozen=True)
class Spectrum(Saveable):
    """The largest eigenvalues of layers' Hessian blocks, largest first, and densities of all eigenvalues.

    All of the mean loss of `samples` samples.
    """

    eigenvalues: dict[str, tuple[float, ...]]
    densities: tuple[Density, ...]
    samples: int | None = None


@dataclass(frozen=True)
class Landscape:
    """The loss around one layer's weights W, all other weights as they are (the paper's Figure 2).

    `losses[i][j]` is the mean loss at W + s_i u + s_j v, with u and v the unit eigenvectors of the two `eigenvalues` of
    largest magnitude of the layer's Hessian block; infinite or NaN where the network overflows. Rows that are missing
    have not been measured yet.
    """

    layer: str
    eigenvalues: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Landscapes(Saveable):
    """The loss around the weights of several layers, on one grid.

    `steps` are the s_i, the distances ‖ΔW‖ from the trained weights, with 0 in the middle.
    The loss is the mean over `samples` samples. `context` identifies the data and the model.
    """

    steps: tuple[float, ...]
    samples: int
    context: str
    layers: tuple[Landscape, ...]

    @property
    def complete(self) -> bool:
        """Whether every row has been measured."""
        return all(len(landscape.losses) == len(self.steps) for landscape in self.layers)


def summarize(values: Sequence[Sequence[float]], batch_sizes: Sequence[int], numel: float) -> TraceEstimate:
    """The estimate from `values[batch][draw]`, each a value of zᵀHz for the mean loss of its batch (Eq. 7).

    Batches are weighted by their samples, and may have different numbers of probes. Probes are independent between
    probes and batches, so the variances add.
    """
    samples = sum(batch_sizes)
    weights = [size / samples for size in batch_sizes]
    means = [math.fsum(row) / len(row) for row in values]
    trace = math.fsum(weight * mean for weight, mean in zip(weights, means, strict=True))
    variance = math.inf
    if all(len(row) > 1 for row in values):
        variance = math.fsum(
            weight**2 * math.fsum((value - mean) ** 2 for value in row) / (len(row) - 1) / len(row)
            for weight, row, mean in zip(weights, values, means, strict=True)
        )
    spread = math.inf
    if len(means) > 1:
        # The variance of a weighted mean of batches, unbiased for equal sizes.
        residual = math.fsum(weight**2 * (mean - trace) ** 2 for weight, mean in zip(weights, means, strict=True))
        spread = math.sqrt(residual * len(means) / (len(means) - 1))
    return TraceEstimate(trace, trace / numel, math.sqrt(variance), spread, numel, max(map(len, values)), samples)


def _table(kind: str, estimates: dict[str, TraceEstimate]) -> list[str]:
    """Lines of a table of at most `SCREEN_LAYERS` estimates and a line, the largest average traces first."""
    ranked = sorted(estimates, key=lambda name: -estimates[name].average_trace)
    half = SCREEN_LAYERS // 2
    # The line that says how many are left out would take the place of a single one.
    shown = ranked if len(ranked) <= SCREEN_LAYERS + 1 else ranked[:half] + ranked[-half:]
    width = max([len(kind), *(min(len(name), SCREEN_NAME) for name in shown)])
    lines = [f"  {kind:{width}}  {'elements':>12}  {'average trace':>13}  {'probe error':>11}  {'sampling error':>14}"]
    for position, name in enumerate(shown):
        if position == half and len(shown) < len(ranked):
            lines.append(f"  ... {len(ranked) - SCREEN_LAYERS} more ...")
        e = estimates[name]
        errors = [_share(error, e.trace) for error in (e.standard_error, e.sampling_error)]
        lines.append(
            f"  {_shortened(name, SCREEN_NAME):{width}}  {e.numel:12,.0f}  {e.average_trace:13.4g}  {errors[0]:>11}"
            f"  {errors[1]:>14}"
        )
    return lines


def _share(error: float, trace: float) -> str:
    """An error relative to its trace, as a percentage."""
    if error == 0:
        return "0"
    return f"{error / abs(trace):.1%}" if trace and math.isfinite(error) else "unknown"


def _shortened(name: str, width: int) -> str:
    """The name, or its end where it is too long: names of layers differ at the end."""
    return name if len(name) <= width else "…" + name[1 - width :]
