"""The paper's Table 2 on blood cells: a small RetinaNet, trained here, quantized in several ways.

    python benchmarks/bccd_retinanet.py [--out DIR] [--seeds 3] [--steps 400] [--check] [--short]

Data: BCCD (364 microscope images, three kinds of cells) from TRACEQUANT_DATA; trained on train + val, tested on test.
The network is torchvision's RetinaNet on a ResNet18 of a quarter of the width with BatchNorm, 320x240 pixels, random
initial weights. Training takes about a quarter of an hour on one core and goes on from its checkpoint; so does every
row, whose results are in benchmarks/results/bccd_retinanet.json as soon as they are there. A GPU is used if there is
one. `--check` also rounds one activation at a time, and compares every metric with what the loss then does.
`--short` is a minute's rehearsal of everything, whose figures mean nothing, into DIR/short.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock

import tracequant as tq
from data import data_folder
from tracequant.core.cost import float_bytes
from tracequant.core.evaluations import spearman
from tracequant.core.files import replace_file
from tracequant.core.settings import Criterion
from tracequant.model.state import fingerprint
from tracequant.model.task import total_loss
from tracequant.report.blocks import activation_blocks, weight_blocks
from tracequant.report.paper_figures import figure_7, figure_8
from tracequant.tasks.coco import CocoImages, Target
from tracequant.tasks.networks.retinanet import retinanet_blocks

WIDTHS = (16, 32, 64, 128)
CHANNELS = 32
HEIGHT, WIDTH = 240, 320
CLASSES = 3
BATCH = 8
EPOCHS = 80
LEARNING_RATE = 2e-3
RESULTS = Path(__file__).parent / "results"
CRITERIA: tuple[Criterion, ...] = ("trace", "quadratic", "first+quadratic")
CHECKED_BITS = (4, 3)
# The paper's rounding.
NEAREST = tq.WeightGrid(rounding="nearest")
WEIGHT_BITS, ACTIVATION_BITS = (2, 3, 4, 5, 6, 8), (2, 3, 4, 5, 6, 8)
# Table 2's: a little smaller than 4-bit weights, a little larger than 4-bit activations.
W_COMPRESSION, A_COMPRESSION = 8.1, 7.62
IMAGE_READER = "backbone.body.conv1"

# Sensitivities by metric.
Tables = dict[str, tq.Sensitivity]


def build_model() -> RetinaNet:
    """The untrained network: 0.8 million parameters, strides 8, 16 and 32, three anchors of three sizes each."""
    widths = dict(zip(("layer1", "layer2", "layer3", "layer4"), WIDTHS, strict=True))
    stages, before = OrderedDict[str, nn.Module](), WIDTHS[0]
    for name, width in widths.items():
        stages[name] = stage(before, width, stride=1 if name == "layer1" else 2)
        before = width
    stem = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, WIDTHS[0], 7, 2, 3, bias=False),
        bn1=nn.BatchNorm2d(WIDTHS[0]),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, 2, 1),
    )
    levels = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(nn.Sequential(stem | stages), levels, list(WIDTHS[1:]), CHANNELS)
    backbone.fpn.extra_blocks = None  # a level more, of 5x4 cells, would find nothing
    sizes = tuple(tuple(side * 2 ** (i / 3) for i in range(3)) for side in (18, 40, 80))
    anchors = AnchorGenerator(sizes, ((0.8, 1.25),) * len(sizes))
    return RetinaNet(backbone, CLASSES, HEIGHT, WIDTH, anchor_generator=anchors, detections_per_img=100)


def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Two residual blocks."""
    shortcut = None
    if stride > 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs))


class Images:
    """Images `[N, 3, 240, 320]` as bytes, all in memory, and their targets."""

    def __init__(self, folder: Path, *splits: str) -> None:
        pixels, self.targets = [], []
        for split in splits:
            for image, target in CocoImages(folder / f"instances_{split}.json", folder / "images.zip"):
                scale = target["boxes"].new_tensor([WIDTH / image.shape[2], HEIGHT / image.shape[1]]).repeat(2)
                small = F.interpolate(image[None], (HEIGHT, WIDTH), mode="bilinear", antialias=True)
                pixels.append((small.clamp(0, 1) * 255).round().byte())
                self.targets.append({"boxes": target["boxes"] * scale, "labels": target["labels"]})
        self.pixels = torch.cat(pixels)

    def batches(self, size: int = BATCH, count: int | None = None) -> list[tuple[list[Tensor], list[Target]]]:
        """The first `count` images in order, as they are."""
        count = len(self.pixels) if count is None else count
        return [
            (list(self.pixels[i : min(i + size, count)].float() / 255), self.targets[i : min(i + size, count)])
            for i in range(0, count, size)
        ]


