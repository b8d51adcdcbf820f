"""The packed file: bit-packed codes in safetensors (format in `tracequant.packed_layout`).

`pack` writes a fake-quantized model, `load` puts it back onto the float model's architecture so that outputs are equal
bit for bit. The size on disk is the size that the plan promised, to the byte.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tracequant.artifact import replace_file
from tracequant.convert import dequantized_state, quantize_activation, quantize_weight
from tracequant.errors import ArtifactError, ModelError
from tracequant.layers import DTYPE_NAMES
from tracequant.packed_layout import (
    FORMAT_NAME,
    FORMAT_VERSION,
    PackedActivation,
    PackedLayout,
    PackedWeight,
)
from tracequant.quantizer import (
    ActivationQuantizer,
    Grid,
    activation_quantizers,
    symmetric_zero_point,
    weight_quantizers,
)

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def pack(model: nn.Module, path: str | Path) -> int:
    """Write a fake-quantized model to `path` (replaced whole or not at all) and return its size in bytes.

    Raises `ModelError` if the model is not quantized, its weights are not float32, or a quantizer is switched off.
    """
    weights = _weights_of(model)
    activations = activation_quantizers(model)
    if off := [name for name, quantizer in activations.items() if not quantizer.enabled]:
        raise ModelError(f"the input of {off[0]} is not quantized yet: progressive fine-tuning has not reached it")
    floats = dict(_float_state(model, weights))
    layout = PackedLayout(
        tuple(weights),
        tuple(PackedActivation(_consumers(model, quantizer), quantizer.num_bits) for quantizer in activations.values()),
        tuple((name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in floats.items()),
    )
    codes, scales, zero_points = [], [], []
    for weight in weights:
        module, parameter = weight.sites[0]
        chain: Any = model.get_submodule(module).parametrizations[parameter]  # type: ignore[index]
        grid: Grid = chain[0].grid
        codes.append(pack_codes(_rows(grid.quantize(chain.original.detach()), weight), weight.num_bits))
        scales.append(grid.scale.flatten())
        if not weight.symmetric:
            zero_points.append(grid.zero_point.flatten())
    for quantizer in activations.values():
        scales.append(quantizer.scale.detach().flatten())
        zero_points.append(quantizer.zero_point.flatten())
    sections = {
        "codes": torch.from_numpy(np.concatenate(codes)),
        "scales": torch.cat(scales).cpu(),
        "zero_points": torch.cat([*zero_points, torch.zeros(0, device=_device(zero_points))]).to(torch.uint8).cpu(),
    }
    for dtype in dict.fromkeys(dtype for _, dtype, _ in layout.tensors):
        parts = [t.detach().flatten().cpu() for t in floats.values() if DTYPE_NAMES[t.dtype] == dtype]
        sections[f"tensors.{dtype}"] = torch.cat(parts)
    sections = {name: tensor for name, tensor in sections.items() if tensor.numel() > 0}
    blob = _serialize(sections, layout)
    with replace_file(path) as temporary:
        temporary.write_bytes(blob)
    return len(blob)


def _serialize(sections: dict[str, Tensor], layout: PackedLayout) -> bytes:
    """The file, its header padded to the size that does not depend on the choice of bits."""

    def write(padding: int) -> bytes:
        # One metadata entry only: safetensors writes several in random order.
        return safetensors.torch.save(sections, {"tracequant": layout.manifest() + " " * padding})

    missing = layout.file_bytes() - len(write(0))
    assert missing >= 0, "packed header is larger than its layout says"
    # safetensors rounds the header up to 8 bytes itself, so that less than all of `missing` may do.
    blob = write(missing)
    assert len(blob) == layout.file_bytes(), "packed size differs from the layout's"
    return blob


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """The quantized model in `path`, on the architecture of `model`, whose weights do not matter and stay as they are.

    The result is on the CPU or wherever `model` is, in evaluation mode, and can be fine-tuned further. Raises
    `ArtifactError` for a file that is damaged or not of this format, `ModelError` for one of another architecture.
    """
    contents = read_packed(path)
    if weight_quantizers(model):
        raise ModelError("load expects the float model, got one that is quantized already")
    loaded = copy.deepcopy(model)
    device = next((p.device for p in loaded.parameters()), torch.device("cpu"))
    modules = dict(loaded.named_modules())
    written: dict[int, str] = {}
    for weight, codes, scale, zero_point in contents.weights():
        grid = Grid(scale, zero_point, weight.num_bits)
        values = grid.dequantize(codes)
        for module_name, parameter in weight.sites:
            target = getattr(modules.get(module_name), parameter, None)
            if not isinstance(target, Tensor) or tuple(target.shape) != weight.shape:
                found = f"shape {list(target.shape)}" if isinstance(target, Tensor) else "no such layer"
                raise ModelError(
                    f"{path} holds layer {weight.name} of shape {list(weight.shape)}, the model has {found}; pass the"
                    " model that was packed"
                )
            if written.setdefault(id(target), weight.name) != weight.name:
                raise ModelError(
                    f"{path} holds {weight.name} and {written[id(target)]} as two weights, in the model they are one;"
                    " pass the model that was packed"
                )
            with torch.no_grad():
                target.copy_(values)
        grid = Grid(scale.to(device), zero_point.to(device), weight.num_bits)
        quantize_weight(loaded, weight.sites, grid, weight.axis, weight.symmetric)
    for activation, scale, zero_point in contents.activations():
        if missing := [name for name in activation.consumers if name not in modules]:
            raise ModelError(f"{path} quantizes the input of {missing[0]}, which the model does not have")
        grid = Grid(scale.to(device), zero_point.to(device), activation.num_bits)
        consumers = [modules[name] for name in activation.consumers]
        quantize_activation(consumers, activation.consumers[0], grid)
    _load_floats(loaded, contents.tensors, path)
    return loaded.eval()


@dataclass(frozen=True)
class PackedContents:
    """A packed file's layout and its sections, checked against each other."""

    layout: PackedLayout
    sections: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def weights(self) -> Iterator[tuple[PackedWeight, Tensor, Tensor, Tensor]]:
        """Each weight with its codes (floats, the weight's shape), scale and zero point (broadcastable)."""
        byte = row = zero = 0
        for weight in self.layout.weights:
            packed = self.sections["codes"][byte : byte + weight.code_bytes].numpy()
            codes = unpack_codes(packed.reshape(weight.rows, weight.row_bytes), weight.num_bits, _row_length(weight))
            byte += weight.code_bytes
            shape = [1] * len(weight.shape)
            if weight.axis is not None:
                shape[weight.axis] = weight.rows
            scale = self.sections["scales"][row : row + weight.rows].reshape(shape).clone()
            row += weight.rows
            if weight.symmetric:
                zero_point = torch.full(shape, symmetric_zero_point(weight.num_bits))
            else:
                zero_point = self.sections["zero_points"][zero : zero + weight.rows].reshape(shape).float()
                zero += weight.rows
            yield weight, _from_rows(torch.from_numpy(codes).float(), weight), scale, zero_point

    def activations(self) -> Iterator[tuple[PackedActivation, Tensor, Tensor]]:
        """Each quantized activation with its scale and zero point."""
        count = len(self.layout.activations)
        if count:
            scales = self.sections["scales"][-count:].clone()
            zero_points = self.sections["zero_points"][-count:].float()
            for i, activation in enumerate(self.layout.activations):
                yield activation, scales[i].reshape(1), zero_points[i].reshape(1)


