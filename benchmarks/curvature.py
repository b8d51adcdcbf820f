"""Time, memory and error of the estimators of Hessian traces, side by side on one model and one set of images.

    python benchmarks/curvature.py [--model resnet20] [--images 128] [--num-probes 4] [--json FILE]

Models: resnet20 (trained, CIFAR-10; the digits network where TRACEQUANT_DATA does not hold them), resnet50 and
inception_v3 (torchvision's, 224² and 299², 10 classes so that an exact reference can be had, weights at random with
BatchNorm's statistics taken from the images). Every method measures all layers; ours measure the activations as well.

Errors are relative to the exact sum over classes on the same images: the root mean square over repetitions (seeds for
gauss_newton, single draws divided by the square root of their number for the others), of the median and of the worst
layer's weights. Times and peak memory are ratios to a plain forward and backward pass over the same images, run beside
each method in the same process. PyHessian (Hutchinson, one layer at a time) and curvlinops (Gauss-Newton products, one
layer at a time) take part where they are installed: pip install pyhessian curvlinops-for-pytorch. They measure weights
only.

The last table is the error of the arithmetic: exact sums in float32 and bfloat16 against float64.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import platform
import statistics
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import tracequant as tq
from data import data_folder
from tracequant.core.settings import TaskOptions
from tracequant.tasks.imagenet import DEVIATION, MEAN
from tracequant.tasks.registry import load_task

# Layer → its trace by every repetition; one value for each draw where draws are independent.
Traces = dict[str, list[float]]


def load(model: str, images: int) -> tuple[str, tq.TaskSetup]:
    """The setup to measure on, and its name."""
    if model != "resnet20":
        return load_large(model, images)
    folder = data_folder("cifar10", "cifar10_weights")
    if folder is None:
        return f"digits network, {images} images", load_task("digits", TaskOptions(samples=images))
    weights = str(folder / "cifar10_weights" / "resnet20.safetensors")
    options = TaskOptions(data_dir=str(folder / "cifar10"), weights=weights, samples=images)
    return f"ResNet20 on CIFAR-10, {images} images", load_task("cifar10", options)


def load_large(name: str, images: int) -> tuple[str, tq.TaskSetup]:
    """A torchvision network for 10 classes, on ImageNet pictures where they are at hand, else on noise."""
    import torchvision

    torch.manual_seed(0)
    size = 299 if name == "inception_v3" else 224
    extra = {"aux_logits": False, "init_weights": True} if name == "inception_v3" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **extra)
    pictures, kind = photographs(images, size)
    labels = torch.arange(images) % 10
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain mean, so that one pass gives the statistics
    with torch.no_grad():
        model.train()(pictures[:16])
    batch = min(8, images)
    batches = [(pictures[i : i + batch], labels[i : i + batch]) for i in range(0, images, batch)]
    setup = tq.TaskSetup(model.eval(), tq.ClassificationTask(), batches, batches, batches)
    return f"{name}, {images} {kind} of {size}x{size}, batches of {batch}", setup


def photographs(images: int, size: int) -> tuple[Tensor, str]:
    """Normalised pictures `[N, 3, size, size]` and what they are."""
    folder = data_folder("imagenet_train1000")
    if folder is None:
        return torch.randn(images, 3, size, size), "random images"
    from PIL import Image

    rows = []
    with zipfile.ZipFile(folder / "imagenet_train1000" / "images.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        for name in names[:: max(1, len(names) // images)][:images]:
            with archive.open(name) as file, Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB").resize((size, size)))
            rows.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    return (torch.stack(rows) - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), "ImageNet photographs"


def plain_pass(setup: tq.TaskSetup) -> None:
    """One forward and backward pass over all images, as training does it."""
    for batch in setup.calibration:
        setup.model.zero_grad()
        setup.task.loss(setup.task.outputs(setup.model, batch), batch).backward()
    setup.model.zero_grad()


def with_pyhessian(setup: tq.TaskSetup, layers: list[str], draws: int) -> Traces:
    """Traces by PyHessian as its users get them by layer: only one layer's weight requires a gradient at a time."""
    from pyhessian import hessian

    traces = {}
    torch.manual_seed(1)
    for name in layers:
        only(setup, name)
        traces[name] = hessian(setup.model, F.cross_entropy, dataloader=setup.calibration, cuda=False).trace(
            draws, tol=0
        )
    return traces


def with_curvlinops(setup: tq.TaskSetup, layers: list[str], draws: int) -> Traces:
    """Traces by curvlinops: Hutchinson's estimator on the Gauss-Newton operator of one layer at a time."""
    from curvlinops import GGNLinearOperator, hutchinson_trace

    traces = {}
    torch.manual_seed(1)
    data = [(images, labels) for images, labels in setup.calibration]
    for name in layers:
        weight = only(setup, name)
        operator = GGNLinearOperator(
            setup.model, torch.nn.CrossEntropyLoss(), [weight], data, check_deterministic=False
        )
        traces[name] = [float(hutchinson_trace(operator, 1)) for _ in range(draws)]
    return traces


def only(setup: tq.TaskSetup, name: str) -> torch.nn.Parameter:
    """The weight of a layer, now the only parameter that requires a gradient."""
    for parameter in setup.model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return setup.model.get_parameter(f"{name}.weight").requires_grad_(True)


def timed(function: Callable[[], Traces | None]) -> tuple[float, int, Traces | None]:
    """Seconds, bytes of memory at the peak beyond those before, and the result."""
    before = begin_peak()
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, end_peak() - before, result


