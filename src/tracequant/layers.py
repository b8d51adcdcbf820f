"""Discovery of a model's quantization points: every weight and every tensor that can be given a bit width."""

from __future__ import annotations

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from tracequant.data_inputs import data_readers
from tracequant.errors import ModelError
from tracequant.model_state import fingerprint, frozen_evaluation
from tracequant.packed_layout import DTYPE_BYTES
from tracequant.points import ActivationPoint, Layer, QuantizationPoints, StoredTensor
from tracequant.task import Batches, Task, checked

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# safetensors' dtype names, the ones that packed_layout counts bytes for.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
assert set(DTYPE_NAMES.values()) == set(DTYPE_BYTES)

# A read of one input by a consumer: (consumer's module, tensor).
ReadHook = Callable[[nn.Module, Tensor], Tensor | None]


def discover(
    model: nn.Module,
    batches: Batches,
    task: Task,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    ties: Sequence[str] = (),
) -> QuantizationPoints:
    """The quantization points of `model`, found in one forward pass over the first of `batches`.

    Weights of Conv1d/2d/3d, ConvTranspose, Linear, Embedding and the projections of MultiheadAttention count. `include`
    and `exclude` are shell patterns that must match a whole layer name ("layer1.*" does not match "layer10.conv"); each
    pattern of `ties` makes one group of layers that share their bit width. A pattern that matches nothing warns.

    Raises `ModelError` if no layer is left, and `DataError` for batches that cannot be used.
    """
    candidates = _candidate_weights(model)
    names = list(candidates)
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no quantizable layer: expected at least one Conv, ConvTranspose, Linear,"
            " Embedding or MultiheadAttention module"
        )
    kept = set(match_names(include, names, "include")) - set(match_names(exclude, names, "exclude"))
    if not kept:
        raise ModelError(f"no layer is left: include {list(include)}, exclude {list(exclude)}, layers {_some(names)}")
    candidates = {name: sites for name, sites in candidates.items() if name in kept}

    calls = _record_calls(model, batches, task, candidates)
    points = _group_activations(calls)
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
        ties=_tie_groups(ties, list(candidates)),
        float_tensors=tuple(_float_tensors(model, layers)),
        fingerprint=fingerprint(model),
    )


def quantizable_names(model: nn.Module) -> list[str]:
    """Names of all layers that can be quantized, in the order of registration."""
    return list(_candidate_weights(model))


def idle_layers(names: Sequence[str]) -> ModelError:
    """The error for layers that the loss does not depend on."""
    # Many layers under one name are an auxiliary head, left out by one pattern.
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.split(".")[0]].append(name)
    patterns = [f"{top}.*" if len(members) > 1 else members[0] for top, members in groups.items()]
    flags = " ".join(f"--exclude '{pattern}'" for pattern in patterns)
    return ModelError(
        f"the loss of a batch does not depend on layer {', '.join(names[:4])}{' and others' if len(names) > 4 else ''};"
        f" leave out what the task does not use, for instance with exclude={patterns} ({flags})"
    )


