"""One forward pass over a microbatch and the backward passes of its factored Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from tracequant.core.points import QuantizationPoints
from tracequant.curvature.microbatch import Microbatch
from tracequant.curvature.output_hessian import GROUP, Cotangents, Factored, differentiable, factor
from tracequant.curvature.products import generator, require_grad
from tracequant.curvature.sweep import Sweep
from tracequant.model.device import model_device
from tracequant.model.task import Task

# Samples that serve to check what the model's graph is like.
CHECK_SAMPLES = 4


class Passes:
    """One forward pass over a microbatch, checked and factored, and the cotangents to send back through it."""

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
        self._exact = num_probes == "exact"
        self.num_probes = 1 if num_probes == "exact" else num_probes
        # What `_check` finds on the first batch.
        self._slow: list[str] | None = None
        self._samples_checked = False

    def prepare(self) -> None:
        """Let the layers' weights, and nothing else, require gradients."""
        self._parameters = require_grad(self._model, self._points)

    def open(
        self, microbatch: Microbatch, weights: bool = True
    ) -> tuple[Sweep, Factored, Tensor, dict[str, list[Tensor]]]:
        """A microbatch's graph, the factored Hessian of its outputs, its loss and the activation variables by point."""
        if self._slow is None or (microbatch.samples > 1 and not self._samples_checked):
            self._slow = self._check(microbatch)
            self._samples_checked = microbatch.samples > 1
        sweep = self._sweep(microbatch.samples, microbatch.start, microbatch.size)
        with sweep.recording() as variables:
            outputs, loss = microbatch.forward(self._model, self._task)
        device = model_device(self._model)
        hessian = factor(
            self._task, outputs, microbatch.batch, generator(self._seed, microbatch.index, 0, device=device)
        )
        sweep.outputs = hessian.tensors
        sweep.measure_weights = weights
        sweep.set_slow(self._slow)
        return sweep, hessian, loss, variables

    def cotangents(self, hessian: Factored, index: int, probes: Sequence[int]) -> Iterator[tuple[int, Cotangents]]:
        """Position in `probes` and cotangents of every backward pass; position 0 for all columns of the exact sum."""
        if self._exact:
            yield from ((0, column) for column in hessian.columns())
            return
        for row, probe in enumerate(probes):
            random = generator(self._seed, index, 1 + probe // GROUP, device=model_device(self._model))
            yield from ((row, vector) for vector in hessian.draw(random, probe))

    def notes(self, sweep: Sweep, hessian: Factored) -> tuple[str, ...]:
        """What the result should say of a batch: the shape of H_L, and layers that took a pass for each sample."""
        slow = ", ".join(layer.name for layer in sweep.slow)
        return (f"{hessian.kind} output Hessian", *([f"a backward pass for each sample for {slow}"] if slow else []))

    def _sweep(self, samples: int, offset: int, size: int) -> Sweep:
        points = self._points if self._activations else replace(self._points, activations=())
        return Sweep(self._model, points, self._parameters, samples, offset, size)

    def _check(self, microbatch: Microbatch) -> list[str]:
        """Names of layers that need a pass for each sample; `ModelError` where samples interact.

        A few samples are enough, unless the batch cannot be cut, a layer is not reached or samples seem to interact.
        """
        microbatch = replace(microbatch, precision="float32")  # bfloat16 rounds by more than the tolerance
        if microbatch.whole and microbatch.size > CHECK_SAMPLES:
            with suppress(Exception):  # a batch or a model that knows one size only
                few = self._task.select(microbatch.batch, 0, CHECK_SAMPLES)
                sweep = self._sweep(CHECK_SAMPLES, 0, CHECK_SAMPLES)
                with sweep.recording():
                    outputs = self._task.outputs(self._model, few)
                return sweep.check(differentiable(outputs), all_layers=True)
        sweep = self._sweep(microbatch.samples, microbatch.start, microbatch.size)
        with sweep.recording():
            outputs, _ = microbatch.forward(self._model, self._task)
        random = generator(self._seed, microbatch.index, 0, device=model_device(self._model))
        return sweep.check(factor(self._task, outputs, microbatch.batch, random).tensors)
