"""Quantization-aware fine-tuning with straight-through gradients, resumable to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant import distributed
from tracequant.artifact import replace_file
from tracequant.batches import Batch, Batches, check_finite, reusable
from tracequant.device import model_device
from tracequant.errors import ArtifactError, DataError, ModelError
from tracequant.hooks import replace_inputs
from tracequant.model_state import frozen_evaluation
from tracequant.progress import track
from tracequant.quantizer import (
    LearnedScales,
    Quantizer,
    WeightQuantizer,
    activation_quantizers,
    choose_grid,
    weight_quantizers,
)
from tracequant.task import Task, total_loss

# Scales learn down to this share of what they were calibrated to.
SCALE_FLOOR = 0.01
Order = Literal["all", "sensitive_first", "sensitive_last"]


@dataclass(frozen=True)
class FinetuneResult:
    """Losses of all steps, and how many of them this call ran (fewer than all after a resume)."""

    losses: list[float] = field(repr=False)
    steps_run: int


def finetune(
    model: nn.Module,
    batches: Batches,
    task: Task,
    steps: int = 1000,
    learning_rate: float = 0.01,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    weight_decay: float = 1e-4,
    scales: LearnedScales | Literal["fixed"] = "lsq",
    teacher: nn.Module | None = None,
    distillation: float = 0.5,
    feature_distillation: float = 0.0,
    label_smoothing: float = 0.0,
    batchnorm: Literal["train", "freeze", "reestimate"] = "train",
    ema: float = 0.0,
    order: Order = "all",
    omega: dict[str, float] | None = None,
    stages: int = 4,
    compile: bool = False,
    channels_last: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> FinetuneResult:
    """Train a fake-quantized model in place for `steps` batches, cosine schedule from `learning_rate` to zero.

    Weights move under the straight-through estimator (Appendix A). The quantizers' scales move by the gradient of
    learned step size quantization ("lsq", Esser et al. 2020) or of learned clipping ("pact", Choi et al. 2018), both
    divided by sqrt(numel · levels); "fixed" leaves them where calibration put them, the plain quantizer of Appendix A.
    On a GPU the forward pass runs under bfloat16 autocast.

    The loss is (1 − label_smoothing) · loss + label_smoothing · task.smoothing_loss; with a `teacher`, the float model
    as a rule, (1 − distillation) of that + distillation · task.distillation_loss + feature_distillation · the mean over
    quantized layers of ‖a − a_teacher‖² / ‖a_teacher‖², a being the layer's input.

    `batchnorm`: "train" as in the training of the float model; "freeze" keeps its statistics; "reestimate" trains, and
    at the end replaces them by the mean over 50 batches. (Folding needs no special care here: with a scale per channel
    it changes the scales and not the codes.) With `ema` > 0 the weights and scales at the end are the exponential
    moving averages with that decay; "reestimate" then gives the statistics that belong to them.

    `order`: "all" quantizes everything from the first step; "sensitive_first" and "sensitive_last" switch weights on in
    `stages` groups by `omega` (Ω by layer), as HAWQ does, and activations with the last group.

    `compile` runs model and teacher through torch.compile, `channels_last` lays images and weights out channels last;
    both only change the speed, beyond the last bits of the sums.

    Given a `checkpoint` path, state is saved there every `checkpoint_every` steps and a later call with the same
    arguments goes on from it; on the CPU it ends with the same bits as an undisturbed run, provided that `batches`
    draw their randomness from torch's global generator, as a DataLoader does. The global RNG is left as it was.

    Of several processes (`torchrun`, in a process group) each takes its share of the batches, so that a step is one
    batch of every process, with the mean of their gradients; all end with the same parameters, and statistics of
    BatchNorm are means over the processes. The first one writes the checkpoint.

    Raises `ModelError` if the model is not quantized, `DataError` if the loader is empty or the loss stops being
    finite; on a GPU that is noticed up to 50 steps later, the checkpoint being of a step before.
    """
    _check_settings(steps, stages, learning_rate, distillation, feature_distillation, label_smoothing, ema, batchnorm)
    quantizers = _quantizers(model)
    schedule = _stages(model, order, omega, stages, steps)
    device = model_device(model)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(_given_back(model, quantizers))
        if teacher is not None:
            stack.enter_context(_teaching(teacher, device))
        trainer = _make_optimizer(model, optimizer, learning_rate, weight_decay, scales)
        average = _Average(model, ema) if ema > 0 else None
        torch.manual_seed(seed)
        stream = _BatchStream(reusable(batches), seed)
        settings = _settings(locals()) | {"bits": [quantizer.num_bits for quantizer in quantizers]}
        losses = _Losses(_losses_at_a_time(device))
        # A step of plain SGD may carry a small scale across zero, from where nothing brings it back.
        floors = [SCALE_FLOOR * quantizer.scale.detach() for quantizer in quantizers]
        start = _resume(checkpoint, model, trainer, average, floors, stream, losses, settings)
        # Calibration in one process need not give the last bits of that in another.
        distributed.broadcast([*model.parameters(), *model.buffers()])
        # What was switched on before the checkpoint is on; what is due at this very step is switched on by the loop.
        for first, group in schedule:
            for quantizer, _ in group:
                quantizer.enabled = first < start
        model.train()
        if batchnorm == "freeze":
            _set_batchnorm_mode(model, training=False)
        if channels_last:
            stack.enter_context(_channels_last(model))
        objective = _Objective(model, task, teacher, distillation, feature_distillation, label_smoothing)
        stack.enter_context(objective)
        if compile:
            stack.enter_context(_compiled([model] if teacher is None else [model, teacher]))

        for step in track(range(start, steps), "Fine-tuning", progress, completed=start):
            _switch_quantizers(schedule, step)
            _set_learning_rate(trainer, learning_rate, step, steps)
            batch = stream.next_on(task, device, channels_last)
            # Checks read values back. On a GPU that is done once, and NaN is left to the loss to show.
            checking = stream.epoch == 0 if device.type == "cpu" else step == start
            loss = objective(batch, stream.position - 1 if checking else None)
            losses.append(loss)
            trainer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            distributed.average_gradients(model.parameters())
            trainer.step()
            with torch.no_grad():
                for quantizer, smallest in zip(quantizers, floors, strict=True):
                    quantizer.scale.clamp_(min=smallest)
            if average is not None:
                average.update()
            done = step + 1
            if checkpoint is not None and (done % checkpoint_every == 0 or done == steps):
                _average_statistics(model)
                _save(checkpoint, model, trainer, average, floors, stream, losses, settings)
        if average is not None and steps > 0:
            average.replace()
        if batchnorm == "reestimate" and steps > 0:
            _reestimate_batchnorm(model, task, (stream.next_on(task, device, channels_last) for _ in range(50)))
        _average_statistics(model)
        return FinetuneResult(losses.read(), steps - start)


def _check_settings(
    steps: int,
    stages: int,
    learning_rate: float,
    distillation: float,
    feature_distillation: float,
    label_smoothing: float,
    ema: float,
    batchnorm: str,
) -> None:
    if steps < 0 or stages < 1 or learning_rate < 0 or not 0 <= distillation <= 1:
        raise DataError(
            "expected steps >= 0, stages >= 1, learning_rate >= 0, distillation in [0, 1]; got"
            f" {steps}, {stages}, {learning_rate}, {distillation}"
        )
    if feature_distillation < 0 or not 0 <= label_smoothing < 1 or not 0 <= ema < 1:
        raise DataError(
            "expected feature_distillation >= 0, label_smoothing in [0, 1), ema in [0, 1); got"
            f" {feature_distillation}, {label_smoothing}, {ema}"
        )
    if batchnorm not in ("train", "freeze", "reestimate"):
        raise ModelError(f"unknown batchnorm {batchnorm!r}; choose train, freeze or reestimate")


class _Objective(AbstractContextManager["_Objective"]):
    """The training loss of a batch: task, teacher and smoothing. As a context it holds the hooks on features."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        teacher: nn.Module | None,
        distillation: float,
        feature_distillation: float,
        label_smoothing: float,
    ) -> None:
        self._model, self._task = model, task
        self._device = model_device(model)
        self._teacher = teacher if distillation > 0 or feature_distillation > 0 else None
        self._distillation, self._smoothing = distillation, label_smoothing
        self._feature_distillation = feature_distillation if teacher is not None else 0.0
        self._hooks = ExitStack()
        self._features: list[Tensor] = []
        self._taught: list[Tensor] = []

    def __enter__(self) -> _Objective:
        if self._teacher is not None and self._feature_distillation > 0:
            names = [site[0] for site in weight_quantizers(self._model)]
            self._hooks.enter_context(_noting_inputs(self._model, names, self._features))
            self._hooks.enter_context(_noting_inputs(self._teacher, names, self._taught))
        return self

    def __exit__(self, *details: Any) -> None:
        self._hooks.close()

    def __call__(self, batch: Batch, index: int | None) -> Tensor:
        """The loss, differentiable; with an `index`, the batch's number, the batch is checked."""
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
                    guidance = _full_precision(self._task.outputs(self._teacher, batch))
        if index is not None:
            self._task.check(outputs, batch)
        loss = total_loss(self._task, outputs, batch)
        if self._smoothing > 0:
            loss = (1 - self._smoothing) * loss + self._smoothing * self._task.smoothing_loss(outputs)
        if self._teacher is not None and self._distillation > 0:
            distance = self._task.distillation_loss(outputs, guidance)
            loss = (1 - self._distillation) * loss + self._distillation * distance
        if self._feature_distillation > 0:
            loss = loss + self._feature_distillation * self._feature_distance()
        return loss

    def _feature_distance(self) -> Tensor:
        pairs = list(zip(self._features, self._taught, strict=True))
        self._features.clear()
        self._taught.clear()
        terms = [
            (own.float() - taught.float()).square().mean() / taught.float().square().mean() for own, taught in pairs
        ]
        return torch.stack(terms).mean()


