"""A batch, or a piece of one that fits into memory, with the loss of the whole batch.

The loss is always computed on the outputs of all samples, of which only the piece's have a graph. Whatever the loss
makes of its batch (a mean weighted by classes, say), the pieces' Hessians therefore add up to that of the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.errors import ModelError
from tracequant.task import Batch, Task, checked_loss, model_device

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class Piece:
    """Samples `start` to `stop` of batch number `index`, which has `size` samples.

    `others` are the outputs of the samples before and after it, as constants; None where the piece is the whole batch.
    """

    batch: Batch
    index: int
    start: int
    stop: int
    size: int
    precision: Precision = "float32"
    others: tuple[Any, Any] | None = None

    @property
    def whole(self) -> bool:
        """Whether no sample is left out."""
        return self.others is None

    @property
    def samples(self) -> int:
        """Number of samples that have a graph."""
        return self.stop - self.start

    def forward(self, model: nn.Module, task: Task) -> tuple[Any, Tensor]:
        """Outputs and loss of the whole batch, in which only the piece's outputs depend on the model."""
        own = self.batch if self.others is None else task.select(self.batch, self.start, self.stop)
        outputs = _outputs(model, task, own, self.precision)
        if self.others is not None:
            before, after = self.others
            outputs = join([part for part in (before, outputs, after) if part is not None])
        return outputs, checked_loss(task, outputs, self.batch)


def divide(model: nn.Module, task: Task, whole: Piece, count: int) -> Iterator[Piece]:
    """The batch in `count` pieces of nearly the same number of samples; the outputs of all are computed first."""
    bounds = [whole.size * i // count for i in range(count + 1)]
    outputs = []
    with torch.no_grad():
        for start, stop in itertools.pairwise(bounds):
            outputs.append(_outputs(model, task, task.select(whole.batch, start, stop), whole.precision))
    for i in range(count):
        others = (join(outputs[:i]) if i else None, join(outputs[i + 1 :]) if i + 1 < count else None)
        yield Piece(whole.batch, whole.index, bounds[i], bounds[i + 1], whole.size, whole.precision, others)


def join(parts: list[Any]) -> Any:
    """Outputs of successive samples as the outputs of one batch: tensors and lists joined, in any nesting."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else first
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, tuple):
        items = [join(list(column)) for column in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    leaves = [pytree.tree_flatten(part) for part in parts]
    if leaves[0][1].is_leaf():
        return first
    return pytree.tree_unflatten(
        [join(list(column)) for column in zip(*(own for own, _ in leaves), strict=True)], leaves[0][1]
    )


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let float32 products of matrices be rounded to TF32 inside the block, where that is asked for."""
    if precision == "tf32":
        if device.type != "cuda":
            raise ModelError("precision='tf32' is for CUDA devices; use float32 or bfloat16 here")
        saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved
        return
    yield


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
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("can't allocate memory", "not enough memory", "CUDA out of memory", "std::bad_alloc")
    )


def _outputs(model: nn.Module, task: Task, batch: Batch, precision: Precision) -> Any:
    """The model's outputs; under autocast for bfloat16, and then in float32 again, since the loss needs its digits."""
    if precision != "bfloat16":
        return task.outputs(model, batch)
    context: AbstractContextManager[Any] = torch.autocast(model_device(model).type, torch.bfloat16)
    with context:
        outputs = task.outputs(model, batch)
    return pytree.tree_map(lambda x: x.float() if _is_half(x) else x, outputs)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
