"""A RetinaNet of a few hundred weights and labelled images for it, which the detection tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

CLASSES = 2


class TwoLevels(nn.Module):
    """Images to features of strides 4 and 8, three channels each."""

    out_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.down = nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = F.relu(self.norm(self.stem(images)))
        return {"0": fine, "1": F.relu(self.down(fine))}


def tiny_retinanet(seed: int = 0, dtype: torch.dtype = torch.float64) -> RetinaNet:
    """One anchor in each cell, of 8 and 16 pixels; images keep their size and are padded to multiples of 8."""
    torch.manual_seed(seed)
    anchors = AnchorGenerator(((8.0,), (16.0,)), ((1.0,), (1.0,)))
    model = RetinaNet(
        TwoLevels(), CLASSES, min_size=16, max_size=32, anchor_generator=anchors, fixed_size=None, size_divisible=8
    )
    for name, parameter in model.named_parameters():
        # The usual deviation of 0.01 would let nothing through so few channels.
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    # Wrong with confidence nearly everywhere, where a focal loss bends downwards.
    nn.init.constant_(model.head.classification_head.cls_logits.bias, 3.0)
    backbone = model.backbone
    assert isinstance(backbone, TwoLevels)
    nn.init.uniform_(backbone.norm.running_var, 0.5, 1.5)
    return model.to(dtype).eval()


def scene(height: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    """An image with three boxes of the anchors' sizes."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator, dtype=dtype)
    sides = torch.tensor([[8.0, 8.0], [7.0, 9.0], [14.0, 15.0]], dtype=dtype)
    room = torch.tensor([width, height], dtype=dtype) - sides
    corner = torch.rand(3, 2, generator=generator, dtype=dtype) * room
    labels = torch.randint(0, CLASSES, (3,), generator=generator)
    return image, {"boxes": torch.cat([corner, corner + sides], 1), "labels": labels}


def scenes(*sizes: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch of images of these (height, width)."""
    found = [scene(height, width, seed, dtype) for seed, (height, width) in enumerate(sizes)]
    return [image for image, _ in found], [target for _, target in found]
