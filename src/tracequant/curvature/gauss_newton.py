"""Gauss-Newton traces of all layers and activations from one forward and a few backward passes.

With the outputs z = f(x), the Gauss-Newton block of layer i is G_ii = E_n[J_iᵀ H_L J_i], J_i the Jacobian of the
outputs with respect to the layer and H_L the Hessian of the loss with respect to the outputs. Where the network is
piecewise linear in every single layer's weights and activations (ReLU, pooling, BatchNorm in evaluation mode, residual
sums), the second derivative of the outputs with respect to one layer vanishes almost everywhere, and **G_ii is the
Hessian block itself**.

Its trace needs no second derivative of the network: with H_L = L S Lᵀ (`output_hessian`) and random signs v,

    Tr(G_ii) = E_n E_v ‖J_iᵀ L v‖²,

the squared norm, for each sample, of an ordinary gradient (`gradient_norms`). One backward pass of L v serves all
layers and all activations, and blocks off the diagonal add no noise. Labels enter only where H_L depends on them. For
cross-entropy it does not.

Labels drawn from the model's probabilities could stand for v. On a well-trained network they double the error, because
unlikely classes are drawn rarely and weigh much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor, nn

from tracequant.core.curvature import Curvature, TraceEstimate
from tracequant.core.points import QuantizationPoints
from tracequant.curvature.batch_loop import Stop, collect
from tracequant.curvature.gradient_norms import Call, squared_norms
from tracequant.curvature.microbatch import Microbatch
from tracequant.curvature.output_factors import Cotangents
from tracequant.curvature.output_hessian import ZERO
from tracequant.curvature.parts import Part, exceeded, together, warn_of_error
from tracequant.curvature.passes import Opened, Passes, dense
from tracequant.model.batches import Batches
from tracequant.model.device import Precision
from tracequant.model.task import Task

DEFAULT_PROBES = 2
# Of fewer samples the spread is not known well enough for `target_sampling_error` to stop by it.
LEAST_SAMPLES = 32
# Of a two-sided interval that holds 95 %.
CONFIDENCE = 0.975


def gauss_newton(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    *,
    num_probes: int | Literal["exact"] | None = None,
    seed: int = 0,
    weights: bool = True,
    activations: bool = True,
    target_sampling_error: float | None = None,
    checkpoint: str | Path | None = None,
    stop: Stop | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> Curvature:
    """Gauss-Newton traces over all samples of `batches`, with `num_probes` random vectors v for each (2 if None).

    "exact" sums over all columns of H_L's factor instead, one backward pass for each output element: no error but
    that of the samples. Layers whose weight something else than a convolution, a matrix product or a lookup reads get a
    pass of each sample alone, all of them together; a warning says so before, and the result's `reason` names them.

    With `target_sampling_error` no more batches are taken once the `sampling_error` of every trace is below that share
    of it. `checkpoint`, `stop` and `precision` are those of `collect`.

    Raises `ModelError` naming layers that the loss of no batch depends on, and where samples cannot be separated.
    """
    estimator = _GaussNewton(
        model,
        task,
        points,
        num_probes=DEFAULT_PROBES if num_probes is None else num_probes,
        seed=seed,
        weights=weights,
        activations=activations,
    )

    def content(curvature: Curvature) -> bool:
        certain = (
            target_sampling_error is not None
            and curvature.samples >= LEAST_SAMPLES
            and not exceeded(curvature, "sampling_error", target_sampling_error)
        )
        return certain or (stop is not None and stop(curvature))

    own_stop = None if target_sampling_error is None and stop is None else content
    result = collect(
        estimator,
        model,
        batches,
        task,
        checkpoint=checkpoint,
        stop=own_stop,
        precision=precision,
        progress=progress,
    )
    if target_sampling_error is not None:
        warn_of_error(result, "sampling_error", target_sampling_error, "give more samples")
    return result


class _GaussNewton(Passes):
    label = "Gauss-Newton"
    memory = 2.0

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        points: QuantizationPoints,
        *,
        num_probes: int | Literal["exact"],
        seed: int,
        weights: bool,
        activations: bool,
    ) -> None:
        super().__init__(model, task, points, num_probes=num_probes, seed=seed, activations=activations)
        self._weights = weights

    def settings(self) -> dict[str, Any]:
        return {
            "estimator": "gauss_newton",
            "num_probes": "exact" if self._exact else self.num_probes,
            "seed": self._seed,
            "families": [self._weights, self._activations],
            "model": self._points.fingerprint,
            "layers": [layer.name for layer in self._points.layers],
        }

    def measure(self, microbatch: Microbatch, probes: Sequence[int]) -> Part:
        """Squared gradient norms `[probes, samples]`, each sample's own value of ‖J_nᵀ L v‖²."""
        opened = self.open(microbatch, self._weights)
        rows = self._squares(microbatch, opened, probes)
        variables = opened.sweep.variables
        nothing = torch.zeros(len(probes), microbatch.samples, dtype=torch.float64)
        names = (*(f"weights:{n}" for n in self._parameters if self._weights), *(f"activations:{n}" for n in variables))
        return Part(
            microbatch.samples,
            # ‖J_nᵀ L v‖² carries the batch mean's 1/size; a sample's own value is size times that. What this batch
            # never reached counts as zero.
            {name: rows.get(name, nothing) * microbatch.size for name in names},
            {name: sum(tensor.numel() for tensor in tensors) for name, tensors in variables.items()},
            self.notes(opened),
            # A batch without any curvature says of no layer that it is known.
            tuple(
                name
                for name in self._parameters
                if self._weights and (opened.hessian.kind == ZERO or f"weights:{name}" not in rows)
            ),
        )

    def add(self, parts: Sequence[Part]) -> Part:
        """Microbatches are further samples."""
        return together(parts, {name: torch.cat([part.values[name] for part in parts], 1) for name in parts[0].values})

    def summarize(self, parts: Sequence[Part]) -> Curvature:
        whole = self.add(parts)
        num_probes: int | Literal["exact"] = "exact" if self._exact else self.num_probes

        def estimates(family: str, sizes: dict[str, float]) -> dict[str, TraceEstimate]:
            return {
                name: _estimate(whole.values[f"{family}:{name}"], size, num_probes)
                for name, size in sizes.items()
                if f"{family}:{name}" in whole.values and size
            }

        numel = {layer.name: float(layer.numel) for layer in self._points.layers}
        text = (
            "exact sum over outputs"
            if self._exact
            else f"{num_probes} probe{'s' if num_probes != 1 else ''} for each sample"
        )
        return Curvature(
            points=self._points,
            weights=estimates("weights", numel),
            activations=estimates("activations", {name: n / whole.samples for name, n in whole.elements.items()}),
            estimator="gauss_newton",
            reason=", ".join((text, *whole.notes)),
            seed=self._seed,
            samples=whole.samples,
            weight_values=self._series(whole, "weights", 0),
            activation_values=self._series(whole, "activations", 0),
            weight_probes=self._series(whole, "weights", 1),
            activation_probes=self._series(whole, "activations", 1),
        )

    def _series(self, whole: Part, family: str, axis: int) -> dict[str, tuple[float, ...]]:
        """The mean over probes for each sample (`axis` 0), or over samples for each draw (1)."""
        return {
            key.split(":", 1)[1]: tuple(values.mean(axis).tolist())
            for key, values in whole.values.items()
            if key.startswith(family)
        }

    def _squares(self, microbatch: Microbatch, opened: Opened, probes: Sequence[int]) -> dict[str, Tensor]:
        """Name → values `[probes, samples]` (one row, the sum over all columns, for the exact sum)."""
        values: dict[str, Tensor] = {}
        sweep, samples = opened.sweep, microbatch.samples

        def add(key: str, row: int, squares: Tensor, sample: int | slice = slice(None)) -> None:
            if key not in values:
                values[key] = torch.zeros(len(probes), samples, dtype=torch.float64)
            values[key][row, sample] += squares.double().cpu()

        alone: list[tuple[int, Cotangents]] = []
        upcoming = self.cotangents(opened.hessian, microbatch.index, probes)
        current = next(upcoming, None)
        while current is not None:
            following = next(upcoming, None)
            row, (vectors, sign) = current

            def on_layer(name: str, parts: list[list[Call]], row: int = row, sign: float = sign) -> None:
                dtype = self._parameters[name].dtype
                for calls in parts:
                    add(f"weights:{name}", row, sign * squared_norms(calls, dtype))

            def on_activation(name: str, _: int, gradient: Tensor, row: int = row, sign: float = sign) -> None:
                add(f"activations:{name}", row, sign * _row_norms(gradient))

            slow = sweep.run(
                vectors,
                keep=following is not None,
                on_layer=on_layer if self._weights else None,
                on_activation=on_activation,
            )
            if sweep.axes.slow and samples > 1:
                alone.append(current)
            else:
                for name, gradient in slow.items():
                    add(f"weights:{name}", row, sign * dense(gradient).double().square().sum())
            current = following
        if alone:
            passes = [vectors for _, (vectors, _) in alone]
            for sample, gradients in enumerate(self.alone(microbatch, opened, passes)):
                for (row, (_, sign)), found in zip(alone, gradients, strict=True):
                    for name, gradient in found.items():
                        add(f"weights:{name}", row, sign * gradient.double().square().sum(), sample)
        return values


