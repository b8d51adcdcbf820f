"""Every layer's weight on its grid, at every bit width: what sensitivities price is what conversion uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tracequant.core.errors import ModelError
from tracequant.core.points import Layer, QuantizationPoints
from tracequant.core.progress import track
from tracequant.core.weight_grid import WeightGrid
from tracequant.model.batches import Batches
from tracequant.model.device import measuring
from tracequant.model.hooks import weight_parameter
from tracequant.model.task import Task
from tracequant.quantization.compensate import Piece, compensate
from tracequant.quantization.grid import Grid, check_bits, choose_weight_grid
from tracequant.quantization.input_gram import InputGram, input_grams

# Bytes of all Grams that are held at a time. The layers of a larger model take several passes over the inputs.
GRAM_BYTES = 1 << 30


@dataclass(frozen=True)
class RoundedWeight:
    """A weight's codes, uint8 of its shape, and the grid that they belong to.

    `squared_error` is ‖Ŵ − W‖². `output_error` is the same with every element weighted by what it is multiplied with:
    the mean squared change of the layer's outputs over the mean square of its inputs. The two are equal for inputs that
    are uncorrelated and of one size, and where the inputs are not known.
    """

    codes: Tensor
    grid: Grid
    squared_error: float
    output_error: float

    @property
    def values(self) -> Tensor:
        """The weight that the codes stand for."""
        return self.grid.dequantize(self.codes.to(self.grid.scale.dtype))


# Layer → bits → rounded weight.
RoundedWeights = dict[str, dict[int, RoundedWeight]]


def round_weights(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    bits: Mapping[str, Sequence[int]],
    weight_grid: WeightGrid,
    *,
    progress: bool = False,
) -> RoundedWeights:
    """The weights of the layers of `bits` at these widths, rounded as `weight_grid` says.

    "gptq" reads the inputs of layers in the float model on `batches`, which need no labels: one forward pass, or more
    where the Grams of all layers together take more than `GRAM_BYTES`. What it returns for a layer and a width does not
    depend on other layers and widths.

    Raises `ModelError` for widths outside 1 to 8, and for weights or inputs of a layer that are not finite.
    """
    layers = [points.by_name[name] for name in bits]
    for layer in layers:
        for num_bits in bits[layer.name]:
            check_bits(num_bits)
        if not torch.isfinite(weight_parameter(model, layer)).all():
            raise ModelError(f"layer {layer.name} holds weights that are NaN or infinite")
    if weight_grid.rounding == "nearest":
        return {
            layer.name: {
                b: _nearest(weight_parameter(model, layer).detach(), b, layer, weight_grid) for b in bits[layer.name]
            }
            for layer in layers
        }
    rounded: RoundedWeights = {}
    for group in _groups(layers):
        some = replace(points, layers=tuple(group))
        grams = input_grams(model, batches, task, some, progress=progress)
        for layer in track(group, "Rounding", progress):
            weight = weight_parameter(model, layer).detach()
            rounded[layer.name] = _compensated(weight, grams.pop(layer.name, ()), bits[layer.name], layer, weight_grid)
    return {name: rounded[name] for name in bits}


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
    result = {}
    for num_bits in bits:
        codes, grid = compensate(weight, pieces, num_bits, layer.channel_axis, settings)
        change = grid.dequantize(codes) - weight
        error = _squared(change)
        left = change.flatten()
        inside = torch.cat([piece.positions.flatten() for piece in pieces])
        outside = error - _squared(left[inside])
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
