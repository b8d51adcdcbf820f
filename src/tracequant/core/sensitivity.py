"""The table of sensitivities that allocation works on. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from tracequant.core.curvature import Curvature, Perturbation
from tracequant.core.errors import ModelError
from tracequant.core.files import Saveable
from tracequant.core.points import QuantizationPoints
from tracequant.core.settings import CRITERIA, EXPANSIONS, Latency
from tracequant.core.significance import Replacement, replaced_values, replacements, trace_covariance
from tracequant.core.weight_grid import WeightGrid

# The tensor that enters the model keeps 8 bits in every plan: images are stored that way, and no layer gains from less.
MODEL_INPUT_BITS = 8


@dataclass(frozen=True)
class Sensitivity(Saveable):
    """Ω and squared perturbations by layer and bit width, and all that a plan needs to know about the model.

    `weight_omega[layer][bits]` and `activation_omega[point][bits]` are in units of the loss; `*_errors` are the squared
    perturbations ‖Q(W) − W‖² and, averaged over samples, ‖Q(a) − a‖². Saved and loaded, it answers any budget without
    the model.

    `average_traces` are those that Ω was worked out with. Those that were not significantly positive are `replaced`
    (weights) and `replaced_activations` by what `tracequant.core.significance` explains, which hold the measured ones
    too. `trace_covariance[i][j]`, j ≤ i, is the covariance of the average traces of two layers, in the order of
    `points`; empty where it is not known, or where Ω does not rest on traces.

    Two fields are for published tables (`tracequant.read_sensitivity`): `latency` in milliseconds by layer, weight bits
    and input bits, and `same_bits`, that a layer's input has as many bits as its weight.
    """

    points: QuantizationPoints
    weight_omega: dict[str, dict[int, float]]
    activation_omega: dict[str, dict[int, float]]
    weight_errors: dict[str, dict[int, float]]
    activation_errors: dict[str, dict[int, float]]
    average_traces: dict[str, float]
    weight_grid: WeightGrid
    criterion: str
    latency: Latency = field(default_factory=dict)
    same_bits: bool = False
    replaced: dict[str, Replacement] = field(default_factory=dict)
    replaced_activations: dict[str, Replacement] = field(default_factory=dict)
    trace_covariance: tuple[tuple[float, ...], ...] = ()

    def __str__(self) -> str:
        lines = [f"Sensitivity of {len(self.weight_omega)} layers, criterion {self.criterion}; Ω by bits"]
        for kind, table in (("weights of", self.weight_omega), ("input of", self.activation_omega)):
            for name, options in table.items():
                omegas = ", ".join(f"{num_bits}: {omega:.3g}" for num_bits, omega in options.items())
                lines.append(f"  {kind} {name}: {omegas}")
        for kind, replaced in (("weights of", self.replaced), ("input of", self.replaced_activations)):
            for name, own in replaced.items():
                lines.append(
                    f"  {kind} {name}: trace {own.measured:.3g} is not significantly positive, counts as {own.used:.3g}"
                )
        return "\n".join(lines)


def combine(
    curvature: Curvature,
    weight_errors: dict[str, dict[int, float]],
    activation_errors: dict[str, dict[int, float]],
    weight_grid: WeightGrid,
    *,
    criterion: str,
    perturbation: Perturbation | None = None,
) -> Sensitivity:
    """Ω of every layer and activation by `criterion`, from what was measured.

    - "trace": Tr(H_i)/n_i · ‖Q_b(W_i) − W_i‖² (Eq. 10); "l2" the perturbation alone (Table 3b);
    - "eigenvalue": λ_i/n_i · ‖ΔW_i‖², HAWQ's measure, and "eigenvalue_alone": λ_i · ‖ΔW_i‖² (Table 5);
    - "quadratic": ½ E[(u · ΔW_i)²]; "first+quadratic" adds E[g · ΔW_i]. Both need `perturbation`.

    Activations have the same with the mean over samples of ‖Δa‖², or the expansion in their own rounding. Where that
    was not measured the expansions give them half of the trace's Ω, which is in units of the loss too; the eigenvalues'
    criteria give them the trace's. A trace that is not significantly positive, and an eigenvalue of zero or less, is
    replaced by what the other layers and the errors lead one to expect (`tracequant.core.significance`). Where nothing
    was measured above zero and no error is known, it counts as zero. Only first-order terms may be negative. Raises
    `ModelError` for a criterion whose ingredients are not there.
    """
    if criterion not in CRITERIA:
        raise ModelError(f"unknown criterion {criterion!r}; choose {', '.join(CRITERIA)}")
    replaced, replaced_activations = ({}, {}) if criterion == "l2" else replacements(curvature)
    covariance = trace_covariance(curvature, replaced) if criterion == "trace" else ()
    traces = {name: estimate.average_trace for name, estimate in curvature.weights.items()}
    activation_traces = {name: estimate.average_trace for name, estimate in curvature.activations.items()}
    traces |= {name: own.used for name, own in replaced.items()}
    activation_traces |= {name: own.used for name, own in replaced_activations.items()}
    weight_factors, activation_factors = traces, activation_traces
    if criterion == "l2":
        weight_factors, activation_factors = dict.fromkeys(traces, 1.0), dict.fromkeys(activation_traces, 1.0)
    elif criterion in ("eigenvalue", "eigenvalue_alone"):
        weight_factors, replaced = _eigenvalues(curvature, divided=criterion == "eigenvalue")
    elif criterion in EXPANSIONS:
        activation_factors = {name: 0.5 * trace for name, trace in activation_traces.items()}
    weight_omega = _weighted(weight_errors, weight_factors)
    activation_omega = _weighted(activation_errors, activation_factors)
    if criterion in EXPANSIONS:
        if perturbation is None:
            raise ModelError(
                f"criterion {criterion!r} needs the roundings measured: perturbation=measure_perturbation(...)"
            )
        if (
            perturbation.weight_grid != weight_grid
            or perturbation.points != curvature.points
            or any(tuple(options) != perturbation.weight_bits for options in weight_errors.values())
        ):
            raise ModelError(
                f"the perturbation was measured at {list(perturbation.weight_bits)} bits for other layers, bits or"
                " another weight grid than the sensitivity; measure it again for these"
            )
        first_order = criterion.startswith("first+")
        weight_omega = perturbation.omega(first_order)
        expanded = perturbation.activation_omega(first_order)
        if {n: set(own) for n, own in expanded.items()} == {n: set(own) for n, own in activation_errors.items()}:
            activation_omega = expanded
    return Sensitivity(
        points=curvature.points,
        weight_omega=weight_omega,
        activation_omega=activation_omega,
        weight_errors=weight_errors,
        activation_errors=activation_errors,
        average_traces={layer.name: traces[layer.name] for layer in curvature.points.layers},
        weight_grid=weight_grid,
        criterion=criterion,
        replaced=replaced,
        replaced_activations=replaced_activations,
        trace_covariance=covariance,
    )


def _weighted(errors: dict[str, dict[int, float]], factors: dict[str, float]) -> dict[str, dict[int, float]]:
    return {
        name: {num_bits: error * max(factors[name], 0.0) for num_bits, error in options.items()}
        for name, options in errors.items()
    }


def _eigenvalues(curvature: Curvature, divided: bool) -> tuple[dict[str, float], dict[str, Replacement]]:
    """Layer name → largest eigenvalue, `divided` by the layer's size, and which of them had to be replaced."""
    if curvature.top_eigenvalues is None:
        raise ModelError(
            "the curvature holds no eigenvalues; analyze with eigenvalues, or put those of tq.top_eigenvalues(...) into"
            " its top_eigenvalues"
        )
    values = {
        layer.name: curvature.top_eigenvalues[layer.name] / (layer.numel if divided else 1)
        for layer in curvature.points.layers
    }
    kinds = {layer.name: layer.kind for layer in curvature.points.layers}
    replaced = replaced_values(values, kinds, curvature.samples)
    return values | {name: own.used for name, own in replaced.items()}, replaced
