"""ONNX export: a fake-quantized model as integers that a runtime really computes with (docs/onnx.md).

torch.export traces the model, with one opaque operator for every activation quantizer; `onnx_graph` then puts codes of
k bits in place of the weights and folds BatchNorm into their scales.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.core.errors import ModelError, ResourceError
from tracequant.core.files import replace_file
from tracequant.core.packed_layout import state_name
from tracequant.core.version import VERSION
from tracequant.deploy import onnx_axes
from tracequant.deploy.pack import all_sites, quantized_weights
from tracequant.model.hooks import replace_inputs
from tracequant.model.kinds import is_frozen_norm
from tracequant.model.state import frozen_evaluation
from tracequant.quantization.convert import to_float
from tracequant.quantization.grid import Grid
from tracequant.quantization.quantizer import ActivationQuantizer, input_quantizers, output_quantizers

Profile = Literal["qdq", "weights-only"]
OPSET = 21
# A protocol buffer ends at 2 GiB; the graph itself takes a little.
LARGEST_FILE = 2**31 - 2**24


@dataclass(frozen=True)
class OnnxFile:
    """What `export_onnx` wrote: bytes on disk, those of the weights' codes, and those of graph, scales and floats."""

    path: str
    file_bytes: int
    code_bytes: int

    @property
    def other_bytes(self) -> int:
        """Bytes that do not depend on the choice of bits: the graph, scales, biases, float tensors."""
        return self.file_bytes - self.code_bytes


