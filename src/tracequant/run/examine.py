"""Measurements that explain a run: how well criteria rank, eigenvalues, landscapes, convergence of single traces."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from tracequant.allocation.request import check_request
from tracequant.core.curvature import Curvature, Landscapes, Perturbation, Spectrum
from tracequant.core.errors import RunError
from tracequant.core.evaluations import Check, EvaluatedPlan
from tracequant.core.match import match_names
from tracequant.core.plan import BitPlan
from tracequant.core.points import QuantizationPoints
from tracequant.core.settings import Criterion, PlanSettings
from tracequant.run.directory import RunDirectory
from tracequant.run.measured import measure_run_perturbation, rounded_weights
from tracequant.run.stages import solve

if TYPE_CHECKING:
    from tracequant.model.batches import Batch

Result = TypeVar("Result")


def check(run: RunDirectory, samples: int | None, plans: int, offered: Sequence[Sequence[int]]) -> Check:
    """Rank every criterion by the loss measured on the first `samples` of the calibration data (all if None).

    The expansion in the roundings is measured first where it is not there, which makes its criteria available to
    `solve`.
    """
    run.need("analyze")
    from tracequant.measure.check import check_criteria

    start = time.perf_counter()
    setup, settings, curvature = run.setup(), run.settings().analysis, run.curvature()
    rounded = rounded_weights(run, curvature.points)
    path = run.path / "perturbation.json"
    if path.is_file():
        perturbation = Perturbation.load(path)
    else:
        perturbation = measure_run_perturbation(run, curvature.points, rounded)
        perturbation.save(path)
        shutil.rmtree(run.path / "batches", ignore_errors=True)
    result = check_criteria(
        setup.model,
        setup.calibration if samples is None else _first_samples(run, samples),
        setup.task,
        curvature,
        weight_bits=settings.sensitivity.weight_bits,
        weight_grid=settings.sensitivity.weight_grid,
        perturbation=perturbation,
        rounded=rounded,
        plans=plans,
        offered=offered or None,
        seed=settings.options.seed,
        cache=run.path / "check",
        progress=run.progress,
    )
    result.save(run.path / "check.json")
    run.say(f"check: done in {time.perf_counter() - start:.1f} s")
    return result


def compare(
    run: RunDirectory, settings: PlanSettings, criteria: Sequence[Criterion]
) -> dict[Criterion, tuple[BitPlan, EvaluatedPlan]]:
    """Plans for one budget by each criterion, evaluated after calibration without fine-tuning (Tables 3 and 5)."""
    run.need("analyze")
    check_request(settings)
    plans = {criterion: solve(run, replace(settings, criterion=criterion)) for criterion in criteria}
    from tracequant.measure.accuracy import Evaluator

    setup = run.setup()
    evaluator = Evaluator(
        setup.model,
        setup.calibration,
        setup.task,
        evaluation=setup.evaluation,
        cache=run.path / "evaluations.json",
        progress=run.progress,
    )
    return {criterion: (plan, evaluator.of(plan)) for criterion, plan in plans.items()}


def measure_spectrum(run: RunDirectory, layers: Sequence[str], top: int, densities: Sequence[str]) -> Spectrum:
    """The `top` largest eigenvalues of the layers that match, and densities of some ("*" for all weights together).

    Patterns match whole names. Everything is measured on the first calibration batch.
    """
    run.need("analyze")
    from tracequant.curvature.spectrum import spectral_density, top_eigenvalues

    setup, points = run.setup(), run.curvature().points
    seed = run.settings().analysis.options.seed
    names = list(points.by_name)
    chosen = match_names(layers, names, "layer")
    whole = ["*"] if "*" in densities else []
    wanted = whole + match_names([pattern for pattern in densities if pattern != "*"], names, "density")
    if not (top and chosen) and not wanted:
        raise RunError(
            f"there is nothing to measure: {top} eigenvalues of layers that match {list(layers)}, and no density"
        )

    def measure(batches: list[Batch]) -> Spectrum:
        eigenvalues = {}
        if top and chosen:
            eigenvalues = top_eigenvalues(
                setup.model, batches, setup.task, _only(points, chosen), k=top, seed=seed, progress=run.progress
            )
        measured = tuple(
            spectral_density(
                setup.model,
                batches,
                setup.task,
                points,
                layer=None if name == "*" else name,
                seed=seed,
                progress=run.progress,
            )
            for name in wanted
        )
        return Spectrum(eigenvalues, measured, sum(map(setup.task.batch_size, batches)))

    spectrum = _on_first_batch(run, "the spectrum is", measure)
    spectrum.save(run.path / "spectrum.json")
    return spectrum


def eigenvalues(run: RunDirectory, layers: Sequence[str], top: int) -> Spectrum:
    """A spectrum with the `top` eigenvalues of these layers; only what is missing is measured.

    The new eigenvalues join those that `measure_spectrum` has left.
    """
    run.need("analyze")
    points, known = run.curvature().points, run.spectrum()
    values = dict(known.eigenvalues) if known is not None else {}
    missing = [name for name in layers if len(values.get(name, ())) < min(top, points.by_name[name].numel)]
    if missing or known is None:
        from tracequant.curvature.spectrum import top_eigenvalues

        setup, seed = run.setup(), run.settings().analysis.options.seed
        densities = known.densities if known is not None else ()

        def measure(batches: list[Batch]) -> Spectrum:
            measured = values | top_eigenvalues(
                setup.model, batches, setup.task, _only(points, missing), k=top, seed=seed, progress=run.progress
            )
            in_order = {name: measured[name] for name in points.by_name if name in measured}
            return Spectrum(in_order, densities, sum(map(setup.task.batch_size, batches)))

        known = _on_first_batch(run, "the eigenvalues are", measure)
        known.save(run.path / "spectrum.json")
    return known


def landscapes(
    run: RunDirectory, layers: Sequence[str], size: int | None = None, radius: float | None = None
) -> Landscapes:
    """The loss around these layers' weights on the first calibration batch, measured once (`loss_landscapes`).

    An interrupted measurement resumes after the last row that was finished.
    """
    run.need("analyze")
    seed = run.settings().analysis.options.seed
    asked = hashlib.sha256(json.dumps([list(layers), size, radius, seed]).encode()).hexdigest()[:16]
    path = run.path / "landscapes" / f"{asked}.json"
    if path.is_file() and (known := Landscapes.load(path)).complete:
        return known
    from tracequant.measure.landscape import DEFAULT_SIZE, loss_landscapes

    setup = run.setup()

    def measure(batches: list[Batch]) -> Landscapes:
        return loss_landscapes(
            setup.model,
            batches,
            setup.task,
            run.curvature().points,
            layers=layers,
            size=size or DEFAULT_SIZE,
            radius=radius,
            seed=seed,
            checkpoint=path,
            progress=run.progress,
        )

    return _on_first_batch(run, "the landscapes are", measure)


def hutchinson_probes(run: RunDirectory, layers: Sequence[str], num_probes: int) -> Curvature:
    """Hutchinson's traces of these layers on the first calibration batch, by each random vector, measured once."""
    run.need("analyze")
    path = run.path / "hutchinson.json"
    if path.is_file():
        known = Curvature.load(path)
        if list(known.weights) == list(layers) and all(e.num_probes == num_probes for e in known.weights.values()):
            return known
    from tracequant.curvature.estimate import estimate_curvature

    setup = run.setup()
    measured = estimate_curvature(
        setup.model,
        _first_batch(run),
        setup.task,
        estimator="hutchinson",
        num_probes=num_probes,
        points=_only(run.curvature().points, layers),
        seed=run.settings().analysis.options.seed,
        activations=False,
        progress=run.progress,
    )
    measured.save(path)
    return measured


