"""Where the samples of a batch lie in a tensor inside the model: measured, since models fold and turn the batch's axis.

A tensor's rows are `[outer, samples, inner]` in this order. Most often there is no outer axis: rows of one sample lie
together, be it one or the windows of an image. Attention and recurrent layers turn sequences, so that positions come
first and samples are the innermost axis.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Share of a squared norm that rounding may leave where it does not belong.
TOLERANCE = 1e-6
# The factors of two samples next to one another differ by this share, or less where there are very many.
STEP = 0.02
# So many of a gradient's rows are looked at first.
STRONGEST = 64

# Number of rows outside the axis of the samples, or "all" that are not samples.
Outer = int | Literal["all"]


def factors(samples: int) -> Tensor:
    """A factor for each sample, float64 `[samples]`, that tells it from all others."""
    return torch.exp(torch.arange(samples, dtype=torch.float64) * _step(samples))


def _step(samples: int) -> float:
    """The logarithm of the ratio of two neighbours' factors, so small that the largest stays far from overflow."""
    return min(STEP, 18 / samples)


def find_outer(rows: Tensor, scaled: Tensor, samples: int) -> tuple[Outer | None, bool]:
    """Where the samples lie in a gradient's rows `[R, F]`, and whether this gradient leaves no other choice.

    `scaled` is the same gradient with every sample's outputs times its factor (`factors`): the ratio of the two says
    which sample a row belongs to. None where a row belongs to several samples, or where rows lie in no order.
    """
    # As multiples of the largest entry, so that no square leaves float32's range. That has digits enough for both
    # tolerances.
    largest = rows.abs().amax() if rows.numel() else torch.zeros(())
    if not largest:
        return (1 if len(rows) % samples == 0 else None), False
    rows, scaled = _as_multiples(rows, largest), _as_multiples(scaled, largest)
    strength = torch.linalg.vecdot(rows, rows)
    total = float(strength.sum())
    ratio = torch.linalg.vecdot(rows, scaled) / strength.clamp_min(torch.finfo(strength.dtype).tiny)
    size = float(torch.linalg.vector_norm(scaled)) ** 2
    rest = float(torch.linalg.vector_norm(scaled.sub_(ratio.unsqueeze(1) * rows))) ** 2
    number = ratio.clamp_min(torch.finfo(ratio.dtype).tiny).log() / _step(samples)
    mixed = (number - number.round()).abs() > 0.25
    if len(rows) % samples or rest > TOLERANCE * size:
        return None, True
    if float(strength[mixed].sum()) > TOLERANCE * total:
        return None, True
    # Rows of rounding alone say nothing.
    counts = strength > TOLERANCE**2 * float(strength.max())
    fitting = _fitting(strength * counts, number.round(), samples, TOLERANCE * total)
    if not fitting:
        return None, True
    each = len(rows) // samples
    first = fitting[0]
    return ("all" if first == each and first > 1 else first), len(fitting) == 1


def _as_multiples(rows: Tensor, unit: Tensor) -> Tensor:
    return (rows if rows.dtype == torch.float64 else rows.float()) / unit


def _fitting(strength: Tensor, number: Tensor, samples: int, most: float) -> list[int]:
    """The numbers of outer rows, increasing, with which rows of no more strength than `most` belong to another sample.

    `number` is the sample that each row belongs to.
    """
    each = len(strength) // samples
    index = torch.arange(len(strength), device=strength.device)
    outers = torch.tensor([outer for outer in range(1, each + 1) if each % outer == 0], device=strength.device)

    def misplaced(outer: Tensor, some: Tensor) -> Tensor:
        return (strength[some] * (some // (each // outer[:, None]) % samples != number[some])).sum(1)

    # The strongest rows suffice to reject most.
    outers = outers[misplaced(outers, strength.topk(min(STRONGEST, len(strength))).indices) <= most]
    return [int(outer) for outer in outers if float(misplaced(outer[None], index)) <= most]


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
