"""A detector of your own, quantized without training: FastestDet with its COCO weights, every method at several sizes.

    python examples/fastestdet.py [--calibration 64] [--images N] [--out benchmarks/results/fastestdet.json]

The network, its loss and its decoding are written here as anybody would write them for tracequant; images, boxes and
weights come from TRACEQUANT_DATA (coco_val_mini: 177 images of COCO's val2017, none of which trained the network; the
first 64 calibrate, the others are evaluated). As a task for the command line:

    tracequant run --task examples/fastestdet.py:build --data-dir coco_val_mini --average-bits 5 --finetune-steps 0 ...
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou

import tracequant as tq
from tracequant.core.cost import average_activation_bits
from tracequant.tasks.coco import CocoImages, coco_metrics

SIDE, CELLS, CLASSES = 352, 22, 80

# The network: FastestDet (github.com/dog-qiuqiu/FastestDet), 0.24 million parameters.


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with BatchNorm."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def relu() -> nn.Module:
    """In place, as it follows a BatchNorm."""
    return nn.ReLU(inplace=True)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass by, or, at stride 2, all go both ways."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        entering = inputs if stride == 2 else half
        self.branch_main = nn.Sequential(
            *conv(entering, half), relu(), *conv(half, half, 3, stride, half), *conv(half, half), relu()
        )
        self.branch_proj = None
        if stride == 2:
            self.branch_proj = nn.Sequential(*conv(inputs, inputs, 3, 2, inputs), *conv(inputs, half), relu())

    def forward(self, x: Tensor) -> Tensor:
        if self.branch_proj is not None:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], 1)


class Backbone(nn.Module):
    """Features at strides 8, 16 and 32 with 48, 96 and 192 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*conv(3, 24, 3, 2), relu())
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2 = stage(24, 48, 4)
        self.stage3 = stage(48, 96, 8)
        self.stage4 = stage(96, 192, 4)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.stage2(self.maxpool(self.first_conv(images)))
        middle = self.stage3(fine)
        return [fine, middle, self.stage4(middle)]


def stage(inputs: int, outputs: int, units: int) -> nn.Sequential:
    """Units of one resolution."""
    return nn.Sequential(ShuffleUnit(inputs, outputs, 2), *(ShuffleUnit(outputs, outputs, 1) for _ in range(units - 1)))


