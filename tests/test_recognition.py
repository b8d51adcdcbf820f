"""Which architectures have Gauss-Newton blocks equal to the Hessian's, and what bends in the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from identity import TOLERANCE, block_differences
from tracequant.curvature.choose_estimator import identity
from tracequant.model.batches import Batch

torchvision = pytest.importorskip("torchvision", reason="the architectures are torchvision's")

CLASSES = 5


class SqueezeNextBlock(nn.Module):
    """Two 1x1 convolutions that narrow, a 3x1 and a 1x3, and a 1x1 that widens, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, quarter = max(inputs // 2, 1), max(inputs // 4, 1)

        def step(a: int, b: int, kernel: tuple[int, int], stride: int = 1) -> list[nn.Module]:
            padding = (kernel[0] // 2, kernel[1] // 2)
            return [nn.Conv2d(a, b, kernel, stride, padding, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]

        self.body = nn.Sequential(
            *step(inputs, half, (1, 1), stride),
            *step(half, quarter, (1, 1)),
            *step(quarter, half, (3, 1)),
            *step(half, half, (1, 3)),
            *step(half, outputs, (1, 1)),
        )
        self.shortcut: nn.Module = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*step(inputs, outputs, (1, 1), stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def squeezenext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        SqueezeNextBlock(16, 16, 1),
        SqueezeNextBlock(16, 24, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


class Functional(nn.Module):
    """No module of it bends; its forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)).mean((2, 3)))


def zoo(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


PIECEWISE_LINEAR = {
    "resnet18": (zoo("resnet18"), 64),
    "resnet50": (zoo("resnet50"), 64),
    "inception_v3": (zoo("inception_v3", aux_logits=False, init_weights=False), 75),
    "squeezenet1_1": (zoo("squeezenet1_1"), 64),
    "vgg11_bn": (zoo("vgg11_bn"), 32),
    "mobilenet_v2": (zoo("mobilenet_v2"), 64),
    "squeezenext": (squeezenext, 64),
}
BENT = {
    "efficientnet_b0": (zoo("efficientnet_b0"), 64, "SiLU"),
    "vision transformer": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 32, num_classes=CLASSES),
        32,
        "LayerNorm",
    ),
    "convnext_tiny": (zoo("convnext_tiny"), 64, "LayerNorm"),
    "functional gelu": (Functional, 32, "GELU"),
}


def prepared(make: Callable[[], nn.Module], size: int) -> tuple[nn.Module, list[Batch]]:
    """The network with BatchNorm's statistics from its inputs, as training would have left them, and a batch."""
    torch.manual_seed(0)
    model, images = make(), torch.randn(12, 3, size, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    # Heads that start at zero would hide every layer behind them.
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    for module in last:
        nn.init.normal_(module.weight, std=0.1)
    return model.eval(), [(images, torch.arange(12) % CLASSES)]


def verdict(model: nn.Module, batches: list[Batch], task: tq.Task) -> str:
    return identity(model, batches, task, tq.discover(model, batches, task), 0)


def measured(model: nn.Module, batches: list[Batch], task: tq.Task) -> bool:
    """Whether products with the Hessian's blocks and with Gauss-Newton's agree."""
    points = tq.discover(model, batches, task)
    differences = block_differences(model, batches[0], task, points, torch.Generator().manual_seed(0))
    return max(differences.values()) <= TOLERANCE


def agreed(model: nn.Module, batches: list[Batch], task: tq.Task) -> str:
    """The verdict, which the measurement agrees with."""
    words = verdict(model, batches, task)
    assert words.startswith("these Gauss-Newton traces equal") == measured(model, batches, task), words
    return words


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_networks_of_relus_are_recognised(name: str) -> None:
    words = agreed(*prepared(*PIECEWISE_LINEAR[name]), tq.ClassificationTask())
    assert words == "these Gauss-Newton traces equal the Hessian's: no operation behind a layer bends"


@pytest.mark.parametrize("name", BENT)
def test_networks_that_bend_are_named_with_the_reason(name: str) -> None:
    make, size, culprit = BENT[name]
    words = agreed(*prepared(make, size), tq.ClassificationTask())
    assert words.startswith("Gauss-Newton traces, not the Hessian's: ")
    assert culprit in words


def test_transformers_bend() -> None:
    transformers = pytest.importorskip("transformers", reason="BERT and GPT-2 are transformers'")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=CLASSES, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(0, 50, (12, 8)), "attention_mask": torch.ones(12, 8, dtype=torch.long)}
    words = agreed(model, [(inputs, torch.arange(12) % CLASSES)], tq.ClassificationTask())
    assert "GELU" in words
    assert "LayerNorm" in words


class Applied(nn.Module):
    """A convolution, a function of its output, and a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, CLASSES), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)).mean((2, 3)))


class OwnOutput(nn.Module):
    """A layer that is applied to its own output, with nothing but ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.again(self.again(x).relu()).mean((2, 3)))


class SideBySide(OwnOutput):
    """The same layer twice, its outputs added: linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((self.again(x) + self.again(x.flip(2))).mean((2, 3)))


class Cube(torch.autograd.Function):
    """A custom function that bends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


class Relu(torch.autograd.Function):
    """A custom function that does not bend; it is named as torch's own is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x > 0)


def in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :2].sigmoid_()
    return x


SMALL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu6": (lambda: Applied(F.relu6), ""),
    "leaky": (lambda: Applied(F.leaky_relu), ""),
    "interpolation": (lambda: Applied(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), ""),
    "padding": (lambda: Applied(lambda x: F.pad(F.max_pool2d(x, 2), (1, 0, 0, 1))), ""),
    "constant factor": (lambda: Applied(lambda x: x * torch.linspace(0, 1, 16) / 3), ""),
    "side by side": (SideBySide, ""),
    "custom relu": (lambda: Applied(Relu.apply), "measured, and does not bend"),
    "own output": (OwnOutput, "applied to its own output"),
    "square": (lambda: Applied(lambda x: x * x), "a product"),
    "power": (lambda: Applied(lambda x: x**2), "a power"),
    "gate": (lambda: Applied(lambda x: x * x.mean((2, 3), keepdim=True)), "a product"),
    "quotient": (lambda: Applied(lambda x: x / (1 + x.abs())), "a quotient"),
    "norm": (lambda: Applied(lambda x: F.normalize(x)), "a quotient"),
    "instance norm": (lambda: Applied(F.instance_norm), "BatchNorm by the statistics"),
    "prelu": (lambda: nn.Sequential(Applied(nn.PReLU(4))), ""),
    "custom cube": (lambda: Applied(Cube.apply), "measured behind layer"),
    "in place": (lambda: Applied(in_place), "measured behind layer"),
    "elu": (lambda: Applied(F.elu), "ELU"),
}


@pytest.mark.parametrize("name", SMALL)
def test_operations_are_judged_as_they_are_measured(name: str) -> None:
    make, text = SMALL[name]
    words = agreed(*prepared(make, 32), tq.ClassificationTask())
    assert (text or "no operation behind a layer bends") in words


def test_an_operation_without_second_derivative_may_be_known_not_to_bend() -> None:
    """torch has none of Hardsigmoid, so that nothing could be measured."""
    words = verdict(*prepared(lambda: Applied(F.hardsigmoid), 32), tq.ClassificationTask())
    assert words == "these Gauss-Newton traces equal the Hessian's: no operation behind a layer bends"


class RetinaNetTask(tq.Task):
    """RetinaNet's focal and box losses at fixed anchors; the images are all of one size."""

    def outputs(self, model: Any, batch: Batch) -> Any:
        images, targets = model.transform(*batch)
        features = list(model.backbone(images.tensors).values())
        anchors = model.anchor_generator(images, features)
        self._compute = lambda outputs: model.compute_loss(targets, outputs, anchors)
        return model.head(features)

    def loss(self, outputs: Any, batch: Batch) -> Any:
        return self._compute(outputs)

    def metric(self, outputs: Any, batch: Batch) -> float:
        return 0.0

    def batch_size(self, batch: Batch) -> int:
        return len(batch[0])


def test_retinanet_is_recognised() -> None:
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).eval()
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(2)]
    words = agreed(model, [([torch.rand(3, 64, 64) for _ in range(2)], targets)], RetinaNetTask())
    assert words == "these Gauss-Newton traces equal the Hessian's: no operation behind a layer bends"


def test_lack_of_memory_for_the_check_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tracequant.curvature.choose_estimator.find_bends", full)
    model, batches = nn.Linear(3, 2), [(torch.randn(2, 3), torch.tensor([0, 1]))]
    curvature = tq.estimate_curvature(model, batches, tq.ClassificationTask())
    assert "memory did not suffice to see whether they equal the Hessian's" in curvature.reason
