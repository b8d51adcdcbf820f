"""HAWQ's ResNet20 on CIFAR-10: accuracy after fine-tuning, by plan, on the full test set.

    python benchmarks/cifar10_resnet20.py [--short] [--steps N] [--seeds N] [--rows NAME ...] [--recipes NAME ...]

One row for every plan: float32; the same bits everywhere ("direct"); 13.1x by the average Hessian trace with 4-bit and
with mixed activations of 4 bits on average; the same size by other metrics; 16x, the size of 2 bits everywhere. First
and last layer count and are quantized in every row; the image itself keeps 8 bits. All rows have the same recipe;
--recipes trains with others, which differ from it in one thing each.

Every row and seed is kept in the results as soon as it is finished and is not run again; what was interrupted goes on
from its checkpoint in --work. --deploy exports the packed file of the 13.1x row to ONNX and compares it in ONNX Runtime
on the whole test set. --short is 600 steps and one seed, for a CPU. TRACEQUANT_DATA must hold cifar10 and
cifar10_weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tracequant as tq
from ablation_metrics import sensitivity_by
from ablations import ProgressiveOrder, SmoothedTask, clipping_only
from data import data_folder
from tracequant.core.cost import average_activation_bits, float_bytes
from tracequant.core.settings import TaskOptions
from tracequant.deploy.verify import verify
from tracequant.measure.sensitivity import with_eigenvalues
from tracequant.tasks.registry import load_task

RESULTS = Path(__file__).parent / "results" / "cifar10_resnet20.json"
WEIGHT_BITS, ACTIVATION_BITS = (1, 2, 3, 4, 8), (2, 3, 4, 6, 8)
FULL_STEPS, SHORT_STEPS = 20000, 600
OURS: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 2e-3, "distillation": 1.0}
RECIPES: dict[str, dict[str, Any]] = {
    "ours": {},
    "SGD": {"optimizer": "sgd", "learning_rate": 0.03},
    "learning rate halved": {"learning_rate": 1e-3},
    "learning rate doubled": {"learning_rate": 4e-3},
    "labels and teacher": {"distillation": 0.5},
    "no teacher": {"distillation": 0.0},
    "features too": {"feature_distillation": 1.0},
    "PACT": {"pact": True},
    "fixed ranges (Appendix A)": {"scales": "fixed"},
    "BatchNorm frozen": {"batchnorm": "freeze"},
    "BatchNorm reestimated": {"batchnorm": "reestimate"},
    "moving average 0.99": {"ema": 0.99},
    "labels alone, smoothed by 0.1": {"distillation": 0.0, "label_smoothing": 0.1},
    "sensitive first": {"order": "sensitive_first"},
    "sensitive last": {"order": "sensitive_last"},
}
# What the library does not have; `ablations.py` does it.
ABLATIONS = ("pact", "label_smoothing", "order")
# The paper's rounding.
NEAREST = tq.WeightGrid(rounding="nearest")


@dataclass(frozen=True)
class Row:
    """How a row's plan is made: the same `uniform` bits, or the least Ω by `metric` at a `compression` of weights."""

    name: str
    metric: str | None = None
    uniform: int | None = None
    compression: float | None = None
    offered: tuple[int, ...] = (2, 3, 4, 8)
    mixed_activations: bool = False


ROWS = (
    Row("direct, 2 bit", uniform=2),
    Row("direct, 3 bit", uniform=3),
    Row("direct, 4 bit", uniform=4),
    Row("HAWQ-V2, 13.1x", "trace", compression=13.1),
    Row("HAWQ-V2, 13.1x, mixed activations", "trace", compression=13.1, mixed_activations=True),
    Row("l2, 13.1x", "l2", compression=13.1),
    Row("HAWQ's eigenvalue / n, 13.1x", "eigenvalue", compression=13.1),
    Row("inverted, 13.1x", "inverted", compression=13.1),
    Row("first + quadratic, 13.1x", "first+quadratic", compression=13.1),
    Row("HAWQ-V2, 16x", "trace", compression=16.0, offered=WEIGHT_BITS),
    Row("first + quadratic, 16x", "first+quadratic", compression=16.0, offered=WEIGHT_BITS),
)


