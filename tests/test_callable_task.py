"""Tasks of functions alone: dictionary batches, a metric of the user's, pixelwise models, models of several outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from models import CLASSES, gelu_mlp, images, labelled
from tracequant import CallableTask, ClassificationTask, DataError, TaskError


class Sum(nn.Module):
    """Two inputs, by keyword, to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(left + right))


def dictionary(key: str = "labels", size: int = 6) -> dict[str, Tensor]:
    left, right = torch.randn(2, size, 3, generator=torch.Generator().manual_seed(0))
    return {"left": left, key: torch.arange(size) % CLASSES, "right": right}


# Classification


@pytest.mark.parametrize("key", ["labels", "y"])
def test_a_dictionary_is_a_batch(key: str) -> None:
    """Its targets under a key, its inputs under the others; the functions get both apart."""
    model, batch, seen = Sum().eval(), dictionary(key), []

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        seen.append(sorted(inputs))
        return torch.as_tensor(model(**inputs))

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=0.1)

    inputs = {name: batch[name] for name in ("left", "right")}
    logits = model(**inputs)
    want = tq.Evaluation(
        "accuracy %",
        pytest.approx(100 * (logits.argmax(1) == batch[key]).double().mean().item()),
        pytest.approx(loss(logits, batch[key]).item()),
        6,
    )
    plain = ClassificationTask(loss, targets=key)
    assert tq.evaluate(model, [batch], plain) == want
    assert tq.evaluate(model, [batch], ClassificationTask(loss, forward, targets=key)) == want
    assert seen == [["left", "right"]]
    assert plain.batch_size(plain.select(batch, 1, 3)) == 2


def test_a_dictionary_without_targets_names_its_keys() -> None:
    with pytest.raises(TaskError, match=r"keys 'left', 'y', 'right', expected a tensor of targets under 'labels'"):
        tq.evaluate(Sum(), [dictionary("y")], ClassificationTask())


def test_a_metric_of_the_users() -> None:
    """Mean intersection over union of pixelwise classes, say."""

    def worst(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(1) == targets).float().mean((1, 2)).amin()

    ((x, _),) = images()
    model, targets = nn.Conv2d(3, 3, 1).double(), (x[:, 0] > 0).long()
    hits = (model(x).argmax(1) == targets).float().mean((1, 2))
    found = tq.evaluate(model, [(x, targets)], ClassificationTask(metric=worst, metric_name="worst image"))
    assert (found.metric_name, found.metric) == ("worst image", pytest.approx(hits.min().item()))
    assert ClassificationTask(metric=worst).metric_name == "worst"
    assert ClassificationTask().metric_name == "accuracy %"


def test_a_single_logit_stands_for_two_classes() -> None:
    """Masks as numbers with an axis of channels, or as classes without it; some of the latter ignored."""
    logits = torch.tensor([[[2.0, -1.0, 0.5, -3.0]]]).requires_grad_()
    mask = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    ((x, _),) = labelled(6)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.reshape(targets.shape), targets.double().clamp(0, 1))

    task = ClassificationTask(loss)
    assert task.metric(logits, (None, mask)) == 75.0
    classes = mask[:, 0].long()
    classes[0, 2] = -100
    assert task.metric(logits, (None, classes)) == 100.0
    binary = nn.Linear(6, 1).double()
    assert tq.evaluate(binary, [(x, torch.tensor([0, 1, 1, 0]))], task).samples == 4
    with pytest.raises(DataError, match="target 2 is out of range"):
        tq.evaluate(binary, [(x, torch.tensor([0, 2, 1, 0]))], task)
    # A softmax over one class has no divergence at all.
    assert task.distillation_loss(logits, logits + 1, (None, mask)).item() == pytest.approx(1)


# Functions of the whole batch


