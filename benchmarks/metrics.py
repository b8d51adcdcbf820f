"""Which metric ranks quantized models best, and which makes the best plans: ResNet20 on CIFAR-10.

    python benchmarks/metrics.py [--images 1024] [--plans 80] [--test-images 1000] [--cache DIR]

Part 1: Spearman's rank correlation of every metric, measured on the first training images, with the measured change of
the loss on test images, one layer at a time at 2, 3, 4 and 8 bits, and for whole plans near the frontiers over
{3, 4, 8} and {2, 3}; weights per channel, compensated on the training images, activations in float, traces and
expansions by the exact sum over classes. Over {2, 3}, where an expansion fails, other forms are tried as well: sums of
measured changes, sums that are damped or clipped, values fitted on half of the plans and tested on the other half.

Part 2, the ablations of the paper's Tables 3 and 5: plans of equal size by every metric, weights 12 times smaller and
activations at 8 bits, calibrated and not fine-tuned, on test images, for three draws of calibration images, beside 20
random plans of the same size.

Results go to benchmarks/results/metrics.json. With --cache everything that was measured is kept there and not measured
again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cross_terms
import tracequant as tq
from ablation_metrics import ABLATION_METRICS, plan_by
from data import data_folder
from tracequant.core.evaluations import PlanCheck, plan_group, spearman
from tracequant.core.plan import reprice
from tracequant.core.settings import PlanSettings, TaskOptions
from tracequant.measure.accuracy import Evaluator
from tracequant.measure.sensitivity import with_eigenvalues
from tracequant.tasks.registry import load_task

WIDTHS = (2, 3, 4, 8)
GROUPS = ((3, 4, 8), (2, 3))
COMPRESSION = 12.0
CALIBRATION_IMAGES = 256
SEEDS = (0, 1, 2)
RANDOM_PLANS = 20
# The paper's rounding.
NEAREST = tq.WeightGrid(rounding="nearest")


def kept(cache: Path | None, name: str, kind: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, read from the cache where it is there."""
    path = None if cache is None else cache / f"{name}.json"
    if path is not None and path.is_file():
        return kind.load(path)
    found = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return found


def correlations(
    setup: tq.TaskSetup, images: int, plans: int, test_images: int, cache: Path | None
) -> tuple[tq.Check, tq.Perturbation]:
    """The self-check on test images of metrics that are measured on the calibration images."""
    points = tq.discover(setup.model, setup.calibration, setup.task)
    data = (setup.model, setup.calibration, setup.task)
    perturbation = kept(
        cache,
        f"perturbation-{images}",
        tq.Perturbation,
        lambda: tq.measure_perturbation(*data, points, weight_bits=WIDTHS, weight_grid=NEAREST),
    )
    curvature = kept(
        cache,
        f"curvature-{images}",
        tq.Curvature,
        lambda: tq.estimate_curvature(
            *data, estimator="gauss_newton", num_probes="exact", points=points, activations=False
        ),
    )
    check = tq.check_criteria(
        setup.model,
        setup.calibration,
        setup.task,
        curvature,
        held_out=first(setup.evaluation, test_images),
        weight_bits=WIDTHS,
        weight_grid=NEAREST,
        perturbation=perturbation,
        plans=plans,
        offered=GROUPS,
        cache=None if cache is None else cache / "check",
        extra_scores=cross_terms.scores(perturbation),
    )
    return check, perturbation


def other_forms(check: tq.Check, group: tuple[int, ...]) -> dict[str, float]:
    """Correlations of further forms over the plans of a group."""
    plans = [plan for plan in check.plans if plan.offered == group]
    changes = [plan.loss_change for plan in plans]
    value = {(row.layer, row.num_bits): row for row in check.layers}

    def summed(of: Callable[[float], float], name: str | None) -> float:
        def one(layer: str, bits: int) -> float:
            row = value[layer, bits]
            return of(row.loss_change if name is None else row.scores[name])

        return spearman([math.fsum(one(*option) for option in plan.weight_bits.items()) for plan in plans], changes)

    found = {}
    for label, name in (("measured", None), ("trace", "trace"), ("first+quadratic", "first+quadratic")):
        sizes = [abs(row.loss_change if name is None else row.scores[name]) for row in check.layers if
                 row.num_bits in group]  # fmt: skip
        middle = statistics.median(sizes)
        found[f"{label}, square root"] = summed(lambda x: math.copysign(math.sqrt(abs(x)), x), name)
        found[f"{label}, log(1 + x / median)"] = summed(lambda x, m=middle: math.log1p(max(x, 0) / m), name)
        for cap in (1, 3, 10):
            found[f"{label}, clipped at {cap} medians"] = summed(lambda x, c=cap * middle: min(x, c), name)
    for few in (20, 40):
        found[f"fitted on {few} plans"] = fitted(plans, check, few)
    return found