@contextmanager
def _noting_inputs(model: nn.Module, names: Iterable[str], noted: list[Tensor]) -> Iterator[None]:
    """Append to `noted` what the modules `names` read, before any quantizer."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        replace_inputs(module, args, kwargs, noted.append)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        for name in dict.fromkeys(names)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Losses:
    """Losses of all steps, read from the device a number at a time."""

    def __init__(self, at_a_time: int) -> None:
        self._read: list[float] = []
        self._pending: list[Tensor] = []
        self._at_a_time = at_a_time

    def append(self, loss: Tensor) -> None:
        mean = loss.detach().clone()
        distributed.average([mean])
        self._pending.append(mean)
        if len(self._pending) >= self._at_a_time:
            self.read()

    def read(self) -> list[float]:
        """All losses; `DataError` if one of them is not finite."""
        if self._pending:
            values = torch.stack(self._pending).tolist()
            self._pending.clear()
            for value in values:
                if not math.isfinite(value):
                    raise DataError(
                        f"the loss became {value} in fine-tuning, at step {len(self._read)}; try a smaller learning"
                        " rate (--learning-rate), or more bits"
                    )
                self._read.append(value)
        return list(self._read)

    def restore(self, losses: Sequence[float]) -> None:
        self._read = list(losses)


def _losses_at_a_time(device: torch.device) -> int:
    """Reading a loss from a GPU makes the host wait for the device."""
    return 1 if device.type == "cpu" else 50


class _Average:
    """Exponential moving averages of all parameters, scales included."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        for value, parameter in zip(self.values, self._parameters, strict=True):
            value.lerp_(parameter, 1 - self._decay)

    @torch.no_grad()
    def replace(self) -> None:
        """Put the averages in the model."""
        for value, parameter in zip(self.values, self._parameters, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        for own, value in zip(self.values, values, strict=True):
            own.copy_(value)


@contextmanager
def _given_back(model: nn.Module, quantizers: Sequence[Quantizer]) -> Iterator[None]:
    """Afterwards modes are as before, all quantizers on and no gradient is left."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for quantizer in quantizers:
            quantizer.enabled = True
        for parameter in model.parameters():
            parameter.grad = None


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
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


def _set_batchnorm_mode(model: nn.Module, training: bool) -> list[nn.modules.batchnorm._BatchNorm]:
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in found:
        module.train(training)
    return found


def _reestimate_batchnorm(model: nn.Module, task: Task, batches: Iterable[Batch]) -> None:
    """Running statistics as the mean over `batches`, everything quantized, dropout off."""
    model.eval()
    norms = [module for module in _set_batchnorm_mode(model, training=True) if module.track_running_stats]
    momenta = [module.momentum for module in norms]
    try:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the plain mean of all batches
        with torch.no_grad():
            for batch in batches if norms else ():
                task.outputs(model, batch)
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum


def _average_statistics(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics; grids are the same, and whole numbers, in all."""
    distributed.average(
        buffer
        for module in model.modules()
        if not isinstance(module, Quantizer)
        for buffer in module.buffers(recurse=False)
        if buffer.is_floating_point()
    )


def _full_precision(outputs: Any) -> Any:
    """Outputs with bfloat16 tensors as float32."""
    return pytree.tree_map(
        lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x, outputs
    )


def _named_weights(model: nn.Module) -> list[tuple[str, WeightQuantizer, Any]]:
    """(layer name, quantizer, the chain that holds its parameter), a tied weight once under its first site."""
    found: dict[WeightQuantizer, tuple[str, Any]] = {}
    for (module_name, parameter), quantizer in weight_quantizers(model).items():
        if quantizer not in found:
            name = module_name if parameter == "weight" else ".".join(filter(None, (module_name, parameter)))
            chain: Any = model.get_submodule(module_name).parametrizations[parameter]  # type: ignore[index]
            found[quantizer] = (name or "weight", chain)
    return [(name, quantizer, chain) for quantizer, (name, chain) in found.items()]


def _quantizers(model: nn.Module) -> list[Quantizer]:
    found: list[Quantizer] = [*weight_quantizers(model).values(), *activation_quantizers(model).values()]
    if not found:
        raise ModelError("the model is not quantized: call tracequant.quantize first")
    return list(dict.fromkeys(found))


def _make_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, scales: str
) -> torch.optim.Optimizer:
    if scales not in ("lsq", "pact", "fixed"):
        raise ModelError(f"unknown scales {scales!r}; choose lsq, pact or fixed")
    quantizers = _quantizers(model)
    for quantizer in quantizers:
        quantizer.scale.requires_grad_(scales != "fixed")
        if scales != "fixed":
            quantizer.scales = cast(LearnedScales, scales)
    learned = {id(quantizer.scale) for quantizer in quantizers}
    decayed = [p for p in model.parameters() if id(p) not in learned and p.ndim > 1]
    plain = [p for p in model.parameters() if id(p) not in learned and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if scales != "fixed":
        own = [p for p in model.parameters() if id(p) in learned]
        groups.append({"params": own, "weight_decay": 0.0})
    for group in groups:
        group["lr"] = learning_rate
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
    raise ModelError(f"unknown optimizer {name!r}; choose sgd or adamw")


def _set_learning_rate(trainer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    for group in trainer.param_groups:
        group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))


