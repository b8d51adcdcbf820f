"""`estimator="auto"` on common architectures: which have Gauss-Newton blocks equal to the Hessian's, and why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from tracequant.curvature.choose_estimator import choose_estimator
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
    "functional gelu": (Functional, 32, "called as a function"),
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


def chosen(model: nn.Module, batches: list[Batch], task: tq.Task) -> tuple[str, str]:
    return choose_estimator(model, batches, task, tq.discover(model, batches, task), 0)


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_networks_of_relus_are_recognised(name: str) -> None:
    method, reason = chosen(*prepared(*PIECEWISE_LINEAR[name]), tq.ClassificationTask())
    assert (method, reason.startswith("Hessian and Gauss-Newton products agree")) == ("gauss_newton", True), reason


@pytest.mark.parametrize("name", BENT)
def test_networks_that_bend_are_named_with_the_reason(name: str) -> None:
    make, size, culprit = BENT[name]
    method, reason = chosen(*prepared(make, size), tq.ClassificationTask())
    assert method == "hutchinson"
    assert culprit in reason
    assert "differs from its Hessian's by" in reason


def test_bert_is_left_to_hutchinson() -> None:
    transformers = pytest.importorskip("transformers", reason="BERT is transformers'")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=CLASSES, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(0, 50, (12, 8)), "attention_mask": torch.ones(12, 8, dtype=torch.long)}
    method, reason = chosen(model, [(inputs, torch.arange(12) % CLASSES)], tq.ClassificationTask())
    assert method == "hutchinson"
    assert "differs from its Hessian's by" in reason


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
    method, reason = chosen(model, [([torch.rand(3, 64, 64) for _ in range(2)], targets)], RetinaNetTask())
    assert (method, reason.startswith("Hessian and Gauss-Newton products agree")) == ("gauss_newton", True), reason


def test_lack_of_memory_is_no_reason_for_the_dearer_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tracequant.curvature.choose_estimator.block_differences", full)
    model, batches = nn.Linear(3, 2), [(torch.randn(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(tq.ResourceError, match="memory does not suffice to compare estimators"):
        tq.estimate_curvature(model, batches, tq.ClassificationTask())
