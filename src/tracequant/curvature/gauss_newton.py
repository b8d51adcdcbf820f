"""Gauss-Newton traces of all layers and activations from one forward and a few backward passes.

With the outputs z = f(x), the Gauss-Newton block of layer i is G_ii = E_n[J_iᵀ H_L J_i], J_i the Jacobian of the
outputs with respect to the layer and H_L the Hessian of the loss with respect to the outputs. Where the network is
piecewise linear in every single layer's weights and activations (ReLU, pooling, BatchNorm in evaluation mode, residual
sums), the second derivative of the outputs with respect to one layer vanishes almost everywhere, and **G_ii is the
Hessian block itself**.

Its trace needs no second derivative of the network: with H_L = L S Lᵀ (`output_hessian`) and random signs v,

    Tr(G_ii) = E_n E_v ‖J_iᵀ L v‖²,

the squared norm, for each sample, of an ordinary gradient (`gradient_norms`). One backward pass of L v serves all
layers and all activations, and no block beside the diagonal adds noise. Labels enter only where H_L depends on them,
which for cross-entropy it does not.

Not y drawn from p instead of v: on a well-trained network the rare draws of an unlikely class double the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tracequant.curvature import gradient_norms
from tracequant.curvature.hutchinson import reading_variables, require_grad
from tracequant.curvature.output_hessian import Cotangents, OutputHessian, factor
from tracequant.curvature.result import Curvature, TraceEstimate
from tracequant.errors import ModelError
from tracequant.layers import idle_layers, replace_inputs
from tracequant.model_state import frozen_evaluation
from tracequant.points import Layer, QuantizationPoints
from tracequant.progress import track
from tracequant.task import Batch, Batches, Task, checked, forward, model_device

DEFAULT_DRAWS = 2
# Relative difference that rounding in float32 may leave between two ways to one gradient.
CHECK_TOLERANCE = 1e-3

# Layer name → (input, edge of the output, whether nothing before the call can be differentiated) of each call.
_Calls = dict[str, list[tuple[Tensor, GradientEdge, bool]]]
# Squared norms of one pass: layer or activation name → one value for each sample.
Squares = dict[str, Tensor]


def gauss_newton(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    draws: int | Literal["exact"] | None = None,
    seed: int = 0,
    weights: bool = True,
    activations: bool = True,
    progress: bool = False,
) -> Curvature:
    """Gauss-Newton traces over all samples of `batches`, with `draws` random vectors v for each (2 if None).

    "exact" sums over all columns of H_L's factor instead, one backward pass for each output element: no error but
    that of the samples. Layers of other kinds than Conv, ConvTranspose, Linear and Embedding, or whose weight is also
    used outside their module's call, get a backward pass for each sample; the result's `reason` names them.

    Raises `ModelError` naming layers that the loss does not depend on, and where samples cannot be told apart.
    """
    draws = DEFAULT_DRAWS if draws is None else draws
    generator = torch.Generator(model_device(model)).manual_seed(seed)
    passes: dict[str, list[Tensor]] = {}
    numel = {layer.name: float(layer.numel) for layer in points.layers}
    activation_numel = {point.name: 0.0 for point in points.activations}
    slow: list[str] | None = None
    kind, samples = "", 0
    with frozen_evaluation(model):
        parameters = require_grad(model, points)
        for batch in track(checked(batches, task, model), "Gauss-Newton", progress):
            # In a function of its own, so that a batch's graph is gone before the next one is built.
            found, seen, kind, slow = _measure_batch(
                model, batch, task, points, parameters, weights, activations, draws, generator, slow
            )
            for name, values in found.items():
                passes.setdefault(name, []).append(values)
            for name, count in seen.items():
                activation_numel[name] += count
            samples += task.batch_size(batch)

    def estimates(family: str, sizes: dict[str, float]) -> dict[str, TraceEstimate]:
        return {
            name: _estimate(torch.cat(passes[f"{family}:{name}"], 1), sizes[name], draws)
            for name in sizes
            if f"{family}:{name}" in passes and sizes[name]
        }

    return Curvature(
        points=points,
        weights=estimates("weights", numel),
        activations=estimates("activations", {name: n / max(samples, 1) for name, n in activation_numel.items()}),
        method="gauss_newton",
        reason=_describe(draws, kind, slow or []),
        seed=seed,
        samples=samples,
        weight_values={
            layer.name: tuple(torch.cat(passes[f"weights:{layer.name}"], 1).mean(0).tolist())
            for layer in points.layers
            if weights
        },
    )


def _measure_batch(
    model: nn.Module,
    batch: Batch,
    task: Task,
    points: QuantizationPoints,
    parameters: dict[str, Tensor],
    weights: bool,
    activations: bool,
    draws: int | Literal["exact"],
    generator: torch.Generator,
    slow: list[str] | None,
) -> tuple[Squares, dict[str, int], str, list[str]]:
    """One batch: values `[draws, samples]` by name, elements of activations, kind of H_L, and the slow layers.

    `slow` is None for the first batch, which is checked.
    """
    size = task.batch_size(batch)
    sweep = _Sweep(model, points if activations else replace(points, activations=()), parameters, size)
    with sweep.recording() as variables:
        outputs, _ = forward(task, model, batch)
    hessian = factor(task, outputs, batch, generator)
    sweep.measure_weights = weights
    if slow is None:
        slow = sweep.check(hessian)
        if not weights:
            slow = []
    sweep.set_slow(slow)
    rows = _passes(sweep, hessian, draws, generator)
    if missing := [name for name in parameters if weights and f"weights:{name}" not in rows]:
        raise idle_layers(missing)
    nothing = torch.zeros_like(next(iter(rows.values())))
    names = (*(f"weights:{n}" for n in parameters if weights), *(f"activations:{n}" for n in variables))
    # ‖J_nᵀ L v‖² carries the batch mean's 1/size; a sample's own value is size times that. A tensor that this batch
    # never reached counts as zero.
    values = {name: rows.get(name, nothing) * size for name in names}
    return values, {n: sum(t.numel() for t in tensors) for n, tensors in variables.items()}, hessian.kind, slow


class _Sweep:
    """One batch's graph: which layer calls and activation variables it has, and backward passes over it."""

    def __init__(
        self, model: nn.Module, points: QuantizationPoints, parameters: dict[str, Tensor], samples: int
    ) -> None:
        self._model, self._points, self._parameters, self._samples = model, points, parameters, samples
        self._calls: _Calls = {}
        self._variables: dict[str, list[Tensor]] = {}
        self.outputs: list[Tensor] = []
        self.slow: list[Layer] = []
        self.measure_weights = True

    def set_slow(self, names: list[str]) -> None:
        """Layers that get a pass for each sample: `names`, and those whose rows this batch does not tell apart."""
        irregular = {name for name in self._calls if not self._regular(name)} if self.measure_weights else set()
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
                gradients[name][position] = gradient
                # A layer's only call is worked off at once, so that its gradient need not be kept.
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
            for position, (_, edge, source) in enumerate(calls):
                received = on_call(name, position)
                if source:
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
                raise ModelError("no layer reads an input of the model; nothing can be differentiated")
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

    def check(self, loss_hessian: OutputHessian) -> list[str]:
        """Names of layers whose calls do not explain their whole gradient; `ModelError` where samples interact.

        Two backward passes: one gives every weight's gradient, to compare with the sum that the calls give; in the
        other only the first sample has a cotangent, and no other sample may then receive anything.
        """
        self.outputs = loss_hessian.tensors
        vectors, _ = next(iter(loss_hessian.draw(torch.Generator(loss_hessian.tensors[0].device).manual_seed(0))))
        total = torch.autograd.grad(
            self.outputs, list(self._parameters.values()), vectors, retain_graph=True, allow_unused=True
        )
        calls = self._collect(vectors)
        slow = []
        for (name, parameter), gradient in zip(self._parameters.items(), total, strict=True):
            if gradient is None:
                continue
            explained = calls.get(name)
            if explained is None or not self._regular(name):
                slow.append(name)
                continue
            module = self._model.get_submodule(self._site(name))
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            difference = gradient_norms.total_gradient(module, explained, self._samples).view_as(parameter) - gradient
            if float(difference.norm()) > CHECK_TOLERANCE * float(gradient.norm()):
                slow.append(name)
        self.set_slow(slow)
        if self._samples > 1:
            self._check_samples(vectors)
        return slow

    def _check_samples(self, vectors: list[Tensor]) -> None:
        if any(len(vector) != self._samples for vector in vectors):
            raise ModelError(
                f"outputs of shape {[list(v.shape) for v in vectors]} do not have the batch's {self._samples} samples"
                " along their first axis, so that samples cannot be told apart; use batches of one sample"
            )
        first = [torch.zeros_like(vector) for vector in vectors]
        for masked, vector in zip(first, vectors, strict=True):
            masked[0] = vector[0]
        for key, values in self.run((first, 1.0), keep=True, each_sample=False).items():
            if float(values[1:].sum()) > CHECK_TOLERANCE**2 * float(values.sum()):
                name = key.split(":", 1)[1]
                raise ModelError(
                    f"at layer {name} samples of a batch interact, or do not lie along the first axis; use batches of"
                    " one sample, or method='hutchinson'"
                )

    def _collect(self, vectors: list[Tensor]) -> dict[str, list[gradient_norms.Call]]:
        """(input, output gradient) of all calls of every layer."""
        edges = [(name, a, edge) for name, calls in self._calls.items() for a, edge, _ in calls]
        if not edges:
            return {}
        found = torch.autograd.grad(
            self.outputs, [edge for _, _, edge in edges], vectors, retain_graph=True, allow_unused=True
        )
        collected: dict[str, list[gradient_norms.Call]] = {}
        for (name, a, _), d in zip(edges, found, strict=True):
            if d is not None:
                collected.setdefault(name, []).append((a, d))
        return collected

    def _regular(self, name: str) -> bool:
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
        return all(len(a) % self._samples == 0 for a, _, _ in self._calls[name])

    def _site(self, name: str) -> str:
        return self._points.by_name[name].sites[0][0]

    def _weight_squares(self, name: str, gradients: list[Tensor | None]) -> Tensor:
        calls = [(a, d) for (a, _, _), d in zip(self._calls[name], gradients, strict=True) if d is not None]
        return gradient_norms.squared_norms(self._model.get_submodule(self._site(name)), calls, self._samples)

    def _activation_squares(self, name: str, gradient: Tensor) -> Tensor:
        if len(gradient) % self._samples:
            raise ModelError(
                f"the input of layer {name} has {len(gradient)} rows for {self._samples} samples; use batches of one"
                " sample"
            )
        return gradient.reshape(self._samples, -1).double().square().sum(1)

    def _slow_squares(self, name: str, vectors: list[Tensor], keep: bool) -> Tensor:
        """‖G_n‖² by one backward pass for each sample."""
        squares = []
        for n in range(self._samples):
            own = [torch.zeros_like(vector) for vector in vectors]
            for masked, vector in zip(own, vectors, strict=True):
                masked[n if self._samples > 1 else slice(None)] = vector[n if self._samples > 1 else slice(None)]
            last = n == self._samples - 1
            (gradient,) = torch.autograd.grad(
                self.outputs, [self._parameters[name]], own, retain_graph=keep or not last
            )
            squares.append((gradient.to_dense() if gradient.is_sparse else gradient).double().square().sum())
        return torch.stack(squares)


