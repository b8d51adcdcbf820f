"""SqueezeNext of 23 blocks (Gholami et al. 2018, "SqueezeNext: Hardware-Aware Neural Network Design").

Two versions differ in where the blocks are: "23" has 6, 6, 8 and 1 of them in its four stages, "23v5", found by the
paper's hardware simulation, has 2, 4, 14 and 1. HAWQ-V2's baseline (2.5 million parameters, top-1 69.38 %) is
2.0-SqNxt-23 with the weights that pytorchcv publishes as `sqnxt23_w2`; the names of parameters here are theirs, so that
those files load.
"""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F

Version = Literal["23", "23v5"]
BLOCKS: dict[Version, tuple[int, int, int, int]] = {"23": (6, 6, 8, 1), "23v5": (2, 4, 14, 1)}
WIDTHS = (32, 64, 128, 256)


class ConvNormReLU(nn.Sequential):
    """A convolution with BatchNorm and ReLU, padded so that only the stride changes the size."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int] = (1, 1), stride: int = 1) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        # The published networks have a bias before BatchNorm, which it makes idle.
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()


class Block(nn.Module):
    """Two 1x1 convolutions that narrow, a 1x3 and a 3x1, and a 1x1 that widens, with a shortcut.

    The first narrows to half of the inputs; not at all in a block that halves the resolution, and to a quarter where
    the block has fewer outputs than inputs. These two kinds have a convolution in the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = inputs if stride == 2 else inputs // 4 if inputs > outputs else inputs // 2
        self.conv1 = ConvNormReLU(inputs, middle, stride=stride)
        self.conv2 = ConvNormReLU(middle, middle // 2)
        self.conv3 = ConvNormReLU(middle // 2, middle, (1, 3))
        self.conv4 = ConvNormReLU(middle, middle, (3, 1))
        self.conv5 = ConvNormReLU(middle, outputs)
        resized = stride == 2 or inputs > outputs
        self.identity_conv = ConvNormReLU(inputs, outputs, stride=stride) if resized else None

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`, rounded up."""
        shortcut = x if self.identity_conv is None else self.identity_conv(x)
        out = self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(x)))))
        return F.relu(out + shortcut)


class Stem(nn.Module):
    """A 7x7 convolution and a pooling, each of stride 2."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = ConvNormReLU(3, outputs, (7, 7), stride=2)
        self.conv.conv.padding = (1, 1)  # where "same" would be 3
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 3, 224, 224]` to `[N, outputs, 55, 55]`."""
        return cast(Tensor, self.pool(self.conv(x)))


class SqueezeNext(nn.Module):
    """`width`-SqNxt-`version` for images of three channels and about 224 x 224 pixels.

    Parameters at 1,000 classes: 724,056 for width 1.0 and 2,583,752 for 2.0 of version "23"; 921,816 and 3,366,344 of
    "23v5".
    """

    def __init__(self, width: float = 2.0, version: Version = "23", num_classes: int = 1000) -> None:
        super().__init__()
        inputs = int(64 * width)
        self.features = nn.Sequential()
        self.features.add_module("init_block", Stem(inputs))
        for number, (channels, blocks) in enumerate(zip(WIDTHS, BLOCKS[version], strict=True), start=1):
            outputs = int(channels * width)
            stage = nn.Sequential()
            for block in range(1, blocks + 1):
                stage.add_module(f"unit{block}", Block(inputs, outputs, stride=2 if block == 1 and number > 1 else 1))
                inputs = outputs
            self.features.add_module(f"stage{number}", stage)
        self.features.add_module("final_block", ConvNormReLU(inputs, int(128 * width)))
        self.output = nn.Linear(int(128 * width), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` to logits `[N, num_classes]`."""
        return cast(Tensor, self.output(self.features(x).mean(dim=(2, 3))))
