"""What the loss's expansion says of the rounding that a plan will really do: no trace, no average direction.

For a layer whose weight moves by ΔW the loss changes, to second order, by

    E_n[g_n · ΔW] + ½ E_n[Σ_k s_k (u_nk · ΔW)²],    u_nk = J_nᵀ L_k,

with g the gradient of the loss under the true labels, J the Jacobian of the outputs with respect to the layer and
L S Lᵀ the Hessian of the loss with respect to the outputs (`output_hessian`). HAWQ-V2 replaces the second term by the
trace, which is right on average over directions of ΔW (Lemma 1), and leaves the first out, which vanishes at a
minimum. For a plan the terms of all layers are added up before squaring: ½ E[(Σ_i u_i · ΔW_i)²], products between
layers included.

u_n · ΔW is taken for all bit widths from one gradient of each sample, which is as much work as the weights' gradient in
an ordinary backward pass. A batch costs a forward pass, an ordinary backward pass for the first term, and another for
each random vector or column.

Activations are expanded in the same way, each alone: u_n · Δa_n is the gradient at the tensor times its own rounding,
another one for every sample. What this knows and the trace does not is that rounding is no random direction: values
that are cut off, or lie in few codes, all move to one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracequant.core.curvature import Perturbation
from tracequant.core.errors import ModelError
from tracequant.core.points import QuantizationPoints
from tracequant.core.settings import SensitivitySettings
from tracequant.core.weight_grid import WeightGrid
from tracequant.curvature.batch_loop import collect
from tracequant.curvature.gradient_norms import Call, inner_products
from tracequant.curvature.microbatch import Microbatch
from tracequant.curvature.output_factors import Cotangents
from tracequant.curvature.output_hessian import Factored
from tracequant.curvature.parts import Part, together
from tracequant.curvature.passes import Opened, Passes, dense
from tracequant.curvature.sweep import Sweep
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import Precision
from tracequant.model.hooks import weight_parameter
from tracequant.model.task import Task
from tracequant.quantization.calibrate import activation_options, calibrate
from tracequant.quantization.grid import Grid, check_bits
from tracequant.quantization.rounding import RoundedWeights, round_weights

# The most backward passes that a batch gets by default: as many random vectors, or all columns.
DEFAULT_PROBES = 4


def measure_perturbation(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    *,
    weight_bits: Sequence[int] = SensitivitySettings.weight_bits,
    weight_grid: WeightGrid | None = None,
    activation_bits: Sequence[int] = (),
    num_probes: int | Literal["exact"] | None = None,
    rounded: RoundedWeights | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> Perturbation:
    """First- and second-order terms of the loss for the rounding of every layer of `points` at `weight_bits`.

    And of every activation at `activation_bits` (the model's input at 8 bits only), with ranges chosen on `batches`.

    `batches` are labelled samples. `num_probes` random vectors stand for the columns of L, "exact" takes all of them,
    and None all where the outputs have at most 4 elements for each sample, else 4 probes. The second-order term is
    the Gauss-Newton one. For each layer alone it equals the Hessian's where `estimate_curvature` finds that its traces
    are; between two layers, and in networks that bend, it leaves out the outputs' own second derivatives. `checkpoint`
    and `precision` are those of `collect`; memory grows with the number of bit widths. The model is left as it was.

    Raises `ModelError` naming layers that the loss of no batch depends on, for bits outside 1 to 8, and where samples
    cannot be separated.
    """
    if num_probes is not None and num_probes != "exact" and (not isinstance(num_probes, int) or num_probes < 1):
        raise ModelError(f"num_probes must be a whole number from 1, 'exact' or None, got {num_probes!r}")
    widths = tuple(sorted(set(weight_bits)))
    if not widths:
        raise ModelError("weight_bits is empty; name at least one bit width from 1 to 8")
    for num_bits in (*widths, *activation_bits):
        check_bits(num_bits)
    batches, settings = reusable(batches), weight_grid or WeightGrid()
    bits = {layer.name: widths for layer in points.layers}
    if rounded is None or not rounded.covers(points.fingerprint, bits, settings):
        rounded = round_weights(model, batches, task, points, bits, weight_grid=settings, progress=progress)
    grids: dict[str, dict[int, Grid]] = {}
    if activation_bits:
        options = activation_options(points, activation_bits)
        grids = calibrate(model, batches, task, points, bits=options, progress=progress)
    estimator = _Perturbations(
        model,
        task,
        points,
        weight_bits=widths,
        rounded=rounded,
        activation_grids=grids,
        num_probes=num_probes,
        seed=seed,
    )
    return collect(estimator, model, batches, task, checkpoint=checkpoint, precision=precision, progress=progress)


class _Perturbations(Passes):
    label = "Perturbations"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        points: QuantizationPoints,
        *,
        weight_bits: tuple[int, ...],
        rounded: RoundedWeights,
        activation_grids: dict[str, dict[int, Grid]],
        num_probes: int | Literal["exact"] | None,
        seed: int,
    ) -> None:
        super().__init__(
            model,
            task,
            points,
            num_probes=num_probes or DEFAULT_PROBES,
            seed=seed,
            activations=bool(activation_grids),
        )
        self._widths, self._rounded, self._grid = weight_bits, rounded, rounded.weight_grid
        self._activation_grids = activation_grids
        self._choose = num_probes is None
        # The pass itself keeps 2. Every activation's rounding comes on top, for each width.
        self.memory = 2.0 + max((len(own) for own in activation_grids.values()), default=0)

    def settings(self) -> dict[str, Any]:
        return {
            "estimator": "perturbation",
            "num_probes": "chosen" if self._choose else "exact" if self._exact else self.num_probes,
            "seed": self._seed,
            "model": self._points.fingerprint,
            "layers": [layer.name for layer in self._points.layers],
            "bits": self._widths,
            "activation_grids": [[_values(grid) for grid in own.values()] for own in self._activation_grids.values()],
            "grid": [self._grid.rounding, self._grid.per_channel, self._grid.symmetric, self._grid.range],
        }

    def prepare(self) -> None:
        super().prepare()
        # ΔW of every layer, a width after another.
        self._moves: dict[str, Tensor] = {}
        for layer in self._points.layers:
            weight = weight_parameter(self._model, layer).detach()
            widths = self._rounded.layers[layer.name]
            self._moves[layer.name] = torch.stack([widths[b].values - weight for b in self._widths])

    def measure(self, microbatch: Microbatch, probes: Sequence[int]) -> Part:
        """Sums over the microbatch's samples, in units of the batch's mean loss times its size."""
        opened = self.open(microbatch)
        sweep, hessian = opened.sweep, opened.hessian
        names = list(self._parameters)
        moved = self._moved(sweep)
        targets = [*self._parameters.values(), *(move.tensor for move in moved.values())]
        found = torch.autograd.grad(opened.loss, targets, retain_graph=True, allow_unused=True)
        slopes, activation_slopes = found[: len(names)], found[len(names) :]
        first = [
            # A layer that this batch never reached counts as zero.
            move.new_zeros((), dtype=torch.float64) if slope is None else (dense(slope) * move).sum(dtype=torch.float64)
            for name, slope in zip(names, slopes, strict=True)
            for move in self._moves[name]
        ]
        slope = self._zeros()
        for (key, move), gradient in zip(moved.items(), activation_slopes, strict=True):
            if gradient is not None:
                slope[key[0]] += move.along(sweep.activation_rows(*key, gradient)).sum(0).cpu()
        exact = self._exact or (self._choose and _few_columns(hessian))
        # A process that is given some of the probes, and takes all columns instead, has the others' share as well.
        share = len(probes) / self.num_probes if exact else 1 / self.num_probes
        passes = (
            ((0, column) for column in hessian.columns())
            if exact
            else self.cotangents(hessian, microbatch.index, probes)
        )
        products, second = self._second_order(microbatch, opened, moved, [cotangents for _, cotangents in passes])
        products, second = share * products, {name: 0.5 * share * values for name, values in second.items()}
        text = "exact sum over outputs" if exact else f"{self.num_probes} probes for each sample"
        return Part(
            microbatch.samples,
            {
                "first": torch.stack(first)[None].cpu() * microbatch.size,
                "products": products.cpu() * microbatch.size,
                **{f"slope:{name}": values[None] * microbatch.size for name, values in slope.items()},
                **{f"second:{name}": values[None] * microbatch.size for name, values in second.items()},
            },
            {},
            (text, *self.notes(opened)),
            tuple(name for name, slope in zip(names, slopes, strict=True) if slope is None),
        )

    def add(self, parts: Sequence[Part]) -> Part:
        """Microbatches are further samples, and all values sums over them."""
        values = {name: torch.stack([part.values[name] for part in parts]).sum(0) for name in parts[0].values}
        return together(parts, values)

    def summarize(self, parts: Sequence[Part]) -> Perturbation:
        size = len(self._parameters) * len(self._widths)

        def of_all_processes(name: str, values: Tensor) -> Tensor:
            # Where several processes shared a batch's probes, each has its rows; all have the first-order term.
            if name == "products":
                return values.view(-1, size, size).sum(0)
            return values.sum(0) if name.startswith("second:") else values[0]

        whole = self.add(
            [replace(part, values={n: of_all_processes(n, v) for n, v in part.values.items()}) for part in parts]
        )
        means = {name: (values / whole.samples).tolist() for name, values in whole.values.items()}
        return Perturbation(
            points=self._points,
            weight_bits=self._widths,
            weight_grid=self._grid,
            first_order=tuple(means["first"]),
            products=tuple(tuple(row[: i + 1]) for i, row in enumerate(means["products"])),
            samples=whole.samples,
            reason=", ".join(whole.notes),
            activation_first=self._by_bits(means, "slope"),
            activation_second=self._by_bits(means, "second"),
        )

    def _by_bits(self, means: dict[str, list[float]], order: str) -> dict[str, dict[int, float]]:
        return {
            name: dict(zip(grids, means[f"{order}:{name}"], strict=True))
            for name, grids in self._activation_grids.items()
        }

    def _second_order(
        self,
        microbatch: Microbatch,
        opened: Opened,
        moved: dict[tuple[str, int], _Move],
        passes: list[Cotangents],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ s (u_n · ΔW)(u_n · ΔW)ᵀ over samples and passes, `[layers · widths]` squared, and Σ s (u_n · Δa_n)²."""
        sweep, samples = opened.sweep, microbatch.samples
        columns = {name: number * len(self._widths) for number, name in enumerate(self._parameters)}
        size = len(columns) * len(self._widths)
        inner = [torch.zeros(samples, size, dtype=torch.float64) for _ in passes]
        second = self._zeros()

        def add(row: int, name: str, values: Tensor, sample: slice = slice(None)) -> None:
            inner[row][sample, columns[name] : columns[name] + len(self._widths)] += values.double().cpu()

        for row, (vectors, sign) in enumerate(passes):
            along: dict[str, Tensor] = {}

            def on_layer(name: str, parts: list[list[Call]], row: int = row) -> None:
                for calls in parts:
                    add(row, name, inner_products(calls, self._moves[name]))

            def on_activation(name: str, number: int, gradient: Tensor, along: dict[str, Tensor] = along) -> None:
                # Several tensors of a point move together.
                along[name] = along.get(name, 0) + moved[name, number].along(gradient)

            slow = sweep.run(vectors, keep=row < len(passes) - 1, on_layer=on_layer, on_activation=on_activation)
            for name, values in along.items():
                second[name] += (sign * values.square().sum(0)).cpu()
            if samples == 1:
                for name, gradient in slow.items():
                    add(row, name, self._along(name, gradient))
        if sweep.axes.slow and samples > 1:
            for sample, found in enumerate(self.alone(microbatch, opened, [vectors for vectors, _ in passes])):
                for row, by_layer in enumerate(found):
                    for name, gradient in by_layer.items():
                        add(row, name, self._along(name, gradient), slice(sample, sample + 1))
        products = torch.zeros(size, size, dtype=torch.float64)
        for own, (_, sign) in zip(inner, passes, strict=True):
            products += sign * own.T @ own
        return products, second

    def _zeros(self) -> dict[str, Tensor]:
        """A sum for every activation and width."""
        return {name: torch.zeros(len(own), dtype=torch.float64) for name, own in self._activation_grids.items()}

    def _along(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient of one sample along every move of its layer, `[1, widths]`."""
        return torch.mv(self._moves[name].flatten(1).double(), dense(gradient).flatten().double())[None]

    def _moved(self, sweep: Sweep) -> dict[tuple[str, int], _Move]:
        """The activations of a batch that are to be rounded, and where to, by point and number."""
        moved = {}
        for name, tensors in sweep.variables.items():
            for number, tensor in enumerate(tensors) if name in self._activation_grids else ():
                values = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
                moves = [
                    sweep.activation_rows(name, number, grid.round(values) - values)
                    for grid in self._activation_grids[name].values()
                ]
                moved[name, number] = _Move(tensor, torch.stack(moves, 1))
        return moved


@dataclass(frozen=True)
class _Move:
    """A tensor that consumers of an activation point read, and its rounding `[samples, widths, elements]`."""

    tensor: Tensor
    moves: Tensor

    def along(self, gradient: Tensor) -> Tensor:
        """u_n · Δa_n for a gradient `[samples, elements]`, float64 `[samples, widths]`."""
        return torch.matmul(self.moves, gradient.to(self.moves.dtype)[:, :, None])[:, :, 0].double()


def _values(grid: Grid) -> list[Any]:
    """What decides a grid, for a checkpoint's key; to five digits, because a GPU's sums differ in the last ones."""
    return [grid.num_bits, *(f"{x:.5g}" for part in (grid.scale, grid.zero_point) for x in part.flatten().tolist())]


def _few_columns(hessian: Factored) -> bool:
    """Whether all columns of the factor are no more passes than the probes would be."""
    return all(tensor.ndim <= 2 for tensor in hessian.tensors) and (
        sum(tensor[0].numel() for tensor in hessian.tensors) <= DEFAULT_PROBES
    )
