"""Quantization-aware fine-tuning with straight-through gradients, resumable to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tracequant.core.errors import SettingsError
from tracequant.core.options import resolve, takes
from tracequant.core.progress import track
from tracequant.core.settings import FinetuneSettings
from tracequant.model import distributed
from tracequant.model.batches import Batches
from tracequant.model.device import model_device
from tracequant.model.task import Task, check_arguments
from tracequant.quantization import checkpoint as checkpoints
from tracequant.quantization.batchnorm import average_statistics, reestimate_statistics, set_batchnorm_mode
from tracequant.quantization.objective import Objective, teaching
from tracequant.quantization.training import Training, quantizers_of

# BatchNorm's statistics are measured anew on this many batches.
REESTIMATION_BATCHES = 50
# Fields of the recipe that say what a run does, and nothing about one training.
OF_A_RUN = ("uniform_too",)


@dataclass(frozen=True)
class FinetuneResult:
    """Losses of all steps, and how many of them this call ran (fewer than all after a resume)."""

    losses: list[float] = field(repr=False)
    steps_run: int


@takes(FinetuneSettings, without=OF_A_RUN)
def finetune(
    model: nn.Module,
    batches: Batches,
    task: Task,
    settings: FinetuneSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    on_step: Callable[[int], None] | None = None,
    progress: bool = False,
    **fields: object,
) -> FinetuneResult:
    """Train a fake-quantized model in place. Returns the losses of all steps.

    The recipe is `settings`, or the default one, with the fields that are given by keyword replaced.

    Weights move under the straight-through estimator (Appendix A). The quantizers' scales move by the gradient of
    learned step size quantization (Esser et al. 2020), divided by sqrt(numel · levels). With scales="fixed" they stay
    where calibration put them, which is the plain quantizer of Appendix A. On a GPU the forward pass runs under
    bfloat16 autocast.

    The loss is the task's loss. With a `teacher`, which is the float model as a rule, it is (1 − distillation) · the
    task's loss + distillation · task.distillation_loss + feature_distillation · the mean over quantized layers of
    ‖a − a_teacher‖² / ‖a_teacher‖², a being the layer's input.

    batchnorm="train" updates BatchNorm's statistics as the training of the float model does, "freeze" keeps them, and
    "reestimate" trains and at the end replaces them by the mean over 50 batches. (Folding needs no special care here:
    with a scale per channel it changes the scales and not the codes.) With `ema` > 0 the weights and scales at the end
    are exponential moving averages with that decay; "reestimate" then measures the statistics that belong to them.
    `compile` and `channels_last` change the speed, and only the last bits of sums.

    With a `checkpoint` path, the state is saved there every `checkpoint_every` steps. A later call with the same
    arguments resumes from it. On a CPU it ends with a bit-identical model, provided that `batches` draw their
    randomness from torch's global generator, as a DataLoader does. The global generator is left as it was.

    `on_step` is called with the number of the step before each step.

    In several processes (`torchrun`, in a process group) each process takes its share of the batches. A step is then
    one batch of every process, with the mean of their gradients. All processes end with the same parameters, and
    BatchNorm's statistics are means over the processes. The first process writes the checkpoint.

    Raises `SettingsError` if an argument is unknown or has a wrong value, `ModelError` if the model is not quantized,
    and `DataError` if the loader is empty or the loss stops being finite. On a GPU that is noticed up to 50 steps
    later, and the checkpoint is of a step before.
    """
    recipe = resolve(FinetuneSettings, settings, fields, without=OF_A_RUN)
    check_arguments(model, batches, task)
    if teacher is None:
        _check_no_teacher(recipe, fields)
    quantizers_of(model)
    device = model_device(model)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(_restored(model))
        if teacher is not None:
            stack.enter_context(teaching(teacher, device))
        torch.manual_seed(seed)
        training = Training(model, batches, recipe, seed)
        shared = _shared_settings(training, recipe, seed, teacher is not None)
        start = checkpoints.resume(checkpoint, training, shared)
        # Calibration in one process need not give the last bits of that in another.
        distributed.broadcast([*model.parameters(), *model.buffers()])
        model.train()
        if recipe.batchnorm == "freeze":
            set_batchnorm_mode(model, training=False)
        if recipe.channels_last:
            stack.enter_context(_channels_last(model))
        objective = stack.enter_context(Objective(model, task, teacher, recipe))
        if recipe.compile:
            stack.enter_context(_compiled([model] if teacher is None else [model, teacher]))

        stream = training.stream
        for step in track(range(start, recipe.steps), "Fine-tuning", progress, completed=start):
            if on_step is not None:
                on_step(step)
            batch = stream.next_on(task, device, recipe.channels_last)
            # Checks read values back. On a GPU that is done once, and NaN is left to the loss to show.
            checking = stream.epoch == 0 if device.type == "cpu" else step == start
            training.step(objective(batch, stream.position - 1 if checking else None), step)
            done = step + 1
            if checkpoint is not None and (done % checkpoint_every == 0 or done == recipe.steps):
                average_statistics(model)
                checkpoints.save(checkpoint, training, shared)
        if recipe.steps > 0:
            if training.average is not None:
                training.average.replace()
            if recipe.batchnorm == "reestimate":
                some = (stream.next_on(task, device, recipe.channels_last) for _ in range(REESTIMATION_BATCHES))
                reestimate_statistics(model, task, some)
        average_statistics(model)
        return FinetuneResult(training.losses.read(), recipe.steps - start)


def _check_no_teacher(recipe: FinetuneSettings, fields: Mapping[str, object]) -> None:
    """Raise `SettingsError` if the caller asked for distillation; the default recipe does without a teacher."""
    for name in ("distillation", "feature_distillation"):
        value = getattr(recipe, name)
        if value > 0 and (name in fields or value != getattr(FinetuneSettings, name)):
            raise SettingsError(f"{name} is {value:g}, which needs a teacher; pass teacher=, or {name}=0", name)


def _shared_settings(training: Training, recipe: FinetuneSettings, seed: int, has_teacher: bool) -> dict[str, Any]:
    """What a checkpoint must share with the call that resumes from it."""
    values = {name: value for name, value in asdict(recipe).items() if name not in OF_A_RUN}
    return values | {
        "seed": seed,
        "teacher": has_teacher,
        "processes": distributed.world_size(),
        "bits": training.bits,
    }


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards the modes of all modules are as before, and no gradient is left."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in model.parameters():
            parameter.grad = None


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Four-dimensional tensors of the model laid out channels last inside the block."""
    images = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim == 4]
    try:
        for tensor in images:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for tensor in images:
            tensor.data = tensor.data.contiguous()


@contextmanager
def _compiled(models: Sequence[nn.Module]) -> Iterator[None]:
    """Calls of the models run compiled; the models stay the objects that hooks, tasks and checkpoints know."""
    before = [model._compiled_call_impl for model in models]
    try:
        for model in models:
            model.compile()
        yield
    finally:
        for model, call in zip(models, before, strict=True):
            model._compiled_call_impl = call
