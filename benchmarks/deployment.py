"""Exported networks in ONNX Runtime and OpenVINO: size against the ideal, speed against float32, and what fuses.

    python benchmarks/deployment.py [--models resnet50 inception_v3 vit_small] [--repeats 20]

Weights are random (sizes, speed and faithfulness do not depend on training), bits drawn from 2, 3, 4 and 8 with the
first and the last layer at 8. Speed is the median processor time of interleaved runs on one sample and one thread. Rows
are written to benchmarks/results/deployment.json as they are done; rows that are there are kept unless --anew is given.
OpenVINO takes part where it is installed, with float32 arithmetic for what is float.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

import tracequant as tq
from tracequant.core import cost
from tracequant.deploy.onnx import Profile
from tracequant.deploy.verify import verify
from tracequant.measure.latency import processor

RESULTS = Path(__file__).parent / "results" / "deployment.json"
# Model, input size, activation bits (0 leaves them in float, in the profile weights-only).
ROWS = [
    ("resnet50", 224, 8), ("resnet50", 224, 4), ("inception_v3", 299, 8), ("inception_v3", 299, 4),
    ("vit_small", 224, 8), ("vit_small", 224, 0),
]  # fmt: skip


def build(name: str) -> nn.Module:
    """The network with random weights."""
    torch.manual_seed(0)
    if name == "vit_small":
        import timm

        return timm.create_model("vit_small_patch16_224", pretrained=False).eval()
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def mixed_plan(points: tq.QuantizationPoints, activation_bits: int) -> tq.BitPlan:
    """Bits drawn at random for weights, the same bits for all activations but the model's input."""
    draw, grid = random.Random(0), tq.WeightGrid(rounding="nearest")
    weights = {layer.name: draw.choice((2, 3, 4, 8)) for layer in points.layers}
    weights[points.layers[0].name] = weights[points.layers[-1].name] = 8
    read = points.activations if activation_bits else ()
    activations = {point.name: 8 if point.is_model_input else activation_bits for point in read}
    size = cost.size_bytes(points, weights, activations, grid)
    bits, count = cost.weight_bits_total(points, weights), cost.weight_count(points)
    return tq.BitPlan(weights, activations, size, bits, count, 0.0, 0.0, grid, "", "drawn", "none")


def measure(name: str, size: int, activation_bits: int, repeats: int) -> dict[str, Any]:
    """One row."""
    model, task = build(name), tq.ClassificationTask()
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 3, size, size, generator=generator), torch.zeros(2, dtype=torch.long)) for _ in range(2)]
    points = tq.discover(model, batches, task)
    plan = mixed_plan(points, activation_bits)
    quantized = tq.quantize(model, batches, task, plan)
    profile: Profile = "qdq" if activation_bits else "weights-only"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        file = tq.export_onnx(quantized, path, batches[0][0], profile)
        found = verify(
            quantized, batches, task, path, float_model=model, promised_bytes=plan.size_bytes, repeats=repeats
        )
    convolutions = {kernel.layer: kernel for kernel in found.kernels if "Conv" in kernel.kernel}
    integer = [kernel.layer for kernel in found.kernels if not kernel.reason]
    return {
        "model": name,
        "activation_bits": activation_bits,
        "profile": profile,
        "weight_bits_on_average": plan.average_bits,
        "ideal_bytes": plan.weight_code_bits // 8,
        "onnx_bytes": file.file_bytes,
        "packed_bytes": plan.size_bytes,
        "onnx_over_ideal": file.file_bytes / (plan.weight_code_bits / 8),
        "layers": len(found.kernels),
        "layers_on_integer_kernels": len(integer),
        "convolutions": len(convolutions),
        "convolutions_in_float": [kernel.layer for kernel in convolutions.values() if kernel.reason],
        "rounded_outputs": len(points.rounded_outputs(plan.activation_bits)),
        "largest_difference": found.difference,
        "runtimes": {
            result.runtime: {
                "milliseconds": result.milliseconds,
                "float32_milliseconds": result.float_milliseconds,
                "times_faster": result.float_milliseconds / result.milliseconds,
                "equal_predictions": result.equal_predictions,
            }
            for result in found.runtimes
        },
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as Markdown."""
    print("| model | activations | bits per weight | ONNX MB (10^6) | over ideal | convolutions fused | runtime | ms |"
          " float32 ms | faster |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for row in rows:
        activations = f"{row['activation_bits']} bits" if row["activation_bits"] else "float"
        fused = f"{row['convolutions'] - len(row['convolutions_in_float'])} of {row['convolutions']}"
        for name, result in row["runtimes"].items():
            print(
                f"| {row['model']} | {activations} | {row['weight_bits_on_average']:.2f} |"
                f" {row['onnx_bytes'] / 1e6:.2f} | {row['onnx_over_ideal']:.3f} | {fused} | {name} |"
                f" {result['milliseconds']:.1f} | {result['float32_milliseconds']:.1f} | {result['times_faster']:.2f} |"
            )


def main() -> None:
    """Measure what is missing and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=sorted({name for name, *_ in ROWS}))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--anew", action="store_true", help="measure rows that are there already again")
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for name, size, activation_bits in ROWS:
        same = [row for row in rows if (row["model"], row["activation_bits"]) == (name, activation_bits)]
        if name not in arguments.models or (same and not arguments.anew):
            continue
        row = measure(name, size, activation_bits, arguments.repeats)
        rows = [old for old in rows if old not in same] + [row]
        machine = {
            "processor": processor(), "python": platform.python_version(), "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
        }  # fmt: skip
        RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
