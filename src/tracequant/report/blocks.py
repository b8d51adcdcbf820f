"""Blocks of layers, as the paper's figures count them: traces and bits of several layers as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tracequant.core.curvature import Curvature, TraceEstimate
from tracequant.core.errors import RunError
from tracequant.core.match import match_names, matching
from tracequant.core.points import QuantizationPoints
from tracequant.report.drawing import known_error


@dataclass(frozen=True)
class Block:
    """Layers, or activation points, that are drawn as one. `estimate` is that of the sum of their traces (Eq. 6-9).

    Its average trace is the sum of the traces over the sum of the elements; so `num_bits` is a mean over elements, None
    where the plan says nothing of some member.
    """

    name: str
    members: tuple[str, ...]
    estimate: TraceEstimate
    num_bits: float | None


def weight_blocks(curvature: Curvature, patterns: Sequence[str], bits: Mapping[str, int]) -> list[Block]:
    """The blocks of all layers, in the order in which the model first has them.

    A block is what one of the shell `patterns` matches (the first one that does), else layers that the analysis has
    tied, else a layer alone. `RunError` for a pattern that matches no layer.
    """
    owner = block_names(curvature.points, patterns)
    return _blocks(owner, curvature.weights, curvature.weight_values, bits)


def activation_blocks(curvature: Curvature, patterns: Sequence[str], bits: Mapping[str, int]) -> list[Block]:
    """The blocks of all activations: an activation is of the block of the first layer that reads it."""
    owner = block_names(curvature.points, patterns)
    readers: dict[str, str] = {}
    for layer in curvature.points.layers:
        if layer.activation is not None:
            readers.setdefault(layer.activation, owner[layer.name])
    owner_of_point = {name: readers.get(name, name) for name in curvature.activations}
    return _blocks(owner_of_point, curvature.activations, curvature.activation_values, bits)


def block_names(points: QuantizationPoints, patterns: Sequence[str]) -> dict[str, str]:
    """Layer → the name of its block: the pattern without the star at its end, what tied layers' names share, its own.

    Raises `RunError` for a pattern that matches no layer.
    """
    match_names(patterns, list(points.by_name), "blocks", error=RunError)
    blocks: dict[str, str] = {}
    for unit in points.weight_units:
        tied = _shared_name(unit)
        if tied in blocks.values():
            tied = f"{unit[0]} and {len(unit) - 1} more"
        for name in unit:
            matched = next((pattern for pattern in patterns if matching(pattern, [name])), None)
            blocks[name] = tied if matched is None else matched.removesuffix("*").removesuffix(".") or matched
    return {name: blocks[name] for name in points.by_name}


def _shared_name(unit: Sequence[str]) -> str:
    """The leading components that all names of a unit share, or else the first name and the number of the others."""
    shared = []
    for components in zip(*(name.split(".") for name in unit), strict=False):
        if len(set(components)) > 1:
            break
        shared.append(components[0])
    return ".".join(shared) or f"{unit[0]} and {len(unit) - 1} more"


def _blocks(
    owner: Mapping[str, str],
    estimates: Mapping[str, TraceEstimate],
    values: Mapping[str, Sequence[float]] | None,
    bits: Mapping[str, int],
) -> list[Block]:
    members: dict[str, list[str]] = {}
    for name in estimates:
        members.setdefault(owner[name], []).append(name)
    result = []
    for block, names in members.items():
        sizes = [estimates[name].numel for name in names]
        num_bits = None
        if all(name in bits for name in names):
            num_bits = math.fsum(bits[n] * size for n, size in zip(names, sizes, strict=True)) / math.fsum(sizes)
        result.append(Block(block, tuple(names), _together(estimates, values, names), num_bits))
    return result


def _together(
    estimates: Mapping[str, TraceEstimate], values: Mapping[str, Sequence[float]] | None, names: Sequence[str]
) -> TraceEstimate:
    """The estimate of the sum of several traces, which are not independent: their samples are the same."""
    first = estimates[names[0]]
    if len(names) == 1:
        return first
    trace, numel = (math.fsum(getattr(estimates[name], field) for name in names) for field in ("trace", "numel"))
    error = math.fsum(known_error(estimates[name]) for name in names)  # at most
    if values is not None and len(values[names[0]]) > 1:
        sums = np.sum([values[name] for name in names], axis=0)
        error = float(sums.std(ddof=1) / math.sqrt(len(sums)))
    return replace(
        first, trace=trace, average_trace=trace / numel, standard_error=error, sampling_error=error, numel=numel
    )
