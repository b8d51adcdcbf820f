"""The default distance to a teacher: divergence where the loss is a softmax's, mean squared difference elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from models import gelu_mlp, images, labelled
from tracequant import CallableTask, ClassificationTask, Task, TaskError
from tracequant.model.distillation import output_distance


def distance(loss: Callable[[Any, Any], Any], student: Any, teacher: Any, batch: Any = None) -> Tensor:
    return CallableTask(loss).distillation_loss(student, teacher, batch)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's outputs."""
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return student, teacher


def kl(student: Tensor, teacher: Tensor, axis: int) -> Tensor:
    """KL(teacher ‖ student) by its definition, at every position."""
    p, q = teacher.softmax(axis), student.softmax(axis)
    return (p * (p / q).log()).sum(axis)


# Where the loss is a softmax's


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6)])
def test_cross_entropy_gives_the_mean_divergence(shape: tuple[int, ...]) -> None:
    student, teacher = pair(*shape)
    targets = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    torch.testing.assert_close(distance(F.cross_entropy, student, teacher, targets), kl(student, teacher, 1).mean())


def test_classes_may_lie_on_the_last_axis() -> None:
    student, teacher = pair(4, 5, 7)
    targets = torch.zeros(4, 5, dtype=torch.long)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    torch.testing.assert_close(distance(loss, student, teacher, targets), kl(student, teacher, -1).mean())


def test_positions_that_the_loss_ignores_count_nothing() -> None:
    student, teacher = pair(4, 3, 5)
    targets = torch.zeros(4, 5, dtype=torch.long)
    targets[0, 1:] = targets[2] = -100
    expected = kl(student, teacher, 1)[targets == 0].mean()
    torch.testing.assert_close(distance(F.cross_entropy, student, teacher, targets), expected)


def test_positions_weigh_what_they_weigh_in_the_loss() -> None:
    student, teacher = pair(4, 3)
    targets, weight = torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    shares = weight[targets] / weight[targets].sum()
    expected = (shares * kl(student, teacher, 1)).sum()
    torch.testing.assert_close(
        distance(lambda o, t: F.cross_entropy(o, t, weight=weight), student, teacher, targets), expected
    )
    smoothed = distance(lambda o, t: F.cross_entropy(o, t, label_smoothing=0.2), student, teacher, targets)
    torch.testing.assert_close(smoothed, kl(student, teacher, 1).mean())


