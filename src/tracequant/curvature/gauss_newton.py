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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tracequant.curvature import gradient_norms
from tracequant.curvature.batch_loop import Stop, collect
from tracequant.curvature.output_hessian import GROUP, Cotangents, Factored, differentiable, factor
from tracequant.curvature.parts import Part, exceeded, together, warn_of_error
from tracequant.curvature.pieces import Piece, Precision
from tracequant.curvature.products import generator, reading_variables, require_grad
from tracequant.curvature.result import Curvature, TraceEstimate
from tracequant.errors import GaussNewtonError
from tracequant.layers import idle_layers, replace_inputs
from tracequant.points import Layer, QuantizationPoints
from tracequant.task import Batches, Task, model_device

DEFAULT_DRAWS = 2
# Relative difference that rounding in float32 may leave between two ways to one gradient.
CHECK_TOLERANCE = 1e-3
# Samples that serve to check what the model's graph is like.
CHECK_SAMPLES = 4
# Fewer samples do not tell their own spread, by which `relative_error` stops.
LEAST_SAMPLES = 32

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
    relative_error: float | None = None,
    checkpoint: str | Path | None = None,
    stop: Stop | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> Curvature:
    """Gauss-Newton traces over all samples of `batches`, with `draws` random vectors v for each (2 if None).

    "exact" sums over all columns of H_L's factor instead, one backward pass for each output element: no error but
    that of the samples. Layers of other kinds than Conv, ConvTranspose, Linear and Embedding, or whose weight is also
    used outside their module's call, get a backward pass for each sample; the result's `reason` names them.

    With `relative_error` no more batches are taken once the `sampling_error` of every trace is below that share of it.
    `checkpoint`, `stop` and `precision` are those of `collect`.

    Raises `ModelError` naming layers that the loss does not depend on, and where samples cannot be told apart.
    """
    estimator = _GaussNewton(model, task, points, DEFAULT_DRAWS if draws is None else draws, seed, weights, activations)

    def content(curvature: Curvature) -> bool:
        certain = (
            relative_error is not None
            and curvature.samples >= LEAST_SAMPLES
            and not exceeded(curvature, "sampling_error", relative_error)
        )
        return certain or (stop is not None and stop(curvature))

    own_stop = None if relative_error is None and stop is None else content
    result = collect(estimator, model, batches, task, checkpoint, own_stop, precision, progress)
    if relative_error is not None:
        warn_of_error(result, "sampling_error", relative_error, "give more samples")
    return result


