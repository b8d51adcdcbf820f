"""Quantization points: which weights and which tensors get a bit width. Plain data, no torch.

Defined once, by `tracequant.model.discover.discover`, and used unchanged by curvature, sensitivity, plan, conversion
and packing: what is analysed is what is trained, and what is trained is what runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Container
from dataclasses import dataclass

from tracequant.core.files import Saveable

# Rounded outputs have as many as integer kernels compute with: nothing is stored of them, so fewer would gain nothing.
OUTPUT_BITS = 8


@dataclass(frozen=True)
class Layer:
    """One quantized weight tensor.

    `name` is the qualified name of the module whose `weight` it is, or else of the parameter (the projections of an
    attention module, the matrices of an LSTM, a parameter of a module of the user's). `kind` is the module's class.
    `sites` are the (module, parameter) pairs that hold the tensor, more than one where weights are tied, none where the
    layer comes from a table and no model is known. `macs` counts multiply-accumulates for one sample. `activation`
    names the point whose tensor the layer reads, None where no quantizer can be placed (integer inputs, the inside of a
    fused attention, hidden states).
    """

    name: str
    kind: str
    sites: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    channel_axis: int
    macs: int
    activation: str | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Size of the output-channel axis, which carries one scale per channel."""
        return self.shape[self.channel_axis]


@dataclass(frozen=True)
class ActivationPoint:
    """One tensor that a quantizer replaces for all modules that read it.

    `consumers` are qualified module names; `name` is the first of them, for most modules the layer's name too.
    Consumers of one tensor (a residual branch point, the query/key/value projections) share the quantizer; so do the
    tensors of a module that is called several times (a head applied to every pyramid level). `numel` counts elements
    for one sample, averaged over the inputs seen. `is_model_input` marks the tensor that the caller hands to
    the model, scaled and normalised or not, which arrives in 8 bits as a rule and keeps 8 in every plan.
    """

    name: str
    consumers: tuple[str, ...]
    numel: float
    is_model_input: bool


@dataclass(frozen=True)
class OutputPoint:
    """A tensor that is rounded to 8 bits where it arises, because others than one shared input quantizer read it.

    It is the output of a convolution that a residual addition, a concatenation, an average or an activation function
    in float reads. Rounded, it lets a runtime compute the convolution and what follows in integers. `module` is the
    module whose output is rounded: the BatchNorm that alone reads the convolution, or else the convolution itself;
    `layer` is the convolution. `low` and `high` are the limits of the ReLU, ReLU6 or clamp that alone reads the tensor:
    rounding to a range within them does its work, and spends no code on what it would cut off.
    """

    module: str
    layer: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def name(self) -> str:
        """The name of the tensor, unlike that of any activation point."""
        return f"{self.module}:output"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model's state that stays as it is: bias, BatchNorm statistics, an excluded weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizationPoints(Saveable):
    """All layers and activation points of a model, in the order in which the model registers them.

    `ties` are groups of layer names that share one bit width; `float_tensors` is the rest of the state, which counts in
    every size; `fingerprint` identifies the weights that were looked at. `outputs` are no decision of a plan's:
    `rounded_outputs` says which of them it has.
    """

    layers: tuple[Layer, ...]
    activations: tuple[ActivationPoint, ...]
    ties: tuple[tuple[str, ...], ...]
    float_tensors: tuple[StoredTensor, ...]
    fingerprint: str
    outputs: tuple[OutputPoint, ...] = ()

    @functools.cached_property
    def by_name(self) -> dict[str, Layer]:
        """Layers by name."""
        return {layer.name: layer for layer in self.layers}

    @functools.cached_property
    def activation_by_name(self) -> dict[str, ActivationPoint]:
        """Activation points by name."""
        return {point.name: point for point in self.activations}

    def rounded_outputs(self, activation_bits: Container[str]) -> tuple[OutputPoint, ...]:
        """The outputs that are rounded under a plan: those of convolutions whose input it quantizes."""
        return tuple(point for point in self.outputs if self.by_name[point.layer].activation in activation_bits)

    @property
    def has_layout(self) -> bool:
        """Whether the packed file's layout is known: a model was looked at, not just a table."""
        return any(layer.sites for layer in self.layers)

    @property
    def weight_units(self) -> tuple[tuple[str, ...], ...]:
        """Layer names grouped into the units that a plan decides about: ties, and every other layer alone."""
        tied = {name: group for group in self.ties for name in group}
        units: list[tuple[str, ...]] = []
        for layer in self.layers:
            group = tied.get(layer.name, (layer.name,))
            if group not in units:
                units.append(group)
        return tuple(units)
