"""The task of models of Hugging Face's kind: called with the keywords of a dictionary, they return `.logits`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracequant.core.errors import DataError, SettingsError, TaskError
from tracequant.model.batches import Batch, Batches, describe
from tracequant.model.callable_task import count_rows
from tracequant.model.distillation import divergence
from tracequant.model.state import without_cache
from tracequant.model.task import Evaluation, Task

Kind = Literal["auto", "sequence", "token", "causal", "masked"]

_METRIC_NAMES = {
    "sequence": "accuracy %",
    "token": "token accuracy %",
    "causal": "next-token accuracy %",
    "masked": "masked-token accuracy %",
}
# Ends of class names, such as GPT2LMHeadModel and BertForMaskedLM.
_CLASS_NAMES = {
    "ForSequenceClassification": "sequence",
    "ForImageClassification": "sequence",
    "ForTokenClassification": "token",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
}
# math.exp overflows beyond.
_LARGEST_EXPONENT = 700.0


class HuggingFaceTask(Task):
    """Classification and language modelling with dictionary batches, such as a tokenizer and a data collator make.

    The model is called with the batch as keywords, its `labels` left out, and returns an object with `.logits`. `kind`
    says what the labels mean:

    - "sequence": a class for each sample, logits [N, C];
    - "token": a class for each token, logits [N, T, C];
    - "causal": the token itself, which the logits one position earlier predict; a batch without labels takes its
      `input_ids` for them;
    - "masked": the token that was masked.

    "auto" takes the kind from the name of the model's class, or from the shape of its logits. The loss is the mean
    cross-entropy over what counts: labels equal to `ignore_index` do not, nor do tokens that the `attention_mask`
    leaves out. The metric is accuracy in percent over the same; language models have the perplexity in
    `Evaluation.details`. A cache of keys and values is switched off.
    """

    metric_name = _METRIC_NAMES["sequence"]

    def __init__(self, kind: Kind = "auto", *, ignore_index: int = -100) -> None:
        if kind not in get_args(Kind):
            raise SettingsError(f"kind is {kind!r}, expected one of {', '.join(map(repr, get_args(Kind)))}")
        self._ignore_index = ignore_index
        self._asked = kind
        self._kind: str | None = None
        if kind != "auto":
            self._settle(kind)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits."""
        if not isinstance(batch, Mapping):
            raise TaskError(
                f"HuggingFaceTask expects dictionary batches, got {describe(batch)}; use ClassificationTask for"
                " (inputs, targets)"
            )
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        _check_keys(model, inputs, batch)
        with without_cache(model):
            result = model(**inputs)
        logits = result if isinstance(result, Tensor) else _logits(result)
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            raise TaskError(
                f"{type(model).__name__} returned {describe(result)}, expected an object with .logits of shape [N, C]"
                " or [N, T, C]; use CallableTask(forward=...) to pick them"
            )
        if self._asked == "auto":
            self._settle(_kind_by_class(model) or self._kind or self._kind_by_shape(logits, batch))
        return logits

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean cross-entropy over the labels that count; 0 where none does."""
        targets = self._targets(outputs, batch)
        total = F.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), ignore_index=self._ignore_index, reduction="sum"
        )
        return total / (targets != self._ignore_index).sum().clamp(min=1)

    def metric(self, outputs: Any, batch: Batch) -> float:
        """Accuracy in percent over the labels that count; 0 where none does."""
        targets = self._targets(outputs, batch)
        counts = targets != self._ignore_index
        hits = (outputs.argmax(-1) == targets) & counts
        return 100.0 * int(hits.sum().item()) / max(1, int(counts.sum().item()))

    def batch_size(self, batch: Batch) -> int:
        """Rows of the first tensor."""
        return count_rows(batch, type(self).__name__)

    def counted(self, batch: Batch) -> int:
        """Number of labels that count."""
        return int((self._labels(batch) != self._ignore_index).sum().item())

    def check(self, outputs: Any, batch: Batch) -> None:
        """Labels must fit the logits and name a class that exists, or be `ignore_index`."""
        targets = self._targets(outputs, batch)
        classes = outputs.shape[-1]
        wrong = targets[(targets != self._ignore_index) & ((targets < 0) | (targets >= classes))]
        if wrong.numel():
            raise DataError(
                f"label {int(wrong[0])} is out of range: the model has {classes} classes, numbered 0 to {classes - 1};"
                " check the labels, the model's last layer, or pass HuggingFaceTask(ignore_index=...)"
            )

    def class_axis(self, outputs: Any, batch: Batch) -> int | None:
        """The last axis."""
        return outputs.ndim - 1 if outputs.shape[-1] > 1 else None

    def distillation_loss(self, outputs: Any, teacher_outputs: Any, batch: Batch) -> Tensor:
        """Mean Kullback-Leibler divergence from the teacher's probabilities over the labels that count."""
        counts = (self._targets(outputs, batch) != self._ignore_index).unsqueeze(-1)
        return (divergence(outputs, teacher_outputs, -1) * counts).sum() / counts.sum().clamp(min=1)

    def evaluate(self, model: nn.Module, batches: Batches, progress: bool = False) -> Evaluation:
        """Accuracy and loss over all labels that count; `details` hold a language model's perplexity."""
        evaluation = super().evaluate(model, batches, progress)
        if self._kind not in ("causal", "masked"):
            return evaluation
        return replace(evaluation, details={"perplexity": math.exp(min(evaluation.loss, _LARGEST_EXPONENT))})

    def _settle(self, kind: str) -> None:
        self._kind, self.metric_name = kind, _METRIC_NAMES[kind]

    def _kind_by_shape(self, logits: Tensor, batch: Batch) -> str:
        """The kind that the shapes leave; `TaskError` where several fit."""
        if logits.ndim == 2:
            return "sequence"
        if "labels" not in batch and "input_ids" in batch:
            return "causal"
        raise TaskError(
            f"logits of shape {list(logits.shape)} may be those of token classification or of a language model; pass"
            " HuggingFaceTask(kind=...), 'token', 'causal' or 'masked'"
        )

    def _targets(self, logits: Tensor, batch: Batch) -> Tensor:
        """The label of every row of logits."""
        targets = self._labels(batch)
        if targets.shape != logits.shape[:-1]:
            raise DataError(
                f"labels of shape {list(targets.shape)} came with logits of shape {list(logits.shape)}, expected labels"
                f" of shape {list(logits.shape[:-1])} for kind {self._kind!r}; check the batch, or pass another"
                " HuggingFaceTask(kind=...)"
            )
        return targets

    def _labels(self, batch: Batch) -> Tensor:
        """The batch's labels, shifted for causal models, with `ignore_index` where they do not count."""
        labels = batch.get("labels")
        if labels is None and self._kind == "causal":
            labels = batch.get("input_ids")
        if not isinstance(labels, Tensor):
            expected = "'labels' or 'input_ids'" if self._kind == "causal" else "'labels'"
            raise TaskError(
                f"the batch has the keys {_listed(batch)}, expected a tensor {expected} for kind {self._kind!r}; rename"
                " the labels' key in your collator, or pass CallableTask(loss=...) with your loss"
            )
        if labels.is_floating_point():
            raise TaskError(
                f"the labels are numbers of type {labels.dtype}, expected classes (integers); use"
                " CallableTask(loss=...) for regression and several labels for each sample"
            )
        if self._kind == "sequence":
            return labels.flatten() if labels.shape[1:] == (1,) else labels
        attention = batch.get("attention_mask")
        seen = attention != 0 if isinstance(attention, Tensor) and attention.shape == labels.shape else None
        if seen is not None:
            labels = labels.masked_fill(~seen, self._ignore_index)
        if self._kind == "causal":
            following = labels[:, 1:]
            if seen is not None:  # the first token after padding on the left is predicted by nothing
                following = following.masked_fill(~seen[:, :-1], self._ignore_index)
            labels = torch.cat([following, torch.full_like(labels[:, :1], self._ignore_index)], 1)
        return labels