def begin_peak() -> int:
    """Forget the peak of main memory, and return what is in use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what was freed, which would hide new use
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def end_peak() -> int:
    """Main memory at the peak since `begin_peak`, in bytes."""
    return status("VmHWM")


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def precision_errors(name: str, images: int) -> dict[str, dict[str, float]]:
    """Errors of exact sums in float32 and bfloat16 against float64, and their times against float32."""
    _, setup = load(name, images)
    batches = list(setup.calibration)

    def exact(precision: str) -> dict[str, float]:
        found = tq.estimate_curvature(
            setup.model, batches, setup.task, num_probes="exact", estimator="gauss_newton", precision=precision
        )
        return {n: trace.trace for n, trace in found.weights.items()}

    result, found = {}, {}
    for precision in ("float32", "bfloat16"):
        exact(precision)  # warm up
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            found[precision] = exact(precision)
            seconds.append(time.perf_counter() - start)
        result[precision] = {"time": statistics.median(seconds)}
    setup.model.double()
    batches = [(images.double(), labels) for images, labels in batches]
    truth = exact("float32")
    for precision, row in result.items():
        errors = [abs(found[precision][layer] / truth[layer] - 1) for layer in truth]
        row |= {"median": statistics.median(errors), "worst": max(errors)}
    base = result["float32"]["time"]
    for row in result.values():
        row["time"] /= base
    return result


def main() -> None:
    """Run all methods in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet20", choices=["resnet20", "resnet50", "inception_v3"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--num-probes", type=int, default=4, help="probes of Hutchinson's method for each batch")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of gauss_newton")
    parser.add_argument("--ours", action="store_true", help="leave out the other packages and Hutchinson's method")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name, setup = load(arguments.model, arguments.images)
    points = tq.discover(setup.model, setup.calibration, setup.task)

    data = (setup.model, setup.calibration, setup.task)

    def gauss_newton(draws: int | str, seed: int) -> Traces:
        found = tq.estimate_curvature(*data, estimator="gauss_newton", num_probes=draws, seed=seed, points=points)
        return {name: [trace.trace] for name, trace in found.weights.items()}

    def hutchinson(draws: int, probes: str) -> Traces:
        found = tq.estimate_curvature(
            *data, estimator="hutchinson", num_probes=draws, seed=1, points=points, probe_scope=probes
        ).weight_probes
        assert found is not None
        return {name: list(values) for name, values in found.items()}

    draws, layers = arguments.draws, [layer.name for layer in points.layers]
    # Label → (call by repetition, repetitions, draws in a value that is returned).
    methods: dict[str, tuple[Callable[[int], Traces], int, int]] = {
        "gauss_newton, exact": (lambda seed: gauss_newton("exact", seed), 1, 1),
        "gauss_newton, 1 draw": (lambda seed: gauss_newton(1, seed), arguments.seeds, 1),
        "gauss_newton, 2 draws": (lambda seed: gauss_newton(2, seed), arguments.seeds, 1),
        "gauss_newton, 4 draws": (lambda seed: gauss_newton(4, seed), arguments.seeds, 1),
    }
    if not arguments.ours:
        methods[f"hutchinson, shared, {draws} draws"] = (lambda seed: hutchinson(draws, "shared"), 1, draws)
        methods[f"hutchinson, per layer, {draws} draws"] = (lambda seed: hutchinson(draws, "per_layer"), 1, draws)
        for package, other in (("pyhessian", with_pyhessian), ("curvlinops", with_curvlinops)):
            if importlib.util.find_spec(package):
                label = f"{package}, per layer, {draws} draws"
                methods[label] = (lambda seed, other=other: other(setup, layers, draws), 1, draws)
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    plain_pass(setup)  # warm up
    plain_peak = max(timed(lambda: plain_pass(setup))[1] for _ in range(3))
    print(f"plain forward and backward pass: time 1.0, peak memory 1.0 ({plain_peak / 2**20:.0f} MB)\n")
    print(f"{'method':34s} {'time':>8s} {'memory':>8s} {'median error':>13s} {'worst':>8s}")
    truth: dict[str, float] = {}
    rows = []
    for label, (run, repeats, averaged) in methods.items():
        ratios, peak, values = [], 0, []
        for seed in range(repeats):
            # Beside every call plain passes of its own: the machine's speed drifts.
            before, _, _ = timed(lambda: plain_pass(setup))
            seconds, own_peak, traces = timed(lambda run=run, seed=seed: run(seed))
            after, _, _ = timed(lambda: plain_pass(setup))
            assert traces is not None
            ratios.append(2 * seconds / (before + after))
            peak = max(peak, own_peak)
            values.append(traces)
        truth = truth or {layer: row[0] for layer, row in values[0].items()}
        errors = [
            (statistics.fmean((v / truth[layer] - 1) ** 2 for found in values for v in found[layer]) / averaged) ** 0.5
            for layer in truth
        ]
        row = {
            "method": label,
            "time": statistics.median(ratios),
            "memory": peak / plain_peak,
            "median": statistics.median(errors),
            "worst": max(errors),
        }
        rows.append(row)
        print(
            f"{label:34s} {row['time']:8.1f} {row['memory']:8.2f} {row['median']:13.2%} {row['worst']:8.2%}", flush=True
        )
    if not arguments.ours:
        print("\ntime to the median error of gauss_newton with 1 draw, as a multiple of its own:")
        fast = rows[1]
        for row in rows[4:]:
            # The error falls with the square root of the draws, so that work grows with its square.
            row["multiple"] = row["time"] / fast["time"] * (row["median"] / fast["median"]) ** 2
            print(f"{row['method']:34s} {row['multiple']:12,.0f}")
    document = {"name": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    if arguments.model == "resnet20":
        document["precision"] = precision_errors(arguments.model, arguments.images)
        print("\narithmetic of an exact sum, against float64:")
        for precision, row in document["precision"].items():
            print(f"{precision:34s} {row['time']:8.2f} {'':8s} {row['median']:13.1e} {row['worst']:8.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