def fitted(plans: list[PlanCheck], check: tq.Check, few: int) -> float:
    """Median correlation over 20 divisions: the log of the loss as a sum over options, ridge, tested on the others.

    The fit starts from the measured changes of single layers, by a common factor, and corrects each option.
    """
    options = sorted({option for plan in plans for option in plan.weight_bits.items()})
    row = {option: i for i, option in enumerate(options)}
    alone = {(r.layer, r.num_bits): max(r.loss_change, 0.0) for r in check.layers}
    design = np.zeros((len(plans), len(options)))
    for n, plan in enumerate(plans):
        design[n, [row[option] for option in plan.weight_bits.items()]] = 1.0
    start = np.log(np.maximum([math.fsum(alone[o] for o in plan.weight_bits.items()) for plan in plans], 1e-12))
    target = np.log(np.maximum([plan.loss_change for plan in plans], 1e-12))
    found = []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(plans))
        known, rest = order[:few], order[few:]
        slope, shift = np.polyfit(start[known], target[known], 1)
        residual = target[known] - slope * start[known] - shift
        a = design[known]
        correction = a.T @ np.linalg.solve(a @ a.T + 4.0 * np.eye(few), residual)
        predicted = slope * start[rest] + shift + design[rest] @ correction
        found.append(spearman(predicted.tolist(), target[rest].tolist()))
    return statistics.median(found)


def ablation(setup: tq.TaskSetup, test_images: int, cache: Path | None) -> dict[str, Any]:
    """Accuracy of plans of equal size by each metric, for several draws of calibration images."""
    pool = list(setup.calibration)
    images, labels = torch.cat([x for x, _ in pool]), torch.cat([y for _, y in pool])
    evaluation = first(setup.evaluation, test_images)
    rows: dict[str, list[dict[str, Any]]] = {metric: [] for metric in ABLATION_METRICS}
    rows["random plan"] = []
    for seed in SEEDS:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]
        batches = [(images[part], labels[part]) for part in chosen.split(128)]
        data = (setup.model, batches, setup.task)
        points = tq.discover(*data)
        curvature = kept(
            cache, f"curvature-seed{seed}", tq.Curvature,
            lambda data=data, points=points: with_eigenvalues(
                setup.model, [(data[1][0][0][:64], data[1][0][1][:64])], setup.task,
                tq.estimate_curvature(*data, estimator="gauss_newton", num_probes="exact", points=points),
            ),
        )  # fmt: skip
        perturbation = kept(
            cache, f"perturbation-seed{seed}", tq.Perturbation,
            lambda data=data, points=points: tq.measure_perturbation(
                *data, points, weight_bits=WIDTHS, weight_grid=NEAREST
            ),
        )  # fmt: skip
        table = kept(
            cache, f"sensitivity-seed{seed}", tq.Sensitivity,
            lambda data=data, c=curvature: tq.measure_sensitivity(
                setup.model, data[1], setup.task, c, weight_bits=WIDTHS, weight_grid=NEAREST, activation_bits=(8,),
                criterion="trace",
            ),
        )  # fmt: skip
        evaluator = Evaluator(
            setup.model,
            batches,
            setup.task,
            evaluation=evaluation,
            cache=None if cache is None else cache / f"evaluations-{seed}.json",
        )

        def measured(plan: tq.BitPlan, evaluator: Evaluator = evaluator) -> dict[str, Any]:
            row = evaluator.of(plan)
            return {
                "metric": row.metric, "loss": row.loss, "compression": plan.compression, "size_bytes": plan.size_bytes,
                "weight_bits": list(plan.weight_bits.values()),
            }  # fmt: skip

        for metric in ABLATION_METRICS:
            plan = plan_by(
                metric, PlanSettings(compression=COMPRESSION), curvature=curvature, measured=table,
                perturbation=perturbation, seed=seed,
            )  # fmt: skip
            rows[metric].append(measured(plan))
            print(f"seed {seed}, {metric}: {rows[metric][-1]['metric']:.2f}", flush=True)
        if seed == SEEDS[0]:
            for plan in random_plans(table):
                rows["random plan"].append(measured(plan))
            print(f"random plans: {[row['metric'] for row in rows['random plan']]}", flush=True)
        base = evaluator.results
    return {
        "metric_name": base.metric_name, "float_metric": base.float_metric, "float_loss": base.float_loss,
        "test_images": test_images, "calibration_images": CALIBRATION_IMAGES, "compression": COMPRESSION, "rows": rows,
    }  # fmt: skip


