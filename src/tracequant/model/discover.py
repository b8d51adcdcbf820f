"""Discovery of a model's quantization points: every weight and every tensor that can be given a bit width."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tracequant.core.errors import DataError, ModelError
from tracequant.core.match import match_names, some_names
from tracequant.core.options import resolve, takes
from tracequant.core.points import Layer, QuantizationPoints, StoredTensor
from tracequant.core.settings import DiscoverSettings
from tracequant.model.batches import Batches
from tracequant.model.calls import group_activations, output_points, record_calls
from tracequant.model.hooks import weight_parameter
from tracequant.model.kinds import CONVOLUTIONS, DTYPE_NAMES, TRANSPOSED
from tracequant.model.memory import on_first_batch
from tracequant.model.state import fingerprint
from tracequant.model.task import Task, check_arguments


@takes(DiscoverSettings)
def discover(
    model: nn.Module, batches: Batches, task: Task, settings: DiscoverSettings | None = None, **fields: object
) -> QuantizationPoints:
    """The quantization points of `model`, found in one forward pass over the first of `batches`.

    Weights of Conv1d/2d/3d, ConvTranspose, Linear, Embedding and the projections of MultiheadAttention count. `include`
    and `exclude` are shell patterns that must match a whole layer name ("layer1.*" does not match "layer10.conv"); each
    pattern of `ties` makes one group of layers that share their bit width, of those that are left. Modules of other
    kinds with a weight (recurrent ones, a library's own linear layer) stay in float, with a warning.

    Raises `ModelError` for a pattern that matches no layer of the model, or if no layer is left, `DataError` for
    batches that cannot be used, and `TaskError` for arguments in another order. Where the first batch does not fit into
    memory, fewer of its samples are taken.
    """
    request = resolve(DiscoverSettings, settings, fields)
    check_arguments(model, batches, task)
    if isinstance(batches, Iterator):
        raise DataError(
            "batches is an iterator, which can be read only once, and discover would take its first batch away from the"
            " next step; pass a list or a DataLoader"
        )
    candidates = _candidate_weights(model)
    names = list(candidates)
    others = _unsupported(model, candidates)
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no quantizable layer: expected at least one Conv, ConvTranspose, Linear,"
            f" Embedding or MultiheadAttention module{f', found {some_names(others)}' if others else ''}"
        )
    if others:
        warnings.warn(
            f"{len(others)} layers are of kinds that cannot be quantized and stay in float: {some_names(others)};"
            " only Conv, ConvTranspose, Linear, Embedding and MultiheadAttention can",
            stacklevel=2,
        )
    kept = set(match_names(request.include, names, "include")) - set(match_names(request.exclude, names, "exclude"))
    if not kept:
        raise ModelError(
            f"no layer is left: include {list(request.include)}, exclude {list(request.exclude)},"
            f" layers {some_names(names)}"
        )
    candidates = {name: sites for name, sites in candidates.items() if name in kept}

    # A few samples show what the whole batch does.
    calls, _ = on_first_batch(task, batches, lambda first: record_calls(model, first, task, candidates))
    points = group_activations(calls)
    point_of = {consumer: point.name for point in points for consumer in point.consumers}
    modules = dict(model.named_modules())
    layers = []
    for name, sites in candidates.items():
        module, parameter = modules[sites[0][0]], sites[0][1]
        weight = getattr(module, parameter)
        layers.append(
            Layer(
                name=name,
                kind=type(module).__name__,
                sites=sites,
                shape=tuple(weight.shape),
                channel_axis=1 if isinstance(module, TRANSPOSED) else 0,
                macs=round(calls.macs.get(name, 0.0)),
                activation=next((point_of[site[0]] for site in sites if site[0] in point_of), None),
            )
        )
    return QuantizationPoints(
        layers=tuple(layers),
        activations=tuple(points),
        ties=_tie_groups(request.ties, names, kept),
        float_tensors=tuple(_float_tensors(model, layers)),
        fingerprint=fingerprint(model),
        outputs=tuple(output_points(modules, layers, calls.flow)),
    )


def quantizable_names(model: nn.Module) -> list[str]:
    """Names of all layers that can be quantized, in the order of registration."""
    return list(_candidate_weights(model))


def _candidate_weights(model: nn.Module) -> dict[str, tuple[tuple[str, str], ...]]:
    """Layer name → the (module, parameter) pairs that hold its weight, tied weights merged under the first name."""
    found: list[tuple[str, str, str, Tensor]] = []
    for module_name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ModelError(
                f"module {module_name or type(module).__name__} is parametrized already (quantized, or under weight"
                " normalisation); pass the plain float model, or call"
                " torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.Embedding)):
            found.append((module_name or "", module_name, "weight", module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            parameters = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            for parameter in parameters:
                weight = getattr(module, parameter)
                if weight is not None:
                    prefix = f"{module_name}." if module_name else ""
                    found.append((prefix + parameter, module_name, parameter, weight))
    sites: dict[int, list[tuple[str, str]]] = defaultdict(list)
    first: dict[int, str] = {}
    for name, module_name, parameter, weight in found:
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ModelError(f"layer {name} is lazy and has no weight yet; run the model once on real data first")
        if weight.numel() == 0:
            continue
        if not isinstance(weight, nn.Parameter):
            raise ModelError(
                f"layer {name} computes its weight from other parameters (old-style weight normalisation?); call"
                " torch.nn.utils.remove_weight_norm first"
            )
        first.setdefault(id(weight), name or "weight")
        sites[id(weight)].append((module_name, parameter))
    return {name: tuple(sites[key]) for key, name in first.items()}


def _unsupported(model: nn.Module, candidates: dict[str, tuple[tuple[str, str], ...]]) -> list[str]:
    """Names, with their classes, of modules that hold a weight matrix and are none of the kinds that are known."""
    known = {site for sites in candidates.values() for site in sites}
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, nn.LayerNorm)
        and any(
            "weight" in parameter and weight.ndim > 1 and weight.numel() > 0 and (name, parameter) not in known
            for parameter, weight in module.named_parameters(recurse=False)
        )
    ]


def _tie_groups(patterns: Sequence[str], names: list[str], kept: set[str]) -> tuple[tuple[str, ...], ...]:
    groups = []
    taken: dict[str, str] = {}
    for pattern in patterns:
        # Of all layers: those of a block may have been left out.
        group = tuple(name for name in match_names([pattern], names, "ties") if name in kept)
        for name in group:
            if name in taken:
                raise ModelError(f"layer {name} is in two ties, {taken[name]!r} and {pattern!r}; make them one pattern")
            taken[name] = pattern
        if len(group) > 1:
            groups.append(group)
    return tuple(groups)


def _float_tensors(model: nn.Module, layers: Sequence[Layer]) -> Iterator[StoredTensor]:
    """All entries of the state dict but the quantized weights, tied ones once."""
    # By identity: a module registered under two names has its weight in the state dict twice.
    quantized = {id(weight_parameter(model, layer)) for layer in layers}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in quantized:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPE_NAMES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ModelError(f"state {name} is of type {kind}, which cannot be stored; convert it to float32")
        key = (id(tensor), tuple(tensor.shape))
        if key in seen:
            continue
        seen.add(key)
        yield StoredTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
