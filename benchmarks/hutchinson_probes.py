"""Hutchinson's options: a shared probe or one per layer, and products by reverse or forward mode.

    python benchmarks/hutchinson_probes.py

Time to a relative error r is (seconds per draw) · (error of one draw / r)², so seconds · error² decides. Both ways are
run in turn in one process; the error of one draw is that of the median layer. ResNet20 on CIFAR-10 is added where
TRACEQUANT_DATA holds it.
"""

from __future__ import annotations

import platform
import statistics
import time

import torch

import tracequant as tq
from data import data_folder
from tracequant.core.settings import TaskOptions
from tracequant.curvature.hutchinson import Probes
from tracequant.tasks.registry import load_task


def measure(name: str, setup: tq.TaskSetup, draws: int) -> None:
    """Print seconds per draw, error per draw and their product for both kinds of probe."""
    points = tq.discover(setup.model, setup.calibration, setup.task)
    work: dict[Probes, float] = {}
    print(f"\n{name}: {len(points.layers)} layers")
    for probes in ("shared", "per_layer"):
        start = time.perf_counter()
        curvature = tq.estimate_curvature(
            setup.model,
            setup.calibration,
            setup.task,
            estimator="hutchinson",
            num_probes=draws,
            points=points,
            probe_scope=probes,
        )
        seconds = (time.perf_counter() - start) / draws
        error = statistics.median(e.relative_error for e in curvature.weights.values()) * draws**0.5
        work[probes] = seconds * error**2
        print(f"  {probes:10s} {seconds:8.3f} s per draw, relative error of one draw {error:6.2f} (median layer)")
    seconds_of = {}
    for mode in ("reverse", "forward"):
        start = time.perf_counter()
        tq.estimate_curvature(
            setup.model,
            setup.calibration,
            setup.task,
            estimator="hutchinson",
            num_probes=2,
            points=points,
            mode=mode,
            activations=False,
        )
        seconds_of[mode] = time.perf_counter() - start
    print(f"  a product by forward mode takes {seconds_of['forward'] / seconds_of['reverse']:.1f} times as long")
    ratio = work["shared"] / work["per_layer"]
    print(f"  to the same error a shared probe takes {ratio:.1f} times as long as probes per layer")


def main() -> None:
    """Measure on the digits network and, where the data is at hand, on ResNet20."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    measure("digits, 256 images", load_task("digits", TaskOptions(samples=256)), draws=64)
    folder = data_folder("cifar10", "cifar10_weights")
    if folder is None:
        print("\nResNet20/CIFAR-10 skipped: TRACEQUANT_DATA does not hold cifar10 and cifar10_weights")
        return
    options = TaskOptions(
        data_dir=str(folder / "cifar10"), weights=str(folder / "cifar10_weights" / "resnet20.safetensors"), samples=64
    )
    measure("ResNet20/CIFAR-10, 64 images", load_task("cifar10", options), draws=16)


if __name__ == "__main__":
    main()