def _on_first_batch(run: RunDirectory, what: str, measure: Callable[[list[Batch]], Result]) -> Result:
    """What `measure` returns for the first calibration batch, or for as many of its samples as fit into memory.

    A warning says how many there were where they are not all.
    """
    from tracequant.model.memory import on_first_batch

    result, samples = on_first_batch(run.setup().task, run.setup().calibration, measure)
    if samples is not None:
        warnings.warn(
            f"{what} of the first {samples} samples, because the graph of more does not fit into memory", stacklevel=3
        )
    return result


def _first_batch(run: RunDirectory) -> list[Batch]:
    """The first calibration batch, alone: its graph is kept for all of many products with the Hessian."""
    return list(itertools.islice(run.setup().calibration, 1))


def _first_samples(run: RunDirectory, samples: int) -> list[Batch]:
    """The first `samples` of the calibration data."""
    setup, batches = run.setup(), []
    for batch in setup.calibration:
        size = min(setup.task.batch_size(batch), samples)
        batches.append(batch if size == setup.task.batch_size(batch) else setup.task.select(batch, 0, size))
        samples -= size
        if not samples:
            break
    return batches


def _only(points: QuantizationPoints, names: Sequence[str]) -> QuantizationPoints:
    """The same points with these layers alone."""
    return replace(points, layers=tuple(points.by_name[name] for name in names))
