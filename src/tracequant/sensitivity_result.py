"""The table of sensitivities that allocation works on. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from tracequant.artifact import Saveable
from tracequant.curvature.result import Curvature
from tracequant.points import QuantizationPoints
from tracequant.settings import Latency, WeightGrid

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
    metric: str,
) -> Sensitivity:
    """Ω_i(b) = Tr(H_i)/n_i · ‖Q_b(W_i) − W_i‖² (Eq. 10), or the perturbation alone for metric "l2".

    A negative trace, possible by noise or away from a minimum, counts as zero: more bits must never look worse.
    """
    if metric not in ("trace", "l2"):
        raise ValueError(f"unknown metric {metric!r}; choose trace or l2")

    def weighted(errors: dict[str, dict[int, float]], traces: dict[str, float]) -> dict[str, dict[int, float]]:
        return {
            name: {
                num_bits: error * (max(traces[name], 0.0) if metric == "trace" else 1.0)
                for num_bits, error in options.items()
            }
            for name, options in errors.items()
        }

    traces = {name: estimate.average_trace for name, estimate in curvature.weights.items()}
    activation_traces = {name: estimate.average_trace for name, estimate in curvature.activations.items()}
    return Sensitivity(
        points=curvature.points,
        weight_omega=weighted(weight_errors, traces),
        activation_omega=weighted(activation_errors, activation_traces),
        weight_errors=weight_errors,
        activation_errors=activation_errors,
        average_traces={layer.name: traces[layer.name] for layer in curvature.points.layers},
        weight_grid=weight_grid,
        metric=metric,
    )
