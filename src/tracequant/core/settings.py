"""Every option of tracequant, declared once: its name, type, default, range and help.

A Python function takes one of these objects, or its fields by keyword; the command line makes its options from the
fields; a run directory stores the objects; the table in docs/options.md is printed from them. Plain data, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tracequant.core.files import Saveable
from tracequant.core.options import ascending, option, validate
from tracequant.core.weight_grid import QUANTIZATION, WeightGrid

# What stands for the loss that a layer's rounding costs; docs/method.md has the formulas. "trace" is HAWQ-V2's Eq. 10.
Criterion = Literal["trace", "l2", "eigenvalue", "eigenvalue_alone", "quadratic", "first+quadratic"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
# Criteria that need the rounding itself to be measured (`tracequant.Perturbation`).
EXPANSIONS: tuple[Criterion, ...] = ("quadratic", "first+quadratic")

# Layer → weight bits → bits of the layer's input (32 for float) → milliseconds.
Latency = dict[str, dict[int, dict[int, float]]]

# The panels in which `--help` groups the options.
MODEL, BUDGET, RULES, ANALYSIS = "Model and data", "Budget", "Rules", "Analysis"
TRAINING = "Training"


@dataclass(frozen=True)
class TaskOptions:
    """What the command line hands to a task; None where the user said nothing and the task's own default holds."""

    model: str | None = option(
        None, "which of the task's models, such as resnet20 or torchvision:resnet50", metavar="NAME", panel=MODEL
    )
    weights: str | None = option(
        None,
        "trained weights of the model (safetensors, .pth), or the name of a published set",
        metavar="FILE",
        panel=MODEL,
    )
    data_dir: str | None = option(None, "folder of the task's data set", metavar="DIR", panel=MODEL)
    samples: int | None = option(
        None, "calibration inputs, for curvature and ranges [512; detection 128]", minimum=1, panel=MODEL
    )
    batch_size: int | None = option(None, "inputs in a batch, for analysis and fine-tuning", minimum=1, panel=MODEL)
    image_size: int | None = option(
        None,
        "pixels of a side, where the task scales images [that of the weights]; in detection, of the shorter side",
        minimum=1,
        panel=MODEL,
        expert=True,
    )
    crop_share: float | None = option(
        None,
        "share of a side that the crop from the centre keeps [that of the weights]",
        minimum=0.01,
        maximum=1,
        panel=MODEL,
        expert=True,
    )
    seed: int = option(0, "seed of random vectors and of fine-tuning; the same seed gives the same plan", panel=MODEL)
    workers: int | None = option(
        None, "processes that load images, where the task has some [4]", minimum=0, panel=MODEL, decisive=False
    )

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class DiscoverSettings:
    """Which layers are quantized, and which of them share one bit width (`tracequant.discover`)."""

    include: tuple[str, ...] = option(
        ("*",), "quantize only layers whose name matches this pattern; may be repeated", metavar="PATTERN", panel=RULES
    )
    exclude: tuple[str, ...] = option(
        (), "keep layers whose name matches this pattern in float; may be repeated", metavar="PATTERN", panel=RULES
    )
    ties: tuple[str, ...] = option(
        (),
        "layers that match this pattern share one bit width; 'blocks': the blocks that the task names; may be repeated",
        metavar="PATTERN",
        panel=RULES,
    )

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class CurvatureSettings:
    """How traces are estimated (`tracequant.estimate_curvature`).

    `num_probes` random vectors are drawn for each sample (gauss_newton, default 2) or for each batch (hutchinson,
    default 16). No more batches are taken once every trace is known to `target_sampling_error` (gauss_newton); no more
    vectors are drawn once every trace is known to `target_standard_error` (hutchinson). Both are shares of the trace.
    """

    estimator: Literal["auto", "gauss_newton", "hutchinson"] = option(
        "auto",
        "auto is gauss_newton, and says whether its traces equal the Hessian's; hutchinson takes far longer",
        panel=ANALYSIS,
    )
    num_probes: int | Literal["exact"] | None = option(
        None,
        "random vectors for each sample (gauss_newton) [2] or each batch (hutchinson) [16]; 'exact' sums over all"
        " outputs instead (gauss_newton)",
        minimum=1,
        metavar="N",
        panel=ANALYSIS,
    )
    probe_scope: Literal["per_layer", "shared"] = option(
        "per_layer",
        "hutchinson: one random vector for each layer, or one for all layers, which is faster and far noisier",
        panel=ANALYSIS,
        expert=True,
    )
    distribution: Literal["rademacher", "gaussian"] = option(
        "rademacher", "hutchinson: distribution of the random vectors", panel=ANALYSIS, expert=True
    )
    target_sampling_error: float | None = option(
        None,
        "gauss_newton: take no more samples once every trace is known to this share of it",
        above=0,
        panel=ANALYSIS,
        expert=True,
    )
    target_standard_error: float | None = option(
        None,
        "hutchinson: draw no more vectors once every trace is known to this share of it",
        above=0,
        panel=ANALYSIS,
        expert=True,
    )
    precision: Literal["float32", "tf32", "bfloat16"] = option(
        "float32",
        "arithmetic of the analysis; tf32 (GPU) and bfloat16 are faster and less exact",
        panel=ANALYSIS,
        expert=True,
    )

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class SensitivitySettings:
    """The bit widths on offer and what stands for the loss that they cost (`tracequant.measure_sensitivity`)."""

    weight_bits: tuple[int, ...] = option(
        (2, 3, 4, 5, 6, 8), "weight bit widths on offer", minimum=1, maximum=8, metavar="LIST", panel=QUANTIZATION
    )
    activation_bits: tuple[int, ...] = option(
        (4, 8),
        "activation bit widths on offer; 'none' keeps activations in float",
        minimum=1,
        maximum=8,
        metavar="LIST",
        panel=QUANTIZATION,
    )
    criterion: Literal["auto", Criterion] = option(
        "auto",
        "what stands for the loss that rounding a layer costs; auto is quadratic where rounding is compensated, and"
        " trace (HAWQ-V2's Eq. 10) with --rounding nearest or --estimator hutchinson",
        panel=ANALYSIS,
    )
    weight_grid: WeightGrid = WeightGrid()

    def __post_init__(self) -> None:
        validate(self)
        ascending(self, "weight_bits", "activation_bits", required=("weight_bits",))

    def chosen_criterion(self, estimator: str) -> Criterion:
        """The criterion, chosen by the rounding and the estimator of the curvature where it is "auto".

        The expansions are of Gauss-Newton's kind: networks that need Hutchinson's estimator have none.
        """
        if self.criterion != "auto":
            return self.criterion
        return "trace" if self.weight_grid.rounding == "nearest" or estimator == "hutchinson" else "quadratic"


