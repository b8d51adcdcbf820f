"""The task of classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracequant.core.errors import DataError, TaskError
from tracequant.model.batches import Batch, describe
from tracequant.model.task import Task


class ClassificationTask(Task):
    """Classification of `(inputs, targets)` batches by a model that maps inputs to logits `[N, C]` (or `[N, C, ...]`).

    A batch may also be a dictionary: the entry of the key `targets` holds the targets, the other entries the inputs.
    `loss(logits, targets)` is your own loss, averaged over the batch; it is the function whose curvature is measured.
    `forward(model, inputs)` is for models that are not called with one tensor; the default is `model(inputs)`, or
    `model(**inputs)` where the inputs are a mapping. Targets equal to `ignore_index` may lie outside the classes and do
    not count in the metric, top-1 accuracy in percent. A single logit (C = 1) stands for two classes, the second from
    0 upwards. `metric(logits, targets)` takes the place of the accuracy, averaged over the samples, and more is better.
    """

    metric_name = "accuracy %"

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        ignore_index: int = -100,
        *,
        metric: Callable[[Any, Any], Tensor | float] | None = None,
        metric_name: str | None = None,
        targets: str = "labels",
    ) -> None:
        self._loss = loss
        self._forward = forward
        self._ignore_index = ignore_index
        self._metric = metric
        self._key = targets
        if metric_name is not None or metric is not None:
            self.metric_name = metric_name or str(getattr(metric, "__name__", "metric"))

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """The logits."""
        inputs, _ = self._split(batch)
        if self._forward is not None:
            return self._forward(model, inputs)
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        return getattr(outputs, "logits", outputs)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The user's loss of logits and targets."""
        return self._loss(outputs, self._split(batch)[1])

    def metric(self, outputs: Any, batch: Batch) -> float:
        """The user's metric of logits and targets, or top-1 accuracy in percent."""
        targets = self._split(batch)[1]
        if self._metric is not None:
            return float(self._metric(outputs, targets))
        if outputs.shape[1] == 1:
            targets = targets.squeeze(1) if targets.ndim == outputs.ndim else targets
            hits = (outputs.squeeze(1) >= 0) == (targets > 0.5)
        else:
            hits = outputs.argmax(dim=1) == (targets.argmax(dim=1) if targets.ndim == outputs.ndim else targets)
        if targets.ndim < outputs.ndim:
            hits = hits[targets != self._ignore_index]
        if hits.numel() == 0:
            return 0.0
        return 100.0 * int(hits.sum().item()) / int(hits.numel())

    def batch_size(self, batch: Batch) -> int:
        """Length of the targets."""
        return len(self._split(batch)[1])

    def check(self, outputs: Any, batch: Batch) -> None:
        """Targets must be one per row of logits and name a class that exists (or be `ignore_index`)."""
        targets = self._split(batch)[1]
        if not isinstance(outputs, Tensor) or outputs.ndim < 2:
            raise TaskError(
                f"the model returned {describe(outputs)}, expected logits of shape [N, classes]; pass"
                " ClassificationTask(forward=...) to pick them"
            )
        if len(targets) != len(outputs):
            raise DataError(f"{len(targets)} targets came with {len(outputs)} rows of logits")
        if targets.dtype.is_floating_point or targets.ndim != outputs.ndim - 1 or targets.numel() == 0:
            return
        classes = max(2, outputs.shape[1])  # a single logit stands for two classes
        wrong = targets[(targets != self._ignore_index) & ((targets < 0) | (targets >= classes))]
        if wrong.numel() > 0:
            raise DataError(
                f"target {int(wrong[0])} is out of range: the model has {classes} classes, numbered 0 to {classes - 1};"
                " check the labels, the model's last layer, or pass ClassificationTask(ignore_index=...)"
            )

    def class_axis(self, outputs: Any, batch: Batch) -> int | None:
        """The second axis; None for a single logit."""
        return 1 if outputs.shape[1] > 1 else None

    def distillation_loss(self, outputs: Any, teacher_outputs: Any, batch: Batch) -> Tensor:
        """Kullback-Leibler divergence from the teacher's class probabilities.

        It is the mean over the positions that count: samples, pixels or tokens whose target is not `ignore_index`. A
        single logit (C = 1) has no such probabilities and takes the default of `Task`.
        """
        if outputs.shape[1] == 1:
            return super().distillation_loss(outputs, teacher_outputs, batch)
        divergence = F.kl_div(outputs.log_softmax(1), teacher_outputs.log_softmax(1), reduction="none", log_target=True)
        targets = self._split(batch)[1]
        if targets.shape == outputs.shape[:1] + outputs.shape[2:]:
            counts = (targets != self._ignore_index).unsqueeze(1)
        else:  # probabilities, or targets of the user's own making: every position counts
            counts = torch.ones_like(outputs[:, :1], dtype=torch.bool)
        # A product rather than a selection, whose size a GPU would have to report to the host.
        mean: Tensor = (divergence * counts).sum() / counts.sum().clamp(min=1)
        return mean

    def _split(self, batch: Batch) -> tuple[Any, Tensor]:
        """Inputs and targets."""
        if isinstance(batch, Mapping):
            targets = batch.get(self._key)
            if not isinstance(targets, Tensor):
                raise TaskError(
                    f"the batch has the keys {', '.join(map(repr, batch))}, expected a tensor of targets under"
                    f" {self._key!r}; pass ClassificationTask(targets=...) with the key that holds them"
                )
            return {key: value for key, value in batch.items() if key != self._key}, targets
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TaskError(
                f"ClassificationTask expects batches (inputs, targets) or dictionaries, got {describe(batch)}; use"
                " CallableTask(forward=..., loss=...) for other batches"
            )
        return batch[0], batch[1]
