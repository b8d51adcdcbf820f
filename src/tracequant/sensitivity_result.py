"""The table of sensitivities that allocation works on. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from tracequant.artifact import Saveable
from tracequant.curvature.result import Curvature, Perturbation
from tracequant.errors import ModelError
from tracequant.points import QuantizationPoints
from tracequant.settings import EXPANSIONS, METRICS, Latency, WeightGrid

# The tensor that enters the model keeps 8 bits in every plan: images are stored that way, and no layer gains from less.
MODEL_INPUT_BITS = 8


@dataclass(frozen=True)
class Sensitivity(Saveable):
    """Ω and squared perturbations by layer and bit width, and all that a plan needs to know about the model.

    `weight_omega[layer][bits]` and `activation_omega[point][bits]` are in units of the loss; `*_errors` are the squared
    perturbations ‖Q(W) − W‖² and, averaged over samples, ‖Q(a) − a‖². Saved and loaded, it answers any budget without
    the model.

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
    metric: str
    latency: Latency = field(default_factory=dict)
    same_bits: bool = False

    def __str__(self) -> str:
        lines = [f"Sensitivity of {len(self.weight_omega)} layers, metric {self.metric}; Ω by bits"]
        for kind, table in (("weights of", self.weight_omega), ("input of", self.activation_omega)):
            for name, options in table.items():
                omegas = ", ".join(f"{num_bits}: {omega:.3g}" for num_bits, omega in options.items())
                lines.append(f"  {kind} {name}: {omegas}")
        return "\n".join(lines)


def combine(
    curvature: Curvature,
    weight_errors: dict[str, dict[int, float]],
    activation_errors: dict[str, dict[int, float]],
    weight_grid: WeightGrid,
    *,
    metric: str,
    perturbation: Perturbation | None = None,
) -> Sensitivity:
    """Ω of every layer and activation by `metric`, from what was measured.

    - "trace": Tr(H_i)/n_i · ‖Q_b(W_i) − W_i‖² (Eq. 10); "l2" the perturbation alone (Table 3b);
    - "eigenvalue": λ_i/n_i · ‖ΔW_i‖², HAWQ's measure, and "eigenvalue_alone": λ_i · ‖ΔW_i‖² (Table 5);
    - "quadratic": ½ E[(u · ΔW_i)²]; "first+quadratic" adds E[g · ΔW_i]. Both need `perturbation`.

    Activations have the same with the mean over samples of ‖Δa‖², or the expansion in their own rounding. Where that
    was not measured the expansions give them half of the trace's Ω, which is in units of the loss too; the eigenvalues'
    metrics give them the trace's. A negative trace or eigenvalue, possible by noise or away from a minimum, counts as
    zero: more bits must never look worse. Only first-order terms may be negative. Raises `ModelError` for a metric
    whose ingredients are not there.
    """
    if metric not in METRICS:
        raise ModelError(f"unknown metric {metric!r}; choose {', '.join(METRICS)}")
    traces = {name: estimate.average_trace for name, estimate in curvature.weights.items()}
    activation_traces = {name: estimate.average_trace for name, estimate in curvature.activations.items()}
    weight_factors, activation_factors = traces, activation_traces
    if metric == "l2":
        weight_factors, activation_factors = dict.fromkeys(traces, 1.0), dict.fromkeys(activation_traces, 1.0)
    elif metric in ("eigenvalue", "eigenvalue_alone"):
        weight_factors = _eigenvalues(curvature, divided=metric == "eigenvalue")
    elif metric in EXPANSIONS:
        activation_factors = {name: 0.5 * trace for name, trace in activation_traces.items()}
    weight_omega = _weighted(weight_errors, weight_factors)
    activation_omega = _weighted(activation_errors, activation_factors)
    if metric in EXPANSIONS:
        if perturbation is None:
            raise ModelError(f"metric {metric!r} needs the roundings measured: perturbation=measure_perturbation(...)")
        if (
            perturbation.weight_grid != weight_grid
            or perturbation.points != curvature.points
            or any(tuple(options) != perturbation.weight_bits for options in weight_errors.values())
        ):
            raise ModelError(
                f"the perturbation was measured at {list(perturbation.weight_bits)} bits for other layers, bits or"
                " another weight grid than the sensitivity; measure it again for these"
            )
        first_order = metric.startswith("first+")
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
        metric=metric,
    )


def _weighted(errors: dict[str, dict[int, float]], factors: dict[str, float]) -> dict[str, dict[int, float]]:
    return {
        name: {num_bits: error * max(factors[name], 0.0) for num_bits, error in options.items()}
        for name, options in errors.items()
    }


def _eigenvalues(curvature: Curvature, divided: bool) -> dict[str, float]:
    if curvature.top_eigenvalues is None:
        raise ModelError(
            "the curvature holds no eigenvalues; analyze with eigenvalues, or put those of tq.top_eigenvalues(...) into"
            " its top_eigenvalues"
        )
    return {
        layer.name: curvature.top_eigenvalues[layer.name] / (layer.numel if divided else 1)
        for layer in curvature.points.layers
    }
