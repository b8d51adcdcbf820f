"""Choices that several stages must agree on. Plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from tracequant.core.files import Saveable
from tracequant.core.options import option, validate

# What stands for the loss that a layer's rounding costs; docs/method.md has the formulas. "trace" is HAWQ-V2's Eq. 10.
Metric = Literal[
    "trace", "l2", "eigenvalue", "eigenvalue_alone", "quadratic", "first+quadratic",
]  # fmt: skip
METRICS: tuple[Metric, ...] = get_args(Metric)
# Those that rest on the roundings themselves (`tracequant.Perturbation`).
EXPANSIONS: tuple[Metric, ...] = ("quadratic", "first+quadratic")


@dataclass(frozen=True)
class WeightGrid:
    """How weight grids are made: the same in sensitivity, conversion and the packed file.

    `range`: "mse" (least squared error, the default), "percentile" or "minmax" (the paper's Appendix A with the whole
    range).
    """

    per_channel: bool = True
    symmetric: bool = True
    range: Literal["minmax", "percentile", "mse"] = "mse"


@dataclass(frozen=True)
class TaskOptions:
    """What the command line passes on to a task; None where the user said nothing and the task's default holds.

    `samples` is the number of calibration inputs, `batch_size` that of calibration and fine-tuning batches, `workers`
    that of processes that load data, `image_size` that of pixels of a side: of what is cut from the centre of an image
    that is larger by 1 / `crop_share`, or, in detection, of the shorter side.
    """

    data_dir: str | None = None
    weights: str | None = None
    model: str | None = None
    samples: int | None = None
    batch_size: int | None = None
    seed: int = 0
    workers: int | None = None
    image_size: int | None = None
    crop_share: float | None = None


@dataclass(frozen=True)
class AnalyzeSettings:
    """What to measure: the task, the estimator, the layers, the bit widths on offer.

    No more batches are taken once all traces are known to `relative_error`, or once every layer keeps its bits in a
    share `stable` of the resamples.
    """

    task: str
    options: TaskOptions
    device: str = "auto"
    method: str = "auto"
    draws: int | None = None
    probes: Literal["per_layer", "shared"] = "per_layer"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    weight_bits: tuple[int, ...] = (2, 3, 4, 8)
    activation_bits: tuple[int, ...] = (4, 8)
    metric: Metric = "trace"
    weight_grid: WeightGrid = WeightGrid()
    eigenvalues: bool = True
    relative_error: float | None = None
    stable: float | None = None
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"


# Layer → weight bits → bits of the layer's input (32 for float) → milliseconds.
Latency = dict[str, dict[int, dict[int, float]]]


@dataclass(frozen=True)
class PlanSettings:
    """What a plan may cost and which bits it may use: the keywords of `tracequant.solve`, which explains them.

    `metric` is what the plan makes small, None for the one that the analysis was asked for. `max_accuracy_drop` (points
    of the task's metric) and `max_loss_increase` ask for the smallest plan that keeps to them by evaluation, in place
    of a limit on what it costs.
    """

    max_size_mb: float | None = None
    compression: float | None = None
    average_bits: float | None = None
    average_activation_bits: float | None = None
    activation_compression: float | None = None
    max_activation_mb: float | None = None
    max_bops_g: float | None = None
    max_latency_ms: float | None = None
    latency: Latency | None = None
    fixed_bits: dict[str, int] | None = None
    min_bits: dict[str, int] | None = None
    allowed_bits: dict[str, tuple[int, ...]] | None = None
    allowed_activation_bits: dict[str, tuple[int, ...]] | None = None
    space: Literal["full", "monotone"] = "full"
    method: Literal["exact", "pareto"] = "exact"
    metric: Metric | None = None
    max_accuracy_drop: float | None = None
    max_loss_increase: float | None = None

    @property
    def by_accuracy(self) -> bool:
        """Whether the limit is one on what the plan loses."""
        return self.max_accuracy_drop is not None or self.max_loss_increase is not None

    def keywords(self) -> dict[str, Any]:
        """The limits and rules as `tracequant.solve` takes them."""
        own = ("metric", "max_accuracy_drop", "max_loss_increase")
        return {name: value for name, value in asdict(self).items() if name not in own}


@dataclass(frozen=True)
class FinetuneSettings:
    """The recipe of fine-tuning, which `tracequant.finetune` explains."""

    steps: int = option(400, "number of training steps, each on one batch", minimum=0)
    learning_rate: float = option(0.01, "learning rate of the first step; it falls along a cosine to zero", minimum=0)
    optimizer: Literal["sgd", "adamw"] = option("sgd", "sgd has Nesterov momentum 0.9")
    weight_decay: float = option(1e-4, "decay of weights; scales, biases and norms have none", minimum=0)
    scales: Literal["lsq", "fixed"] = option(
        "lsq", "lsq learns the scales of the grids, fixed keeps the calibrated ones"
    )
    distillation: float = option(
        0.5, "share of the loss that is the distance to the teacher's outputs; 0 for none", minimum=0, maximum=1
    )
    feature_distillation: float = option(
        0.0, "weight of the distance to the teacher at the input of every quantized layer", minimum=0
    )
    batchnorm: Literal["train", "freeze", "reestimate"] = option(
        "train", "BatchNorm's statistics: as in training, kept, or measured anew at the end"
    )
    ema: float = option(0.0, "decay of a moving average of weights and scales; 0 for none", minimum=0, below=1)
    compile: bool = option(False, "train through torch.compile")
    channels_last: bool = option(False, "train with images and weights laid out channels last")
    uniform_too: bool = option(
        False, "in a run, fine-tune the uniform plan of the nearest size as well: a fair comparison in twice the time"
    )

    def __post_init__(self) -> None:
        validate(self)

    @property
    def has_teacher(self) -> bool:
        """Whether the float model takes part."""
        return self.distillation > 0 or self.feature_distillation > 0


@dataclass(frozen=True)
class RunSettings(Saveable):
    """Everything that a run directory was asked for so far."""

    analyze: AnalyzeSettings
    plan: PlanSettings | None = None
    finetune: FinetuneSettings | None = None
