"""Time, memory and error of the estimators of Hessian traces, side by side on one model and one set of images.

    python benchmarks/curvature.py [--model resnet20] [--images 128] [--draws 4] [--json FILE]

Models: resnet20 (trained, CIFAR-10; the digits network where TRACEQUANT_DATA does not hold them), resnet50 and
inception_v3 (torchvision's, 224² and 299², 10 classes so that an exact reference can be had, weights at random with
BatchNorm's statistics taken from the images). Every method measures all layers; ours measure the activations as well.

Errors are those of the weights' traces against the exact sum over classes on the same images, the median and the worst
over layers. Times and peak memory are ratios to a plain forward and backward pass over the same images, run in the same
process. PyHessian (Hutchinson, one layer at a time) and curvlinops (Gauss-Newton products, one layer at a time) take
part where they are installed: pip install pyhessian curvlinops-for-pytorch. They measure weights only.

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
from tracequant.settings import TaskOptions
from tracequant.tasks import load_task

Traces = dict[str, float]


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
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.stack(rows) - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), "ImageNet photographs"


def plain_pass(setup: tq.TaskSetup) -> None:
    """One forward and backward pass over all images, as training does it."""
    for batch in setup.calibration:
        setup.model.zero_grad()
        setup.task.loss(setup.task.outputs(setup.model, batch), batch).backward()
    setup.model.zero_grad()


def with_pyhessian(setup: tq.TaskSetup, layers: list[str], draws: int) -> dict[str, float]:
    """Traces by PyHessian as its users get them by layer: only one layer's weight requires a gradient at a time."""
    from pyhessian import hessian

    traces = {}
    torch.manual_seed(1)
    for name in layers:
        only(setup, name)
        values = hessian(setup.model, F.cross_entropy, dataloader=setup.calibration, cuda=False).trace(draws, tol=0)
        traces[name] = statistics.fmean(values)
    return traces


def with_curvlinops(setup: tq.TaskSetup, layers: list[str], draws: int) -> dict[str, float]:
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
        traces[name] = float(hutchinson_trace(operator, draws))
    return traces


def only(setup: tq.TaskSetup, name: str) -> torch.nn.Parameter:
    """The weight of a layer, now the only parameter that requires a gradient."""
    for parameter in setup.model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return setup.model.get_parameter(f"{name}.weight").requires_grad_(True)


def timed(function: Callable[[], Traces | None], repeats: int) -> tuple[float, int, Traces | None]:
    """Median seconds over `repeats` calls, bytes of memory at the peak beyond those before, and the last result."""
    seconds, peak = [], 0
    for _ in range(repeats):
        before = begin_peak()
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
        peak = max(peak, end_peak() - before)
    return statistics.median(seconds), peak, result


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

    def exact(double: bool, precision: str) -> tuple[float, Traces]:
        _, setup = load(name, images)
        model, batches = setup.model, list(setup.calibration)
        if double:
            model, batches = model.double(), [(x.double(), y) for x, y in batches]
        start = time.perf_counter()
        found = tq.estimate_curvature(
            model, batches, setup.task, method="gauss_newton", draws="exact", precision=precision
        )
        return time.perf_counter() - start, {n: trace.trace for n, trace in found.weights.items()}

    _, truth = exact(True, "float32")
    result, plain = {}, 0.0
    for precision in ("float32", "bfloat16"):
        seconds, traces = exact(False, precision)
        plain = plain or seconds
        errors = [abs(traces[layer] / truth[layer] - 1) for layer in truth]
        result[precision] = {"median": statistics.median(errors), "worst": max(errors), "time": seconds / plain}
    return result


def main() -> None:
    """Run all methods in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet20", choices=["resnet20", "resnet50", "inception_v3"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--draws", type=int, default=4, help="probes of Hutchinson's method for each batch")
    parser.add_argument("--ours", action="store_true", help="leave out the other packages and Hutchinson's method")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name, setup = load(arguments.model, arguments.images)
    points = tq.discover(setup.model, setup.calibration, setup.task)

    def estimate(method: str, draws: int | str, **options: str) -> Callable[[], Traces]:
        def run() -> Traces:
            curvature = tq.estimate_curvature(
                setup.model, setup.calibration, setup.task, method=method, draws=draws, points=points, seed=1, **options
            )
            return {name: trace.trace for name, trace in curvature.weights.items()}

        return run

    plain_pass(setup)  # warm up
    methods = {
        "gauss_newton, exact": (estimate("gauss_newton", "exact"), 1),
        "gauss_newton, 1 draw": (estimate("gauss_newton", 1), 3),
        "gauss_newton, 2 draws": (estimate("gauss_newton", 2), 3),
        "gauss_newton, 8 draws": (estimate("gauss_newton", 8), 1),
    }
    layers = [layer.name for layer in points.layers]
    if not arguments.ours:
        draws = arguments.draws
        methods[f"hutchinson, shared, {draws} draws"] = (estimate("hutchinson", draws, probes="shared"), 1)
        methods[f"hutchinson, per layer, {draws} draws"] = (estimate("hutchinson", draws), 1)
        for package, other in (("pyhessian", with_pyhessian), ("curvlinops", with_curvlinops)):
            if importlib.util.find_spec(package):
                label = f"{package}, per layer, {draws} draws"
                methods[label] = (lambda other=other: other(setup, layers, draws), 1)
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    _, plain_peak, _ = timed(lambda: plain_pass(setup), 5)
    print(f"plain forward and backward pass: time 1.0, peak memory 1.0 ({plain_peak / 2**20:.0f} MB)\n")
    print(f"{'method':34s} {'time':>8s} {'memory':>8s} {'median error':>13s} {'worst':>8s}")
    truth: Traces = {}
    rows = []
    for label, (run, repeats) in methods.items():
        # Beside every method a plain pass of its own: the machine's speed drifts.
        before, _, _ = timed(lambda: plain_pass(setup), 3)
        seconds, peak, traces = timed(run, repeats)
        after, _, _ = timed(lambda: plain_pass(setup), 3)
        assert traces is not None
        truth = truth or traces
        errors = [abs(traces[layer] / truth[layer] - 1) for layer in truth]
        row = {
            "method": label,
            "time": 2 * seconds / (before + after),
            "memory": peak / plain_peak,
            "median": statistics.median(errors),
            "worst": max(errors),
        }
        rows.append(row)
        print(
            f"{label:34s} {row['time']:8.1f} {row['memory']:8.2f} {row['median']:13.1%} {row['worst']:8.1%}", flush=True
        )
    if not arguments.ours:
        print("\ntime to the median error of gauss_newton with 2 draws, as a multiple of its own:")
        fast = rows[2]
        for row in rows[4:]:
            # The error falls with the square root of the draws, so that work grows with its square.
            row["multiple"] = row["time"] / fast["time"] * (row["median"] / fast["median"]) ** 2
            print(f"{row['method']:34s} {row['multiple']:8.0f}")
    document = {"name": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    if arguments.model == "resnet20":
        document["precision"] = precision_errors(arguments.model, arguments.images)
        print("\narithmetic of an exact sum, against float64:")
        for precision, row in document["precision"].items():
            print(f"{precision:34s} {row['time']:8.1f} {'':8s} {row['median']:13.1e} {row['worst']:8.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
