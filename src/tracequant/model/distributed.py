"""What the processes of one run (`torchrun`) tell each other. With a single process nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from tracequant.core.errors import ResourceError, RunError

T = TypeVar("T")

# Processes wait for one another only at the end, when one may be hours ahead.
PATIENCE = timedelta(days=7)


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _initialized() else 1


def gather(value: T) -> list[T]:
    """Everybody's `value`, by rank, in every process. Raises `RunError` if another process has died."""
    if not _initialized():
        return [value]
    found: list[T | None] = [None] * world_size()
    try:
        dist.all_gather_object(found, value)
    except RuntimeError as error:
        raise RunError(
            f"process {rank()} waited for another of the {world_size()} processes, which has ended ({error}); see its"
            " message above. Finished batches are kept: run the same command again"
        ) from error
    return found  # type: ignore[return-value]


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, which all call this with tensors of the same shapes."""
    if world_size() > 1:
        _together(list(tensors), lambda flat: dist.all_reduce(flat.div_(world_size())))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their means over the processes. A parameter without one in any process keeps none."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    # On the CPU, where reading the result does not wait for a GPU.
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    dist.all_reduce(used)
    chosen = [parameter for parameter, count in zip(parameters, used.tolist(), strict=True) if count]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average(parameter.grad for parameter in chosen if parameter.grad is not None)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values."""
    if world_size() > 1:
        _together(list(tensors), lambda flat: dist.broadcast(flat, 0))


def _together(tensors: list[Tensor], work: Callable[[Tensor], object]) -> None:
    """Do `work` on all elements of one type at once: a message for each tensor would take its time a hundred times."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    for dtype, device in sorted(kinds, key=str):
        same = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == (dtype, device)]
        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            work(flat)
            for tensor, values in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(values.view_as(tensor))


def own_share(batches: Iterable[T], seed: int) -> Iterable[T]:
    """This process's batches of one pass, as many for each process; what remains is left out.

    `seed` orders the pass for all alike, after which every process draws random numbers of its own. Of a DataLoader
    only the share is loaded; one with a DistributedSampler shares out itself; anything else is read in full.
    """
    if world_size() == 1:
        torch.manual_seed(seed)
        return batches
    torch.manual_seed(seed)
    if isinstance(batches, DataLoader) and isinstance(batches.sampler, DistributedSampler):
        batches.sampler.set_epoch(seed)  # or every pass would have the order of the first
        return batches
    if type(batches) is not DataLoader or isinstance(batches.dataset, IterableDataset) or batches.batch_sampler is None:
        return _every(batches)
    order = list(batches.batch_sampler)
    order = order[rank() : len(order) - len(order) % world_size() : world_size()]
    torch.manual_seed(seed + 1_000_003 * rank())
    return DataLoader(
        batches.dataset,
        batch_sampler=order,
        num_workers=batches.num_workers,
        collate_fn=batches.collate_fn,
        pin_memory=batches.pin_memory,
        worker_init_fn=batches.worker_init_fn,
        multiprocessing_context=batches.multiprocessing_context,
        prefetch_factor=batches.prefetch_factor,
    )


def _every(batches: Iterable[T]) -> Iterator[T]:
    """The batches of this process where they are dealt out in turn."""
    for number, batch in enumerate(batches):
        if number % world_size() == rank():
            own = batch
        if number % world_size() == world_size() - 1:
            yield own


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the other processes that `torchrun` has started, if it has; gloo on CPUs, NCCL between GPUs.

    `device` is what the command line was given: with "cpu" GPUs are left alone, and a single one cannot be named.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or _initialized():
        yield
        return
    cuda = torch.cuda.is_available() and device.partition(":")[0] in ("auto", "cuda")
    if cuda:
        if ":" in device:
            raise RunError(f"device={device!r} would put all processes on one GPU; use device='cuda' or device='auto'")
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise ResourceError(
                f"process {local} of this machine has no GPU of its own: {devices} are visible; start at most"
                f" {devices} (--nproc-per-node {devices})"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
