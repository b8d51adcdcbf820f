"""`HuggingFaceTask` against transformers' own losses, and with models that are none of transformers'."""

from __future__ import annotations

import math
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from language_models import WORDS, token_batches, transformer
from models import snapshot
from tracequant import DataError, HuggingFaceTask, SettingsError, Task, TaskError
from tracequant.curvature.microbatch import Microbatch, divide
from tracequant.curvature.output_hessian import factor
from tracequant.model.state import without_cache

CLASSES = 4


class Tagger(nn.Module):
    """Words [N, T] to `.logits` [N, T, CLASSES], no model of transformers."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(WORDS, 6), nn.Linear(6, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.fc(self.embedding(input_ids)))


class Sorter(Tagger):
    """Words [N, T] to `.logits` [N, CLASSES]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=super().forward(input_ids).logits.mean(1))


def tagged(*sizes: int) -> list[dict[str, Tensor]]:
    return token_batches(*sizes, labels="token")


KINDS = {
    "BertForSequenceClassification": ("sequence", "sequence", "accuracy %"),
    "BertForTokenClassification": ("token", "token", "token accuracy %"),
    "BertForMaskedLM": ("token", "masked", "masked-token accuracy %"),
    "GPT2LMHeadModel": ("causal", "causal", "next-token accuracy %"),
    "LlamaForCausalLM": ("causal", "causal", "next-token accuracy %"),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_the_loss_is_that_of_transformers(name: str) -> None:
    """With labels of -100 at the padding, as its collators make them."""
    labels, kind, metric_name = KINDS[name]
    model, (batch,) = transformer(name), token_batches(5, labels=labels)
    batch["labels"] = (
        batch["labels"].masked_fill(batch["attention_mask"] == 0, -100) if kind != "sequence" else batch["labels"]
    )
    with torch.no_grad():
        want = model(**batch)
    for task in (HuggingFaceTask(), HuggingFaceTask(kind)):
        evaluation = tq.evaluate(model, [batch], task)
        assert evaluation.loss == pytest.approx(want.loss.item(), rel=1e-6)
        assert (evaluation.metric_name, evaluation.samples) == (metric_name, 5)
        perplexity = {"perplexity": pytest.approx(math.exp(want.loss.item()), rel=1e-5)}
        assert evaluation.details == (perplexity if kind in ("causal", "masked") else {})


def test_accuracy_counts_what_the_loss_counts() -> None:
    logits = F.one_hot(torch.tensor([[1, 2, 3, 0]]), CLASSES).float()
    batch = {"labels": torch.tensor([[1, 0, 3, -100]]), "attention_mask": torch.tensor([[1, 1, 0, 1]])}
    assert HuggingFaceTask("token").metric(logits, batch) == 50.0
    # Shifted, logits 0 to 2 predict labels 1 to 3, of which only the first is there and was attended to.
    assert HuggingFaceTask("causal").metric(logits, {**batch, "labels": torch.tensor([[3, 1, 3, -100]])}) == 100.0
    assert HuggingFaceTask("causal").counted(batch) == 1
    assert HuggingFaceTask("sequence").metric(logits[:, 0], {"labels": torch.tensor([[1]])}) == 100.0


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_at_the_padding_does_not_matter(side: str) -> None:
    """Neither with labels nor with the words themselves as labels, on either side."""
    task, model = HuggingFaceTask("causal"), Tagger(WORDS).eval()
    words = torch.randint(0, WORDS, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(words)
    padding = slice(5, None) if side == "right" else slice(None, 3)
    mask[:, padding] = 0
    shorter = words[:, :5] if side == "right" else words[:, 3:]
    want = tq.evaluate(model, [{"input_ids": shorter}], task)
    for fill in (0, 7):
        padded = words.clone()
        padded[:, padding] = fill
        for labels in ({}, {"labels": padded}):
            found = tq.evaluate(model, [{"input_ids": padded, "attention_mask": mask, **labels}], task)
            assert found.loss == pytest.approx(want.loss, rel=1e-6)
            assert found.metric == want.metric


def test_evaluation_weighs_batches_by_their_tokens() -> None:
    """Whatever the batches: one of few labels counts less."""
    task, model = HuggingFaceTask("token"), Tagger().eval()
    (whole,) = tagged(6)
    whole["labels"][1:4] = -100
    cut = [task.select(whole, start, stop) for start, stop in ((0, 1), (1, 4), (4, 6))]
    one, several = tq.evaluate(model, [whole], task), tq.evaluate(model, cut, task)
    assert several.loss == pytest.approx(one.loss, rel=1e-6)
    assert several.metric == pytest.approx(one.metric, rel=1e-9)
    assert several.samples == one.samples == 6


def test_no_label_that_counts_is_an_error() -> None:
    (batch,) = tagged(3)
    batch["labels"][:] = -100
    assert HuggingFaceTask("token").loss(torch.zeros(3, 8, CLASSES), batch) == 0
    with pytest.raises(DataError, match="none of the 3 samples has a target that counts"):
        tq.evaluate(Tagger(), [batch], HuggingFaceTask("token"))


@pytest.mark.parametrize("kind", ["sequence", "token", "causal", "masked"])
def test_distillation_is_the_default_of_tasks(kind: str) -> None:
    """The closed form equals what the loss's own curvature says."""
    (batch,) = token_batches(4, labels="sequence" if kind == "sequence" else "token")
    shape = (4, CLASSES) if kind == "sequence" else (4, 8, CLASSES)
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = HuggingFaceTask(kind)
    found = task.distillation_loss(student, teacher, batch)
    torch.testing.assert_close(found, Task.distillation_loss(task, student, teacher, batch))
    assert found > 0
    assert task.distillation_loss(student, student, batch).item() == pytest.approx(0, abs=1e-12)


def test_the_hessian_of_a_language_model_is_a_softmax() -> None:
    """So that its traces are measured as fast as those of a classifier."""
    (batch,) = token_batches(3)
    logits = torch.randn(3, 8, WORDS, dtype=torch.float64, requires_grad=True)
    task = HuggingFaceTask("causal")
    factored = factor(task, logits * 1, batch, torch.Generator().manual_seed(0))
    assert factored.kind == "softmax"
    counted = task.counted(batch)
    assert factored.first[0].sum().item() == pytest.approx(1)
    assert int((factored.first[0] > 0.5 / counted).sum()) == counted


# The kind


def test_the_kind_follows_from_class_or_shape() -> None:
    (labelled,), (plain,) = token_batches(3, labels="sequence"), token_batches(3)
    for model, batch, name in (
        (Sorter(), labelled, "accuracy %"),
        (Tagger(WORDS), plain, "next-token accuracy %"),
        (type("MineForTokenClassification", (Tagger,), {})(), tagged(3)[0], "token accuracy %"),
        (type("Derived", (type("MineForCausalLM", (Tagger,), {}),), {})(WORDS), plain, "next-token accuracy %"),
    ):
        assert tq.evaluate(model, [batch], HuggingFaceTask()).metric_name == name


def test_a_kind_that_nothing_tells_is_asked_for() -> None:
    with pytest.raises(TaskError, match=r"logits of shape \[3, 8, 4\] may be .*HuggingFaceTask\(kind=\.\.\.\)"):
        tq.evaluate(Tagger(), tagged(3), HuggingFaceTask())


def test_a_kind_that_does_not_exist() -> None:
    with pytest.raises(SettingsError, match="kind is 'tokens', expected one of 'auto', 'sequence'"):
        HuggingFaceTask("tokens")  # type: ignore[arg-type]


# Batches


def test_other_mappings_are_batches_too() -> None:
    """A tokenizer's BatchEncoding is one."""
    (batch,) = tagged(4)
    task = HuggingFaceTask("token")
    found = tq.evaluate(Tagger().eval(), [UserDict(batch)], task)
    assert found.samples == 4
    assert task.select(UserDict(batch), 1, 3)["labels"].equal(batch["labels"][1:3])


BERT = "BertForSequenceClassification"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": (
        {"input_ids": ..., "attention_mask": ...},
        "keys 'input_ids', 'attention_mask', expected a tensor 'labels' for kind 'sequence'",
    ),
    "labels under another key": (
        {"input_ids": ..., "label": ...},
        r"keys 'input_ids', 'label' and Sorter\.forward takes 'input_ids', 'attention_mask': it does not take 'label'",
    ),
    "no input": ({"ids": ..., "labels": ...}, "it needs 'input_ids' and it does not take 'ids'"),
    "numbers for labels": ({"input_ids": ..., "labels": torch.rand(3)}, r"torch\.float32, expected classes"),
    "text for labels": ({"input_ids": ..., "labels": ["a", "b", "c"]}, "expected a tensor 'labels'"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_dictionary_without_the_expected_keys(case: str) -> None:
    keys, message = WRONG[case]
    batch = {key: torch.ones(3, 8, dtype=torch.long) if value is ... else value for key, value in keys.items()}
    with pytest.raises(TaskError, match=message):
        tq.evaluate(Sorter(), [batch], HuggingFaceTask("sequence"))


def test_a_transformer_names_the_input_that_it_needs() -> None:
    """All its arguments are optional, and it swallows keys that it does not know."""
    batch = {"ids": torch.ones(3, 8, dtype=torch.long), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(TaskError, match=r"keys 'ids', 'labels' and BertFor\w+\.forward takes .*: it needs 'input_ids'"):
        tq.evaluate(transformer(BERT), [batch], HuggingFaceTask())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, 7, dtype=torch.long), r"labels of shape \[3, 7\] came with logits of shape \[3, 8, 4\]"),
        (torch.full((3, 8), 4), "label 4 is out of range: the model has 4 classes"),
        (torch.full((3, 8), -1), "label -1 is out of range"),
    ],
)
def test_labels_that_do_not_fit(labels: Tensor, message: str) -> None:
    (batch,) = tagged(3)
    with pytest.raises(DataError, match=message):
        tq.evaluate(
            Tagger(), [{**batch, "attention_mask": torch.ones(3, 8), "labels": labels}], HuggingFaceTask("token")
        )


