"""Where every byte of a packed file lies, known before any weight is quantized. Plain Python, no torch.

`cost.size_bytes` promises a file size from this layout and `export.packed` writes the file by it, so promise and file
agree to the byte. The format is a safetensors file of at most one tensor per kind of content:

    codes          uint8, all layers one after the other; each row (one output channel) holds its codes of k bits,
                   least significant bit first, padded to 32 bits
    scales         float32, one per channel (or one per tensor) of every layer, then one per quantized activation, then
                   one per rounded output
    zero_points    uint8, likewise, only of what is asymmetric
    float32, ...   every tensor that is not quantized, concatenated by dtype

and a manifest in the header that gives names, shapes and bits in the same order, and a checksum of the file. One tensor
per kind instead of one per layer keeps the header of a small network small: five entries, not five per BatchNorm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tracequant.core.points import QuantizationPoints

FORMAT_NAME = "tracequant-packed"
# Version 1 had no checksum, version 2 no rounded outputs.
FORMAT_VERSION = 3
# Holds the place of the checksum while the file is made, and while the checksum is computed.
BLANK_DIGEST = "0" * 64

# safetensors' names of the dtypes that a state dict may hold.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight: the (module, parameter) pairs that hold it, shape, bits, and the axis of its scales."""

    name: str
    sites: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    num_bits: int
    axis: int | None
    symmetric: bool

    @property
    def rows(self) -> int:
        """Number of scales: channels, or 1 for a tensor with a single scale."""
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def row_length(self) -> int:
        """Number of codes in a row."""
        return math.prod(self.shape) // max(self.rows, 1)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of codes, padded to 32 bits."""
        return 4 * -(-self.row_length * self.num_bits // 32)

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class PackedActivation:
    """A quantized activation: the modules that read it and its bits; scale and zero point are stored, one each."""

    consumers: tuple[str, ...]
    num_bits: int


@dataclass(frozen=True)
class PackedLayout:
    """Everything that is in a packed file, in order; `outputs` are the modules whose output is rounded to 8 bits."""

    weights: tuple[PackedWeight, ...]
    activations: tuple[PackedActivation, ...]
    outputs: tuple[str, ...]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]

    def sections(self) -> dict[str, tuple[str, int]]:
        """Name of each tensor in the file → (dtype, number of elements); empty ones are left out."""
        others = len(self.activations) + len(self.outputs)
        scales = sum(weight.rows for weight in self.weights) + others
        zero_points = sum(w.rows for w in self.weights if not w.symmetric) + others
        sections = {
            "codes": ("U8", sum(weight.code_bytes for weight in self.weights)),
            "scales": ("F32", scales),
            "zero_points": ("U8", zero_points),
        }
        for _, dtype, shape in self.tensors:
            name = f"tensors.{dtype}"
            sections[name] = (dtype, sections.get(name, (dtype, 0))[1] + math.prod(shape))
        return {name: section for name, section in sections.items() if section[1] > 0}

    def payload_bytes(self) -> int:
        """Bytes of all tensors in the file, without the header."""
        return sum(DTYPE_BYTES[dtype] * count for dtype, count in self.sections().values())

    def manifest(self) -> str:
        """The JSON text that names what the sections hold."""
        weights = [[w.name, sites_field(w), list(w.shape), w.num_bits, w.axis, int(w.symmetric)] for w in self.weights]
        activations = [[*a.consumers, a.num_bits] for a in self.activations]
        tensors: dict[str, list[object]] = {}
        for name, dtype, shape in self.tensors:
            tensors.setdefault(dtype, []).append([name, *shape])
        return _compact({
            "format": FORMAT_NAME, "version": FORMAT_VERSION, "sha256": BLANK_DIGEST,
            "weights": weights, "activations": activations, "outputs": self.outputs, "tensors": tensors,
        })  # fmt: skip

    def header_bytes(self) -> int:
        """Bytes of the header, its 8 length bytes included, the same for every choice of bits.

        Bits are one digit each, so only the lengths and offsets of sections vary in width; room is kept for the widest
        that 8 bits everywhere could need, and the packer fills the difference with spaces
        after the manifest.
        """
        widest = replace(self, weights=tuple(replace(weight, num_bits=8) for weight in self.weights))
        end = widest.payload_bytes()
        entries: dict[str, object] = {"__metadata__": {"tracequant": self.manifest()}}
        for name, (dtype, count) in widest.sections().items():
            entries[name] = {"dtype": dtype, "shape": [count], "data_offsets": [end, end]}
        length = len(_compact(entries).encode())
        return 8 + length + (-length) % 8

    def file_bytes(self) -> int:
        """Exact size of the packed file."""
        return self.header_bytes() + self.payload_bytes()


def symmetric_zero_point(num_bits: int) -> float:
    """The zero point of a symmetric grid, in units of its scale.

    >>> [symmetric_zero_point(k) for k in (1, 2, 3, 8)]
    [0.5, 1.5, 4.0, 128.0]
    """
    return (2**num_bits - 1) / 2 if num_bits <= 2 else float(2 ** (num_bits - 1))


def state_name(site: Sequence[str]) -> str:
    """The name in a float model's state dict of the parameter at a (module, parameter) site."""
    return ".".join(filter(None, site))


def sites_field(weight: PackedWeight) -> list[list[str]]:
    """The sites of a weight as the manifest gives them: left out where the layer's name says it all."""
    if weight.sites == ((weight.name, "weight"),):
        return []
    return [list(site) for site in weight.sites]


def layout_of_plan(
    points: QuantizationPoints,
    weight_bits: dict[str, int],
    activation_bits: dict[str, int],
    per_channel: bool,
    symmetric: bool,
) -> PackedLayout:
    """The layout of the file that a plan for `points` will be packed into."""
    weights = tuple(
        PackedWeight(
            layer.name,
            layer.sites,
            layer.shape,
            weight_bits[layer.name],
            layer.channel_axis if per_channel else None,
            symmetric,
        )
        for layer in points.layers
    )
    activations = tuple(
        PackedActivation(point.consumers, activation_bits[point.name])
        for point in points.activations
        if point.name in activation_bits
    )
    tensors = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in points.float_tensors)
    outputs = tuple(point.module for point in points.rounded_outputs(activation_bits))
    return PackedLayout(weights, activations, outputs, tensors)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
