"""What the loss's expansion says of the rounding that a plan will really do: no trace, no average direction.

For a layer whose weight moves by ΔW the loss changes, to second order, by

    E_n[g_n · ΔW] + ½ E_n[Σ_k s_k (u_nk · ΔW)²],    u_nk = J_nᵀ L_k,

with g the gradient of the loss under the true labels, J the Jacobian of the outputs with respect to the layer and
L S Lᵀ the Hessian of the loss with respect to the outputs (`output_hessian`). HAWQ-V2 replaces the second term by the
trace, which is right on average over directions of ΔW (Lemma 1), and leaves the first out, which vanishes at a
minimum. For a plan the terms of all layers are added up before squaring: ½ E[(Σ_i u_i · ΔW_i)²], products between
layers included.

u_n · ΔW takes no gradient of a sample: it is the gradient at the layer's output times what the layer makes of its input
with ΔW as its weight (`gradient_norms.responses`). The latter is the same for all columns, so that a batch costs a
forward pass, a backward pass for each column, and a layer's forward pass for each layer and bit width.

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
from tracequant.core.settings import WeightGrid
from tracequant.curvature import gradient_norms
from tracequant.curvature.batch_loop import collect
from tracequant.curvature.microbatch import Microbatch
from tracequant.curvature.output_hessian import Factored
from tracequant.curvature.parts import Part, together
from tracequant.curvature.passes import Passes
from tracequant.curvature.sweep import Sweep
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import Precision
from tracequant.model.hooks import idle_layers, weight_parameter
from tracequant.model.task import Task
from tracequant.quantization.calibrate import activation_options, calibrate
from tracequant.quantization.grid import Grid, check_bits, choose_weight_grid

# The most backward passes that a batch gets by default: as many random vectors, or all columns.
DEFAULT_PROBES = 16


def measure_perturbation(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    *,
    weight_bits: Sequence[int] = (2, 3, 4, 8),
    weight_grid: WeightGrid | None = None,
    activation_bits: Sequence[int] = (),
    num_probes: int | Literal["exact"] | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> Perturbation:
    """First- and second-order terms of the loss for the rounding of every layer of `points` at `weight_bits`.

    And of every activation at `activation_bits` (the model's input at 8 bits only), with ranges chosen on `batches`.

    `batches` are labelled samples. `num_probes` random vectors stand for the columns of L, "exact" takes all of them,
    and None all where the outputs have at most 16 elements for each sample, else 16 probes. The second-order term is
    the Gauss-Newton one. For each layer alone it equals the Hessian's where `estimate_curvature` finds that its traces
    are; between two layers, and in networks that bend, it leaves out the outputs' own second derivatives. `checkpoint`
    and `precision` are those of `collect`; memory grows with the number of bit widths. The model is left as it was.

    Raises `ModelError` naming layers that the loss does not depend on, for bits outside 1 to 8, and where samples
    cannot be separated.
    """
    if num_probes is not None and num_probes != "exact" and (not isinstance(num_probes, int) or num_probes < 1):
        raise ModelError(f"num_probes must be a whole number from 1, 'exact' or None, got {num_probes!r}")
    widths = tuple(sorted(set(weight_bits)))
    if not widths:
        raise ModelError("weight_bits is empty; name at least one bit width from 1 to 8")
    for num_bits in (*widths, *activation_bits):
        check_bits(num_bits)
    grids: dict[str, dict[int, Grid]] = {}
    if activation_bits:
        batches = reusable(batches)
        options = activation_options(points, activation_bits)
        grids = calibrate(model, batches, task, points, bits=options, progress=progress)
    estimator = _Perturbations(
        model,
        task,
        points,
        weight_bits=widths,
        weight_grid=weight_grid or WeightGrid(),
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
        weight_grid: WeightGrid,
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
        self._widths, self._grid, self._activation_grids = weight_bits, weight_grid, activation_grids
        self._choose = num_probes is None
        # The pass itself keeps 2. Every layer's response and every activation's rounding come on top, for each width.
        self.memory = 2.0 + len(weight_bits) + max((len(own) for own in activation_grids.values()), default=0)

    def settings(self) -> dict[str, Any]:
        return {
            "estimator": "perturbation",
            "num_probes": "chosen" if self._choose else "exact" if self._exact else self.num_probes,
            "seed": self._seed,
            "model": self._points.fingerprint,
            "layers": [layer.name for layer in self._points.layers],
            "bits": self._widths,
            "activation_grids": [[_values(grid) for grid in own.values()] for own in self._activation_grids.values()],
            "grid": [self._grid.per_channel, self._grid.symmetric, self._grid.range],
        }

    def prepare(self) -> None:
        super().prepare()
        self._moves: dict[str, list[Tensor]] = {}
        for layer in self._points.layers:
            weight = weight_parameter(self._model, layer).detach()
            grids = (choose_weight_grid(weight, b, layer.channel_axis, self._grid) for b in self._widths)
            self._moves[layer.name] = [grid.round(weight) - weight for grid in grids]

    def measure(self, microbatch: Microbatch, probes: Sequence[int]) -> Part:
        """Sums over the microbatch's samples, in units of the batch's mean loss times its size."""
        sweep, hessian, loss, variables = self.open(microbatch)
        names = list(self._parameters)
        parameters = list(self._parameters.values())
        moved = self._moved(sweep, variables)
        targets = [*parameters, *(move.tensor for move in moved)]
        found = torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
        slopes, activation_slopes = found[: len(parameters)], found[len(parameters) :]
        if idle := [name for name, slope in zip(names, slopes, strict=True) if slope is None]:
            raise idle_layers(idle)
        first = [
            (slope.to_dense() if slope.is_sparse else slope).double().mul(move).sum()
            for name, slope in zip(names, slopes, strict=True)
            if slope is not None
            for move in self._moves[name]
        ]
        exact = self._exact or (self._choose and _few_columns(hessian))
        # A process that is given some of the probes, and takes all columns instead, has the others' share as well.
        share = len(probes) / self.num_probes if exact else 1 / self.num_probes
        passes = (
            ((0, column) for column in hessian.columns())
            if exact
            else self.cotangents(hessian, microbatch.index, probes)
        )
        products: Tensor | None = None
        second = {name: torch.zeros(len(own), dtype=torch.float64) for name, own in self._activation_grids.items()}
        seen: dict[str, list[Tensor]] = {}
        for _, (vectors, sign) in passes:
            calls, gradients = sweep.collect_with(vectors, [move.tensor for move in moved])
            inner = self._inner_products(sweep, vectors, calls, seen)
            product = sign * share * inner.T @ inner
            products = product if products is None else products + product
            for name, own in _activation_products(sweep, moved, gradients).items():
                second[name] += (0.5 * sign * share * own.square().sum(0)).cpu()
        assert products is not None
        slope = {name: torch.zeros_like(values) for name, values in second.items()}
        for name, own in _activation_products(sweep, moved, activation_slopes).items():
            slope[name] += own.sum(0).cpu()
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
            (text, *self.notes(sweep, hessian)),
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

    def _moved(self, sweep: Sweep, variables: dict[str, list[Tensor]]) -> list[_Move]:
        """The activations of a batch that are to be rounded, and where to."""
        found = []
        for name, tensors in variables.items():
            for tensor in tensors if name in self._activation_grids else ():
                values = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
                moves = [sweep.by_sample(name, g.round(values) - values) for g in self._activation_grids[name].values()]
                found.append(_Move(name, tensor, torch.stack(moves, 1)))
        return found

    def _inner_products(
        self,
        sweep: Sweep,
        vectors: list[Tensor],
        calls: dict[str, list[gradient_norms.Call]],
        seen: dict[str, list[Tensor]],
    ) -> Tensor:
        """u_n · ΔW of every layer and width, float64 `[samples, layers · widths]`; `seen` keeps the responses."""
        slow = {layer.name for layer in sweep.slow}
        columns = []
        for name, moves in self._moves.items():
            if name in slow:
                own = sweep.slow_gradients(name, vectors, keep=True)
                columns.append(torch.stack([torch.stack([(g * move).double().sum() for move in moves]) for g in own]))
                continue
            total = torch.zeros(sweep.samples, len(moves), dtype=torch.float64, device=vectors[0].device)
            for number, (a, d) in enumerate(calls.get(name, [])):
                kept = seen.setdefault(name, [])
                if number == len(kept):
                    found = gradient_norms.responses(sweep.module(name), (a, d), moves)
                    kept.append(torch.stack([x.reshape(sweep.samples, -1) for x in found], 1))
                gradient = d.to(kept[number].dtype).reshape(sweep.samples, -1, 1)
                total += torch.matmul(kept[number], gradient)[:, :, 0].double()
            columns.append(total)
        return torch.cat(columns, 1)


@dataclass(frozen=True)
class _Move:
    """A tensor that consumers of an activation point read, and its rounding `[samples, widths, elements]`."""

    name: str
    tensor: Tensor
    moves: Tensor


def _activation_products(sweep: Sweep, moved: Sequence[_Move], gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """u_n · Δa_n by activation, float64 `[samples, widths]`; several tensors of a point move together."""
    products: dict[str, Tensor] = {}
    for move, gradient in zip(moved, gradients, strict=True):
        if gradient is not None:
            rows = sweep.by_sample(move.name, gradient).to(move.moves.dtype)
            product = torch.matmul(move.moves, rows[:, :, None])[:, :, 0].double()
            products[move.name] = products.get(move.name, 0) + product
    return products


def _values(grid: Grid) -> list[Any]:
    """What decides a grid, for a checkpoint's key; to five digits, because a GPU's sums differ in the last ones."""
    return [grid.num_bits, *(f"{x:.5g}" for part in (grid.scale, grid.zero_point) for x in part.flatten().tolist())]


def _few_columns(hessian: Factored) -> bool:
    """Whether all columns of the factor are no more passes than the probes would be."""
    return all(tensor.ndim <= 2 for tensor in hessian.tensors) and (
        sum(tensor[0].numel() for tensor in hessian.tensors) <= DEFAULT_PROBES
    )