@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0, 1e4])
def test_confident_outputs_are_recognised_in_float32(size: float) -> None:
    """At such logits the Hessian itself has underflowed."""
    student, teacher = pair(8, 10, dtype=torch.float32)
    targets = torch.arange(8)
    expected = F.kl_div(
        (size * student).log_softmax(1), (size * teacher).log_softmax(1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(distance(F.cross_entropy, size * student, size * teacher, targets), expected)


def test_it_is_what_classification_computes() -> None:
    task, (student, teacher) = ClassificationTask(), pair(4, 3, 5)
    batch = (None, torch.tensor([[0, 1, -100, 2, 0]] * 4))
    torch.testing.assert_close(
        Task.distillation_loss(task, student, teacher, batch), task.distillation_loss(student, teacher, batch)
    )


# Elsewhere


LOSSES = {
    "squared error": lambda o, t: F.mse_loss(o, t),
    "absolute error, without curvature": lambda o, t: F.l1_loss(o, t),
    "binary cross-entropy": lambda o, t: F.binary_cross_entropy_with_logits(o, (t > 0).double()),
    "Poisson": lambda o, t: F.poisson_nll_loss(o, t.abs()),
    "softmax under a square": lambda o, t: (1 - o.softmax(1)[:, 0]).square().mean(),
    "linear": lambda o, t: o.mean(),
    "coupled samples": lambda o, t: o.var(0).sum(),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_other_losses_give_the_mean_squared_difference(name: str) -> None:
    student, teacher = pair(4, 3)
    found = distance(LOSSES[name], student, teacher, torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(found, F.mse_loss(student, teacher))


def test_outputs_stay_in_the_domain_of_their_loss() -> None:
    """Binary cross-entropy refuses anything but probabilities."""
    student, teacher = (x.sigmoid() for x in pair(4, 3))
    targets = torch.ones(4, 3, dtype=torch.float64)
    torch.testing.assert_close(
        distance(F.binary_cross_entropy, student, teacher, targets), F.mse_loss(student, teacher)
    )


def test_a_loss_without_a_second_derivative() -> None:
    student, teacher = (x.log_softmax(2) for x in pair(6, 2, 4))
    targets, lengths = torch.tensor([[1, 2], [3, 1]]), torch.tensor([6, 6])

    def ctc(outputs: Tensor, batch: Any) -> Tensor:
        return F.ctc_loss(outputs, targets, lengths, torch.tensor([2, 2]))

    torch.testing.assert_close(distance(ctc, student, teacher), F.mse_loss(student, teacher))


def test_a_nesting_of_outputs_adds_what_the_loss_uses() -> None:
    (classes, teacher_classes), (boxes, teacher_boxes) = pair(4, 3), pair(4, 2, 4)
    targets = torch.tensor([0, 1, -100, 2])

    def loss(outputs: Any, batch: Any) -> dict[str, Tensor]:
        return {"class": F.cross_entropy(outputs["class"], targets), "box": 0.3 * outputs["box"][0].abs().mean()}

    student = {"class": classes, "box": (boxes, "xyxy"), "features": torch.zeros(2), "count": torch.tensor(3)}
    teacher = {"class": teacher_classes, "box": (teacher_boxes, "xyxy"), "features": torch.ones(5), "count": 0}
    teacher["count"] = torch.tensor(4)
    expected = kl(classes, teacher_classes, 1)[targets >= 0].mean() + F.mse_loss(boxes, teacher_boxes)
    torch.testing.assert_close(distance(loss, student, teacher), expected)


def test_a_share_of_the_loss_is_the_same_share_of_the_divergence() -> None:
    student, teacher = pair(4, 3)
    targets = torch.arange(4) % 3
    found = distance(lambda o, t: 0.25 * F.cross_entropy(o, t), student, teacher, targets)
    torch.testing.assert_close(found, 0.25 * kl(student, teacher, 1).mean())


def test_one_tensor_twice_counts_once() -> None:
    student, teacher = pair(4, 3)
    found = distance(lambda o, t: F.mse_loss(o[0], t) + F.mse_loss(o[1], t), [student] * 2, [teacher] * 2, teacher)
    torch.testing.assert_close(found, F.mse_loss(student, teacher))


def test_a_loss_that_works_in_place_leaves_the_outputs_alone() -> None:
    student, teacher = pair(4, 3)
    before = student.clone()
    distance(lambda o, t: o.sub_(1).square().mean(), student, teacher)
    assert torch.equal(student, before)


# Gradients and errors


def test_the_gradient_is_that_of_the_distance_alone() -> None:
    student, teacher = pair(4, 3)
    targets = torch.arange(4) % 3
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(F.cross_entropy, student, teacher, targets), student)
    torch.testing.assert_close(gradient, (student.softmax(1) - teacher.softmax(1)) / 4)
    with torch.no_grad():
        assert not distance(F.cross_entropy, student, teacher, targets).requires_grad


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.zeros(2, 3), (torch.zeros(2, 3),), "student returns a tensor .* and the teacher a tuple of 1"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"student has shape \[2, 3\] and the teacher's \[2, 4\]"),
    ],
)
def test_outputs_of_another_make_are_refused(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        output_distance(lambda outputs: outputs.square().mean(), student, teacher)


def test_outputs_that_the_loss_does_not_use_are_refused() -> None:
    with pytest.raises(TaskError, match=r"uses no tensor of the outputs .*custom classes are not looked into"):
        output_distance(lambda outputs: torch.zeros(()), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(TaskError, match="uses no tensor"):
        output_distance(lambda outputs: torch.zeros(()), object(), object())


class TwoHeads(nn.Module):
    """Classes and a size for each vector of 6 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = gelu_mlp(), nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        both = self.heads(hidden)
        return {"class": hidden, "size": both[:, :1], "unused": both[:, 1:]}


def test_finetuning_with_a_teacher_takes_any_task() -> None:
    """Pure distillation of a model of several outputs brings it nearer to its teacher."""
    torch.manual_seed(0)
    model, batches = TwoHeads().eval(), labelled(6, sizes=(16, 16))

    def loss(outputs: dict[str, Tensor], batch: Any) -> Tensor:
        sizes = batch[0].sum(1, keepdim=True)
        return F.cross_entropy(outputs["class"], batch[1]) + F.smooth_l1_loss(outputs["size"], sizes)

    task = CallableTask(loss)
    points = tq.discover(model, batches, task)
    bits = {layer.name: 3 for layer in points.layers}
    plan = tq.BitPlan(bits, {}, 0, 0, 1, 0.0, 0.0, tq.WeightGrid(rounding="nearest"), "", "by hand", "none")
    quantized = tq.quantize(model, batches, task, plan)
    losses = tq.finetune(quantized, batches, task, steps=60, learning_rate=0.01, teacher=model, distillation=1.0).losses
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_images_of_pixelwise_classes() -> None:
    ((x, _),) = images()
    student, teacher = nn.Conv2d(3, 4, 1).double()(x), nn.Conv2d(3, 4, 1).double()(x)
    targets = torch.full((4, 8, 8), -100)
    targets[:, :3] = 1
    expected = kl(student, teacher, 1)[:, :3].mean()
    torch.testing.assert_close(distance(F.cross_entropy, student, teacher, targets), expected)
