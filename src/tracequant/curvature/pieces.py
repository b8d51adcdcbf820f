"""A batch, or a piece of one that fits into memory, with the loss of the whole batch.

The loss is always computed on the outputs of all samples, of which only the piece's have a graph. Whatever the loss
makes of its batch (a mean weighted by classes, say), the pieces' Hessians therefore add up to that of the whole, as
long as no term of it has two samples in it, which is checked.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.errors import ResourceError, TaskError
from tracequant.task import Batch, Task, checked_loss, has_rows, model_device, total_loss

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
    others: tuple[Any, ...] | None = None

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
            parts = ((before, self.start), (outputs, self.samples), (after, self.size - self.stop))
            outputs = join([p for p, length in parts if length], [length for _, length in parts if length])
        return outputs, checked_loss(task, outputs, self.batch)


def divide(model: nn.Module, task: Task, whole: Piece, count: int) -> Iterator[Piece]:
    """The batch in `count` pieces of nearly the same number of samples; the outputs of all are computed first.

    Raises `TaskError` where batch or outputs cannot be divided by samples.
    """
    bounds = [whole.size * i // count for i in range(count + 1)]
    outputs = []
    with torch.no_grad():
        for start, stop in itertools.pairwise(bounds):
            outputs.append(_outputs(model, task, task.select(whole.batch, start, stop), whole.precision))
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    _check_separable(task, outputs, lengths, whole.batch)
    for i in range(count):
        others = tuple(
            join(outputs[part], lengths[part]) if lengths[part] else None for part in (slice(i), slice(i + 1, None))
        )
        yield Piece(whole.batch, whole.index, bounds[i], bounds[i + 1], whole.size, whole.precision, others)


def join(parts: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Outputs of `lengths` successive samples each as the outputs of one batch, in any nesting.

    Raises `TaskError` for what does not have an entry for each sample, such as a mean over the batch.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        if any(part.ndim == 0 or len(part) != length for part, length in zip(parts, lengths, strict=True)):
            raise TaskError(
                f"an output of shape {list(first.shape)} does not have the samples of its batch along the first axis,"
                " so that the batch cannot be divided; use smaller batches"
            )
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        columns = {key: join([part[key] for part in parts], lengths) for key in first}
        if type(first) is dict:
            return columns
        return type(first)(**columns) if dataclasses.is_dataclass(first) else type(first)(columns)  # type: ignore[call-arg]
    if isinstance(first, (list, tuple)):
        samples = all(len(part) == length for part, length in zip(parts, lengths, strict=True))
        if samples and not any(has_rows(item, lengths[0]) for item in first):
            return type(first)(item for part in parts for item in part)
        items = [join(column, lengths) for column in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(first, **{n: join([getattr(p, n) for p in parts], lengths) for n in names})
    return first


def _check_separable(task: Task, outputs: Sequence[Any], lengths: Sequence[int], batch: Batch) -> None:
    """Raise `TaskError` if the loss has second derivatives by two pieces' outputs, which the pieces would leave out.

    Two pieces differ in a bit of their numbers. So a vector that is zero where a bit is 0, and random elsewhere, may
    have no image there, for every bit.
    """
    free = [pytree.tree_map(lambda x: x.detach().requires_grad_() if _is_floating(x) else x, own) for own in outputs]
    leaves = [[x for x in pytree.tree_leaves(own) if _is_floating(x)] for own in free]
    flat = [x for own in leaves for x in own]
    numbers = [number for number, own in enumerate(leaves) for _ in own]
    slopes = torch.autograd.grad(
        total_loss(task, join(free, lengths), batch), flat, create_graph=True, allow_unused=True
    )
    bent = [slope for slope in slopes if slope is not None and slope.requires_grad]
    owners = [n for n, slope in zip(numbers, slopes, strict=True) if slope is not None and slope.requires_grad]
    for bit in range(len(outputs).bit_length() if bent else 0):
        vectors = [
            torch.randn(g.shape, generator=torch.Generator(g.device).manual_seed(bit), device=g.device, dtype=g.dtype)
            * (n >> bit & 1)
            for g, n in zip(bent, owners, strict=True)
        ]
        images = torch.autograd.grad(bent, flat, vectors, retain_graph=True, allow_unused=True)
        sizes = [0.0 if image is None else float(image.abs().sum()) for image in images]
        if sum(size for size, n in zip(sizes, numbers, strict=True) if not n >> bit & 1) > 1e-6 * sum(sizes):
            raise TaskError("the loss of one sample depends on others, so that the batch cannot be divided")


@contextmanager
def arithmetic(precision: Precision, model: nn.Module) -> Iterator[None]:
    """On a GPU compute float32 products in TF32 inside the block where that is asked for, and else in float32.

    torch takes TF32 for convolutions unless it is told not to. And recurrent networks are computed by torch's own
    kernels: cuDNN's have no backward pass in evaluation mode.
    """
    device = model_device(model)
    if precision not in get_args(Precision):
        raise ResourceError(f"unknown precision {precision!r}; choose {', '.join(get_args(Precision))}")
    if precision == "tf32" and device.type != "cuda":
        raise ResourceError("precision='tf32' is for CUDA devices; use float32 or bfloat16 here")
    if device.type != "cuda":
        yield
        return
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    switches = _tf32_switches()
    before = [getattr(backend, name) for backend, name, _, _ in switches]
    enabled = torch.backends.cudnn.enabled
    try:
        for backend, name, on, off in switches:
            setattr(backend, name, on if precision == "tf32" else off)
        torch.backends.cudnn.enabled = enabled and not recurrent
        yield
    finally:
        for (backend, name, _, _), value in zip(switches, before, strict=True):
            setattr(backend, name, value)
        torch.backends.cudnn.enabled = enabled


def _tf32_switches() -> list[tuple[Any, str, Any, Any]]:
    """What decides about TF32: an object, the name of its attribute, the values for TF32 and for float32."""
    cudnn: Any = torch.backends.cudnn
    if hasattr(cudnn, "conv") and hasattr(cudnn.conv, "fp32_precision"):
        # Where these are, the older ones cannot always be read.
        backends = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        return [(backend, "fp32_precision", "tf32", "ieee") for backend in backends]
    return [(backend, "allow_tf32", True, False) for backend in (torch.backends.cuda.matmul, cudnn)]


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


def _outputs(model: nn.Module, task: Task, batch: Batch, precision: Precision) -> Any:
    """The model's outputs; under autocast for bfloat16, and then in float32 again, since the loss needs its digits."""
    if precision != "bfloat16":
        return task.outputs(model, batch)
    context: AbstractContextManager[Any] = torch.autocast(model_device(model).type, torch.bfloat16)
    with context:
        outputs = task.outputs(model, batch)
    return pytree.tree_map(lambda x: x.float() if _is_half(x) else x, outputs)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