def read_packed(path: str | Path) -> PackedContents:
    """Layout and sections of a packed file; `ArtifactError` unless they fit each other to the byte."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            sections = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; `tracequant pack RUN` makes it") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is damaged or not a safetensors file ({error}); copy it anew, or pack the model again"
        ) from None
    try:
        layout = _parse_manifest(json.loads(metadata["tracequant"]))
        expected, length = layout.sections(), layout.file_bytes()
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is a safetensors file but not one of tracequant's packed models ({error!r})"
        ) from None
    found = {name: (DTYPE_NAMES.get(t.dtype), t.numel()) for name, t in sections.items()}
    if found != expected or path.stat().st_size != length:
        raise ArtifactError(f"{path} is damaged: its contents do not have the lengths that its manifest gives")
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, int] = {}
    for name, dtype, shape in layout.tensors:
        start = offsets.get(dtype, 0)
        count = int(np.prod(shape))
        offsets[dtype] = start + count
        if count:
            tensors[name] = sections[f"tensors.{dtype}"][start : start + count].reshape(shape).clone()
        else:
            tensors[name] = torch.zeros(shape, dtype=_DTYPES[dtype])
    return PackedContents(layout, sections, tensors)


def pack_codes(codes: NDArray[np.uint8], num_bits: int) -> NDArray[np.uint8]:
    """Rows of codes `[rows, n]` as bytes, least significant bit first, every row padded with zeros to 32 bits."""
    rows, length = codes.shape
    bits = np.unpackbits(codes[:, :, None], axis=2, count=num_bits, bitorder="little").reshape(rows, -1)
    padding = -(length * num_bits) % 32
    return np.packbits(np.pad(bits, ((0, 0), (0, padding))), axis=1, bitorder="little").reshape(-1)


def unpack_codes(packed: NDArray[np.uint8], num_bits: int, length: int) -> NDArray[np.uint8]:
    """The inverse of `pack_codes` for rows of bytes `[rows, row_bytes]`: codes `[rows, length]`."""
    bits = np.unpackbits(packed, axis=1, count=length * num_bits, bitorder="little")
    groups = bits.reshape(len(packed), length, num_bits)
    return np.packbits(groups, axis=2, bitorder="little").reshape(len(packed), length)


def _weights_of(model: nn.Module) -> list[PackedWeight]:
    """The quantized weights of a model, tied ones once with all their sites."""
    sites: dict[int, list[tuple[str, str]]] = {}
    found = weight_quantizers(model)
    if not found:
        raise ModelError("the model is not quantized: nothing to pack; call tracequant.quantize first")
    for site, quantizer in found.items():
        sites.setdefault(id(quantizer), []).append(site)
    weights = []
    for site, quantizer in found.items():
        own = sites[id(quantizer)]
        if own[0] != site:
            continue
        chain: Any = model.get_submodule(site[0]).parametrizations[site[1]]  # type: ignore[index]
        original = chain.original
        name = site[0] if site[1] == "weight" else ".".join(filter(None, site))
        name = name or "weight"
        if original.dtype != torch.float32:
            raise ModelError(f"layer {name} is of type {original.dtype}; packing needs float32, call model.float()")
        if not quantizer.enabled:
            raise ModelError(f"layer {name} is not quantized yet: progressive fine-tuning has not reached it")
        weights.append(
            PackedWeight(
                name,
                tuple(own),
                tuple(original.shape),
                quantizer.num_bits,
                quantizer.axis,
                quantizer.symmetric,
            )
        )
    return weights


def _consumers(model: nn.Module, quantizer: ActivationQuantizer) -> tuple[str, ...]:
    """Names of the modules that read a quantized activation."""
    return tuple(
        name for name, module in model.named_modules() if getattr(module, "input_quantizer", None) is quantizer
    )


def _float_state(model: nn.Module, weights: list[PackedWeight]) -> Iterator[tuple[str, Tensor]]:
    """State that is not quantized, tied tensors once, in the order and under the names of the float model's."""
    quantized = {".".join(filter(None, site)) for weight in weights for site in weight.sites}
    kept = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in dequantized_state(model).items():
        if name in quantized or id(kept.get(name)) in seen:
            continue
        seen.add(id(kept.get(name)))
        yield name, tensor


