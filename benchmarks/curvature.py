"""Time and error of the estimators of Hessian traces, side by side on one model and one set of images.

    python benchmarks/curvature.py [--images 256] [--draws 4] [--json FILE]

ResNet20 on CIFAR-10 where TRACEQUANT_DATA holds it, else the digits network. Every method measures all layers, weights
and activations. Errors are those of the weights' traces against the exact sum over classes on the same images, the
median over layers; times are ratios to a plain forward and backward pass over the same images, run in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

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


def timed(function: Callable[[], tq.Curvature | None], repeats: int) -> tuple[float, tq.Curvature | None]:
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
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--draws", type=int, default=4, help="probes of Hutchinson's method for each batch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name, setup = load(arguments.images)
    points = tq.discover(setup.model, setup.calibration, setup.task)

    def estimate(method: str, draws: int | str, **options: str) -> Callable[[], tq.Curvature]:
        return lambda: tq.estimate_curvature(
            setup.model, setup.calibration, setup.task, method=method, draws=draws, points=points, seed=1, **options
        )

    plain_pass(setup)  # warm up
    plain, _ = timed(lambda: plain_pass(setup), 5)
    methods = {
        "gauss_newton, exact": (estimate("gauss_newton", "exact"), 1),
        "gauss_newton, 1 draw": (estimate("gauss_newton", 1), 5),
        "gauss_newton, 2 draws": (estimate("gauss_newton", 2), 5),
        f"hutchinson, shared, {arguments.draws} draws": (estimate("hutchinson", arguments.draws, probes="shared"), 1),
        f"hutchinson, per layer, {arguments.draws} draws": (estimate("hutchinson", arguments.draws), 1),
    }
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"plain forward and backward pass: 1.0\n\n{'method':34s} {'time':>8s} {'median error':>13s} {'worst':>8s}")
    truth: dict[str, float] = {}
    rows = []
    for label, (run, repeats) in methods.items():
        seconds, curvature = timed(run, repeats)
        assert curvature is not None
        traces = {layer: estimate.trace for layer, estimate in curvature.weights.items()}
        truth = truth or traces
        errors = [abs(traces[layer] / truth[layer] - 1) for layer in truth]
        row = {"method": label, "ratio": seconds / plain, "median": statistics.median(errors), "worst": max(errors)}
        rows.append(row)
        print(f"{label:34s} {row['ratio']:8.1f} {row['median']:13.1%} {row['worst']:8.1%}")
    fast, slow = rows[1], rows[-1]
    # Hutchinson's error falls with the square root of the draws, so that much more work would bring it to the same.
    factor = slow["ratio"] / fast["ratio"] * (slow["median"] / fast["median"]) ** 2
    print(f"\nto the median error of one gauss_newton draw, hutchinson per layer takes {factor:.0f} times as long")
    if arguments.json:
        document = {"name": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        arguments.json.write_text(json.dumps(document | {"hutchinson_over_gauss_newton": factor}, indent=1) + "\n")


if __name__ == "__main__":
    main()
