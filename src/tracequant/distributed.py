"""What the processes of one run (`torchrun`) tell each other. With a single process nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from tracequant.errors import ResourceError, RunError

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


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that `torchrun` has started, if it has; gloo on CPUs, NCCL between GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or _initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
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