class Measured:
    """The network, and what its plans are made from: measured once and kept in the working folder."""

    def __init__(self, folder: Path, work: Path) -> None:
        options = TaskOptions(
            data_dir=str(folder / "cifar10"), weights=str(folder / "cifar10_weights" / "resnet20.safetensors")
        )
        self.setup = load_task("cifar10", options).to("cuda" if torch.cuda.is_available() else "cpu")
        self._work = work
        data = (self.setup.model, self.setup.calibration, self.setup.task)
        if not (work / "curvature.json").is_file():
            curvature = tq.estimate_curvature(*data)
            with_eigenvalues(*data, curvature).save(work / "curvature.json")
        self.curvature = tq.Curvature.load(work / "curvature.json")
        self.points = self.curvature.points
        if not (work / "perturbation.json").is_file():
            found = tq.measure_perturbation(*data, self.points, weight_bits=WEIGHT_BITS, weight_grid=NEAREST)
            found.save(work / "perturbation.json")
        if not (work / "sensitivity.json").is_file():
            measured = tq.measure_sensitivity(
                *data,
                self.curvature,
                weight_bits=WEIGHT_BITS,
                weight_grid=NEAREST,
                activation_bits=ACTIVATION_BITS,
                criterion="trace",
            )
            measured.save(work / "sensitivity.json")
        self.measured = tq.Sensitivity.load(work / "sensitivity.json")

    def sensitivity(self, metric: str) -> tq.Sensitivity:
        """Ω by another metric."""
        perturbation = tq.Perturbation.load(self._work / "perturbation.json")
        return sensitivity_by(metric, curvature=self.curvature, measured=self.measured, perturbation=perturbation)

    def plan(self, row: Row) -> tq.BitPlan:
        """The bits of a row."""
        activations = {} if row.mixed_activations else {"allowed_activation_bits": {"*": [4]}}
        if row.uniform is not None:
            plan = tq.solve(self.measured, average_bits=8, **activations)
            return tq.uniform_plan(self.measured, row.uniform, activation_bits=plan.activation_bits)
        assert row.metric is not None
        return tq.solve(
            self.sensitivity(row.metric),
            compression=row.compression,
            average_activation_bits=4.0 if row.mixed_activations else None,
            allowed_bits={"*": row.offered},
            **activations,
        )


@contextmanager
def variant(
    model: nn.Module, task: tq.Task, omega: dict[str, float], steps: int, recipe: dict[str, Any]
) -> Iterator[tuple[tq.Task, dict[str, Any]]]:
    """The task and the keywords with which `tracequant.finetune` trains by a recipe, hooks being on the model."""
    options = {name: value for name, value in recipe.items() if name not in ABLATIONS}
    with ExitStack() as stack:
        if "label_smoothing" in recipe:
            assert isinstance(task, tq.ClassificationTask)
            task = SmoothedTask(task, recipe["label_smoothing"])
        if "pact" in recipe:
            stack.enter_context(clipping_only(model))
        if "order" in recipe:
            options["on_step"] = stack.enter_context(ProgressiveOrder(model, omega, steps, recipe["order"]))
        yield task, options


