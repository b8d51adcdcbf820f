"""Every layer's weight on its grid, at every bit width: what sensitivities price is what conversion uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tracequant.core.errors import ModelError
from tracequant.core.points import Layer, QuantizationPoints
from tracequant.core.progress import track
from tracequant.core.weight_grid import WeightGrid
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import model_device
from tracequant.model.hooks import weight_parameter
from tracequant.model.task import Task
from tracequant.quantization.compensate import Piece, compensate
from tracequant.quantization.grid import check_bits, choose_weight_grid
from tracequant.quantization.input_gram import InputGram, input_grams
from tracequant.quantization.rounded_store import RoundedWeight, Store

# Bytes of all Grams that are held at a time. The layers of a larger model take several passes over the inputs.
GRAM_BYTES = 1 << 30


@dataclass(frozen=True)
class RoundedWeights:
    """Rounded weights by layer and bit width, those of one model and one `weight_grid`."""

    points: QuantizationPoints
    weight_grid: WeightGrid
    layers: dict[str, dict[int, RoundedWeight]]

    def covers(self, fingerprint: str, bits: Mapping[str, Sequence[int]], weight_grid: WeightGrid) -> bool:
        """Whether all of these are here, for the model of this fingerprint."""
        return (
            self.points.fingerprint == fingerprint
            and self.weight_grid == weight_grid
            and all(set(widths) <= self.layers.get(name, {}).keys() for name, widths in bits.items())
        )

    @property
    def errors(self) -> dict[str, dict[int, float]]:
        """What a layer's average trace is multiplied with in Ω: the `output_error` of every layer at every width.

        For rounding to the nearest it is ‖Ŵ − W‖², as in Eq. 10.
        """
        return {
            name: {num_bits: weight.output_error for num_bits, weight in widths.items()}
            for name, widths in self.layers.items()
        }


def round_weights(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    bits: Mapping[str, Sequence[int]],
    *,
    weight_grid: WeightGrid | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> RoundedWeights:
    """The weights of the layers of `bits` at these widths, rounded as `weight_grid` says.

    "gptq" reads the inputs of layers in the float model on `batches`, which need no labels: one forward pass, or more
    where the Grams of all layers together take more than `GRAM_BYTES`. What it returns for a layer and a width does not
    depend on other layers and widths. `cache` is a folder in which every layer is saved as soon as it is rounded, so
    that an interrupted call resumes where it stopped, with the same codes.

    Raises `ModelError` for widths outside 1 to 8, and for weights or inputs of a layer that are not finite.
    """
    settings = weight_grid or WeightGrid()
    layers = [points.by_name[name] for name in bits]
    for layer in layers:
        for num_bits in bits[layer.name]:
            check_bits(num_bits)
        if not torch.isfinite(weight_parameter(model, layer)).all():
            raise ModelError(f"layer {layer.name} holds weights that are NaN or infinite")
    widths = {name: sorted(set(own)) for name, own in bits.items()}
    rounded: dict[str, dict[int, RoundedWeight]]
    if settings.rounding == "nearest":
        rounded = {
            layer.name: {
                b: _nearest(weight_parameter(model, layer).detach(), b, layer, settings) for b in widths[layer.name]
            }
            for layer in layers
        }
        return RoundedWeights(points, settings, rounded)
    batches = reusable(batches)
    store = Store(cache, points, settings, batches)
    rounded = {layer.name: store.load(layer.name, model_device(model)) for layer in layers}
    missing = {name: [b for b in own if b not in rounded[name]] for name, own in widths.items()}
    for group in _groups([layer for layer in layers if missing[layer.name]]):
        grams = input_grams(model, batches, task, replace(points, layers=tuple(group)), progress=progress)
        for layer in track(group, "Rounding", progress):
            weight = weight_parameter(model, layer).detach()
            new = _compensated(weight, grams.pop(layer.name, ()), missing[layer.name], layer, settings)
            rounded[layer.name] |= new
            store.save(layer.name, rounded[layer.name])
    return RoundedWeights(points, settings, {name: {b: rounded[name][b] for b in own} for name, own in widths.items()})


def _nearest(weight: Tensor, num_bits: int, layer: Layer, settings: WeightGrid) -> RoundedWeight:
    grid = choose_weight_grid(weight, num_bits, layer.channel_axis, settings)
    codes = grid.quantize(weight)
    error = _squared(grid.dequantize(codes) - weight)
    return RoundedWeight(codes.to(torch.uint8), grid, error, error)


def _compensated(
    weight: Tensor, grams: Sequence[InputGram], bits: Sequence[int], layer: Layer, settings: WeightGrid
) -> dict[int, RoundedWeight]:
    if not grams:
        return {b: _nearest(weight, b, layer, settings) for b in bits}
    pieces = [Piece.of(gram, weight.dtype) for gram in grams]
    # The mean square of an input, over all of the weight's elements; those of no piece have the others'.
    squares = [(gram.gram.diagonal(dim1=-2, dim2=-1).double().mean(), gram.positions.numel()) for gram in grams]
    covered = sum(count for _, count in squares)
    mean = float(sum(float(square) * count for square, count in squares) / covered)
    inside = torch.cat([piece.positions.flatten() for piece in pieces])
    result = {}
    for num_bits in bits:
        codes, grid = compensate(weight, pieces, num_bits, layer.channel_axis, settings)
        change = grid.dequantize(codes) - weight
        error = _squared(change)
        outside = error - _squared(change.flatten()[inside])
        output_error = outside + sum(piece.output_error(change) for piece in pieces) / mean if mean > 0 else error
        result[num_bits] = RoundedWeight(codes.to(torch.uint8), grid, error, output_error)
    return result


def _groups(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Consecutive layers whose Grams fit into `GRAM_BYTES` together."""
    group: list[Layer] = []
    used = 0
    for layer in layers:
        size = 4 * (layer.numel // layer.channels) ** 2
        if group and used + size > GRAM_BYTES:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield group


def _squared(values: Tensor) -> float:
    return float(values.double().square().sum())
