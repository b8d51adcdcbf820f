"""The training loss of a batch: the task's own loss, and the distances to a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.core.errors import ModelError
from tracequant.core.settings import FinetuneSettings
from tracequant.model.batches import Batch, check_finite
from tracequant.model.device import model_device
from tracequant.model.hooks import replace_inputs
from tracequant.model.state import frozen_evaluation
from tracequant.model.task import Task, total_loss
from tracequant.quantization.quantizer import weight_quantizers


class Objective(AbstractContextManager["Objective"]):
    """The training loss as a function of a batch; as a context it holds the hooks on features.

    With a teacher the loss is (1 − distillation) · the task's loss + distillation · the task's distillation loss +
    feature_distillation · the mean over quantized layers of ‖a − a_teacher‖² / ‖a_teacher‖², a being the layer's input.
    Without one it is the task's loss.
    """

    def __init__(self, model: nn.Module, task: Task, teacher: nn.Module | None, settings: FinetuneSettings) -> None:
        self._model, self._task = model, task
        self._teacher = teacher if settings.has_teacher else None
        self._distillation = settings.distillation if teacher is not None else 0.0
        self._feature_distillation = settings.feature_distillation if teacher is not None else 0.0
        self._device = model_device(model)
        self._hooks = ExitStack()
        self._features: list[Tensor] = []
        self._teacher_features: list[Tensor] = []

    def __enter__(self) -> Objective:
        if self._teacher is not None and self._feature_distillation > 0:
            names = list(dict.fromkeys(module for module, _ in weight_quantizers(self._model)))
            _check_names(self._teacher, names)
            self._hooks.enter_context(_noting_inputs(self._model, names, self._features))
            self._hooks.enter_context(_noting_inputs(self._teacher, names, self._teacher_features))
        return self

    def __exit__(self, *details: Any) -> None:
        self._hooks.close()

    def __call__(self, batch: Batch, index: int | None) -> Tensor:
        """The loss, differentiable. With an `index`, which is the batch's number, the batch is checked."""
        if index is not None:
            check_finite(batch, index)
        # The model alone runs in bfloat16: losses are small, and some of them refuse it.
        autocast: AbstractContextManager[Any] = (
            torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext()
        )
        with autocast:
            outputs = _full_precision(self._task.outputs(self._model, batch))
            if self._teacher is not None:
                with torch.no_grad():
                    teacher_outputs = _full_precision(self._task.outputs(self._teacher, batch))
        if index is not None:
            self._task.check(outputs, batch)
        loss = total_loss(self._task, outputs, batch)
        if self._distillation > 0:
            distance = self._task.distillation_loss(outputs, teacher_outputs, batch)
            loss = (1 - self._distillation) * loss + self._distillation * distance
        if self._feature_distillation > 0:
            loss = loss + self._feature_distillation * self._feature_distance()
        return loss

    def _feature_distance(self) -> Tensor:
        pairs = list(zip(self._features, self._teacher_features, strict=True))
        self._features.clear()
        self._teacher_features.clear()
        terms = [(own.float() - other.float()).square().mean() / other.float().square().mean() for own, other in pairs]
        return torch.stack(terms).mean()


@contextmanager
def teaching(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """The teacher in evaluation mode inside the block, and as it was afterwards."""
    if model_device(teacher) != device:
        raise ModelError(f"the teacher is on {model_device(teacher)}, the model on {device}; move one of them")
    with frozen_evaluation(teacher):
        yield


def _check_names(teacher: nn.Module, names: Iterable[str]) -> None:
    """Raise `ModelError` unless the teacher has modules of these names."""
    modules = dict(teacher.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise ModelError(
            "feature_distillation compares layers of the same name, and the teacher has no"
            f" {', '.join(missing)}; pass a teacher with the model's layer names, or feature_distillation=0"
        )


@contextmanager
def _noting_inputs(model: nn.Module, names: Iterable[str], noted: list[Tensor]) -> Iterator[None]:
    """Append to `noted` what the modules `names` read, before any quantizer."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        replace_inputs(module, args, kwargs, noted.append)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook, prepend=True, with_kwargs=True) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _full_precision(outputs: Any) -> Any:
    """Outputs with bfloat16 tensors as float32."""
    return pytree.tree_map(
        lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x, outputs
    )
