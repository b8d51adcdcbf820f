"""Where the samples of a batch lie in a tensor inside the model: measured, since models fold and turn the batch's axis.

A tensor's rows are `[outer, samples, inner]` in this order. Most often there is no outer axis: rows of one sample lie
together, be it one or the windows of an image. Attention and recurrent layers turn sequences, so that positions come
first and samples are the innermost axis.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Share of a squared norm that rounding may move to the rows of another sample.
TOLERANCE = 1e-6

# Number of rows outside the axis of the samples, or "all" that are not samples.
Outer = int | Literal["all"]


def find_outer(rows: Tensor, first: Tensor, samples: int) -> Outer | None:
    """Where the samples lie in a gradient's rows `[R, F]`, None where rows belong to several samples.

    `first` is the same gradient when only the first sample's outputs have one. Rows belong to samples if it is zero at
    all other samples' rows, and the same as `rows` at its own.
    """
    if len(rows) % samples:
        return None
    each = len(rows) // samples
    strength = first.double().square().sum(1)
    difference = (rows - first).double().square().sum(1)
    total = float(strength.sum())
    for outer in (n for n in range(1, each + 1) if each % n == 0):
        by_sample = strength.view(outer, samples, -1)
        moved = float(by_sample[:, 1:].sum() + difference.view(outer, samples, -1)[:, 0].sum())
        if moved <= TOLERANCE * total:
            return "all" if outer == each and outer > 1 else outer
    return None


def by_sample(tensor: Tensor, samples: int, outer: Outer) -> Tensor:
    """Rows `[R, ...]` as `[samples, R / samples, ...]`."""
    each = len(tensor) // samples
    number = each if outer == "all" else outer
    if number == 1:
        return tensor.reshape(samples, each, *tensor.shape[1:])
    rows = tensor.reshape(number, samples, -1, *tensor.shape[1:])
    return rows.transpose(0, 1).flatten(1, 2)


def divisible(rows: int, samples: int, outer: Outer) -> bool:
    """Whether so many rows can be laid out like that."""
    return rows % (samples if outer == "all" else samples * outer) == 0


def flat_rows(tensor: Tensor) -> Tensor:
    """A tensor of any shape as rows `[R, F]`: all axes but the last are rows."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def nothing(rows: Tensor) -> bool:
    """Whether a gradient is zero everywhere, so that it cannot say where samples lie."""
    return not bool(torch.any(rows))
