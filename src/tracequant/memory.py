"""How much memory is free, how much a pass takes, and whether an error says that none is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def available_bytes() -> int | None:
    """Main memory that is free for this process, by the system and its control group; None where neither tells."""
    found = []
    for path, line in (("/proc/meminfo", "MemAvailable:"), ("/proc/self/limits", "Max address space")):
        for text in _lines(path):
            if text.startswith(line):
                value = text[len(line) :].split()[0]
                if line == "MemAvailable:":
                    found.append(int(value) * 1024)
                elif value != "unlimited":
                    used = next((int(t.split()[1]) * 1024 for t in _lines("/proc/self/status") if "VmSize" in t), 0)
                    found.append(int(value) - used)
    limit, usage = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and usage and limit[0].strip() != "max":
        reclaimable = [
            int(t.split()[1]) for t in _lines("/sys/fs/cgroup/memory.stat") if t.startswith("inactive_file ")
        ]
        found.append(int(limit[0]) - int(usage[0]) + sum(reclaimable))
    return max(0, min(found)) if found else None


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass, parameters left out."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

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


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
