"""What an estimator measured on one batch, and how certain a result is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tracequant.core.curvature import Curvature


@dataclass(frozen=True)
class Part:
    """What was measured on one batch, or with some of the probes on it.

    `values` are float64 `[probes, columns]` by "weights:LAYER" or "activations:POINT", with a column for each sample,
    or one for the batch. `elements` counts the elements of each activation over the samples. `notes` are remarks for
    the result's `reason`. `idle` are layers that no sample of the part reached, as an expert that no token is sent to;
    their values are zero.
    """

    samples: int
    values: dict[str, Tensor]
    elements: dict[str, int]
    notes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def together(parts: Sequence[Part], values: dict[str, Tensor]) -> Part:
    """Parts of different samples as one, with these `values`."""
    elements = {name: sum(part.elements[name] for part in parts) for name in parts[0].elements}
    return Part(sum(part.samples for part in parts), values, elements, all_notes(parts), idle_in_all(parts))


def all_notes(parts: Sequence[Part]) -> tuple[str, ...]:
    """The parts' notes, each once."""
    return tuple(dict.fromkeys(note for part in parts for note in part.notes))


def idle_in_all(parts: Sequence[Part]) -> tuple[str, ...]:
    """The layers that no part reached."""
    return tuple(name for name in parts[0].idle if all(name in part.idle for part in parts)) if parts else ()


def exceeded(
    curvature: Curvature, error: Literal["standard_error", "sampling_error"], target: float
) -> dict[str, float]:
    """Layers and activations whose error is more than `target` times their trace, with the relative error."""
    return {
        name: getattr(estimate, error) / abs(estimate.trace) if estimate.trace else math.inf
        for estimates in (curvature.weights, curvature.activations)
        for name, estimate in estimates.items()
        if getattr(estimate, error) > target * abs(estimate.trace)
    }


def warn_of_error(
    curvature: Curvature, error: Literal["standard_error", "sampling_error"], target: float, advice: str
) -> None:
    """Warn if some trace is less certain than was asked for."""
    large = exceeded(curvature, error, target)
    if large:
        name = max(large, key=lambda layer: large[layer])
        warnings.warn(
            f"the relative error of {len(large)} traces is above the {target:.2g} asked for; the largest is"
            f" {large[name]:.2g}, of {name}; {advice}",
            stacklevel=3,
        )
