"""The one interface between tracequant and a user's model, data, loss and metric."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.core.errors import DataError, TaskError
from tracequant.core.files import Saveable
from tracequant.core.progress import track
from tracequant.model.batches import (
    Batch,
    Batches,
    SizedBatches,
    check_finite,
    describe,
    ordinary,
    reusable,
    slice_samples,
)
from tracequant.model.device import measuring, model_device
from tracequant.model.distillation import output_distance, softmax_axis
from tracequant.model.memory import Microbatches
from tracequant.model.state import frozen_evaluation


@dataclass(frozen=True)
class Evaluation(Saveable):
    """A model's metric and mean loss over `samples` inputs; the metric in the unit that its name gives.

    `details` are further metrics by name, where the task has any.
    """

    metric_name: str
    metric: float
    loss: float
    samples: int
    details: dict[str, float] = field(default_factory=dict)


class Task(abc.ABC):
    """What a model is asked to do. Implement `outputs`, `loss`, `metric` and `batch_size`; the rest has defaults.

    A batch is whatever your loader yields. Outputs and loss are kept apart because curvature needs the derivative of
    the loss with respect to the outputs alone. Nothing here assumes tensors of one size: a batch may be a list of
    images of different sizes, the outputs any nesting of tensors, the loss a dictionary of terms.
    """

    metric_name: str = "metric"

    @abc.abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """The model's raw outputs for one batch."""

    @abc.abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        """The loss, averaged over the samples of the batch: a scalar, or named scalars to be summed."""

    @abc.abstractmethod
    def metric(self, outputs: Any, batch: Batch) -> float:
        """The metric of one batch, averaged over its samples. For a metric of a whole data set override `evaluate`."""

    @abc.abstractmethod
    def batch_size(self, batch: Batch) -> int:
        """Number of samples in the batch."""

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """The batch with every tensor in it moved to `device`."""

        def moved(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                # The host need not wait for a copy to a GPU out of pinned memory.
                return leaf.to(device, non_blocking=device.type == "cuda")
            # Batches of other libraries have a method of this name too.
            return leaf.to(device) if hasattr(leaf, "to") else leaf

        return pytree.tree_map(moved, batch)

    def select(self, batch: Batch, start: int, stop: int) -> Batch:
        """Samples `start` to `stop` of a batch, as a batch: how one that does not fit into memory is divided.

        The default slices tensors whose first axis has the batch's length, and lists of that length (images of
        different sizes), in any nesting. Override it for batches of another make; raise `TaskError` where it cannot be.
        """
        size = self.batch_size(batch)
        try:
            part = slice_samples(batch, size, start, stop)
            found = self.batch_size(part)
        except Exception as error:  # whatever a user's own types make of it
            raise TaskError(f"the batch cannot be divided ({error}); give {type(self).__name__} a select()") from error
        if found != stop - start:
            raise TaskError(
                f"{stop - start} samples were cut from a batch of {size} and batch_size() counts {found}; give"
                f" {type(self).__name__} a select(batch, start, stop)"
            )
        return part

    def parts(self, batch: Batch) -> Sequence[Batch]:
        """The batch as several that can each be one tensor, such as one for each size of image.

        Everything but fine-tuning goes through a loader's batches by these parts: the rows of every tensor inside the
        model must be the samples. By default a batch is one part.
        """
        return [batch]

    def check(self, outputs: Any, batch: Batch) -> None:  # noqa: B027 - optional to override
        """Raise `DataError` if the batch does not fit the outputs; called before the loss."""

    def output_hessian(self, outputs: Any, batch: Batch) -> Tensor | None:
        """The Hessian of the batch's mean loss with respect to the outputs, where the task knows it; None to derive it.

        For outputs of one tensor `[N, ...]` with D elements for each sample: its diagonal in that shape, or blocks
        `[N, D, D]`.
        """
        return None

    def distillation_loss(self, outputs: Any, teacher_outputs: Any, batch: Batch) -> Tensor:
        """Distance of a student's outputs to its teacher's for one batch, for fine-tuning with `teacher=`.

        It is averaged as the loss is: a share `distillation` of the training loss then means the same for any batch.
        The default is the divergence of class probabilities where the loss is that of a softmax, as cross-entropy is,
        and the mean squared difference for every other output that the loss depends on.
        """
        return output_distance(lambda point: total_loss(self, point, batch), outputs, teacher_outputs)

    def class_axis(self, outputs: Any, batch: Batch) -> int | None:
        """The axis of the outputs that holds scores of classes, the largest of which is the prediction.

        None where the outputs are not one tensor of such scores. The default is the axis of the softmax in the loss,
        None where the loss has no softmax.
        """
        if not isinstance(outputs, Tensor):
            return None
        return softmax_axis(lambda point: total_loss(self, point, batch), outputs)

    def exported(self, model: nn.Module) -> Exported:
        """What of `model` goes into an ONNX file: by default all of it, as `outputs` calls it."""
        return Exported(model, self)

    def counted(self, batch: Batch) -> int:
        """How many things the batch's loss and metric are means of, by which `evaluate` weighs batches.

        By default they are the samples; a language model counts tokens.
        """
        return self.batch_size(batch)

    def evaluate(self, model: nn.Module, batches: Batches, progress: bool = False) -> Evaluation:
        """Metric and loss of `model` over `batches`, in evaluation mode, the model left as it was."""
        metric_sum = loss_sum = 0.0
        samples = counted = 0
        microbatches = Microbatches(self)
        with measuring(model), torch.no_grad():
            for batch in track(checked(batches, self, model), "Evaluating", progress):
                outputs = microbatches.outputs(model, batch)
                loss = checked_loss(self, outputs, batch)
                weight = self.counted(batch)
                metric_sum += weight * float(self.metric(outputs, batch))
                loss_sum += weight * loss.item()
                counted += weight
                samples += self.batch_size(batch)
        if counted == 0:
            raise DataError(
                f"none of the {samples} samples has a target that counts; check that the labels are not all ignored"
            )
        return Evaluation(self.metric_name, metric_sum / counted, loss_sum / counted, samples)


class Exported:
    """What an ONNX file holds of a model, `module`, and what a task does around it.

    This is the whole of the model, called once by the task's `outputs`. A task whose `outputs` calls parts of the
    model, or prepares inputs by code that no runtime has, returns one of a class of its own from `Task.exported`.
    """

    # Whether heights and widths, or lengths, differ from batch to batch; None if only sequences of token ids do.
    dynamic_sizes: bool | None = None

    def __init__(self, module: nn.Module, task: Task) -> None:
        self.module, self._task = module, task

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the module for a batch, on the module's device."""
        batch = self._task.to_device(batch, model_device(self.module))
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        handle = self.module.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
        try:
            with frozen_evaluation(self.module), torch.no_grad():
                self._task.outputs(self.module, batch)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise DataError(
                f"the task calls the model {len(calls)} times for a batch, an ONNX file needs exactly one call; give"
                f" {type(self._task).__name__} an exported(model) that says what goes into the file"
            )
        return calls[0]

    def replaced(self, runtime: nn.Module) -> nn.Module:
        """A model for the task's `outputs` in which `runtime` computes what `module` does."""
        return runtime


@dataclass
class TaskSetup:
    """What a task module gives the command line: a trained model, its task, and the data of each stage.

    `calibration` (a few hundred inputs) serves curvature and activation ranges; `train` is iterated again and again by
    fine-tuning; `evaluation` measures every accuracy that is reported. `blocks` are patterns of the names of layers
    that `ties=("blocks",)` ties together, one for each block of the model. Batches that can be read only once are held
    in a list, because several stages read them.
    """

    model: nn.Module
    task: Task
    calibration: Batches
    train: Batches
    evaluation: Batches
    device: torch.device | str | None = None
    blocks: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.calibration, self.train, self.evaluation = map(reusable, (self.calibration, self.train, self.evaluation))

    def to(self, device: torch.device | str) -> TaskSetup:
        """This setup with its model moved, and the data that can be moved whole (those that have a method `to`)."""
        self.model.to(device)
        for name in ("calibration", "train", "evaluation"):
            batches = getattr(self, name)
            if hasattr(batches, "to"):
                setattr(self, name, batches.to(device))
        return self


def check_arguments(model: nn.Module, batches: Batches, task: Task) -> None:
    """Raise `TaskError` where these are not a model, batches and a task: arguments in another order, as a rule."""
    if isinstance(model, nn.Module) and not isinstance(batches, (Task, nn.Module)) and isinstance(task, Task):
        return
    kinds = ", ".join(type(argument).__name__ for argument in (model, batches, task))
    raise TaskError(f"the first arguments are (model, batches, task), a torch module, its data and a Task; got {kinds}")


def total_loss(task: Task, outputs: Any, batch: Batch) -> Tensor:
    """The task's loss as one scalar; the terms of a dictionary are summed."""
    loss = task.loss(outputs, batch)
    if isinstance(loss, Mapping):
        for name, term in loss.items():
            if not isinstance(term, Tensor) or term.numel() != 1:
                raise TaskError(
                    f"{type(task).__name__}.loss returned {describe(term)} as {name!r}, expected a scalar tensor (the"
                    " mean over the batch)"
                )
        if loss:
            loss = torch.stack([term.reshape(()) for term in loss.values()]).sum()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TaskError(
            f"{type(task).__name__}.loss returned {describe(loss)}, expected a scalar tensor (the mean over the batch)"
            " or a dictionary of them"
        )
    return loss.reshape(())


def first_outputs(task: Task, model: nn.Module, batch: Batch) -> Any:
    """The outputs of the batch that a model is looked at with; `DataError` where it holds numbers of another type."""
    try:
        return task.outputs(model, batch)
    except RuntimeError as error:
        of_model = {p.dtype for p in model.parameters() if p.is_floating_point()}
        of_batch = {x.dtype for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.is_floating_point()}
        if of_model and of_batch and not of_model & of_batch:
            names = [" and ".join(sorted(map(str, dtypes))) for dtypes in (of_model, of_batch)]
            raise DataError(
                f"the model has {names[0]} parameters and the batch holds {names[1]} values; convert one of them:"
                " tracequant packs float32 (model.float())"
            ) from error
        raise


def forward(task: Task, model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
    """Outputs and loss of one batch, the outputs checked against the batch and the loss for finiteness."""
    outputs = task.outputs(model, batch)
    return outputs, checked_loss(task, outputs, batch)


def checked_loss(task: Task, outputs: Any, batch: Batch) -> Tensor:
    """The loss of a batch's outputs; `DataError` if they do not fit the batch or the loss is not finite."""
    task.check(outputs, batch)
    loss = total_loss(task, outputs, batch)
    if not torch.isfinite(loss):
        raise DataError(
            f"the loss is {loss.item()}: the inputs are finite, so the model or the loss overflows; check the"
            " normalisation of the inputs, the loss, and that the weights are trained and finite"
        )
    return loss


def checked(batches: Batches, task: Task, model: nn.Module) -> Iterable[Batch]:
    """The batches on the model's device, by their parts; `DataError` for an empty loader, no samples, or values that
    are not finite."""
    check_arguments(model, batches, task)
    device = model_device(model)

    def generate() -> Iterator[Batch]:
        count = 0
        for batch in batches:
            moved = pytree.tree_map(ordinary, task.to_device(batch, device))
            if task.batch_size(moved) == 0:
                raise DataError(f"batch {count} has no samples")
            check_finite(moved, count)
            count += 1
            yield from task.parts(moved)
        if count == 0:
            raise DataError("the loader yielded no batches; pass at least one batch (is the data set empty?)")

    return SizedBatches(generate, batches)


def evaluate(model: nn.Module, batches: Batches, task: Task, *, progress: bool = False) -> Evaluation:
    """Metric and mean loss of a model, float or quantized, over `batches`; the model is left as it was.

    Raises `DataError` for batches that cannot be used, and `TaskError` for arguments in another order.
    """
    check_arguments(model, batches, task)
    return task.evaluate(model, batches, progress)
