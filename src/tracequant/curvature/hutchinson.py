"""Hutchinson's estimator of Hessian traces, for weights and activations (HAWQ-V2, Sections 2.1 and 2.2).

For a random z with E[z zᵀ] = I the trace of a symmetric H is E[zᵀHz] (Eq. 6), estimated by the mean over probes (Eq.
7). Hz is had without forming H, by differentiating gᵀz once more. Any twice-differentiable model and loss will do, and
the Hessian is the exact one.

Weights: H is the block of one layer. A *shared* probe draws z for all layers at once and reads z_iᵀ(Hz)_i; that costs
one product for all layers but adds the variance Σ_j ‖H_ij‖_F² of the off-diagonal blocks to the layer's own
2‖offdiag H_ii‖_F² (Rademacher) or 2‖H_ii‖_F² (Gaussian). A probe *per layer* has its own variance only.

Activations (Eq. 8-9): samples do not interact, so the Hessian with respect to the activations of a batch is block
diagonal, one block per input. A z drawn for the whole batch therefore gives the mean over the inputs of each input's
own zᵢᵀHᵢzᵢ, at the price of one product; inputs of different sizes need no padding and no special case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracequant.core.curvature import Curvature, TraceEstimate, summarize
from tracequant.core.errors import SecondDerivativeError
from tracequant.core.points import QuantizationPoints
from tracequant.curvature.batch_loop import Stop, collect
from tracequant.curvature.microbatch import Microbatch
from tracequant.curvature.parts import Part, all_notes, together, warn_of_error
from tracequant.curvature.products import (
    LOSS_BENDS_NOT,
    Distribution,
    culprit,
    draw_probe,
    first_derivatives,
    generator,
    hessian_vector_product,
    reading_variables,
    require_grad,
)
from tracequant.model.batches import Batches
from tracequant.model.device import Precision, model_device
from tracequant.model.state import double_backward
from tracequant.model.task import Task

ProbeScope = Literal["shared", "per_layer"]

# Maps probes by name to the products with the Hessian, for one family ("weights" or "activations").
_Product = Callable[[str, dict[str, list[Tensor]]], dict[str, list[Tensor]]]

# Family ("weights" or "activations") → layer or point → the tensors to differentiate by.
_Families = dict[str, dict[str, list[Tensor]]]

DEFAULT_PROBES = 16
# With `target_standard_error`: the default of the most probes for each batch, and the fewest whose spread is known.
MOST_PROBES, LEAST_PROBES = 1000, 8


def hutchinson(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    *,
    num_probes: int | None = None,
    seed: int = 0,
    probe_scope: ProbeScope = "per_layer",
    distribution: Distribution = "rademacher",
    weights: bool = True,
    activations: bool = True,
    target_standard_error: float | None = None,
    checkpoint: str | Path | None = None,
    stop: Stop | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> Curvature:
    """Traces of every layer and activation point over all samples of `batches`, `num_probes` probes for each batch.

    Each batch gets probes of its own: for the same work the mean over batches is then less noisy than with one z for
    the whole set. A product differentiates gᵀz backwards, through a graph that is built once for all probes of a batch.

    `num_probes` is 16 by default. With `target_standard_error` a layer is probed until its `standard_error` is below
    that share of its trace, at most `num_probes` times a batch (default 1,000). `checkpoint`, `stop` and `precision`
    are those of `collect`. The model is given back as it came.

    Raises `ModelError` naming layers that the loss of no batch depends on, or the layer that has no second derivative.
    """
    if num_probes is None:
        num_probes = DEFAULT_PROBES if target_standard_error is None else MOST_PROBES
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        count = 1
    target = None if target_standard_error is None else target_standard_error * math.sqrt(count)
    estimator = _Hutchinson(
        model,
        task,
        points,
        num_probes=num_probes,
        seed=seed,
        probe_scope=probe_scope,
        distribution=distribution,
        weights=weights,
        activations=activations,
        target=target,
    )
    with double_backward():
        result = collect(
            estimator,
            model,
            batches,
            task,
            checkpoint=checkpoint,
            stop=stop,
            precision=precision,
            progress=progress,
        )
    if target_standard_error is not None:
        warn_of_error(
            result,
            "standard_error",
            target_standard_error,
            "allow more probes, or ask for a smaller error where batches differ much",
        )
    return result


class _Hutchinson:
    label = "Hutchinson"
    memory = 5.0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        points: QuantizationPoints,
        *,
        num_probes: int,
        seed: int,
        probe_scope: ProbeScope,
        distribution: Distribution,
        weights: bool,
        activations: bool,
        target: float | None,
    ) -> None:
        self._model, self._task, self._points, self._seed = model, task, points, seed
        self._probe_scope, self._distribution = probe_scope, distribution
        self._weights, self._activations = weights, activations
        # The relative error that suffices within a batch: that of the mean over n independent batches is 1/√n of it.
        self._target = target
        self.num_probes = num_probes
        self._batch: Any = None
        # Family → layer → probes that sufficed for the first microbatch of the batch.
        self._counts: dict[str, dict[str, int]] = {}

    def settings(self) -> dict[str, Any]:
        return {
            "estimator": "hutchinson",
            "num_probes": self.num_probes,
            "seed": self._seed,
            "scope": [self._probe_scope, self._distribution, self._target],
            "families": [self._weights, self._activations],
            "model": self._points.fingerprint,
            "layers": [layer.name for layer in self._points.layers],
        }

    def prepare(self) -> None:
        self._parameters = require_grad(self._model, self._points)

    def measure(self, microbatch: Microbatch, probes: Sequence[int]) -> Part:
        """Values of zᵀHz, `[probes, 1]`, of the microbatch's part of the batch's mean loss."""
        device, self._batch = model_device(self._model), microbatch.batch
        loss, families, elements = self._graph(microbatch)
        product, idle = self._product(loss, families)
        del loss
        values: dict[str, Tensor] = {}
        for number, (family, targets) in enumerate(families.items()):
            shapes = {name: [_whole_shape(t, microbatch, family) for t in tensors] for name, tensors in targets.items()}
            rows: dict[str, list[float]] = {name: [] for name in targets}
            groups = [[name] for name in targets] if self._probe_scope == "per_layer" else [list(targets)]
            for probe in probes:
                if not (
                    wanted := {name for name in targets if not self._certain(family, name, rows[name], microbatch)}
                ):
                    break
                for position, group in enumerate(groups):
                    own = [name for name in group if name in wanted]
                    if not own:
                        continue
                    random = generator(self._seed, microbatch.index, probe, number, position, device=device)
                    vectors = {
                        name: [
                            draw_probe(tensor, self._distribution, random, shape)[_rows(tensor, shape, microbatch)]
                            for tensor, shape in zip(targets[name], shapes[name], strict=True)
                        ]
                        for name in group
                    }
                    for name, products in product(family, {name: vectors[name] for name in own}).items():
                        pairs = zip(vectors[name], products, strict=True)
                        rows[name].append(sum((v.double() * p.double()).sum().item() for v, p in pairs))
            if microbatch.start == 0:
                self._counts[family] = {name: len(row) for name, row in rows.items()}
            for name, row in rows.items():
                values[f"{family}:{name}"] = torch.tensor(row, dtype=torch.float64).unsqueeze(1)
        return Part(microbatch.samples, values, elements, idle=idle)

    def add(self, parts: Sequence[Part]) -> Part:
        """Microbatches share their probes and add up to the batch's loss."""
        values = {name: torch.stack([part.values[name] for part in parts]).sum(0) for name in parts[0].values}
        return together(parts, values)

    def summarize(self, parts: Sequence[Part]) -> Curvature:
        sizes = [part.samples for part in parts]
        samples = sum(sizes)

        def rows(family: str, name: str) -> list[list[float]]:
            return [part.values[f"{family}:{name}"].squeeze(1).tolist() for part in parts]

        def estimates(family: str, sizes_of: dict[str, float]) -> dict[str, TraceEstimate]:
            return {
                name: summarize(rows(family, name), sizes, numel)
                for name, numel in sizes_of.items()
                if f"{family}:{name}" in parts[0].values and numel
            }

        elements = {name: sum(part.elements[name] for part in parts) / samples for name in parts[0].elements}
        weights = estimates("weights", {layer.name: float(layer.numel) for layer in self._points.layers})
        activations = estimates("activations", elements)
        limit = "" if self._target is None else "at most "
        return Curvature(
            points=self._points,
            weights=weights,
            activations=activations,
            estimator="hutchinson",
            reason=", ".join(
                (
                    f"{limit}{self.num_probes} {self._distribution} probes for each of {len(sizes)} batches",
                    f"probes {self._probe_scope.replace('_', ' ')}",
                    *all_notes(parts),
                )
            ),
            seed=self._seed,
            samples=samples,
            weight_values={name: _row_means(rows("weights", name)) for name in weights},
            activation_values={name: _row_means(rows("activations", name)) for name in activations},
            weight_probes={name: _probe_means(rows("weights", name), sizes) for name in weights},
            activation_probes={name: _probe_means(rows("activations", name), sizes) for name in activations},
        )

    def _certain(self, family: str, name: str, row: list[float], microbatch: Microbatch) -> bool:
        """Whether a layer's probes on this batch suffice; all microbatches of a batch have the probes of the first."""
        if self._target is None:
            return False
        if microbatch.start > 0:
            return len(row) >= self._counts[family][name]
        if len(row) < LEAST_PROBES:
            return False
        mean = math.fsum(row) / len(row)
        variance = math.fsum((value - mean) ** 2 for value in row) / (len(row) - 1) / len(row)
        return math.sqrt(variance) <= self._target * abs(mean)

    def _product(self, loss: Tensor, families: _Families) -> tuple[_Product, tuple[str, ...]]:
        """What gives products by differentiating gᵀz, from one graph for all probes; and layers without a gradient."""
        try:
            gradients, idle = first_derivatives(loss, families)
        except SecondDerivativeError as error:
            raise self._named(error) from error

        def product(family: str, probes: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
            targets, slopes = families[family], gradients[family]
            flat = [tensor for name in probes for tensor in targets[name]]
            if not flat:
                return {name: [] for name in probes}
            try:
                found = iter(
                    hessian_vector_product(
                        [slope for name in probes for slope in slopes[name]],
                        flat,
                        [vector for vectors in probes.values() for vector in vectors],
                    )
                )
            except SecondDerivativeError as error:
                raise self._named(error) from error
            return {name: [next(found) for _ in targets[name]] for name in probes}

        return product, idle

    def _graph(self, microbatch: Microbatch) -> tuple[Tensor, _Families, dict[str, int]]:
        """The loss, what to differentiate it by, and the number of elements of each activation."""
        with reading_variables(self._model, self._points) as variables:
            _, loss = microbatch.forward(self._model, self._task)
        families: _Families = {}
        if self._weights:
            families["weights"] = {name: [parameter] for name, parameter in self._parameters.items()}
        if self._activations:
            # A tensor that this batch never reached stays in, with the value zero.
            families["activations"] = dict(variables)
        elements = {name: sum(tensor.numel() for tensor in tensors) for name, tensors in variables.items()}
        return loss, families, elements

    def _named(self, error: SecondDerivativeError) -> SecondDerivativeError:
        where = culprit(self._model, self._task, self._batch)
        return SecondDerivativeError(LOSS_BENDS_NOT if where == "the loss" else f"{error}; it is in {where}")


def _row_means(rows: list[list[float]]) -> tuple[float, ...]:
    """The mean over probes for each batch."""
    return tuple(math.fsum(row) / len(row) for row in rows)


def _probe_means(rows: list[list[float]], sizes: list[int]) -> tuple[float, ...]:
    """The mean over batches, weighted by their samples, for each draw that all of them have."""
    total = sum(sizes)
    return tuple(
        math.fsum(size / total * value for size, value in zip(sizes, column, strict=True))
        for column in zip(*rows, strict=False)
    )


def _whole_shape(tensor: Tensor, microbatch: Microbatch, family: str) -> tuple[int, ...]:
    """The shape that the tensor has for the whole batch, of which a microbatch takes its rows of the probe."""
    if family == "weights" or microbatch.whole or not tensor.ndim or len(tensor) % microbatch.samples:
        return tuple(tensor.shape)
    return (len(tensor) // microbatch.samples * microbatch.size, *tensor.shape[1:])


def _rows(tensor: Tensor, whole: tuple[int, ...], microbatch: Microbatch) -> Any:
    """The index of the microbatch's rows in a probe of shape `whole`."""
    if tuple(tensor.shape) == whole:
        return ...
    each = len(tensor) // microbatch.samples
    return slice(microbatch.start * each, microbatch.stop * each)
