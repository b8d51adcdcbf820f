"""A loss that is a sum over the batch is refused before anything is measured; every other loss passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tracequant as tq
from models import CLASSES, gelu_mlp, labelled, snapshot
from tracequant import ClassificationTask, TaskError
from tracequant.model.mean_loss import summed_terms

SUM = ClassificationTask(loss=lambda z, y: F.cross_entropy(z, y, reduction="sum"))
SIZES = (2, 3, 4, 5, 8, 33)


class Terms(ClassificationTask):
    """A dictionary of terms: a mean, a term that is zero, and one of the caller's."""

    def __init__(self, term: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.term = term

    def loss(self, outputs: Any, batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {
            "class": F.cross_entropy(outputs, batch[1]),
            "nothing": 0 * outputs.sum(),
            "box": self.term(outputs, batch[1]),
        }


def verdict(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> bool | None:
    return summed_terms(ClassificationTask(loss=loss), outputs, (torch.zeros(len(targets)), targets))[""]


def drawn(size: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits of five classes and targets; `shape` are positions within a sample."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, CLASSES, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return logits, torch.randint(0, CLASSES, (size, *shape), generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: F.cross_entropy(z, y, reduction="sum") / 32,  # divided, and not by the samples of the batch
        lambda z, y: -F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: z.square().sum(),
        lambda z, y: z.square().mean(1).sum(),
    ],
    ids=["cross-entropy", "divided by a constant", "negative", "squares", "mean of a sample"],
)
def test_a_sum_is_found(loss: Callable[[Tensor, Tensor], Tensor], size: int, dtype: torch.dtype) -> None:
    assert verdict(loss, *drawn(size, dtype=dtype)) is True


def test_a_sum_that_one_sample_dominates_is_found() -> None:
    """Cuts that leave next to nothing of the loss on one side say nothing; others do."""
    logits, targets = torch.zeros(8, CLASSES), torch.zeros(8, dtype=torch.long)
    logits[:, 0] = 20.0
    logits[0, 0], logits[4, 0] = -3.0, 1.0
    assert verdict(lambda z, y: F.cross_entropy(z, y, reduction="sum"), logits, targets) is True


WEIGHTS = torch.tensor([0.1, 5.0, 1.0, 0.01, 2.0], dtype=torch.float64)


def mean_over_positives(z: Tensor, y: Tensor) -> Tensor:
    """Of detectors: a term of every sample, divided by the number of positives, or by 1 where there are none."""
    return F.cross_entropy(z, y, reduction="sum") / (y == 1).sum().clamp(min=1)


def boxes_of_positives(z: Tensor, y: Tensor) -> Tensor:
    """Zero without positives."""
    return z[y == 1].square().sum() / (y == 1).sum().clamp(min=1)


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    """Every sample against all others of the batch."""
    return F.cross_entropy(F.normalize(z) @ F.normalize(z).T / 0.1, torch.arange(len(z)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda z, y: -F.cross_entropy(z, y),
        lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS),
        lambda z, y: F.cross_entropy(z, y, ignore_index=1),
        lambda z, y: F.cross_entropy(z, y, ignore_index=1, reduction="sum") / (y != 1).sum().clamp(min=1),
        mean_over_positives,
        boxes_of_positives,
        contrastive,
        lambda z, y: contrastive(torch.ones_like(z), y),  # of 4 samples: log 4 = log 2 + log 2
        lambda z, y: z.sum(1).mean().square(),
        lambda z, y: 0 * z.sum(),
        lambda z, y: z.square().sum() / len(z),
        lambda z, y: z.square().sum().sqrt(),
        lambda z, y: z.mean(),
    ],
    ids=[
        "mean", "negative", "class weights", "ignored", "mean of the counted", "positives", "boxes of positives",
        "contrastive", "collapsed", "square of a mean", "zero", "divided", "norm", "mixed signs",
    ],
)  # fmt: skip
def test_other_losses_pass(loss: Callable[[Tensor, Tensor], Tensor], size: int) -> None:
    logits, targets = drawn(size)
    targets[0] = 1  # a positive, and another where there is room
    targets[-1] = 1
    assert verdict(loss, logits, targets) is not True


def test_tokens_that_do_not_count_are_unequal_in_the_pieces() -> None:
    """All of the first half's tokens are ignored: the loss of the other half alone is the loss of the batch."""
    logits, targets = drawn(4, 7)
    targets[:2], targets[2, 3:] = -100, -100
    assert verdict(F.cross_entropy, logits, targets) is not True
    counted = lambda z, y: F.cross_entropy(z, y, reduction="sum") / (y != -100).sum().clamp(min=1)  # noqa: E731
    assert verdict(counted, logits, targets) is not True
    targets[0, 0] = 2  # one token against three and seven
    assert verdict(F.cross_entropy, logits, targets) is not True
    assert verdict(lambda z, y: F.cross_entropy(z, y, reduction="sum"), logits, targets) is True


def test_a_single_positive_does_not_make_a_sum() -> None:
    """In every piece the loss is divided by 1; the batch joined to itself is divided by 2, and tells."""
    logits, targets = drawn(8)
    targets[:] = 0
    targets[5] = 1
    assert verdict(mean_over_positives, logits, targets) is False


def test_a_batch_without_positives_waits_for_the_next_one() -> None:
    """Divided by max(1, positives), the loss of a batch without any is a sum; that of the next batch is not."""
    inputs = labelled(6, sizes=(8, 8))
    empty = [(inputs[0][0], torch.zeros(8, dtype=torch.long)), (inputs[1][0], torch.ones(8, dtype=torch.long))]
    task = ClassificationTask(loss=mean_over_positives)
    assert verdict(mean_over_positives, *drawn(8)[:1], torch.zeros(8, dtype=torch.long)) is True
    assert tq.discover(gelu_mlp(), empty, task).layers
    with pytest.raises(TaskError, match="the sum over a batch's samples"):
        tq.discover(gelu_mlp(), empty[:1] * 2, task)


@pytest.mark.parametrize(
    "door",
    [
        tq.discover,
        tq.estimate_curvature,
        lambda model, batches, task: tq.estimate_curvature(model, batches, task, estimator="hutchinson"),
    ],
    ids=["discover", "estimate_curvature", "hutchinson"],
)
def test_the_error_names_the_cure_and_the_model_is_as_it_was(door: Callable[..., Any]) -> None:
    model = gelu_mlp()
    before = snapshot(model)
    with pytest.raises(TaskError, match=r"Task\.loss is the sum .*\(4 here.*reduction=\"mean\", or divide"):
        door(model, labelled(6), SUM)
    assert snapshot(model) == before


def test_the_error_names_the_term() -> None:
    with pytest.raises(TaskError, match=r"the term 'box' of Terms\.loss is the sum"):
        tq.discover(gelu_mlp(), labelled(6), Terms(lambda z, y: z.square().sum()))
    assert tq.discover(gelu_mlp(), labelled(6), Terms(lambda z, y: z.square().mean())).layers


def test_the_model_is_called_once_for_a_mean() -> None:
    model, calls = gelu_mlp(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    tq.discover(model, labelled(6, sizes=(4, 4, 4)), ClassificationTask())
    assert len(calls) == 1


class Undivided(ClassificationTask):
    """A task whose batches cannot be cut."""

    def select(self, batch: Any, start: int, stop: int) -> Any:
        raise TaskError("one graph")


@pytest.mark.parametrize(
    ("task", "batches"),
    [
        (Undivided(loss=lambda z, y: F.cross_entropy(z, y, reduction="sum")), labelled(6)),
        (SUM, labelled(6, sizes=(1,))),
        (ClassificationTask(loss=lambda z, y: None), labelled(6)),  # type: ignore[arg-type, return-value]
        (ClassificationTask(loss=lambda z, y: F.cross_entropy(z, None)), labelled(6)),  # type: ignore[arg-type]
        (ClassificationTask(loss=lambda z, y: z.log().sum()), labelled(6)),
    ],
    ids=["undivided", "one sample", "no loss", "no labels", "not a number"],
)
def test_what_cannot_be_told_is_passed_over(task: ClassificationTask, batches: list[tuple[Tensor, Tensor]]) -> None:
    assert tq.discover(gelu_mlp(), batches, task).layers


def test_a_loss_that_draws_random_numbers_leaves_torchs_state() -> None:
    state = torch.get_rng_state()
    tq.discover(gelu_mlp(), labelled(6), ClassificationTask(loss=lambda z, y: (z * torch.rand_like(z)).sum()))
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_in_lists_and_dictionaries_are_cut() -> None:
    """A list of one tensor for each image, and a dictionary of tensors, cut as batches are."""

    class Nested(ClassificationTask):
        def loss(self, outputs: Any, batch: Any) -> Tensor:
            return sum(z.square().sum() for z in outputs["images"]) + outputs["boxes"].abs().sum()  # type: ignore[return-value]

    logits, targets = drawn(4)
    outputs = {"images": [torch.ones(2 + i, 3) for i in range(4)], "boxes": logits}
    assert summed_terms(Nested(), outputs, (torch.zeros(4), targets))[""] is True
