"""A run directory: what was asked, which stages are finished, and readers for the files that they leave.

    RUN/settings.json        what was asked
    RUN/batches              analyze, while it runs: what was measured on each batch
    RUN/curvature.json       analyze: traces of all layers and activations
    RUN/sensitivity.json     analyze: Ω by layer and bit width
    RUN/plan.json            plan: the bits
    RUN/stability.json       run or report: how often each layer keeps its bits in resamples of the data
    RUN/quantize.json        quantize: accuracies of the float, uniform and mixed models
    RUN/quantized.safetensors    quantize: the mixed model before fine-tuning, packed (and uniform.safetensors)
    RUN/checkpoint-KEY.pt    finetune, while it runs
    RUN/finetuned.safetensors    finetune: the trained state
    RUN/uniform_finetuned.safetensors    finetune: the uniform model trained in the same way, packed, where asked for
    RUN/finetune.json        finetune: losses and accuracies
    RUN/model.safetensors    pack: the product
    RUN/pack.json            pack: its size and accuracy
    RUN/model.onnx           export: the product as ONNX
    RUN/verify.json          verify: the ONNX file against the packed model
    RUN/latency.csv          latency: milliseconds of every layer by bits (latency.json: as measured)
    RUN/spectrum.json        spectrum: eigenvalues and densities, where asked for
    RUN/perturbation.json    analyze or check: the loss's expansion in the roundings, where a criterion needs it
    RUN/evaluations.json     plan: every plan that was evaluated, where a limit on accuracy was asked for
    RUN/check.json           check: how well each criterion ranks, its measurements in RUN/check
    RUN/landscapes           figures: the loss around single layers
    RUN/hutchinson.json      figures: traces of single layers by each random vector, where the analysis has none to show
    RUN/paper                figures: the paper's figures and what they show
    RUN/report.html          report, with its figures in RUN/figures

`stages.json` holds a key for every finished stage: a hash of the settings that decide its values and of the keys of the
stages before it. A stage whose key is still right is never run again; one whose settings changed is run again, and so
are those after it. Settings that have their default do not enter a key, nor do the device and the number of workers: a
new option or another machine makes no finished stage stale. Nothing here imports torch until a stage needs the model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from tracequant.core.curvature import Curvature, Perturbation, Spectrum
from tracequant.core.errors import ArtifactError, RunError, TaskError
from tracequant.core.evaluations import Check, Evaluations
from tracequant.core.files import FORMAT_VERSION, Saveable, read_json, write_json
from tracequant.core.options import decisive
from tracequant.core.plan import BitPlan, reprice
from tracequant.core.sensitivity import Sensitivity, combine
from tracequant.core.settings import CRITERIA, EXPANSIONS, AnalysisSettings, Criterion, RunSettings
from tracequant.run.results import FinetuneOutcome, ModelRow, PackResult, QuantizeResult

if TYPE_CHECKING:
    from tracequant.model.task import TaskSetup

S = TypeVar("S", bound=Saveable)
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


class RunDirectory:
    """The directory of one run. `say` prints a line about a stage, `progress` draws bars while a stage runs."""

    def __init__(
        self, path: str | Path, say: Callable[[str], None] = lambda text: None, progress: bool = False
    ) -> None:
        self.path = Path(path)
        self.say = say
        self.progress = progress
        self._setup: TaskSetup | None = None

    def be_silent(self) -> None:
        """Say nothing from now on and draw no bars: another process speaks."""
        self.say, self.progress = (lambda text: None), False

    # What was asked

    def exists(self) -> bool:
        """Whether the directory is a run already."""
        return (self.path / "settings.json").is_file()

    def settings(self) -> RunSettings:
        """What this run was asked for; `RunError` if the directory is not a run, or one of another version."""
        if not self.exists():
            raise RunError(
                f"{self.path} is not a run directory (it has no settings.json); make one with"
                f" `tracequant analyze --task ... --out {self.path}`"
            )
        path = self.path / "settings.json"
        document = read_json(path)
        if isinstance(document, dict) and document.get("version") != FORMAT_VERSION:
            raise RunError(
                f"{self.path} was made by another version of tracequant, whose files this version does not read: choose"
                " another --out, or work on it with the version that made it"
            )
        return RunSettings.from_json(document, str(path))

    def ask(self, settings: RunSettings) -> None:
        """Record settings. `RunError` if the directory belongs to another task, data set or weights file."""
        if not self.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise RunError(f"{self.path} is not empty and not a run directory; choose another --out")
        elif self._keys():
            self._check_identity(self.settings().analysis, settings.analysis)
        settings.save(self.path / "settings.json")

    def adopt(self, analysis: AnalysisSettings) -> None:
        """Record what to analyze. If it differs from before the task is loaded; if that fails, nothing changes."""
        before = self.settings() if self.exists() else None
        if before is not None and before.analysis == analysis:
            return
        new_folders = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.ask(replace(before, analysis=analysis) if before is not None else RunSettings(analysis))
        self._setup = None  # that of the settings before
        try:
            self.setup()
        except BaseException:
            if before is not None:
                before.save(self.path / "settings.json")
            else:
                (self.path / "settings.json").unlink()
                with suppress(OSError):  # no longer empty
                    for folder in new_folders:
                        folder.rmdir()
            raise

    def setup(self) -> TaskSetup:
        """Model, task and data, loaded once; `RunError` if the weights are not those that were analysed."""
        if self._setup is None:
            from tracequant.model.device import choose_device
            from tracequant.model.state import fingerprint
            from tracequant.tasks.registry import load_task

            analysis = self.settings().analysis
            setup = load_task(analysis.task, analysis.options)
            if self.done("analyze"):
                analysed = self.sensitivity_by(None).points.fingerprint
                if analysed != fingerprint(setup.model):
                    raise RunError(
                        f"{self.path} was made with other weights of this model (fingerprint {analysed}); choose"
                        " another --out, and see that the task gives the same weights every time it is loaded"
                    )
            self._setup = setup.to(choose_device(setup.device or analysis.device))
        return self._setup

    def blocks(self, patterns: tuple[str, ...]) -> tuple[str, ...]:
        """The patterns, with the task's own blocks in the place of "blocks"; the task is loaded only for these."""
        if "blocks" not in patterns:
            return patterns
        blocks = self.setup().blocks
        if not blocks:
            raise TaskError("the task does not say what its model's blocks are: give patterns of layer names instead")
        return tuple(name for pattern in patterns for name in (blocks if pattern == "blocks" else [pattern]))

    # Which stages are finished

    def done(self, stage: Stage) -> bool:
        """Whether the stage is finished under the present settings, and its files are there."""
        if not all((self.path / name).is_file() for name in ("settings.json", *FILES[stage])):
            return False
        return self._keys().get(stage) == self.key(stage, self.settings())

    def was_quantized(self) -> bool:
        """Whether a plan was quantized since the analysis, be it the present one or an earlier one."""
        return self.done("analyze") and (self.path / "quantize.json").is_file()

    def need(self, stage: Stage) -> None:
        """Raise `RunError` that names the command to run if the stage is not finished."""
        self.settings()
        if not self.done(stage):
            raise RunError(
                f"{self.path} has no finished stage {stage!r} under its present settings; run"
                f" {self._command(stage)} first"
            )

    def _command(self, stage: str) -> str:
        """The command that makes what a stage leaves."""
        arguments = {
            "analyze": f"analyze --task ... --out {self.path}",
            "plan": f"plan {self.path} --max-size-mib X",
            "compare": f"compare {self.path} --max-size-mib X",
        }
        return f"`tracequant {arguments.get(stage, f'{stage} {self.path}')}`"

    def begin(self, stage: Stage) -> float:
        """The time, after marking the stage and those after it as not finished: their files are about to change."""
        later = STAGES[STAGES.index(stage) :]
        keys = self._keys()
        if any(name in keys for name in later):
            write_json(self.path / "stages.json", {name: key for name, key in keys.items() if name not in later})
        return time.perf_counter()

    def finish(self, stage: Stage, start: float) -> None:
        """Mark the stage as finished; `start` is what `begin` returned."""
        write_json(self.path / "stages.json", self._keys() | {stage: self.key(stage, self.settings())})
        self.say(f"{stage}: done in {time.perf_counter() - start:.1f} s")

    def key(self, stage: Stage, settings: RunSettings) -> str:
        """A hash of what decides the values of a stage and of all stages before it."""
        index = STAGES.index(stage)
        before = self.key(STAGES[index - 1], settings) if index else ""
        text = json.dumps([stage, self._asked(stage, settings), before], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _asked(self, stage: Stage, settings: RunSettings) -> object:
        if stage == "analyze":
            return decisive(settings.analysis)
        if stage == "plan":
            return settings.plan and decisive(settings.plan)
        if stage == "quantize":
            plan = self.path / "plan.json"
            # Its content, since it may have been edited.
            return hashlib.sha256(plan.read_bytes()).hexdigest() if plan.is_file() else None
        if stage == "finetune":
            return settings.finetune and decisive(settings.finetune)
        if stage == "pack":
            # A file that was packed before fine-tuning was finished is not the one to pack after it.
            return self._keys().get("finetune") == self.key("finetune", settings)
        return None

    def _keys(self) -> dict[str, str]:
        path = self.path / "stages.json"
        return dict(read_json(path)) if path.is_file() else {}

    def _check_identity(self, before: AnalysisSettings, now: AnalysisSettings) -> None:
        for name in ("task", "data_dir", "weights", "model"):
            old = before.task if name == "task" else getattr(before.options, name)
            new = now.task if name == "task" else getattr(now.options, name)
            if old != new:
                raise RunError(
                    f"{self.path} belongs to another model: its {name} is {old or 'the default'}, you asked for"
                    f" {new or 'the default'}; choose another --out, or delete the directory"
                )

    # What the stages have left

    def _load(self, kind: type[S], name: str, stage: str) -> S:
        """The value in a file that a stage or a command leaves; errors say how to make the file anew."""
        path = self.path / name
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist; {self._command(stage)} makes it")
        return kind.from_json(read_json(path, f"delete it, and {self._command(stage)} makes it anew"), str(path))

    def curvature(self) -> Curvature:
        """Result of analyze."""
        return self._load(Curvature, "curvature.json", "analyze")

    def sensitivity(self) -> Sensitivity:
        """Sensitivities by the criterion that the run's plan was asked for by, or else the analysis's."""
        plan = self.settings().plan
        return self.sensitivity_by(plan.criterion if plan is not None else None)

    def sensitivity_by(self, criterion: Criterion | None) -> Sensitivity:
        """Sensitivities by any criterion that was measured, without the model; None is the analysis's own.

        Raises `RunError` that says what to run where something was not measured.
        """
        measured = self._load(Sensitivity, "sensitivity.json", "analyze")
        if criterion is None or criterion == measured.criterion:
            return measured
        perturbation = None
        if criterion in EXPANSIONS:
            if not (self.path / "perturbation.json").is_file():
                raise RunError(
                    f"criterion {criterion!r} needs the loss's expansion in the roundings, which {self.path} does not"
                    f" have; `tracequant check {self.path}` measures it, and so does `tracequant analyze` with"
                    f" --criterion {criterion}"
                )
            perturbation = self._load(Perturbation, "perturbation.json", "check")
        curvature = self.curvature()
        if criterion.startswith("eigenvalue") and curvature.top_eigenvalues is None:
            raise RunError(f"criterion {criterion!r} needs eigenvalues; analyze with --eigenvalues")
        return combine(
            curvature,
            measured.weight_errors,
            measured.activation_errors,
            measured.weight_grid,
            criterion=criterion,
            perturbation=perturbation,
        )

    def criteria(self) -> list[Criterion]:
        """The criteria whose ingredients were measured."""
        has_eigenvalues = self.curvature().top_eigenvalues is not None
        has_perturbation = (self.path / "perturbation.json").is_file()
        return [
            criterion
            for criterion in CRITERIA
            if (has_eigenvalues or not criterion.startswith("eigenvalue"))
            and (has_perturbation or criterion not in EXPANSIONS)
        ]

    def missing_criteria(self) -> list[str]:
        """The criteria that `criteria` leaves out, with the command that measures what they need."""
        missing = [criterion for criterion in CRITERIA if criterion not in self.criteria()]
        expansions = [criterion for criterion in missing if criterion in EXPANSIONS]
        others = [criterion for criterion in missing if criterion not in EXPANSIONS]
        ways = ((expansions, f"check {self.path}"), (others, f"analyze ... --eigenvalues --out {self.path}"))
        return [
            f"{' and '.join(names)}, for which nothing is measured yet; `tracequant {command}` measures it"
            for names, command in ways
            if names
        ]

    def plan(self) -> BitPlan:
        """Result of plan; bits that were edited by hand count, with the size and Ω that they really have."""
        plan = self._load(BitPlan, "plan.json", "plan")
        repriced = reprice(self.sensitivity(), plan)
        if repriced == plan:
            return plan
        return replace(repriced, solver="edited by hand", bound=None, prices={})

    def evaluations(self) -> Evaluations | None:
        """Every plan that was evaluated, to solve by accuracy or to compare criteria; None if there is none."""
        if not (self.path / "evaluations.json").is_file():
            return None
        return self._load(Evaluations, "evaluations.json", "compare")

    def check_result(self) -> Check | None:
        """Result of check, None where there is none of this analysis."""
        if not (self.path / "check.json").is_file():
            return None
        return self._load(Check, "check.json", "check")

    def spectrum(self) -> Spectrum | None:
        """Result of spectrum, None where there is none of this analysis."""
        if not (self.path / "spectrum.json").is_file():
            return None
        return self._load(Spectrum, "spectrum.json", "spectrum")

    def quantize_result(self) -> QuantizeResult:
        """Result of quantize."""
        return self._load(QuantizeResult, "quantize.json", "quantize")

    def finetune_outcome(self) -> FinetuneOutcome:
        """Result of finetune."""
        return self._load(FinetuneOutcome, "finetune.json", "finetune")

    def pack_result(self) -> PackResult:
        """Result of pack."""
        return self._load(PackResult, "pack.json", "pack")

    def packed_file(self, file: str | Path | None = None) -> Path:
        """A packed file that is there, the run's product by default; `ArtifactError` if it is not."""
        path = Path(file) if file else self.path / "model.safetensors"
        if not path.is_file():
            advice = "" if file else f"; `tracequant pack {self.path}` makes it"
            raise ArtifactError(f"{path} does not exist{advice}")
        return path

    def result_rows(self) -> list[ModelRow]:
        """All rows of the result table that exist so far."""
        rows: list[ModelRow] = []
        if self.done("quantize"):
            result = self.quantize_result()
            rows += [result.float_model, result.uniform]
            rows += [row for row in (result.nearest, result.mixed) if row is not None]
        if self.done("finetune"):
            outcome = self.finetune_outcome()
            rows += [row for row in (outcome.uniform, outcome.mixed) if row is not None]
        return rows
