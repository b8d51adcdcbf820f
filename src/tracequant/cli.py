"""The command line: parse, call one public function, print."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from tracequant import __version__
from tracequant.allocation.explain import explain
from tracequant.allocation.request import check as check_request
from tracequant.allocation.solve import solve
from tracequant.allocation.space import full_space, monotone_space
from tracequant.allocation.stability import plan_stability
from tracequant.core import cost
from tracequant.core.errors import TracequantError
from tracequant.core.evaluations import Check
from tracequant.core.plan import MEGABYTE, BitPlan
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import (
    METRICS,
    AnalyzeSettings,
    FinetuneSettings,
    Metric,
    PlanSettings,
    RunSettings,
    TaskOptions,
    WeightGrid,
)
from tracequant.core.tables import read_latency, read_sensitivity
from tracequant.presets import PRESETS
from tracequant.run import Measured, Run

app = typer.Typer(
    name="tracequant",
    help=(
        "Choose the bit width of every layer from the curvature of the loss, then quantize, fine-tune, pack and report."
        "\n\nTry it: tracequant demo. Your own model: write a function that returns a tracequant.TaskSetup and pass"
        " --task path/to/file.py:function."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the boxes cut long option names short
)
_err = Console(stderr=True, highlight=False)
INTERRUPTED = 130  # the shells' exit code for SIGINT

# Budgets, of weights and of activations: one that is given takes the place of a preset's.
WEIGHT_BUDGETS = (
    "max_size_mb", "compression", "average_bits", "max_bops_g", "max_latency_ms", "max_accuracy_drop",
    "max_loss_increase",
)  # fmt: skip
ACTIVATION_BUDGETS = ("average_activation_bits", "activation_compression", "max_activation_mb", "activation_bits")


def _use_preset(context: typer.Context, name: str | None) -> str | None:
    """Make a preset's values the defaults of the command's options."""
    if name is not None:
        if name not in PRESETS:
            _bad_parameter(f"unknown preset {name!r}; choose {', '.join(PRESETS)}")
        context.default_map = PRESETS[name].defaults(str(context.info_name))
    return name


# Options that several commands share.
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help=f"defaults for the other options: {', '.join(PRESETS)} (see tracequant presets)",
        metavar="NAME",
        is_eager=True,
        callback=_use_preset,
    ),
]
TaskName = Annotated[
    str,
    typer.Option("--task", help="digits, cifar10, imagenet, detection, or path/to/file.py:function", metavar="TASK"),
]
Out = Annotated[Path, typer.Option("--out", help="run directory to make or go on with", metavar="RUN")]
RunPath = Annotated[Path, typer.Argument(help="run directory", metavar="RUN")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
DataDir = Annotated[str | None, typer.Option(help="the task's data set", metavar="DIR")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="trained weights of the task's model (safetensors, .pth), or a published set's name", metavar="FILE"
    ),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="which of the task's models, e.g. resnet20, torchvision:resnet50")
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="calibration inputs for curvature and ranges [512; detection 128]")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="inputs in a batch, for analysis and fine-tuning")]
Workers = Annotated[int | None, typer.Option(min=0, help="processes that load images, where the task has some [4]")]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="pixels of a side, where the task scales images [that of the weights]")
]
CropShare = Annotated[
    float | None,
    typer.Option(min=0.01, max=1, help="share of a side that the crop from the centre keeps [that of the weights]"),
]
Seed = Annotated[int, typer.Option(help="seed of probes and fine-tuning; the same seed gives the same plan")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Method = Annotated[
    Literal["auto", "gauss_newton", "hutchinson"],
    typer.Option(help="auto takes gauss_newton where it equals the Hessian, which it checks, else hutchinson"),
]
Draws = Annotated[
    int | None, typer.Option(min=1, help="random vectors for each sample (gauss_newton) or batch (hutchinson) [2; 16]")
]
Probes = Annotated[
    Literal["per_layer", "shared"],
    typer.Option(help="one probe for each layer, or one for all: faster but far noisier"),
]
RelativeError = Annotated[
    float | None,
    typer.Option(min=0, help="take no more samples or draws once every trace is known to this share of it"),
]
Stable = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="take no more samples once every layer keeps its bits in this share of resamples"),
]
Arithmetic = Annotated[
    Literal["float32", "tf32", "bfloat16"],
    typer.Option("--precision", help="arithmetic of the analysis; tf32 (GPU) and bfloat16 are faster and less exact"),
]
Bits = Annotated[str, typer.Option(help="weight bit widths on offer, 1 to 8", metavar="LIST")]
ActivationBits = Annotated[
    str, typer.Option(help="activation bit widths on offer; 'none' leaves activations in float", metavar="LIST")
]
Include = Annotated[list[str] | None, typer.Option(help="quantize only layers matching this pattern; may be repeated")]
Exclude = Annotated[list[str] | None, typer.Option(help="keep layers matching this pattern in float; may be repeated")]
Tie = Annotated[
    list[str] | None,
    typer.Option(help="layers matching this pattern share a bit width; 'blocks': the task's own; may be repeated"),
]
MetricName = Annotated[
    Metric, typer.Option(help="what stands for a layer's loss; trace is HAWQ-V2's Eq. 10 (docs/method.md)")
]
PlanMetric = Annotated[Metric | None, typer.Option(help="solve by this metric [the one of the analysis]")]
MaxAccuracyDrop = Annotated[
    float | None,
    typer.Option(help="smallest plan that loses at most this many points, by evaluation", metavar="POINTS"),
]
MaxLossIncrease = Annotated[
    float | None, typer.Option(help="smallest plan whose loss rises by at most this, by evaluation", metavar="LOSS")
]
PerTensor = Annotated[
    bool, typer.Option("--per-tensor", help="one scale for a whole weight instead of one per channel")
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="weight ranges that need not be centred on zero")]
Range = Annotated[Literal["mse", "percentile", "minmax"], typer.Option("--range", help="how weight ranges are chosen")]
Eigenvalues = Annotated[bool, typer.Option(help="also compute each layer's top eigenvalue, to draw HAWQ's point")]
MaxSize = Annotated[
    float | None, typer.Option("--max-size-mb", help="size of the packed file, in MB of 2^20 bytes", metavar="MB")
]
Compression = Annotated[
    float | None, typer.Option(help="float32 over quantized weights, the paper's W-Comp", metavar="X")
]
AverageBits = Annotated[float | None, typer.Option(help="bits per weight on average", metavar="BITS")]
AverageActivationBits = Annotated[
    float | None, typer.Option(help="bits per activation on average [the most offered]", metavar="BITS")
]
ActivationCompression = Annotated[
    float | None, typer.Option(help="float32 over quantized activations, on average", metavar="X")
]
MaxActivation = Annotated[
    float | None, typer.Option("--max-activation-mb", help="largest input of a layer, one sample", metavar="MB")
]
MaxBops = Annotated[
    float | None,
    typer.Option("--max-bops-g", help="10^9 multiply-accumulates times weight and input bits, one sample", metavar="G"),
]
MaxLatency = Annotated[
    float | None, typer.Option("--max-latency-ms", help="sum over layers of the --latency table", metavar="MS")
]
LatencyFile = Annotated[
    Path | None,
    typer.Option("--latency", help="CSV layer,weight_bits,activation_bits,ms or nested JSON", metavar="FILE"),
]
Fix = Annotated[
    list[str] | None, typer.Option(help="layers matching get these bits; may be repeated", metavar="PATTERN=BITS")
]
AtLeast = Annotated[
    list[str] | None,
    typer.Option("--min-bits", help="layers matching get these bits or more; may be repeated", metavar="PATTERN=BITS"),
]
Allow = Annotated[
    list[str] | None, typer.Option(help="layers matching get one of these; may be repeated", metavar="PATTERN=LIST")
]
AllowActivation = Annotated[
    list[str] | None, typer.Option(help="the same for activations, the model's input aside", metavar="PATTERN=LIST")
]
Search = Annotated[
    Literal["exact", "pareto"],
    typer.Option(help="exact: a proven optimum; pareto: the search of HAWQ-V2's Appendix E, one budget"),
]
Space = Annotated[
    Literal["full", "monotone"],
    typer.Option(help="all assignments, or only those that never give a layer of larger trace fewer bits"),
]
Steps = Annotated[int, typer.Option("--finetune-steps", min=0, help="fine-tuning steps; 0 for none")]
LearningRate = Annotated[float, typer.Option(min=0, help="peak learning rate, cosine to zero")]
Optimizer = Annotated[Literal["sgd", "adamw"], typer.Option(help="sgd has Nesterov momentum 0.9")]
Distillation = Annotated[float, typer.Option(min=0, max=1, help="weight of the float teacher's loss; 0 for none")]
WeightDecay = Annotated[float, typer.Option(min=0, help="of weights; scales, biases and norms have none")]
Scales = Annotated[
    Literal["lsq", "fixed"],
    typer.Option(help="learn step sizes (lsq), or keep the calibrated ranges (fixed)"),
]
FeatureDistillation = Annotated[
    float, typer.Option(min=0, help="weight of the distance to the teacher at every layer's input")
]
BatchNorm = Annotated[
    Literal["train", "freeze", "reestimate"],
    typer.Option(help="BatchNorm's statistics: as in training, kept, or measured anew at the end"),
]
Ema = Annotated[float, typer.Option(min=0, max=1, help="decay of a moving average of the weights; 0 for none")]
Compile = Annotated[bool, typer.Option("--compile", help="train through torch.compile")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="train with images laid out channels last")]
UniformToo = Annotated[bool, typer.Option(help="fine-tune the uniform plan of the nearest size as well")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tracequant {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def analyze(
    task: TaskName,
    out: Out,
    preset: PresetName = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    model: ModelName = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    workers: Workers = None,
    image_size: ImageSize = None,
    crop_share: CropShare = None,
    device: Device = "auto",
    method: Method = "auto",
    draws: Draws = None,
    probes: Probes = "per_layer",
    relative_error: RelativeError = None,
    stable: Stable = None,
    precision: Arithmetic = "float32",
    bits: Bits = "2,3,4,8",
    activation_bits: ActivationBits = "4,8",
    include: Include = None,
    exclude: Exclude = None,
    tie: Tie = None,
    metric: MetricName = "trace",
    per_tensor: PerTensor = False,
    asymmetric: Asymmetric = False,
    range_method: Range = "mse",
    eigenvalues: Eigenvalues = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the curvature and sensitivity of every layer. Takes minutes; every budget after it takes none."""
    run = _open(out, quiet)
    if not _analyze_together(run, _analyze_settings(locals())):
        return
    if as_json:
        _print_json(run.sensitivity().to_json())
    elif not quiet:
        _print_sensitivity(run)


