"""Reading packed files without torch: numpy and safetensors only (format in docs/packed-format.md).

    from tracequant.packed import read_packed

    file = read_packed("model.safetensors")
    for weight in file.weights():
        print(weight.entry.name, weight.entry.num_bits, weight.dequantize().shape)

A file is checked before anything in it is used: safetensors checks that the sections lie side by side in the file, the
SHA-256 that no byte has changed, and the manifest must describe exactly what is there. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from tracequant.core.errors import ArtifactError
from tracequant.core.packed_layout import (
    BLANK_DIGEST,
    DTYPE_BYTES,
    FORMAT_NAME,
    FORMAT_VERSION,
    PackedActivation,
    PackedLayout,
    PackedWeight,
    state_name,
    symmetric_zero_point,
)
from tracequant.core.points import OUTPUT_BITS

# Little-endian, whatever the machine; bfloat16, which numpy does not have, is widened to float32.
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip
# What any numpy can hold: dimensions of an array, and elements without an overflow in its arithmetic.
_MOST_DIMENSIONS = 32
_MOST_ELEMENTS = 2**48


@dataclass(frozen=True)
class WeightValues:
    """A quantized weight: codes of the weight's shape, and the float32 scale and zero point that broadcast to it."""

    entry: PackedWeight
    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """The weight in float32, the very values that the quantized model computes with."""
        return (self.codes.astype(np.float32) - self.zero_point) * self.scale


@dataclass(frozen=True)
class ActivationValues:
    """A quantized activation: its scale, and the code that stands for zero."""

    entry: PackedActivation
    scale: float
    zero_point: int


@dataclass(frozen=True)
class OutputValues:
    """A rounded output: the module that returns it, its scale, and the code that stands for zero."""

    module: str
    scale: float
    zero_point: int


