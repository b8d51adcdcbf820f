"""What several stages of a run need of the roundings: the rounded weights, and the loss's expansion in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracequant.core.curvature import Perturbation
from tracequant.core.points import QuantizationPoints
from tracequant.run.directory import RunDirectory

if TYPE_CHECKING:
    from tracequant.quantization.rounding import RoundedWeights


def rounded_weights(run: RunDirectory, points: QuantizationPoints) -> RoundedWeights:
    """All layers' weights at the widths on offer, rounded on the calibration data; what is known is not done again."""
    from tracequant.quantization.rounding import round_weights

    setup, settings = run.setup(), run.settings().analysis
    bits = {layer.name: settings.sensitivity.weight_bits for layer in points.layers}
    return round_weights(
        setup.model,
        setup.calibration,
        setup.task,
        points,
        bits,
        weight_grid=settings.sensitivity.weight_grid,
        cache=run.path / "rounded",
        progress=run.progress,
    )


def measure_run_perturbation(run: RunDirectory, points: QuantizationPoints, rounded: RoundedWeights) -> Perturbation:
    """The expansion in the roundings, measured on the run's calibration data."""
    from tracequant.measure.perturbation import measure_perturbation

    setup, settings = run.setup(), run.settings().analysis
    return measure_perturbation(
        setup.model,
        setup.calibration,
        setup.task,
        points,
        weight_bits=settings.sensitivity.weight_bits,
        weight_grid=settings.sensitivity.weight_grid,
        activation_bits=settings.sensitivity.activation_bits,
        rounded=rounded,
        seed=settings.options.seed,
        checkpoint=run.path / "batches",
        precision=settings.curvature.precision,
        progress=run.progress,
    )
