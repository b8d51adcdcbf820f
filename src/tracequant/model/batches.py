"""Batches of the user's, whatever collections they are: cut by samples, joined, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracequant.core.errors import DataError, TaskError

Batch = Any
Batches = Iterable[Batch]


def reusable(batches: Batches) -> Batches:
    """`batches` if it can be iterated again, else a list of what a one-shot iterator yields."""
    return list(batches) if isinstance(batches, Iterator) else batches


def ordinary(leaf: Any) -> Any:
    """A tensor made under `torch.inference_mode` as one that can be differentiated."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def tensor_bytes(batch: Batch) -> int:
    """Bytes of all tensors in a batch."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))


def check_finite(batch: Batch, index: int) -> None:
    """Raise `DataError` if any floating-point tensor of the batch holds NaN or infinity."""
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(leaf).all():
            bad = int((~torch.isfinite(leaf)).sum())
            raise DataError(
                f"batch {index}{pytree.keystr(path)} holds {bad} values that are NaN or infinite"
                f" (shape {list(leaf.shape)}); clean the data or its normalisation"
            )


def slice_samples(value: Any, size: int, start: int, stop: int, fields: bool = True) -> Any:
    """`value` with everything that has one entry for each of `size` samples cut to `start:stop`.

    A batch is a collection of `fields`, and what is inside a field a collection of samples, unless the entries say
    otherwise: two tensors of two rows each are two fields of two samples.
    """
    if isinstance(value, Tensor):
        return value[start:stop] if has_rows(value, size) else value
    if isinstance(value, Mapping):
        cut = {key: slice_samples(item, size, start, stop, fields=False) for key, item in value.items()}
        return cut if type(value) is dict else type(value)(cut)  # type: ignore[call-arg]
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) == size and _are_samples(value, size, fields):
        items = list(value[start:stop])
    else:
        items = [slice_samples(item, size, start, stop, fields=False) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _are_samples(value: Sequence[Any], size: int, fields: bool) -> bool:
    """Whether a list of as many entries as there are samples has one for each."""
    if all(isinstance(item, Mapping) for item in value):
        return True
    rows = [has_rows(item, size) for item in value]
    if fields:
        return not any(rows)
    # Three pictures of three channels are samples; two tensors of two rows each are two columns.
    pictures = all(isinstance(item, Tensor) and item.ndim == 3 for item in value)
    return pictures or not all(rows)


def has_rows(value: Any, size: int) -> bool:
    """Whether a tensor, list or mapping holds, at some depth, one entry for each of `size` samples."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == size
    if isinstance(value, Mapping):
        return any(has_rows(item, size) for item in value.values())
    return isinstance(value, (list, tuple)) and (len(value) == size or any(has_rows(item, size) for item in value))


class SizedBatches:
    """A generator that also knows its length where its source does, for progress bars."""

    def __init__(self, generate: Callable[[], Iterator[Batch]], source: Batches) -> None:
        self._generate = generate
        self._source = source

    def __iter__(self) -> Iterator[Batch]:
        return self._generate()

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def join(parts: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Outputs of `lengths` successive samples each as the outputs of one batch, in any nesting.

    Raises `TaskError` for what does not have an entry for each sample, such as a mean over the batch.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        if any(part.ndim == 0 or len(part) != length for part, length in zip(parts, lengths, strict=True)):
            raise TaskError(
                f"an output of shape {list(first.shape)} does not have the samples of its batch along the first axis,"
                " so that the batch cannot be divided; use smaller batches"
            )
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        columns = {key: join([part[key] for part in parts], lengths) for key in first}
        if type(first) is dict:
            return columns
        return type(first)(**columns) if dataclasses.is_dataclass(first) else type(first)(columns)  # type: ignore[call-arg]
    if isinstance(first, (list, tuple)):
        samples = all(len(part) == length for part, length in zip(parts, lengths, strict=True))
        if samples and not any(has_rows(item, lengths[0]) for item in first):
            return type(first)(item for part in parts for item in part)
        items = [join(column, lengths) for column in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(first, **{n: join([getattr(p, n) for p in parts], lengths) for n in names})
    return first