@dataclass(frozen=True)
class PackedFile:
    """A packed file's layout and its sections as raw bytes, checked against each other."""

    layout: PackedLayout
    sections: dict[str, NDArray[np.uint8]]
    file_bytes: int

    def weights(self) -> Iterator[WeightValues]:
        """Each quantized weight, in the order of the file."""
        byte = row = zero = 0
        scales, zero_points = self._section("scales").view("<f4"), self._section("zero_points")
        for weight in self.layout.weights:
            packed = self.sections["codes"][byte : byte + weight.code_bytes].reshape(weight.rows, weight.row_bytes)
            byte += weight.code_bytes
            shape = [1] * len(weight.shape)
            if weight.axis is not None:
                shape[weight.axis] = weight.rows
            if weight.symmetric:
                zero_point = np.full(shape, symmetric_zero_point(weight.num_bits), np.float32)
            else:
                zero_point = zero_points[zero : zero + weight.rows].reshape(shape).astype(np.float32)
                zero += weight.rows
            scale = scales[row : row + weight.rows].reshape(shape).astype(np.float32)
            row += weight.rows
            yield WeightValues(weight, _from_rows(unpack_codes(packed, weight), weight), scale, zero_point)

    def activations(self) -> Iterator[ActivationValues]:
        """Each quantized activation, in the order of the file."""
        count = len(self.layout.activations) + len(self.layout.outputs)
        scales, zero_points = self._section("scales").view("<f4"), self._section("zero_points")
        for i, activation in enumerate(self.layout.activations):
            yield ActivationValues(activation, float(scales[i - count]), int(zero_points[i - count]))

    def outputs(self) -> Iterator[OutputValues]:
        """Each rounded output, in the order of the file."""
        count = len(self.layout.outputs)
        scales, zero_points = self._section("scales").view("<f4"), self._section("zero_points")
        for i, module in enumerate(self.layout.outputs):
            yield OutputValues(module, float(scales[i - count]), int(zero_points[i - count]))

    def raw_tensors(self) -> Iterator[tuple[str, str, tuple[int, ...], NDArray[np.uint8]]]:
        """Name, dtype (safetensors' name), shape and little-endian bytes of every tensor that is not quantized."""
        offsets: dict[str, int] = {}
        for name, dtype, shape in self.layout.tensors:
            start = offsets.get(dtype, 0)
            offsets[dtype] = start + DTYPE_BYTES[dtype] * math.prod(shape)
            yield name, dtype, shape, self._section(f"tensors.{dtype}")[start : offsets[dtype]]

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Every tensor that is not quantized by name; bfloat16 as float32."""
        return {name: _as_array(raw, dtype).reshape(shape) for name, dtype, shape, raw in self.raw_tensors()}

    def _section(self, name: str) -> NDArray[np.uint8]:
        return self.sections.get(name, np.zeros(0, np.uint8))


def read_packed(path: str | Path) -> PackedFile:
    """The contents of the packed file at `path`; `ArtifactError` unless every byte of it is as it was written."""
    path = Path(path)
    try:
        blob = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; `tracequant pack RUN` makes it") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error})") from None
    try:
        raw = dict(safetensors.deserialize(blob))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ArtifactError(
            f"{path} is damaged or not a safetensors file ({error}); copy it anew, or pack the model again"
        ) from None
    header = blob[8 : 8 + int.from_bytes(blob[:8], "little")]
    try:
        manifest = json.loads(json.loads(header)["__metadata__"]["tracequant"])
        name, version = manifest["format"], manifest["version"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is a safetensors file but not one of tracequant's packed models ({error!r})"
        ) from None
    if name != FORMAT_NAME or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} is of format {name!r} version {version!r}, this tracequant reads {FORMAT_NAME!r} version"
            f" {FORMAT_VERSION}; pack the model again with this tracequant, or read the file with the one that wrote it"
        )
    _check_digest(path, blob, len(header), manifest)
    try:
        layout = _parse_manifest(manifest)
        expected, length = layout.sections(), layout.file_bytes()
        found = {name: (str(section["dtype"]), math.prod(section["shape"])) for name, section in raw.items()}
        _require(found == expected and len(blob) == length, "its contents do not have the lengths that it gives")
        sections = {name: np.frombuffer(section["data"], np.uint8) for name, section in raw.items()}
        _check_values(layout, sections)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} has a manifest that cannot be right ({error}); pack the model again") from None
    return PackedFile(layout, sections, len(blob))


def sealed(blob: bytes) -> bytes:
    """A file whose manifest holds a blank checksum, with the right one in its place."""
    return blob.replace(BLANK_DIGEST.encode(), checksum(blob, BLANK_DIGEST).encode(), 1)


def checksum(blob: bytes, digest: str) -> str:
    """SHA-256 of a file with the first occurrence of `digest`, its own checksum, made zeros; in hexadecimal."""
    return hashlib.sha256(blob.replace(digest.encode(), BLANK_DIGEST.encode(), 1)).hexdigest()


def pack_codes(codes: NDArray[np.uint8], num_bits: int) -> NDArray[np.uint8]:
    """Rows of codes `[rows, n]` as bytes, least significant bit first, every row padded with zeros to 32 bits."""
    rows, length = codes.shape
    bits = np.unpackbits(codes[:, :, None], axis=2, count=num_bits, bitorder="little").reshape(rows, -1)
    padding = -(length * num_bits) % 32
    return np.packbits(np.pad(bits, ((0, 0), (0, padding))), axis=1, bitorder="little").reshape(-1)


def unpack_codes(packed: NDArray[np.uint8], weight: PackedWeight) -> NDArray[np.uint8]:
    """The inverse of `pack_codes` for a weight's rows of bytes `[rows, row_bytes]`: codes `[rows, n]`."""
    length = weight.row_length
    bits = np.unpackbits(packed, axis=1, count=length * weight.num_bits, bitorder="little")
    groups = bits.reshape(len(packed), length, weight.num_bits)
    return np.packbits(groups, axis=2, bitorder="little").reshape(len(packed), length)


def _check_digest(path: Path, blob: bytes, header_length: int, manifest: dict[str, Any]) -> None:
    """Raise `ArtifactError` unless the file's bytes are those that were written."""
    digest = manifest.get("sha256")
    if (
        not isinstance(digest, str)
        or len(digest) != len(BLANK_DIGEST)
        or not digest.isascii()
        or not 8 <= blob.find(digest.encode()) < 8 + header_length
        or checksum(blob, digest) != digest
    ):
        raise ArtifactError(
            f"{path} is damaged: its bytes do not have the checksum that was written with them; copy it anew, or pack"
            " the model again"
        )


