"""From a bit plan and a float model to a fake-quantized model."""

from __future__ import annotations

import copy
import glob
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from tracequant.core.errors import ModelError
from tracequant.core.plan import BitPlan
from tracequant.core.points import OUTPUT_BITS, OutputPoint
from tracequant.model.batches import Batches, reusable
from tracequant.model.discover import discover
from tracequant.model.fuse import keep_order, make_plain
from tracequant.model.hooks import weight_parameter
from tracequant.model.sites import check_plain, first_look
from tracequant.model.task import Task, check_arguments
from tracequant.quantization.calibrate import calibrate
from tracequant.quantization.grid import Grid
from tracequant.quantization.quantizer import ActivationQuantizer, OutputQuantizer, WeightQuantizer
from tracequant.quantization.rounding import RoundedWeights, round_weights
from tracequant.quantization.statistics import correct_statistics

# The children by which a module of a quantized model rounds what it reads and what it returns.
QUANTIZER_NAMES = ("input_quantizer", "output_quantizer")


def quantize(
    model: nn.Module,
    batches: Batches,
    task: Task,
    plan: BitPlan,
    *,
    rounded: RoundedWeights | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = False,
) -> nn.Module:
    """A copy of `model` whose weights and activations are rounded as `plan` says; `model` itself is untouched.

    Weights are rounded as the plan's `weight_grid` says, on `batches`. Those of `rounded` (from `round_weights`) are
    taken where it holds all that the plan asks for. Where rounding is compensated, BatchNorm statistics and biases are
    then corrected as `correct_statistics` finds that it helps, and `say` is told what it did.

    Module classes stay what they are: a weight is quantized by a parametrization, an activation by a forward pre-hook
    of its consumers, and the output of a convolution that others read as well (`OutputPoint`) by a forward hook, with 8
    bits, where the plan quantizes the convolution's input. Ranges are chosen on `batches` with the weights already
    quantized. Layers and activations that the plan does not name stay in float.

    Raises `ModelError` if the plan names something that the model does not have, and `TaskError` for arguments in
    another order. Warns if the plan was made for other weights than the model's.
    """
    check_arguments(model, batches, task)
    batches = reusable(batches)
    check_plain(model)
    _check_names(plan.weight_bits, first_look(model, batches, task)[1].layers, "layer")
    points = discover(model, batches, task, include=tuple(glob.escape(name) for name in plan.weight_bits))
    _check_names(plan.activation_bits, list(points.activation_by_name), "activation")
    if plan.fingerprint not in ("", points.fingerprint):  # plans of published tables have none
        warnings.warn(
            f"the plan was made for other weights than the model's (fingerprint {plan.fingerprint}, the model has"
            f" {points.fingerprint}): its bits were chosen for the curvature of those weights; if the model was trained"
            " since, measure it anew",
            stacklevel=2,
        )
    bits = {layer.name: (plan.weight_bits[layer.name],) for layer in points.layers}
    if rounded is None or not rounded.covers(points.fingerprint, bits, plan.weight_grid):
        rounded = round_weights(model, batches, task, points, bits, weight_grid=plan.weight_grid, progress=progress)
    quantized = copy.deepcopy(model)
    for layer in points.layers:
        weight = rounded.layers[layer.name][plan.weight_bits[layer.name]]
        if plan.weight_grid.rounding != "nearest":  # else rounding the float weight gives the same, and training has it
            with torch.no_grad():
                weight_parameter(quantized, layer).copy_(weight.values)
        axis = layer.channel_axis if plan.weight_grid.per_channel else None
        quantize_weight(quantized, layer.sites, weight.grid, axis, plan.weight_grid.symmetric)
    if plan.weight_grid.rounding != "nearest":
        correction = correct_statistics(quantized, model, batches, task, progress=progress)
        if say is not None:
            say(str(correction))
    if plan.activation_bits:
        options = {name: [num_bits] for name, num_bits in plan.activation_bits.items()}
        outputs = points.rounded_outputs(plan.activation_bits)
        grids = calibrate(quantized, batches, task, points, bits=options, outputs=outputs, progress=progress)
        for name, num_bits in plan.activation_bits.items():
            consumers = points.activation_by_name[name].consumers
            modules = [quantized.get_submodule(consumer) for consumer in consumers]
            quantize_activation(modules, name, grids[name][num_bits])
        for point in outputs:
            quantize_output(quantized, point.module, grids[point.name][OUTPUT_BITS])
    return quantized


def quantize_weight(
    model: nn.Module, sites: Sequence[Sequence[str]], grid: Grid, axis: int | None, symmetric: bool
) -> WeightQuantizer:
    """Register one weight quantizer at every site of a weight; tied weights share it."""
    quantizer = WeightQuantizer(grid, axis, symmetric)
    for module_name, parameter in sites:
        module = model.get_submodule(module_name)
        keep_order(module)
        parametrize.register_parametrization(module, parameter, quantizer)
        if isinstance(module, nn.RNNBase):
            _read_weights_anew(module)
    return quantizer


def _read_weights_anew(module: nn.RNNBase) -> None:
    """Let a quantized recurrent module read its weights in every call.

    It has a list of them, `_flat_weights`, which would go on to hold those that are not quantized. Its class is now one
    of parametrize's, which only copies of the module share.
    """

    def read(module: nn.RNNBase) -> list[Any]:
        return [getattr(module, name, None) for name in module._flat_weights_names]

    kind: Any = type(module)
    kind._flat_weights = property(read, lambda module, weights: None)
    kind._update_flat_weights = lambda module: None
    vars(module).pop("_flat_weights", None)


def quantize_activation(consumers: Sequence[nn.Module], name: str, grid: Grid) -> ActivationQuantizer:
    """Let all consumers read their input through one quantizer."""
    quantizer = ActivationQuantizer(name, grid)
    for module in dict.fromkeys(consumers):
        quantizer.attach(module)
    return quantizer


def quantize_output(model: nn.Module, module_name: str, grid: Grid) -> OutputQuantizer:
    """Let a module return its output rounded."""
    quantizer = OutputQuantizer(OutputPoint(module_name, module_name).name, grid)
    quantizer.attach(model.get_submodule(module_name))
    return quantizer


def to_float(quantized: nn.Module) -> nn.Module:
    """A copy of a fake-quantized model as an ordinary one, whose weights hold the values of their codes.

    No parametrizations, no hooks, the state dict of the float model; activations are not rounded. For other tools that
    take a plain module (torch.export, TensorRT, compressed-tensors).
    """
    model = copy.deepcopy(quantized)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            make_plain(module)
    for module in list(model.modules()):
        for child in QUANTIZER_NAMES:
            quantizer = getattr(module, child, None)
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.detach(module)
    return model


def dequantized_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the float model that a fake-quantized one came from, weights rounded to their grids."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if "parametrizations" in parts:
            index = parts.index("parametrizations")
            if parts[-1] != "original":
                continue
            owner, parameter = ".".join(parts[:index]), parts[index + 1]
            state[".".join(filter(None, (owner, parameter)))] = getattr(model.get_submodule(owner), parameter).detach()
        elif not any(child in parts for child in QUANTIZER_NAMES):
            state[name] = tensor
    return state


def _check_names(wanted: Iterable[str], present: Iterable[str], kind: str) -> None:
    known = set(present)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ModelError(
            f"the plan names {kind} {', '.join(unknown[:4])}, which this model does not have; the plan is of another"
            " model, or was made with other include/exclude patterns"
        )
