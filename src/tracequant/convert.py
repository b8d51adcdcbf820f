"""From a bit plan and a float model to a fake-quantized model."""

from __future__ import annotations

import copy
import glob
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from tracequant.errors import ModelError
from tracequant.layers import discover, quantizable_names, weight_parameter
from tracequant.plan import BitPlan
from tracequant.quantizer import ActivationQuantizer, Grid, WeightQuantizer, choose_weight_grid
from tracequant.sensitivity import calibrate
from tracequant.task import Batches, Task, reusable


def quantize(model: nn.Module, plan: BitPlan, batches: Batches, task: Task, progress: bool = False) -> nn.Module:
    """A copy of `model` whose weights and activations are rounded as `plan` says; `model` itself is untouched.

    Module classes stay what they are: a weight is quantized by a parametrization, an activation by a forward pre-hook
    of its consumers. Activation ranges are chosen on `batches` with the weights already quantized. Layers and
    activations that the plan does not name stay in float.

    Raises `ModelError` if the plan names something that the model does not have.
    """
    batches = reusable(batches)
    _check_names(plan.weight_bits, quantizable_names(model), "layer")
    points = discover(model, batches, task, include=tuple(glob.escape(name) for name in plan.weight_bits))
    _check_names(plan.activation_bits, list(points.activation_by_name), "activation")
    quantized = copy.deepcopy(model)
    for layer in points.layers:
        weight = weight_parameter(quantized, layer)
        axis = layer.channel_axis if plan.weight_grid.per_channel else None
        grid = choose_weight_grid(weight, plan.weight_bits[layer.name], layer.channel_axis, plan.weight_grid)
        quantize_weight(quantized, layer.sites, grid, axis, plan.weight_grid.symmetric)
    if plan.activation_bits:
        options = {name: [num_bits] for name, num_bits in plan.activation_bits.items()}
        grids = calibrate(quantized, batches, task, points, options, progress)
        for name, num_bits in plan.activation_bits.items():
            consumers = points.activation_by_name[name].consumers
            modules = [quantized.get_submodule(consumer) for consumer in consumers]
            quantize_activation(modules, name, grids[name][num_bits])
    return quantized


def quantize_weight(
    model: nn.Module, sites: Sequence[Sequence[str]], grid: Grid, axis: int | None, symmetric: bool
) -> WeightQuantizer:
    """Register one weight quantizer at every site of a weight; tied weights share it."""
    quantizer = WeightQuantizer(grid, axis, symmetric)
    for module_name, parameter in sites:
        parametrize.register_parametrization(model.get_submodule(module_name), parameter, quantizer)
    return quantizer


def quantize_activation(consumers: Sequence[nn.Module], name: str, grid: Grid) -> ActivationQuantizer:
    """Let all consumers read their input through one quantizer."""
    quantizer = ActivationQuantizer(name, grid)
    for module in dict.fromkeys(consumers):
        quantizer.attach(module)
    return quantizer


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
        elif "input_quantizer" not in parts:
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