def _parse_manifest(manifest: Any) -> PackedLayout:
    weights = []
    for name, sites, shape, num_bits, axis, symmetric in manifest["weights"]:
        _require(isinstance(name, str) and _is_width(num_bits) and _is_shape(shape), f"layer {name!r}")
        _require(bool(shape) and min(shape) > 0, f"layer {name!r} of shape {shape}")
        _require(axis is None or (type(axis) is int and 0 <= axis < len(shape)), f"layer {name!r}, axis {axis!r}")
        _require(type(symmetric) is int and symmetric in (0, 1), f"layer {name!r}, symmetric {symmetric!r}")
        places = tuple((module, parameter) for module, parameter in sites) or ((name, "weight"),)
        _require(all(isinstance(text, str) for place in places for text in place), f"layer {name!r}, sites")
        weights.append(PackedWeight(name, places, tuple(shape), num_bits, axis, bool(symmetric)))
    activations = []
    for *consumers, num_bits in manifest["activations"]:
        _require(bool(consumers) and all(isinstance(name, str) for name in consumers), f"activation {consumers}")
        _require(_is_width(num_bits), f"activation {consumers}, bits {num_bits!r}")
        activations.append(PackedActivation(tuple(consumers), num_bits))
    outputs = manifest["outputs"]
    _require(isinstance(outputs, list) and all(isinstance(name, str) for name in outputs), f"outputs {outputs!r}")
    tensors = []
    for dtype, entries in manifest["tensors"].items():
        for name, *shape in entries:
            _require(dtype in DTYPE_BYTES and isinstance(name, str) and _is_shape(shape), f"tensor {name!r}")
            tensors.append((name, dtype, tuple(shape)))
    _require(bool(weights), "no layer")
    _require_distinct([weight.name for weight in weights], "layer")
    stored = [state_name(site) for weight in weights for site in weight.sites]
    _require_distinct(stored + [name for name, _, _ in tensors], "tensor")
    _require_distinct([name for activation in activations for name in activation.consumers], "reader of an activation")
    _require_distinct(outputs, "output")
    return PackedLayout(tuple(weights), tuple(activations), tuple(outputs), tuple(tensors))


def _check_values(layout: PackedLayout, sections: dict[str, NDArray[np.uint8]]) -> None:
    """Raise `ValueError` for contents that no packer writes: scales that are not positive, codes off the grid."""
    scales = sections["scales"].view("<f4")
    _require(bool(np.all(np.isfinite(scales) & (scales > 0))), "a scale that is not a positive number")
    widths = [w.num_bits for w in layout.weights for _ in range(w.rows) if not w.symmetric]
    widths += [activation.num_bits for activation in layout.activations] + [OUTPUT_BITS] * len(layout.outputs)
    if widths:
        largest = 2 ** np.array(widths) - 1
        _require(bool(np.all(sections["zero_points"] <= largest)), "a zero point that is not on its grid")
    byte = 0
    for weight in layout.weights:
        rows = sections["codes"][byte : byte + weight.code_bytes].reshape(weight.rows, weight.row_bytes)
        byte += weight.code_bytes
        used = weight.row_length * weight.num_bits
        rest = rows[:, used // 8 :]
        if rest.size:
            _require(not np.any(rest[:, 1:]) and not np.any(rest[:, 0] >> used % 8), f"layer {weight.name!r}, padding")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _require_distinct(names: list[str], kind: str) -> None:
    seen: set[str] = set()
    for name in names:
        _require(name not in seen, f"{kind} {name!r} twice")
        seen.add(name)


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 8


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in value)
        and math.prod(max(size, 1) for size in value) <= _MOST_ELEMENTS
    )


def _as_array(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view(_NUMPY[dtype])


def _from_rows(rows: NDArray[np.uint8], weight: PackedWeight) -> NDArray[np.uint8]:
    if weight.axis is None:
        return rows.reshape(weight.shape)
    moved = [weight.rows, *(n for i, n in enumerate(weight.shape) if i != weight.axis)]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, weight.axis))
