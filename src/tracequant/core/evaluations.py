"""What was measured of plans and single layers: evaluations and the self-check. Plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracequant.core.files import Saveable
from tracequant.core.plan import BitPlan
from tracequant.core.weight_grid import WeightGrid


@dataclass(frozen=True)
class EvaluatedPlan:
    """A plan's bits with the metric and the loss of the calibrated model, which was not fine-tuned.

    `weight_grid` is None where the file of an earlier version does not say it.
    """

    weight_bits: dict[str, int]
    activation_bits: dict[str, int]
    size_bytes: int
    metric: float
    loss: float
    weight_grid: WeightGrid | None = None


@dataclass(frozen=True)
class Evaluations(Saveable):
    """Everything that was evaluated of one model with one set of data, which `context` identifies.

    `float_metric` and `float_loss` are those of the model as it was given.
    """

    context: str
    metric_name: str
    samples: int
    float_metric: float
    float_loss: float
    plans: tuple[EvaluatedPlan, ...]


@dataclass(frozen=True)
class AccuracySearch(Saveable):
    """The smallest plan found that keeps to a loss of accuracy, and all plans that were looked at, in order.

    Accuracy is that of the calibrated model on the evaluation data, before any fine-tuning. The measured curve of
    accuracy over size goes up and down: no plan larger than `plan` was needed, and the neighbours below it fail, but a
    smaller one that nobody looked at may pass.
    """

    plan: BitPlan
    found: EvaluatedPlan
    steps: tuple[EvaluatedPlan, ...]
    metric_name: str
    float_metric: float
    float_loss: float
    samples: int

    def __str__(self) -> str:
        return (
            f"{self.plan.size_mib:.4g} MiB with {with_unit(self.metric_name, self.found.metric)} (float"
            f" {self.float_metric:.2f}) and loss {self.found.loss:.4f} (float {self.float_loss:.4f}), after"
            f" {len(self.steps)} evaluations"
        )


@dataclass(frozen=True)
class LayerCheck:
    """One layer rounded alone: the measured change of the loss, and what each criterion says of it."""

    layer: str
    num_bits: int
    loss_change: float
    scores: dict[str, float]


@dataclass(frozen=True)
class PlanCheck:
    """A random plan: the bits it was drawn from, the measured change of the loss, and what each form says of it."""

    offered: tuple[int, ...]
    weight_bits: dict[str, int]
    loss_change: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Check(Saveable):
    """How well each criterion ranks the measured changes of the loss, weights rounded and activations in float.

    `correlations[criterion][group]` is Spearman's, NaN where there is nothing to rank. Groups are "2 bits", ..., "all
    bits" for layers rounded one at a time, and "plans of 2, 3, 4, 8 bits" for random whole plans. Two forms are for
    plans only and use the check's own measurements: "measured" is the sum of the layers' measured changes of the loss,
    "response" the loss at the float outputs plus the sum of the layers' measured changes of the outputs.

    `trusted` is the criterion, of those that plans can be solved for, of highest correlation over plans (all groups, on
    average), or over layers where there are no plans.
    """

    fingerprint: str
    samples: int
    float_loss: float
    layers: tuple[LayerCheck, ...]
    plans: tuple[PlanCheck, ...]
    correlations: dict[str, dict[str, float]]
    trusted: str

    @property
    def groups(self) -> list[str]:
        """The names of all groups, in order."""
        return list(dict.fromkeys(group for by_group in self.correlations.values() for group in by_group))


def with_unit(metric_name: str, value: float) -> str:
    """A metric with its name, the unit at the end.

    >>> with_unit("accuracy %", 100.0), with_unit("perplexity", 5.432)
    ('accuracy 100.00 %', 'perplexity 5.43')
    """
    name = metric_name.removesuffix(" %")
    return f"{name} {value:.2f}{' %' if name != metric_name else ''}"


def plan_group(offered: Sequence[int]) -> str:
    """The name of a group of random plans."""
    return f"plans of {', '.join(map(str, offered))} bits"


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their rank; NaN for less than two values or without spread.

    >>> round(spearman([1, 2, 3, 4], [1, 4, 9, 8]), 3)
    0.8
    """
    if len(a) < 2:
        return math.nan
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / size if size else math.nan


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse.reshape(-1)]
    return middle
