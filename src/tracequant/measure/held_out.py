"""Samples that nothing else has used: what is judged on the data that it was made from looks better than it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from tracequant.core.errors import DataError, TaskError
from tracequant.model.batches import Batch, Batches, SizedBatches, reusable
from tracequant.model.digest import digest
from tracequant.model.task import Task


def held_out_samples(held_out: Batches, batches: Batches, task: Task) -> Batches:
    """The batches `held_out` without the samples that `batches` hold too, equal in every tensor.

    A warning says how many were left out. Batches that cannot be divided are compared whole. Raises `DataError` where
    no sample is left.
    """
    held_out = reusable(held_out)
    seen = {sample for batch in batches for sample in _samples(batch, task)}
    shared = total = 0
    for batch in held_out:
        samples = _samples(batch, task)
        total += len(samples)
        shared += sum(sample in seen for sample in samples)
    if not shared:
        return held_out
    if shared == total:
        raise DataError(
            f"all {total} samples of held_out are among the calibration batches too, where every criterion looks better"
            " than it is; pass labelled samples that were not used for the analysis"
        )
    warnings.warn(
        f"{shared} of {total} samples of held_out are among the calibration batches too and are left out", stacklevel=3
    )
    return SizedBatches(lambda: _others(held_out, seen, task), held_out)


def _others(batches: Batches, seen: set[str], task: Task) -> Iterator[Batch]:
    """The batches, cut where samples are among those `seen`."""
    for batch in batches:
        samples = _samples(batch, task)
        start = 0
        for stop in range(1, len(samples) + 1):
            if samples[stop - 1] in seen:
                start = stop
            elif stop == len(samples) or samples[stop] in seen:
                yield batch if stop - start == len(samples) else task.select(batch, start, stop)


def _samples(batch: Batch, task: Task) -> list[str]:
    """A hash of every sample, or of the whole batch where it cannot be divided."""
    size = task.batch_size(batch)
    try:
        return [digest(task.select(batch, index, index + 1)) for index in range(size)]
    except TaskError:
        return [digest(batch)]