def random_plans(table: tq.Sensitivity) -> list[tq.BitPlan]:
    """Plans drawn at random and filled up: one step more for a random layer as long as any fits into the budget."""
    limit = 32 / COMPRESSION
    sizes = {layer.name: layer.numel for layer in table.points.layers}
    total = sum(sizes.values())
    template = tq.solve(table, compression=COMPRESSION)
    plans = []
    for seed in range(RANDOM_PLANS):
        order = random.Random(seed)
        while True:
            bits = {name: order.choice(WIDTHS) for name in sizes}
            if sum(sizes[name] * b for name, b in bits.items()) <= limit * total:
                break
        while True:
            steps = [(n, WIDTHS[WIDTHS.index(b) + 1]) for n, b in bits.items() if b < WIDTHS[-1]]
            used = sum(sizes[name] * b for name, b in bits.items())
            steps = [(n, b) for n, b in steps if used + sizes[n] * (b - bits[n]) <= limit * total]
            if not steps:
                break
            bits = bits | dict([order.choice(steps)])
        plans.append(reprice(table, replace(template, weight_bits=bits)))
    return plans


def first(batches: Any, count: int) -> list[Any]:
    """The first `count` samples of (inputs, targets)."""
    found = []
    for x, y in batches:
        found.append((x[:count], y[:count]))
        count -= len(found[-1][1])
        if count <= 0:
            break
    return found


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--plans", type=int, default=80)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "metrics.json")
    arguments = parser.parse_args()
    folder = data_folder("cifar10", "cifar10_weights")
    if folder is None:
        raise SystemExit("set TRACEQUANT_DATA to a folder with cifar10 and cifar10_weights")
    start = time.perf_counter()

    def load(samples: int) -> tq.TaskSetup:
        weights = str(folder / "cifar10_weights" / "resnet20.safetensors")
        return load_task("cifar10", TaskOptions(data_dir=str(folder / "cifar10"), weights=weights, samples=samples))

    check, perturbation = correlations(
        load(arguments.images), arguments.images, arguments.plans, arguments.test_images, arguments.cache
    )
    print(f"{'metric':18s}" + "".join(f"{group:>21s}" for group in check.groups))
    for name, values in check.correlations.items():
        print(f"{name:18s}" + "".join(f"{values.get(group, math.nan):21.3f}" for group in check.groups))
    forms = {plan_group(group): other_forms(check, group) for group in GROUPS}
    for group, found in forms.items():
        print(f"\n{group}:")
        for label, value in found.items():
            print(f"  {label:40s}{value:7.3f}")
    plans = ablation(load(4096), arguments.test_images, arguments.cache)
    print(f"\n{plans['metric_name']} at {COMPRESSION:g}x, float {plans['float_metric']:.2f}")
    for metric, rows in plans["rows"].items():
        found = sorted(row["metric"] for row in rows)
        print(f"  {metric:18s} median {statistics.median(found):6.2f}, {', '.join(f'{x:.2f}' for x in found)}")
    document = {
        "command": f"python benchmarks/metrics.py --images {arguments.images} --plans {arguments.plans}"
        f" --test-images {arguments.test_images}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        # With a cache it says how much was left to measure, not how long it all takes.
        "seconds": round(time.perf_counter() - start) if arguments.cache is None else None,
        "perturbation": perturbation.reason,
        "check": check.to_json(),
        "other_forms": forms,
        "ablation": plans,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