def match_names(patterns: Iterable[str], names: Sequence[str], purpose: str) -> list[str]:
    """The names that any of the shell patterns matches in full, in their own order; an idle pattern warns."""
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            warnings.warn(f"{purpose} pattern {pattern!r} matches no layer; layers are {_some(names)}", stacklevel=3)
        matched.update(hits)
    return [name for name in names if name in matched]


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
    done: dict[int, Tensor] = {}

    def replace(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        if id(tensor) not in done:
            new = read(tensor)
            done[id(tensor)] = tensor if new is None else new
        return done[id(tensor)]

    new_args = tuple(replace(value) if i < count else value for i, value in enumerate(args))
    new_kwargs = {key: replace(value) if key in names else value for key, value in kwargs.items()}
    return new_args, new_kwargs


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
        if not isinstance(weight, nn.Parameter):
            raise ModelError(
                f"layer {name} computes its weight from other parameters (old-style weight normalisation?); call"
                " torch.nn.utils.remove_weight_norm first"
            )
        first.setdefault(id(weight), name or "weight")
        sites[id(weight)].append((module_name, parameter))
    return {name: tuple(sites[key]) for key, name in first.items()}


class _Calls:
    """What an example forward pass showed: which module read which tensors, MACs of each layer for one sample."""

    def __init__(self, modules: Iterable[str]) -> None:
        self.reads: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.batch: Any = None
        self.macs: dict[str, float] = defaultdict(float)
        self.samples = 1
        self.data_readers: set[str] = set()


def _record_calls(
    model: nn.Module, batches: Batches, task: Task, candidates: dict[str, tuple[tuple[str, str], ...]]
) -> _Calls:
    modules = dict(model.named_modules())
    layers_of: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, sites in candidates.items():
        for module_name, parameter in sites:
            layers_of[module_name].append((name, parameter))
    calls = _Calls(name for name in modules if name in layers_of)
    handles = []

    def on_call(module_name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            read: list[Tensor] = []
            replace_inputs(module, args, kwargs, lambda tensor: read.append(tensor))
            calls.reads[module_name].extend(read)
            for name, parameter in layers_of[module_name]:
                calls.macs[name] += _macs(module, parameter, read, output) / calls.samples

        return hook

    try:
        for module_name in layers_of:
            handles.append(modules[module_name].register_forward_hook(on_call(module_name), with_kwargs=True))
        for module_name, module in modules.items():
            if isinstance(module, nn.MultiheadAttention):
                out = f"{module_name}.out_proj" if module_name else "out_proj"
                if out in candidates:
                    # The attention function reads out_proj's weight itself and never calls the module.
                    handles.append(module.register_forward_hook(_count_out_proj(calls, out), with_kwargs=True))
        with frozen_evaluation(model), torch.no_grad():
            for batch in checked(batches, task, model):
                calls.batch = batch
                calls.samples = task.batch_size(batch)
                task.check(task.outputs(model, batch), batch)
                break
    finally:
        for handle in handles:
            handle.remove()
    calls.data_readers = data_readers(model, calls.batch, task, layers_of)
    return calls


def _count_out_proj(calls: _Calls, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.macs[name] += output[0].numel() * module.embed_dim / calls.samples

    return hook


def _macs(module: nn.Module, parameter: str, read: list[Tensor], output: Any) -> float:
    """Multiply-accumulates of one call on a whole batch that one of the module's weights takes part in."""
    if isinstance(module, CONVOLUTIONS):
        return float(output.numel() * module.weight[0].numel())
    if isinstance(module, TRANSPOSED):
        return float(read[0].numel() * module.weight[0].numel())
    if isinstance(module, nn.Linear):
        return float(output.numel() * module.in_features)
    if isinstance(module, nn.MultiheadAttention):
        # Self-attention reads one tensor, attention to a memory two: query, and key and value as one.
        query, key, value = (*read, *[read[-1]] * (3 - len(read)))
        own = {"q_proj_weight": [query], "k_proj_weight": [key], "v_proj_weight": [value]}
        return float(sum(t.numel() * module.embed_dim for t in own.get(parameter, [query, key, value])))
    return 0.0


def _group_activations(calls: _Calls) -> list[ActivationPoint]:
    """Points from reads: modules that read one tensor belong together, and so do the tensors of one module."""
    names = list(calls.reads)
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    reader: dict[int, str] = {}
    for name in names:
        for tensor in calls.reads[name]:
            first = reader.setdefault(id(tensor), name)
            a, b = sorted((root(first), root(name)), key=names.index)
            parent[b] = a
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if calls.reads[name]:
            groups[root(name)].append(name)
    points = []
    # By storage: a flattened or permuted view of the input is still the input.
    inputs = {_storage(leaf) for leaf in pytree.tree_leaves(calls.batch) if isinstance(leaf, Tensor)}
    for name, consumers in groups.items():
        tensors = {id(tensor): tensor for consumer in consumers for tensor in calls.reads[consumer]}
        points.append(
            ActivationPoint(
                name=name,
                consumers=tuple(consumers),
                numel=sum(tensor.numel() for tensor in tensors.values()) / calls.samples,
                is_model_input=any(_storage(tensor) in inputs for tensor in tensors.values())
                or not calls.data_readers.isdisjoint(consumers),
            )
        )
    return points


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tie_groups(patterns: Sequence[str], names: list[str]) -> tuple[tuple[str, ...], ...]:
    groups = []
    taken: dict[str, str] = {}
    for pattern in patterns:
        group = tuple(match_names([pattern], names, "tie"))
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


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown}, ... ({len(names)} in all)"
