"""A run directory: the stages of the flow, their artifacts, and what is left to do.

    RUN/settings.json        what was asked
    RUN/batches              analyze, while it runs: what was measured on each batch
    RUN/curvature.json       analyze: traces of all layers and activations
    RUN/sensitivity.json     analyze: Ω by layer and bit width
    RUN/plan.json            plan: the bits
    RUN/quantize.json        quantize: accuracies of the float, uniform and mixed models
    RUN/quantized.safetensors    quantize: the mixed model before fine-tuning, packed (and uniform.safetensors)
    RUN/checkpoint-KEY.pt    finetune, while it runs
    RUN/finetuned.safetensors    finetune: the trained state
    RUN/finetune.json        finetune: losses and accuracies
    RUN/model.safetensors    pack: the product
    RUN/pack.json            pack: its size and accuracy
    RUN/model.onnx           export: the product as ONNX
    RUN/verify.json          verify: the ONNX file against the packed model
    RUN/latency.csv          latency: milliseconds of every layer by bits (latency.json: as measured)
    RUN/spectrum.json        spectrum: eigenvalues and densities, where asked for
    RUN/perturbation.json    analyze or check: the loss's expansion in the roundings, where a metric needs it
    RUN/evaluations.json     plan: every plan that was evaluated, where a limit on accuracy was asked for
    RUN/check.json           check: how well each metric ranks, its measurements in RUN/check
    RUN/landscapes           figures: the loss around single layers
    RUN/hutchinson.json      figures: traces of single layers by each draw, where the analysis has none to show
    RUN/paper                figures: the paper's figures and what they show
    RUN/report.html          report, with its figures in RUN/figures

`stages.json` holds a key for every finished stage: a hash of its settings and of the keys of the stages before it. A
stage whose key is still right is never run again; one whose settings changed is, and so are those after it. Nothing
here imports torch until a stage needs the model.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tracequant.allocation.request import check as check_request
from tracequant.allocation.solve import solve
from tracequant.allocation.stability import is_stable, plan_stability
from tracequant.allocation.uniform import uniform_plan
from tracequant.artifact import Saveable, read_json, replace_file, write_json
from tracequant.curvature.result import Curvature, Landscapes, Perturbation, Spectrum
from tracequant.errors import ArtifactError, ModelError, RunError, SecondDerivativeError, TaskError
from tracequant.evaluated import Check, EvaluatedPlan, Evaluations
from tracequant.plan import BitPlan, reprice
from tracequant.sensitivity_result import Sensitivity, combine
from tracequant.settings import (
    EXPANSIONS,
    METRICS,
    AnalyzeSettings,
    FinetuneSettings,
    Latency,
    Metric,
    PlanSettings,
    RunSettings,
)

if TYPE_CHECKING:
    import torch

    from tracequant.export.onnx import OnnxFile, Profile
    from tracequant.points import QuantizationPoints
    from tracequant.report.paper import FigureOptions, PaperFigures
    from tracequant.task import Batch, TaskSetup
    from tracequant.verification import Verification

Stage = Literal["analyze", "plan", "quantize", "finetune", "pack", "report"]
STAGES: tuple[Stage, ...] = ("analyze", "plan", "quantize", "finetune", "pack", "report")
# What a finished stage has left; without one of these files it is not finished.
FILES: dict[Stage, tuple[str, ...]] = {
    "analyze": ("curvature.json", "sensitivity.json"),
    "plan": ("plan.json",),
    "quantize": ("quantize.json", "quantized.safetensors", "uniform.safetensors"),
    "finetune": ("finetune.json", "finetuned.safetensors"),
    "pack": ("pack.json", "model.safetensors"),
    "report": ("report.html",),
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured(Saveable):
    """One row of the result table: a model's metric and loss on the evaluation data, and its bytes on disk."""

    name: str
    metric: float
    loss: float
    size_bytes: int
    average_bits: float


@dataclass(frozen=True)
class QuantizeResult(Saveable):
    """Models before fine-tuning: float32, uniform at the offered width whose file is nearest in size, mixed."""

    metric_name: str
    samples: int
    float_model: Measured
    uniform: Measured
    uniform_bits: int
    mixed: Measured


@dataclass(frozen=True)
class FinetuneOutcome(Saveable):
    """Models after fine-tuning; `uniform` where it was asked for."""

    losses: tuple[float, ...]
    seconds: float
    mixed: Measured
    uniform: Measured | None


@dataclass(frozen=True)
class PackResult(Saveable):
    """The packed file: bytes promised by the plan and found on disk, and its accuracy after loading it again."""

    promised_bytes: int
    file_bytes: int
    fine_tuned: bool
    evaluation: Measured


