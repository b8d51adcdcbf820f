"""CIFAR-10 with the residual networks of depth 20, 32, 44 and 56.

Images come from torchvision's own folder (`cifar-10-batches-py`) or from lossless mosaics (`test.webp` and
`train_0.webp` ... `train_4.webp`: 100 x 100 tiles of 32 x 32 pixels, row by row, tile i of class i mod 10).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tracequant.core.errors import TaskError
from tracequant.core.settings import TaskOptions
from tracequant.model.batches import Batch
from tracequant.model.classification import ClassificationTask
from tracequant.model.task import TaskSetup
from tracequant.tasks.imagenet import DEVIATION, MEAN
from tracequant.tasks.networks.residual import SmallResNet
from tracequant.tasks.registry import refuse
from tracequant.tasks.weights import load_state, read_state

DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56}


def build(options: TaskOptions) -> TaskSetup:
    """A trained CIFAR ResNet with the 50,000 training images (cropped and mirrored) and 10,000 test images."""
    if options.data_dir is None:
        raise TaskError(
            "the cifar10 task needs data_dir=DIR: torchvision's folder (holding cifar-10-batches-py) or one of lossless"
            " mosaics (test.webp, train_0.webp, ...)"
        )
    folder = Path(options.data_dir)
    if not folder.is_dir():
        raise TaskError(f"data_dir {folder} does not exist, or is no folder")
    if options.weights is None:
        raise TaskError(
            "the cifar10 task needs weights=FILE: a file with the trained network's state dict (safetensors or .pth)"
        )
    refuse(options, "cifar10", ("workers", "image_size", "crop_share"))
    name = options.model or _guess_model(options.weights)
    if name not in DEPTHS:
        raise TaskError(f"unknown model {name!r} for cifar10; choose {', '.join(DEPTHS)}")
    model = SmallResNet(blocks=(DEPTHS[name] - 2) // 6)
    hint = f"choose the depth with model=NAME ({', '.join(DEPTHS)})"
    load_state(model, read_state(options.weights), options.weights, hint)
    train_images, train_labels = load_images(folder, train=True)
    test_images, test_labels = load_images(folder, train=False)
    samples, batch_size = options.samples or 512, options.batch_size or 128
    calibration = TensorDataset(normalize(train_images[:samples]), train_labels[:samples])
    evaluation = TensorDataset(normalize(test_images), test_labels)
    return TaskSetup(
        model=model.eval(),
        task=ClassificationTask(),
        calibration=DataLoader(calibration, batch_size=min(batch_size, samples)),
        train=AugmentedBatches(train_images, train_labels, batch_size),
        evaluation=DataLoader(evaluation, batch_size=500),
    )


def load_images(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 32, 32]` as bytes and labels `[N]`, from mosaics or from torchvision's folder."""
    try:
        from PIL import Image
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise TaskError(f"the cifar10 task needs torchvision ({error}); pip install 'tracequant[vision]'") from None
    mosaics = [folder / f"train_{i}.webp" for i in range(5)] if train else [folder / "test.webp"]
    if all(path.is_file() for path in mosaics):
        tiles = []
        for path in mosaics:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            grid = pixels.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3)
            tiles.append(torch.from_numpy(np.ascontiguousarray(grid).reshape(-1, 3, 32, 32)))
        images = torch.cat(tiles)
        return images, torch.arange(len(images)) % 10
    try:
        dataset = CIFAR10(folder, train=train)
    except RuntimeError as error:
        raise TaskError(
            f"{folder} holds neither cifar-10-batches-py nor the mosaics {', '.join(p.name for p in mosaics)} ({error})"
        ) from None
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def normalize(images: Tensor) -> Tensor:
    """Bytes to floats with the networks' mean and deviation."""
    # The networks in circulation were trained with ImageNet's constants.
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    deviation = torch.tensor(DEVIATION, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / deviation


class AugmentedBatches:
    """Shuffled batches of randomly cropped (4 pixels of padding) and mirrored images; a new order in every pass.

    A whole batch is cropped by one gather, which keeps up with a small network where an image at a time does not. All
    randomness is from torch's global generator. Batches are made where the images are.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self._images, self._labels, self._batch_size = images, labels, batch_size

    def to(self, device: torch.device | str) -> AugmentedBatches:
        """The same batches, images and labels being on the device as a whole."""
        return AugmentedBatches(self._images.to(device), self._labels.to(device), self._batch_size)

    def __len__(self) -> int:
        return len(self._images) // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self._images))
        for start in range(0, len(self) * self._batch_size, self._batch_size):
            chosen = order[start : start + self._batch_size].to(self._images.device)
            yield normalize(random_crop(self._images[chosen])), self._labels[chosen]


def random_crop(images: Tensor, padding: int = 4) -> Tensor:
    """Each image of `[N, C, H, W]` moved by up to `padding` pixels each way, zeros moving in, and mirrored or not."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top = torch.randint(0, 2 * padding + 1, (count, 1))
    left = torch.randint(0, 2 * padding + 1, (count, 1))
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + left
    rows = torch.arange(height).expand(count, height) + top
    index = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    index = index.flatten(1)[:, None, :].to(images.device)
    flat = padded.flatten(2).gather(2, index.expand(count, channels, -1))
    return flat.view(count, channels, height, width)


def _guess_model(weights: str) -> str:
    """The network that a weights file is named after."""
    stem = Path(weights).stem
    return next((name for name in DEPTHS if stem.startswith(name)), "resnet20")
