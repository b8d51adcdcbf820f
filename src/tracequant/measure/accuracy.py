"""The smallest plan that loses no more accuracy than it may, by evaluating plans of the exact frontier."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tracequant.allocation.activations import decided_activations
from tracequant.allocation.frontier import frontier
from tracequant.allocation.request import check_criterion, check_request
from tracequant.core.errors import ArtifactError, BudgetError, DataError
from tracequant.core.evaluations import AccuracySearch, EvaluatedPlan, Evaluations
from tracequant.core.options import resolve, takes
from tracequant.core.plan import BitPlan
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import measuring
from tracequant.model.digest import digest
from tracequant.model.state import fingerprint
from tracequant.model.task import Evaluation, Task
from tracequant.quantization.convert import quantize
from tracequant.quantization.rounding import RoundedWeights, round_weights

# The bisection ends when sizes differ by less than this share.
RESOLUTION = 0.002
# Then plans this much smaller, one after the other, are tried as well: accuracy goes up and down along the frontier.
NEIGHBOURS = (0.005, 0.01, 0.02, 0.04)


class Evaluator:
    """Evaluates plans of one model after calibration, each once: results are kept, in a file too where one is given."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Batches,
        task: Task,
        *,
        evaluation: Batches,
        rounded: RoundedWeights | None = None,
        cache: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        self._model, self._task, self._rounded = model, task, rounded
        self._calibration, self._evaluation = reusable(calibration), reusable(evaluation)
        self._path = None if cache is None else Path(cache)
        self._progress = progress
        # The first batches stand for all: a loader that shuffles gives others, and nothing is taken from the file. The
        # task's loss and metric cannot be compared, but their values on such a batch can.
        first = [list(itertools.islice(batches, 1)) for batches in (self._calibration, self._evaluation)]
        values = []
        with contextlib.suppress(DataError):  # one batch may have no metric (mAP of images without boxes)
            value = self._evaluated(model, first[1])
            values = [f"{value.metric:.5g}", f"{value.loss:.5g}"]
        # A task may know its metric only once it has seen the model.
        parts = [fingerprint(model), task.metric_name, *values]
        parts += [digest(batch) for batches in first for batch in batches]
        for batches in (self._calibration, self._evaluation):
            with contextlib.suppress(TypeError):
                parts.append(str(len(batches)))  # type: ignore[arg-type]
        context = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
        self.results = self._load(context)

    def of(self, plan: BitPlan) -> EvaluatedPlan:
        """Metric and loss of the model quantized by `plan`, measured only where that was not done before."""
        asked = (plan.weight_bits, plan.activation_bits, plan.weight_grid)
        for known in self.results.plans:
            if (known.weight_bits, known.activation_bits, known.weight_grid) == asked:
                return known
        quantized = quantize(
            self._model, self._calibration, self._task, plan, rounded=self._rounded, progress=self._progress
        )
        result = self._evaluated(quantized, self._evaluation)
        found = EvaluatedPlan(
            plan.weight_bits,
            plan.activation_bits,
            size_bytes=plan.size_bytes,
            metric=result.metric,
            loss=result.loss,
            weight_grid=plan.weight_grid,
        )
        self.results = replace(self.results, plans=(*self.results.plans, found))
        self._save()
        return found

    def _evaluated(self, model: nn.Module, batches: Batches) -> Evaluation:
        with measuring(model):  # also where the task has an `evaluate` of its own
            return self._task.evaluate(model, batches, self._progress)

    def _load(self, context: str) -> Evaluations:
        if self._path is not None:
            with contextlib.suppress(ArtifactError):  # none yet, or damaged
                saved = Evaluations.load(self._path)
                if saved.context == context:
                    return saved
        plain = self._evaluated(self._model, self._evaluation)
        self.results = Evaluations(context, plain.metric_name, plain.samples, plain.metric, plain.loss, ())
        self._save()
        return self.results

    def _save(self) -> None:
        if self._path is not None:
            self.results.save(self._path)


