"""The stages of a run: analyze, plan, quantize, finetune, pack. Each does nothing where it is finished already.

Every function takes the run directory first. It checks that the stages before its own are there, and it marks its own
as finished in the end. torch is imported by the stages that need the model.
"""

from __future__ import annotations

import shutil
import time
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tracequant.allocation.request import check_request
from tracequant.allocation.solve import solve as solve_plan
from tracequant.allocation.stability import is_stable, plan_stability
from tracequant.allocation.uniform import nearest_uniform
from tracequant.core.cost import float_bytes
from tracequant.core.curvature import Curvature
from tracequant.core.errors import (
    ArtifactError,
    BudgetError,
    ModelError,
    RunError,
    SecondDerivativeError,
    TracequantError,
)
from tracequant.core.files import read_json, replace_file, write_json
from tracequant.core.plan import BitPlan
from tracequant.core.reasons import in_bits
from tracequant.core.settings import EXPANSIONS, FinetuneSettings, PlanSettings
from tracequant.run.directory import RunDirectory
from tracequant.run.measured import measure_run_perturbation, rounded_weights
from tracequant.run.results import FinetuneOutcome, ModelRow, PackResult, QuantizeResult

if TYPE_CHECKING:
    from torch import nn

    from tracequant.model.task import Evaluation

# What belongs to one analysis only: a new analysis deletes it.
_OF_THE_ANALYSIS = ("perturbation.json", "check.json", "spectrum.json", "hutchinson.json")

# What `export` and `verify` made of one packed model: a new one deletes it.
_OF_THE_PRODUCT = ("model.onnx", "verify.json")


def analyze(run: RunDirectory) -> None:
    """Measure curvature and sensitivities; of several processes the first writes what all have measured."""
    if run.done("analyze"):
        return
    from tracequant.curvature.estimate import estimate_curvature
    from tracequant.measure.sensitivity import measure_sensitivity, with_eigenvalues
    from tracequant.model import distributed
    from tracequant.model.discover import discover

    first = distributed.rank() == 0
    start = run.begin("analyze") if first else 0.0
    settings = run.settings().analysis
    setup = run.setup()
    model, task, batches = setup.model, setup.task, setup.calibration
    if other := {str(p.dtype) for p in model.parameters() if str(p.dtype) != "torch.float32"}:
        raise ModelError(f"the model has {', '.join(sorted(other))} parameters; packing needs float32: model.float()")
    points = discover(model, batches, task, replace(settings.discover, ties=run.blocks(settings.discover.ties)))
    run.say(
        f"analyze: {len(points.layers)} layers, {len(points.activations)} activations,"
        f" {sum(layer.numel for layer in points.layers):,} weights"
    )
    weight_grid, seed = settings.sensitivity.weight_grid, settings.options.seed
    rounded = rounded_weights(run, points)

    def stable(curvature: Curvature) -> bool:
        assert settings.target_stability is not None
        return is_stable(
            curvature,
            rounded.errors,
            weight_grid,
            settings=run.settings().plan,
            share=settings.target_stability,
        )

    curvature = estimate_curvature(
        model,
        batches,
        task,
        settings.curvature,
        points=points,
        seed=seed,
        activations=bool(settings.sensitivity.activation_bits),
        stop=None if settings.target_stability is None else stable,
        checkpoint=run.path / "batches",
        progress=run.progress,
    )
    criterion = settings.sensitivity.chosen_criterion(curvature.estimator)
    # All processes measure it together.
    perturbation = measure_run_perturbation(run, points, rounded) if criterion in EXPANSIONS else None
    if not first:
        return
    required = criterion.startswith("eigenvalue")
    if settings.eigenvalues or required:
        optional = "" if required else "; --no-eigenvalues leaves them out"
        run.say(f"analyze: largest eigenvalues, which may take longer than all before{optional}")
        try:
            curvature = with_eigenvalues(
                model, batches, task, curvature, seed=seed, progress=run.progress, required=required
            )
        except SecondDerivativeError as error:
            if required:
                raise
            run.say(f"analyze: no eigenvalues, HAWQ's point will be missing from the report ({error})")
    sensitivity = measure_sensitivity(
        model,
        batches,
        task,
        curvature,
        settings=settings.sensitivity,
        rounded=rounded,
        perturbation=perturbation,
        progress=run.progress,
    )
    for name in _OF_THE_ANALYSIS:
        (run.path / name).unlink(missing_ok=True)
    shutil.rmtree(run.path / "landscapes", ignore_errors=True)
    if perturbation is not None:
        perturbation.save(run.path / "perturbation.json")
    curvature.save(run.path / "curvature.json")
    sensitivity.save(run.path / "sensitivity.json")
    shutil.rmtree(run.path / "batches", ignore_errors=True)
    run.finish("analyze", start)


