"""The operations of a forward pass that read a layer's weight, found in autograd's graph.

A model may pad inside its `forward`, call `F.linear` with another module's parameter, split a weight into three, or
hold it in a class of its own. The graph that the forward pass leaves shows in every case which convolution, matrix
product or lookup reads the weight, what else that operation reads, and where the gradient of its output passes. So
layers are recognised by what they compute, and never by the class of their module.

A node's saved tensors, and the shapes of what it computed, are read by the names that torch gives them in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node


@dataclass(frozen=True)
class Convolution:
    """A convolution's geometry; `transposed` for one that enlarges."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool


@dataclass(frozen=True)
class Product:
    """A matrix product with the weight, or one for each of several groups.

    What is read is `[g, R, k]` and the gradient of the output `[g, R, o]`, with R rows. `first` says that the weight
    stands first and is `[g, o, k]` there, else it is `[g, k, o]`. `flip` says that the weight lies transposed beside
    how another operation of the layer reads it. `scale` multiplies the gradient.
    """

    first: bool
    flip: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Lookup:
    """Rows of the weight taken by an index; `padding` is the index whose row has no gradient, or -1."""

    padding: int


Geometry = Convolution | Product | Lookup
# Which of the parts of a weight that was split an operation reads: sizes, axis and number.
Part = tuple[Any, int, int]
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operation:
    """One operation that reads a layer's weight.

    `read` is what it reads beside the weight: `[R, C, ...]` (convolution), `[g, R, k]` (product) or indices (lookup).
    `edge` is where the gradient of its output passes in the graph; `source` says that nothing before it can be
    differentiated. `operand` maps a tensor of the weight's shape to what the operation reads of it: its elements in
    another order, or the ones of a `part`.
    """

    geometry: Geometry
    read: Tensor
    edge: GradientEdge
    source: bool
    operand: View
    part: Part | None = None


@dataclass(frozen=True)
class _Site:
    """Where a weight, or a part of it, appears in the graph: the result of a node."""

    node: Node
    number: int | None
    operand: View
    part: Part | None


# Nodes that hand on all elements of a weight, in another order, shape or precision.
_REORDERING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "T": lambda node, w: w.t(),
    "Transpose": lambda node, w: w.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),
    "Permute": lambda node, w: w.permute([_signed(dim) for dim in node._saved_dims]),
    **dict.fromkeys(
        ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"),
        lambda node, w: w.reshape(_output_shape(node)),
    ),
    **dict.fromkeys(("Alias", "Clone", "ToCopy"), lambda node, w: w),
}
# Nodes whose rows are chosen by values: by a mask, an index, the lengths of sequences.
_BY_VALUE = frozenset({
    "Index", "IndexSelect", "IndexPut", "IndexAdd", "MaskedSelect", "MaskedScatter", "Gather", "Scatter", "ScatterAdd",
    "PackPaddedSequence", "Take", "TakeAlongDim", "Repeat_interleave", "RepeatInterleave",
})  # fmt: skip
# The names under which a product saves its two matrices.
_PRODUCTS = {
    "Mm": ("self", "mat2"),
    "Addmm": ("mat1", "mat2"),
    "Bmm": ("self", "mat2"),
    "Baddbmm": ("batch1", "batch2"),
}