def export_onnx(
    quantized: nn.Module,
    path: str | Path,
    example_inputs: Any,
    profile: Profile = "qdq",
    dynamic_batch: bool = True,
    dynamic_sizes: bool | None = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> OnnxFile:
    """Write a fake-quantized model to `path` as ONNX (opset 21), whole or not at all; the model is untouched.

    `example_inputs` is what the model is called with: a tensor, a tuple of arguments, or a dictionary of keyword
    arguments; values do not matter, shapes do. `dynamic_batch` leaves the first axis of every tensor open, under the
    name `batch`. `dynamic_sizes` leaves heights, widths and lengths open where the model does not fix them; None does
    so for sequences of token ids and their masks alone, whose second axis is `sequence`. With profile "qdq" weights and
    activations are quantized as in the model; "weights-only" leaves activations in float, for runtimes that multiply
    float activations with packed weights.

    Inputs have the names of the forward's arguments unless `input_names` gives others. Outputs have those of a
    dictionary's keys, or `output`, unless `output_names` gives others. Models with a cache of keys and values are
    exported without it.

    Raises `SettingsError` for a wrong number of names; `ModelError` if the model is not quantized, has other weights
    than float32, cannot be traced, or takes more than the 2 GiB that an ONNX file can hold; `ResourceError` without the
    extra "onnx".
    """
    try:
        import onnx_ir

        from tracequant.deploy import onnx_codes, onnx_graph
    except ImportError as error:
        raise ResourceError(f"ONNX export needs more packages ({error}): pip install 'tracequant[onnx]'") from None
    weights = []
    for weight, grid, codes in quantized_weights(quantized):
        scale, zero_point = grid.scale.flatten().cpu().numpy(), grid.zero_point.flatten().cpu().numpy()
        weights.append(onnx_codes.StoredWeight(weight, codes.to(torch.uint8).cpu().numpy(), scale, zero_point))
    _refuse_projections(quantized)
    call = onnx_axes.prepare(example_inputs, dynamic_batch, dynamic_sizes)
    model = _traceable(quantized, profile)
    graph_model, outputs = _trace(model, call)
    names = {state_name(site): weight for weight in weights for site in all_sites(quantized, weight.entry.sites)}
    with _quiet("onnx_ir", "onnxscript"):
        code_bytes = onnx_graph.rewrite(graph_model, names, weights_only=profile == "weights-only")
    onnx_axes.rename(graph_model.graph, call, input_names, output_names or onnx_axes.output_paths(outputs))
    stored = sum(value.const_value.nbytes for value in graph_model.graph.initializers.values() if value.const_value)
    if stored > LARGEST_FILE:
        raise ModelError(
            f"the ONNX file would take {stored / 2**30:.1f} GiB, more than the 2 GiB that one can hold; give the model"
            f" fewer bits (codes take {code_bytes / 2**30:.1f} GiB), or quantize layers that are still in float"
        )
    graph_model.producer_name, graph_model.producer_version = "tracequant", VERSION
    graph_model.metadata_props.clear()
    graph_model.metadata_props.update(_metadata(quantized, weights, profile))
    with replace_file(path) as temporary:
        onnx_ir.save(graph_model, temporary)
        size = temporary.stat().st_size
    return OnnxFile(str(path), size, code_bytes)


def _refuse_projections(model: nn.Module) -> None:
    """Raise `ModelError` for an LSTM with projections: ONNX has none, and torch's exporter writes a wrong file."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size > 0:
            raise ModelError(
                f"ONNX expects an LSTM without projections, {name or 'the model'} has proj_size={module.proj_size};"
                " pack the model instead, or train one with proj_size=0"
            )


def trace_float(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> None:
    """Write a float model to `path` as ONNX, for comparison, its batch size fixed to that of the arguments."""
    import onnx_ir

    call = onnx_axes.prepare(kwargs or args, dynamic_batch=False, dynamic_sizes=False)
    traced, _ = _trace(copy.deepcopy(model).cpu().eval(), call, optimize=True)
    # Weights beside the graph: a float model may be larger than an ONNX file can be.
    onnx_ir.save(traced, path, external_data=f"{path.name}.data")


@torch.library.custom_op("tracequant::quantize_activation", mutates_args=())
def _quantize_activation(values: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    return Grid(scale, zero_point.float(), num_bits).round(values)


@_quantize_activation.register_fake
def _(values: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    return torch.empty_like(values)


class _TracedQuantizer(nn.Module):
    """An activation quantizer as one operator that the exporter knows."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.num_bits = quantizer.num_bits
        self.register_buffer("scale", quantizer.scale.detach().reshape(()).clone())
        self.register_buffer("zero_point", quantizer.zero_point.reshape(()).to(torch.uint8))

    def forward(self, values: Tensor) -> Tensor:
        rounded: Tensor = torch.ops.tracequant.quantize_activation(values, self.scale, self.zero_point, self.num_bits)
        return rounded

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replace_inputs(module, args, kwargs, self)

    def after_forward(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rounded: Tensor = self(output)
        return rounded


def _translate(values: Any, scale: Any, zero_point: Any, num_bits: int) -> Any:
    """The ONNX form of an activation quantizer: 8-bit integers, clipped as integers where there are fewer bits.

    Clipping the float before it would keep ONNX Runtime from fusing the convolution that follows.
    """
    import numpy as np
    import onnx_ir
    from onnxscript import opset21 as op

    codes = op.QuantizeLinear(values, scale, zero_point)
    if num_bits < 8:
        ends: list[Any] = [onnx_ir.tensor(np.uint8(end)) for end in (0, 2**num_bits - 1)]
        low, high = (op.Constant(value=end) for end in ends)
        codes = op.Clip(codes, low, high)
    return op.DequantizeLinear(codes, scale, zero_point)


def _traceable(quantized: nn.Module, profile: Profile) -> nn.Module:
    """A copy on the CPU with ordinary weights, and quantizers that the exporter can translate."""
    readers: dict[ActivationQuantizer, list[str]] = {}
    for name, module in quantized.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, ActivationQuantizer):
            readers.setdefault(quantizer, []).append(name)
    outputs = output_quantizers(quantized)
    model = to_float(quantized).cpu().eval()
    _thaw(model)
    if profile == "qdq":
        for name, output in outputs.items():
            traced = _TracedQuantizer(copy.deepcopy(output).cpu())
            module = model.get_submodule(name)
            module.add_module("output_quantizer", traced)
            module.register_forward_hook(traced.after_forward)
        for quantizer, names in readers.items():
            traced = _TracedQuantizer(copy.deepcopy(quantizer).cpu())
            for name in names:
                module = model.get_submodule(name)
                module.add_module("input_quantizer", traced)
                module.register_forward_pre_hook(traced.before_forward, with_kwargs=True)
    return model


def _thaw(model: nn.Module) -> None:
    """Put BatchNorm in the place of its frozen kind, which would be traced as a product and a sum."""
    for name, module in list(model.named_modules()):
        norm = _as_batch_norm(module) if is_frozen_norm(module) else None
        if norm is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)