class Run:
    """A run directory. Every method that runs a stage first checks that the stages before it are there."""

    def __init__(self, path: str | Path, say: Say = lambda text: None, progress: bool = False) -> None:
        self.path = Path(path)
        self._say = say
        self._progress = progress
        self._setup: TaskSetup | None = None
        self._stability: tuple[BitPlan, dict[str, float] | None] | None = None

    def be_silent(self) -> None:
        """Say nothing from now on and draw no bars: another process speaks."""
        self._say, self._progress = (lambda text: None), False

    # Settings and keys

    def settings(self) -> RunSettings:
        """What this run was asked for; `RunError` if the directory is not a run."""
        if not self.exists():
            raise RunError(
                f"{self.path} is not a run directory (it has no settings.json); make one with"
                f" `tracequant analyze --task ... --out {self.path}`"
            )
        return RunSettings.load(self.path / "settings.json")

    def exists(self) -> bool:
        """Whether the directory is a run already."""
        return (self.path / "settings.json").is_file()

    def done(self, stage: Stage) -> bool:
        """Whether the stage is finished under the present settings, and its files are there."""
        if not all((self.path / name).is_file() for name in ("settings.json", *FILES[stage])):
            return False
        return self._keys().get(stage) == self._key(stage, self.settings())

    def ask(self, settings: RunSettings) -> None:
        """Record settings. `RunError` if the directory belongs to another task, data set or weights file."""
        if not self.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise RunError(f"{self.path} is not empty and not a run directory; choose another --out")
        elif self._keys():
            self._check_identity(self.settings().analyze, settings.analyze)
        settings.save(self.path / "settings.json")

    def adopt(self, analyze: AnalyzeSettings) -> None:
        """Record what to analyze. Where it differs from before the task is loaded: if that fails, nothing changes."""
        before = self.settings() if self.exists() else None
        if before is not None and before.analyze == analyze:
            return
        self.ask(replace(before, analyze=analyze) if before is not None else RunSettings(analyze))
        try:
            self.setup()
        except BaseException:
            if before is not None:
                before.save(self.path / "settings.json")
            else:
                (self.path / "settings.json").unlink()
            raise

    def _check_identity(self, before: AnalyzeSettings, now: AnalyzeSettings) -> None:
        for name in ("task", "data_dir", "weights", "model"):
            old = before.task if name == "task" else getattr(before.options, name)
            new = now.task if name == "task" else getattr(now.options, name)
            if old != new:
                raise RunError(
                    f"{self.path} belongs to another model: its {name} is {old or 'the default'}, you asked for"
                    f" {new or 'the default'}; choose another --out, or delete the directory"
                )

    def _key(self, stage: Stage, settings: RunSettings) -> str:
        own: dict[Stage, object] = {
            "analyze": asdict(settings.analyze) | {"options": asdict(settings.analyze.options) | {"workers": None}},
            "plan": settings.plan and asdict(settings.plan),
            "finetune": settings.finetune and asdict(settings.finetune),
        }
        if stage == "pack":
            # A file packed before fine-tuning was finished is not the one to pack after it.
            own["pack"] = self._keys().get("finetune") == self._key("finetune", settings)
        plan = self.path / "plan.json"
        if stage == "quantize" and plan.is_file():
            own["quantize"] = hashlib.sha256(plan.read_bytes()).hexdigest()  # it may have been edited
        index = STAGES.index(stage)
        before = self._key(STAGES[index - 1], settings) if index else ""
        text = json.dumps([stage, own.get(stage), before])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _keys(self) -> dict[str, str]:
        path = self.path / "stages.json"
        return dict(read_json(path)) if path.is_file() else {}

    def _begin(self, stage: Stage) -> float:
        """The time, after marking the stage and those after it as not finished: their files are about to change."""
        later = STAGES[STAGES.index(stage) :]
        keys = self._keys()
        if any(name in keys for name in later):
            write_json(self.path / "stages.json", {name: key for name, key in keys.items() if name not in later})
        return time.perf_counter()

    def _finish(self, stage: Stage, seconds: float) -> None:
        write_json(self.path / "stages.json", self._keys() | {stage: self._key(stage, self.settings())})
        self._say(f"{stage}: done in {seconds:.1f} s")

    def _need(self, stage: Stage) -> None:
        self.settings()
        if not self.done(stage):
            command = {
                "analyze": f"analyze --task ... --out {self.path}",
                "plan": f"plan {self.path} --max-size-mb X",
            }.get(stage, f"{stage} {self.path}")
            raise RunError(
                f"{self.path} has no finished stage {stage!r} under its present settings; run"
                f" `tracequant {command}` first"
            )

    # Artifacts

    def curvature(self) -> Curvature:
        """Result of analyze."""
        return Curvature.load(self.path / "curvature.json")

    def sensitivity(self) -> Sensitivity:
        """Sensitivities by the metric that the run's plan was asked for by, or else the analysis."""
        plan = self.settings().plan
        return self.sensitivity_by(plan.metric if plan is not None else None)

    def sensitivity_by(self, metric: Metric | None) -> Sensitivity:
        """Sensitivities by any metric whose ingredients were measured, without the model; None is the analysis's own.

        Raises `RunError` that says what to run where they were not.
        """
        measured = Sensitivity.load(self.path / "sensitivity.json")
        if metric is None or metric == measured.metric:
            return measured
        perturbation = None
        if metric in EXPANSIONS:
            if not (self.path / "perturbation.json").is_file():
                raise RunError(
                    f"metric {metric!r} needs the loss's expansion in the roundings, which {self.path} has not:"
                    f" `tracequant check {self.path}` measures it, or analyze with --metric {metric}"
                )
            perturbation = Perturbation.load(self.path / "perturbation.json")
        curvature = self.curvature()
        if metric.startswith("eigenvalue") and curvature.top_eigenvalues is None:
            raise RunError(f"metric {metric!r} needs eigenvalues; analyze without --no-eigenvalues")
        return combine(
            curvature,
            measured.weight_errors,
            measured.activation_errors,
            measured.weight_grid,
            metric=metric,
            perturbation=perturbation,
        )

    def metrics(self) -> list[Metric]:
        """The metrics whose ingredients were measured."""
        has_eigenvalues = self.curvature().top_eigenvalues is not None
        has_perturbation = (self.path / "perturbation.json").is_file()
        return [
            metric
            for metric in METRICS
            if (has_eigenvalues or not metric.startswith("eigenvalue"))
            and (has_perturbation or metric not in EXPANSIONS)
        ]

    def evaluations(self) -> Evaluations | None:
        """Every plan that was evaluated in solving by accuracy or comparing metrics; None if there is none."""
        path = self.path / "evaluations.json"
        return Evaluations.load(path) if path.is_file() else None

    def check_result(self) -> Check | None:
        """Result of `check`, None where there is none of this analysis."""
        path = self.path / "check.json"
        return Check.load(path) if path.is_file() else None

    def plan(self) -> BitPlan:
        """Result of plan; bits that were edited by hand count, with the size and Ω that they really have."""
        plan = BitPlan.load(self.path / "plan.json")
        repriced = reprice(self.sensitivity(), plan)
        if repriced == plan:
            return plan
        return replace(repriced, method="edited", bound=None, prices={})

    def quantize_result(self) -> QuantizeResult:
        """Result of quantize."""
        return QuantizeResult.load(self.path / "quantize.json")

    def finetune_outcome(self) -> FinetuneOutcome:
        """Result of finetune."""
        return FinetuneOutcome.load(self.path / "finetune.json")

    def pack_result(self) -> PackResult:
        """Result of pack."""
        return PackResult.load(self.path / "pack.json")

    # Stages

    def setup(self) -> TaskSetup:
        """Model, task and data, loaded once; `RunError` if the weights are not those that were analysed."""
        if self._setup is None:
            from tracequant.model_state import fingerprint
            from tracequant.tasks import load_task

            settings = self.settings().analyze
            setup = load_task(settings.task, settings.options)
            if self.done("analyze"):
                analysed = self.sensitivity_by(None).points.fingerprint
                if analysed != fingerprint(setup.model):
                    raise RunError(
                        f"{self.path} was made with other weights of this model (fingerprint {analysed}); choose"
                        " another --out, and see that the task gives the same weights every time it is loaded"
                    )
            self._setup = setup.to(_device(setup.device or settings.device))
        return self._setup

    def analyze(self) -> None:
        """Measure curvature and sensitivities; of several processes the first writes what all have measured."""
        if self.done("analyze"):
            return
        from tracequant import distributed
        from tracequant.curvature.estimate import estimate_curvature
        from tracequant.layers import discover
        from tracequant.sensitivity import measure_sensitivity, measure_weight_errors, with_eigenvalues

        start = self._begin("analyze") if distributed.rank() == 0 else 0.0
        settings = self.settings().analyze
        setup = self.setup()
        model, task, batches = setup.model, setup.task, setup.calibration
        if other := {str(p.dtype) for p in model.parameters() if str(p.dtype) != "torch.float32"}:
            raise ModelError(
                f"the model has {', '.join(sorted(other))} parameters; packing needs float32: model.float()"
            )
        ties = _with_blocks(settings.ties, self.setup)
        points = discover(model, batches, task, settings.include, settings.exclude, ties)
        self._say(
            f"analyze: {len(points.layers)} layers, {len(points.activations)} activations,"
            f" {sum(layer.numel for layer in points.layers):,} weights"
        )
        weight_errors = measure_weight_errors(model, points, settings.weight_bits, settings.weight_grid)

        def stable(curvature: Curvature) -> bool:
            assert settings.stable is not None
            asked, share = self.settings().plan, settings.stable
            return is_stable(curvature, weight_errors, settings.weight_grid, settings=asked, share=share)

        curvature = estimate_curvature(
            model,
            batches,
            task,
            settings.method,
            settings.draws,
            settings.options.seed,
            points,
            activations=bool(settings.activation_bits),
            relative_error=settings.relative_error,
            stop=None if settings.stable is None else stable,
            precision=settings.precision,
            checkpoint=self.path / "batches",
            progress=self._progress,
            **({} if settings.method == "gauss_newton" else {"probes": settings.probes}),
        )
        perturbation = None
        if settings.metric in EXPANSIONS:
            perturbation = self._perturbation(points)  # measured by all processes together
        if distributed.rank() != 0:
            return
        if settings.eigenvalues or settings.metric.startswith("eigenvalue"):
            try:
                curvature = with_eigenvalues(model, curvature, batches, task, settings.options.seed, self._progress)
            except SecondDerivativeError as error:
                if settings.metric.startswith("eigenvalue"):
                    raise
                self._say(f"analyze: no eigenvalues, HAWQ's point will be missing from the report ({error})")
        sensitivity = measure_sensitivity(
            model,
            curvature,
            batches,
            task,
            settings.weight_bits,
            settings.activation_bits,
            settings.metric,
            settings.weight_grid,
            weight_errors,
            perturbation,
            settings.options.seed,
            progress=self._progress,
        )
        for earlier in ("perturbation.json", "check.json", "spectrum.json", "hutchinson.json"):
            (self.path / earlier).unlink(missing_ok=True)
        shutil.rmtree(self.path / "landscapes", ignore_errors=True)
        if perturbation is not None:
            perturbation.save(self.path / "perturbation.json")
        curvature.save(self.path / "curvature.json")
        sensitivity.save(self.path / "sensitivity.json")
        shutil.rmtree(self.path / "batches", ignore_errors=True)
        self._finish("analyze", time.perf_counter() - start)

    def _perturbation(self, points: QuantizationPoints) -> Perturbation:
        """The expansion in the roundings, measured on the calibration data."""
        from tracequant.curvature.perturbation import measure_perturbation

        setup, settings = self.setup(), self.settings().analyze
        return measure_perturbation(
            setup.model,
            setup.calibration,
            setup.task,
            points,
            settings.weight_bits,
            settings.weight_grid,
            settings.activation_bits,
            seed=settings.options.seed,
            checkpoint=self.path / "batches",
            precision=settings.precision,
            progress=self._progress,
        )

    def check(self, samples: int | None, plans: int, offered: Sequence[Sequence[int]]) -> Check:
        """Rank every metric by the loss measured on the first `samples` of the calibration data (all if None).

        The expansion in the roundings is measured first where it is not there, which makes its metrics available to
        `solve`.
        """
        self._need("analyze")
        from tracequant.check import check_metrics

        start = time.perf_counter()
        setup, settings, curvature = self.setup(), self.settings().analyze, self.curvature()
        path = self.path / "perturbation.json"
        if path.is_file():
            perturbation = Perturbation.load(path)
        else:
            perturbation = self._perturbation(curvature.points)
            perturbation.save(path)
            shutil.rmtree(self.path / "batches", ignore_errors=True)
        found = check_metrics(
            setup.model,
            curvature,
            setup.calibration if samples is None else self._some(samples),
            setup.task,
            settings.weight_bits,
            settings.weight_grid,
            perturbation,
            plans,
            offered or None,
            settings.options.seed,
            self.path / "check",
            self._progress,
        )
        found.save(self.path / "check.json")
        self._say(f"check: done in {time.perf_counter() - start:.1f} s")
        return found

    def _some(self, samples: int) -> list[Batch]:
        """The first `samples` of the calibration data."""
        setup, found = self.setup(), []
        for batch in setup.calibration:
            size = min(setup.task.batch_size(batch), samples)
            found.append(batch if size == setup.task.batch_size(batch) else setup.task.select(batch, 0, size))
            samples -= size
            if not samples:
                break
        return found

    def measure_spectrum(self, layers: Sequence[str], top: int, densities: Sequence[str]) -> Spectrum:
        """The `top` largest eigenvalues of the layers that match, and densities of some ("*" for all weights together).

        Patterns match whole names. Everything is measured on the first calibration batch.
        """
        self._need("analyze")
        from tracequant.curvature.spectrum import spectral_density, top_eigenvalues
        from tracequant.layers import match_names

        setup, points, batches = self.setup(), self.curvature().points, self._first_batch()
        seed = self.settings().analyze.options.seed
        names = list(points.by_name)
        chosen = match_names(layers, names, "layer")
        whole = ["*"] if "*" in densities else []
        wanted = whole + match_names([p for p in densities if p != "*"], names, "density")
        if not (top and chosen) and not wanted:
            raise RunError(
                f"there is nothing to measure: {top} eigenvalues of layers that match {list(layers)}, and no density"
            )
        eigenvalues = {}
        if top and chosen:
            some = replace(points, layers=tuple(points.by_name[name] for name in chosen))
            eigenvalues = top_eigenvalues(
                setup.model, batches, setup.task, some, k=top, seed=seed, progress=self._progress
            )
        found = tuple(
            spectral_density(
                setup.model, batches, setup.task, points, None if n == "*" else n, seed=seed, progress=self._progress
            )
            for n in wanted
        )
        spectrum = Spectrum(eigenvalues, found, sum(map(setup.task.batch_size, batches)))
        spectrum.save(self.path / "spectrum.json")
        return spectrum

    def _first_batch(self) -> list[Batch]:
        """The first calibration batch, alone: its graph is kept for all of many products with the Hessian."""
        return list(itertools.islice(self.setup().calibration, 1))

    def eigenvalues(self, layers: Sequence[str], top: int) -> Spectrum:
        """A spectrum with the `top` eigenvalues of these layers, of which only those are measured that are missing.

        They join those that `measure_spectrum` has left.
        """
        self._need("analyze")
        points, known = self.curvature().points, self.spectrum()
        values = dict(known.eigenvalues) if known is not None else {}
        missing = [name for name in layers if len(values.get(name, ())) < min(top, points.by_name[name].numel)]
        if missing:
            from tracequant.curvature.spectrum import top_eigenvalues

            setup, batches = self.setup(), self._first_batch()
            some = replace(points, layers=tuple(points.by_name[name] for name in missing))
            seed = self.settings().analyze.options.seed
            values |= top_eigenvalues(setup.model, batches, setup.task, some, k=top, seed=seed, progress=self._progress)
            known = Spectrum(
                {name: values[name] for name in points.by_name if name in values},
                known.densities if known is not None else (),
                sum(map(setup.task.batch_size, batches)),
            )
            known.save(self.path / "spectrum.json")
        assert known is not None
        return known

    def landscapes(self, layers: Sequence[str], size: int | None = None, radius: float | None = None) -> Landscapes:
        """The loss around these layers' weights on the first calibration batch, measured once (`loss_landscapes`).

        An interrupted measurement goes on after the last row that was finished.
        """
        self._need("analyze")
        seed = self.settings().analyze.options.seed
        asked = hashlib.sha256(json.dumps([list(layers), size, radius, seed]).encode()).hexdigest()[:16]
        path = self.path / "landscapes" / f"{asked}.json"
        if path.is_file() and (known := Landscapes.load(path)).complete:
            return known
        from tracequant.landscape import DEFAULT_SIZE, loss_landscapes

        setup = self.setup()
        return loss_landscapes(
            setup.model,
            self._first_batch(),
            setup.task,
            self.curvature().points,
            layers,
            size or DEFAULT_SIZE,
            radius,
            seed,
            path,
            self._progress,
        )

    def hutchinson_draws(self, layers: Sequence[str], draws: int) -> Curvature:
        """Hutchinson's traces of these layers on the first calibration batch, one after each draw, measured once."""
        self._need("analyze")
        path = self.path / "hutchinson.json"
        if path.is_file():
            known = Curvature.load(path)
            if list(known.weights) == list(layers) and all(e.draws == draws for e in known.weights.values()):
                return known
        from tracequant.curvature.estimate import estimate_curvature

        setup, points = self.setup(), self.curvature().points
        found = estimate_curvature(
            setup.model,
            self._first_batch(),
            setup.task,
            "hutchinson",
            draws,
            self.settings().analyze.options.seed,
            replace(points, layers=tuple(points.by_name[name] for name in layers)),
            activations=False,
            progress=self._progress,
        )
        found.save(path)
        return found

    def spectrum(self) -> Spectrum | None:
        """Result of `measure_spectrum`, None where there is none of this analysis."""
        path = self.path / "spectrum.json"
        return Spectrum.load(path) if path.is_file() else None

    def stability(self) -> dict[str, float] | None:
        """Layer name → share of resamples in which it keeps the bits of the run's plan; worked out once."""
        settings, plan = self.settings().plan, self.plan()
        if settings is None:
            return None
        if self._stability is None or self._stability[0] != plan:
            self._stability = plan, plan_stability(self.sensitivity(), plan, self.curvature(), settings)
        return self._stability[1]

    def solve(self, settings: PlanSettings) -> BitPlan:
        """The plan for a budget, from the sensitivities alone, or by evaluation for a limit on what it loses.

        Nothing is written but the evaluations.
        """
        self._need("analyze")
        sensitivity = self.sensitivity_by(settings.metric)
        if not settings.by_accuracy:
            return solve(sensitivity, **settings.keywords())
        check_request(settings)
        from tracequant.accuracy import solve_by_accuracy

        setup = self.setup()
        search = solve_by_accuracy(
            setup.model,
            sensitivity,
            setup.task,
            setup.calibration,
            setup.evaluation,
            max_accuracy_drop=settings.max_accuracy_drop,
            max_loss_increase=settings.max_loss_increase,
            cache=self.path / "evaluations.json",
            progress=self._progress,
            **settings.keywords(),
        )
        self._say(f"plan: {search}")
        return search.plan

    def compare(self, settings: PlanSettings, metrics: Sequence[Metric]) -> dict[Metric, tuple[BitPlan, EvaluatedPlan]]:
        """Plans for one budget by each metric, evaluated after calibration without fine-tuning (Tables 3 and 5)."""
        self._need("analyze")
        check_request(settings)
        plans = {metric: self.solve(replace(settings, metric=metric)) for metric in metrics}
        from tracequant.accuracy import Evaluator

        setup = self.setup()
        evaluator = Evaluator(
            setup.model,
            setup.task,
            setup.calibration,
            setup.evaluation,
            cache=self.path / "evaluations.json",
            progress=self._progress,
        )
        return {metric: (plan, evaluator.of(plan)) for metric, plan in plans.items()}

    def keep_plan(self, settings: PlanSettings, plan: BitPlan) -> None:
        """Make `plan`, solved for `settings`, the run's plan, also over one that was edited."""
        start = self._begin("plan")
        self.ask(replace(self.settings(), plan=settings))
        plan.save(self.path / "plan.json")
        self._finish("plan", time.perf_counter() - start)

    def quantize(self) -> None:
        """Quantize by the plan and uniformly, and evaluate both beside the float model."""
        if self.done("quantize"):
            return
        self._need("plan")
        start = self._begin("quantize")
        from tracequant.cost import float_bytes
        from tracequant.export.packed import pack

        setup, plan, sensitivity = self.setup(), self.plan(), self.sensitivity()
        task, model = setup.task, setup.model
        evaluation = task.evaluate(model, setup.evaluation, self._progress)
        float_row = Measured("float32", evaluation.metric, evaluation.loss, float_bytes(sensitivity.points), 32.0)
        uniform_bits, uniform_plan = self._nearest_uniform(sensitivity, plan)
        rows = []
        for name, candidate, file in (
            (f"uniform {uniform_bits} bits", uniform_plan, "uniform.safetensors"),
            ("mixed", plan, "quantized.safetensors"),
        ):
            quantized = self._quantized(candidate)
            size = pack(quantized, self.path / file)
            result = task.evaluate(quantized, setup.evaluation, self._progress)
            rows.append(Measured(name, result.metric, result.loss, size, candidate.average_bits))
        QuantizeResult(evaluation.metric_name, evaluation.samples, float_row, rows[0], uniform_bits, rows[1]).save(
            self.path / "quantize.json"
        )
        self._finish("quantize", time.perf_counter() - start)

    def finetune(self, recipe: FinetuneSettings) -> None:
        """Fine-tune the mixed model by `recipe`, going on from a checkpoint where there is one.

        Of several processes all call this and train together; the first one decides, evaluates and writes.
        """
        from tracequant import distributed

        first = distributed.rank() == 0
        start = self._begin_finetune(recipe) if first else None
        start = distributed.gather(start)[0]
        if start is None:
            return
        settings, plan = self.settings(), self.plan()
        key = self._key("finetune", settings)
        outcome_uniform: Measured | None = None
        if recipe.uniform_too:
            uniform_bits, uniform = self._nearest_uniform(self.sensitivity(), plan)
            name = f"uniform {uniform_bits} bits, fine-tuned"
            outcome_uniform, _ = self._finetune_one(uniform, f"uniform-{key}", name, "uniform_finetuned.safetensors")
        mixed, losses = self._finetune_one(plan, key, "mixed, fine-tuned", "finetuned.safetensors")
        if mixed is None:
            return
        FinetuneOutcome(tuple(losses), time.perf_counter() - start, mixed, outcome_uniform).save(
            self.path / "finetune.json"
        )
        for leftover in self.path.glob("checkpoint-*.pt"):
            leftover.unlink()
        self._finish("finetune", time.perf_counter() - start)

    def _begin_finetune(self, recipe: FinetuneSettings) -> float | None:
        """Record the recipe. The time, or None where it is done already."""
        settings = replace(self.settings(), finetune=recipe)
        if self.settings() == settings and self.done("finetune"):
            return None
        self._need("quantize")
        self.check_recipe(recipe)
        self.ask(settings)
        if self.done("finetune"):  # a recipe of before, asked for again
            return None
        return self._begin("finetune")

    def check_recipe(self, recipe: FinetuneSettings) -> None:
        """Raise `TaskError` if the recipe has a teacher and the task has no distillation loss."""
        from tracequant.task import Task

        task = self.setup().task
        if recipe.distillation > 0 and type(task).distillation_loss is Task.distillation_loss:
            raise TaskError(
                f"{type(task).__name__} has no distillation_loss(outputs, teacher_outputs); implement it, or fine-tune"
                " without a teacher (--distillation 0)"
            )

    def _finetune_one(self, plan: BitPlan, key: str, name: str, file: str) -> tuple[Measured | None, list[float]]:
        """The row of a fine-tuned model (None in processes beside the first) and the losses."""
        from safetensors.torch import save_file

        from tracequant import distributed
        from tracequant.export.packed import pack
        from tracequant.finetuning import finetune

        settings = self.settings().finetune
        assert settings is not None
        setup = self.setup()
        quantized = self._quantized(plan)
        sensitivity = self.sensitivity()
        result = finetune(
            quantized,
            setup.train,
            setup.task,
            teacher=setup.model if settings.has_teacher else None,
            **settings.keywords(),
            omega={layer: sensitivity.weight_omega[layer][b] for layer, b in plan.weight_bits.items()},
            seed=self.settings().analyze.options.seed,
            checkpoint=self.path / f"checkpoint-{key}.pt",
            checkpoint_every=50,
            progress=self._progress,
        )
        if distributed.rank() != 0:
            return None, result.losses
        evaluation = setup.task.evaluate(quantized, setup.evaluation, self._progress)
        if file == "finetuned.safetensors":
            state = {key: tensor.contiguous().clone() for key, tensor in quantized.state_dict().items()}
            with replace_file(self.path / file) as temporary:
                save_file(state, temporary)
            size = plan.size_bytes
        else:
            size = pack(quantized, self.path / file)
        return Measured(name, evaluation.metric, evaluation.loss, size, plan.average_bits), result.losses

    def pack(self) -> None:
        """Write the product, `model.safetensors`, and evaluate it as it is loaded again."""
        if self.done("pack"):
            return
        from safetensors.torch import load_file

        from tracequant.export.packed import pack

        self._need("quantize")
        plan, fine_tuned = self.plan(), self.done("finetune")
        if self.settings().finetune is not None and not fine_tuned:
            raise RunError(
                f"fine-tuning of {self.path} was asked for and is not finished: go on with `tracequant finetune`, or"
                f" take the packed model from before it, {self.path / 'quantized.safetensors'}"
            )
        start = self._begin("pack")
        quantized = self._quantized(plan)
        if fine_tuned:
            quantized.load_state_dict(load_file(self.path / "finetuned.safetensors"))
        size = pack(quantized, self.path / "model.safetensors")
        measured = self._evaluate(self.path / "model.safetensors")
        name = "packed" if fine_tuned else "packed, not fine-tuned"
        row = Measured(name, measured.metric, measured.loss, size, plan.average_bits)
        PackResult(plan.size_bytes, size, fine_tuned, row).save(self.path / "pack.json")
        self._finish("pack", time.perf_counter() - start)

    def evaluate_file(self, file: str | Path | None = None) -> Measured:
        """Metric and loss of a packed file (the run's product by default) on the evaluation data."""
        self.settings()
        path = Path(file) if file else self.path / "model.safetensors"
        if file and not path.is_file():
            raise ArtifactError(f"{path} does not exist")
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist; `tracequant pack {self.path}` makes it")
        if file is None and (self.path / "pack.json").is_file() and not self.done("pack"):
            self._say(f"{path} is older than the run's present plan or settings; `tracequant pack` makes it anew")
        return self._evaluate(path)

    def _evaluate(self, path: Path) -> Measured:
        from tracequant.export.packed import load

        setup = self.setup()
        evaluation = setup.task.evaluate(load(path, setup.model), setup.evaluation, self._progress)
        return Measured(path.name, evaluation.metric, evaluation.loss, path.stat().st_size, math.nan)

    def export(
        self, profile: Profile = "qdq", dynamic_batch: bool = True, dynamic_sizes: bool | None = None
    ) -> OnnxFile:
        """Write the packed model to `model.onnx`; whether sizes stay open is the task's choice where it is None."""
        self._need("pack")
        from tracequant.export.onnx import export_onnx
        from tracequant.export.packed import load

        setup = self.setup()
        part = setup.task.exported(load(self.path / "model.safetensors", setup.model))
        args, kwargs = part.arguments(next(iter(setup.calibration)))
        if args and kwargs:
            raise ModelError(
                "the task calls the model with positional and keyword arguments, ONNX export needs one kind; pass all"
                " by keyword in the task's `outputs`"
            )
        (self.path / "verify.json").unlink(missing_ok=True)  # of an earlier export
        sizes = part.dynamic_sizes if dynamic_sizes is None else dynamic_sizes
        return export_onnx(part.module, self.path / "model.onnx", kwargs or args, profile, dynamic_batch, sizes)

    def verify(self) -> Verification:
        """Compare `model.onnx` with the packed model on the evaluation data."""
        self._need("pack")
        from tracequant.export.packed import load
        from tracequant.verification import verify

        path = self.path / "model.onnx"
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist; `tracequant export {self.path}` makes it")
        setup = self.setup()
        quantized = load(self.path / "model.safetensors", setup.model).cpu()
        promised = self.pack_result().promised_bytes
        result = verify(path, quantized, setup.model, setup.evaluation, setup.task, promised)
        result.save(self.path / "verify.json")
        return result

    def measure_latency(self, out: Path, threads: int = 1, repeats: int = 30) -> Latency:
        """Measure every layer at every choice of bits that the analysis offers, and write the table to `out` (CSV).

        Measurements are kept in `latency.json`, with which an interrupted call goes on.
        """
        self._need("analyze")
        from tracequant.latency import measure_latency
        from tracequant.tables import write_latency

        setup, offered = self.setup(), self.settings().analyze
        table = measure_latency(
            setup.model,
            setup.calibration,
            setup.task,
            self.sensitivity_by(None).points,
            offered.weight_bits,
            offered.activation_bits,
            threads,
            repeats,
            self.path / "latency.json",
            self._progress,
        )
        write_latency(table, out)
        return table

    def report(self) -> Path:
        """Write the report from what is there, figures beside it."""
        self._need("plan")
        start = self._begin("report")
        from tracequant.report.html import write_report

        path = write_report(self)
        self._finish("report", time.perf_counter() - start)
        return path

    def paper_figures(
        self, numbers: Sequence[int] | None = None, out: Path | None = None, options: FigureOptions | None = None
    ) -> PaperFigures:
        """The paper's figures of this run, into RUN/paper unless `out` says where (`draw_figures`)."""
        self._need("analyze")
        from tracequant.report.paper import FigureOptions, draw_figures

        options = options or FigureOptions()
        layers = list(self.curvature().points.by_name)
        # The task names all blocks of its model, the analysis may have left some out.
        blocks = [
            pattern
            for pattern in _with_blocks(options.blocks, self.setup)
            if pattern in options.blocks or fnmatch.filter(layers, pattern)
        ]
        return draw_figures(self, numbers, out, replace(options, blocks=tuple(blocks)))

    def result_rows(self) -> list[Measured]:
        """All rows of the result table that exist so far."""
        rows: list[Measured] = []
        if self.done("quantize"):
            result = self.quantize_result()
            rows += [result.float_model, result.uniform, result.mixed]
        if self.done("finetune"):
            outcome = self.finetune_outcome()
            rows += [row for row in (outcome.uniform, outcome.mixed) if row is not None]
        return rows

    def _nearest_uniform(self, sensitivity: Sensitivity, plan: BitPlan) -> tuple[int, BitPlan]:
        offered = sorted({b for options in sensitivity.weight_omega.values() for b in options})
        plans = {b: uniform_plan(sensitivity, b, activation_bits=plan.activation_bits) for b in offered}
        best = min(offered, key=lambda b: abs(plans[b].size_bytes - plan.size_bytes))
        return best, plans[best]

    def _quantized(self, plan: BitPlan) -> torch.nn.Module:
        from tracequant.convert import quantize

        setup = self.setup()
        return quantize(setup.model, plan, setup.calibration, setup.task, self._progress)


def _with_blocks(patterns: Sequence[str], setup: Callable[[], TaskSetup]) -> list[str]:
    """The patterns, with the task's own blocks in the place of "blocks"; only for these the task is loaded."""
    if "blocks" not in patterns:
        return list(patterns)
    blocks = setup().blocks
    if not blocks:
        raise TaskError("the task does not say what its model's blocks are: give patterns of layer names instead")
    return [own for pattern in patterns for own in (blocks if pattern == "blocks" else [pattern])]


def _device(name: Any) -> torch.device:
    import torch

    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device {name!r} cannot be used: {error}") from None
