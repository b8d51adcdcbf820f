"""The endless stream of training batches, any position of which can be found again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracequant.core.errors import DataError
from tracequant.model import distributed
from tracequant.model.batches import Batch, Batches
from tracequant.model.task import Task


class BatchStream(Iterator[Batch]):
    """Batches without end. Every epoch is shuffled by a seed of its own, so that a resume finds its position again."""

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
                processes = distributed.world_size()
                few = (
                    "at least one batch" if processes == 1 else f"at least one batch for each of {processes} processes"
                )
                raise DataError(f"the training loader yielded no batches; pass {few}")
        self.position += 1
        return batch

    def next_on(self, task: Task, device: torch.device, channels_last: bool) -> Batch:
        """The next batch on the device, with its images laid out channels last if asked for."""
        batch = task.to_device(next(self), device)
        return pytree.tree_map(_as_channels_last, batch) if channels_last else batch

    def seek(self, epoch: int, position: int) -> None:
        """Go to a batch of an epoch by reading the ones before it."""
        if epoch < 0:
            return
        self._begin(epoch)
        for _ in range(position):
            next(self)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self._iterator = iter(distributed.own_share(self._batches, self._seed + epoch))


def _as_channels_last(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.ndim == 4:
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf
