"""The task made of a user's functions: any outputs, any loss, without a subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.core.errors import TaskError
from tracequant.model.batches import Batch, describe
from tracequant.model.task import Task, total_loss


class CallableTask(Task):
    """A task given as functions, for pixelwise models, models of several outputs, or batches of any make.

    `loss(outputs, batch)` is averaged over the samples: a scalar, or a dictionary of scalars to be summed.
    `forward(model, batch)` returns the outputs, a tensor or any nesting of tensors; the default calls the model with
    the inputs of `(inputs, targets)` batches. `metric(outputs, batch)` is averaged over the samples, and more is
    better; the default is the negative loss. `batch_size(batch)` counts samples; by default they are the rows of the
    batch's first tensor.
    """

    metric_name = "-loss"

    def __init__(
        self,
        loss: Callable[[Any, Batch], Tensor | Mapping[str, Tensor]],
        *,
        forward: Callable[[nn.Module, Batch], Any] | None = None,
        metric: Callable[[Any, Batch], Tensor | float] | None = None,
        metric_name: str | None = None,
        batch_size: Callable[[Batch], int] | None = None,
    ) -> None:
        self._loss, self._forward, self._metric, self._batch_size = loss, forward, metric, batch_size
        if metric_name is not None or metric is not None:
            self.metric_name = metric_name or str(getattr(metric, "__name__", "metric"))

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """What `forward` returns."""
        if self._forward is not None:
            return self._forward(model, batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TaskError(
                f"CallableTask without a forward expects batches (inputs, targets), got {describe(batch)}; pass"
                " CallableTask(forward=...) with a function of model and batch"
            )
        inputs = batch[0]
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)

    def loss(self, outputs: Any, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        """The user's loss of outputs and batch."""
        return self._loss(outputs, batch)

    def metric(self, outputs: Any, batch: Batch) -> float:
        """The user's metric of outputs and batch; without one the negative loss."""
        if self._metric is None:
            return -float(total_loss(self, outputs, batch))
        return float(self._metric(outputs, batch))

    def batch_size(self, batch: Batch) -> int:
        """What `batch_size` returns; by default the rows of the batch's first tensor."""
        return count_rows(batch, type(self).__name__) if self._batch_size is None else self._batch_size(batch)


def count_rows(batch: Batch, owner: str) -> int:
    """The length of the first tensor in a batch, those of other libraries' mappings included.

    Raises `TaskError`, which names the `owner`, if there is none.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise TaskError(
        f"the batch is {describe(batch)} and holds no tensor with a row for each sample; give {owner} a batch_size"
    )
