"""The paper's Table 2 on blood cells: a small RetinaNet, trained here, quantized in five ways.

    python benchmarks/bccd_retinanet.py [--out DIR] [--seeds 3] [--steps 400] [--short]

Data: BCCD (364 microscope images, three kinds of cells) from TRACEQUANT_DATA; trained on train + val, tested on test.
The network is torchvision's RetinaNet on a ResNet18 of a quarter of the width with BatchNorm, 320x240 pixels, random
initial weights. Training takes about a quarter of an hour on one core and goes on from its checkpoint; so does every
row, whose results are in benchmarks/results/bccd_retinanet.json as soon as they are there. A GPU is used if there is
one. `--short` is a minute's rehearsal of everything, whose figures mean nothing, into DIR alone.
"""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

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
from tracequant.artifact import replace_file
from tracequant.task import total_loss
from tracequant.tasks.coco import CocoImages, Target

WIDTHS = (16, 32, 64, 128)
CHANNELS = 32
HEIGHT, WIDTH = 240, 320
CLASSES = 3
BATCH = 8
EPOCHS = 150
LEARNING_RATE = 2e-3


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
    moved = (moved * torch.empty(count, 3, 1, 1).uniform_(0.85, 1.15) + torch.empty(count, 1, 1, 1).uniform_(-0.1, 0.1))
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
    """The trained network, from `out/float.safetensors` if it is there; an interrupted training goes on."""
    torch.manual_seed(0)
    model = build_model().to(device)
    path, checkpoint = out / "float.safetensors", out / "training.pt"
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


def main() -> None:
    """Train, then measure row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bccd"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    folder = data_folder("bccd")
    if folder is None:
        print("skipped: TRACEQUANT_DATA does not hold bccd")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train(folder / "bccd", arguments.out, arguments.epochs, device)


if __name__ == "__main__":
    main()