class Conv1x1(nn.Module):
    """A 1x1 convolution, normalised and rectified."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(*conv(inputs, outputs), relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x)


class Pyramid(nn.Module):
    """Chains of one, two and three depthwise 5x5 convolutions beside one another, and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.Conv1x1 = Conv1x1(inputs, outputs)

        def chain(length: int) -> nn.Sequential:
            return nn.Sequential(*(m for _ in range(length) for m in (*conv(outputs, outputs, 5, 1, outputs), relu())))

        self.S1, self.S2, self.S3 = chain(1), chain(2), chain(3)
        self.output = nn.Sequential(*conv(3 * outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv1x1(x)
        return F.relu(x + self.output(torch.cat([self.S1(x), self.S2(x), self.S3(x)], 1)))


class Branch(nn.Module):
    """A depthwise 5x5 and a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv5x5 = nn.Sequential(*conv(inputs, inputs, 5, 1, inputs), relu(), *conv(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv5x5(x)


class Head(nn.Module):
    """Objectness, box and classes of every cell, as raw numbers."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv1x1 = Conv1x1(inputs, inputs)
        self.obj_layers, self.reg_layers, self.cls_layers = (Branch(inputs, n) for n in (1, 4, CLASSES))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv1x1(x)
        return {"object": self.obj_layers(x), "box": self.reg_layers(x), "class": self.cls_layers(x)}


class FastestDet(nn.Module):
    """Images `[N, 3, 352, 352]` (BGR, 0 to 1) to logits of objects, raw boxes and classes `[N, 1 | 4 | 80, 22, 22]`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.SPP = Pyramid(48 + 96 + 192, 96)
        self.detect_head = Head(96)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine, middle, coarse = self.backbone(images)
        features = torch.cat([F.avg_pool2d(fine, 3, 2, 1), middle, F.interpolate(coarse, scale_factor=2)], 1)
        return self.detect_head(self.SPP(features))


# The task.


class DetectionTask(tq.Task):
    """Batches are `(images, targets)`: `[N, 3, 352, 352]`, and boxes (x1, y1, x2, y2 from 0 to 1) and labels by image.

    The loss of an image: cross-entropy of every cell's objectness, and, in the cells that hold the middle of a box,
    cross-entropy of the class and smooth L1 of the box, averaged over these cells.
    """

    metric_name = "mAP %"

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return model(batch[0])

    def loss(self, outputs: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        _, targets = batch
        boxes = decode(outputs["box"])
        terms = {"object": [], "box": [], "class": []}
        for n, target in enumerate(targets):
            middle = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
            column, row = (middle * CELLS).long().clamp(0, CELLS - 1).unbind(1)
            truth = torch.zeros_like(outputs["object"][n, 0])
            if len(row):
                found = boxes[n, :, row, column].T
                # As in training, an object's score is to tell how well its box fits.
                truth[row, column] = box_iou(found.detach(), target["boxes"]).diagonal()
                terms["class"].append(F.cross_entropy(outputs["class"][n, :, row, column].T, target["labels"]))
                terms["box"].append(F.smooth_l1_loss(CELLS * found, CELLS * target["boxes"], beta=1.0))
            terms["object"].append(F.binary_cross_entropy_with_logits(outputs["object"][n, 0], truth, reduction="sum"))
        return {name: torch.stack(values).sum() / len(targets) for name, values in terms.items() if values}

    def metric(self, outputs: dict[str, Tensor], batch: Any) -> float:
        return coco_metrics(batch[1], detections(outputs), CLASSES)["AP"]

    def batch_size(self, batch: Any) -> int:
        return len(batch[0])

    def evaluate(self, model: nn.Module, batches: Any, progress: bool = False) -> tq.Evaluation:
        """COCO's mAP is one of a whole data set, in the pixels of its images."""
        truth, found, total = [], [], 0.0
        training, device = model.training, next(model.parameters()).device
        model.eval()
        with torch.no_grad():
            for batch in batches:
                batch = self.to_device(batch, device)
                outputs = self.outputs(model, batch)
                total += len(batch[1]) * sum(term.item() for term in self.loss(outputs, batch).values())
                truth += [target | {"boxes": target["boxes"] * target["size"]} for target in batch[1]]
                own = zip(detections(outputs), batch[1], strict=True)
                found += [o | {"boxes": o["boxes"] * target["size"]} for o, target in own]
        model.train(training)
        metrics = coco_metrics(truth, found, CLASSES)
        details = {name: value for name, value in metrics.items() if value == value}  # NaN: no box of that size
        return tq.Evaluation(self.metric_name, metrics["AP"], total / len(truth), len(truth), details)


def decode(raw: Tensor) -> Tensor:
    """Raw boxes `[N, 4, H, W]` as x1, y1, x2, y2 from 0 to 1."""
    steps = torch.arange(CELLS, device=raw.device, dtype=raw.dtype)
    x, y = (raw[:, 0].tanh() + steps) / CELLS, (raw[:, 1].tanh() + steps[:, None]) / CELLS
    w, h = raw[:, 2].sigmoid(), raw[:, 3].sigmoid()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)


def detections(outputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """At most 100 boxes in each image, after suppressing others of the same class that overlap by 0.45."""
    best, labels = outputs["class"].softmax(1).max(1)
    scores = (outputs["object"][:, 0].sigmoid() ** 0.6 * best**0.4).flatten(1)
    boxes = decode(outputs["box"]).flatten(2).mT
    result = []
    for score, box, label in zip(scores, boxes, labels.flatten(1), strict=True):
        seen = score > 0.001
        kept = batched_nms(box[seen] * SIDE, score[seen], label[seen], 0.45)[:100]
        result.append({"boxes": box[seen][kept], "scores": score[seen][kept], "labels": label[seen][kept]})
    return result


class Images:
    """Batches of 16 images, from the `first` to before the `last`, scaled to 352 x 352 without keeping the ratio."""

    def __init__(self, folder: Path, first: int = 0, last: int | None = None) -> None:
        self.samples = []
        images = CocoImages(folder / "instances.json", folder / "images.zip")
        for index in range(len(images))[first:last]:
            image, target = images[index]
            size = target["boxes"].new_tensor([image.shape[2], image.shape[1]]).repeat(2)
            scaled = F.interpolate(image[None], (SIDE, SIDE), mode="bilinear")[0].flip(0)
            self.samples.append((scaled, target | {"boxes": target["boxes"] / size, "size": size}))

    def __len__(self) -> int:
        return -(-len(self.samples) // 16)

    def __iter__(self) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
        for start in range(0, len(self.samples), 16):
            images, targets = zip(*self.samples[start : start + 16], strict=True)
            yield torch.stack(images), list(targets)


def build(data_dir: str | None = None, samples: int = 64) -> tq.TaskSetup:
    """The trained network with its data, for the command line and for `main`.

    The first `samples` images serve for calibration, the others for evaluation.
    """
    if data_dir is None and "TRACEQUANT_DATA" not in os.environ:
        raise tq.TaskError("give --data-dir, or set TRACEQUANT_DATA to the folder that holds coco_val_mini")
    folder = Path(data_dir or Path(os.environ["TRACEQUANT_DATA"]) / "coco_val_mini")
    model = FastestDet()
    # Counters of BatchNorm were not stored.
    state = model.state_dict() | safetensors.torch.load_file(folder / "fastestdet.safetensors")
    model.load_state_dict(state)
    images = Images(folder, last=samples)
    return tq.TaskSetup(model.eval(), DetectionTask(), images, images, Images(folder, samples))


def plans(setup: tq.TaskSetup) -> Iterator[tuple[str, tq.BitPlan]]:
    """Uniform plans and those of every metric: first the weights, activations at 8 bits, then the activations."""
    data = (setup.calibration, setup.task)
    curvature = tq.estimate_curvature(setup.model, *data)
    print(f"{curvature.estimator}: {curvature.reason}")
    eight = {"*": (8,)}
    for metric in ("trace", "l2", "quadratic", "first+quadratic"):
        sensitivity = tq.measure_sensitivity(
            setup.model,
            *data,
            curvature,
            weight_bits=(2, 3, 4, 5, 6, 8),
            weight_grid=tq.WeightGrid(rounding="nearest"),
            activation_bits=(4, 5, 6, 8),
            criterion=metric,
        )
        if metric == "trace":
            for bits in (8, 6, 5, 4):
                plan = tq.uniform_plan(sensitivity, bits, activation_bits=uniform_activations(curvature.points, 8))
                yield f"uniform {bits}-bit weights", plan
        for bits in (6, 5, 4):
            plan = tq.solve(sensitivity, average_bits=bits, allowed_activation_bits=eight)
            yield f"mixed weights, {metric}, {bits} bits on average", plan
        for bits in (6, 5):
            given = uniform_activations(curvature.points, bits)
            if metric == "trace":
                yield f"uniform {bits}-bit activations", tq.uniform_plan(sensitivity, 8, activation_bits=given)
            mean = average_activation_bits(curvature.points, given)
            plan = tq.solve(sensitivity, allowed_bits=eight, average_activation_bits=mean)
            yield f"mixed activations, {metric}, as many bits as uniform {bits}", plan


def uniform_activations(points: tq.QuantizationPoints, bits: int) -> dict[str, int]:
    """The same bits for every activation but the image, which has 8."""
    return {point.name: 8 if point.is_model_input else bits for point in points.activations}


def main() -> None:
    """Evaluate the float network and every plan, each only calibrated."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="folder of coco_val_mini [TRACEQUANT_DATA/coco_val_mini]")
    parser.add_argument("--images", type=int, help="evaluate on the first so many images only")
    parser.add_argument("--calibration", type=int, default=64, help="images for curvature and ranges")
    parser.add_argument("--out", type=Path, help="write the table to this file as JSON")
    arguments = parser.parse_args()
    setup = build(arguments.data_dir, arguments.calibration)
    if arguments.images:
        setup.evaluation.samples = setup.evaluation.samples[: arguments.images]
    rows = []

    def measure(name: str, model: nn.Module, plan: tq.BitPlan | None) -> None:
        found = setup.task.evaluate(model, setup.evaluation)
        row = {"name": name, "AP": found.metric, "AP50": found.details["AP50"], "AP75": found.details["AP75"]}
        if plan is not None:
            bits = average_activation_bits(points, plan.activation_bits)
            row |= {"weight_bits": plan.average_bits, "activation_bits": bits, "size_mib": plan.size_mib}
        rows.append(row | {"loss": found.loss})
        numbers = " ".join(f"{value:8.3f}" for value in list(row.values())[1:])
        print(f"{name:58} {numbers}", flush=True)
        if arguments.out:
            document = {"images": found.samples, "calibration_images": len(setup.calibration.samples), "rows": rows}
            arguments.out.write_text(json.dumps(document, indent=1) + "\n")

    points = tq.discover(setup.model, setup.calibration, setup.task)
    print(f"{'':58} {'AP':>8} {'AP50':>8} {'AP75':>8} {'w bits':>8} {'a bits':>8} {'MB':>8}")
    measure("float32", setup.model, None)
    for name, plan in plans(setup):
        measure(name, tq.quantize(setup.model, setup.calibration, setup.task, plan), plan)


if __name__ == "__main__":
    main()
