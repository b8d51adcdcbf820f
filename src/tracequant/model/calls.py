"""What an example forward pass shows: which module reads which tensor, and how much it computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracequant.core.points import ActivationPoint, Layer, OutputPoint
from tracequant.model.batches import Batch
from tracequant.model.device import measuring
from tracequant.model.flow import Flow
from tracequant.model.hooks import replace_inputs
from tracequant.model.kinds import CONVOLUTIONS, TRANSPOSED, is_norm
from tracequant.model.operations import WeightReads
from tracequant.model.sites import Matrix, known_parameters
from tracequant.model.task import Task, first_outputs


@dataclass(frozen=True)
class ReadTensor:
    """A tensor that a layer's module read: the number of its value, its elements, whether it is the data itself."""

    number: int
    numel: int
    is_model_input: bool


class Calls:
    """What an example forward pass showed: which module read which tensors, MACs of each layer for one sample.

    `batch` is what was looked at, and `outputs` are the task's outputs for it.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self.reads: dict[str, list[ReadTensor]] = {name: [] for name in modules}
        self.flow = Flow()
        self.macs: dict[str, float] = defaultdict(float)
        self.samples = 1
        self.batch: Batch = None
        self.outputs: Any = None


def record_calls(model: nn.Module, batch: Batch, task: Task, candidates: Mapping[str, Matrix]) -> Calls:
    """What a forward pass over a batch shows; `candidates` are the layers' weights."""
    modules = dict(model.named_modules())
    layers_of = _layers_by_module(candidates, modules)
    consumers = {site[0] for matrix in candidates.values() for site in matrix.of_input} & layers_of.keys()
    calls = Calls(name for name in modules if name in consumers)
    flow, reads, handles = calls.flow, WeightReads(model), []

    def watch(module_name: str) -> None:
        read: list[Tensor] = []
        numbers: list[int] = []
        known = bool(known_parameters(modules[module_name]))

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            read.clear()
            replace_inputs(module, args, kwargs, read.append)
            numbers[:] = [flow.number(tensor) for tensor in read]
            flow.enter()
            reads.inside += known

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            reads.inside -= known
            flow.leave(module_name, numbers, output, rounds=module_name in consumers)
            if module_name in consumers:
                calls.reads[module_name].extend(
                    ReadTensor(number, tensor.numel(), flow.is_data(number))
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
        with measuring(model), torch.no_grad():
            calls.samples = task.batch_size(batch)
            with flow, reads:
                outputs = first_outputs(task, model, batch)
                flow.finish(outputs)
            task.check(outputs, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, matrix in candidates.items():
        module_name, parameter = matrix.sites[0]
        # A known module's own reads are counted above, for it may compute them in ways that are not seen.
        macs = reads.macs if not matrix.known else reads.macs_outside
        calls.macs[name] += macs[id(getattr(modules[module_name], parameter))] / calls.samples
    calls.batch, calls.outputs = batch, outputs
    return calls


def _layers_by_module(
    candidates: Mapping[str, Matrix], modules: Mapping[str, nn.Module]
) -> dict[str, list[tuple[str, str]]]:
    """Modules that are watched as one whole, each with the (layer, parameter) pairs that it holds.

    A module of no known class is watched if its input is what its weight is multiplied with, unless it holds another
    layer's module.
    """
    layers_of: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, matrix in candidates.items():
        for module_name, parameter in matrix.sites:
            if parameter in known_parameters(modules[module_name]) or (module_name, parameter) in matrix.of_input:
                layers_of[module_name].append((name, parameter))
    held = {
        outer
        for outer in layers_of
        if not known_parameters(modules[outer])
        and any(inner != outer and (not outer or inner.startswith(f"{outer}.")) for inner in layers_of)
    }
    return {name: layers for name, layers in layers_of.items() if name not in held}


def output_points(modules: dict[str, nn.Module], layers: Sequence[Layer], flow: Flow) -> Iterator[OutputPoint]:
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


def _count_out_proj(calls: Calls, name: str) -> Callable[..., None]:
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
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        # At every step of every sequence each matrix is multiplied once. A packed sequence has its steps in `data`.
        hidden = output[0] if isinstance(output, tuple) else output
        width = int(getattr(module, "proj_size", 0) or module.hidden_size)
        directions = 2 if getattr(module, "bidirectional", False) else 1
        return float(hidden.data.numel() // (width * directions) * getattr(module, parameter).numel())
    return 0.0


def group_activations(calls: Calls) -> list[ActivationPoint]:
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