def solve(run: RunDirectory, settings: PlanSettings) -> BitPlan:
    """The plan for a budget, from the sensitivities alone, or by evaluation for a limit on what the plan loses.

    It writes nothing except the evaluations.
    """
    run.need("analyze")
    sensitivity = run.sensitivity_by(settings.criterion)
    if not settings.by_accuracy:
        return solve_plan(sensitivity, settings)
    check_request(settings)
    from tracequant.measure.accuracy import solve_by_accuracy

    setup = run.setup()
    search = solve_by_accuracy(
        setup.model,
        setup.calibration,
        setup.task,
        sensitivity,
        settings=settings,
        evaluation=setup.evaluation,
        rounded=rounded_weights(run, sensitivity.points),
        cache=run.path / "evaluations.json",
        progress=run.progress,
    )
    run.say(f"plan: {search}")
    return search.plan


def keep_plan(run: RunDirectory, settings: PlanSettings, plan: BitPlan) -> None:
    """Make `plan`, which was solved for `settings`, the run's plan; it replaces an edited one too.

    Where it is the run's plan already, the stages that are finished with it stay finished.
    """
    if run.settings().plan == settings and run.done("plan"):
        with suppress(ArtifactError, BudgetError):  # damaged, or edited to what no plan can be
            if run.plan() == plan:
                return
    start = run.begin("plan")
    run.ask(replace(run.settings(), plan=settings))
    plan.save(run.path / "plan.json")
    run.finish("plan", start)


def stability(run: RunDirectory) -> dict[str, float] | None:
    """Layer name → share of resamples in which it keeps the bits of the run's plan; None where nothing can be drawn.

    It is computed once for a plan and kept in `stability.json`.
    """
    settings = run.settings()
    if settings.plan is None:
        return None
    path, key = run.path / "stability.json", run.key("quantize", settings)  # a hash of the plan and all before it
    if path.is_file() and (known := dict(read_json(path))).get("key") == key:
        return typing.cast(dict[str, float] | None, known["shares"])
    shares = plan_stability(run.sensitivity(), run.plan(), run.curvature(), settings.plan)
    write_json(path, {"key": key, "shares": shares})
    return shares


def quantize(run: RunDirectory) -> None:
    """Quantize by the plan and uniformly, and evaluate both and the float model.

    Where weights are compensated, the plan is evaluated with rounding to the nearest too, to say what that gained.
    """
    if run.done("quantize"):
        return
    run.need("plan")
    start = run.begin("quantize")
    from tracequant.deploy.pack import pack

    plan, sensitivity = run.plan(), run.sensitivity()
    evaluation = _evaluate(run, run.setup().model)
    float_row = _row("float32", evaluation, size_bytes=float_bytes(sensitivity.points), average_bits=32.0)
    uniform_bits, uniform = nearest_uniform(sensitivity, plan)
    rows = []
    for name, candidate, file in (
        (f"uniform {in_bits(uniform_bits)}", uniform, "uniform.safetensors"),
        ("mixed", plan, "quantized.safetensors"),
    ):
        quantized = _quantized(run, candidate, run.say if candidate is plan else None)
        size = pack(quantized, run.path / file)
        result = _evaluate(run, quantized)
        rows.append(_row(name, result, size_bytes=size, average_bits=candidate.average_bits))
    nearest_row = None
    if plan.weight_grid.rounding != "nearest":
        nearest = replace(plan, weight_grid=replace(plan.weight_grid, rounding="nearest"))
        result = _evaluate(run, _quantized(run, nearest))
        nearest_row = _row("mixed, nearest", result, size_bytes=plan.size_bytes, average_bits=plan.average_bits)
        run.say(
            f"quantize: compensated rounding changes {evaluation.metric_name} of the mixed plan from"
            f" {result.metric:.2f} to {rows[1].metric:.2f}"
        )
    outcome = QuantizeResult(
        evaluation.metric_name,
        evaluation.samples,
        float_row,
        rows[0],
        uniform_bits=uniform_bits,
        mixed=rows[1],
        nearest=nearest_row,
    )
    outcome.save(run.path / "quantize.json")
    run.finish("quantize", start)


def finetune(run: RunDirectory, recipe: FinetuneSettings) -> None:
    """Fine-tune the mixed model by `recipe`, from a checkpoint where there is one.

    Of several processes all call this and train together; the first one decides, evaluates and writes.
    """
    from tracequant.model import distributed

    start = _begin_finetune(run, recipe) if distributed.rank() == 0 else None
    start = distributed.gather(start)[0]
    if start is None:
        return
    began = time.perf_counter()
    plan = run.plan()
    key = run.key("finetune", run.settings())
    uniform_row: ModelRow | None = None
    if recipe.uniform_too:
        uniform_bits, uniform = nearest_uniform(run.sensitivity(), plan)
        quantized, _ = _train(run, uniform, f"uniform-{key}")
        if distributed.rank() == 0:
            from tracequant.deploy.pack import pack

            size = pack(quantized, run.path / "uniform_finetuned.safetensors")
            uniform_row = _row(
                f"uniform {in_bits(uniform_bits)}, fine-tuned",
                _evaluate(run, quantized),
                size_bytes=size,
                average_bits=uniform.average_bits,
            )
    quantized, losses = _train(run, plan, key)
    if distributed.rank() != 0:
        return
    _save_state(quantized, run.path / "finetuned.safetensors")
    mixed_row = _row(
        "mixed, fine-tuned",
        _evaluate(run, quantized),
        size_bytes=plan.size_bytes,
        average_bits=plan.average_bits,
    )
    outcome = FinetuneOutcome(tuple(losses), time.perf_counter() - began, mixed_row, uniform_row)
    outcome.save(run.path / "finetune.json")
    for leftover in run.path.glob("checkpoint-*.pt"):
        leftover.unlink()
    run.finish("finetune", start)


