"""Whether a loss is a mean over the batch's samples, as every trace and every limit on the loss assumes, or their sum.

A sum scales all traces by the batch size. It shows itself where a batch is divided: the loss of the whole is the sum of
the losses of its two pieces. A weighted average of two numbers of one sign, whatever its weights are (samples, tokens
that count, classes' weights, positives), lies between them and is never their sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.core.errors import TaskError
from tracequant.model.batches import Batch, Batches, join, slice_samples
from tracequant.model.device import measuring, model_device
from tracequant.model.task import Task, checked

# Losses in float32 are as exact as this, as a share of them.
ROUNDING = 1e-5
# A piece tells sum and average apart if it has at least this share of the loss.
LEAST_SHARE = 1e-3
# Losses that divide by a count from 1 up are sums where nothing counts: further batches must look like sums too.
LATER_BATCHES = 3


def check_mean_loss(model: nn.Module, batches: Batches, task: Task, outputs: Any, batch: Batch) -> None:
    """Raise `TaskError` if the task's loss, or a term of it, is the sum over the samples of a batch.

    `outputs` are the model's for `batch`, the first of `batches`. The model is called again only where its loss looks
    like a sum. Batches that cannot be divided, one sample, and losses that are zero or cannot be computed say nothing.
    """
    device = model_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        suspects = {name for name, is_sum in summed_terms(task, outputs, batch).items() if is_sum}
        if not suspects:
            return
        with measuring(model):
            for later in islice(checked(batches, task, model), 1, 1 + LATER_BATCHES):
                verdicts = summed_terms(task, task.outputs(model, later), later)
                suspects -= {name for name, is_sum in verdicts.items() if is_sum is False}
    if suspects:
        name = min(suspects)
        term = f"the term {name!r} of {type(task).__name__}.loss" if name else f"{type(task).__name__}.loss"
        raise TaskError(
            f"{term} is the sum over a batch's samples ({task.batch_size(batch)} here, and two pieces of the batch add"
            " up to the whole), expected their mean, because a sum scales every trace by the batch size; use"
            ' reduction="mean", or divide it by the number of samples'
        )


def summed_terms(task: Task, outputs: Any, batch: Batch) -> dict[str, bool | None]:
    """Term of the loss ("" if it is one tensor) → whether it is a sum over the batch; None where that cannot be told.

    It is a sum if at several places where the batch is cut in two the pieces' losses add up to the whole loss, and if
    the batch joined to itself has another loss than alone. Only the loss is computed, the model is not called.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loss itself warns where it is used
        try:
            verdicts: dict[str, bool | None] = {}
            size = task.batch_size(batch)
            outputs = pytree.tree_map(_at_least_float32, outputs)
            whole = _terms(task, outputs, batch)
            # Pieces' losses by term, from cuts that can tell: mostly one cut shows a mean, and two show a sum.
            telling: dict[str, list[tuple[float, float]]] = {name: [] for name in whole}
            cuts = _cuts(size)
            for cut in cuts:
                first, second = (
                    _terms(task, slice_samples(outputs, size, start, stop), task.select(batch, start, stop))
                    for start, stop in ((0, cut), (cut, size))
                )
                for name, pieces in telling.items():
                    a, b = first[name], second[name]
                    if a * b > 0 and min(abs(a), abs(b)) >= LEAST_SHARE * abs(a + b):
                        pieces.append((a, b))
                verdicts = {name: _is_sum(whole[name], telling[name], min(2, len(cuts))) for name in whole}
                if None not in verdicts.values():
                    break
        except Exception:  # whatever a user's own types make of a piece: what the loss needs is checked elsewhere
            return {}
        if any(verdicts.values()):
            try:
                twice = _terms(task, join([outputs, outputs], [size, size]), join([batch, batch], [size, size]))
            except Exception:  # the pieces have spoken
                return verdicts
            for name, value in whole.items():
                if verdicts[name] and abs(twice[name] - value) <= ROUNDING * abs(value):
                    verdicts[name] = False
        return verdicts


def _terms(task: Task, outputs: Any, batch: Batch) -> dict[str, float]:
    loss = task.loss(outputs, batch)
    terms = loss if isinstance(loss, Mapping) else {"": loss}
    return {name: float(term) for name, term in terms.items()}


def _cuts(size: int) -> list[int]:
    """Where a batch is cut in two: in the middle, at quarters, at eighths."""
    cuts = [eighth * size // 8 for eighth in (4, 2, 6, 1, 3, 5, 7)]
    return [cut for cut in dict.fromkeys(cuts) if 0 < cut < size]


def _is_sum(whole: float, telling: list[tuple[float, float]], needed: int) -> bool | None:
    """Whether the pieces add up to the whole, at as many cuts as are needed; None while too few can tell."""
    if whole == 0 or any(abs(a + b - whole) > ROUNDING * abs(a + b) for a, b in telling):
        return False
    return True if len(telling) >= needed else None


def _at_least_float32(leaf: Any) -> Any:
    half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if half else leaf
