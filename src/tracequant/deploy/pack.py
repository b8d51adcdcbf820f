"""The packed file: bit-packed codes in safetensors (format in `tracequant.core.packed_layout`).

`pack` writes a fake-quantized model, `load` puts it back onto the float model's architecture so that outputs are equal
bit for bit. The size on disk is the size that the plan promised, to the byte.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tracequant.core.errors import ModelError
from tracequant.core.files import replace_file
from tracequant.core.packed_layout import PackedActivation, PackedLayout, PackedWeight, state_name
from tracequant.core.points import OUTPUT_BITS
from tracequant.deploy.packed import PackedFile, pack_codes, read_packed, sealed
from tracequant.model.kinds import DTYPE_NAMES
from tracequant.quantization.convert import (
    QUANTIZER_NAMES,
    dequantized_state,
    quantize_activation,
    quantize_output,
    quantize_weight,
)
from tracequant.quantization.grid import Grid
from tracequant.quantization.quantizer import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    input_quantizers,
    output_quantizers,
    weight_quantizers,
)

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def pack(model: nn.Module, path: str | Path) -> int:
    """Write a fake-quantized model to `path` (replaced whole or not at all, folders made) and return its size in bytes.

    Raises `ModelError` if the model is not quantized, its weights are not float32, or a quantizer is switched off.
    """
    quantized = list(quantized_weights(model))
    weights = [weight for weight, _, _ in quantized]
    activations, outputs = input_quantizers(model), output_quantizers(model)
    floats = dict(_float_state(model, weights))
    layout = PackedLayout(
        tuple(weights),
        tuple(PackedActivation(_consumers(model, quantizer), quantizer.num_bits) for quantizer in activations.values()),
        tuple(outputs),
        tuple((name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in floats.items()),
    )
    codes, scales, zero_points = [], [], []
    for weight, grid, values in quantized:
        codes.append(pack_codes(_rows(values, weight), weight.num_bits))
        scales.append(grid.scale.flatten())
        if not weight.symmetric:
            zero_points.append(grid.zero_point.flatten())
    for quantizer in (*activations.values(), *outputs.values()):
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
    return sealed(blob)


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
    for stored in contents.weights():
        weight = stored.entry
        scale, zero_point = torch.from_numpy(stored.scale), torch.from_numpy(stored.zero_point)
        values = torch.from_numpy(stored.dequantize())
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
    for reading in contents.activations():
        activation = reading.entry
        if missing := [name for name in activation.consumers if name not in modules]:
            raise ModelError(f"{path} quantizes the input of {missing[0]}, which the model does not have")
        scale, zero_point = torch.tensor([reading.scale]), torch.tensor([float(reading.zero_point)])
        grid = Grid(scale.to(device), zero_point.to(device), activation.num_bits)
        consumers = [modules[name] for name in activation.consumers]
        quantize_activation(consumers, activation.consumers[0], grid)
    for output in contents.outputs():
        if output.module not in modules:
            raise ModelError(f"{path} rounds the output of {output.module}, which the model does not have")
        scale, zero_point = torch.tensor([output.scale]), torch.tensor([float(output.zero_point)])
        quantize_output(loaded, output.module, Grid(scale.to(device), zero_point.to(device), OUTPUT_BITS))
    _load_floats(loaded, _float_tensors(contents), path)
    return loaded.eval()


def quantized_weights(model: nn.Module) -> Iterator[tuple[PackedWeight, Grid, Tensor]]:
    """Every quantized weight of a model with its grid and codes (floats, the weight's shape), tied ones once.

    Raises `ModelError` if nothing is quantized, a weight is not float32, or a scale is not a positive number.
    """
    found = weight_quantizers(model)
    if not found:
        raise ModelError("the model is not quantized: nothing to pack; call tracequant.quantize first")
    for owner in (*found.values(), *activation_quantizers(model).values()):
        if not bool((owner.scale.isfinite() & (owner.scale > 0)).all()):
            raise ModelError("a scale is not a positive number: training has diverged; try a smaller learning rate")
    sites: dict[WeightQuantizer, list[tuple[str, str]]] = {}
    for site, quantizer in found.items():
        sites.setdefault(quantizer, []).append(site)
    for quantizer, own in sites.items():
        module, parameter = own[0]
        original: Tensor = model.get_submodule(module).parametrizations[parameter].original  # type: ignore
        name = (module if parameter == "weight" else state_name(own[0])) or "weight"
        if original.dtype != torch.float32:
            raise ModelError(f"layer {name} is of type {original.dtype}; packing needs float32, call model.float()")
        shape, bits = tuple(original.shape), quantizer.num_bits
        weight = PackedWeight(name, tuple(own), shape, bits, quantizer.axis, quantizer.symmetric)
        yield weight, quantizer.grid, quantizer.grid.quantize(original.detach())


def _consumers(model: nn.Module, quantizer: ActivationQuantizer) -> tuple[str, ...]:
    """Names of the modules that read a quantized activation."""
    return tuple(
        name for name, module in model.named_modules() if getattr(module, "input_quantizer", None) is quantizer
    )


def _float_state(model: nn.Module, weights: list[PackedWeight]) -> Iterator[tuple[str, Tensor]]:
    """State that is not quantized, tied tensors once, in the order and under the names of the float model's."""
    # A module may be registered under several names, of which a weight's sites have the first.
    quantized = {state_name(site) for weight in weights for site in all_sites(model, weight.sites)}
    kept = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in dequantized_state(model).items():
        if name in quantized or id(kept.get(name)) in seen:
            continue
        seen.add(id(kept.get(name)))
        yield name, tensor


def all_sites(model: nn.Module, sites: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """The sites of a weight with all names that the model has for their modules."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [(name, parameter) for owner, parameter in sites for name in names[model.get_submodule(owner)]]


def _float_tensors(contents: PackedFile) -> dict[str, Tensor]:
    """Tensors that are not quantized, by name."""
    tensors = {}
    for name, dtype, shape, raw in contents.raw_tensors():
        # A copy: torch must be able to write to it, and the file's bytes are read only.
        data = torch.frombuffer(bytearray(raw), dtype=_DTYPES[dtype]) if raw.size else torch.zeros(0)
        tensors[name] = data.to(_DTYPES[dtype]).reshape(shape)
    return tensors


def _load_floats(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    own = model.state_dict(keep_vars=True)
    targets = {
        name: tensor for name, tensor in own.items()
        if not {"parametrizations", *QUANTIZER_NAMES} & set(name.split("."))
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


def _rows(codes: Tensor, weight: PackedWeight) -> NDArray[np.uint8]:
    rows = codes.reshape(1, -1) if weight.axis is None else codes.movedim(weight.axis, 0).flatten(1)
    result: NDArray[np.uint8] = rows.to(torch.uint8).cpu().numpy()
    return result


def _device(tensors: list[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")
