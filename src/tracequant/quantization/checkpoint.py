"""Checkpoints of a fine-tuning: everything that a resumed run needs to end like an undisturbed one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracequant.core.errors import ArtifactError
from tracequant.core.files import replace_file
from tracequant.model import distributed
from tracequant.model.device import model_device
from tracequant.quantization.training import Training


def save(path: str | Path, training: Training, settings: dict[str, Any]) -> None:
    """Write the state of a fine-tuning to `path`, whole or not at all. Of several processes the first one writes."""
    generators = distributed.gather(_random_state(model_device(training.model)))
    if distributed.rank() != 0:
        return
    state = {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "stream": (training.stream.epoch, training.stream.position),
        "rng": generators,
        "losses": training.losses.read(),
        "average": training.average.values if training.average is not None else [],
        "floors": list(training.floors),
        "settings": settings,
    }
    with replace_file(path) as temporary:
        torch.save(state, temporary)


def resume(path: str | Path | None, training: Training, settings: dict[str, Any]) -> int:
    """The step to begin with: 0 without a checkpoint, else the step after it, with its state loaded into `training`."""
    if path is None or not Path(path).exists():
        return 0
    try:
        # On the CPU: it is copied into tensors that are where they belong, and AdamW counts its steps there.
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["settings"])
        epoch, position = (int(number) for number in state["stream"])
        losses = [float(loss) for loss in state["losses"]]
        generators = [list(states) for states in state["rng"]]
        tensors = (state["model"], state["optimizer"], state["average"], state["floors"])
    except Exception as error:
        raise ArtifactError(
            f"checkpoint {path} cannot be read ({error!r}); delete it to start fine-tuning anew"
        ) from None
    if changed := [name for name in saved | settings if saved.get(name) != settings.get(name)]:
        raise ArtifactError(
            f"checkpoint {path} is of a fine-tuning with other settings ({', '.join(changed)}); delete it to start anew"
        )
    model_state, optimizer_state, averages, floors = tensors
    try:
        training.model.load_state_dict(model_state)
        training.optimizer.load_state_dict(optimizer_state)
        if training.average is not None:
            training.average.restore(averages)
        for floor, value in zip(training.floors, floors, strict=True):
            floor.copy_(value)
        training.stream.seek(epoch, position)
        _set_random_state(generators[distributed.rank()], model_device(training.model))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"checkpoint {path} is of another model or plan, or damaged ({error}); delete it to start anew"
        ) from None
    training.losses.restore(losses)
    return len(losses)


def _random_state(device: torch.device) -> list[Tensor]:
    """The state of the CPU's generator, and of the GPU's where the model is on one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cuda":
        return
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
    else:
        warnings.warn(
            f"the checkpoint was written on a CPU and has no random state for {device}: the GPU's random numbers start"
            " anew, so that dropout differs from that of an undisturbed run",
            stacklevel=2,
        )