@app.command()
def plan(
    context: typer.Context,
    run_path: Annotated[Path | None, typer.Argument(help="run directory", metavar="RUN")] = None,
    preset: PresetName = None,
    max_size_mb: MaxSize = None,
    compression: Compression = None,
    average_bits: AverageBits = None,
    average_activation_bits: AverageActivationBits = None,
    activation_compression: ActivationCompression = None,
    max_activation_mb: MaxActivation = None,
    max_bops_g: MaxBops = None,
    max_latency_ms: MaxLatency = None,
    latency: LatencyFile = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    max_loss_increase: MaxLossIncrease = None,
    metric: PlanMetric = None,
    bits: Annotated[str | None, typer.Option(help="use only these weight bits", metavar="LIST")] = None,
    activation_bits: Annotated[str | None, typer.Option(help="use only these activation bits", metavar="LIST")] = None,
    fix: Fix = None,
    min_bits: AtLeast = None,
    allow: Allow = None,
    allow_activation: AllowActivation = None,
    space: Space = "full",
    search: Search = "exact",
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="in place of RUN: a sensitivity.json or a table (docs/tables.md)", metavar="FILE"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also save the plan here (JSON)", metavar="FILE")] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="make it the run's plan even if a later stage is done")
    ] = False,
    stability: Annotated[
        bool, typer.Option("--stability", help="also say how often each layer keeps its bits if samples are drawn anew")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Answer budgets from a finished analysis, in seconds and without the model. Several budgets hold together.

    --max-accuracy-drop and --max-loss-increase evaluate a dozen plans instead, after calibration and without
    fine-tuning, and give the smallest that keeps to them.

    The first plan becomes the run's. Once the run is quantized, further plans are only shown, unless --apply is given.
    With --sensitivity FILE there is no run, only the answer.
    """
    if (run_path is None) == (sensitivity is None):
        _bad_parameter("give a run directory or --sensitivity FILE, one of the two")
    settings = _plan_settings(_budgets(context, locals()))
    run: Run | None = None
    if run_path is not None:
        run = _open(run_path, quiet)
        solved, table = run.solve(settings), run.sensitivity_by(settings.metric)
    else:
        if apply:
            _bad_parameter("--apply needs a run directory")
        if settings.by_accuracy or settings.metric is not None:
            _bad_parameter("--metric, --max-accuracy-drop and --max-loss-increase need a run directory")
        assert sensitivity is not None
        table = read_sensitivity(sensitivity)
        solved = solve(table, **settings.keywords())
    if out is not None:
        solved.save(out)
    keep = run is not None and (apply or not run.done("quantize"))
    if run is not None and keep:
        run.keep_plan(settings, solved)
    if as_json:
        _print_json(solved.to_json())
    elif not quiet:
        stable = plan_stability(table, solved, run.curvature(), settings) if run is not None and stability else None
        _print_plan(table, solved, settings, stable)
        if run is not None and not keep:
            own = run.plan()
            if (own.weight_bits, own.activation_bits) == (solved.weight_bits, solved.activation_bits):
                _err.print("The run is quantized by this very plan.")
            else:
                _err.print(
                    "The run is quantized by another plan and keeps it; add --apply to replace it.", style="yellow"
                )


@app.command()
def spectrum(
    run_path: RunPath,
    layer: Annotated[
        list[str] | None, typer.Option(help="only layers matching this pattern; may be repeated [all]")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="eigenvalues of each layer, the largest in magnitude")] = 20,
    density: Annotated[
        list[str] | None,
        typer.Option(help="also the density of all eigenvalues of a layer, or '*' of the whole model; may be repeated"),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Eigenvalues of the Hessian by Lanczos' method, to RUN/spectrum.json and RUN/figures/spectrum.png."""
    run = _open(run_path, quiet)
    found = run.measure_spectrum(layer or ["*"], top, density or [])
    from tracequant.report.figures import spectrum_figure
    from tracequant.report.html import save_figure

    curvature = run.curvature()
    save_figure(spectrum_figure(found, curvature), run.path / "figures" / "spectrum")
    if as_json:
        _print_json(found.to_json())
    elif not quiet:
        table = Table(title="Largest eigenvalues", title_justify="left")
        for column in ("layer", "λ₁", "λ₁/n", "Tr(H)/n", "λ₂, λ₃, ..."):
            table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
        for name, values in found.eigenvalues.items():
            trace = curvature.weights[name]
            rest = ", ".join(f"{value:.3g}" for value in values[1:6])
            first = (f"{values[0]:.4g}", f"{values[0] / trace.numel:.3g}", f"{trace.average_trace:.3g}")
            table.add_row(name, *first, rest + (", ..." if len(values) > 6 else ""))
        Console().print(table)
        print(f"Figure: {run.path / 'figures' / 'spectrum.png'}; `tracequant report {run.path}` takes it in")


@app.command()
def check(
    run_path: RunPath,
    samples: Annotated[int | None, typer.Option(min=1, help="calibration inputs to measure on [all]")] = None,
    plans: Annotated[int, typer.Option(min=0, help="random whole plans for each --plan-bits")] = 80,
    plan_bits: Annotated[
        list[str] | None, typer.Option(help="bits of the random plans; may be repeated [all]", metavar="LIST")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize single layers and random plans, measure the loss, and say which metric ranks them best.

    Writes RUN/check.json and RUN/figures/check.png. Interrupted, the same command goes on where it stopped.
    """
    run = _open(run_path, quiet)
    found = run.check(samples, plans, [_parse_bits(text, "--plan-bits") for text in plan_bits or ()])
    from tracequant.report.figures import check_figure
    from tracequant.report.html import save_figure

    save_figure(check_figure(found), run.path / "figures" / "check")
    if as_json:
        _print_json(found.to_json())
    elif not quiet:
        _print_check(run, found)


@app.command()
def compare(
    run_path: RunPath,
    max_size_mb: MaxSize = None,
    compression: Compression = None,
    average_bits: AverageBits = None,
    metrics: Annotated[str | None, typer.Option(help="compare these [all that were measured]", metavar="LIST")] = None,
    fix: Fix = None,
    min_bits: AtLeast = None,
    allow: Allow = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Solve one budget by every metric and evaluate the plans, calibrated and not fine-tuned (Tables 3 and 5)."""
    run = _open(run_path, quiet)
    others = {"bits": None, "activation_bits": None, "latency": None, "allow_activation": None, "metric": None}
    settings = _plan_settings(locals() | others | {"search": "exact"})
    rows = run.compare(settings, _parse_metrics(metrics) if metrics is not None else run.metrics())
    evaluations = run.evaluations()
    assert evaluations is not None
    if as_json:
        _print_json({name: {"plan": p.to_json(), "evaluation": asdict(row)} for name, (p, row) in rows.items()})
    elif not quiet:
        name = evaluations.metric_name
        table = Table(title=f"Plans by metric ({evaluations.samples:,} evaluation samples)", title_justify="left")
        for column in ("metric", name, "loss", "MB on disk", "W-Comp"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for label, (solved, row) in rows.items():
            size = f"{solved.size_mb:.4f}"
            table.add_row(label, f"{row.metric:.2f}", f"{row.loss:.4f}", size, f"{solved.compression:.2f}x")
        table.add_row("float", f"{evaluations.float_metric:.2f}", f"{evaluations.float_loss:.4f}", "", "")
        Console().print(table)


@app.command()
def quantize(run_path: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Quantize by the run's plan and uniformly, and evaluate both beside the float model."""
    run = _open(run_path, quiet)
    run.quantize()
    _print_results(run, quiet, as_json)


@app.command()
def finetune(
    run_path: RunPath,
    preset: PresetName = None,
    steps: Annotated[int, typer.Option(min=1, help="fine-tuning steps")] = 400,
    learning_rate: LearningRate = 0.01,
    optimizer: Optimizer = "sgd",
    weight_decay: WeightDecay = 1e-4,
    scales: Scales = "lsq",
    distillation: Distillation = 0.5,
    feature_distillation: FeatureDistillation = 0.0,
    batchnorm: BatchNorm = "train",
    ema: Ema = 0.0,
    compile: Compile = False,
    channels_last: ChannelsLast = False,
    uniform_too: UniformToo = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the quantized model. Interrupted, the same command goes on from the last checkpoint."""
    from tracequant.model import distributed

    run, recipe = _open(run_path, quiet), _recipe(locals())
    with distributed.process_group(run.settings().analyze.device):
        first = distributed.rank() == 0
        if not first:
            run.be_silent()
        run.finetune(recipe)
    if first:
        _print_results(run, quiet, as_json)


@app.command()
def evaluate(
    run_path: RunPath,
    file: Annotated[Path | None, typer.Option(help="a packed file [RUN/model.safetensors]", metavar="FILE")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Load the run's packed file and measure it on the evaluation data."""
    run = _open(run_path, quiet)
    row = run.evaluate_file(file)
    if as_json:
        _print_json({"file": row.name, "metric": row.metric, "loss": row.loss, "size_bytes": row.size_bytes})
    else:
        print(f"{row.name}: {row.metric:.2f}, loss {row.loss:.6f}, {row.size_bytes:,} bytes on disk")


@app.command()
def pack(run_path: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Write the quantized model, fine-tuned if it was, to RUN/model.safetensors and load it back to check."""
    run = _open(run_path, quiet)
    run.pack()
    if as_json:
        _print_json(run.pack_result().to_json())
    elif not quiet:
        _print_packed(run)


@app.command()
def export(
    run_path: RunPath,
    format: Annotated[Literal["onnx"], typer.Option(help="file format")] = "onnx",
    profile: Annotated[
        Literal["qdq", "weights-only"],
        typer.Option(help="qdq: integers throughout; weights-only: float activations, for transformers"),
    ] = "qdq",
    dynamic_batch: Annotated[bool, typer.Option(help="leave the batch size open")] = True,
    dynamic_sizes: Annotated[
        bool | None, typer.Option(help="leave heights, widths and lengths open [as the task does]", show_default=False)
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the packed model to RUN/model.onnx, for ONNX Runtime and OpenVINO."""
    run = _open(run_path, quiet)
    written = run.export(profile, dynamic_batch, dynamic_sizes)
    if as_json:
        _print_json(asdict(written))
    elif not quiet:
        print(
            f"{written.path}: {written.file_bytes:,} bytes, {written.code_bytes:,} of them codes. Next: tracequant"
            f" verify {run.path}"
        )


@app.command()
def verify(run_path: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Run RUN/model.onnx on the evaluation data: differences, accuracy, size, speed, and which kernels are integer."""
    run = _open(run_path, quiet)
    found = run.verify()
    if as_json:
        _print_json(found.to_json())
        return
    ratio = found.file_bytes / found.promised_bytes
    print(f"Size: {found.file_bytes:,} bytes, {ratio:.3f} times the {found.promised_bytes:,} of the packed file.")
    print(
        f"Exact arithmetic: largest difference {found.difference:.1e} of the largest output;"
        f" {found.samples_within:.2%} of {found.samples:,} samples within 1e-5."
    )
    table = Table(title=f"Fake-quantized model: {found.metric_name} {found.metric:.2f}", title_justify="left")
    for column in ("runtime", found.metric_name, "equal predictions", "ms", "float32 ms", "speedup"):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    for row in found.runtimes:
        equal = "–" if row.equal_predictions is None else f"{row.equal_predictions:.2%}"
        times = (row.milliseconds, row.float_milliseconds, row.float_milliseconds / row.milliseconds)
        table.add_row(row.runtime, f"{row.metric:.2f}", equal, *(f"{value:.3g}" for value in times))
    Console().print(table)
    left = [kernel for kernel in found.kernels if kernel.reason]
    print(f"ONNX Runtime computes {len(found.kernels) - len(left)} of {len(found.kernels)} layers in integers.")
    for kernel in left:
        print(f"  {kernel.layer}: {kernel.kernel}, {kernel.reason}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="a packed file", metavar="FILE")], as_json: AsJson = False
) -> None:
    """Check a packed file and show its layers, bits, shapes and bytes. Needs neither the model nor torch."""
    from tracequant.deploy.packed import read_packed

    contents = read_packed(file)
    layout = contents.layout
    layers = [
        {"name": w.name, "shape": list(w.shape), "bits": w.num_bits, "scales": w.rows, "code_bytes": w.code_bytes}
        for w in layout.weights
    ]
    inputs = {name: point.num_bits for point in layout.activations for name in point.consumers}
    rest = sum(raw.size for *_, raw in contents.raw_tensors())
    if as_json:
        _print_json({
            "file": str(file), "file_bytes": contents.file_bytes, "header_bytes": layout.header_bytes(),
            "layers": layers, "input_bits": inputs, "rounded_outputs": layout.outputs, "float_bytes": rest,
            "tensors": [{"name": n, "dtype": d, "shape": list(shape)} for n, d, shape in layout.tensors],
        })  # fmt: skip
        return
    table = Table(title="Quantized weights", title_justify="left")
    for column in ("layer", "shape", "bits", "input bits", "bytes of codes", "scales"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for weight in layout.weights:
        shape = " x ".join(map(str, weight.shape))
        read = str(inputs.get(weight.sites[0][0], "float"))
        table.add_row(weight.name, shape, str(weight.num_bits), read, f"{weight.code_bytes:,}", f"{weight.rows:,}")
    Console().print(table)
    if layout.outputs:
        print(f"Rounded to 8 bits where they arise: the outputs of {', '.join(layout.outputs)}.")
    print(
        f"{file}: {contents.file_bytes:,} bytes, checksum right; codes {sum(w.code_bytes for w in layout.weights):,},"
        f" {len(layout.tensors)} tensors that are not quantized {rest:,}, header {layout.header_bytes():,}."
    )


@app.command()
def latency(
    run_path: RunPath,
    out: Annotated[
        Path | None, typer.Option("--out", help="the table [RUN/latency.csv]", metavar="FILE", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads of ONNX Runtime")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each layer and choice, of which the median counts")] = 30,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure every layer at all bits in ONNX Runtime on this machine: the table for plan --max-latency-ms.

    An interrupted measurement goes on with the layers that are missing.
    """
    run = _open(run_path, quiet)
    path = out or run.path / "latency.csv"
    found = run.measure_latency(path, threads, repeats)
    if as_json:
        _print_json(found)
    elif not quiet:
        # Choices that all layers have: the model's input, for one, is offered 8 bits only.
        offered = [{(w, a) for w, row in layer.items() for a in row} for layer in found.values()]
        for weight_bits, input_bits in sorted(set.intersection(*offered)):
            total = sum(layer[weight_bits][input_bits] for layer in found.values())
            kind = "float32" if weight_bits == 32 else f"weights at {weight_bits} bits, inputs at {input_bits}"
            print(f"{kind}: {total:.3f} ms, the sum over {len(found)} layers")
        print(f"Table: {path}; use it with tracequant plan {run_path} --max-latency-ms X --latency {path}")


@app.command()
def report(run_path: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Write RUN/report.html and its figures from what is finished, the plan at least."""
    run = _open(run_path, quiet)
    path = run.report()
    if as_json:
        _print_json({"report": str(path)})
    elif not quiet:
        print(f"Report: {path}")


@app.command()
def figures(
    run_path: RunPath,
    figure: Annotated[
        list[int] | None, typer.Option(help="2, 4, 5, 6, 7 or 8; may be repeated [all that can be drawn]", metavar="N")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="layers of Figures 2, 5 and 6; may be repeated [of largest, middle and smallest trace]"),
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(help="layers matching this pattern are one bar; 'blocks': the task's own; may be repeated"),
    ] = None,
    grid: Annotated[int | None, typer.Option(min=3, help="points to a side of a loss landscape, odd [15]")] = None,
    radius: Annotated[
        float | None, typer.Option(min=0, help="how far a landscape reaches, in units of the weights [by curvature]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where to write them [RUN/paper]", metavar="DIR")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw the paper's figures of this run, figure-N.png with figure-N.json beside it.

    2: average traces, and the loss around a sharp and a flat layer. 4: the Pareto frontier. 5: how the traces converge.
    6: the 20 largest eigenvalues against the average trace. 7: traces and bits of weights. 8: of activations.

    What is missing is measured and kept in the run. Interrupted, the same command goes on where it stopped.
    """
    run = _open(run_path, quiet)
    from tracequant.report.paper import FigureOptions

    options = FigureOptions(tuple(layer or ()), tuple(block or ()), grid, radius)
    drawn = run.paper_figures(figure, out, options)
    for number, reason in drawn.left_out.items():
        if not quiet:
            _err.print(f"Figure {number} is left out: {_escape(reason)}", style="yellow", soft_wrap=True)
    if as_json:
        _print_json({str(number): str(path) for number, path in drawn.files.items()})
    elif not quiet:
        for number, path in drawn.files.items():
            print(f"Figure {number}: {path}")


@app.command(name="run")
def run_all(
    context: typer.Context,
    task: TaskName,
    out: Out,
    preset: PresetName = None,
    max_size_mb: MaxSize = None,
    compression: Compression = None,
    average_bits: AverageBits = None,
    average_activation_bits: AverageActivationBits = None,
    activation_compression: ActivationCompression = None,
    max_activation_mb: MaxActivation = None,
    max_bops_g: MaxBops = None,
    max_latency_ms: MaxLatency = None,
    latency: LatencyFile = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    max_loss_increase: MaxLossIncrease = None,
    fix: Fix = None,
    min_bits: AtLeast = None,
    allow: Allow = None,
    allow_activation: AllowActivation = None,
    space: Space = "full",
    search: Search = "exact",
    data_dir: DataDir = None,
    weights: Weights = None,
    model: ModelName = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    workers: Workers = None,
    image_size: ImageSize = None,
    crop_share: CropShare = None,
    device: Device = "auto",
    method: Method = "auto",
    draws: Draws = None,
    probes: Probes = "per_layer",
    relative_error: RelativeError = None,
    stable: Stable = None,
    precision: Arithmetic = "float32",
    bits: Bits = "2,3,4,8",
    activation_bits: ActivationBits = "4,8",
    include: Include = None,
    exclude: Exclude = None,
    tie: Tie = None,
    metric: MetricName = "trace",
    per_tensor: PerTensor = False,
    asymmetric: Asymmetric = False,
    range_method: Range = "mse",
    eigenvalues: Eigenvalues = True,
    steps: Steps = 400,
    learning_rate: LearningRate = 0.01,
    optimizer: Optimizer = "sgd",
    weight_decay: WeightDecay = 1e-4,
    scales: Scales = "lsq",
    distillation: Distillation = 0.5,
    feature_distillation: FeatureDistillation = 0.0,
    batchnorm: BatchNorm = "train",
    ema: Ema = 0.0,
    compile: Compile = False,
    channels_last: ChannelsLast = False,
    uniform_too: UniformToo = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """All stages: analyze, plan, quantize, fine-tune, pack, report. Run again, it goes on where it stopped."""
    _run_stages(
        _open(out, quiet),
        _analyze_settings(locals()),
        # Bits and metric are those of the analysis.
        _plan_settings(_budgets(context, locals()) | {"bits": None, "activation_bits": None, "metric": None}),
        _recipe(locals()),
        quiet,
        as_json,
    )


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the presets, and the options of `run` that each stands for."""
    if as_json:
        _print_json({name: asdict(preset) for name, preset in PRESETS.items()})
        return
    for name, preset in PRESETS.items():
        options = (f"{_option(parameter)} {value}" for parameter, value in preset.defaults("run").items())
        print(f"{name}: {preset.about}\n  {' '.join(options)}\n")


def _option(parameter: str) -> str:
    """The option of a parameter of `run`."""
    return {"steps": "--finetune-steps"}.get(parameter, f"--{parameter.replace('_', '-')}")


@app.command()
def demo(
    out: Out = Path("demo-run"),
    average_bits: AverageBits = 3.0,
    steps: Steps = 300,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The whole flow on scikit-learn's digits: no data to bring, under a minute on two cores."""
    _run_stages(
        _open(out, quiet),
        AnalyzeSettings("digits", TaskOptions(), activation_bits=(4,)),
        PlanSettings(average_bits=average_bits),
        FinetuneSettings(steps=steps, uniform_too=True),
        quiet,
        as_json,
    )


def _run_stages(
    run: Run,
    analyze: AnalyzeSettings,
    plan: PlanSettings,
    finetune: FinetuneSettings,
    quiet: bool,
    as_json: bool,
) -> None:
    from tracequant.model import distributed

    check_request(plan)  # a bad budget should not cost an analysis
    with distributed.process_group(analyze.device):
        first = _analyze_together(run, analyze, plan, finetune if finetune.steps else None)
        if first:
            solved = run.solve(plan)  # a budget that cannot be met leaves the run as it was
            run.ask(RunSettings(analyze, plan, finetune if finetune.steps else None))
            if not run.done("plan"):
                run.keep_plan(plan, solved)
            if not (quiet or as_json):
                _print_plan(run.sensitivity(), run.plan(), plan, run.stability())
            run.quantize()
        if finetune.steps:
            run.finetune(finetune)
    if not first:
        return
    run.pack()
    path = run.report()
    _print_results(run, quiet, as_json)
    if not (quiet or as_json):
        _print_packed(run)
        print(f"Report: {path}")


def _analyze_together(
    run: Run, analyze: AnalyzeSettings, plan: PlanSettings | None = None, finetune: FinetuneSettings | None = None
) -> bool:
    """Analyze, along with the other processes under `torchrun`. Whether this one is the first, which plans alone."""
    from tracequant.model import distributed

    with distributed.process_group(analyze.device):
        first = distributed.rank() == 0
        if first:
            run.adopt(analyze)
            if finetune is not None and not run.done("analyze"):
                run.check_recipe(finetune)  # here, lest it should fail after the analysis
            if plan is not None and analyze.stable is not None and not run.done("analyze"):
                run.ask(replace(run.settings(), plan=plan))  # the plan that is to be stable
        else:
            run.be_silent()
        distributed.gather(None)  # the others start when the settings are there
        run.analyze()
    return first


def main() -> None:
    """Entry point: our own errors become one message and exit code 2."""
    sys.exit(run_guarded(app))


def run_guarded(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code; what tracequant can explain is printed without a traceback."""
    warnings.showwarning = _show_warning
    try:
        command()
    except TracequantError as error:
        _err.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        return 2
    except OSError as error:  # a path that cannot be made or written, a full disk
        _err.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:  # typer has caught the interrupt
            return _interrupted()
        return exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    return 0


def _interrupted() -> int:
    _err.print("interrupted; finished stages are kept, run the same command to go on", style="yellow")
    return INTERRUPTED


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        _err.print(f"[yellow]warning:[/] {_escape(str(message))}", soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _open(path: Path, quiet: bool) -> Run:
    def say(text: str) -> None:
        if not quiet:
            _err.print(text, style="dim")

    return Run(path, say, progress=not quiet)


def _analyze_settings(given: dict[str, Any]) -> AnalyzeSettings:
    return AnalyzeSettings(
        task=_absolute_task(given["task"]),
        options=TaskOptions(
            _absolute(given["data_dir"]),
            _absolute(given["weights"]),
            given["model"],
            given["samples"],
            given["batch_size"],
            given["seed"],
            given["workers"],
            given["image_size"],
            given["crop_share"],
        ),
        device=given["device"],
        method=given["method"],
        draws=given["draws"],
        probes=given["probes"],
        relative_error=given["relative_error"],
        stable=given["stable"],
        precision=given["precision"],
        include=tuple(given["include"] or ("*",)),
        exclude=tuple(given["exclude"] or ()),
        ties=tuple(given["tie"] or ()),
        weight_bits=_parse_bits(given["bits"], "--bits"),
        activation_bits=_parse_bits(given["activation_bits"], "--activation-bits"),
        metric=given["metric"],
        weight_grid=WeightGrid(not given["per_tensor"], not given["asymmetric"], given["range_method"]),
        eigenvalues=given["eigenvalues"],
    )


def _budgets(context: typer.Context, given: dict[str, Any]) -> dict[str, Any]:
    """The options without those budgets of a preset whose place others have taken."""
    source = {
        name: getattr(context.get_parameter_source(name), "name", "") for name in (*WEIGHT_BUDGETS, *ACTIVATION_BUDGETS)
    }
    dropped: dict[str, None] = {}
    for group in (WEIGHT_BUDGETS, ACTIVATION_BUDGETS):
        if any(source[name] == "COMMANDLINE" for name in group):
            dropped |= {name: None for name in group if source[name] == "DEFAULT_MAP" and name != "activation_bits"}
    return given | dropped


def _plan_settings(given: dict[str, Any]) -> PlanSettings:
    """Budgets and rules from a command's options, most of which have the names of the settings."""
    named = {field.name for field in fields(PlanSettings)} - {"latency", "min_bits", "method"}
    allowed, allowed_activations = (
        _rules(given["allow"], "--allow"),
        _rules(given["allow_activation"], "--allow-activation"),
    )
    for option, rules in (("bits", allowed), ("activation_bits", allowed_activations)):
        if given[option] is not None:
            bits = _parse_bits(given[option], f"--{option.replace('_', '-')}")
            rules["*"] = tuple(b for b in bits if b in rules["*"]) if "*" in rules else bits
    return PlanSettings(
        **{name: given[name] for name in named if name in given},
        latency=read_latency(given["latency"]) if given["latency"] is not None else None,
        fixed_bits=_single(_rules(given["fix"], "--fix"), "--fix"),
        min_bits=_single(_rules(given["min_bits"], "--min-bits"), "--min-bits"),
        allowed_bits=allowed or None,
        allowed_activation_bits=allowed_activations or None,
        method=given["search"],
    )


def _rules(texts: list[str] | None, option: str) -> dict[str, tuple[int, ...]]:
    """PATTERN=LIST options as a dictionary."""
    rules: dict[str, tuple[int, ...]] = {}
    for text in texts or ():
        pattern, equals, bits = text.rpartition("=")
        if not (pattern and equals):
            _bad_parameter(f"{option} takes PATTERN=BITS, such as 'layer1.*=4', got {text!r}")
        rules[pattern] = _parse_bits(bits, option)
    return rules


def _single(rules: dict[str, tuple[int, ...]], option: str) -> dict[str, int] | None:
    for pattern, bits in rules.items():
        if len(bits) != 1:
            _bad_parameter(f"{option} takes one bit width for {pattern!r}; --allow takes several")
    return {pattern: bits[0] for pattern, bits in rules.items()} or None


def _recipe(given: dict[str, Any]) -> FinetuneSettings:
    """Fine-tuning settings from a command's options, which have the same names."""
    return FinetuneSettings(
        **{field.name: given[field.name] for field in fields(FinetuneSettings) if field.name in given}
    )


def _absolute(path: str | None) -> str | None:
    """An existing path as seen from anywhere; the run may be gone on with from another folder."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _absolute_task(spec: str) -> str:
    file, colon, function = spec.rpartition(":")
    return f"{_absolute(file)}{colon}{function}" if colon else spec


def _parse_bits(text: str, option: str) -> tuple[int, ...]:
    if option == "--activation-bits" and text.strip() == "none":
        return ()
    try:
        bits = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        _bad_parameter(f"{option} takes numbers from 1 to 8 separated by commas, got {text!r}")
    if not all(1 <= num_bits <= 8 for num_bits in bits):
        _bad_parameter(f"{option} takes bit widths from 1 to 8, got {text!r}")
    return bits


def _parse_metrics(text: str) -> list[Metric]:
    found: list[Metric] = [metric for part in text.split(",") for metric in METRICS if metric == part.strip()]
    if len(found) != len(text.split(",")):
        _bad_parameter(f"--metrics takes some of {', '.join(METRICS)}, got {text!r}")
    return found


def _bad_parameter(text: str) -> NoReturn:
    raise typer.BadParameter(text)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def _print_sensitivity(run: Run) -> None:
    curvature, sensitivity = run.curvature(), run.sensitivity()
    widths = sorted({b for options in sensitivity.weight_omega.values() for b in options})
    table = Table(title="Sensitivity by layer", title_justify="left")
    for column in ("layer", "weights", "Tr(H)/n", "± draws", "± samples", *(f"Ω {b} bit" for b in widths)):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for layer in sensitivity.points.layers:
        trace = curvature.weights[layer.name]
        errors = (_error(trace.standard_error / layer.numel), _error(trace.sampling_error / layer.numel))
        omegas = (f"{sensitivity.weight_omega[layer.name][b]:.3g}" for b in widths)
        table.add_row(layer.name, f"{layer.numel:,}", f"{trace.average_trace:.3g}", *errors, *omegas)
    Console().print(table)
    print(f"Next: tracequant plan {run.path} --max-size-mb X (or --compression X, --average-bits X)")


def _print_check(run: Run, found: Check) -> None:
    table = Table(title=f"Rank correlation with the loss on {found.samples:,} samples", title_justify="left")
    table.add_column("metric")
    for group in found.groups:
        table.add_column(group, justify="right")
    for name, values in found.correlations.items():
        cells = (f"{values[group]:.2f}" if group in values else "" for group in found.groups)
        table.add_row(name, *cells, style="bold" if name == found.trusted else None)
    Console().print(table)
    print(f"Trust most: {found.trusted}. tracequant plan {run.path} --metric {found.trusted} ... solves by it.")
    print(f"Figure: {run.path / 'figures' / 'check.png'}; `tracequant report {run.path}` takes it in")


def _error(value: float) -> str:
    return "–" if math.isinf(value) else f"{value:.1g}"


def _print_plan(
    sensitivity: Sensitivity, solved: BitPlan, settings: PlanSettings, stability: dict[str, float] | None = None
) -> None:
    console = Console()
    table = Table(title=solved.summary, title_justify="left")
    columns = [
        "layer",
        "weights",
        "Tr(H)/n",
        "bits",
        *(["stable"] if stability else []),
        "input bits",
        "Ω",
        "share of Ω",
    ]
    wide = console.width >= 160
    for column in [*columns, "why"] if wide else columns:
        table.add_column(column, justify="left" if column in ("layer", "why") else "right", overflow="fold")
    latency = settings.latency if settings.latency is not None else sensitivity.latency
    explanation = explain(sensitivity, solved, latency=latency)
    for row in explanation.rows:
        cells = [
            row.name,
            f"{row.numel:,}",
            f"{row.average_trace:.3g}",
            str(row.num_bits),
            *([f"{stability[row.name]:.0%}"] if stability else []),
            str(row.activation_bits or "float"),
            f"{row.omega:.2g}",
            f"{row.omega_share:.1%}",
        ]
        table.add_row(*cells, row.why) if wide else table.add_row(*cells)
    console.print(table)
    if stability:
        print("Stable: the share of 100 resamples of the calibration data in which the layer keeps its bits.")
    points = sensitivity.points
    spent = [f"{cost.bit_operations(points, solved.weight_bits, solved.activation_bits) / 1e9:.4g} G BOPs"]
    if settings.max_latency_ms is not None:
        spent.append(f"{cost.latency_ms(points, solved.weight_bits, solved.activation_bits, latency):.4g} ms")
    if solved.activation_bits and not sensitivity.same_bits:
        average = cost.average_activation_bits(points, solved.activation_bits)
        spent.append(f"activations {average:.2f} bits on average, Ω {solved.activation_omega:.2g}")
    print(f"Asked for: {solved.budget}. Uses {solved.size_bytes:,} bytes, {', '.join(spent)}.")
    units, options = len(points.weight_units), max(len(omega) for omega in sensitivity.weight_omega.values())
    print(
        f"Search space: {_count(full_space(units, options))} assignments of weight bits,"
        f" {_count(monotone_space(units, options))} of them monotone."
    )
    if solved.gap is None:
        print(f"Found by {solved.method}; nothing proven about better plans.")
    elif solved.gap == 0:
        print(f"Proven: no plan within the budget has a lower Ω than {solved.total_omega:.6g}.")
    else:
        print(f"Not proven within the time: the best Ω is between {solved.bound:.6g} and {solved.total_omega:.6g}.")
    for rate in explanation.rates:
        print(f"Rate of exchange: {rate}.")


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**9 else f"about 10^{math.log10(number):.1f}"


def _print_results(run: Run, quiet: bool, as_json: bool) -> None:
    rows: list[Measured] = run.result_rows()
    if as_json:
        page = run.path / "report.html"
        _print_json({"rows": [asdict(row) for row in rows], "report": str(page) if page.is_file() else None})
    elif not quiet:
        table = Table(title=f"Results ({run.quantize_result().samples:,} evaluation samples)", title_justify="left")
        for column in ("model", run.quantize_result().metric_name, "MB on disk", "bits per weight"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in rows:
            size = f"{row.size_bytes / MEGABYTE:.4f}"
            table.add_row(row.name, f"{row.metric:.2f}", size, f"{row.average_bits:.2f}")
        Console().print(table)


def _print_packed(run: Run) -> None:
    packed, solved = run.pack_result(), run.plan()
    kind = "" if packed.fine_tuned else " (not fine-tuned)"
    print(
        f"Packed{kind}: {run.path / 'model.safetensors'}, {packed.file_bytes:,} bytes ({packed.promised_bytes:,}"
        f" promised), weights {solved.compression:.2f}x smaller; loaded again it gives {packed.evaluation.metric:.2f}"
    )
