"""Weights that are computed before each call, made parameters of their own."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tracequant.core.errors import ModelError

# Where a parametrized module keeps the order of the parameters that it had before.
_ORDER = "_parameter_order"


def fuse_weight_norm(model: nn.Module) -> nn.Module:
    """A copy of `model` whose weights are plain parameters, with the same outputs in evaluation mode.

    Weights under `torch.nn.utils.parametrizations.weight_norm` or the older `torch.nn.utils.weight_norm` get the values
    that the normalisation computes. So do weights under spectral normalisation, pruning masks and any other
    parametrization. `model` itself is untouched. A model without such weights is copied as it is.

    Raises `ModelError` for a quantized model.
    """
    for name, module in model.named_modules():
        if is_quantized(module):
            raise ModelError(
                f"fuse_weight_norm expects the float model, module {name or type(module).__name__} is quantized"
                " already; tracequant.to_float(model) gives plain weights with the values of their codes"
            )
    # A weight that a hook has computed is no leaf of its graph, which torch does not copy.
    computed = [weight for module in model.modules() for weight in _attributes(module) if isinstance(weight, Tensor)]
    memo: dict[int, Any] = {id(weight): weight.detach().clone() for weight in computed if not weight.is_leaf}
    fused = copy.deepcopy(model, memo)
    modes = {module: module.training for module in fused.modules()}
    fused.eval()  # spectral normalisation changes its vectors in training
    for module in list(fused.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if _hooked(hook):
                cast(Any, hook).remove(module)
                del module._forward_pre_hooks[key]
                _put_first(module, {name: module._parameters[name] for name in _hooked(hook)})
        if parametrize.is_parametrized(module):
            make_plain(module)
    for module, training in modes.items():
        module.training = training
    return fused


def _attributes(module: nn.Module) -> list[Any]:
    """What a module holds beside its parameters and buffers, and the list of weights that a recurrent layer keeps."""
    weights = module._flat_weights if isinstance(module, nn.RNNBase) else []
    return [*vars(module).values(), *weights]


def computes_weights(module: nn.Module) -> list[str]:
    """Names of the parameters that a module computes from others before each call."""
    names = list(cast(nn.ModuleDict, module.parametrizations)) if parametrize.is_parametrized(module) else []
    for hook in module._forward_pre_hooks.values():
        names.extend(_hooked(hook))
    return names


def _hooked(hook: Any) -> list[str]:
    """The parameter that a hook of torch's older kind computes."""
    if isinstance(hook, BasePruningMethod):
        return [hook._tensor_name]
    return [hook.name] if isinstance(hook, (WeightNorm, SpectralNorm)) else []


def is_quantized(module: nn.Module) -> bool:
    """Whether a weight of a module is rounded to a number of bits before each call."""
    if not parametrize.is_parametrized(module):
        return False
    chains = cast(nn.ModuleDict, module.parametrizations).values()
    return any(hasattr(item, "num_bits") for chain in chains for item in cast(nn.ModuleList, chain))


def keep_order(module: nn.Module) -> None:
    """Note the order of a module's parameters before one of them is parametrized, for `make_plain` to restore."""
    vars(module).setdefault(_ORDER, tuple(module._parameters))


@torch.no_grad()
def make_plain(module: nn.Module) -> None:
    """Replace the parametrized weights of a module, which must be a copy, by parameters of the same values.

    Not by `remove_parametrizations`, which takes the weight from the class too, and the copy shares it with the model.
    """
    chains = cast(nn.ModuleDict, module.parametrizations)
    weights: dict[str, nn.Parameter | None] = {}
    for name in chains:
        chain = cast(parametrize.ParametrizationList, chains[name])
        values = getattr(module, name).detach()
        original = getattr(chain, "original", None)
        if isinstance(original, nn.Parameter) and original.shape == values.shape:
            # Of tied weights every site writes the same values: rounding twice is rounding once.
            weights[name] = original
            original.copy_(values)
        else:
            trained = any(parameter.requires_grad for parameter in chain.parameters(recurse=False))
            weights[name] = nn.Parameter(values.clone(), requires_grad=trained)
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    _put_first(module, weights)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _put_first(module: nn.Module, weights: dict[str, nn.Parameter | None]) -> None:
    """Give a module these parameters; all have the order that was noted, or weights come before biases."""
    parameters = weights | {name: value for name, value in module._parameters.items() if name not in weights}
    order = vars(module).pop(_ORDER, module._flat_weights_names if isinstance(module, nn.RNNBase) else ())
    module._parameters.clear()
    module._parameters.update({name: parameters[name] for name in (*order, *parameters) if name in parameters})
