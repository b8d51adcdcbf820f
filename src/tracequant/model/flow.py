"""The data flow of one forward pass: which operation or module reads which value.

Module names say nothing about what happens between modules (`F.relu`, `+=`, `torch.cat`, one ReLU called five times):
operations are watched as they are dispatched. A value is a number, not a tensor: no tensor is kept alive, and one that
an operation changes in place becomes another value.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

_RECTIFIERS = ("relu", "relu6", "clamp", "clamp_min", "hardtanh")
# Rounding before these is rounding after them: they only choose, clip, copy or move values.
_TRANSPARENT = frozenset({
    *_RECTIFIERS, "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "view", "_unsafe_view", "_reshape_alias", "reshape", "flatten", "permute", "transpose",
    "t", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "detach", "dropout", "cat", "stack",
})  # fmt: skip


@dataclass(frozen=True)
class Read:
    """A value read by an operation, or by a watched module as one whole; `written` is the value that comes of it.

    `rounds` marks a module that rounds what it reads, `low` and `high` are what an operation clips to.
    """

    reader: str
    written: int | None
    is_module: bool = False
    rounds: bool = False
    low: float = -math.inf
    high: float = math.inf


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records reads while it is active. Watched modules are entered and left by their hooks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: dict[int, list[Read]] = defaultdict(list)
        self.outputs: dict[str, list[int]] = defaultdict(list)
        self.results: set[int] = set()
        self._learned: set[int] = set()
        self._numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._count = 0
        self._depth = 0

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's present value."""
        if tensor not in self._numbers:
            return self._renumber(tensor, learned=isinstance(tensor, nn.Parameter))
        return int(self._numbers[tensor])

    def is_data(self, number: int) -> bool:
        """Whether a value comes from the data alone, without any parameter; it may be scaled, normalised or padded."""
        return number not in self._learned

    def enter(self) -> None:
        """A watched module is called. The operations inside it are not recorded."""
        self._depth += 1

    def leave(self, module: str, inputs: list[int], output: Any, rounds: bool) -> None:
        """A watched module has read these values and returned its output, a tensor or a nest of them."""
        self._depth -= 1
        if self._depth:
            return
        written = [self._renumber(leaf, learned=True) for leaf in _tensors(output)]
        self.outputs[module].extend(written)
        for number in dict.fromkeys(inputs):
            self.reads[number].append(Read(module, written[0] if written else None, is_module=True, rounds=rounds))

    def finish(self, results: Any) -> None:
        """These tensors leave the model."""
        self.results.update(self.number(leaf) for leaf in _tensors(results))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note what it read."""
        kwargs = kwargs or {}
        read = [] if self._depth else list(dict.fromkeys(self.number(leaf) for leaf in _tensors((args, kwargs))))
        output = func(*args, **kwargs)
        if self._depth:
            return output
        learned = not self._learned.isdisjoint(read)
        written = [self._renumber(leaf, learned) for leaf in _tensors(output)]
        arguments = {
            argument.name: args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(func._schema.arguments)
        }
        name = func.overloadpacket.__name__.removesuffix("_")
        low, high = _bounds(name, arguments)
        for number in read:
            self.reads[number].append(Read(name, written[0] if written else None, low=low, high=high))
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._note_aliases(arguments[argument.name])
        return output

    def needs_rounding(self, number: int) -> bool:
        """Whether a value must be rounded where it arises: something other than one shared rounding reads it.

        What leaves the model stays in float.
        """
        reads = self.reads[number]
        if number in self.results or all(read.rounds for read in reads):
            return False
        (read, *others) = reads
        if not others and read.reader in _TRANSPARENT and read.written is not None:
            return self.needs_rounding(read.written)
        return True

    def bounds(self, number: int) -> tuple[float, float]:
        """What a value is clipped to by the one operation that reads it; infinite where none or several do."""
        reads = self.reads[number]
        return (reads[0].low, reads[0].high) if len(reads) == 1 else (-math.inf, math.inf)

    def _renumber(self, tensor: Tensor, learned: bool) -> int:
        self._count += 1
        self._numbers[tensor] = self._count
        if learned:
            self._learned.add(self._count)
        return self._count

    def _note_aliases(self, changed: Any) -> None:
        """Other tensors that show the memory written to: what they hold from now on is not followed."""
        if not isinstance(changed, Tensor) or changed.layout is not torch.strided:
            return
        memory = changed.untyped_storage()._cdata
        for tensor, number in list(self._numbers.items()):  # type: ignore[no-untyped-call]
            strided = tensor is not changed and tensor.layout is torch.strided
            if strided and tensor.untyped_storage()._cdata == memory:
                self.reads[number].append(Read("a write to its memory", None))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bounds(name: str, arguments: dict[str, Any]) -> tuple[float, float]:
    """The limits that an operation clips its input to."""
    if name not in _RECTIFIERS:
        return -math.inf, math.inf
    low = arguments.get("min", arguments.get("min_val", 0.0))
    high = arguments.get("max", arguments.get("max_val", 6.0 if name == "relu6" else None))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return -math.inf, math.inf
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)