@takes(PlanSettings)
def solve_by_accuracy(
    model: nn.Module,
    batches: Batches,
    task: Task,
    sensitivity: Sensitivity,
    settings: PlanSettings | None = None,
    *,
    evaluation: Batches,
    rounded: RoundedWeights | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
    **fields: object,
) -> AccuracySearch:
    """The smallest plan of the exact frontier that keeps to `max_accuracy_drop` and `max_loss_increase`.

    Plans are quantized, calibrated on `batches` and evaluated on `evaluation`, which should be held out from both
    training and calibration; nothing is fine-tuned. `max_accuracy_drop` is in points of the task's metric, of which
    more must be better; `max_loss_increase` is in units of the loss. With both, both hold. The other fields of
    `PlanSettings` that limit no cost of the weights are rules as in `solve`. `rounded` are the weights of
    `round_weights` at all bits of `sensitivity`, where they are known already. `cache` is a file of evaluations. It is
    read if it is of the same model and data, and written after each evaluation: an interrupted search resumes where it
    stopped.

    A bisection over size, to 0.2 % of it, assumes that accuracy falls with size. This does not always hold: plans up to
    4 % smaller than the one found are evaluated too, and the search continues from each that passes.

    Raises `BudgetError` without any of the two limits, for limits on size, BOPs or latency, and where even the largest
    plan loses more; `SettingsError` for options that do not exist or are out of range.
    """
    request = resolve(PlanSettings, settings, fields)
    if not request.by_accuracy:
        raise BudgetError("give max_accuracy_drop or max_loss_increase")
    check_criterion(request, sensitivity)
    check_request(request)
    max_drop, max_increase = request.max_accuracy_drop, request.max_loss_increase
    front = frontier(
        sensitivity,
        space=request.space,
        activation_bits=decided_activations(sensitivity, request),
        fixed_bits=request.fixed_bits,
        min_bits=request.min_bits,
        allowed_bits=request.allowed_bits,
    )
    batches, grid = reusable(batches), sensitivity.weight_grid
    bits = {name: tuple(options) for name, options in sensitivity.weight_omega.items()}
    if grid.rounding != "nearest" and (
        rounded is None or not rounded.covers(sensitivity.points.fingerprint, bits, grid)
    ):
        # Once for all plans.
        rounded = round_weights(model, batches, task, sensitivity.points, bits, weight_grid=grid, progress=progress)
    evaluator = Evaluator(model, batches, task, evaluation=evaluation, rounded=rounded, cache=cache, progress=progress)
    base = evaluator.results
    steps: dict[int, EvaluatedPlan] = {}

    def passes(index: int) -> bool:
        if index not in steps:
            steps[index] = evaluator.of(front[index])
        found = steps[index]
        return (max_drop is None or found.metric >= base.float_metric - max_drop) and (
            max_increase is None or found.loss <= base.float_loss + max_increase
        )

    last = len(front) - 1
    if not passes(last):
        found = steps[last]
        raise BudgetError(
            f"even the largest plan, {front[last].size_mib:.4g} MiB, changes {base.metric_name} from"
            f" {base.float_metric:.4g} to {found.metric:.4g} and the loss from {base.float_loss:.4g} to"
            f" {found.loss:.4g}; asked for was {describe(request)}; allow more, or offer more bits"
            " (weight_bits, activation_bits)"
        )
    best = _smallest(front.size_bytes, passes)
    plan = replace(
        front[best],
        solver=f"{front[best].solver}, by evaluation",
        budget=f"{describe(request)} ({base.samples:,} samples)",
    )
    return AccuracySearch(
        plan=plan,
        found=steps[best],
        steps=tuple(steps.values()),
        metric_name=base.metric_name,
        float_metric=base.float_metric,
        float_loss=base.float_loss,
        samples=base.samples,
    )


def describe(request: PlanSettings) -> str:
    """The limits in words."""
    asked = []
    if request.max_accuracy_drop is not None:
        asked.append(f"at most {request.max_accuracy_drop:g} points below the float model")
    if request.max_loss_increase is not None:
        asked.append(f"a loss at most {request.max_loss_increase:g} above the float model's")
    return ", ".join(asked)


def _smallest(sizes: np.ndarray[Any, np.dtype[np.int64]], passes: Callable[[int], bool]) -> int:
    """The smallest index found that passes, given that the last one does."""
    if passes(0):
        return 0
    fails, best = 0, len(sizes) - 1
    while best - fails > 1 and sizes[best] - sizes[fails] > RESOLUTION * sizes[best]:
        middle = int(np.searchsorted(sizes, (sizes[fails] + sizes[best]) / 2))
        middle = min(max(middle, fails + 1), best - 1)
        if passes(middle):
            best = middle
        else:
            fails = middle
    while True:
        tries = [int(np.searchsorted(sizes, sizes[best] * (1 - share), side="right")) - 1 for share in NEIGHBOURS]
        smaller = next((index for index in tries if 0 <= index < best and passes(index)), None)
        if smaller is None:
            return best
        best = smaller