@dataclass(frozen=True)
class AnalysisSettings:
    """What a run analyses: the task and its data, the layers, the estimator, the bit widths on offer."""

    task: str = option(
        ..., "digits, cifar10, imagenet, detection, or path/to/file.py:function", metavar="TASK", panel=MODEL
    )
    options: TaskOptions = TaskOptions()
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", panel=MODEL, decisive=False)
    discover: DiscoverSettings = DiscoverSettings()
    curvature: CurvatureSettings = CurvatureSettings()
    sensitivity: SensitivitySettings = SensitivitySettings()
    eigenvalues: bool = option(
        True,
        "compute each layer's largest eigenvalue too; the report then shows what HAWQ would choose",
        panel=ANALYSIS,
    )
    target_stability: float | None = option(
        None,
        "take no more samples once every layer keeps its bits in this share of resamples",
        minimum=0,
        maximum=1,
        panel=ANALYSIS,
        expert=True,
    )

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class PlanSettings:
    """What a plan may cost and which bits it may use (`tracequant.solve`).

    `max_accuracy_drop` (points of the task's metric) and `max_loss_increase` ask for the smallest plan that keeps to
    them by evaluation, in place of a limit on what the plan costs.
    """

    max_size_mib: float | None = option(
        None, "size of the packed file, in MiB (2^20 bytes)", above=0, metavar="MIB", panel=BUDGET
    )
    compression: float | None = option(
        None,
        "float32 size over quantized size of the weights, the paper's W-Comp",
        above=0,
        metavar="X",
        panel=BUDGET,
    )
    average_bits: float | None = option(None, "bits for each weight, on average", above=0, metavar="BITS", panel=BUDGET)
    average_activation_bits: float | None = option(
        None, "bits for each activation, on average [the most on offer]", above=0, metavar="BITS", panel=BUDGET
    )
    activation_compression: float | None = option(
        None, "float32 size over quantized size of the activations, A-Comp", above=0, metavar="X", panel=BUDGET
    )
    max_activation_mib: float | None = option(
        None, "largest input of a layer for one sample, in MiB", above=0, metavar="MIB", panel=BUDGET, expert=True
    )
    max_bops_g: float | None = option(
        None,
        "10^9 bit operations for one sample: multiply-accumulates times weight bits times input bits",
        above=0,
        metavar="G",
        panel=BUDGET,
    )
    max_latency_ms: float | None = option(
        None, "milliseconds of all layers by the table of --latency", above=0, metavar="MS", panel=BUDGET
    )
    latency: Latency | None = option(
        None,
        "table for --max-latency-ms: CSV layer,weight_bits,activation_bits,ms or JSON",
        metavar="FILE",
        panel=BUDGET,
    )
    max_accuracy_drop: float | None = option(
        None,
        "find the smallest plan that loses at most this many points, by evaluation",
        minimum=0,
        metavar="POINTS",
        panel=BUDGET,
    )
    max_loss_increase: float | None = option(
        None,
        "find the smallest plan whose loss rises by at most this, by evaluation",
        minimum=0,
        metavar="LOSS",
        panel=BUDGET,
    )
    fixed_bits: dict[str, int] | None = option(
        None, "layers that match the pattern get these bits; may be repeated", metavar="PATTERN=BITS", panel=RULES
    )
    min_bits: dict[str, int] | None = option(
        None, "layers that match get these bits or more; may be repeated", metavar="PATTERN=BITS", panel=RULES
    )
    allowed_bits: dict[str, tuple[int, ...]] | None = option(
        None, "layers that match get one of these widths; may be repeated", metavar="PATTERN=LIST", panel=RULES
    )
    allowed_activation_bits: dict[str, tuple[int, ...]] | None = option(
        None,
        "the same for activations (the model's input keeps 8 bits); may be repeated",
        metavar="PATTERN=LIST",
        panel=RULES,
        expert=True,
    )
    space: Literal["full", "monotone"] = option(
        "full",
        "all assignments of bits, or only those that never give a layer of larger trace fewer bits",
        panel=RULES,
        expert=True,
    )
    solver: Literal["exact", "pareto"] = option(
        "exact",
        "exact finds a proven optimum; pareto is the search of HAWQ-V2's Appendix E, for one budget",
        panel=RULES,
        expert=True,
    )
    criterion: Criterion | None = option(
        None, "solve by this criterion [the one of the analysis]", flag="--criterion", panel=RULES
    )

    def __post_init__(self) -> None:
        validate(self)

    @property
    def by_accuracy(self) -> bool:
        """Whether the limit is one on what the plan loses."""
        return self.max_accuracy_drop is not None or self.max_loss_increase is not None


