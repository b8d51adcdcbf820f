"""Time of allocation against the number of layers: one budget and the whole frontier exactly, and Appendix E's search.

    python benchmarks/allocation.py [--networks ResNet50 ResNet152 x1000 ...]

Networks are ResNets of bottleneck blocks with the real shapes of their convolutions, ResNet50's, 101's and 152's (156
layers with its 4 downsampling convolutions and the classifier) and deeper ones. Average traces are log-normal, one
standard deviation being a factor of ten; perturbations fall fourfold with every bit. Weights have the choice of 1 to 8
bits, activations that of 4, 6 and 8 where BOPs are limited. Budgets lie half way between all layers at 2 and all at 4
bits. The loss of Appendix E (a = 5, b = 200, t = 5) is by how much its Ω is above the optimum, at that budget and over
all of its plans. Results go to benchmarks/results/allocation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import tracequant as tq
from tracequant.core import cost
from tracequant.core.points import ActivationPoint, Layer, QuantizationPoints, StoredTensor
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.weight_grid import WeightGrid

# Bottleneck blocks in each of the four stages; the last one is a network of 999 layers.
NETWORKS: dict[str, tuple[int, int, int, int]] = {
    "ResNet50": (3, 4, 6, 3),
    "ResNet101": (3, 4, 23, 3),
    "ResNet152": (3, 8, 36, 3),
    "x250": (3, 8, 67, 3),
    "x500": (6, 16, 137, 6),
    "x1000": (12, 32, 275, 12),
}
WEIGHT_BITS = tuple(range(1, 9))
ACTIVATION_BITS = (4, 6, 8)


def network(blocks: tuple[int, int, int, int], seed: int = 0) -> Sensitivity:
    """Sensitivities of a bottleneck ResNet for 224 x 224 images; the first block's two readers share their input."""
    rng = random.Random(seed)
    layers: list[Layer] = []
    points: list[ActivationPoint] = []

    def add(name: str, shape: tuple[int, ...], resolution: int, point: str) -> None:
        macs = int(np.prod(shape)) * resolution * resolution
        layers.append(Layer(name, "Conv2d", ((name, "weight"),), shape, 0, macs, point))

    def read(consumers: tuple[str, ...], numel: int, first: bool = False) -> str:
        points.append(ActivationPoint(consumers[0], consumers, float(numel), first))
        return consumers[0]

    add("conv1", (64, 3, 7, 7), 112, read(("conv1",), 3 * 224 * 224, True))
    channels = 64
    for stage, count in enumerate(blocks):
        width, out = 64 << stage, 56 >> stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            size = out * 2 if block == 0 and stage > 0 else out
            downsample = (f"{name}.downsample.0",) if block == 0 else ()
            shared = read((f"{name}.conv1", *downsample), channels * size * size)
            add(f"{name}.conv1", (width, channels, 1, 1), size, shared)
            add(f"{name}.conv2", (width, width, 3, 3), out, read((f"{name}.conv2",), width * size * size))
            add(f"{name}.conv3", (4 * width, width, 1, 1), out, read((f"{name}.conv3",), width * out * out))
            if downsample:
                add(downsample[0], (4 * width, channels, 1, 1), out, shared)
            channels = 4 * width
    add("fc", (1000, channels), 1, read(("fc",), channels))
    traces = {layer.name: 10 ** rng.gauss(-2, 1) for layer in layers}
    inputs = {point.name: 10 ** rng.gauss(-5, 1) for point in points}
    weight_errors = {
        n.name: {b: n.numel * 1e-3 * 4.0**-b * rng.uniform(0.8, 1.25) for b in WEIGHT_BITS} for n in layers
    }
    activation_errors = {
        point.name: {
            b: point.numel * 4.0**-b * rng.uniform(0.8, 1.25)
            for b in ((8,) if point.is_model_input else ACTIVATION_BITS)
        }
        for point in points
    }
    return Sensitivity(
        points=QuantizationPoints(
            layers=tuple(layers),
            activations=tuple(points),
            ties=(),
            float_tensors=tuple(StoredTensor(f"{layer.name}.bn", "F32", (4 * layer.shape[0],)) for layer in layers),
            fingerprint="benchmark",
        ),
        weight_omega={n: {b: traces[n] * e for b, e in options.items()} for n, options in weight_errors.items()},
        activation_omega={n: {b: inputs[n] * e for b, e in o.items()} for n, o in activation_errors.items()},
        weight_errors=weight_errors,
        activation_errors=activation_errors,
        average_traces=traces,
        weight_grid=WeightGrid(),
        criterion="trace",
    )


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def measure(name: str) -> dict[str, Any]:
    sensitivity = network(NETWORKS[name])
    points = sensitivity.points
    low, high = tq.uniform_plan(sensitivity, 2), tq.uniform_plan(sensitivity, 4)
    size = (low.size_mib + high.size_mib) / 2
    bops = (
        sum(cost.bit_operations(points, p.weight_bits, dict.fromkeys(p.activation_bits, 6)) for p in (low, high)) / 2e9
    )
    plan, plan_s = timed(lambda: tq.solve(sensitivity, max_size_mib=size))
    by_bops, bops_s = timed(lambda: tq.solve(sensitivity, max_bops_g=bops))
    joint, joint_s = timed(lambda: tq.solve(sensitivity, max_size_mib=1.1 * size, max_bops_g=1.1 * bops))
    front, front_s = timed(lambda: tq.frontier(sensitivity))
    found, found_s = timed(lambda: tq.solve(sensitivity, max_size_mib=size, solver="pareto"))
    search, search_s = timed(lambda: tq.frontier(sensitivity, solver="pareto"))
    best = front.omega[np.searchsorted(front.size_bytes, search.size_bytes, side="right") - 1]
    excess = (search.omega / best - 1) * 100
    return {
        "network": name,
        "layers": len(points.layers),
        "weights": sum(layer.numel for layer in points.layers),
        "size_budget_s": plan_s,
        "bops_budget_s": bops_s,
        "size_and_bops_budget_s": joint_s,
        "gaps": [plan.gap, by_bops.gap, joint.gap],
        "exact_frontier_s": front_s,
        "exact_frontier_plans": len(front),
        "appendix_e_budget_s": found_s,
        "appendix_e_frontier_s": search_s,
        "appendix_e_plans": len(search),
        "appendix_e_loss_at_budget_percent": (found.omega / plan.omega - 1) * 100,
        "appendix_e_loss_median_percent": float(np.median(excess)),
        "appendix_e_loss_worst_percent": float(excess.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    arguments = parser.parse_args()
    tq.solve(network((1, 1, 1, 1)), average_bits=3)  # imports are not what is measured
    rows = []
    print("seconds; weights 1-8 bits, activations 4, 6, 8 bits in the BOPs problems")
    print("network    layers    size    BOPs  size+BOPs  frontier   plans | App. E  loss at budget  median  worst %")
    for name in arguments.networks:
        row = measure(name)
        rows.append(row)
        print(
            f"{name:10} {row['layers']:6} {row['size_budget_s']:7.2f} {row['bops_budget_s']:7.2f}"
            f" {row['size_and_bops_budget_s']:10.2f} {row['exact_frontier_s']:9.2f} {row['exact_frontier_plans']:7}"
            f" | {row['appendix_e_budget_s']:6.2f} {row['appendix_e_loss_at_budget_percent']:15.2f}"
            f" {row['appendix_e_loss_median_percent']:7.2f} {row['appendix_e_loss_worst_percent']:6.1f}",
            flush=True,
        )
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "allocation.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
