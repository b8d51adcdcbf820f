"""Which matrix operations of a forward pass read which parameters, however the modules are written.

Operations are watched as they are dispatched. A parameter reaches them through views and copies (a transpose, the
permutations of an einsum, a cast): what is followed is which axis of the parameter each dimension of a tensor is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

_PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1, "_addmm_activation": 1}
_CONVOLUTIONS = ("convolution", "_convolution", "conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_LOOKUPS = ("embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
# The same elements in the same dimensions; in other ones, in the same order; some of them.
_SAME = ("detach", "alias", "clone", "contiguous", "_to_copy", "to", "lift_fresh", "expand")
_RESHAPED = ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "unsqueeze", "squeeze")
_PERMUTED = ("t", "transpose", "permute", "movedim")
_CUT = ("slice", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "select", "unbind")
_VIEWS = frozenset((*_SAME, *_RESHAPED, *_PERMUTED, *_CUT))
# They take rows of a parameter, whichever the data say.
_GATHERS = ("index", "index_select", "gather")

# For each dimension of a tensor the axes of the parameter that lie in it, outermost first, with the sizes they have
# there; -1 for an axis that the parameter does not have.
_Layout = tuple[tuple[tuple[int, int], ...], ...]


class _Origin(NamedTuple):
    """What a tensor that no data went into is made of: numbers of parameters; `layout` if it is one, rearranged."""

    sources: frozenset[int]
    layout: _Layout | None


@dataclass
class _Frame:
    """A module that is being called: the memory of what it reads, its own parameters, and who reads that memory."""

    module: str
    memory: int | None
    numel: int
    parameters: frozenset[int]
    read_by: set[int] = field(default_factory=set)
    read_otherwise: set[int] = field(default_factory=set)
    shared: bool = False


class WeightReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, records which parameters of a model are read by matrix operations.

    By `id` of the parameter: `channel_axis` is the axis of its output channels, in the order of the first read;
    `macs` are the multiply-accumulates of all reads, `macs_outside` of those while `inside` is 0. Something computed
    from the `computed` parameters is multiplied with. The `seen` ones were read by any operation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.channel_axis: dict[int, int] = {}
        self.macs: dict[int, float] = defaultdict(float)
        self.macs_outside: dict[int, float] = defaultdict(float)
        self.inside = 0
        self.computed: set[int] = set()
        self.seen: set[int] = set()
        # Of each module that was entered: its parameters that all of its calls multiply their first input with.
        self.of_input: dict[str, set[int]] = {}
        self._frames: list[_Frame] = []
        self._parameters = frozenset(id(parameter) for parameter in model.parameters())
        self._origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for buffer in model.buffers():
            self._origins[buffer] = _Origin(frozenset(), None)
        for parameter in model.parameters():
            layout = tuple(((axis, size),) for axis, size in enumerate(parameter.shape))
            self._origins[parameter] = _Origin(frozenset({id(parameter)}), layout)

    def enter(self, name: str, module: nn.Module, first: Tensor | None) -> None:
        """A module is called with this first input."""
        parameters = frozenset(id(parameter) for parameter in module.parameters(recurse=False))
        memory = None if first is None else _memory(first)
        self._frames.append(_Frame(name, memory, 0 if first is None else first.numel(), parameters))

    def leave(self) -> None:
        """The module that was entered last returns."""
        frame = self._frames.pop()
        reads = set() if frame.shared else frame.read_by - frame.read_otherwise
        self.of_input[frame.module] = self.of_input.get(frame.module, reads) & reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note which parameters it read."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = _tensors((args, kwargs))
        self.seen |= self._parameters.intersection(map(id, inputs))
        read: dict[int, Tensor] = {}
        for operand, other, dimension in _operands(name, args):
            weight = self._weight(operand, other, dimension)
            if weight is not None:
                read[weight] = other
                self.macs[weight] += _macs(name, args, output)
                if not self.inside:
                    self.macs_outside[weight] += _macs(name, args, output)
        for frame in self._frames:
            _note_input(frame, name, inputs, read)
        self._follow(name, args, inputs, output)
        return output

    def _origin(self, tensor: Tensor) -> _Origin | None:
        origin: _Origin | None = self._origins.get(tensor)  # type: ignore[no-untyped-call]
        return origin

    def _weight(self, operand: Tensor, other: Tensor, dimension: int) -> int | None:
        """The parameter that an operand of a matrix operation is, None where it is none; `dimension` of its outputs."""
        origin, factor = self._origin(operand), self._origin(other)
        # A learned tensor times a learned tensor says nothing about which of them is the weight.
        if origin is None or not origin.sources or (factor is not None and factor.sources):
            return None
        if origin.layout is None or len(origin.sources) > 1:
            self.computed |= origin.sources
            return None
        # Where the outputs are several axes, the longest has the most scales.
        sizes = [(size, -axis) for axis, size in origin.layout[dimension] if axis >= 0]
        parameter = next(iter(origin.sources))
        self.channel_axis.setdefault(parameter, -max(sizes)[1] if sizes else 0)
        return parameter

    def _follow(self, name: str, args: Any, inputs: list[Tensor], output: Any) -> None:
        """Note what the results are made of, if no data went into them."""
        origins = [self._origin(tensor) for tensor in (inputs[:1] if name in _GATHERS else inputs)]
        known = [origin for origin in origins if origin is not None]
        for tensor in _tensors(output):
            if len(known) < len(origins):
                self._origins.pop(tensor, None)  # type: ignore[no-untyped-call]
                continue
            layout = known[0].layout if len(known) == 1 and name in _VIEWS else None
            if layout is not None:
                layout = _rearranged(name, args, layout, tuple(tensor.shape))
            self._origins[tensor] = _Origin(frozenset().union(*(origin.sources for origin in known)), layout)


def _operands(name: str, args: Any) -> Iterator[tuple[Tensor, Tensor, int]]:
    """What may be a weight in a matrix operation, what it is multiplied with, and the dimension of its outputs."""
    if name in _PRODUCTS:
        first, second = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        if first.ndim > 1:
            yield first, second, -2
        if second.ndim > 1:
            yield second, first, -1
    elif name in (*_CONVOLUTIONS, *_TRANSPOSED):
        yield args[1], args[0], int(_transposes(name, args))
    elif name in ("linear", "_trilinear"):
        yield args[1], args[0], 0
    elif name in _LOOKUPS:
        yield args[0], args[1], 0


def _macs(name: str, args: Any, output: Any) -> float:
    """Multiply-accumulates of a matrix operation; a lookup has none."""
    if name in _PRODUCTS:
        return float(output.numel() * args[_PRODUCTS[name]].shape[-1])
    if name in (*_CONVOLUTIONS, *_TRANSPOSED):
        return float((args[0] if _transposes(name, args) else output).numel() * args[1][0].numel())
    return float(output.numel() * args[1][0].numel()) if name in ("linear", "_trilinear") else 0.0


def _transposes(name: str, args: Any) -> bool:
    return name in _TRANSPOSED or (name in ("convolution", "_convolution") and bool(args[6]))


def _note_input(frame: _Frame, name: str, inputs: Iterable[Tensor], read: dict[int, Tensor]) -> None:
    """Note what an operation inside a module's call does with the module's input; `read` is parameter → operand."""
    for parameter in frame.parameters & read.keys():
        other = read[parameter]
        whole = _memory(other) == frame.memory and other.numel() == frame.numel
        (frame.read_by if whole else frame.read_otherwise).add(parameter)
    if name in _VIEWS or frame.memory is None or frame.parameters & read.keys():
        return
    frame.shared |= any(_memory(tensor) == frame.memory for tensor in inputs)


def _memory(tensor: Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _rearranged(name: str, args: Any, layout: _Layout, shape: tuple[int, ...]) -> _Layout | None:
    """The layout after a view or copy whose result has this shape."""
    rank = len(layout)
    if name in _RESHAPED:
        return _regrouped(layout, shape)
    if name in _PERMUTED:
        order = list(range(rank))
        if name == "permute":
            order = [axis % rank for axis in args[1]]
        elif name == "movedim":
            return None
        elif rank > 1:
            first, second = (axis % rank for axis in args[1:3]) if name == "transpose" else (0, 1)
            order[first], order[second] = second, first
        return tuple(layout[axis] for axis in order)
    if name in ("select", "unbind"):
        gone = (args[1] if len(args) > 1 else 0) % rank
        return tuple(dimension for axis, dimension in enumerate(layout) if axis != gone)
    # Copies have the dimensions as they are, an expanded tensor has more in front; some are longer or shorter.
    wide: _Layout = (((-1, 1),),) * (len(shape) - rank) + layout
    return tuple(_resized(dimension, size) for dimension, size in zip(wide, shape, strict=True))


def _resized(dimension: tuple[tuple[int, int], ...], size: int) -> tuple[tuple[int, int], ...]:
    total = 1
    for _, length in dimension:
        total *= length
    if total == size:
        return dimension
    longest = max(dimension, key=lambda part: part[1]) if dimension else (-1, 1)
    return ((-1 if total == 1 else longest[0], size),)


def _regrouped(layout: _Layout, shape: tuple[int, ...]) -> _Layout | None:
    """The layout of a tensor of the same elements in the same order; None where its dimensions cut through an axis."""
    parts = [part for dimension in layout for part in dimension if part[1] != 1][::-1]
    result = []
    for size in shape:
        dimension: list[tuple[int, int]] = []
        while size > 1:
            if not parts:
                return None
            axis, length = parts.pop()
            if length <= size and size % length == 0:
                dimension.append((axis, length))
                size //= length
            elif length % size == 0:
                dimension.append((axis, size))
                parts.append((axis, length // size))
                size = 1
            else:
                return None
        result.append(tuple(dimension))
    return tuple(result)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
