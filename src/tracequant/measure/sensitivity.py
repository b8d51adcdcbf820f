"""Ω of every layer and activation at every bit width: average Hessian trace times squared perturbation (Eq. 10)."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tracequant.core.curvature import Curvature, Perturbation
from tracequant.core.errors import ModelError, ResourceError
from tracequant.core.options import resolve, takes
from tracequant.core.points import QuantizationPoints
from tracequant.core.progress import track
from tracequant.core.sensitivity import Sensitivity, combine
from tracequant.core.settings import EXPANSIONS, SensitivitySettings
from tracequant.curvature.spectrum import top_eigenvalues
from tracequant.measure.perturbation import measure_perturbation
from tracequant.model.batches import Batch, Batches, reusable
from tracequant.model.device import measuring
from tracequant.model.hooks import reading
from tracequant.model.memory import Microbatches, on_first_batch
from tracequant.model.task import Task, check_arguments, checked
from tracequant.quantization.calibrate import activation_options, calibrate
from tracequant.quantization.grid import Grid
from tracequant.quantization.rounding import RoundedWeights, round_weights


@takes(SensitivitySettings)
def measure_sensitivity(
    model: nn.Module,
    batches: Batches,
    task: Task,
    curvature: Curvature,
    settings: SensitivitySettings | None = None,
    *,
    rounded: RoundedWeights | None = None,
    perturbation: Perturbation | None = None,
    seed: int = 0,
    progress: bool = False,
    **fields: object,
) -> Sensitivity:
    """Perturbations and Ω (HAWQ-V2, Eq. 10) of every layer at `weight_bits` and every point at `activation_bits`.

    Weights: ‖Q(W) − W‖² with the rounding that conversion will do (`weight_grid`); where it compensates, with every
    element weighted by what it is multiplied with (`RoundedWeight.output_error`). Activations: the mean over samples of
    ‖Q(a) − a‖², with ranges chosen on `batches`. `criterion` "trace" weights them by the average trace; the other
    criteria are explained at `tracequant.core.sensitivity.combine`. "auto" is "quadratic" where rounding is
    compensated, and "trace" for rounding to the nearest and for Hutchinson's traces, whose networks may have no
    expansion. What a criterion needs is measured on `batches` where it is not given: the largest eigenvalues (on the
    first batch, where `curvature` has none) and the
    `perturbation` of `measure_perturbation`, both by `seed`. With `activation_bits=()` activations stay in float. The
    tensor that the caller hands to the model is offered 8 bits only: images arrive that way. `rounded` are the weights
    of `round_weights` for these bits and this grid, where they are known already.

    Raises `SettingsError` for bit widths outside 1 to 8, `ModelError` for weights that are not finite and for a
    curvature without activations.
    """
    request = resolve(SensitivitySettings, settings, fields)
    check_arguments(model, batches, task)
    batches = reusable(batches)
    points, criterion, weight_grid = (
        curvature.points,
        request.chosen_criterion(curvature.estimator),
        request.weight_grid,
    )
    weight_bits, activation_bits = request.weight_bits, request.activation_bits
    if activation_bits and points.activations and not curvature.activations:
        raise ModelError(
            "the curvature was measured for weights only; estimate it with activations=True, or pass activation_bits=()"
        )
    if missing := [layer.name for layer in points.layers if layer.name not in curvature.weights]:
        raise ModelError(f"the curvature holds no trace of {missing[0]}; estimate it with weights=True")
    bits = {layer.name: weight_bits for layer in points.layers}
    if rounded is None or not rounded.covers(points.fingerprint, bits, weight_grid):
        rounded = round_weights(model, batches, task, points, bits, weight_grid=weight_grid, progress=progress)
    activation_errors: dict[str, dict[int, float]] = {}
    if activation_bits:
        options = activation_options(points, activation_bits)
        grids = calibrate(model, batches, task, points, bits=options, progress=progress)
        activation_errors = _activation_errors(model, batches, task, points, grids, progress)
    if criterion.startswith("eigenvalue") and curvature.top_eigenvalues is None:
        curvature = with_eigenvalues(model, batches, task, curvature, seed=seed, progress=progress)
    if criterion in EXPANSIONS and perturbation is None:
        perturbation = measure_perturbation(
            model,
            batches,
            task,
            points,
            weight_bits=weight_bits,
            weight_grid=weight_grid,
            activation_bits=activation_bits,
            rounded=rounded,
            seed=seed,
            progress=progress,
        )
    found = combine(
        curvature, rounded.errors, activation_errors, weight_grid, criterion=criterion, perturbation=perturbation
    )
    _warn_of_noise(found)
    _warn_of_falling_losses(found)
    return found


def with_eigenvalues(
    model: nn.Module,
    batches: Batches,
    task: Task,
    curvature: Curvature,
    *,
    seed: int = 0,
    progress: bool = False,
    required: bool = True,
) -> Curvature:
    """The curvature with the largest eigenvalue of every layer's block, on the first of `batches`.

    Where the graph of all its samples does not fit into memory, half of them are taken until it does, and a warning
    says how many there were. Where memory does not suffice at all, `ResourceError` says why; if the eigenvalues are not
    `required`, a warning says it and the curvature comes back without them.
    """
    try:
        found, samples = on_first_batch(
            task,
            batches,
            lambda first: top_eigenvalues(model, first, task, curvature.points, seed=seed, progress=progress),
        )
    except ResourceError as error:
        if required:
            raise
        warnings.warn(f"this analysis has no eigenvalues: {error}", stacklevel=2)
        return curvature
    if samples is not None:
        warnings.warn(
            f"the eigenvalues are those of the first {samples} samples, because the graph of more does not fit into"
            " memory",
            stacklevel=2,
        )
    return replace(curvature, top_eigenvalues={name: values[0] for name, values in found.items()})


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
    microbatches = Microbatches(task)

    def measure(batch: Batch) -> list[tuple[str, int, float]]:
        found: list[tuple[str, int, float]] = []
        # Consumers that share a tensor do not make it count twice. No tensor is kept alive by being known.
        seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

        def read(name: str, tensor: Tensor) -> None:
            # One that was overwritten since is another: of the same point, or of one behind an in-place operation.
            value = (name, 0 if tensor.is_inference() else tensor._version)
            if seen.get(tensor) != value:  # type: ignore[no-untyped-call]
                seen[tensor] = value
                found.extend((name, num_bits, _squared_error(tensor, grid)) for num_bits, grid in grids[name].items())

        with reading(model, points, read):
            task.outputs(model, batch)
        return found

    with measuring(model), torch.no_grad():
        for batch in track(checked(batches, task, model), "Activation errors", progress):
            for name, num_bits, error in itertools.chain.from_iterable(microbatches.run(batch, measure)):
                sums[name][num_bits] += error
            total += task.batch_size(batch)
    return {name: {b: value / total for b, value in options.items()} for name, options in sums.items()}


def _warn_of_noise(sensitivity: Sensitivity) -> None:
    """Traces that are not significantly positive do not say what a layer can bear; the user should hear of them."""
    table = sensitivity.average_traces
    noisy = list(sensitivity.replaced) or [name for name, trace in table.items() if trace <= 0]
    if noisy and sensitivity.criterion not in ("l2", *EXPANSIONS):
        value = "an eigenvalue" if sensitivity.criterion.startswith("eigenvalue") else "a trace"
        counts = "count as the other layers and the errors suggest" if sensitivity.replaced else "count as insensitive"
        warnings.warn(
            f"{len(noisy)} of {len(table)} layers have {value} that is not significantly above zero"
            f" ({', '.join(noisy[:3])}{', ...' if len(noisy) > 3 else ''}) and {counts}; use more samples or probes,"
            " check that the model is trained, or use criterion='l2'",
            stacklevel=3,
        )


def _warn_of_falling_losses(sensitivity: Sensitivity) -> None:
    """First-order terms that promise much from coarse rounding belong to a model that this loss has not trained."""
    table = sensitivity.weight_omega
    falling = [name for name, omega in table.items() if min(omega.values()) < min(0.0, omega[max(omega)])]
    if 2 * len(falling) > len(table):
        warnings.warn(
            f"by criterion={sensitivity.criterion!r} fewer bits lower the loss in {len(falling)} of {len(table)} layers"
            f" ({', '.join(falling[:3])}, ...): the model is not at a minimum of this loss, and its gradient says"
            " little about steps as long as rounding's; see that the task's loss is the one that the model was trained"
            " by, or use criterion='trace' or 'quadratic'",
            stacklevel=3,
        )


def _squared_error(values: Tensor, grid: Grid) -> float:
    return float(grid.round(values).sub_(values).square_().sum(dtype=torch.float64))