def _passes(
    sweep: _Sweep, loss_hessian: OutputHessian, draws: int | Literal["exact"], generator: torch.Generator
) -> Squares:
    """Name → values `[draws, samples]` (one row, the sum over all columns, for "exact")."""
    sweep.outputs = loss_hessian.tensors

    def plan() -> Iterator[tuple[int, Cotangents]]:
        if draws == "exact":
            yield from ((0, column) for column in loss_hessian.columns())
        else:
            for draw in range(draws):
                yield from ((draw, vector) for vector in loss_hessian.draw(generator))

    rows: dict[str, list[Tensor]] = {}
    count = 1 if draws == "exact" else draws
    upcoming = plan()
    current = next(upcoming, None)
    while current is not None:
        following = next(upcoming, None)
        draw, cotangents = current
        for name, values in sweep.run(cotangents, keep=following is not None).items():
            own = rows.setdefault(name, [torch.zeros_like(values) for _ in range(count)])
            own[draw] = own[draw] + values
        current = following
    return {name: torch.stack(values).cpu() for name, values in rows.items()}


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
            # The edge, not the tensor: an in-place activation may overwrite the output afterwards.
            calls.setdefault(name, []).append((read[0].detach(), get_gradient_edge(output), not read[0].requires_grad))

    return hook


def _prehook(receive: Callable[[Tensor], None], position: int) -> Callable[[tuple[Tensor | None, ...]], None]:
    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[position]
        if gradient is not None:
            receive(gradient)

    return hook


def _estimate(values: Tensor, numel: float, draws: int | Literal["exact"]) -> TraceEstimate:
    """The estimate from each sample's values `[draws, samples]`."""
    count, samples = values.shape
    means = values.mean(0)
    trace = float(means.mean())
    probe_error, spread = math.inf, math.inf
    if draws == "exact":
        probe_error = 0.0
    elif count > 1:
        probe_error = float(values.var(0).sum().div(count).sqrt()) / samples
    if samples > 1:
        spread = float(means.std()) / math.sqrt(samples)
    return TraceEstimate(trace, trace / numel, probe_error, spread, numel, 0 if draws == "exact" else count, samples)


def _describe(draws: int | Literal["exact"], kind: str, slow: list[str]) -> str:
    text = "exact sum over outputs" if draws == "exact" else f"{draws} draw{'s' if draws != 1 else ''} for each sample"
    text += f", {kind} output Hessian"
    if slow:
        text += f"; a backward pass for each sample for {', '.join(slow)}"
    return text