class Passes:
    """One forward pass over a piece, checked and factored, and the cotangents to send back through it."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        points: QuantizationPoints,
        draws: int | Literal["exact"],
        seed: int,
        activations: bool,
    ) -> None:
        self._model, self._task, self._seed = model, task, seed
        self._points, self._activations = points, activations
        self._exact = draws == "exact"
        self.draws = 1 if draws == "exact" else draws
        # What `_check` finds on the first batch.
        self._slow: list[str] | None = None
        self._told_apart = False

    def prepare(self) -> None:
        """Let the layers' weights, and nothing else, require gradients."""
        self._parameters = require_grad(self._model, self._points)

    def open(self, piece: Piece, weights: bool = True) -> tuple[Sweep, Factored, Tensor, dict[str, list[Tensor]]]:
        """The piece's graph, the factored Hessian of its outputs, its loss and the activation variables by point."""
        if self._slow is None or (piece.samples > 1 and not self._told_apart):
            self._slow = self._check(piece)
            self._told_apart = piece.samples > 1
        sweep = self._sweep(piece.samples, piece.start, piece.size)
        with sweep.recording() as variables:
            outputs, loss = piece.forward(self._model, self._task)
        device = model_device(self._model)
        hessian = factor(self._task, outputs, piece.batch, generator(self._seed, piece.index, 0, device=device))
        sweep.outputs = hessian.tensors
        sweep.measure_weights = weights
        sweep.set_slow(self._slow)
        return sweep, hessian, loss, variables

    def cotangents(self, hessian: Factored, index: int, draws: Sequence[int]) -> Iterator[tuple[int, Cotangents]]:
        """Position in `draws` and cotangents of every backward pass; position 0 for all columns of the exact sum."""
        if self._exact:
            yield from ((0, column) for column in hessian.columns())
            return
        for row, draw in enumerate(draws):
            random = generator(self._seed, index, 1 + draw // GROUP, device=model_device(self._model))
            yield from ((row, vector) for vector in hessian.draw(random, draw))

    def notes(self, sweep: Sweep, hessian: Factored) -> tuple[str, ...]:
        """What the result should say of a batch: the shape of H_L, and layers that took a pass for each sample."""
        slow = ", ".join(layer.name for layer in sweep.slow)
        return (f"{hessian.kind} output Hessian", *([f"a backward pass for each sample for {slow}"] if slow else []))

    def _sweep(self, samples: int, offset: int, size: int) -> Sweep:
        points = self._points if self._activations else replace(self._points, activations=())
        return Sweep(self._model, points, self._parameters, samples, offset, size)

    def _check(self, piece: Piece) -> list[str]:
        """Names of layers that need a pass for each sample; `ModelError` where samples interact.

        A few samples tell that as well as all of them do, unless they miss a layer, or seem to interact.
        """
        piece = replace(piece, precision="float32")  # lest rounding be taken for a difference
        if piece.whole and piece.size > CHECK_SAMPLES:
            with suppress(Exception):  # a batch or a model that knows one size only
                few = self._task.select(piece.batch, 0, CHECK_SAMPLES)
                sweep = self._sweep(CHECK_SAMPLES, 0, CHECK_SAMPLES)
                with sweep.recording():
                    outputs = self._task.outputs(self._model, few)
                return sweep.check(differentiable(outputs), all_layers=True)
        sweep = self._sweep(piece.samples, piece.start, piece.size)
        with sweep.recording():
            outputs, _ = piece.forward(self._model, self._task)
        random = generator(self._seed, piece.index, 0, device=model_device(self._model))
        return sweep.check(factor(self._task, outputs, piece.batch, random).tensors)


class _GaussNewton(Passes):
    label = "Gauss-Newton"
    memory = 2.0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        points: QuantizationPoints,
        draws: int | Literal["exact"],
        seed: int,
        weights: bool,
        activations: bool,
    ) -> None:
        super().__init__(model, task, points, draws, seed, activations)
        self._weights = weights

    def settings(self) -> dict[str, Any]:
        return {
            "method": "gauss_newton",
            "draws": "exact" if self._exact else self.draws,
            "seed": self._seed,
            "families": [self._weights, self._activations],
            "model": self._points.fingerprint,
            "layers": [layer.name for layer in self._points.layers],
        }

    def measure(self, piece: Piece, draws: Sequence[int]) -> Part:
        """Squared gradient norms `[draws, samples]`, each sample's own value of ‖J_nᵀ L v‖²."""
        sweep, hessian, _, variables = self.open(piece, self._weights)
        rows = self._passes(sweep, hessian, piece.index, draws)
        if missing := [name for name in self._parameters if self._weights and f"weights:{name}" not in rows]:
            raise idle_layers(missing)
        nothing = torch.zeros_like(next(iter(rows.values())))
        names = (*(f"weights:{n}" for n in self._parameters if self._weights), *(f"activations:{n}" for n in variables))
        return Part(
            piece.samples,
            # ‖J_nᵀ L v‖² carries the batch mean's 1/size; a sample's own value is size times that. A tensor that this
            # batch never reached counts as zero.
            {name: rows.get(name, nothing) * piece.size for name in names},
            {name: sum(tensor.numel() for tensor in tensors) for name, tensors in variables.items()},
            self.notes(sweep, hessian),
        )

    def add(self, parts: Sequence[Part]) -> Part:
        """Pieces are further samples."""
        return together(parts, {name: torch.cat([part.values[name] for part in parts], 1) for name in parts[0].values})

    def summarize(self, parts: Sequence[Part]) -> Curvature:
        whole = self.add(parts)
        draws: int | Literal["exact"] = "exact" if self._exact else self.draws

        def estimates(family: str, sizes: dict[str, float]) -> dict[str, TraceEstimate]:
            return {
                name: _estimate(whole.values[f"{family}:{name}"], size, draws)
                for name, size in sizes.items()
                if f"{family}:{name}" in whole.values and size
            }

        numel = {layer.name: float(layer.numel) for layer in self._points.layers}
        text = "exact sum over outputs" if self._exact else f"{draws} draw{'s' if draws != 1 else ''} for each sample"
        return Curvature(
            points=self._points,
            weights=estimates("weights", numel),
            activations=estimates("activations", {name: n / whole.samples for name, n in whole.elements.items()}),
            method="gauss_newton",
            reason=", ".join((text, *whole.notes)),
            seed=self._seed,
            samples=whole.samples,
            weight_values=self._series(whole, "weights", 0),
            activation_values=self._series(whole, "activations", 0),
            weight_draws=self._series(whole, "weights", 1),
            activation_draws=self._series(whole, "activations", 1),
        )

    def _series(self, whole: Part, family: str, axis: int) -> dict[str, tuple[float, ...]]:
        """The mean over draws for each sample (`axis` 0), or over samples for each draw (1)."""
        return {
            key.split(":", 1)[1]: tuple(values.mean(axis).tolist())
            for key, values in whole.values.items()
            if key.startswith(family)
        }

    def _passes(self, sweep: Sweep, hessian: Factored, index: int, draws: Sequence[int]) -> Squares:
        """Name → values `[draws, samples]` (one row, the sum over all columns, for the exact sum)."""
        rows: dict[str, list[Tensor]] = {}
        upcoming = self.cotangents(hessian, index, draws)
        current = next(upcoming, None)
        while current is not None:
            following = next(upcoming, None)
            row, cotangents = current
            for name, values in sweep.run(cotangents, keep=following is not None).items():
                own = rows.setdefault(name, [torch.zeros_like(values) for _ in draws])
                own[row] = own[row] + values
            current = following
        return {name: torch.stack(values).cpu() for name, values in rows.items()}


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
        """Layers that get a pass for each sample: `names`, and those whose rows this batch does not tell apart."""
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
            if float(difference.norm()) > CHECK_TOLERANCE * float(gradient.norm()):
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
                    " one sample, or method='hutchinson'"
                )

    def collect(self, vectors: list[Tensor]) -> dict[str, list[gradient_norms.Call]]:
        """(input, output gradient) of all calls of every layer."""
        return self.collect_with(vectors, [])[0]

    def collect_with(
        self, vectors: list[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[dict[str, list[gradient_norms.Call]], list[Tensor | None]]:
        """The same, and the gradients of `tensors`, from one pass."""
        edges = [(name, a, edge) for name, calls in self._calls.items() for a, edge, _ in calls]
        inputs: list[Any] = [*(edge for _, _, edge in edges), *tensors]
        if not inputs:
            return {}, []
        found = torch.autograd.grad(self.outputs, inputs, vectors, retain_graph=True, allow_unused=True)
        collected: dict[str, list[gradient_norms.Call]] = {}
        for (name, a, _), d in zip(edges, found, strict=False):
            if d is not None:
                collected.setdefault(name, []).append((a, d))
        return collected, list(found[len(edges) :])

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
        return all(len(a) % self.samples == 0 and a.ndim >= axes for a, _, _ in self._calls[name])

    def module(self, name: str) -> nn.Module:
        """The module that holds a layer's weight, the first of them where it is tied."""
        return self._model.get_submodule(self._points.by_name[name].sites[0][0])

    def _weight_squares(self, name: str, gradients: list[Tensor | None]) -> Tensor:
        calls = [(a, d) for (a, _, _), d in zip(self._calls[name], gradients, strict=True) if d is not None]
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