def _load_floats(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    own = model.state_dict(keep_vars=True)
    targets = {
        name: tensor for name, tensor in own.items()
        if "parametrizations" not in name.split(".") and "input_quantizer" not in name.split(".")
    }  # fmt: skip
    reached = set()
    for name, tensor in tensors.items():
        target = targets.get(name)
        if target is None or target.shape != tensor.shape:
            raise ModelError(
                f"{path} holds {name} of shape {list(tensor.shape)}, the model has"
                f" {list(target.shape) if target is not None else 'no such tensor'}; pass the model that was packed"
            )
        with torch.no_grad():
            target.copy_(tensor)
        reached.add(id(target))
    missing = [name for name, tensor in targets.items() if id(tensor) not in reached]
    if missing:
        raise ModelError(f"{path} does not hold {missing[0]}, which the model has; pass the model that was packed")


def _parse_manifest(manifest: Any) -> PackedLayout:
    if manifest["format"] != FORMAT_NAME or manifest["version"] != FORMAT_VERSION:
        raise ValueError(f"format {manifest['format']!r} version {manifest['version']!r}")
    weights = []
    for name, sites, shape, num_bits, axis, symmetric in manifest["weights"]:
        _require(isinstance(name, str) and _is_width(num_bits) and _is_shape(shape), f"layer {name!r}")
        _require(axis is None or (type(axis) is int and 0 <= axis < len(shape)), f"layer {name!r}")
        places = tuple((str(m), str(p)) for m, p in sites) or ((name, "weight"),)
        weights.append(PackedWeight(name, places, tuple(shape), num_bits, axis, bool(symmetric)))
    activations = []
    for *consumers, num_bits in manifest["activations"]:
        _require(bool(consumers) and _is_width(num_bits), f"activation {consumers}")
        activations.append(PackedActivation(tuple(str(name) for name in consumers), num_bits))
    tensors = []
    for dtype, entries in manifest["tensors"].items():
        for name, *shape in entries:
            _require(dtype in _DTYPES and isinstance(name, str) and _is_shape(shape), f"tensor {name!r}")
            tensors.append((name, dtype, tuple(shape)))
    names = [weight.name for weight in weights] + [name for name, _, _ in tensors]
    _require(len(set(names)) == len(names), "a name that occurs twice")
    return PackedLayout(tuple(weights), tuple(activations), tuple(tensors))


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"bad manifest: {what}")


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 8


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _rows(codes: Tensor, weight: PackedWeight) -> NDArray[np.uint8]:
    rows = codes.reshape(1, -1) if weight.axis is None else codes.movedim(weight.axis, 0).flatten(1)
    result: NDArray[np.uint8] = rows.to(torch.uint8).cpu().numpy()
    return result


def _from_rows(rows: Tensor, weight: PackedWeight) -> Tensor:
    if weight.axis is None:
        return rows.reshape(weight.shape)
    moved = [weight.shape[weight.axis], *(n for i, n in enumerate(weight.shape) if i != weight.axis)]
    return rows.reshape(moved).movedim(0, weight.axis).contiguous()


def _row_length(weight: PackedWeight) -> int:
    return int(np.prod(weight.shape)) // weight.rows if weight.rows else 0


def _device(tensors: list[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")
