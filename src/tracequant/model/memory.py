"""How much memory is free, how much a pass takes, and batches that are cut where it does not suffice."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import torch
from torch import Tensor, nn

from tracequant.core.errors import ResourceError, TaskError
from tracequant.model.batches import Batch, Batches, join

if sys.platform != "win32":
    import resource

Result = TypeVar("Result")

# Where Linux keeps the limits of the control group that a container runs in.
CONTROL_GROUP = Path("/sys/fs/cgroup")


class Divisible(Protocol):
    """What must be known of a task to divide its batches."""

    def outputs(self, model: nn.Module, batch: Batch) -> Any: ...

    def batch_size(self, batch: Batch) -> int: ...

    def select(self, batch: Batch, start: int, stop: int) -> Batch: ...


class Microbatches:
    """Runs batches in as many microbatches as memory asks for; later batches get as many as the one before needed."""

    def __init__(self, task: Divisible) -> None:
        self._task = task
        self._count = 1

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs for a batch, joined where they were computed in microbatches."""

        def attempt(count: int) -> Any:
            cut = list(self._cut(batch, count))
            found = [self._task.outputs(model, part) for part, _ in cut]
            return found[0] if count == 1 else join(found, [samples for _, samples in cut])

        return self._attempts(batch, attempt)

    def run(self, batch: Batch, measure: Callable[[Batch], Result]) -> list[Result]:
        """What `measure` returns for the batch, or for each of its microbatches in their order.

        Where memory runs out, the batch begins anew: a `measure` that fails must have had no effect.
        """
        return self._attempts(batch, lambda count: [measure(part) for part, _ in self._cut(batch, count)])

    def _cut(self, batch: Batch, count: int) -> Iterator[tuple[Batch, int]]:
        """Microbatches and their numbers of samples, which differ by at most one."""
        size = self._task.batch_size(batch)
        if count == 1:
            yield batch, size
            return
        for start, stop in itertools.pairwise(size * i // count for i in range(count + 1)):
            yield self._task.select(batch, start, stop), stop - start

    def _attempts(self, batch: Batch, attempt: Callable[[int], Result]) -> Result:
        """What `attempt` returns at a number of microbatches that fits into memory."""
        size = self._task.batch_size(batch)
        while True:
            count = min(self._count, size)
            try:
                return attempt(count)
            except TaskError as error:
                if count == 1:
                    raise
                raise ResourceError(f"a batch of {size} samples does not fit into memory, and {error}") from error
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if count == size:
                    raise ResourceError(
                        f"memory does not suffice for one sample at a time ({error}); use smaller inputs, another"
                        " device or a machine with more memory"
                    ) from None
            # Here the failed attempt's tensors are gone, which the exception had kept.
            self._count = 2 * count
            release()


class GraphTooLarge(ResourceError):
    """The graph of a batch does not fit into memory; that of fewer samples may."""


def on_first_batch(
    task: Divisible, batches: Batches, attempt: Callable[[list[Batch]], Result]
) -> tuple[Result, int | None]:
    """What `attempt` returns for the first batch, or for the first half of its samples, or a quarter, until they fit.

    And the number of these samples; None for all. `attempt` gets a list of the batch, which is empty where there is
    none. Raises `ResourceError` where memory does not suffice for one sample, or the batch cannot be divided.
    """
    first = list(itertools.islice(batches, 1))
    fewer: int | None = None
    while True:
        try:
            return attempt(first), fewer
        except Exception as error:
            if not (first and (isinstance(error, GraphTooLarge) or out_of_memory(error))):
                raise
            size = task.batch_size(first[0])
            if size <= 1:
                raise ResourceError(
                    f"memory does not suffice for one sample ({error}); use smaller inputs, another device or a machine"
                    " with more memory"
                ) from None
        # Here the failed attempt's tensors are gone, which the exception had kept.
        fewer = size // 2
        try:
            first = [task.select(first[0], 0, fewer)]
        except TaskError as error:
            raise ResourceError(f"a batch of {size} samples does not fit into memory, and {error}") from error
        release()


def release() -> None:
    """Give back what is no longer used, after an allocation has failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_bytes() -> int | None:
    """Main memory that is free for this process; None where the system does not say.

    It is the least of what the system, the limit of the process's address space and its control group leave.
    """
    found = []
    with suppress(OSError, psutil.Error):
        found.append(psutil.virtual_memory().available)
        if sys.platform != "win32":
            limit, _ = resource.getrlimit(resource.RLIMIT_AS)
            if limit != resource.RLIM_INFINITY:
                found.append(limit - psutil.Process().memory_info().vms)
    with suppress(OSError, ValueError):  # no control group, or one without a limit, which reads "max"
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        # The group's files that were read once make way when memory is needed.
        found.append(limit - used + int(counts.get("inactive_file", 0)))
    return max(0, min(found)) if found else None


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass, parameters left out."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: a saved output would hold its own graph alive for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(seen.values())


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or in main memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    # "could not create a primitive" and the like are oneDNN's words for it, "unable to find an engine" cuDNN's.
    return isinstance(error, RuntimeError) and any(
        part in text
        for part in (
            "can't allocate memory",
            "not enough memory",
            "CUDA out of memory",
            "CUDA error: out of memory",
            "STATUS_ALLOC_FAILED",
            "DEVICE_ALLOCATION_FAILED",
            "unable to find an engine to execute this computation",
            "std::bad_alloc",
            "could not create",
        )
    )
