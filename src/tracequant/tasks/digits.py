"""The embedded default: scikit-learn's handwritten digits (1,797 images of 8x8) and a small residual network.

Nothing is downloaded. The network trains itself in under a minute the first time and is cached after that.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tracequant.core.errors import TaskError
from tracequant.core.files import replace_file
from tracequant.core.progress import track
from tracequant.core.settings import TaskOptions
from tracequant.model.classification import ClassificationTask
from tracequant.model.task import TaskSetup
from tracequant.tasks.networks import residual
from tracequant.tasks.registry import refuse

TRAIN_SAMPLES = 1000
EPOCHS = 40


def build(options: TaskOptions) -> TaskSetup:
    """The trained digits network with 1,000 training and 797 test images."""
    refuse(options, "digits", ("data_dir", "model", "workers", "image_size", "crop_share"))
    images, labels = _images()
    train = TensorDataset(images[:TRAIN_SAMPLES], labels[:TRAIN_SAMPLES])
    test = TensorDataset(images[TRAIN_SAMPLES:], labels[TRAIN_SAMPLES:])
    samples = min(options.samples or 512, TRAIN_SAMPLES)
    batch_size = options.batch_size or 64
    calibration = TensorDataset(images[:samples], labels[:samples])
    return TaskSetup(
        model=_trained_model(train, options.weights),
        task=ClassificationTask(),
        calibration=DataLoader(calibration, batch_size=batch_size),
        train=DataLoader(train, batch_size=batch_size, shuffle=True, drop_last=True),
        evaluation=DataLoader(test, batch_size=256),
    )


def _images() -> tuple[Tensor, Tensor]:
    """Images `[1797, 1, 8, 8]` with mean 0 and deviation 1, and labels, in a fixed random order."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).float().unsqueeze(1)
    return (images - 4.884) / 6.017, torch.from_numpy(digits.target[order]).long()


def _trained_model(train: TensorDataset, weights: str | None) -> residual.SmallResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = residual.SmallResNet(blocks=1, widths=(16, 24, 32), in_channels=1)
        path = Path(weights) if weights else _cache_file()
        try:
            model.load_state_dict(safetensors.torch.load_file(path))
            return model.eval()
        except FileNotFoundError:
            if weights:
                raise TaskError(f"weights file {weights} does not exist") from None
        except (safetensors.SafetensorError, RuntimeError) as error:
            if weights:
                raise TaskError(f"weights file {weights} does not fit the digits network: {error}") from None
        _train(model, train)
    with replace_file(path) as temporary:
        safetensors.torch.save_file(model.state_dict(), temporary)
    return model


def _train(model: residual.SmallResNet, train: TensorDataset) -> None:
    loader = DataLoader(train, batch_size=50, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=EPOCHS, steps_per_epoch=len(loader))
    model.train()
    for _ in track(range(EPOCHS), "Training the digits network", enabled=True):
        for images, labels in loader:
            # A shift by up to one pixel, so that the network does not learn the 1,000 images by heart.
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(model(torch.roll(images, shift, dims=(2, 3))), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()


def _cache_file() -> Path:
    """Where the trained weights are kept, under a name that changes when the recipe does."""
    home = os.environ.get("TRACEQUANT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    source = "".join(inspect.getsource(item) for item in (_train, _trained_model, _images, residual))
    return Path(home) / "tracequant" / f"digits-{hashlib.sha256(source.encode()).hexdigest()[:12]}.safetensors"