class AugmentedBatches:
    """Shuffled batches, mirrored both ways, zoomed and moved, brightened; all by torch's global generator."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images.pixels) // BATCH

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Target]]]:
        order = torch.randperm(len(self._images.pixels))
        for start in range(0, len(self) * BATCH, BATCH):
            chosen = order[start : start + BATCH]
            yield augment(self._images.pixels[chosen].float() / 255, [self._images.targets[i] for i in chosen])


def augment(pixels: Tensor, targets: list[Target]) -> tuple[list[Tensor], list[Target]]:
    """Each of `[N, 3, H, W]` mirrored, zoomed by 0.8 to 1.4 and moved within what the zoom leaves, colours changed."""
    count, _, height, width = pixels.shape
    zoom = torch.empty(count).uniform_(math.log(0.8), math.log(1.4)).exp()
    flip = torch.where(torch.rand(count, 2) < 0.5, -1.0, 1.0)
    shift = (2 * torch.rand(count, 2) - 1) * (1 - 1 / zoom).abs()[:, None]
    # What is seen at the new coordinates x, both from -1 to 1: the old image at (flip x) / zoom + shift.
    theta = torch.zeros(count, 2, 3)
    theta[:, [0, 1], [0, 1]] = flip / zoom[:, None]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    moved = moved * torch.empty(count, 3, 1, 1).uniform_(0.85, 1.15) + torch.empty(count, 1, 1, 1).uniform_(-0.1, 0.1)
    size = torch.tensor([width, height], dtype=torch.float32)
    result = []
    for n, target in enumerate(targets):
        corners = target["boxes"].view(-1, 2, 2) / size * 2 - 1
        corners = ((corners - shift[n]) * zoom[n] * flip[n]).sort(1).values
        boxes = (((corners + 1) / 2).clamp(0, 1) * size).view(-1, 4)
        area = (corners[:, 1] - corners[:, 0]).prod(1) * width * height / 4
        seen = (boxes[:, 2:] - boxes[:, :2]).prod(1) > 0.3 * area
        result.append({"boxes": boxes[seen], "labels": target["labels"][seen]})
    return list(moved.clamp(0, 1)), result


def train(folder: Path, out: Path, epochs: int, device: torch.device) -> RetinaNet:
    """The trained network, from its file in `out` if it is there; an interrupted training goes on."""
    torch.manual_seed(0)
    model = build_model().to(device)
    path, checkpoint = out / f"float-{epochs}.safetensors", out / f"training-{epochs}.pt"
    if path.is_file():
        model.load_state_dict(safetensors.torch.load_file(path))
        return model.eval()
    out.mkdir(parents=True, exist_ok=True)
    task, test = tq.RetinaNetTask(), Images(folder, "test").batches()
    batches = AugmentedBatches(Images(folder, "train", "val"))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}], LEARNING_RATE
    )
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        torch.manual_seed(epoch)
        model.train()
        total = 0.0
        for batch in batches:
            moved = task.to_device(batch, device)
            loss = total_loss(task, task.outputs(model, moved), moved)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(batches):.4f}", flush=True)
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            found = task.evaluate(model, test)
            print(f"  test {found.metric_name} {found.metric:.2f}, loss {found.loss:.4f} {found.details}", flush=True)
            with replace_file(checkpoint) as temporary:
                torch.save(
                    {
                        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(), "epoch": epoch + 1,
                    },
                    temporary,
                )  # fmt: skip
    with replace_file(path) as temporary:
        safetensors.torch.save_file(model.state_dict(), temporary)
    return model.eval()


@dataclass(frozen=True)
class Settings:
    """What a row's figures depend on beside the float network."""

    steps: int
    learning_rate: float = 5e-4
    distillation: float = 1.0
    calibration_images: int = 128
    test_images: int | None = None


