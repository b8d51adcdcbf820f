"""Variants of fine-tuning that the library does without, for the rows of the paper's ablations.

They use what the library offers everybody: hooks of modules, a task of one's own, and `on_step` of `tq.finetune`.

- progressive order: weights become quantized in groups by Ω, as HAWQ does, and not all at once;
- label smoothing: a share of every target is the same for all classes;
- PACT clipping: a scale learns from the values outside its range alone (Choi et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import tracequant as tq
from tracequant.quantization.grid import Grid, choose_grid
from tracequant.quantization.quantizer import Quantizer, WeightQuantizer, activation_quantizers, weight_quantizers

Order = Literal["sensitive_first", "sensitive_last"]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight: its layer's name, its quantizer, and the parameter that is rounded."""

    layer: str
    quantizer: WeightQuantizer
    original: Tensor


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """All quantized weights, a tied one once and under the name of its first layer."""
    weights: dict[WeightQuantizer, QuantizedWeight] = {}
    for (module, parameter), quantizer in weight_quantizers(model).items():
        chain: Any = cast(Any, model.get_submodule(module)).parametrizations[parameter]
        name = module if parameter == "weight" else ".".join(filter(None, (module, parameter)))
        weights.setdefault(quantizer, QuantizedWeight(name or "weight", quantizer, chain.original))
    return list(weights.values())


class Switch:
    """A forward hook that undoes a quantizer's rounding while it is off."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.on = False
        self.quantizer = quantizer
        self.handle = quantizer.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor], rounded: Tensor) -> Tensor:
        return rounded if self.on else args[0]


@dataclass
class Stage:
    """Quantizers that become active at the step `first`."""

    first: int
    weights: list[QuantizedWeight]
    switches: list[Switch] = field(default_factory=list)


class ProgressiveOrder:
    """A callback for `tracequant.finetune(on_step=...)` that quantizes weights in `stages` groups by Ω.

    `omega` is Ω by layer, `steps` the number of training steps. Activations become quantized with the last group. A
    weight that was float until then gets a new grid. As a context it ends with everything quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        omega: Mapping[str, float],
        steps: int,
        order: Order = "sensitive_first",
        stages: int = 4,
    ) -> None:
        weights = quantized_weights(model)
        if missing := [weight.layer for weight in weights if weight.layer not in omega]:
            raise ValueError(f"omega lacks the layers {', '.join(missing)}")
        weights.sort(key=lambda weight: omega[weight.layer], reverse=order == "sensitive_first")
        stages = min(stages, len(weights))
        self._stages = [
            Stage(
                stage * steps // stages,
                weights[stage * len(weights) // stages : (stage + 1) * len(weights) // stages],
            )
            for stage in range(stages)
        ]
        for stage in self._stages:
            stage.switches = [Switch(weight.quantizer) for weight in stage.weights]
        self._stages[-1].switches += [Switch(quantizer) for quantizer in activation_quantizers(model).values()]

    def __call__(self, step: int) -> None:
        """Switch on what is due before this step; after a resume, everything that was on before it too."""
        for stage in self._stages:
            if step == stage.first:
                for weight in stage.weights:
                    _choose_new_grid(weight)
            for switch in stage.switches:
                switch.on = step >= stage.first

    def __enter__(self) -> ProgressiveOrder:
        return self

    def __exit__(self, *details: object) -> None:
        for stage in self._stages:
            for switch in stage.switches:
                switch.handle.remove()


@torch.no_grad()
def _choose_new_grid(weight: QuantizedWeight) -> None:
    quantizer = weight.quantizer
    grid = choose_grid(weight.original, quantizer.num_bits, quantizer.symmetric, quantizer.axis)
    quantizer.scale.copy_(grid.scale)
    quantizer.zero_point.copy_(grid.zero_point)


class SmoothedTask(tq.Task):
    """A classification task whose loss is (1 − share) · its own + share · the cross-entropy to equal probabilities."""

    def __init__(self, task: tq.ClassificationTask, share: float) -> None:
        self._task, self._share = task, share

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """The task's outputs."""
        return self._task.outputs(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The smoothed loss."""
        uniform = -outputs.log_softmax(1).mean()
        return (1 - self._share) * self._task.loss(outputs, batch) + self._share * uniform

    def metric(self, outputs: Any, batch: Any) -> float:
        """The task's metric."""
        return self._task.metric(outputs, batch)

    def batch_size(self, batch: Any) -> int:
        """The task's batch size."""
        return self._task.batch_size(batch)

    def check(self, outputs: Any, batch: Any) -> None:
        """The task's check."""
        self._task.check(outputs, batch)

    def distillation_loss(self, outputs: Any, teacher_outputs: Any, batch: Any) -> Tensor:
        """The task's distance to the teacher."""
        return self._task.distillation_loss(outputs, teacher_outputs, batch)


class ClippingOnly(torch.autograd.Function):
    """Rounding to a grid whose scale learns from clipped values alone: a learned clipping threshold (PACT, Eq. 4)."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, gradient_scale: float
    ) -> Tensor:
        """The values on the grid."""
        rounded = Grid(scale, zero_point, num_bits).round(values)
        ctx.largest, ctx.gradient_scale = 2**num_bits - 1, gradient_scale
        ctx.save_for_backward(values, scale, zero_point, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients of values and scale."""
        values, scale, zero_point, rounded = ctx.saved_tensors
        (grad,) = grad_outputs
        position = values / scale + zero_point
        inside = (position >= 0) & (position <= ctx.largest)
        clipped = torch.where(inside, 0.0, grad * rounded / scale)
        return grad * inside, clipped.sum_to_size(scale.shape) * ctx.gradient_scale, None, None, None


@contextmanager
def clipping_only(model: nn.Module) -> Iterator[None]:
    """All quantizers of the model learn by `ClippingOnly` inside the block."""
    quantizers = dict.fromkeys([*weight_quantizers(model).values(), *activation_quantizers(model).values()])
    handles = [quantizer.register_forward_hook(_by_clipping) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_clipping(quantizer: nn.Module, args: tuple[Tensor], rounded: Tensor) -> Tensor:
    assert isinstance(quantizer, Quantizer)
    if not torch.is_grad_enabled():
        return rounded
    (values,) = args
    # As in the library's own rounding, so that the two differ in the rule of the gradient alone.
    gradient_scale = 1 / math.sqrt(max(1, values.numel()) / quantizer.scale.numel() * quantizer.largest_code)
    return cast(
        Tensor,
        ClippingOnly.apply(values, quantizer.scale, quantizer.zero_point, quantizer.num_bits, gradient_scale),  # type: ignore[no-untyped-call]
    )
