"""Backward passes over one batch's graph: squared gradient norms of every layer for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tracequant.core.errors import GaussNewtonError
from tracequant.core.points import Layer, QuantizationPoints
from tracequant.curvature import gradient_norms
from tracequant.curvature.output_hessian import Cotangents
from tracequant.curvature.products import reading_variables
from tracequant.model.hooks import idle_layers, replace_inputs

# Relative difference that rounding in float32 may leave between two ways to one gradient.
CHECK_TOLERANCE = 1e-3
# Units of rounding, of the sum of the terms' sizes, that a difference between the two may be.
CHECK_ROUNDING = 64

# Squared norms of one pass: layer or activation name → one value for each sample.
Squares = dict[str, Tensor]


class _Call(NamedTuple):
    """One call of a layer: what it read, where the gradient of its output passes in the graph, the output's shape.

    `source` says that nothing before the call can be differentiated.
    """

    read: Tensor
    edge: GradientEdge
    shape: torch.Size
    source: bool


# Layer name → its calls, in their order.
_Calls = dict[str, list[_Call]]


class Sweep:
    """One batch's graph: which layer calls and activation variables it has, and backward passes over it."""

    def __init__(
        self,
        model: nn.Module,
        points: QuantizationPoints,
        parameters: dict[str, Tensor],
        samples: int,
        offset: int,
        size: int,
    ) -> None:
        self._model, self._points, self._parameters = model, points, parameters
        # Rows of the outputs that have a graph: `samples` of `size`, from `offset` on.
        self.samples, self._offset, self._size = samples, offset, size
        self._calls: _Calls = {}
        self._variables: dict[str, list[Tensor]] = {}
        self.outputs: list[Tensor] = []
        self.slow: list[Layer] = []
        self.measure_weights = True

    def set_slow(self, names: list[str]) -> None:
        """Give the layers `names`, and those whose rows belong to no single sample here, a pass for each sample."""
        irregular = {name for name in self._calls if not self.regular(name)} if self.measure_weights else set()
        self.slow = [layer for layer in self._points.layers if layer.name in irregular or layer.name in names]

    def recording(self) -> Any:
        """A context for the forward pass; yields the activation variables by point."""
        return _recording(self._model, self._points, self._calls, self._variables)

    def run(self, cotangents: Cotangents, keep: bool, each_sample: bool = True) -> Squares:
        """Squared norms of one backward pass, "weights:layer" and "activations:point" → `[samples]`.

        `keep` the graph for further passes. `each_sample` adds the slow layers, by passes of their own.
        """
        slow = self.slow if each_sample else []
        vectors, sign = cotangents
        squares: Squares = {}
        gradients: dict[str, list[Tensor | None]] = {name: [None] * len(calls) for name, calls in self._calls.items()}
        inputs: list[Any] = []  # tensors and edges, which autograd.grad takes mixed
        receive: list[Callable[[Tensor], None]] = []
        handles = []

        def add(key: str, values: Tensor) -> None:
            squares[key] = squares.get(key, 0) + sign * values

        def on_call(name: str, position: int) -> Callable[[Tensor], None]:
            def received(gradient: Tensor) -> None:
                gradient = gradient.reshape(self._calls[name][position].shape)
                gradients[name][position] = gradient
                # A layer's only call is used at once, so that its gradient need not be kept.
                if len(gradients[name]) == 1:
                    add(f"weights:{name}", self._weight_squares(name, [gradient]))
                    gradients[name] = []

            return received

        def on_variable(name: str) -> Callable[[Tensor], None]:
            return lambda gradient: add(f"activations:{name}", self._activation_squares(name, gradient))

        irregular = {layer.name for layer in self.slow}
        for name in irregular:
            # The pass must go through these weights too, to meet layers that only they connect to the input.
            inputs.append(self._parameters[name])
            receive.append(lambda gradient: None)
        for name, calls in self._calls.items():
            measured = self.measure_weights and name not in irregular
            for position, call in enumerate(calls):
                received, edge = on_call(name, position), call.edge
                if call.source:
                    # Also where its gradient is not wanted: a pass must reach the input to meet all layers.
                    inputs.append(edge)
                    receive.append(received if measured else lambda gradient: None)
                elif measured:
                    handles.append(edge.node.register_prehook(_prehook(received, edge.output_nr)))
        for name, tensors in self._variables.items():
            for tensor in tensors:
                if tensor.is_leaf:
                    inputs.append(tensor)
                    receive.append(on_variable(name))
                else:
                    handles.append(tensor.register_hook(on_variable(name)))  # type: ignore[no-untyped-call]
        try:
            if not inputs:
                raise GaussNewtonError("no layer reads an input of the model; nothing can be differentiated")
            outputs = self.outputs
            found = torch.autograd.grad(outputs, inputs, vectors, retain_graph=keep or bool(slow), allow_unused=True)
            for function, gradient in zip(receive, found, strict=True):
                if gradient is not None:
                    function(gradient)
        finally:
            for handle in handles:
                handle.remove()
        for name, own in gradients.items():
            if own and any(gradient is not None for gradient in own):
                add(f"weights:{name}", self._weight_squares(name, own))
        for number, layer in enumerate(slow):
            last = number == len(slow) - 1
            add(f"weights:{layer.name}", self._slow_squares(layer.name, vectors, keep or not last))
        return squares

    def check(self, outputs: list[Tensor], all_layers: bool = False) -> list[str]:
        """Names of layers whose calls do not explain their whole gradient; `ModelError` where samples interact.

        Two backward passes: one gives every weight's gradient, to compare with the sum that the calls give; in the
        other only the first sample has a cotangent, and no other sample may then receive anything. `all_layers` raises
        `ModelError` too if a layer was not reached.
        """
        self.outputs = outputs
        device = outputs[0].device
        random = torch.Generator(device).manual_seed(0)
        vectors = [torch.randn(z.shape, generator=random, dtype=z.dtype, device=device) for z in outputs]
        total = torch.autograd.grad(
            outputs, list(self._parameters.values()), vectors, retain_graph=True, allow_unused=True
        )
        calls = self.collect(vectors)
        slow = []
        for (name, parameter), gradient in zip(self._parameters.items(), total, strict=True):
            if gradient is None:
                if all_layers:
                    raise idle_layers([name])
                continue
            explained = calls.get(name)
            if explained is None or not self.regular(name):
                slow.append(name)
                continue
            module = self.module(name)
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            difference = gradient_norms.total_gradient(module, explained, self.samples).view_as(parameter) - gradient
            size = float(difference.norm())
            if size > CHECK_TOLERANCE * float(gradient.norm()) and size > _rounding(module, explained, self.samples):
                slow.append(name)
        self.set_slow(slow)
        if self.samples > 1:
            self._check_samples(vectors)
        return slow

    def _check_samples(self, vectors: list[Tensor]) -> None:
        if any(vector.ndim == 0 or len(vector) != self._size for vector in vectors):
            raise GaussNewtonError(
                f"outputs of shape {[list(v.shape) for v in vectors]} do not have the batch's {self._size} samples"
                " along their first axis, so that samples cannot be told apart; use batches of one sample"
            )
        first = [torch.zeros_like(vector) for vector in vectors]
        for masked, vector in zip(first, vectors, strict=True):
            masked[self._offset] = vector[self._offset]
        for key, values in self.run((first, 1.0), keep=True, each_sample=False).items():
            if float(values[1:].sum()) > CHECK_TOLERANCE**2 * float(values.sum()):
                name = key.split(":", 1)[1]
                raise GaussNewtonError(
                    f"at layer {name} samples of a batch interact, or do not lie along the first axis; use batches of"
                    " one sample, or estimator='hutchinson'"
                )

    def collect(self, vectors: list[Tensor]) -> dict[str, list[gradient_norms.Call]]:
        """(input, output gradient) of all calls of every layer."""
        return self.collect_with(vectors, [])[0]

    def collect_with(
        self, vectors: list[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[dict[str, list[gradient_norms.Call]], list[Tensor | None]]:
        """The same, and the gradients of `tensors`, from one pass."""
        named = [(name, call) for name, calls in self._calls.items() for call in calls]
        inputs: list[Any] = [*(call.edge for _, call in named), *tensors]
        if not inputs:
            return {}, []
        found = torch.autograd.grad(self.outputs, inputs, vectors, retain_graph=True, allow_unused=True)
        collected: dict[str, list[gradient_norms.Call]] = {}
        for (name, call), d in zip(named, found, strict=False):
            if d is not None:
                collected.setdefault(name, []).append((call.read, d.reshape(call.shape)))
        return collected, list(found[len(named) :])

    def by_sample(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of an activation point, or its gradient, as `[samples, elements]`."""
        if len(tensor) % self.samples:
            raise GaussNewtonError(
                f"the input of layer {name} has {len(tensor)} rows for {self.samples} samples; use batches of one"
                " sample"
            )
        return tensor.reshape(self.samples, -1)

    def regular(self, name: str) -> bool:
        """Whether rows of every call belong to samples, and all sites of the weight are of one supported kind."""
        layer = self._points.by_name[name]
        modules = [self._model.get_submodule(site[0]) for site in layer.sites]
        if not all(
            gradient_norms.supported(module) and site[1] == "weight"
            for module, site in zip(modules, layer.sites, strict=True)
        ):
            return False
        if len(modules) > 1 and not all(isinstance(module, nn.Linear) for module in modules):
            return False
        # An unbatched input has one axis less.
        axes = _least_axes(modules[0])
        return all(len(call.read) % self.samples == 0 and call.read.ndim >= axes for call in self._calls[name])

    def module(self, name: str) -> nn.Module:
        """The module that holds a layer's weight, the first of them where it is tied."""
        return self._model.get_submodule(self._points.by_name[name].sites[0][0])

    def _weight_squares(self, name: str, gradients: list[Tensor | None]) -> Tensor:
        calls = [(call.read, d) for call, d in zip(self._calls[name], gradients, strict=True) if d is not None]
        return gradient_norms.squared_norms(self.module(name), calls, self.samples)

    def _activation_squares(self, name: str, gradient: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.by_sample(name, gradient), dim=1)
        return norms.double().square()

    def _slow_squares(self, name: str, vectors: list[Tensor], keep: bool) -> Tensor:
        return torch.stack([g.double().square().sum() for g in self.slow_gradients(name, vectors, keep)])

    def slow_gradients(self, name: str, vectors: list[Tensor], keep: bool) -> Iterator[Tensor]:
        """Each sample's own gradient of a layer's weight, by a backward pass for each."""
        for n in range(self.samples):
            own = [torch.zeros_like(vector) for vector in vectors]
            for masked, vector in zip(own, vectors, strict=True):
                row = self._offset + n if self._size > 1 else slice(None)
                masked[row] = vector[row]
            last = n == self.samples - 1
            (gradient,) = torch.autograd.grad(
                self.outputs, [self._parameters[name]], own, retain_graph=keep or not last
            )
            yield gradient.to_dense() if gradient.is_sparse else gradient


def _rounding(module: nn.Module, calls: list[gradient_norms.Call], samples: int) -> float:
    """How far rounding alone may take two sums of a layer's calls apart.

    It goes by the size of the terms: where they cancel, nothing but rounding may be left of their sum.
    """
    sizes = [(a.abs(), d.abs()) for a, d in calls]
    terms = gradient_norms.total_gradient(module, sizes, samples)
    return CHECK_ROUNDING * torch.finfo(terms.dtype).eps * float(terms.norm())


def _least_axes(module: nn.Module) -> int:
    """The least number of axes of an input that has samples along the first."""
    kernel = getattr(module, "kernel_size", None)
    return 1 if kernel is None else len(kernel) + 2


@contextmanager
def _recording(
    model: nn.Module, points: QuantizationPoints, calls: _Calls, variables: dict[str, list[Tensor]]
) -> Iterator[dict[str, list[Tensor]]]:
    """Record every layer call, and the activation variables by point, during a forward pass."""
    with ExitStack() as stack:
        for layer in points.layers:
            for module_name, _ in layer.sites:
                module = model.get_submodule(module_name)
                if gradient_norms.supported(module):
                    handle = module.register_forward_hook(_on_forward(layer.name, calls), with_kwargs=True)
                    stack.callback(handle.remove)
        variables.update(stack.enter_context(reading_variables(model, points)))
        yield variables


def _on_forward(name: str, calls: _Calls) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(module, nn.Embedding):
            read = [args[0] if args else kwargs["input"]]
        else:
            read = []
            replace_inputs(module, args, kwargs, lambda tensor: read.append(tensor))
        if read and isinstance(output, Tensor) and output.requires_grad:
            call = _Call(read[0].detach(), _edge(output), output.shape, not read[0].requires_grad)
            calls.setdefault(name, []).append(call)

    return hook


def _edge(output: Tensor) -> GradientEdge:
    """Where an output's gradient passes, elements in their order: not the tensor, which may be overwritten in place.

    A linear layer's output over positions is a view of a matrix. Overwriting a view gives it another place in the
    graph, and the one that it had before is never reached; the place of the matrix stays.
    """
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return get_gradient_edge(output)
    return get_gradient_edge(base if base.is_contiguous() and output.is_contiguous() else output)


def _prehook(receive: Callable[[Tensor], None], position: int) -> Callable[[tuple[Tensor | None, ...]], None]:
    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[position]
        if gradient is not None:
            receive(gradient)

    return hook