def analyze(model: RetinaNet, images: Images, out: Path, settings: Settings) -> tuple[tq.Curvature, Tables]:
    """Traces, and sensitivities by metric, from the first images as they are, kept in `out` for this network."""
    task, batches = tq.RetinaNetTask(), images.batches(count=settings.calibration_images)
    kept, suffix = out / "batches", f"{settings.calibration_images}-{fingerprint(model)}.json"
    curved, expanded = out / f"curvature-{suffix}", out / f"perturbation-{suffix}"
    if not curved.is_file():
        tq.estimate_curvature(model, batches, task, checkpoint=kept, progress=True).save(curved)
    curvature = tq.Curvature.load(curved)
    print(f"{curvature.estimator}: {curvature.reason}", flush=True)
    if not expanded.is_file():
        bits = {"weight_bits": WEIGHT_BITS, "weight_grid": NEAREST, "activation_bits": ACTIVATION_BITS}
        found = tq.measure_perturbation(model, batches, task, curvature.points, checkpoint=kept, progress=True, **bits)
        found.save(expanded)
    tables = {}
    for metric in CRITERIA:
        path = out / f"sensitivity-{metric}-{suffix}"
        if not path.is_file():
            tq.measure_sensitivity(
                model,
                batches,
                task,
                curvature,
                weight_bits=WEIGHT_BITS,
                weight_grid=NEAREST,
                activation_bits=ACTIVATION_BITS,
                criterion=metric,
                perturbation=tq.Perturbation.load(expanded),
            ).save(path)
        tables[metric] = tq.Sensitivity.load(path)
    return curvature, tables


def plans(tables: Tables) -> dict[str, tq.BitPlan]:
    """The rows of Table 2 by name, and one more; the image has 8 bits in all of them, and counts in no A-Comp."""
    sensitivity = tables["trace"]
    points = sensitivity.points
    image = {point.name: 8 for point in points.activations if point.is_model_input}

    def uniform(bits: int) -> dict[str, int]:
        return {point.name: bits for point in points.activations} | image

    def weights_only(bits: int) -> dict[str, tuple[int, ...]]:
        return {point.name: (bits,) for point in points.activations if point.name not in image}

    # The paper's A-Comp leaves out the image, or its uniform 4 bits would not be 8 times smaller.
    inside = sum(point.numel for point in points.activations if point.name not in image)
    total = sum(point.numel for point in points.activations)
    mean = (32 / A_COMPRESSION * inside + 8 * (total - inside)) / total
    return {
        "direct": tq.uniform_plan(sensitivity, 4, activation_bits=uniform(4)),
        "mixed weights": tq.solve(sensitivity, compression=W_COMPRESSION, allowed_activation_bits=weights_only(4)),
        "mixed weights and activations": tq.solve(sensitivity, compression=W_COMPRESSION, average_activation_bits=mean),
        "mixed weights and activations, quadratic": tq.solve(
            tables["quadratic"], compression=W_COMPRESSION, average_activation_bits=mean
        ),
        "mixed weights, 6-bit activations": tq.solve(
            sensitivity, compression=W_COMPRESSION, allowed_activation_bits=weights_only(6)
        ),
    }


def activation_compression(sensitivity: tq.Sensitivity, plan: tq.BitPlan) -> float:
    """The paper's A-Comp: 32 bits over the mean bits of what layers read, the image left out."""
    inner = [point for point in sensitivity.points.activations if not point.is_model_input]
    bits = sum(point.numel * plan.activation_bits[point.name] for point in inner)
    return 32 * sum(point.numel for point in inner) / bits