def pack(run: RunDirectory) -> None:
    """Write the product, `model.safetensors`, and evaluate it as it is loaded again."""
    if run.done("pack"):
        return
    from safetensors.torch import load_file

    from tracequant.deploy.pack import pack as pack_model

    run.need("quantize")
    plan, fine_tuned = run.plan(), run.done("finetune")
    if run.settings().finetune is not None and not fine_tuned:
        raise RunError(
            f"fine-tuning of {run.path} was asked for and is not finished: finish it with `tracequant finetune"
            f" {run.path}`, or take the packed model from before it, {run.path / 'quantized.safetensors'}"
        )
    start = run.begin("pack")
    for name in _OF_THE_PRODUCT:
        (run.path / name).unlink(missing_ok=True)
    quantized = _quantized(run, plan)
    if fine_tuned:
        quantized.load_state_dict(load_file(run.path / "finetuned.safetensors"))
    size = pack_model(quantized, run.path / "model.safetensors")
    loaded = evaluate_file(run, run.path / "model.safetensors")
    name = "packed" if fine_tuned else "packed, not fine-tuned"
    row = _row(name, loaded, size_bytes=size, average_bits=plan.average_bits)
    PackResult(plan.size_bytes, size, fine_tuned, row).save(run.path / "pack.json")
    run.finish("pack", start)


def evaluate_file(run: RunDirectory, file: str | Path | None = None) -> Evaluation:
    """Metric and loss of a packed file (the run's product by default) on the evaluation data."""
    from tracequant.deploy.pack import load

    run.settings()
    path = run.packed_file(file)
    if file is None and (run.path / "pack.json").is_file() and not run.done("pack"):
        try:
            run.plan()
            run.say(f"{path} is older than the run's present plan or settings; `tracequant pack` makes it anew")
        except TracequantError as error:
            run.say(f"{path} may be of another plan than the run's, which cannot be read: {error}")
    return _evaluate(run, load(path, run.setup().model))


def _begin_finetune(run: RunDirectory, recipe: FinetuneSettings) -> float | None:
    """Record the recipe. The time, or None where it is done already."""
    settings = replace(run.settings(), finetune=recipe)
    if run.settings() == settings and run.done("finetune"):
        return None
    run.need("quantize")
    run.ask(settings)
    if run.done("finetune"):  # the user has returned to an earlier recipe
        return None
    return run.begin("finetune")


def _train(run: RunDirectory, plan: BitPlan, key: str) -> tuple[nn.Module, list[float]]:
    """The model quantized by `plan` and fine-tuned by the run's recipe, and the losses of all steps."""
    from tracequant.quantization.finetune import finetune as train

    settings, setup = run.settings(), run.setup()
    assert settings.finetune is not None
    quantized = _quantized(run, plan)
    result = train(
        quantized,
        setup.train,
        setup.task,
        settings.finetune,
        teacher=setup.model if settings.finetune.has_teacher else None,
        seed=settings.analysis.options.seed,
        checkpoint=run.path / f"checkpoint-{key}.pt",
        checkpoint_every=50,
        progress=run.progress,
    )
    return quantized, result.losses


def _evaluate(run: RunDirectory, model: nn.Module) -> Evaluation:
    """Metric and loss of a model on the run's evaluation data."""
    setup = run.setup()
    return setup.task.evaluate(model, setup.evaluation, run.progress)


def _row(name: str, evaluation: Evaluation, *, size_bytes: int, average_bits: float) -> ModelRow:
    return ModelRow(name, evaluation.metric, evaluation.loss, size_bytes=size_bytes, average_bits=average_bits)


def _save_state(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    state = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    with replace_file(path) as temporary:
        save_file(state, temporary)


def _quantized(run: RunDirectory, plan: BitPlan, say: Callable[[str], None] | None = None) -> nn.Module:
    from tracequant.quantization.convert import quantize as quantize_model

    setup = run.setup()
    compensated = plan.weight_grid.rounding != "nearest"  # else the plan's own widths alone take less time
    rounded = rounded_weights(run, run.sensitivity().points) if compensated else None
    return quantize_model(
        setup.model, setup.calibration, setup.task, plan, rounded=rounded, say=say, progress=run.progress
    )
