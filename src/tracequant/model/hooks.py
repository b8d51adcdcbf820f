"""Reading and replacing a model's weights and activations for a while."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tracequant.core.errors import ModelError
from tracequant.core.points import Layer, QuantizationPoints


def idle_layers(names: Sequence[str]) -> ModelError:
    """The error for layers that the loss of no batch depends on."""
    # Many layers under one name are an auxiliary head, left out by one pattern.
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.split(".")[0]].append(name)
    patterns = [f"{top}.*" if len(members) > 1 else members[0] for top, members in groups.items()]
    return ModelError(
        f"the loss does not depend on layer {', '.join(names[:4])}{' and others' if len(names) > 4 else ''} in"
        " any batch; give batches that reach every layer, or leave out what the task does not use, for instance with"
        f" exclude={patterns}"
    )


def weight_parameter(model: nn.Module, layer: Layer) -> Tensor:
    """The parameter of a layer of a model that is not quantized, shape `layer.shape`."""
    module_name, parameter_name = layer.sites[0]
    try:
        weight = getattr(model.get_submodule(module_name), parameter_name)
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor) or tuple(weight.shape) != layer.shape:
        found = list(weight.shape) if isinstance(weight, Tensor) else "nothing"
        raise ModelError(
            f"layer {layer.name}: expected a weight of shape {list(layer.shape)}, the model has {found}; the points"
            " were found on another model"
        )
    return weight


@contextmanager
def replaced_weights(model: nn.Module, values: dict[str, Tensor], points: QuantizationPoints) -> Iterator[None]:
    """Let layers have these weights inside the block, by layer name; afterwards those of before, bit for bit."""
    kept = {name: weight_parameter(model, points.by_name[name]) for name in values}
    saved = {name: weight.detach().clone() for name, weight in kept.items()}
    try:
        with torch.no_grad():
            for name, weight in kept.items():
                weight.copy_(values[name])
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                weight.copy_(saved[name])


@contextmanager
def reading(
    model: nn.Module, points: QuantizationPoints, read: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `read(point name, tensor)` whenever a consumer reads the tensor of an activation point.

    What `read` returns replaces the tensor for that consumer; None leaves it. Tensors that are not floating point are
    passed over.
    """
    handles = []
    try:
        for point in points.activations:
            for consumer in point.consumers:

                def hook(module: nn.Module, args: Any, kwargs: Any, name: str = point.name) -> Any:
                    return replace_inputs(module, args, kwargs, lambda tensor: read(name, tensor))

                module = model.get_submodule(consumer)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def replace_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], read: Callable[[Tensor], Tensor | None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with every data input passed through `read`: one tensor, or query, key and value.

    The same tensor given twice is read once, so that query and key stay one tensor where they were.
    """
    count = 3 if isinstance(module, nn.MultiheadAttention) else 1
    names = ("query", "key", "value") if count == 3 else ("input", "x")
    # Pairs and no dictionary by id(): torch.compile would compile anew for every tensor.
    done: list[tuple[Tensor, Tensor]] = []

    def replace(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        for given, replaced in done:
            if given is tensor:
                return replaced
        new = read(tensor)
        done.append((tensor, tensor if new is None else new))
        return done[-1][1]

    new_args = tuple(replace(value) if i < count else value for i, value in enumerate(args))
    new_kwargs = {key: replace(value) if key in names else value for key, value in kwargs.items()}
    return new_args, new_kwargs
