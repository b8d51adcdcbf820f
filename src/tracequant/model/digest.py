"""A hash that tells batches apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracequant.model.batches import Batch

# Bytes of a number → integers of as many.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(batch: Batch) -> str:
    """A hash of a batch's sums and of some of its values, which tells batches apart."""
    found = hashlib.sha256()
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().flatten()
            # At random places: a fixed stride might see nothing but the margin of every picture.
            places = np.random.default_rng(0).integers(0, max(1, flat.numel()), min(flat.numel(), 2048))
            some = flat[torch.from_numpy(places).to(flat.device)]
            # A sum of integers has no order: of floats it would depend on the number of threads.
            total = (flat.view(_BITS[leaf.itemsize]) if leaf.is_floating_point() else flat).to(torch.int64).sum()
            found.update(f"{tuple(leaf.shape)}{leaf.dtype}{total.item()}".encode())
            found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, (str, bytes, int, float)):
            found.update(repr(leaf).encode())
    return found.hexdigest()[:16]


def _leaves(value: Any) -> Iterator[Any]:
    """Everything in a batch that is not a collection, whatever the collection's class."""
    if isinstance(value, Mapping):
        for key in value:
            yield str(key)
            yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield torch.from_numpy(np.ascontiguousarray(value))
    else:
        yield value
