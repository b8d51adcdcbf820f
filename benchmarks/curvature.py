"""Time and error of the estimators of Hessian traces, side by side on one model and one set of images.

    python benchmarks/curvature.py [--images 128] [--draws 4] [--json FILE]

ResNet20 on CIFAR-10 where TRACEQUANT_DATA holds it, else the digits network. Every method measures all layers, weights
and activations. Errors are those of the weights' traces against the exact sum over classes on the same images, the
median over layers; times are ratios to a plain forward and backward pass over the same images, run in the same process.
PyHessian (Hutchinson, one layer at a time) and curvlinops (Gauss-Newton products, one layer at a time) take part where
they are installed: pip install pyhessian curvlinops-for-pytorch. They measure weights only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import tracequant as tq
from data import data_folder
from tracequant.settings import TaskOptions
from tracequant.tasks import load_task


def load(images: int) -> tuple[str, tq.TaskSetup]:
    """The setup to measure on, and its name."""
    folder = data_folder("cifar10", "cifar10_weights")
    if folder is None:
        return f"digits network, {images} images", load_task("digits", TaskOptions(samples=images))
    weights = str(folder / "cifar10_weights" / "resnet20.safetensors")
    options = TaskOptions(data_dir=str(folder / "cifar10"), weights=weights, samples=images)
    return f"ResNet20 on CIFAR-10, {images} images", load_task("cifar10", options)


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


def timed(function: Callable[[], dict[str, float] | None], repeats: int) -> tuple[float, dict[str, float] | None]:
    """Median seconds over `repeats` calls, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def main() -> None:
    """Run all methods in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--draws", type=int, default=4, help="probes of Hutchinson's method for each batch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name, setup = load(arguments.images)
    points = tq.discover(setup.model, setup.calibration, setup.task)

    def estimate(method: str, draws: int | str, **options: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            curvature = tq.estimate_curvature(
                setup.model, setup.calibration, setup.task, method=method, draws=draws, points=points, seed=1, **options
            )
            return {name: trace.trace for name, trace in curvature.weights.items()}

        return run

    plain_pass(setup)  # warm up
    plain, _ = timed(lambda: plain_pass(setup), 5)
    methods = {
        "gauss_newton, exact": (estimate("gauss_newton", "exact"), 1),
        "gauss_newton, 1 draw": (estimate("gauss_newton", 1), 5),
        "gauss_newton, 2 draws": (estimate("gauss_newton", 2), 5),
        f"hutchinson, shared, {arguments.draws} draws": (estimate("hutchinson", arguments.draws, probes="shared"), 1),
        f"hutchinson, per layer, {arguments.draws} draws": (estimate("hutchinson", arguments.draws), 1),
    }
    layers = [layer.name for layer in points.layers]
    for package, other in (("pyhessian", with_pyhessian), ("curvlinops", with_curvlinops)):
        if importlib.util.find_spec(package):
            label = f"{package}, per layer, {arguments.draws} draws"
            methods[label] = (lambda other=other: other(setup, layers, arguments.draws), 1)
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"plain forward and backward pass: 1.0\n\n{'method':34s} {'time':>8s} {'median error':>13s} {'worst':>8s}")
    truth: dict[str, float] = {}
    rows = []
    for label, (run, repeats) in methods.items():
        seconds, traces = timed(run, repeats)
        assert traces is not None
        truth = truth or traces
        errors = [abs(traces[layer] / truth[layer] - 1) for layer in truth]
        row = {"method": label, "ratio": seconds / plain, "median": statistics.median(errors), "worst": max(errors)}
        rows.append(row)
        print(f"{label:34s} {row['ratio']:8.1f} {row['median']:13.1%} {row['worst']:8.1%}")
    print("\ntime to the median error of gauss_newton with 2 draws, as a multiple of its own:")
    fast = rows[2]
    for row in rows[3:]:
        # The error falls with the square root of the draws, so that work grows with its square.
        row["multiple"] = row["ratio"] / fast["ratio"] * (row["median"] / fast["median"]) ** 2
        print(f"{row['method']:34s} {row['multiple']:8.0f}")
    if arguments.json:
        document = {"name": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