def _kind_by_class(model: nn.Module) -> str | None:
    """The kind that the name of the model's class, or of one that it is derived from, ends in."""
    for base in type(model).__mro__:
        for ending, kind in _CLASS_NAMES.items():
            if base.__name__.endswith(ending):
                return kind
    return None


def _logits(result: Any) -> Any:
    """The logits in what a model returned: an attribute, a key, or the first of a tuple."""
    if hasattr(result, "logits"):
        return result.logits
    if isinstance(result, Mapping):
        return result.get("logits")
    return result[0] if isinstance(result, (tuple, list)) and result else None


def _check_keys(model: nn.Module, inputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """Raise `TaskError` unless the inputs are what the model's forward takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in inputs]
    # A transformer's arguments are all optional; this is the name of the one that it needs.
    main = getattr(model, "main_input_name", None)
    if isinstance(main, str) and main not in inputs and "inputs_embeds" not in inputs:
        missing.append(main)
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    unknown = [] if takes_any else [key for key in inputs if key not in {p.name for p in named}]
    if not missing and not unknown:
        return
    wrong = [f"it needs {_listed(missing)}"] * bool(missing) + [f"it does not take {_listed(unknown)}"] * bool(unknown)
    raise TaskError(
        f"the batch has the keys {_listed(batch)} and {type(model).__name__}.forward takes"
        f" {_listed([p.name for p in named])}: {' and '.join(wrong)}; rename or remove keys in your collator, or pass"
        " CallableTask(forward=...)"
    )


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
