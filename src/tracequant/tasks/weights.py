"""Trained weights from a local file."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tracequant.core.errors import TaskError

# What training scripts keep a state dict under, with other things.
WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: safetensors, or of `torch.save`, of which nothing but tensors is read.

    A state dict inside a training checkpoint is taken out, and the prefix `module.` of parallel training is dropped.
    Raises `TaskError` for a file that is not there or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"weights file {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return _plain_names(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise TaskError(f"weights file {path} cannot be read as safetensors: {error}") from None
    try:
        # The options of a training script, which many keep with the weights: a class of plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            document: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise TaskError(
            f"weights file {path} cannot be read as a state dict ({_reason(error)}); save model.state_dict() with"
            " torch.save, or as safetensors"
        ) from None
    for name in WRAPPERS:
        if isinstance(document, Mapping) and isinstance(document.get(name), Mapping):
            document = document[name]
    if (
        not isinstance(document, Mapping)
        or not document
        or not all(isinstance(value, Tensor) for value in document.values())
    ):
        raise TaskError(f"weights file {path} holds no state dict; save model.state_dict()")
    return _plain_names(document)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _reason(error: Exception) -> str:
    """Why torch does not read a file, in a few words: its own advice would be to trust the file."""
    forbidden = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if forbidden:
        return f"it holds more than tensors, a {forbidden[1]} for one"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, hint: str) -> None:
    """Load a file's state dict, in which counters of BatchNorm may be missing.

    Raises `TaskError` that names what does not fit, with the hint what to do about it.
    """
    present = model.state_dict()
    for name, tensor in state.items():
        if name in present and present[name].shape != tensor.shape:
            raise TaskError(
                f"weights file {path} does not fit this network: {name} has shape {list(tensor.shape)}, expected"
                f" {list(present[name].shape)}; {hint}"
            )
    try:
        # By the model itself, which may translate names of older versions.
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise TaskError(f"weights file {path} does not fit this network: {error}; {hint}") from None
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise TaskError(
            f"weights file {path} does not fit this network: missing {missing[:3]}, unexpected {unexpected[:3]}; {hint}"
        )
