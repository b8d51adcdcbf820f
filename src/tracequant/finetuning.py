"""Quantization-aware fine-tuning with straight-through gradients, resumable to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tracequant.artifact import replace_file
from tracequant.errors import ArtifactError, DataError, ModelError
from tracequant.model_state import frozen_evaluation
from tracequant.progress import track
from tracequant.quantizer import (
    SMALLEST_SCALE,
    Quantizer,
    WeightQuantizer,
    activation_quantizers,
    choose_grid,
    weight_quantizers,
)
from tracequant.task import Batch, Batches, Task, check_finite, model_device, reusable, total_loss

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
    learn_scales: bool = True,
    teacher: nn.Module | None = None,
    distillation: float = 0.5,
    freeze_batchnorm: bool = False,
    order: Order = "all",
    omega: dict[str, float] | None = None,
    stages: int = 4,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> FinetuneResult:
    """Train a fake-quantized model in place for `steps` batches, cosine schedule from `learning_rate` to zero.

    Weights move under the straight-through estimator (Appendix A); with `learn_scales` the quantizers' scales move
    too, by the gradient of learned step size quantization, scaled by 1 / sqrt(numel · levels). With a `teacher`, the
    float model as a rule, the loss is (1 − distillation) · loss + distillation · task.distillation_loss. On a GPU the
    forward pass runs under bfloat16 autocast.

    `order`: "all" quantizes everything from the first step; "sensitive_first" and "sensitive_last" switch weights on in
    `stages` groups by `omega` (Ω by layer), as HAWQ does, and activations with the last group.

    Given a `checkpoint` path, state is saved there every `checkpoint_every` steps and a later call with the same
    arguments goes on from it; on the CPU it ends with the same bits as an undisturbed run, provided that `batches`
    draw their randomness from torch's global generator, as a DataLoader does. The global RNG is left as it was.

    Raises `ModelError` if the model is not quantized, `DataError` if the loader is empty or the loss stops being
    finite.
    """
    quantizers = _quantizers(model)
    if steps < 0 or stages < 1 or learning_rate < 0 or not 0 <= distillation <= 1:
        raise DataError(
            "expected steps >= 0, stages >= 1, learning_rate >= 0, distillation in [0, 1]; got"
            f" {steps}, {stages}, {learning_rate}, {distillation}"
        )
    schedule = _stages(model, order, omega, stages, steps)
    device = model_device(model)
    trainer = _make_optimizer(model, optimizer, learning_rate, weight_decay, learn_scales)
    modes = {module: module.training for module in model.modules()}
    losses: list[float] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _teaching(teacher, device):
        torch.manual_seed(seed)
        stream = _BatchStream(reusable(batches), seed)
        settings = _settings(locals()) | {"bits": [quantizer.num_bits for quantizer in quantizers]}
        start = _resume(checkpoint, model, trainer, stream, losses, settings)
        # What was switched on before the checkpoint is on; what is due at this very step is switched on by the loop.
        for first, group in schedule:
            for quantizer, _ in group:
                quantizer.enabled = first < start
        model.train()
        if freeze_batchnorm:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        try:
            for step in track(range(start, steps), "Fine-tuning", progress, completed=start):
                _switch_quantizers(schedule, step)
                _set_learning_rate(trainer, learning_rate, step, steps)
                batch = task.to_device(next(stream), device)
                loss = _train_step(model, batch, task, trainer, teacher, distillation, stream)
                losses.append(loss)
                with torch.no_grad():
                    for quantizer in quantizers:
                        quantizer.scale.clamp_(min=SMALLEST_SCALE)
                done = step + 1
                if checkpoint is not None and (done % checkpoint_every == 0 or done == steps):
                    _save(checkpoint, model, trainer, stream, losses, settings)
        finally:
            for module, mode in modes.items():
                module.training = mode
            for quantizer in quantizers:
                quantizer.enabled = True
            trainer.zero_grad()
    return FinetuneResult(losses, steps - start)


def _train_step(
    model: nn.Module,
    batch: Batch,
    task: Task,
    trainer: torch.optim.Optimizer,
    teacher: nn.Module | None,
    distillation: float,
    stream: _BatchStream,
) -> float:
    first_epoch = stream.epoch == 0
    if first_epoch:
        check_finite(batch, stream.position - 1)
    device = model_device(model)
    autocast: AbstractContextManager[Any] = (
        torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    )
    # The model alone runs in bfloat16: losses are small, and some of them refuse it.
    with autocast:
        outputs = _full_precision(task.outputs(model, batch))
        if teacher is not None and distillation > 0:
            with torch.no_grad():
                guidance = _full_precision(task.outputs(teacher, batch))
    if first_epoch:
        task.check(outputs, batch)
    loss = total_loss(task, outputs, batch)
    if teacher is not None and distillation > 0:
        loss = (1 - distillation) * loss + distillation * task.distillation_loss(outputs, guidance)
    value = loss.item()
    if not math.isfinite(value):
        raise DataError(
            f"the loss became {value} in fine-tuning; try a smaller learning rate (--learning-rate), or more bits"
        )
    trainer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    _scale_gradients(model)
    trainer.step()
    return value


def _full_precision(outputs: Any) -> Any:
    """Outputs with bfloat16 tensors as float32."""
    return pytree.tree_map(
        lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x, outputs
    )


def _scale_gradients(model: nn.Module) -> None:
    """Divide scale gradients by sqrt(numel per scale · largest code), Esser et al. 2020, Section 2.2."""
    for _, quantizer, chain in _named_weights(model):
        if quantizer.scale.grad is not None:
            share = chain.original.numel() / quantizer.scale.numel()
            quantizer.scale.grad /= math.sqrt(share * max(1, 2 ** (quantizer.num_bits - 1) - 1))
    for activation in activation_quantizers(model).values():
        if activation.scale.grad is not None:
            # The gradient is a sum over all elements of all calls since the last step.
            activation.scale.grad /= math.sqrt(activation.numel_seen * (2**activation.num_bits - 1))
        activation.numel_seen = 0


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
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, learn_scales: bool
) -> torch.optim.Optimizer:
    scales = {id(quantizer.scale) for quantizer in _quantizers(model)}
    decayed = [p for p in model.parameters() if id(p) not in scales and p.ndim > 1]
    plain = [p for p in model.parameters() if id(p) not in scales and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    learned = [p for p in model.parameters() if id(p) in scales]
    for parameter in learned:
        parameter.requires_grad_(learn_scales)
    if learn_scales:
        groups.append({"params": learned, "weight_decay": 0.0})
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
                raise DataError("the training loader yielded no batches; pass at least one batch")
        self.position += 1
        return batch

    def _begin(self, epoch: int) -> None:
        torch.manual_seed(self._seed + epoch)
        self.epoch, self.position = epoch, 0
        self._iterator = iter(self._batches)

    def seek(self, epoch: int, position: int) -> None:
        """Go to a batch of an epoch by reading the ones before it."""
        if epoch < 0:
            return
        self._begin(epoch)
        for _ in range(position):
            next(self)


class _teaching(AbstractContextManager[None]):
    """The teacher on the device in evaluation mode, afterwards as it was."""

    def __init__(self, teacher: nn.Module | None, device: torch.device) -> None:
        self._context = frozen_evaluation(teacher) if teacher is not None else nullcontext()
        if teacher is not None and model_device(teacher) != device:
            raise ModelError(f"the teacher is on {model_device(teacher)}, the model on {device}; move one of them")

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *details: Any) -> None:
        self._context.__exit__(*details)


def _settings(variables: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a checkpoint must share with the call that goes on from it."""
    names = (
        "steps", "learning_rate", "optimizer", "weight_decay", "learn_scales", "distillation", "freeze_batchnorm",
        "order", "stages", "seed",
    )  # fmt: skip
    return {name: variables[name] for name in names} | {"teacher": variables["teacher"] is not None}


