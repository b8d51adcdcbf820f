"""Where a model holds the weights that can be quantized: by the class of the module, or by what reads the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tracequant.core.errors import ModelError
from tracequant.core.packed_layout import state_name
from tracequant.model.batches import Batch, Batches
from tracequant.model.device import measuring
from tracequant.model.fuse import computes_weights, is_quantized
from tracequant.model.hooks import replace_inputs
from tracequant.model.kinds import CONVOLUTIONS, RECURRENT, TRANSPOSED
from tracequant.model.memory import on_first_batch
from tracequant.model.operations import WeightReads
from tracequant.model.task import Task, checked

Site = tuple[str, str]


@dataclass(frozen=True)
class Matrix:
    """A weight that can be quantized: the (module, parameter) pairs that hold it, the axis of its output channels.

    `of_input` are the sites whose weight is multiplied with the first input of their module. `known` says that the
    class of a module tells what reads the weight.
    """

    sites: tuple[Site, ...]
    channel_axis: int
    of_input: frozenset[Site]
    known: bool


@dataclass(frozen=True)
class Matrices:
    """All weights of a model that can be quantized, by layer name, and the weight matrices that cannot."""

    layers: dict[str, Matrix]
    others: dict[str, nn.Parameter]


def example(model: nn.Module, batches: Batches, task: Task) -> Batch:
    """The first batch, on the model's device; random numbers that a loader draws are given back."""
    with measuring(model):
        return next(iter(checked(batches, task, model)))


def first_look(model: nn.Module, batches: Batches, task: Task) -> tuple[Batch, Matrices]:
    """The first batch, or as many of its samples as fit into memory, and the matrices that it shows."""

    def look(first: Batches) -> tuple[Batch, Matrices]:
        batch = example(model, first, task)
        return batch, find_matrices(model, batch, task)

    return on_first_batch(task, batches, look)[0]


def known_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of a module whose class says what it does with them."""
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.Embedding)):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in names if getattr(module, name) is not None)
    if isinstance(module, RECURRENT):
        return tuple(name for name in module._parameters if name.startswith("weight_"))
    return ()


def check_plain(model: nn.Module) -> None:
    """Raise `ModelError` if a weight of a known class is no parameter: one that is computed, or not there yet."""
    for module_name, module in model.named_modules():
        shown = module_name or type(module).__name__
        if is_quantized(module):
            raise ModelError(f"module {shown} is quantized already; pass the float model")
        if weights := computes_weights(module):
            raise ModelError(
                f"module {shown} computes its {weights[0]} from other parameters (weight normalisation or another"
                " parametrization); pass tracequant.fuse_weight_norm(model), a copy with plain weights"
            )
        for name in known_parameters(module):
            layer, weight = layer_name((module_name, name)), getattr(module, name)
            if isinstance(weight, UninitializedParameter):
                raise ModelError(f"layer {layer} is lazy and has no weight yet; run the model once on real data first")
            if not isinstance(weight, nn.Parameter) and weight.numel() > 0:
                raise ModelError(
                    f"layer {layer} expects a torch.nn.Parameter as its weight, got a {type(weight).__name__} that may"
                    " be computed from other parameters; make the weight a parameter of its own"
                )


def find_matrices(model: nn.Module, batch: Batch, task: Task) -> Matrices:
    """The weights of `model` that can be quantized, in the order of registration.

    Where a module of another class holds a matrix, a forward pass over `batch` shows what reads it.
    """
    known: dict[Site, nn.Parameter] = {}
    others: dict[Site, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        names = known_parameters(module)
        for name in names:
            weight = getattr(module, name)
            if weight.numel() > 0:
                known[module_name, name] = weight
        for name, weight in module.named_parameters(recurse=False):
            if name not in names and not isinstance(weight, UninitializedParameter) and _is_matrix(weight):
                others[module_name, name] = weight
    identities = {id(weight) for weight in known.values()}
    unknown = {site: weight for site, weight in others.items() if id(weight) not in identities}
    reads = _watch(model, batch, task, unknown) if unknown else WeightReads(nn.Module())
    # Of a weight that several modules hold, those of known classes come first: they give the layer its name.
    sites: dict[int, list[Site]] = {}
    for site, weight in (*known.items(), *others.items()):
        if id(weight) in identities or id(weight) in reads.channel_axis:
            sites.setdefault(id(weight), []).append(site)
    modules = dict(model.named_modules())
    order = {name: position for position, name in enumerate(modules)}
    layers = {}
    for identity, places in sorted(sites.items(), key=lambda item: order[item[1][0][0]]):
        in_class = [site for site in places if site in known]
        axis = reads.channel_axis.get(identity, 0)
        if in_class:
            axis = 1 if isinstance(modules[in_class[0][0]], TRANSPOSED) else 0
        of_input = frozenset(
            (module, name)
            for module, name in places
            if (
                _reads_input(modules[module], name)
                if (module, name) in known
                else identity in reads.of_input.get(module, ())
            )
        )
        layers[layer_name(places[0])] = Matrix(tuple(places), axis, of_input, bool(in_class))
    left = {
        state_name(site): weight
        for site, weight in unknown.items()
        if id(weight) not in sites
        and (id(weight) in reads.computed or id(weight) not in reads.seen)
        and sum(size > 1 for size in weight.shape) > 1  # a factor for each channel is no matrix
    }
    return Matrices(layers, left)


def matrix_names(model: nn.Module) -> list[str]:
    """Names of the layers that the classes of modules tell, in the order of registration; no forward pass is needed."""
    names: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name in known_parameters(module):
            weight = getattr(module, name)
            if weight.numel() > 0:
                names.setdefault(id(weight), layer_name((module_name, name)))
    return list(names.values())


def layer_name(site: Site) -> str:
    """A layer's name: that of the module whose `weight` it is, or else that of the parameter."""
    module, parameter = site
    return (module if parameter == "weight" else state_name(site)) or "weight"


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim > 1 and weight.numel() > 0 and weight.is_floating_point()


def _reads_input(module: nn.Module, parameter: str) -> bool:
    """Whether a weight of a known class is multiplied with its module's input, which has samples along its first axis.

    Of a recurrent layer the first layer's weights are, where sequences do not lie along the second axis.
    """
    if isinstance(module, nn.RNNBase):
        return module.batch_first and parameter in ("weight_ih_l0", "weight_ih_l0_reverse")
    return parameter != "weight_hh"


def _watch(model: nn.Module, batch: Batch, task: Task, unknown: dict[Site, nn.Parameter]) -> WeightReads:
    """What reads the parameters of a model in a forward pass."""
    reads = WeightReads(model)
    handles = []
    modules = dict(model.named_modules())
    for name in dict.fromkeys(module for module, _ in unknown):
        enter, leave = _watcher(reads, name, task.batch_size(batch))
        handles.append(modules[name].register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(modules[name].register_forward_hook(leave))
    try:
        with measuring(model), torch.no_grad(), reads:
            task.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return reads


def _watcher(reads: WeightReads, name: str, samples: int) -> tuple[Any, Any]:
    """Hooks for before and after a module's call; an input that has no samples along its first axis is left out."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs: list[Tensor] = []
        replace_inputs(module, args, kwargs, inputs.append)
        first = inputs[0] if inputs and inputs[0].ndim and len(inputs[0]) % samples == 0 else None
        reads.enter(name, module, first)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        reads.leave()

    return enter, leave