def test_batches_that_are_no_dictionaries() -> None:
    with pytest.raises(TaskError, match="expects dictionary batches, got a tuple of 2"):
        tq.evaluate(Tagger(), [(torch.zeros(2, 3), torch.zeros(2))], HuggingFaceTask("token"))


def test_outputs_without_logits() -> None:
    class Plain(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return SimpleNamespace(hidden=input_ids)

    with pytest.raises(TaskError, match=r"Plain returned a SimpleNamespace, expected an object with \.logits"):
        tq.evaluate(Plain(), tagged(3), HuggingFaceTask("token"))


@pytest.mark.parametrize("wrap", [lambda logits: logits, lambda logits: (logits, 1), lambda logits: {"logits": logits}])
def test_logits_may_come_as_a_tensor_a_tuple_or_a_dictionary(wrap: Any) -> None:
    class Wrapped(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return wrap(super().forward(input_ids).logits)

    assert HuggingFaceTask("token").outputs(Wrapped(), tagged(3)[0]).shape == (3, 8, CLASSES)


# The cache


def test_the_cache_is_off_and_the_model_comes_back_as_it_was() -> None:
    model, (batch,) = transformer("GPT2LMHeadModel"), token_batches(3)
    assert model.config.use_cache is True
    before = snapshot(model)
    returned = []
    handle = model.register_forward_hook(lambda module, args, output: returned.append(output.past_key_values))
    HuggingFaceTask().outputs(model, batch)
    handle.remove()
    assert returned == [None]
    assert model.config.use_cache is True
    assert model(**batch).past_key_values is not None
    with pytest.raises(RuntimeError, match="halfway"), without_cache(model):
        raise RuntimeError("halfway")
    assert model.config.use_cache is True
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:.*of kinds that cannot be quantized")
def test_measuring_needs_no_cache_whatever_the_task() -> None:
    """A task of functions runs the model itself."""
    model, (batch,) = transformer("GPT2LMHeadModel"), token_batches(3)
    caches = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        output = model(**batch)
        caches.append(output.past_key_values)
        return output.logits

    task = tq.CallableTask(lambda logits, batch: logits.square().mean(), forward=forward)
    tq.evaluate(model, [batch], task)
    tq.discover(model, [batch], task, include=("transformer.wte",))
    assert set(caches) == {None}


def test_a_batch_can_be_cut() -> None:
    """Microbatches with sentences of other lengths: their gradients add up to that of the whole batch."""
    task, model, (batch,) = HuggingFaceTask("causal"), Tagger(WORDS).double(), token_batches(4)
    whole = Microbatch(batch, 0, 0, 4, 4)
    want = torch.autograd.grad(whole.forward(model, task)[1], model.fc.weight)[0]
    cut = [
        torch.autograd.grad(part.forward(model, task)[1], model.fc.weight)[0] for part in divide(model, task, whole, 2)
    ]
    assert len(cut) == 2
    torch.testing.assert_close(cut[0] + cut[1], want)