class Results:
    """The table as a JSON file, written whenever a figure is there; figures of other settings are dropped."""

    def __init__(self, path: Path, context: dict[str, Any]) -> None:
        self._path, self._context, self.folder = path, context, path.parent
        self.rows: dict[str, dict[str, Any]] = {}
        self.extra: dict[str, Any] = {}
        if path.is_file():
            found = json.loads(path.read_text())
            if found.pop("context") == context:
                self.rows, self.extra = found.pop("rows"), found

    def row(self, name: str, plan: dict[str, dict[str, int]] | None = None, **values: Any) -> dict[str, Any]:
        """The row of this name, with these values; what was measured with another plan is dropped."""
        own = self.rows.setdefault(name, {})
        if plan is not None and own.get("plan") != plan:
            own.clear()
            own["plan"] = plan
        own.update(values)
        return own

    def save(self) -> None:
        """Write what there is, with mean and deviation over the seeds."""
        for own in self.rows.values():
            if maps := [run["AP"] for run in own.get("seeds", {}).values()]:
                own["mAP"] = statistics.fmean(maps)
                own["mAP_deviation"] = statistics.stdev(maps) if len(maps) > 1 else None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(self._path) as temporary:
            temporary.write_text(
                json.dumps({"context": self._context, "rows": self.rows, **self.extra}, indent=1) + "\n"
            )

    def table(self) -> str:
        """The rows in the shape of the paper's Table 2."""
        lines = ["| method | w-bits | a-bits | mAP | W-Comp | A-Comp | MB | mAP before fine-tuning |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for name, own in self.rows.items():
            deviation = f" ± {own['mAP_deviation']:.2f}" if own.get("mAP_deviation") else ""
            reached = f"{own['mAP']:.2f}{deviation} ({len(own['seeds'])} seeds)" if own.get("seeds") else ""
            before = f"{own['calibrated']:.2f}" if "calibrated" in own else ""
            lines.append(
                f"| {name} | {own['w_bits']} | {own['a_bits']} | {reached or format(own.get('mAP', math.nan), '.2f')}"
                f" | {own['W-Comp']:.2f}× | {own['A-Comp']:.2f}× | {own['size_mib']:.3f} | {before} |"
            )
        return "\n".join(lines)


def measure(
    model: RetinaNet, folder: Path, out: Path, results: Results, names: list[str], seeds: int, settings: Settings
) -> Tables:
    """All rows, or those named: float, then every plan calibrated, then fine-tuned, all of them by one seed first.

    Figures 7 and 8 are drawn beside the results. Returns the sensitivities that the plans rest on.
    """
    task, device = tq.RetinaNetTask(), next(model.parameters()).device
    test = Images(folder, "test").batches(count=settings.test_images)
    training = Images(folder, "train", "val")
    calibration = training.batches(count=settings.calibration_images)
    curvature, tables = analyze(model, training, out, settings)
    sensitivity, chosen = tables["trace"], plans(tables)
    draw(curvature, chosen["mixed weights and activations"], results.folder)
    chosen = {name: plan for name, plan in chosen.items() if not names or name in names}
    if "float32" not in results.rows:
        found = task.evaluate(model, test)
        results.row(
            "float32", w_bits="32", a_bits="32", mAP=found.metric, details=found.details, loss=found.loss,
            size_mib=float_bytes(sensitivity.points) / 2**20, **{"W-Comp": 1.0, "A-Comp": 1.0},
        )  # fmt: skip
        results.save()
    for name, plan in chosen.items():
        inner = {point: bits for point, bits in plan.activation_bits.items() if point != IMAGE_READER}
        row = results.row(
            name, {"weight_bits": plan.weight_bits, "activation_bits": plan.activation_bits},
            w_bits=spread(plan.weight_bits), a_bits=spread(inner), size_mib=plan.size_mib,
            **{"W-Comp": plan.compression, "A-Comp": activation_compression(sensitivity, plan)},
        )  # fmt: skip
        if "calibrated" not in row:
            quantized = tq.quantize(model, calibration, task, plan)
            row["calibrated"] = task.evaluate(quantized, test).metric
            results.save()
    for seed in range(seeds):
        for name, plan in chosen.items():
            runs = results.row(name).setdefault("seeds", {})
            if str(seed) in runs:
                continue
            start = time.perf_counter()
            quantized = tq.quantize(model, calibration, task, plan)
            checkpoint = out / f"{name.replace(' ', '-')}-{settings.steps}-{settings.distillation:g}-{seed}.pt"
            tq.finetune(
                quantized, AugmentedBatches(training), task, steps=settings.steps,
                learning_rate=settings.learning_rate, optimizer="adamw", teacher=model,
                distillation=settings.distillation, batchnorm="freeze", seed=seed, checkpoint=checkpoint,
                checkpoint_every=50, progress=True,
            )  # fmt: skip
            packed = out / f"{name.replace(' ', '-')}.safetensors"
            tq.pack(quantized, packed)
            loaded = tq.load(packed, model.cpu()).to(device)
            model.to(device)
            found = task.evaluate(loaded, test)
            runs[str(seed)] = found.details | {"loss": found.loss, "file_bytes": packed.stat().st_size}
            results.save()
            checkpoint.unlink()
            print(f"{name}, seed {seed}: mAP {found.metric:.2f} in {time.perf_counter() - start:.0f} s", flush=True)
    return tables


def check(model: RetinaNet, images: Images, tables: Tables, results: Results, settings: Settings) -> None:
    """Print how every metric ranks activations by what rounding each alone does to the loss, all else at 8 bits."""
    task, batches = tq.RetinaNetTask(), images.batches(count=settings.calibration_images)
    points = tables["trace"].points
    plain = tq.uniform_plan(tables["trace"], 8, activation_bits={point.name: 8 for point in points.activations})

    def loss(changed: dict[str, int]) -> float:
        plan = replace(plain, activation_bits=plain.activation_bits | changed)
        return task.evaluate(tq.quantize(model, batches, task, plan), batches).loss

    names = [point.name for point in points.activations if not point.is_model_input]
    base, rows = loss({}), {}
    for bits in CHECKED_BITS:
        measured = [loss({name: bits}) - base for name in names]
        rows[str(bits)] = {"measured": measured}
        for metric, table in tables.items():
            # The trace's Ω is twice the second-order term.
            own = [table.activation_omega[name][bits] / (2 if metric == "trace" else 1) for name in names]
            rows[str(bits)][metric] = own
            print(
                f"{bits}-bit activations, {metric}: rank correlation {spearman(own, measured):.2f}, sum of the changes"
                f" {sum(own):.4f}, measured {sum(measured):.4f}",
                flush=True,
            )
    results.extra["activations"] = {"names": names, "bits": rows}
    results.save()


def spread(bits: dict[str, int]) -> str:
    """The bits that a plan uses, as "4" or "2-8 MP"."""
    used = sorted(set(bits.values()))
    return str(used[0]) if len(used) == 1 else f"{used[0]}-{used[-1]} MP"


def draw(curvature: tq.Curvature, plan: tq.BitPlan, folder: Path) -> None:
    """Figures 7 and 8: average traces and chosen bits of the network's blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    patterns = retinanet_blocks(build_model())
    figures = {
        "figure7": figure_7(weight_blocks(curvature, patterns, plan.weight_bits)),
        "figure8": figure_8(activation_blocks(curvature, patterns, plan.activation_bits), curvature),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"bccd_{name}.png", dpi=110)


def main() -> None:
    """Train, then measure row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bccd"), help="networks, checkpoints and analysis")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--distillation", type=float, default=1.0, help="share of the float model's outputs in the loss"
    )
    parser.add_argument("--rows", nargs="*", default=[], help="measure only these [all]", metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write figures")
    parser.add_argument("--check", action="store_true", help="compare metrics with measured losses")
    parser.add_argument("--short", action="store_true", help="rehearse everything in a minute, into --out/short")
    given = parser.parse_args()
    data = data_folder("bccd")
    if data is None:
        print("skipped: TRACEQUANT_DATA does not hold bccd")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, epochs, seeds, out, place = (
        Settings(given.steps, distillation=given.distillation),
        given.epochs,
        given.seeds,
        given.out,
        given.results,
    )
    if given.short:
        settings, epochs, seeds = Settings(2, calibration_images=8, test_images=8), 1, 1
        out = place = given.out / "short"
    model = train(data / "bccd", out, epochs, device)
    context = asdict(settings) | {"epochs": epochs, "fingerprint": fingerprint(model)}
    results = Results(place / "bccd_retinanet.json", context)
    tables = measure(model, data / "bccd", out, results, given.rows, seeds, settings)
    print(results.table())
    if given.check:
        check(model, Images(data / "bccd", "train", "val"), tables, results, settings)


if __name__ == "__main__":
    main()
