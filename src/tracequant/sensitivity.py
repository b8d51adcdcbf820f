"""Ω of every layer and activation at every bit width: average Hessian trace times squared perturbation (Eq. 10)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tracequant.calibration import activation_options, calibrate
from tracequant.curvature.perturbation import measure_perturbation
from tracequant.curvature.pieces import out_of_memory
from tracequant.curvature.result import Curvature, Perturbation
from tracequant.curvature.spectrum import top_eigenvalues
from tracequant.errors import ModelError
from tracequant.layers import reading, weight_parameter
from tracequant.model_state import frozen_evaluation
from tracequant.points import QuantizationPoints
from tracequant.progress import track
from tracequant.quantizer import Grid, check_bits, choose_weight_grid
from tracequant.sensitivity_result import Sensitivity, combine
from tracequant.settings import EXPANSIONS, Metric, WeightGrid
from tracequant.task import Batches, Task, checked, reusable


def measure_sensitivity(
    model: nn.Module,
    curvature: Curvature,
    batches: Batches,
    task: Task,
    weight_bits: Sequence[int] = (2, 3, 4, 8),
    activation_bits: Sequence[int] = (4, 8),
    metric: Metric = "trace",
    weight_grid: WeightGrid | None = None,
    weight_errors: dict[str, dict[int, float]] | None = None,
    perturbation: Perturbation | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Sensitivity:
    """Perturbations and Ω (HAWQ-V2, Eq. 10) of every layer at `weight_bits` and every point at `activation_bits`.

    Weights: ‖Q(W) − W‖² with the grid that conversion will use (`weight_grid`). Activations: the mean over samples of
    ‖Q(a) − a‖², with ranges chosen on `batches`. `metric` "trace" weights them by the average trace; the others are
    explained at `tracequant.sensitivity_result.combine`. What a metric needs besides is measured on `batches` where it
    is not given: the largest eigenvalues (on the first batch, where `curvature` has none) and the `perturbation` of
    `measure_perturbation`, both by `seed`. With `activation_bits=()` activations
    stay in float. The tensor that the caller hands to the model is offered 8 bits only: images arrive that way.
    `weight_errors` are those of `measure_weight_errors` for these bits and this grid, where they are known already.

    Raises `ModelError` for bit widths outside 1 to 8, weights that are not finite, and a curvature without activations.
    """
    batches = reusable(batches)
    points = curvature.points
    weight_grid = weight_grid or WeightGrid()
    weight_bits, activation_bits = sorted(set(weight_bits)), sorted(set(activation_bits))
    if not weight_bits:
        raise ModelError("weight_bits is empty; name at least one bit width from 1 to 8")
    for num_bits in (*weight_bits, *activation_bits):
        check_bits(num_bits)
    if activation_bits and points.activations and not curvature.activations:
        raise ModelError(
            "the curvature was measured for weights only; estimate it with activations=True, or pass activation_bits=()"
        )

    if missing := [layer.name for layer in points.layers if layer.name not in curvature.weights]:
        raise ModelError(f"the curvature holds no trace of {missing[0]}; estimate it with weights=True")
    _warn_of_flat_layers(curvature, metric)
    if weight_errors is None:
        weight_errors = measure_weight_errors(model, points, weight_bits, weight_grid)
    activation_errors: dict[str, dict[int, float]] = {}
    if activation_bits:
        options = activation_options(points, activation_bits)
        grids = calibrate(model, batches, task, points, options, progress=progress)
        activation_errors = _activation_errors(model, batches, task, points, grids, progress)
    if metric.startswith("eigenvalue") and curvature.top_eigenvalues is None:
        curvature = with_eigenvalues(model, curvature, batches, task, seed, progress)
    if metric in EXPANSIONS and perturbation is None:
        perturbation = measure_perturbation(
            model, batches, task, points, weight_bits, weight_grid, activation_bits, seed=seed, progress=progress
        )
    found = combine(curvature, weight_errors, activation_errors, weight_grid, metric=metric, perturbation=perturbation)
    _warn_of_falling_losses(found)
    return found


def with_eigenvalues(
    model: nn.Module, curvature: Curvature, batches: Batches, task: Task, seed: int = 0, progress: bool = False
) -> Curvature:
    """The curvature with the largest eigenvalue of every layer's block, on the first of `batches`.

    Or, with a warning, on as many of its samples as fit into memory, halved until they do.
    """
    first = list(itertools.islice(batches, 1))
    while True:
        try:
            found = top_eigenvalues(model, first, task, curvature.points, seed=seed, progress=progress)
            break
        except (RuntimeError, MemoryError) as error:
            size = task.batch_size(first[0])
            if not out_of_memory(error) or size == 1:
                raise
        # Here the failed attempt's tensors are gone, which the exception had kept.
        warnings.warn(
            f"eigenvalues of {size} samples do not fit into memory, and are taken of {size // 2}", stacklevel=2
        )
        first = [task.select(first[0], 0, size // 2)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return replace(curvature, top_eigenvalues={name: values[0] for name, values in found.items()})


def measure_weight_errors(
    model: nn.Module, points: QuantizationPoints, weight_bits: Sequence[int], weight_grid: WeightGrid
) -> dict[str, dict[int, float]]:
    """‖Q(W) − W‖² of every layer at every bit width: the part of Ω that takes no data.

    Raises `ModelError` for bit widths outside 1 to 8 and for weights that are not finite.
    """
    for num_bits in weight_bits:
        check_bits(num_bits)
    result = {}
    for layer in points.layers:
        weight = weight_parameter(model, layer).detach()
        if not torch.isfinite(weight).all():
            raise ModelError(f"layer {layer.name} holds weights that are NaN or infinite")
        result[layer.name] = {
            num_bits: _squared_error(weight, choose_weight_grid(weight, num_bits, layer.channel_axis, weight_grid))
            for num_bits in sorted(set(weight_bits))
        }
    return result


def _activation_errors(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    grids: dict[str, dict[int, Grid]],
    progress: bool,
) -> dict[str, dict[int, float]]:
    """Mean over samples of ‖Q(a) − a‖² for every point and bit width, in one pass."""
    sums = {name: dict.fromkeys(options, 0.0) for name, options in grids.items()}
    total = 0
    seen: dict[int, Tensor] = {}

    def read(name: str, tensor: Tensor) -> None:
        if id(tensor) not in seen:  # consumers that share the tensor do not make it count twice
            seen[id(tensor)] = tensor
            for num_bits, grid in grids[name].items():
                sums[name][num_bits] += _squared_error(tensor, grid)

    with frozen_evaluation(model), torch.no_grad():
        for batch in track(checked(batches, task, model), "Activation errors", progress):
            with reading(model, points, read):
                task.outputs(model, batch)
            seen.clear()
            total += task.batch_size(batch)
    return {name: {b: value / total for b, value in options.items()} for name, options in sums.items()}


def _warn_of_flat_layers(curvature: Curvature, metric: str) -> None:
    """Traces that are not positive say nothing of what a layer can bear; the user should hear of them."""
    flat = [name for name, estimate in curvature.weights.items() if estimate.trace <= 0]
    if flat and metric == "trace":
        warnings.warn(
            f"{len(flat)} of {len(curvature.weights)} layers have a trace of zero or less"
            f" ({', '.join(flat[:3])}{', ...' if len(flat) > 3 else ''})"
            " and count as insensitive; use more samples or draws, check that the model is trained, or use metric='l2'",
            stacklevel=3,
        )


def _warn_of_falling_losses(sensitivity: Sensitivity) -> None:
    """First-order terms that promise much from coarse rounding belong to a model that this loss has not trained."""
    table = sensitivity.weight_omega
    falling = [name for name, omega in table.items() if min(omega.values()) < min(0.0, omega[max(omega)])]
    if 2 * len(falling) > len(table):
        warnings.warn(
            f"by metric={sensitivity.metric!r} fewer bits lower the loss in {len(falling)} of {len(table)} layers"
            f" ({', '.join(falling[:3])}, ...): the model is not at a minimum of this loss, and its gradient says"
            " little about steps as long as rounding's; see that the task's loss is the one that the model was trained"
            " by, or use metric='trace' or 'quadratic'",
            stacklevel=3,
        )


def _squared_error(values: Tensor, grid: Grid) -> float:
    return float((grid.round(values) - values).double().square().sum())