class Detector(nn.Module):
    """Vectors to a dictionary of logits and a pair of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.size = gelu_mlp(), nn.Linear(CLASSES, 2).double()

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.body(x)
        return {"class": logits, "size": tuple(self.size(logits).unbind(1))}


def detector_loss(outputs: Any, batch: Any) -> dict[str, Tensor]:
    width, height = outputs["size"]
    return {
        "class": F.cross_entropy(outputs["class"], batch["class"]),
        "size": F.mse_loss(torch.stack([width, height], 1), batch["size"]),
    }


def detector_batches(*sizes: int) -> list[dict[str, Tensor]]:
    return [{"x": x, "class": y, "size": x[:, :2].abs()} for x, y in labelled(6, sizes=sizes)]


def detector_task(**options: Any) -> CallableTask:
    return CallableTask(detector_loss, forward=lambda model, batch: model(batch["x"]), **options)


def test_several_outputs_from_curvature_to_file(tmp_path: Any) -> None:
    """Traces of both heads by Gauss-Newton, a plan, fine-tuning with a teacher, and the file."""
    torch.manual_seed(0)
    model, task = Detector().float().eval(), detector_task()
    batches = [
        {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
        for batch in detector_batches(12, 12)
    ]
    curvature = tq.estimate_curvature(model, batches, task, estimator="gauss_newton")
    assert all(estimate.trace > 0 for estimate in curvature.weights.values())
    sensitivity = tq.measure_sensitivity(model, batches, task, curvature)
    quantized = tq.quantize(model, batches, task, tq.solve(sensitivity, average_bits=4))
    losses = tq.finetune(quantized, batches, task, steps=20, teacher=model).losses
    assert losses[-1] < losses[0]
    tq.pack(quantized, tmp_path / "model.safetensors")
    loaded = tq.load(tmp_path / "model.safetensors", model)
    assert tq.evaluate(loaded, batches, task) == tq.evaluate(quantized.eval(), batches, task)


def test_the_metric_is_the_users_or_the_negative_loss() -> None:
    model, (batch,) = Detector().eval(), detector_batches(8)
    plain = tq.evaluate(model, [batch], detector_task())
    assert (plain.metric_name, plain.metric) == ("-loss", -plain.loss)

    def hits(outputs: Any, batch: Any) -> Tensor:
        return (outputs["class"].argmax(1) == batch["class"]).double().mean()

    want = hits(model(batch["x"]), batch).item()
    for options, name in (({}, "hits"), ({"metric_name": "share"}, "share")):
        found = tq.evaluate(model, [batch], detector_task(metric=hits, **options))
        assert (found.metric_name, found.metric, found.loss) == (name, pytest.approx(want), plain.loss)


def test_pairs_need_no_forward() -> None:
    model, batches = gelu_mlp().eval(), labelled(6, sizes=(4, 3))
    task = CallableTask(lambda logits, batch: F.cross_entropy(logits, batch[1]))
    found, want = (tq.evaluate(model, batches, t) for t in (task, ClassificationTask()))
    assert (found.loss, found.samples) == (want.loss, 7)
    inputs = {"left": torch.zeros(2, 3), "right": torch.zeros(2, 3)}
    assert task.outputs(Sum(), (inputs, None)).shape == (2, CLASSES)


def test_the_size_of_a_batch_is_counted_or_said() -> None:
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 7)]
    assert (
        CallableTask(detector_loss).batch_size({"scale": torch.tensor(2.0), "name": "a", "x": torch.zeros(5, 2)}) == 5
    )
    assert (
        CallableTask(detector_loss, batch_size=lambda batch: len(batch["images"])).batch_size({"images": images}) == 2
    )
    with pytest.raises(TaskError, match=r"batch is a dict and holds no tensor .* give CallableTask a batch_size"):
        CallableTask(detector_loss).batch_size({"name": "a"})


def test_a_dictionary_needs_a_forward() -> None:
    with pytest.raises(
        TaskError, match=r"expects batches \(inputs, targets\), got a dict; pass CallableTask\(forward="
    ):
        tq.evaluate(Detector(), detector_batches(3), CallableTask(detector_loss))