@dataclass(frozen=True)
class FinetuneSettings:
    """The recipe of fine-tuning, which `tracequant.finetune` explains."""

    steps: int = option(
        400, "training steps, each on one batch; 0 for none", minimum=0, flag="--finetune-steps", panel=TRAINING
    )
    learning_rate: float = option(
        0.01, "learning rate of the first step; it falls along a cosine to zero", minimum=0, panel=TRAINING
    )
    optimizer: Literal["sgd", "adamw"] = option("sgd", "sgd has Nesterov momentum 0.9", panel=TRAINING)
    weight_decay: float = option(
        1e-4, "decay of weights; scales, biases and norms have none", minimum=0, panel=TRAINING, expert=True
    )
    scales: Literal["lsq", "fixed"] = option(
        "lsq", "lsq learns the scales of the grids, fixed keeps the calibrated ones", panel=TRAINING, expert=True
    )
    distillation: float = option(
        0.5,
        "share of the loss that is the distance to the float model's outputs; 0 for none",
        minimum=0,
        maximum=1,
        panel=TRAINING,
    )
    feature_distillation: float = option(
        0.0,
        "weight of the distance to the float model at the input of every quantized layer",
        minimum=0,
        panel=TRAINING,
        expert=True,
    )
    batchnorm: Literal["train", "freeze", "reestimate"] = option(
        "train", "BatchNorm's statistics: as in training, kept, or measured anew at the end", panel=TRAINING
    )
    ema: float = option(
        0.0,
        "decay of a moving average of weights and scales; 0 for none",
        minimum=0,
        below=1,
        panel=TRAINING,
        expert=True,
    )
    compile: bool = option(False, "train through torch.compile", panel=TRAINING, expert=True)
    channels_last: bool = option(
        False, "train with images and weights laid out channels last", panel=TRAINING, expert=True
    )
    uniform_too: bool = option(
        False,
        "in a run, fine-tune the uniform plan of the nearest size as well: a fair comparison in twice the time",
        panel=TRAINING,
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

    analysis: AnalysisSettings
    plan: PlanSettings | None = None
    finetune: FinetuneSettings | None = None
