"""Discovery of a model's quantization points: every weight and every tensor that can be given a bit width."""

from __future__ import annotations

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tracequant.errors import DataError, ModelError
from tracequant.flow import Flow
from tracequant.model_state import fingerprint, frozen_evaluation
from tracequant.packed_layout import DTYPE_BYTES
from tracequant.points import ActivationPoint, Layer, OutputPoint, QuantizationPoints, StoredTensor
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
    pattern of `ties` makes one group of layers that share their bit width. A pattern that matches nothing warns, and so
    do modules of other kinds with a weight (recurrent ones, a library's own linear layer), which stay in float.

    Raises `ModelError` if no layer is left, and `DataError` for batches that cannot be used.
    """
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
            f" Embedding or MultiheadAttention module{f', found {_some(others)}' if others else ''}"
        )
    if others:
        warnings.warn(
            f"{len(others)} layers are of kinds that cannot be quantized and stay in float: {_some(others)}; only Conv,"
            " ConvTranspose, Linear, Embedding and MultiheadAttention can",
            stacklevel=2,
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
        outputs=tuple(_output_points(modules, layers, calls.flow)),
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


@dataclass(frozen=True)
class _ReadTensor:
    """A tensor that a layer's module read: the number of its value, its elements, whether it is the data itself."""

    number: int
    numel: int
    is_model_input: bool


class _Calls:
    """What an example forward pass showed: which module read which tensors, MACs of each layer for one sample."""

    def __init__(self, modules: Iterable[str]) -> None:
        self.reads: dict[str, list[_ReadTensor]] = {name: [] for name in modules}
        self.flow = Flow()
        self.macs: dict[str, float] = defaultdict(float)
        self.samples = 1


def _record_calls(
    model: nn.Module, batches: Batches, task: Task, candidates: dict[str, tuple[tuple[str, str], ...]]
) -> _Calls:
    modules = dict(model.named_modules())
    layers_of: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, sites in candidates.items():
        for module_name, parameter in sites:
            layers_of[module_name].append((name, parameter))
    calls = _Calls(name for name in modules if name in layers_of)
    flow, handles = calls.flow, []

    def watch(module_name: str) -> None:
        read: list[Tensor] = []
        numbers: list[int] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            read.clear()
            replace_inputs(module, args, kwargs, read.append)
            numbers[:] = [flow.number(tensor) for tensor in read]
            flow.enter()

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            flow.leave(module_name, numbers, output, rounds=module_name in layers_of)
            if module_name in layers_of:
                calls.reads[module_name].extend(
                    _ReadTensor(number, tensor.numel(), flow.is_data(number))
                    for number, tensor in zip(numbers, read, strict=True)
                )
            for name, parameter in layers_of.get(module_name, ()):
                calls.macs[name] += _macs(module, parameter, read, output) / calls.samples
            read.clear()

        handles.append(modules[module_name].register_forward_pre_hook(before, with_kwargs=True))
        handles.append(modules[module_name].register_forward_hook(after, with_kwargs=True))

    try:
        for module_name, module in modules.items():
            if module_name in layers_of or is_norm(module):
                watch(module_name)
            if isinstance(module, nn.MultiheadAttention):
                out = f"{module_name}.out_proj" if module_name else "out_proj"
                if out in candidates:
                    # The attention function reads out_proj's weight itself and never calls the module.
                    handles.append(module.register_forward_hook(_count_out_proj(calls, out), with_kwargs=True))
        handles.append(model.register_forward_hook(lambda module, args, output: flow.finish(output)))
        with frozen_evaluation(model), torch.no_grad():
            for batch in checked(batches, task, model):
                calls.samples = task.batch_size(batch)
                with flow:
                    outputs = task.outputs(model, batch)
                    flow.finish(outputs)
                task.check(outputs, batch)
                break
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _output_points(modules: dict[str, nn.Module], layers: Sequence[Layer], flow: Flow) -> Iterator[OutputPoint]:
    """The outputs of quantized convolutions that must be rounded where they arise, each once."""
    seen: set[str] = set()
    for layer in layers:
        for name, _ in layer.sites:
            if not isinstance(modules[name], CONVOLUTIONS):
                continue
            rounded = _normalized_by(modules, flow, name) or name
            values = flow.outputs[rounded]
            if rounded in seen or not any(flow.needs_rounding(value) for value in values):
                continue
            seen.add(rounded)
            # One quantizer serves all calls of the module, so that only limits that all of them have are kept.
            limits = [flow.bounds(value) for value in values]
            low, high = min(low for low, _ in limits), max(high for _, high in limits)
            yield OutputPoint(rounded, layer.name, low, high)


def _normalized_by(modules: dict[str, nn.Module], flow: Flow, convolution: str) -> str | None:
    """The BatchNorm that alone reads every output of a convolution: folded into it, the two are one."""
    readers = {read.reader for value in flow.outputs[convolution] for read in flow.reads[value] if read.is_module}
    alone = all(len(flow.reads[value]) == 1 for value in flow.outputs[convolution])
    (reader,) = readers if len(readers) == 1 and alone else (None,)
    return reader if reader is not None and is_norm(modules[reader]) else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm, which a runtime folds into the convolution before it."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_frozen_norm(module)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of constants, as detectors have: each library has a class of its own for it."""
    buffers = {name for name, _ in module.named_buffers(recurse=False)} - {"num_batches_tracked"}
    alone = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    return alone and buffers == {"weight", "bias", "running_mean", "running_var"}


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
            first = reader.setdefault(tensor.number, name)
            a, b = sorted((root(first), root(name)), key=names.index)
            parent[b] = a
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if calls.reads[name]:
            groups[root(name)].append(name)
    points = []
    for name, consumers in groups.items():
        tensors = {tensor.number: tensor for consumer in consumers for tensor in calls.reads[consumer]}
        points.append(
            ActivationPoint(
                name=name,
                consumers=tuple(consumers),
                numel=sum(tensor.numel for tensor in tensors.values()) / calls.samples,
                is_model_input=any(tensor.is_model_input for tensor in tensors.values()),
            )
        )
    return points


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