def _row_norms(gradient: Tensor) -> Tensor:
    """Squared norms of the rows, float64."""
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    return norms.double().square()


def _estimate(values: Tensor, numel: float, num_probes: int | Literal["exact"]) -> TraceEstimate:
    """The estimate from each sample's values `[probes, samples]`."""
    count, samples = values.shape
    means = values.mean(0)
    trace = float(means.mean())
    probe_error, spread = math.inf, math.inf
    if num_probes == "exact":
        probe_error = 0.0
    elif count > 1:
        probe_error = _probe_error(values)
    if samples > 1:
        spread = float(means.std()) / math.sqrt(samples)
    return TraceEstimate(
        trace, trace / numel, probe_error, spread, numel, 0 if num_probes == "exact" else count, samples
    )


def _probe_error(values: Tensor) -> float:
    """The error of the mean over probes and samples, so large that two of them hold the truth in 95 % of the cases.

    With the variance D_n over the probes of sample n it is √(Σ D_n / probes) / samples, times Student's quantile over
    the normal one: where few samples have most of Σ D_n, the sum is itself uncertain. Satterthwaite's degrees of
    freedom are (probes − 1) (Σ D_n)² / Σ D_n².
    """
    variances = values.double().var(0)
    total = float(variances.sum())
    if not total:
        return 0.0
    freedom = (len(values) - 1) * total**2 / float(variances.square().sum())
    factor = float(stdtrit(freedom, CONFIDENCE)) / float(ndtri(CONFIDENCE))
    return factor * math.sqrt(total / len(values)) / values.shape[1]