def _save(
    path: str | Path,
    model: nn.Module,
    trainer: torch.optim.Optimizer,
    stream: _BatchStream,
    losses: Sequence[float],
    settings: dict[str, Any],
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": trainer.state_dict(),
        "stream": (stream.epoch, stream.position),
        "rng": torch.get_rng_state(),
        "losses": list(losses),
        "settings": settings,
    }
    with replace_file(path) as temporary:
        torch.save(state, temporary)


def _resume(
    path: str | Path | None,
    model: nn.Module,
    trainer: torch.optim.Optimizer,
    stream: _BatchStream,
    losses: list[float],
    settings: dict[str, Any],
) -> int:
    """The step to go on from: 0, or where the checkpoint stands, its state loaded into everything."""
    if path is None or not Path(path).exists():
        return 0
    try:
        state = torch.load(path, map_location=model_device(model), weights_only=True)
        found = dict(state["settings"])
        epoch, position = (int(part) for part in state["stream"])
        earlier = [float(loss) for loss in state["losses"]]
        rng = state["rng"].cpu()
        parts = (state["model"], state["optimizer"])
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
        stream.seek(epoch, position)
        torch.set_rng_state(rng)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"checkpoint {path} is of another model or plan, or damaged ({error}); delete it to start anew"
        ) from None
    losses.extend(earlier)
    return len(losses)
