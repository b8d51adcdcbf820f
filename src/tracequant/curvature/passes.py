"""One forward pass over a microbatch and the backward passes of its factored Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracequant.core.errors import GaussNewtonError
from tracequant.core.match import some_names
from tracequant.core.points import QuantizationPoints
from tracequant.curvature.microbatch import Microbatch
from tracequant.curvature.output_factors import GROUP, Cotangents
from tracequant.curvature.output_hessian import Factored, differentiable, factor
from tracequant.curvature.output_lanczos import SETTLED
from tracequant.curvature.products import generator, reading_variables, require_grad
from tracequant.curvature.sweep import Rows, SampleAxes, Sweep, mixed_samples
from tracequant.model.device import model_device
from tracequant.model.task import Task

# Samples that serve to find where samples lie inside the model.
CHECK_SAMPLES = 3
# Relative difference that rounding may leave between the outputs of a sample alone and in its batch.
ALONE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 0.2}


@dataclass(frozen=True)
class Opened:
    """A microbatch's graph: the factored Hessian of its outputs, its loss, the outputs' places among all outputs."""

    sweep: Sweep
    hessian: Factored
    loss: Tensor
    places: tuple[int, ...]


class Passes:
    """One forward pass over a microbatch, its factored Hessian, and the cotangents to send back through it."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        points: QuantizationPoints,
        *,
        num_probes: int | Literal["exact"],
        seed: int,
        activations: bool,
    ) -> None:
        self._model, self._task, self._seed = model, task, seed
        self._points, self._activations = points, activations
        self._read = points if activations else replace(points, activations=())
        self._exact = num_probes == "exact"
        self.num_probes = 1 if num_probes == "exact" else num_probes
        # Where samples lie inside the model, for every structure of its graph.
        self._axes: dict[Any, SampleAxes] = {}
        self._announced = False

    def prepare(self) -> None:
        """Let the layers' weights, and nothing else, require gradients."""
        self._parameters = require_grad(self._model, self._points)

    def open(self, microbatch: Microbatch, weights: bool = True) -> Opened:
        """A microbatch's graph, with the places of its samples inside the model."""
        if not self._axes and microbatch.samples > 1:
            # Before the graph of the batch, which takes the most memory, is there.
            self._of_few_samples(microbatch, weights)
        opened = self._forward(microbatch, weights)
        sweep = opened.sweep
        if microbatch.samples > 1:
            key = sweep.signature
            if sweep.axes.certain and key not in self._axes:
                self._of_few_samples(microbatch, weights)
            if sweep.axes.certain and key in self._axes:
                sweep.set_axes(self._axes[key])
            else:
                # Lower precision rounds by more than tells two samples apart.
                exact = replace(microbatch, precision="float32")
                same = microbatch.precision == "float32"
                axes = (sweep if same else self._forward(exact, weights).sweep).locate_samples()
                sweep.set_axes(axes)
                if axes.certain:
                    self._axes[key] = axes
            self._announce(sweep)
        return opened

    def cotangents(self, hessian: Factored, index: int, probes: Sequence[int]) -> Iterator[tuple[int, Cotangents]]:
        """Position in `probes` and cotangents of every backward pass; position 0 for all columns of the exact sum."""
        if self._exact:
            yield from ((0, column) for column in hessian.columns())
            return
        for row, probe in enumerate(probes):
            random = generator(self._seed, index, 1 + probe // GROUP, device=model_device(self._model))
            yield from ((row, vector) for vector in hessian.draw(random, probe))

    def alone(
        self, microbatch: Microbatch, opened: Opened, passes: Sequence[list[Tensor]]
    ) -> Iterator[list[dict[str, Tensor]]]:
        """For every sample, the gradients of slow layers in each of the passes, from a graph of that sample alone.

        Raises `GaussNewtonError` if its outputs differ from those that it has in the batch.
        """
        weights = {name: self._parameters[name] for name in opened.sweep.axes.slow}
        for number in range(microbatch.samples):
            row = microbatch.start + number
            sample = microbatch.sample(self._task, row)
            with in_operations(self._model):
                outputs = sample.outputs(self._model, self._task)
            tensors = [differentiable(outputs)[place] for place in opened.places]
            for tensor, whole in zip(tensors, opened.hessian.tensors, strict=True):
                together = whole[row : row + 1].detach()
                if tensor.shape != together.shape:
                    raise GaussNewtonError(
                        f"layer {next(iter(weights))} needs every sample alone, and an output has shape"
                        f" {list(tensor.shape)} for one sample where the batch gives it {list(together.shape)} (outputs"
                        " padded to the longest?); use batches of one sample"
                    )
                if float((tensor.detach() - together).norm()) > ALONE[microbatch.precision] * float(together.norm()):
                    raise mixed_samples(next(iter(weights)))
            gradients = []
            for position, vectors in enumerate(passes):
                last = position == len(passes) - 1
                cotangents = [vector[row : row + 1] for vector in vectors]
                found = torch.autograd.grad(
                    tensors, list(weights.values()), cotangents, retain_graph=not last, allow_unused=True
                )
                gradients.append({n: dense(g) for n, g in zip(weights, found, strict=True) if g is not None})
            yield gradients

    def notes(self, opened: Opened) -> tuple[str, ...]:
        """What the result should say of a batch: the shape of H_L, and layers that took a pass for each sample."""
        slow = ", ".join(layer.name for layer in self._points.layers if layer.name in opened.sweep.axes.slow)
        return (
            f"{opened.hessian.kind} output Hessian",
            *_unsettled(opened.hessian),
            *([f"a backward pass for each sample for {slow}"] if slow else []),
        )

    def _forward(self, microbatch: Microbatch, weights: bool) -> Opened:
        with reading_variables(self._model, self._read) as variables, in_operations(self._model):
            outputs, loss = microbatch.forward(self._model, self._task)
        random = generator(self._seed, microbatch.index, 0, device=model_device(self._model))
        hessian = factor(self._task, outputs, microbatch.batch, random)
        numbers = {id(tensor): number for number, tensor in enumerate(differentiable(outputs))}
        rows = Rows(microbatch.samples, microbatch.start, microbatch.size)
        sweep = Sweep(hessian.tensors, rows, self._parameters if weights else {}, variables)
        return Opened(sweep, hessian, loss, tuple(numbers[id(tensor)] for tensor in hessian.tensors))

    def _of_few_samples(self, microbatch: Microbatch, weights: bool) -> None:
        """Find where samples lie inside the model with a few of them, if these tell it for all batches alike."""
        if not microbatch.whole or microbatch.size <= 2 * CHECK_SAMPLES:
            return
        with suppress(Exception):  # a batch, a loss or a model that knows one size only
            few = self._task.select(microbatch.batch, 0, CHECK_SAMPLES)
            sweep = self._forward(Microbatch(few, microbatch.index, 0, CHECK_SAMPLES, CHECK_SAMPLES), weights).sweep
            if sweep.axes.certain and sweep.locate_samples().certain:
                self._axes.setdefault(sweep.signature, sweep.axes)

    def _announce(self, sweep: Sweep) -> None:
        """Say once, before it begins, what layers cost whose gradient cannot be had for all samples together."""
        if not sweep.axes.slow or self._announced:
            return
        self._announced = True
        samples = sweep.rows.samples
        passes = "a backward pass for each output" if self._exact else f"{self.num_probes * samples} backward passes"
        warnings.warn(
            f"layers {some_names(sweep.axes.slow)} are read by operations whose samples cannot be told apart in a"
            f" batch: for these, a batch of {samples} samples costs {samples} forward passes and {passes} of one sample"
            " more",
            stacklevel=2,
        )


def _unsettled(hessian: Factored) -> tuple[str, ...]:
    """A remark where the recurrence of a coupled Hessian has not settled: by how much its draws may still change."""
    error = max(getattr(part, "error", 0.0) for part in getattr(hessian, "parts", [hessian]))
    if error <= SETTLED:
        return ()
    # Rounded up to few values, since every batch has its own and each remark appears once.
    bound = next((share for share in (0.02, 0.05, 0.1, 0.2, 0.5) if error <= share), 1.0)
    return (f"draws of the output Hessian not settled (to within {bound:.0%})",)


@contextmanager
def in_operations(model: nn.Module) -> Iterator[None]:
    """Let recurrent layers compute in matrix products: one kernel for a whole sequence shows no operation inside."""
    on_gpu = model_device(model).type == "cuda"
    # On a CPU only LSTM has such a kernel.
    if not any(isinstance(module, nn.RNNBase if on_gpu else nn.LSTM) for module in model.modules()):
        yield
    elif on_gpu:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    else:
        enabled = torch._C._get_mkldnn_enabled()
        # The public context sets further flags, which warns where there is no GPU.
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)


def dense(gradient: Tensor) -> Tensor:
    """The gradient, where a lookup has left it sparse as an ordinary tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient
