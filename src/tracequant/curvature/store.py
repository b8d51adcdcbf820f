"""Finished batches of an estimator in a folder, from which an interrupted measurement continues."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from tracequant.core.errors import DataError
from tracequant.core.files import replace_file
from tracequant.curvature.parts import Part
from tracequant.model.batches import Batch
from tracequant.model.task import Task, forward


class Store:
    """Finished parts in a folder, one file each, under a name that depends on their settings."""

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self._parent = None if folder is None else Path(folder)
        self._settings = settings
        self._folder: Path | None = None

    def open(self, model: nn.Module, task: Task, batch: Batch) -> None:
        """Find the folder for these settings. The loss cannot be compared, but its value on a few samples can."""
        if self._parent is None:
            return
        with torch.no_grad():
            try:
                _, loss = forward(task, model, task.select(batch, 0, min(4, task.batch_size(batch))))
            except Exception:  # a batch or a model that knows one size only
                _, loss = forward(task, model, batch)
        text = json.dumps(self._settings | {"loss": f"{loss.item():.5g}"}, sort_keys=True)
        self._folder = self._parent / hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self, key: tuple[int, int], shares: int, digest: str) -> Part | None:
        """The saved part, None if there is none; `DataError` if it is of other data."""
        path = self._path(key, shares)
        if path is None or not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                head = json.loads(file.metadata()["part"])
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None  # damaged: measured anew
        if head.pop("digest") != digest:
            raise DataError(
                f"batch {key[0]} is not the one that {path.parent} was made with: the loader shuffles, or the data have"
                " changed; use shuffle=False, or delete that folder"
            )
        return Part(values=values, **head | {"notes": tuple(head["notes"]), "idle": tuple(head.get("idle", ()))})

    def save(self, key: tuple[int, int], shares: int, digest: str, part: Part) -> None:
        """Write the part, whole or not at all."""
        path = self._path(key, shares)
        if path is None:
            return
        head = {
            "samples": part.samples,
            "elements": part.elements,
            "notes": part.notes,
            "idle": part.idle,
            "digest": digest,
        }
        values = {name: tensor.contiguous() for name, tensor in part.values.items()}
        with replace_file(path) as temporary:
            save_file(values, temporary, {"part": json.dumps(head)})

    def _path(self, key: tuple[int, int], shares: int) -> Path | None:
        return self._folder and self._folder / f"batch-{key[0]:06d}-{key[1]}-of-{shares}.safetensors"
