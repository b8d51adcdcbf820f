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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracequant.curvature import gradient_norms
from tracequant.curvature.collect import Part, collect, together
from tracequant.curvature.gauss_newton import Passes, Sweep
from tracequant.curvature.output_hessian import Factored
from tracequant.curvature.pieces import Piece, Precision
from tracequant.curvature.result import Perturbation
from tracequant.errors import ModelError
from tracequant.layers import idle_layers, weight_parameter
from tracequant.points import QuantizationPoints
from tracequant.quantizer import check_bits, choose_weight_grid
from tracequant.settings import WeightGrid
from tracequant.task import Batches, Task

# Backward passes that a batch is given at most unless told otherwise: as many random vectors, or all columns.
DEFAULT_DRAWS = 16


def measure_perturbation(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    weight_bits: Sequence[int] = (2, 3, 4, 8),
    weight_grid: WeightGrid | None = None,
    draws: int | Literal["exact"] | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> Perturbation:
    """First- and second-order terms of the loss for the rounding of every layer of `points` at `weight_bits`.

    `batches` are labelled samples. `draws` random vectors stand for the columns of L, "exact" takes all of them, and
    None all where the outputs have at most 16 elements for each sample, else 16 draws. The second-order term is the
    Gauss-Newton one: equal to the Hessian's for each layer alone where `estimate_curvature` finds that its traces are;
    between two layers, and in networks that bend, it leaves out the outputs' own second derivatives. `checkpoint` and
    `precision` are those of `collect`; memory grows with the number of bit widths. The model is left as it was.

    Raises `ModelError` naming layers that the loss does not depend on, for bits outside 1 to 8, and where samples
    cannot be told apart.
    """
    if draws is not None and draws != "exact" and (not isinstance(draws, int) or draws < 1):
        raise ModelError(f"draws must be a whole number from 1, 'exact' or None, got {draws!r}")
    widths = tuple(sorted(set(weight_bits)))
    if not widths:
        raise ModelError("weight_bits is empty; name at least one bit width from 1 to 8")
    for num_bits in widths:
        check_bits(num_bits)
    estimator = _Perturbations(model, task, points, widths, weight_grid or WeightGrid(), draws, seed)
    return collect(estimator, model, batches, task, checkpoint, None, precision, progress)


class _Perturbations(Passes):
    label = "Perturbations"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        points: QuantizationPoints,
        weight_bits: tuple[int, ...],
        weight_grid: WeightGrid,
        draws: int | Literal["exact"] | None,
        seed: int,
    ) -> None:
        super().__init__(model, task, replace(points, activations=()), draws or DEFAULT_DRAWS, seed, False)
        self._all_points, self._widths, self._grid = points, weight_bits, weight_grid
        self._choose = draws is None
        # What every layer makes of its input, once for each width, beside what the pass itself keeps.
        self.memory = 2.0 + len(weight_bits)

    def settings(self) -> dict[str, Any]:
        return {
            "method": "perturbation",
            "draws": "chosen" if self._choose else "exact" if self._exact else self.draws,
            "seed": self._seed,
            "model": self._points.fingerprint,
            "layers": [layer.name for layer in self._points.layers],
            "bits": self._widths,
            "grid": [self._grid.per_channel, self._grid.symmetric, self._grid.range],
        }

    def prepare(self) -> None:
        super().prepare()
        self._moves: dict[str, list[Tensor]] = {}
        for layer in self._points.layers:
            weight = weight_parameter(self._model, layer).detach()
            grids = (choose_weight_grid(weight, b, layer.channel_axis, self._grid) for b in self._widths)
            self._moves[layer.name] = [grid.round(weight) - weight for grid in grids]

    def measure(self, piece: Piece, draws: Sequence[int]) -> Part:
        """Sums over the piece's samples, in units of the batch's mean loss times its size."""
        sweep, hessian, loss, _ = self.open(piece)
        names = list(self._parameters)
        parameters = list(self._parameters.values())
        slopes = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if idle := [name for name, slope in zip(names, slopes, strict=True) if slope is None]:
            raise idle_layers(idle)
        first = [
            (slope.to_dense() if slope.is_sparse else slope).double().mul(move).sum()
            for name, slope in zip(names, slopes, strict=True)
            if slope is not None
            for move in self._moves[name]
        ]
        exact = self._exact or (self._choose and _few_columns(hessian))
        # A process that is given some of the draws, and takes all columns instead, has the others' share as well.
        share = len(draws) / self.draws if exact else 1 / self.draws
        passes = (
            ((0, column) for column in hessian.columns()) if exact else self.cotangents(hessian, piece.index, draws)
        )
        products: Tensor | None = None
        seen: dict[str, list[Tensor]] = {}
        for _, (vectors, sign) in passes:
            inner = self._inner_products(sweep, vectors, seen)
            product = sign * share * inner.T @ inner
            products = product if products is None else products + product
        assert products is not None
        text = "exact sum over outputs" if exact else f"{self.draws} draws for each sample"
        return Part(
            piece.samples,
            {
                "first": torch.stack(first)[None].cpu() * piece.size,
                "products": products.cpu() * piece.size,
            },
            {},
            (text, *self.notes(sweep, hessian)),
        )

    def add(self, parts: Sequence[Part]) -> Part:
        """Pieces are further samples, and all values sums over them."""
        values = {name: torch.stack([part.values[name] for part in parts]).sum(0) for name in parts[0].values}
        return together(parts, values)

    def summarize(self, parts: Sequence[Part]) -> Perturbation:
        size = len(self._parameters) * len(self._widths)
        # Where several processes shared a batch's draws, each has its rows: the first term of them all is the same.
        whole = self.add(
            [
                replace(
                    part,
                    values={
                        "first": part.values["first"][0],
                        "products": part.values["products"].view(-1, size, size).sum(0),
                    },
                )
                for part in parts
            ]
        )
        means = {name: (values / whole.samples).tolist() for name, values in whole.values.items()}
        return Perturbation(
            points=self._all_points,
            weight_bits=self._widths,
            weight_grid=self._grid,
            first_order=tuple(means["first"]),
            products=tuple(tuple(row[: i + 1]) for i, row in enumerate(means["products"])),
            samples=whole.samples,
            reason=", ".join(whole.notes),
        )

    def _inner_products(self, sweep: Sweep, vectors: list[Tensor], seen: dict[str, list[Tensor]]) -> Tensor:
        """u_n · ΔW of every layer and width, float64 `[samples, layers · widths]`; `seen` keeps the responses."""
        calls = sweep.collect(vectors)
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


def _few_columns(hessian: Factored) -> bool:
    """Whether all columns of the factor are no more passes than the draws would be."""
    return all(tensor.ndim <= 2 for tensor in hessian.tensors) and (
        sum(tensor[0].numel() for tensor in hessian.tensors) <= DEFAULT_DRAWS
    )
