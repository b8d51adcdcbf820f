"""A task for the command-line tests: a small convolutional network learns which corner of an image is bright."""

import os

import torch
from torch import nn
from torch.nn import functional as F

import tracequant as tq


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy `[count, 1, 6, 6]` images with one bright corner, and its number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    y = torch.randint(0, 4, (count,), generator=generator)
    for i, corner in enumerate(y.tolist()):
        x[i, 0, (corner // 2) * 3 :, (corner % 2) * 3 :][:3, :3] += 0.6
    return x, y


def network() -> nn.Module:
    """Two convolutions, one with BatchNorm, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4),
    )  # fmt: skip


def build(samples: int = 32, seed: int = 0) -> tq.TaskSetup:
    """The trained setup. `TINY_FAULT` in the environment breaks it in the way that a test asks for."""
    fault = os.environ.get("TINY_FAULT", "")
    x, y = images(256, 0)
    test_x, test_y = images(128, 1)
    with torch.random.fork_rng():
        torch.manual_seed(1 if fault == "other weights" else 0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(12):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    calibration = [(x[:16], y[:16]), (x[16:samples], y[16:samples])]
    train = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]
    if fault == "empty loader":
        calibration = []
    elif fault == "nan":
        calibration = [(x[:16].clone().index_fill_(0, torch.tensor([3]), float("nan")), y[:16])]
    elif fault == "targets":
        calibration = [(x[:16], y[:16] + 3)]
    elif fault == "no layers":
        model = nn.Flatten()
    elif fault == "unused layer":
        model.add_module("spare", nn.Identity())
        model.spare.add_module("idle", nn.Linear(3, 3))
    elif fault == "stop in training":
        train = Interrupted(train)
    return tq.TaskSetup(model, tq.ClassificationTask(), calibration, train, [(test_x, test_y)])


class Interrupted:
    """A loader that fails after 70 batches, as if the power went."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.batches = batches
        self.served = 0

    def __iter__(self):
        for batch in self.batches:
            self.served += 1
            if self.served > 70:
                raise KeyboardInterrupt
            yield batch


def not_a_setup() -> int:
    """Returns the wrong thing."""
    return 3
