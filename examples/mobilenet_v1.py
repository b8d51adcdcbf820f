"""A network of your own on ImageNet's folders: MobileNet v1 of width 0.25 with TensorFlow's weights. Quantize it with

    tracequant run --task examples/mobilenet_v1.py:build --data-dir DIR --weights mobilenet_v1_025_tf.safetensors
        --average-bits 4 --out runs/mobilenet

DIR holds train/<class> and val/<class>, as for `--task imagenet`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from tracequant.core.settings import TaskOptions
from tracequant.tasks.imagenet import image_folder, standard_transforms
from tracequant.tasks.weights import load_state, read_state

CHANNELS = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
HALVING = (1, 3, 5, 11)


class ConvBN(nn.Module):
    """A convolution with BatchNorm and ReLU6, padded as TensorFlow does: one row and column more at the far end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride[0] == 2:
            x = F.pad(x, (0, 1, 0, 1))
        return F.relu6(self.bn(self.conv(x)))


class Block(nn.Module):
    """A depthwise 3x3 and a pointwise convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dw = ConvBN(inputs, inputs, 3, stride, groups=inputs)
        self.pw = ConvBN(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.dw(x))


class MobileNetV1(nn.Module):
    """MobileNet v1, width 0.25."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 8, 3, stride=2)
        inputs = (8, *CHANNELS[:-1])
        self.blocks = nn.Sequential(
            *(Block(a, b, 2 if i in HALVING else 1) for i, (a, b) in enumerate(zip(inputs, CHANNELS, strict=True)))
        )
        self.classifier = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def build(
    data_dir: str,
    weights: str,
    samples: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    workers: int = 4,
    crop_share: float = 0.875,
) -> tq.TaskSetup:
    """The trained network, with pixels from -1 to 1."""
    with torch.random.fork_rng(devices=[]):
        model = MobileNetV1()
    load_state(model, read_state(weights), weights, "expected MobileNet v1 of width 0.25")
    options = TaskOptions(data_dir=data_dir, samples=samples, batch_size=batch_size, seed=seed, workers=workers)
    return image_folder(
        model, standard_transforms(crop_share=crop_share, mean=(0.5,) * 3, deviation=(0.5,) * 3), options
    )
