"""How fast the traces converge with the number of images and of draws (the paper's Figures 5 and 8, right).

    python benchmarks/convergence.py [--pool 512] [--images 64] [--num-probes 8] [--out FOLDER]

ResNet20 on CIFAR-10 where TRACEQUANT_DATA holds it, else the digits network. Errors are relative, of the median layer.

Images: the exact traces of `--pool` images are the reference; the error of n of them is the root mean square over 200
random choices. Draws: both estimators on the same `--images`, against the exact sum over classes on these images.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

import tracequant as tq
from curvature import load

Values = dict[str, tuple[float, ...]]
Curve = tuple[list[int], list[float]]


def matrix(values: Values | None) -> NDArray[np.float64]:
    """Rows by layer, columns by sample or draw."""
    assert values is not None
    return np.array(list(values.values()))


def by_images(values: Values | None, counts: list[int]) -> Curve:
    """Error of n images against all of them."""
    table = matrix(values)
    truth = table.mean(1)
    random = np.random.default_rng(0)
    errors = []
    for count in counts:
        chosen = [random.choice(table.shape[1], count, replace=False) for _ in range(200)]
        means = np.array([table[:, own].mean(1) for own in chosen])
        errors.append(float(np.median(np.sqrt((((means - truth) / truth) ** 2).mean(0)))))
    return counts, errors


def by_draws(values: Values | None, truth: dict[str, tq.TraceEstimate]) -> Curve:
    """Error of the first d draws: of all groups of d successive draws, the root mean square."""
    assert values is not None
    table = np.array([np.array(row) / truth[name].trace - 1 for name, row in values.items() if truth[name].trace])
    counts = [d for d in (1, 2, 4, 8, 16, 32, 64) if d <= table.shape[1]]
    errors = []
    for count in counts:
        groups = table[:, : table.shape[1] // count * count].reshape(len(table), -1, count).mean(2)
        errors.append(float(np.median(np.sqrt((groups**2).mean(1)))))
    return counts, errors


def main() -> None:
    """Measure, print the tables, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", type=int, default=512)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--num-probes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    curves: dict[str, dict[str, Curve]] = {}
    name, setup = load("resnet20", arguments.pool)
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    pool = tq.estimate_curvature(
        setup.model, setup.calibration, setup.task, estimator="gauss_newton", num_probes="exact"
    )
    counts = [n for n in (16, 32, 64, 128, 256, 512, 1024) if n < pool.samples]
    curves["images"] = {
        "weights": by_images(pool.weight_values, counts),
        "activations": by_images(pool.activation_values, counts),
    }
    name, setup = load("resnet20", arguments.images)
    data = (setup.model, setup.calibration, setup.task)
    truth = tq.estimate_curvature(*data, estimator="gauss_newton", num_probes="exact")
    methods = {
        "gauss_newton": tq.estimate_curvature(*data, estimator="gauss_newton", num_probes=arguments.draws),
        "hutchinson, per layer": tq.estimate_curvature(*data, estimator="hutchinson", num_probes=arguments.draws),
        "hutchinson, shared": tq.estimate_curvature(
            *data, estimator="hutchinson", num_probes=arguments.draws, probe_scope="shared"
        ),
    }
    for family in ("weights", "activations"):
        curves[f"draws, {family}"] = {
            label: by_draws(
                found.weight_probes if family == "weights" else found.activation_probes, getattr(truth, family)
            )
            for label, found in methods.items()
        }
    for title, group in curves.items():
        counts = next(iter(group.values()))[0]
        print(f"\nmedian relative error by {title}\n{'':24s}" + "".join(f"{count:9d}" for count in counts))
        for label, (_, errors) in group.items():
            print(f"{label:24s}" + "".join(f"{error:9.1%}" for error in errors))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        for label, (counts, errors) in group.items():
            axes.loglog(counts, errors, "o-", markersize=4, label=label)
        ticks = next(iter(group.values()))[0]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(title)
        axes.set_ylabel("relative error, median layer")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "convergence.png", dpi=110)


if __name__ == "__main__":
    main()