_Schedule = list[tuple[int, list[tuple[Quantizer, Any]]]]


def _stages(model: nn.Module, order: Order, omega: dict[str, float] | None, stages: int, steps: int) -> _Schedule:
    """(first step, quantizers that are switched on there), the weights with the chain that holds their parameter."""
    weights = _named_weights(model)
    activations: list[tuple[Quantizer, Any]] = [
        (quantizer, None) for quantizer in activation_quantizers(model).values()
    ]
    if order == "all":
        return [(0, [*((quantizer, None) for _, quantizer, _ in weights), *activations])]
    if order not in ("sensitive_first", "sensitive_last"):
        raise ModelError(f"unknown order {order!r}; choose all, sensitive_first or sensitive_last")
    if omega is None or any(name not in omega for name, _, _ in weights):
        raise ModelError(f"order={order!r} needs omega, the sensitivity of every quantized layer by name")
    weights.sort(key=lambda item: omega[item[0]], reverse=order == "sensitive_first")
    stages = min(stages, len(weights))
    schedule: _Schedule = []
    for stage in range(stages):
        group = weights[stage * len(weights) // stages : (stage + 1) * len(weights) // stages]
        schedule.append((stage * steps // stages, [(quantizer, chain) for _, quantizer, chain in group]))
    schedule[-1][1].extend(activations)
    return schedule


def _switch_quantizers(schedule: _Schedule, step: int) -> None:
    """Enable what is due at `step`. A weight that trained in float until now gets a new grid."""
    for first, group in schedule:
        for quantizer, chain in group:
            if step >= first and not quantizer.enabled:
                if chain is not None:
                    assert isinstance(quantizer, WeightQuantizer)
                    weight: Any = chain.original
                    quantizer.set_grid(
                        choose_grid(weight.detach(), quantizer.num_bits, quantizer.symmetric, quantizer.axis)
                    )
                quantizer.enabled = True


class _BatchStream(Iterator[Batch]):
    """Batches without end, every epoch shuffled by a seed of its own, so that any position can be found again."""

    def __init__(self, batches: Batches, seed: int) -> None:
        self._batches = batches
        self._seed = seed
        self.epoch = -1
        self.position = 0
        self._iterator: Iterator[Batch] = iter(())

    def __next__(self) -> Batch:
        batch = next(self._iterator, None)
        if batch is None:
            self._begin(self.epoch + 1)
            batch = next(self._iterator, None)
            if batch is None:
                processes = distributed.world_size()
                few = (
                    "at least one batch" if processes == 1 else f"at least one batch for each of {processes} processes"
                )
                raise DataError(f"the training loader yielded no batches; pass {few}")
        self.position += 1
        return batch

    def next_on(self, task: Task, device: torch.device, channels_last: bool) -> Batch:
        """The next batch on the device, its images laid out as asked."""
        batch = task.to_device(next(self), device)
        return pytree.tree_map(_as_channels_last, batch) if channels_last else batch

    def _begin(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self._iterator = iter(distributed.own_share(self._batches, self._seed + epoch))

    def seek(self, epoch: int, position: int) -> None:
        """Go to a batch of an epoch by reading the ones before it."""
        if epoch < 0:
            return
        self._begin(epoch)
        for _ in range(position):
            next(self)


@contextmanager
def _teaching(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """The teacher in evaluation mode, afterwards as it was."""
    if model_device(teacher) != device:
        raise ModelError(f"the teacher is on {model_device(teacher)}, the model on {device}; move one of them")
    with frozen_evaluation(teacher):
        yield


def _as_channels_last(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.ndim == 4:
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf


def _settings(variables: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a checkpoint must share with the call that goes on from it."""
    names = (
        "steps", "learning_rate", "optimizer", "weight_decay", "scales", "distillation", "feature_distillation",
        "label_smoothing", "batchnorm", "ema", "order", "stages", "compile", "channels_last", "seed",
    )  # fmt: skip
    own = {"teacher": variables["teacher"] is not None, "processes": distributed.world_size()}
    return {name: variables[name] for name in names} | own


def _save(
    path: str | Path,
    model: nn.Module,
    trainer: torch.optim.Optimizer,
    average: _Average | None,
    floors: Sequence[Tensor],
    stream: _BatchStream,
    losses: _Losses,
    settings: dict[str, Any],
) -> None:
    generators = distributed.gather(_random_state(model_device(model)))
    if distributed.rank() != 0:
        return
    state = {
        "model": model.state_dict(),
        "optimizer": trainer.state_dict(),
        "stream": (stream.epoch, stream.position),
        "rng": generators,
        "losses": losses.read(),
        "average": average.values if average is not None else [],
        "floors": list(floors),
        "settings": settings,
    }
    with replace_file(path) as temporary:
        torch.save(state, temporary)


def _random_state(device: torch.device) -> list[Tensor]:
    """The state of the CPU's generator, and of the GPU's where the model is on one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _resume(
    path: str | Path | None,
    model: nn.Module,
    trainer: torch.optim.Optimizer,
    average: _Average | None,
    floors: Sequence[Tensor],
    stream: _BatchStream,
    losses: _Losses,
    settings: dict[str, Any],
) -> int:
    """The step to go on from: 0, or where the checkpoint stands, its state loaded into everything."""
    if path is None or not Path(path).exists():
        return 0
    try:
        # On the CPU: it is copied into tensors that are where they belong, and AdamW counts its steps there.
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(state["settings"])
        epoch, position = (int(part) for part in state["stream"])
        earlier = [float(loss) for loss in state["losses"]]
        generators = [list(own) for own in state["rng"]]
        parts = (state["model"], state["optimizer"], state["average"], state["floors"])
    except Exception as error:
        raise ArtifactError(
            f"checkpoint {path} cannot be read ({error!r}); delete it to start fine-tuning anew"
        ) from None
    if found != settings:
        changed = [name for name in settings if found.get(name) != settings[name]]
        raise ArtifactError(
            f"checkpoint {path} is of a fine-tuning with other settings ({', '.join(changed)}); delete it to start anew"
        )
    try:
        model.load_state_dict(parts[0])
        trainer.load_state_dict(parts[1])
        if average is not None:
            average.restore(parts[2])
        for floor, saved in zip(floors, parts[3], strict=True):
            floor.copy_(saved)
        stream.seek(epoch, position)
        _set_random_state(generators[distributed.rank()], model_device(model))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"checkpoint {path} is of another model or plan, or damaged ({error}); delete it to start anew"
        ) from None
    losses.restore(earlier)
    return len(earlier)
