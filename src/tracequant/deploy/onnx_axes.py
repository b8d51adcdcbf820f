"""Inputs, outputs and open axes of an ONNX file, with names that a reader understands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracequant.core.errors import SettingsError

# Names of the axes after samples and channels, by their number.
_SIZES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class Call:
    """Arguments that a model is traced with, on the CPU, and the names of their open axes.

    `axes` has one entry for every tensor in the arguments, in the order of `pytree`: names by axis.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: tuple[dict[int, str], ...]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, which are the inputs of the file."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def dynamic_shapes(self) -> Any:
        """What `torch.export` takes: the batch as one dimension, every other open axis one that it works out."""
        if not any(self.axes):
            return None
        batch, axes = torch.export.Dim("batch"), iter(self.axes)

        def shape(leaf: Any) -> dict[int, Any] | None:
            if not isinstance(leaf, Tensor):
                return None
            return {axis: torch.export.Dim.AUTO if axis else batch for axis in next(axes)}

        args, kwargs = pytree.tree_map(shape, (self.args, self.kwargs))
        return kwargs or tuple(args)


def prepare(example: Any, dynamic_batch: bool, dynamic_sizes: bool | None) -> Call:
    """The call that `example` stands for: a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Open axes are the first with `dynamic_batch`, and the sizes with `dynamic_sizes`; None opens only the lengths of
    token ids, masks and the like. An open axis of length 1 is doubled, else tracing would take 1 for fixed.
    """
    axes: list[dict[int, str]] = []

    def named(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().cpu()
        names = {0: "batch"} if dynamic_batch and leaf.ndim else {}
        names |= _sizes(leaf, dynamic_sizes)
        axes.append(names)
        for axis in names:
            if leaf.shape[axis] == 1:
                leaf = torch.cat([leaf, leaf], axis)
        return leaf

    example = pytree.tree_map(named, dict(example) if isinstance(example, Mapping) else example)
    if isinstance(example, Mapping):
        # A cache of keys and values is no output of a file that is called with whole sequences.
        no_cache = {"use_cache": False} if example.get("use_cache") is True else {}
        return Call((), {**example, **no_cache}, tuple(axes))
    args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    return Call(args, {}, tuple(axes))


def _sizes(tensor: Tensor, dynamic_sizes: bool | None) -> dict[int, str]:
    if dynamic_sizes is False:
        return {}
    if tensor.ndim == 2 and not tensor.is_floating_point() and not tensor.is_complex():
        return {1: "sequence"}
    names = _SIZES.get(tensor.ndim - 2, tuple(f"size_{axis}" for axis in range(2, tensor.ndim)))
    return dict(enumerate(names, 2)) if dynamic_sizes else {}


def output_paths(outputs: Any) -> list[str]:
    """A name for each tensor of a model's outputs: its key, its attribute or its number; `output` for a single one."""
    names = []
    for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        if isinstance(leaf, Tensor):
            steps = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", "")))) for step in path]
            first = ["output"] if not steps or steps[0].isdigit() else []
            names.append(re.sub(r"\W", "_", "_".join(first + steps)))
    return names if len(set(names)) == len(names) else [f"output_{number}" for number in range(len(names))]


def rename(graph: Any, call: Call, input_names: Sequence[str] | None, output_names: Sequence[str]) -> None:
    """Give the graph's inputs, outputs and open axes their names; None leaves inputs those of the forward's arguments.

    The inputs stand in the order of the call's tensors. Raises `SettingsError` for other numbers of names.
    """
    for kind, names, values in (
        ("input_names", input_names, graph.inputs),
        ("output_names", output_names, graph.outputs),
    ):
        if names is None:
            continue
        if isinstance(names, str) or len(names) != len(values) or len(set(names)) != len(names):
            raise SettingsError(
                f"{kind} is {names!r}, expected {len(values)} different names, one for each of"
                f" {', '.join(value.name for value in values)}"
            )
        _give_names(graph, values, names)
    _rename_axes(graph, _axis_names(graph.inputs, call))


def _give_names(graph: Any, values: Sequence[Any], names: Sequence[str]) -> None:
    """Rename values of the graph; another value that has one of the names gives way."""
    renamed = {id(value) for value in values}
    others = {output.name: output for node in graph for output in node.outputs if id(output) not in renamed}
    others |= {value.name: value for value in (*graph.inputs, *graph.outputs) if id(value) not in renamed}
    taken = {*others, *graph.initializers, *names}
    for name in names:
        if name in graph.initializers:
            raise SettingsError(f"{name!r} is the name of a weight in the file, expected another name")
        if name in others:
            number = next(i for i in range(1, len(taken) + 2) if f"{name}_{i}" not in taken)
            others[name].name = f"{name}_{number}"
            taken.add(f"{name}_{number}")
    for value, name in zip(values, names, strict=True):
        value.name = name


def _axis_names(inputs: Sequence[Any], call: Call) -> dict[str, str]:
    """Readable names by the exporter's symbols. Axes that must be equal share a symbol, others get a number."""
    names: dict[str, str] = {}
    for value, axes in zip(inputs, call.axes, strict=True):
        for axis, name in axes.items():
            symbol = getattr(value.shape[axis], "value", None)
            if isinstance(symbol, str) and symbol not in names:
                used = sum(other == name or other.startswith(f"{name}_") for other in names.values())
                names[symbol] = f"{name}_{used + 1}" if used else name
    return names


def _rename_axes(graph: Any, names: Mapping[str, str]) -> None:
    """Put the names in the place of symbols, in sums and products of them too."""
    import onnx_ir

    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in {id(v): v for v in (*graph.inputs, *graph.outputs, *(o for n in graph for o in n.outputs))}.values():
        if value.shape is None:
            continue
        symbols = [getattr(dimension, "value", None) for dimension in value.shape]
        value.shape = onnx_ir.Shape(
            pattern.sub(lambda match: names[match[1]], symbol) if isinstance(symbol, str) else dimension
            for symbol, dimension in zip(symbols, value.shape, strict=True)
        )