def _as_batch_norm(frozen: nn.Module) -> nn.BatchNorm2d | None:
    """A BatchNorm of images that computes the same, None where there is none.

    By what it makes of zeros and ones: libraries differ in where, and whether, they add an epsilon.
    """
    channels = next(frozen.buffers()).numel()
    zeros = torch.zeros(1, channels, 1, 1, dtype=torch.float64)
    try:
        with torch.no_grad():
            shift, sum_of_both, other = (copy.deepcopy(frozen).double()(zeros + x) for x in (0, 1, 3))
    except Exception:  # whatever a library's own class makes of such an input
        return None
    factor = sum_of_both - shift
    if shift.shape != zeros.shape or not torch.allclose(other, 3 * factor + shift):
        return None
    norm = nn.BatchNorm2d(channels, eps=0.0).eval()
    norm.weight.data.copy_(factor.flatten())
    norm.bias.data.copy_(shift.flatten())
    return norm


def _trace(model: nn.Module, call: onnx_axes.Call, optimize: bool = False) -> tuple[Any, Any]:
    """The traced model as ONNX, and the outputs of the model itself."""
    try:
        with frozen_evaluation(model), torch.no_grad():
            outputs = model(*call.args, **call.kwargs)
        with _quiet("torch.onnx", "onnxscript"), frozen_evaluation(model), torch.no_grad(), _tensors_only(model):
            program = torch.onnx.export(
                model,
                call.args,
                kwargs=call.kwargs,
                dynamo=True,
                opset_version=OPSET,
                optimize=optimize,
                verbose=False,
                dynamic_shapes=call.dynamic_shapes,
                custom_translation_table={torch.ops.tracequant.quantize_activation.default: _translate},
            )
            assert program is not None
            return program.model, outputs
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        hint = (
            "; if its batch size cannot vary, try dynamic_batch=False" if any(0 in axes for axes in call.axes) else ""
        )
        raise ModelError(f"{type(model).__name__} cannot be traced for ONNX: {_first_line(cause)}{hint}") from error


@contextmanager
def _tensors_only(model: nn.Module) -> Iterator[None]:
    """Inside the block the model leaves out of its result what is no tensor: torch 2.8 cannot export None."""

    def keep_tensors(module: nn.Module, args: Any, output: Any) -> Any:
        leaves = pytree.tree_leaves(output)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return output if len(tensors) == len(leaves) else tensors

    hook = model.register_forward_hook(keep_tensors)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """No warnings inside the block: those of the libraries used here are about themselves."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _metadata(quantized: nn.Module, weights: Sequence[Any], profile: Profile) -> dict[str, str]:
    """The plan and the versions, for the model's metadata."""
    inputs = input_quantizers(quantized) if profile == "qdq" else {}
    outputs = output_quantizers(quantized) if profile == "qdq" else {}
    plan: dict[str, object] = {
        "weight_bits": {weight.entry.name: weight.entry.num_bits for weight in weights},
        "activation_bits": {name: quantizer.num_bits for name, quantizer in inputs.items()},
    }
    if outputs:
        plan["rounded_outputs"] = list(outputs)
    return {
        "tracequant.version": VERSION,
        "tracequant.profile": profile,
        "tracequant.core.plan": json.dumps(plan, separators=(",", ":"), ensure_ascii=False),
        "torch.version": str(torch.__version__),
    }
