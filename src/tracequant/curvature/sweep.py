"""Backward passes over one batch's graph: each operation that reads a weight, and its output's gradient by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracequant.core.errors import GaussNewtonError
from tracequant.curvature.gradient_norms import Call
from tracequant.curvature.operations import Convolution, Graph, Lookup, Operation
from tracequant.curvature.sample_axis import Outer, by_sample, divisible, factors, find_outer, flat_rows

# What a pass hands on: a layer's calls, by the part of its weight that they read; an activation's gradient
# `[samples, elements]` and which of the point's tensors it belongs to.
OnLayer = Callable[[str, list[list[Call]]], None]
OnActivation = Callable[[str, int, Tensor], None]


class Rows(NamedTuple):
    """The rows of the outputs that have a graph: `samples` of `size`, from `offset` on."""

    samples: int
    offset: int
    size: int


@dataclass
class SampleAxes:
    """Where samples lie in what every operation and activation has, by name and number.

    `slow` are the layers whose gradient must be taken for each sample alone, since they have rows that belong to
    several samples or an operation that is not known. `certain` says that other batches of this structure have the same
    places.
    """

    operations: dict[tuple[str, int], Outer] = field(default_factory=dict)
    activations: dict[tuple[str, int], Outer] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)
    certain: bool = True


class Sweep:
    """One batch's graph: which operations and activation variables it has, and backward passes over it."""

    def __init__(
        self,
        outputs: list[Tensor],
        rows: Rows,
        weights: dict[str, Tensor],
        variables: dict[str, list[Tensor]],
    ) -> None:
        self.outputs, self.rows = outputs, rows
        self.weights, self.variables = weights, variables
        graph = Graph(outputs, rows.samples)
        self.operations, unknown = graph.find_operations(weights) if weights else ({}, [])
        self.axes = SampleAxes(slow=unknown, certain=not graph.depends_on_values)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What the places of samples depend on: the rows for each sample of every operation and activation."""
        samples = self.rows.samples
        operations = tuple(
            (name, *(divmod(_number_of_rows(operation), samples) for operation in found))
            for name, found in self.operations.items()
        )
        variables = tuple(
            (name, *((divmod(tensor.numel(), samples), tensor.ndim, tensor.shape[-1:]) for tensor in tensors))
            for name, tensors in self.variables.items()
        )
        return operations, variables

    def locate_samples(self) -> SampleAxes:
        """Where samples lie, by two backward passes, in the second of which every sample has a factor of its own."""
        if self.rows.samples == 1:
            return self.axes
        vectors = self._random_vectors()
        everything = self._gradients(vectors)
        if any(vector.ndim == 0 or len(vector) != self.rows.size for vector in vectors):
            raise GaussNewtonError(
                f"outputs of shape {[list(v.shape) for v in vectors]} do not have the batch's {self.rows.size} samples"
                " along their first axis, so that samples cannot be told apart; use batches of one sample"
            )

        def on_gradient(family: str, name: str, number: int, gradient: Tensor | None) -> None:
            key = (family, name, number)
            if key not in everything:
                return
            first = everything.pop(key)
            rows = self._rows(key, first)
            others = torch.zeros_like(rows) if gradient is None else self._rows(key, gradient)
            outer, certain = find_outer(rows, others, self.rows.samples)
            self.axes.certain &= certain
            if outer is not None:
                (self.axes.operations if family == "weights" else self.axes.activations)[name, number] = outer
            elif family == "weights":
                undivided.append(name)
            else:
                mixed.append(name)

        # Compared as they come, so that no second set of gradients is kept.
        undivided: list[str] = []
        mixed: list[str] = []
        self._pass(self._scaled(vectors), on_gradient)
        for key in list(everything):
            on_gradient(*key, None)
        if mixed:
            raise _unlocated(mixed[0])
        self.axes.slow.extend(undivided)
        return self.axes

    def set_axes(self, axes: SampleAxes) -> None:
        """Take places that were found in a graph of the same structure."""
        samples = self.rows.samples
        slow = {name for name, _ in axes.operations if self._undivided(name, axes)} if samples > 1 else set()
        self.axes = SampleAxes(axes.operations, axes.activations, [*dict.fromkeys([*axes.slow, *slow])])

    def _scaled(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Vectors of the outputs' shapes, each of the graph's samples times its factor."""
        rows = slice(self.rows.offset, self.rows.offset + self.rows.samples)
        scaled = [vector.clone() for vector in vectors]
        for vector in scaled:
            shape = (-1, *([1] * (vector.ndim - 1)))
            vector[rows] *= factors(self.rows.samples).to(vector.dtype).to(vector.device).view(shape)
        return scaled

    def run(
        self,
        vectors: Sequence[Tensor],
        *,
        keep: bool,
        on_layer: OnLayer | None,
        on_activation: OnActivation,
    ) -> dict[str, Tensor]:
        """One backward pass, `keep` the graph for further passes; the gradients of slow layers if there is one sample.

        Layers are handed on as soon as the gradients of all their operations are there, so that none need be kept.
        """
        slow = [name for name in self.weights if name in self.axes.slow]
        waiting = {name: len(found) for name, found in self.operations.items() if name not in slow}
        arrived: dict[str, list[tuple[Operation, int, Tensor]]] = {}

        def on_operation(name: str, number: int, gradient: Tensor) -> None:
            if on_layer is None or name not in waiting:
                return
            arrived.setdefault(name, []).append((self.operations[name][number], number, gradient))
            if len(arrived[name]) == waiting[name]:
                on_layer(name, self._calls(name, arrived.pop(name)))

        def on_variable(name: str, number: int, gradient: Tensor) -> None:
            on_activation(name, number, self.activation_rows(name, number, gradient))

        extra = [self.weights[name] for name in slow]
        gradients = self._backward(vectors, keep, on_operation, on_variable, extra)
        # Of operations that this pass never reached nothing more will come.
        for name, found in arrived.items():
            on_layer(name, self._calls(name, found))  # type: ignore[misc]
        return {name: g for name, g in zip(slow, gradients, strict=True) if g is not None}

    def activation_rows(self, name: str, number: int, tensor: Tensor) -> Tensor:
        """A tensor of an activation point, or its gradient, as `[samples, elements]`."""
        samples = self.rows.samples
        if samples == 1:
            return tensor.reshape(1, -1)
        rows, outer = flat_rows(tensor), self.axes.activations.get((name, number), 1)
        if not divisible(len(rows), samples, outer):
            raise _unlocated(name)
        return by_sample(rows, samples, outer).flatten(1)

    def _backward(
        self,
        vectors: Sequence[Tensor],
        keep: bool,
        on_operation: Callable[[str, int, Tensor], None],
        on_variable: Callable[[str, int, Tensor], None],
        extra: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """One pass that calls back with every gradient; returns those of `extra` tensors."""
        # What a pass must reach: tensors and edges, which autograd.grad takes mixed.
        targets: list[Any] = list(extra)
        receivers: list[Callable[[Tensor], None]] = []
        handles = []
        for name, operations in self.operations.items():
            for number, operation in enumerate(operations):
                receive = _bound(on_operation, name, number)
                if operation.source:
                    targets.append(operation.edge)
                    receivers.append(receive)
                else:
                    handles.append(operation.edge.node.register_prehook(_prehook(receive)))
        for name, tensors in self.variables.items():
            for number, tensor in enumerate(tensors):
                receive = _bound(on_variable, name, number)
                if tensor.is_leaf:
                    targets.append(tensor)
                    receivers.append(receive)
                else:
                    handles.append(tensor.register_hook(receive))  # type: ignore[no-untyped-call]
        try:
            if not targets:
                raise GaussNewtonError("no layer reads an input of the model; nothing can be differentiated")
            found = torch.autograd.grad(self.outputs, targets, vectors, retain_graph=keep, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for receive, gradient in zip(receivers, found[len(extra) :], strict=True):
            if gradient is not None:
                receive(gradient)
        return list(found[: len(extra)])

    def _gradients(self, vectors: Sequence[Tensor]) -> dict[tuple[str, str, int], Tensor]:
        """All gradients of one pass: ("weights", layer, operation) and ("activations", point, tensor)."""
        found: dict[tuple[str, str, int], Tensor] = {}
        self._pass(vectors, lambda family, name, number, gradient: found.__setitem__((family, name, number), gradient))
        return found

    def _pass(self, vectors: Sequence[Tensor], receive: Callable[[str, str, int, Tensor], None]) -> None:
        """One pass that keeps the graph and hands every gradient on, with its family, name and number."""
        slow = [weight for name, weight in self.weights.items() if name in self.axes.slow]
        on_operation, on_variable = partial(receive, "weights"), partial(receive, "activations")
        self._backward(vectors, True, on_operation, on_variable, slow)

    def _calls(self, name: str, arrived: Sequence[tuple[Operation, int, Tensor]]) -> list[list[Call]]:
        """A layer's calls with samples along the first axis, by the part of the weight that they read."""
        parts: dict[Any, list[Call]] = {}
        # In the order of the graph, whatever the order in which gradients came.
        for operation, number, gradient in sorted(arrived, key=lambda entry: entry[1]):
            outer = self.axes.operations.get((name, number), 1)
            parts.setdefault(operation.part, []).extend(_arranged(operation, gradient, self.rows.samples, outer))
        return list(parts.values())

    def _rows(self, key: tuple[str, str, int], gradient: Tensor) -> Tensor:
        """The gradient of an operation or activation as rows `[R, F]`, in which samples are looked for."""
        family, name, number = key
        if family == "activations":
            return flat_rows(gradient)
        geometry = self.operations[name][number].geometry
        if isinstance(geometry, Convolution):
            return gradient.flatten(1)
        if isinstance(geometry, Lookup):
            return gradient.flatten(0, -2)
        return _product_rows(self.operations[name][number], gradient).transpose(0, 1).flatten(1)

    def _undivided(self, name: str, axes: SampleAxes) -> bool:
        """Whether some operation of a layer has rows that cannot be those of this batch's samples."""
        return any(
            not divisible(_number_of_rows(operation), self.rows.samples, axes.operations.get((name, number), 1))
            for number, operation in enumerate(self.operations.get(name, []))
        )

    def _random_vectors(self) -> list[Tensor]:
        device = self.outputs[0].device
        random = torch.Generator(device).manual_seed(0)
        return [torch.randn(z.shape, generator=random, dtype=z.dtype, device=device) for z in self.outputs]


def mixed_samples(name: str) -> GaussNewtonError:
    """The error for samples that cannot be told apart inside the model."""
    return GaussNewtonError(
        f"at layer {name} samples of a batch interact, or lie along no axis of their own; use batches of one sample, or"
        " estimator='hutchinson'"
    )


def _unlocated(point: str) -> GaussNewtonError:
    """The error for an activation whose rows are not the batch's samples."""
    return GaussNewtonError(
        f"the input of layer {point} does not hold the batch's samples along an axis: it reads a constant, or one"
        " sample at a time in a loop, or samples of a batch interact; use batches of one sample, activations=False, or"
        " estimator='hutchinson'"
    )


def _arranged(operation: Operation, gradient: Tensor, samples: int, outer: Outer) -> list[Call]:
    """An operation's input and gradient with samples along the first axis; several calls for several rows each."""
    geometry, read = operation.geometry, operation.read
    if isinstance(geometry, Convolution):
        pairs = zip(
            by_sample(read, samples, outer).unbind(1), by_sample(gradient, samples, outer).unbind(1), strict=True
        )
        return [Call(geometry, a, d, operation.operand) for a, d in pairs]
    if isinstance(geometry, Lookup):
        rows = by_sample(gradient.flatten(0, -2), samples, outer)
        return [Call(geometry, by_sample(read.flatten(), samples, outer), rows, operation.operand)]

    def turned(x: Tensor) -> Tensor:
        """`[g, R, m]` as `[samples, g, m, T]`."""
        return by_sample(x.transpose(0, 1), samples, outer).permute(0, 2, 3, 1)

    return [Call(geometry, turned(read), turned(_product_rows(operation, gradient)), operation.operand)]


def _product_rows(operation: Operation, gradient: Tensor) -> Tensor:
    """The gradient of a product's output as `[g, R, o]`."""
    if gradient.ndim != 3 or len(gradient) != len(operation.read):
        gradient = gradient.flatten(0, -2)[None]
    first = operation.geometry.first  # type: ignore[union-attr]
    return gradient.mT if first else gradient


def _number_of_rows(operation: Operation) -> int:
    if isinstance(operation.geometry, Convolution):
        return len(operation.read)
    if isinstance(operation.geometry, Lookup):
        return operation.read.numel()
    return operation.read.shape[1]


def _bound(receive: Callable[[str, int, Tensor], None], name: str, number: int) -> Callable[[Tensor], None]:
    return lambda gradient: receive(name, number, gradient)


def _prehook(receive: Callable[[Tensor], None]) -> Callable[[tuple[Tensor | None, ...]], None]:
    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            receive(gradients[0])

    return hook