class Graph:
    """The graph behind the outputs of a forward pass over `samples` samples."""

    def __init__(self, outputs: Sequence[Tensor], samples: int) -> None:
        self._samples = samples
        # Whether operations may have other rows for other values: those of tokens that a mask or a router picks.
        self.depends_on_values = False
        # Node → the nodes that read its result, with the positions where they do.
        self._readers: dict[Node, list[tuple[Node, int]]] = {t.grad_fn: [] for t in outputs if t.grad_fn is not None}
        pending = list(self._readers)
        while pending:
            node = pending.pop()
            self.depends_on_values |= _kind(node) in _BY_VALUE
            for position, (before, _) in enumerate(node.next_functions):
                if before is None:
                    continue
                if before not in self._readers:
                    self._readers[before] = []
                    pending.append(before)
                self._readers[before].append((node, position))

    def find_operations(self, weights: dict[str, Tensor]) -> tuple[dict[str, list[Operation]], list[str]]:
        """The operations that read each weight, by layer, and the layers whose weight something else reads too.

        Layers that the outputs do not depend on are in neither.
        """
        leaves = {id(node.variable): node for node in self._readers if _kind(node) == "AccumulateGrad"}  # type: ignore[attr-defined]
        operations: dict[str, list[Operation]] = {}
        others: list[str] = []
        for name, weight in weights.items():
            if id(weight) not in leaves:
                continue
            uses = list(self._uses(leaves[id(weight)]))
            aligned = _aligned([use for use in uses if use is not None], weight.detach())
            if None in uses or aligned is None:
                others.append(name)
            else:
                operations[name] = aligned
        return operations, others

    def _uses(self, leaf: Node) -> Iterator[Operation | None]:
        """What reads a weight: an operation, or None for anything else."""
        pending = [_Site(leaf, None, lambda w: w, None)]
        while pending:
            site = pending.pop()
            for reader, position in self._readers[site.node]:
                if site.number is not None and reader.next_functions[position][1] != site.number:
                    continue
                kind = _kind(reader)
                if kind == "Slice" and _output_shape(reader) == tuple(reader._saved_self_sym_sizes):  # type: ignore[attr-defined]
                    # Nothing was cut off: `w[:, :, None]` leaves such a node in torch 2.8.
                    pending.append(_Site(reader, None, site.operand, site.part))
                elif kind in _REORDERING:
                    view = _then(site.operand, _REORDERING[kind], reader)
                    pending.append(_Site(reader, None, view, site.part))
                elif kind in ("Split", "SplitWithSizes") and site.part is None:
                    pending.extend(_split(reader, site.operand))
                else:
                    yield self._operation(reader, position, site)

    def _operation(self, node: Any, position: int, site: _Site) -> Operation | None:
        """The node as an operation that reads a weight at this position, None if it is none that is known."""
        kind, edge = _kind(node), GradientEdge(node, 0)
        before = [following for following, _ in node.next_functions]
        if kind == "Convolution" and position == 1:
            geometry = Convolution(
                weight_shape=tuple(node._saved_weight.shape),
                stride=tuple(node._saved_stride),
                padding=tuple(node._saved_padding),
                dilation=tuple(node._saved_dilation),
                output_padding=tuple(node._saved_output_padding),
                groups=node._saved_groups,
                transposed=node._saved_transposed,
            )
            return Operation(
                geometry, node._saved_input.detach(), edge, before[0] is None, site.operand, part=site.part
            )
        if kind == "Embedding" and not node._saved_scale_grad_by_freq:
            index, edge = self._spread(node, edge)
            return Operation(Lookup(_signed(node._saved_padding_idx)), index, edge, True, site.operand, part=site.part)
        if kind == "Linear" and position == 1:
            read = node._saved_input.detach().flatten(0, -2)[None]
            return Operation(Product(first=False), read, edge, before[0] is None, site.operand, part=site.part)
        if kind in _PRODUCTS and position >= len(before) - 2:
            first = position == len(before) - 2
            other = before[-1] if first else before[-2]
            if other is not None and self._is_weight(other):
                return None  # a product of two weights has no samples
            read = getattr(node, f"_saved_{_PRODUCTS[kind][int(first)]}").detach()
            read = read.mT if first else read
            product = Product(first, scale=float(getattr(node, "_saved_alpha", 1)))
            read = read if read.ndim == 3 else read[None]
            return Operation(product, read, edge, other is None, site.operand, part=site.part)
        return None

    def _is_weight(self, node: Node) -> bool:
        """Whether a node's result is a parameter in some order."""
        while _kind(node) in _REORDERING and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]
        return _kind(node) == "AccumulateGrad" and isinstance(node.variable, nn.Parameter)  # type: ignore[attr-defined]

    def _spread(self, node: Any, edge: GradientEdge) -> tuple[Tensor, GradientEdge]:
        """A lookup's indices and edge; where a sum spreads one lookup over all samples, those of one for each sample.

        Position embeddings are looked up once. Their gradient is summed over samples, except behind that sum.
        """
        index, shape = node._saved_indices, _output_shape(node)
        readers = self._readers[node]
        if len(readers) == 1 and _kind(readers[0][0]) == "Add":
            total: Any = readers[0][0]
            spread = _output_shape(total)
            inner = shape[1:] if shape[0] == 1 else shape
            scaled = readers[0][1] == 1 and total._saved_alpha != 1
            if spread != shape and spread == (self._samples, *inner) and not scaled:
                return index.expand(spread[:-1]), GradientEdge(total, 0)
        return index, edge


def _split(node: Any, operand: View) -> list[_Site]:
    """The parts of a weight that was split."""
    sizes = node._saved_split_sizes if _kind(node) == "SplitWithSizes" else node._saved_split_size
    sizes = sizes if isinstance(sizes, int) else tuple(sizes)
    dim = _signed(node._saved_dim)

    def view(number: int) -> View:
        return lambda w: operand(w).split(sizes if isinstance(sizes, int) else list(sizes), dim)[number]  # type: ignore[no-untyped-call]

    return [_Site(node, number, view(number), (sizes, dim, number)) for number in range(len(node._input_metadata))]


def _aligned(uses: Sequence[Operation], weight: Tensor) -> list[Operation] | None:
    """The operations with the same orientation of the weight, None if their gradients cannot simply be added up."""
    if len(uses) < 2:
        return list(uses)
    kinds = {type(use.geometry) for use in uses}
    # Overlapping parts would have to be added up element by element.
    if len({None if use.part is None else use.part[:2] for use in uses}) > 1:
        return None
    if kinds == {Convolution}:
        geometries = {(use.geometry.weight_shape, use.geometry.groups, use.geometry.transposed) for use in uses}  # type: ignore[union-attr]
        operands = {_layout(use.operand(weight)) for use in uses}
        return list(uses) if len(geometries) == len(operands) == 1 else None
    if not kinds <= {Product, Lookup} or (Lookup in kinds and any(use.part is not None for use in uses)):
        return None
    reference: dict[Part | None, tuple[Any, ...]] = {None: _layout(weight)} if Lookup in kinds else {}
    aligned = []
    for use in uses:
        if isinstance(use.geometry, Product):
            operand = use.operand(weight)
            target = reference.setdefault(use.part, _layout(operand))
            if _layout(operand) != target:
                if _layout(operand.mT) != target:
                    return None
                use = replace(use, geometry=replace(use.geometry, flip=True))
        aligned.append(use)
    return aligned


def _layout(matrix: Tensor) -> tuple[Any, ...]:
    """Where the elements of a matrix, or of several, lie in memory."""
    matrix = matrix if matrix.ndim > 2 else matrix[None]
    strides = matrix.stride() if matrix.ndim > 3 else matrix.stride()[1:]
    return tuple(matrix.shape), strides, matrix.data_ptr()


def _then(view: View, reorder: Callable[[Any, Tensor], Tensor], node: Node) -> View:
    return lambda w: reorder(node, view(w))


def _kind(node: Node) -> str:
    """What a node of the graph computed: "Convolution", "Mm", ..., without the number of the overload."""
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def _output_shape(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _signed(number: int) -> int:
    """A number that torch may show without its sign."""
    return number - 2**64 if number >= 2**63 else number
