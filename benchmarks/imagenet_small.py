"""Plans by every metric on real ImageNet networks: SqueezeNet 1.1, and MobileNet v1 of width 0.25 with --mobilenet.

    python benchmarks/imagenet_small.py [--mobilenet] [--images 512] [--seeds 3] [--cache DIR]

Curvature, expansion and activation ranges on training images (`imagenet_train1000`, `--images` of them drawn by each
seed), accuracy on 500 validation images (`imagenet_val500`): the float network, uniform 8 and 4 bits, and plans of 4
bits a weight on average over {2, 3, 4, 8} by each metric. Activations have 8 bits throughout; nothing is fine-tuned.

Prints a Markdown table, and writes benchmarks/results/imagenet_small.json. Everything measured is kept in the cache,
and a run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

import tracequant as tq
from ablation_metrics import ABLATION_METRICS, plan_by
from data import data_folder
from imagenet_tree import DATA, lay_out
from metrics import kept
from tracequant.core.settings import PlanSettings, TaskOptions
from tracequant.measure.accuracy import Evaluator
from tracequant.measure.sensitivity import with_eigenvalues
from tracequant.tasks.registry import load_task

WIDTHS = (2, 3, 4, 8)
AVERAGE_BITS = 4.0
# The paper's rounding.
NEAREST = tq.WeightGrid(rounding="nearest")
HERE = Path(__file__).parent
# Network → (task, its model, weights file).
NETWORKS = {
    "SqueezeNet 1.1": ("imagenet", "torchvision:squeezenet1_1", "squeezenet1_1.safetensors"),
    "MobileNet v1 0.25": (
        f"{HERE.parent / 'examples' / 'mobilenet_v1.py'}:build",
        None,
        "mobilenet_v1_025_tf.safetensors",
    ),
}


def measured(name: str, data: Path, images: int, seed: int, cache: Path) -> dict[str, Any]:
    """Accuracy of the float network, of uniform plans and of one plan by each metric, for one draw of images."""
    task, model, file = NETWORKS[name]
    # The images have been cropped before, to the pixels that the networks take.
    options = TaskOptions(
        str(lay_out(data, cache / "tree")),
        str(data / "imagenet_weights" / file),
        model,
        images,
        seed=seed,
        workers=0,
        crop_share=1.0,
    )
    setup = load_task(task, options)
    cache = cache / f"{Path(file).stem}-{images}-{seed}"
    points = tq.discover(setup.model, setup.calibration, setup.task)
    parts = (setup.model, setup.calibration, setup.task)

    def curvature() -> tq.Curvature:
        found = tq.estimate_curvature(*parts, seed=seed, points=points, checkpoint=cache / "batches", progress=True)
        return with_eigenvalues(setup.model, setup.calibration, setup.task, found, seed=seed, progress=True)

    traces = kept(cache, "curvature", tq.Curvature, curvature)
    expansion = kept(
        cache, "perturbation", tq.Perturbation,
        lambda: tq.measure_perturbation(
            *parts, points, weight_bits=WIDTHS, weight_grid=NEAREST, seed=seed, checkpoint=cache / "batches",
            progress=True,
        ),
    )  # fmt: skip
    table = kept(
        cache, "sensitivity", tq.Sensitivity,
        lambda: tq.measure_sensitivity(
            setup.model, setup.calibration, setup.task, traces, weight_bits=WIDTHS, weight_grid=NEAREST,
            activation_bits=(8,), criterion="trace",
        ),
    )  # fmt: skip
    plans = {f"uniform {bits} bits": tq.uniform_plan(table, bits) for bits in (8, 4)}
    for metric in ABLATION_METRICS:
        plans[metric] = plan_by(
            metric, PlanSettings(average_bits=AVERAGE_BITS), curvature=traces, measured=table, perturbation=expansion,
            seed=seed,
        )  # fmt: skip
    evaluator = Evaluator(
        setup.model, setup.calibration, setup.task, evaluation=setup.evaluation, cache=cache / "evaluations.json"
    )
    rows = {}
    for label, plan in plans.items():
        found = evaluator.of(plan)
        rows[label] = {
            "top1": found.metric, "loss": found.loss, "average_bits": plan.average_bits, "size_mib": plan.size_mib,
            "compression": plan.compression, "weight_bits": plan.weight_bits,
        }  # fmt: skip
        print(f"{name}, seed {seed}, {label}: {found.metric:.2f}, loss {found.loss:.4f}", flush=True)
    base = evaluator.results
    return {
        "samples": base.samples, "float": {"top1": base.float_metric, "loss": base.float_loss},
        "curvature": traces.reason, "expansion": expansion.reason, "rows": rows,
    }  # fmt: skip


def markdown(seeds: list[dict[str, Any]]) -> str:
    """The table: medians over the draws of images, with the range of the accuracies."""
    lines = ["| plan | top-1 % | range | loss | MB | bits |", "|---|---|---|---|---|---|"]
    plain = seeds[0]["float"]
    lines.append(f"| float32 | {plain['top1']:.2f} | | {plain['loss']:.3f} | | 32 |")
    for label in seeds[0]["rows"]:
        rows = [seed["rows"][label] for seed in seeds]
        top1, loss = ([row[key] for row in rows] for key in ("top1", "loss"))
        size, bits = (statistics.median(row[key] for row in rows) for key in ("size_mib", "average_bits"))
        lines.append(
            f"| {label} | {statistics.median(top1):.2f} | {min(top1):.2f} to {max(top1):.2f} |"
            f" {statistics.median(loss):.3f} | {size:.3f} | {bits:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mobilenet", action="store_true")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tracequant" / "imagenet_small")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "imagenet_small.json")
    arguments = parser.parse_args()
    data = data_folder(*DATA, "imagenet_weights")
    if data is None:
        raise SystemExit(f"set TRACEQUANT_DATA to a folder with {', '.join((*DATA, 'imagenet_weights'))}")
    networks = {}
    for name in list(NETWORKS) if arguments.mobilenet else list(NETWORKS)[:1]:
        seeds = [measured(name, data, arguments.images, seed, arguments.cache) for seed in range(arguments.seeds)]
        networks[name] = seeds
    document = {
        "command": f"python benchmarks/imagenet_small.py{' --mobilenet' if arguments.mobilenet else ''}"
        f" --images {arguments.images} --seeds {arguments.seeds}",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "average_bits": AVERAGE_BITS,
        "weight_bits_on_offer": WIDTHS,
        "activation_bits": 8,
        "networks": networks,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    for name, seeds in networks.items():
        print(f"\n{name}, {seeds[0]['samples']} validation images:\n\n{markdown(seeds)}")


if __name__ == "__main__":
    main()