def measure(
    found: Measured, row: Row, recipe: str, seed: int, steps: int, work: Path, compiled: bool
) -> dict[str, Any]:
    """Quantize, fine-tune, pack and reload one row."""
    setup = found.setup
    plan = found.plan(row)
    quantized = tq.quantize(setup.model, setup.calibration, setup.task, plan)
    before = setup.task.evaluate(quantized, setup.evaluation)
    label = f"{row.name} {recipe} {steps} {seed}".replace(" ", "_").replace("/", "over")
    checkpoint = work / f"{label}.pt"
    on_gpu = torch.cuda.is_available()
    start = time.perf_counter()
    omega = {name: found.measured.weight_omega[name][bits] for name, bits in plan.weight_bits.items()}
    with variant(quantized, setup.task, omega, steps, RECIPES[recipe]) as (task, options):
        result = tq.finetune(
            quantized, setup.train, task, steps=steps, teacher=setup.model, seed=seed, checkpoint=checkpoint,
            checkpoint_every=250, channels_last=True, compile=compiled or on_gpu, progress=True, **OURS | options,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    after = setup.task.evaluate(quantized, setup.evaluation)
    file = work / f"{label}.safetensors"
    file_bytes = tq.pack(quantized, file)
    reloaded = setup.task.evaluate(tq.load(file, setup.model), setup.evaluation)
    assert file_bytes == plan.size_bytes, f"{file_bytes} bytes, {plan.size_bytes} promised"
    assert reloaded == after, "the packed file's accuracy is not that of the trained model"
    return {
        "row": row.name, "recipe": recipe, "seed": seed, "steps": steps, "metric": row.metric,
        "weight_bits": plan.weight_bits, "activation_bits": plan.activation_bits,
        "compression": plan.compression, "file_bytes": file_bytes,
        "file_compression": float_bytes(found.points) / file_bytes,
        "average_activation_bits": average_activation_bits(found.points, plan.activation_bits),
        "before": before.metric, "after": after.metric, "loss": after.loss,
        "training_loss": statistics.mean(result.losses[-50:]),
        "seconds": seconds if result.steps_run == steps else None, "settings": OURS | RECIPES[recipe],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "file": file.name,
    }  # fmt: skip


def fresh_evaluation(file: Path) -> float:
    """Accuracy of a packed file in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--evaluate", str(file)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def deploy(found: Measured, file: Path) -> dict[str, Any]:
    """Export a packed file to ONNX and compare it in ONNX Runtime with the model that it was packed from."""
    setup = found.setup
    quantized = tq.load(file, setup.model)
    (images, _), *_ = setup.calibration
    exported = tq.export_onnx(quantized, file.with_suffix(".onnx"), images)
    result = verify(
        quantized,
        setup.evaluation,
        setup.task,
        exported.path,
        float_model=setup.model,
        promised_bytes=file.stat().st_size,
    )
    convolutions = [kernel for kernel in result.kernels if "Conv" in kernel.kernel]
    (runtime, *_) = result.runtimes
    return {
        "file": file.name, "packed_bytes": file.stat().st_size, "onnx_bytes": exported.file_bytes,
        "onnx_graph_and_floats": exported.other_bytes, "fake_quantized": result.metric, "onnx_runtime": runtime.metric,
        "equal_predictions": runtime.equal_predictions, "samples_within_1e-5": result.samples_within,
        "times_faster": runtime.float_milliseconds / runtime.milliseconds, "convolutions": len(convolutions),
        "convolutions_in_float": [kernel.layer for kernel in convolutions if kernel.reason],
    }  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return dict(json.loads(path.read_text())) if path.is_file() else {"rows": []}


def same(item: dict[str, Any], row: str, recipe: str, steps: int) -> bool:
    """Whether a result is one of these."""
    return (item["row"], item["recipe"], item["steps"]) == (row, recipe, steps)


def print_recipes(results: dict[str, Any], row: str, steps: int) -> None:
    """The row by every recipe that was run."""
    print(f"\n| {row}: recipe | accuracy | loss | training loss |\n|---|---|---|---|")
    for recipe in RECIPES:
        found = [item for item in results["rows"] if same(item, row, recipe, steps)]
        if found:
            means = (statistics.mean(item[name] for item in found) for name in ("after", "loss", "training_loss"))
            print(f"| {recipe} | " + " | ".join(f"{mean:.4g}" for mean in means) + " |")


def print_table(results: dict[str, Any], steps: int) -> None:
    """All finished rows of this length as Markdown."""
    float_accuracy = results["float_accuracy"]
    print(f"{steps:,} steps of 128 images\n")
    head = ["plan", "weight bits", "W-Comp", "file, KiB", "file, smaller by", "activation bits", "before", "after"]
    head += ["drop", "seeds", "minutes"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    print(f"| float32 | 32 | 1.00x | {results['float_bytes'] / 1024:.1f} | 1.00x | 32 | | {float_accuracy:.2f} | | | |")
    for row in ROWS:
        found = [item for item in results["rows"] if same(item, row.name, "ours", steps)]
        if not found:
            continue
        first, after = found[0], [item["after"] for item in found]
        spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
        minutes = [item["seconds"] / 60 for item in found if item["seconds"] is not None]
        widths = "/".join(str(b) for b in sorted(set(first["weight_bits"].values())))
        cells = [
            row.name,
            widths,
            f"{first['compression']:.2f}x",
            f"{first['file_bytes'] / 1024:.1f}",
            f"{first['file_compression']:.2f}x",
            f"{first['average_activation_bits']:.2f}",
            f"{statistics.mean(item['before'] for item in found):.2f}",
            f"{statistics.mean(after):.2f}{spread}",
            f"{float_accuracy - statistics.mean(after):.2f}",
            str(len(after)),
            f"{statistics.mean(minutes):.0f}" if minutes else "",
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Run what is missing of the rows that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help=f"{SHORT_STEPS} steps and one seed")
    parser.add_argument("--steps", type=int, help=f"fine-tuning steps, {FULL_STEPS} by default")
    parser.add_argument("--seeds", type=int, help="runs of every row, 3 by default")
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS], help="names of rows, all by default")
    parser.add_argument("--recipes", nargs="*", default=["ours"], choices=list(RECIPES))
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too; needs a C++ compiler")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10_resnet20"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--deploy", action="store_true", help="export to ONNX and verify")
    parser.add_argument("--evaluate", type=Path, help="print the accuracy of a packed file and do nothing else")
    given = parser.parse_args()
    folder = data_folder("cifar10", "cifar10_weights")
    if folder is None:
        print("skipped: TRACEQUANT_DATA does not hold cifar10 and cifar10_weights")
        return
    given.work.mkdir(parents=True, exist_ok=True)
    found = Measured(folder, given.work)
    setup = found.setup
    if given.evaluate is not None:
        print(setup.task.evaluate(tq.load(given.evaluate, setup.model), setup.evaluation).metric)
        return
    unknown = set(given.rows) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"unknown rows {sorted(unknown)}; there are {[row.name for row in ROWS]}")
    steps = given.steps or (SHORT_STEPS if given.short else FULL_STEPS)
    seeds = given.seeds or (1 if given.short else 3)
    results = read(given.results)
    results["float_accuracy"] = setup.task.evaluate(setup.model, setup.evaluation).metric
    results["float_bytes"] = float_bytes(found.points)
    for seed, recipe, row in itertools.product(range(seeds), given.recipes, ROWS):
        done = any(same(item, row.name, recipe, steps) and item["seed"] == seed for item in results["rows"])
        if row.name not in given.rows or done:
            continue
        print(f"{row.name}, {recipe}, seed {seed}, {steps} steps", file=sys.stderr, flush=True)
        item = measure(found, row, recipe, seed, steps, given.work, given.compile)
        print(f"  {item['before']:.2f} before, {item['after']:.2f} after", file=sys.stderr, flush=True)
        # Another process may have added rows meanwhile.
        results["rows"] = [*read(given.results)["rows"], item]
        temporary = given.results.with_suffix(".part")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(given.results)
    print(f"tracequant {tq.__version__}, torch {torch.__version__}, {platform.machine()}")
    print_table(results, steps)
    for name in given.rows:
        if len({item["recipe"] for item in results["rows"] if item["row"] == name and item["steps"] == steps}) > 1:
            print_recipes(results, name, steps)
    finished = [item for item in results["rows"] if same(item, "HAWQ-V2, 13.1x", "ours", steps)]
    if finished and (given.work / finished[0]["file"]).is_file():
        again = fresh_evaluation((given.work / finished[0]["file"]).resolve())
        assert again == finished[0]["after"], f"{again} in a fresh process, {finished[0]['after']} when it was trained"
        print(f"\nPacked file of {finished[0]['row']}, evaluated in a fresh process: {again:.2f}")
        if given.deploy:
            results = read(given.results) | {"deployed": deploy(found, given.work / finished[0]["file"])}
            given.results.write_text(json.dumps(results, indent=1) + "\n")
            print("\nIn ONNX Runtime:", ", ".join(f"{name} {value}" for name, value in results["deployed"].items()))


if __name__ == "__main__":
    main()
