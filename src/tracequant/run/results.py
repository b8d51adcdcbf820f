"""What the stages of a run leave in their JSON files: rows of the result table. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from tracequant.core.files import Saveable


@dataclass(frozen=True)
class ModelRow(Saveable):
    """One row of the result table: a model's metric and loss on the evaluation data, and its bytes on disk."""

    name: str
    metric: float
    loss: float
    size_bytes: int
    average_bits: float


@dataclass(frozen=True)
class QuantizeResult(Saveable):
    """Models before fine-tuning: float32, uniform at the offered width whose file is nearest in size, and mixed.

    `nearest` is the mixed plan rounded to the nearest, where the run compensates.
    """

    metric_name: str
    samples: int
    float_model: ModelRow
    uniform: ModelRow
    uniform_bits: int
    mixed: ModelRow
    nearest: ModelRow | None = None


@dataclass(frozen=True)
class FinetuneOutcome(Saveable):
    """Models after fine-tuning, and the losses of the mixed one; `uniform` where it was asked for."""

    losses: tuple[float, ...]
    seconds: float
    mixed: ModelRow
    uniform: ModelRow | None


@dataclass(frozen=True)
class PackResult(Saveable):
    """The packed file: the bytes that the plan promised and those on disk, and its accuracy after loading it again."""

    promised_bytes: int
    file_bytes: int
    fine_tuned: bool
    evaluation: ModelRow
