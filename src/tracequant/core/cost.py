"""What a choice of bits costs: bytes on disk, weight bits, bit operations. Plain Python, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tracequant.core.packed_layout import DTYPE_BYTES, PackedWeight, layout_of_plan
from tracequant.core.points import Layer, QuantizationPoints
from tracequant.core.settings import Latency
from tracequant.core.weight_grid import WeightGrid

FLOAT_BITS = 32
# What stays in float is told where it has more than this share of the parameters, and of it the largest tensors are
# named, so many, if each has more than a hundredth.
TOLD_SHARE, NAMED_SHARE, NAMED_TENSORS = 0.05, 0.01, 4
_FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ModelSize:
    """The whole model that a plan is for.

    `float_bytes` are those of its state with the quantized layers in float32. `parameters` counts every number in
    floating point in its state, BatchNorm's statistics included, and `quantized` those that a plan gives bits to.
    `largest_float` are the largest tensors that are not quantized, in order, of `float_tensors`, with their elements.
    """

    float_bytes: int
    parameters: int
    quantized: int
    float_tensors: int = 0
    largest_float: dict[str, int] = field(default_factory=dict)

    @property
    def quantized_share(self) -> float:
        """Share of the parameters that are quantized."""
        return self.quantized / self.parameters

    @property
    def in_float(self) -> str:
        """What stays in float, largest first, each with its share of the parameters; "" where that is little."""
        if 1 - self.quantized_share <= TOLD_SHARE:
            return ""
        shares = {name: count / self.parameters for name, count in self.largest_float.items()}
        shares = {name: share for name, share in shares.items() if share > NAMED_SHARE}
        names = [f"{name} {share:.1%}" for name, share in shares.items()]
        if others := self.float_tensors - len(names):
            share = 1 - self.quantized_share - sum(shares.values())
            names.append(f"{others} {'more' if names else 'small'} tensors {share:.1%}")
        return f"In float: {1 - self.quantized_share:.1%} of the parameters ({', '.join(names)})"


def model_size(points: QuantizationPoints) -> ModelSize | None:
    """The size of the model that the points are of; None for a table without a model."""
    if not points.has_layout:
        return None
    floats = {t.name: math.prod(t.shape) for t in points.float_tensors if t.dtype in _FLOATING}
    quantized = weight_count(points)
    return ModelSize(
        float_bytes=float_bytes(points),
        parameters=quantized + sum(floats.values()),
        quantized=quantized,
        float_tensors=len(floats),
        largest_float=dict(sorted(floats.items(), key=lambda item: -item[1])[:NAMED_TENSORS]),
    )


def change_of_size(before: int, after: int) -> str:
    """By how much a file of `after` bytes is smaller than one of `before`, in words.

    >>> [change_of_size(1000, 125), change_of_size(1000, 930), change_of_size(1000, 1021)]
    ['8.00 times smaller', '7.0% smaller', '2.1% larger']
    """
    if before >= 2 * after:
        return f"{before / after:.2f} times smaller"
    return f"{abs(1 - after / before):.1%} {'smaller' if after <= before else 'larger'}"


def size_bytes(
    points: QuantizationPoints, weight_bits: dict[str, int], activation_bits: dict[str, int], grid: WeightGrid
) -> int:
    """Exact size in bytes of the packed file: codes, scales, zero points, all other tensors, and the header.

    Of a table without a model only the codes are known, and they are what counts: parameters times bits / 8.
    """
    if not points.has_layout:
        return sum(code_bytes(layer, weight_bits[layer.name], grid) for layer in points.layers)
    return layout_of_plan(points, weight_bits, activation_bits, grid.per_channel, grid.symmetric).file_bytes()


def code_bytes(layer: Layer, num_bits: int, grid: WeightGrid) -> int:
    """Bytes of one layer's codes, rows padded to 32 bits: the part of the file that a choice of bits changes.

    Without a file layout (`Layer.sites` empty) parameters times bits / 8, rounded up.
    """
    if not layer.sites:
        return -(-layer.numel * num_bits // 8)
    axis = layer.channel_axis if grid.per_channel else None
    return PackedWeight(layer.name, layer.sites, layer.shape, num_bits, axis, grid.symmetric).code_bytes


def weight_bits_total(points: QuantizationPoints, weight_bits: dict[str, int]) -> int:
    """Bits of all quantized weights, the paper's accounting: no scales, no padding."""
    return sum(layer.numel * weight_bits[layer.name] for layer in points.layers)


def weight_count(points: QuantizationPoints) -> int:
    """Number of weights in the quantized layers."""
    return sum(layer.numel for layer in points.layers)


def bit_operations(points: QuantizationPoints, weight_bits: dict[str, int], activation_bits: dict[str, int]) -> int:
    """BOPs for one sample: multiply-accumulates times weight bits times activation bits, 32 where a side is float."""
    return sum(
        layer.macs * weight_bits.get(layer.name, FLOAT_BITS) * activation_bits.get(layer.activation or "", FLOAT_BITS)
        for layer in points.layers
    )


def average_activation_bits(points: QuantizationPoints, activation_bits: dict[str, int]) -> float:
    """Bits for each element of the quantized activations, on average over one sample; 32 where none is quantized."""
    chosen = [point for point in points.activations if point.name in activation_bits]
    total = sum(point.numel for point in chosen)
    if not total:
        return float(FLOAT_BITS)
    return sum(point.numel * activation_bits[point.name] for point in chosen) / total


def peak_activation_bytes(points: QuantizationPoints, activation_bits: dict[str, int]) -> float:
    """Bytes of the largest tensor that a layer reads, for one sample, each at its bits (32 where it is float).

    Which tensors live at the same time depends on the runtime; this one any runtime must hold whole.
    """
    return max(
        (point.numel * activation_bits.get(point.name, FLOAT_BITS) / 8 for point in points.activations), default=0.0
    )


def latency_ms(
    points: QuantizationPoints, weight_bits: dict[str, int], activation_bits: dict[str, int], table: Latency
) -> float:
    """Sum over layers of a table's milliseconds at the bits of weight and input (32 for an input in float)."""
    return math.fsum(
        table[layer.name][weight_bits[layer.name]][activation_bits.get(layer.activation or "", FLOAT_BITS)]
        for layer in points.layers
    )


def float_bytes(points: QuantizationPoints) -> int:
    """Bytes of the float model's tensors: the quantized layers in float32, everything else as it is."""
    rest = sum(DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape) for tensor in points.float_tensors)
    return 4 * weight_count(points) + rest
