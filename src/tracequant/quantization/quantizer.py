"""Uniform affine quantization, 1 to 8 bits (HAWQ-V2, Appendix A).

A value is `scale * (code - zero_point)` with codes 0 ... 2^k - 1. In the paper's terms `q_0 = -scale * zero_point` and
`Delta = scale`. Three choices of the zero point:

- asymmetric: an integer chosen so that the grid covers the range and holds 0 exactly, which zero padding and ReLU need;
- symmetric, 3 bits and more: 2^(k-1), the two's complement grid of integer hardware;
- symmetric, 1 and 2 bits: (2^k - 1) / 2, the balanced grids {-1, 1} and {-3, -1, 1, 3} times scale / 2. With so few
  levels one cannot be spent on the asymmetry of two's complement: on Gaussian weights its best 2-bit grid has a 25 %
  larger squared error (`benchmarks/two_bit_grid.py`).

A value x becomes the code `round(x / scale) + zero_point`, clamped to the codes that exist; halves go to the even
neighbour. ONNX's QuantizeLinear gives the same code for every x, and torch's fake quantization does wherever 1 / scale,
by which it multiplies, is exact. `round(x / scale + zero_point)` is mathematically equal, but float32 rounds the sum
and so takes another code for a few values in a million. The balanced grids are computed that way: their zero point
ends in a half, and neither ONNX nor torch has such grids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tracequant.model.hooks import replace_inputs
from tracequant.quantization.grid import Grid


class FakeQuantize(torch.autograd.Function):
    """Rounding to a grid with a straight-through gradient inside the range and none outside (Appendix A).

    The gradient of the scale is that of learned step size quantization (Esser et al. 2020, Eq. 3): code minus position
    inside the range, the end code outside, both counted from the zero point. It is multiplied by `gradient_scale`.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, gradient_scale: float = 1.0
    ) -> Tensor:
        """`Grid.round`, the same operations, so that training and packing see the same bits."""
        rounded = Grid(scale, zero_point, num_bits).round(values)
        ctx.num_bits, ctx.gradient_scale = num_bits, gradient_scale
        # The next layer keeps the rounded values for its own gradient, so that keeping them here too costs nothing.
        ctx.save_for_backward(values, scale, zero_point, *([rounded] if ctx.needs_input_grad[1] else []))
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Gradients of values and scale."""
        (grad,) = grad_outputs
        values, scale, zero_point, *kept = ctx.saved_tensors
        position = (values / scale).add_(zero_point)
        # One fused pass where comparisons and a mask take six. It leaves the ends out, hence the margins.
        low, high = -1e-30, (2**ctx.num_bits - 1) * (1 + 1e-6)
        inside: Tensor = torch.ops.aten.hardtanh_backward(grad, position, low, high, grad_input=position)
        grad_scale = None
        if kept:
            grad_scale = _slope(grad, inside, values, kept[0], scale) * (ctx.gradient_scale / scale)
        return inside if ctx.needs_input_grad[0] else None, grad_scale, None, None, None


def _slope(grad: Tensor, inside: Tensor, values: Tensor, rounded: Tensor, scale: Tensor) -> Tensor:
    """The scale's gradient times the scale, shape of `scale`; `inside` is `grad` where values are not clipped.

    (code - zero point) * scale is the rounded value and (position - zero point) * scale the value itself.
    """
    if scale.numel() > 1:
        return (grad * rounded).addcmul_(inside, values, value=-1).sum_to_size(scale.shape)
    return (_dot(grad, rounded) - _dot(inside, values)).reshape(scale.shape)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Sum of products of two tensors of one shape.

    Where both lie alike in memory, without memory for the products, whose allocation takes longer than the arithmetic.
    """
    last = torch.channels_last
    # Compiled, products and sum become one loop; under autocast the values may be narrower than their gradient.
    if torch.compiler.is_compiling() or first.dtype != second.dtype:
        pass
    elif first.is_contiguous() and second.is_contiguous():
        return torch.dot(first.view(-1), second.view(-1))
    elif first.ndim == 4 and first.is_contiguous(memory_format=last) and second.is_contiguous(memory_format=last):
        return torch.dot(first.permute(0, 2, 3, 1).view(-1), second.permute(0, 2, 3, 1).view(-1))
    return (first * second).sum()


class Quantizer(nn.Module):
    """Fake quantization with a scale that learns if its `requires_grad` lets it (see `FakeQuantize`)."""

    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.num_bits = grid.num_bits
        self.scale = nn.Parameter(grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.detach().clone())

    @property
    def grid(self) -> Grid:
        """The grid at its present scale."""
        return Grid(self.scale.detach(), self.zero_point, self.num_bits)

    @property
    def largest_code(self) -> int:
        """The largest code counted from the zero point, by which the scale's gradient is divided."""
        return int(2**self.num_bits - 1)

    def forward(self, values: Tensor) -> Tensor:
        """`values` rounded to the grid."""
        if not torch.is_grad_enabled():
            return self.grid.round(values)
        # Keeps the steps of a scale in proportion to those of the weights (Esser et al. 2020, Section 2.2).
        gradient_scale = 1 / math.sqrt(max(1, values.numel()) / self.scale.numel() * self.largest_code)
        return cast(Tensor, FakeQuantize.apply(values, self.scale, self.zero_point, self.num_bits, gradient_scale))

    def extra_repr(self) -> str:
        """Bits, for printing the model."""
        return f"num_bits={self.num_bits}"


class WeightQuantizer(Quantizer):
    """The parametrization of a quantized weight; `axis` is that of the scales, None for one scale."""

    def __init__(self, grid: Grid, axis: int | None, symmetric: bool) -> None:
        super().__init__(grid)
        self.axis = axis
        self.symmetric = symmetric

    @property
    def largest_code(self) -> int:
        """Half of the codes are negative."""
        return int(max(1, 2 ** (self.num_bits - 1) - 1))


@dataclass
class _Shared:
    """A rounded tensor that some of its readers have still to read."""

    values: Tensor
    key: tuple[Any, ...]
    rounded: Tensor
    reads: int = 0


class ActivationQuantizer(Quantizer):
    """Quantizes the tensor that its consumers read; one instance is a child of every consumer of the point."""

    def __init__(self, name: str, grid: Grid) -> None:
        super().__init__(grid)
        self.point = name
        self.readers = 0
        self._shared: _Shared | None = None

    def forward(self, values: Tensor) -> Tensor:
        """`values` rounded to the grid, once for all consumers that read the same tensor."""
        if self.readers < 2 or torch.compiler.is_compiling() or values.is_inference():
            return super().forward(values)
        key = (values._version, self.scale._version, torch.is_grad_enabled())
        shared = self._shared
        if shared is None or shared.values is not values or shared.key != key:
            shared = _Shared(values, key, super().forward(values))
        shared.reads += 1
        # After the last reader nothing is kept alive.
        self._shared = shared if shared.reads < self.readers else None
        return shared.rounded

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin without what this one's readers share."""
        return self.__dict__ | {"_shared": None}

    def attach(self, module: nn.Module) -> None:
        """Make `module` read its input through this quantizer."""
        module.add_module("input_quantizer", self)
        self.readers += 1
        # A bound method, not a closure: deepcopy of the model then binds the copy's own quantizer.
        module.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def detach(self, module: nn.Module) -> None:
        """Undo `attach`."""
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__self__", None) is self:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        del module.input_quantizer
        self.readers -= 1

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replace_inputs(module, args, kwargs, self)


class OutputQuantizer(ActivationQuantizer):
    """Quantizes what a module returns, in every call; a child of the module."""

    def attach(self, module: nn.Module) -> None:
        """Make `module` return its output through this quantizer."""
        module.add_module("output_quantizer", self)
        module.register_forward_hook(self._after_forward)

    def detach(self, module: nn.Module) -> None:
        """Undo `attach`."""
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__self__", None) is self:
                del module._forward_hooks[key]
        del module.output_quantizer

    def _after_forward(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rounded: Tensor = self(output)
        # What follows may work in place (an activation, dropout), and the gradient needs the rounded values.
        return rounded.clone() if rounded.requires_grad else rounded


def weight_quantizers(model: nn.Module) -> dict[tuple[str, str], WeightQuantizer]:
    """(module name, parameter name) → quantizer of every quantized weight, in the order of registration."""
    found = {}
    for module_name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            parametrizations = cast(nn.ModuleDict, module.parametrizations)
            for parameter, chain in parametrizations.items():
                for item in cast(nn.ModuleList, chain):
                    if isinstance(item, WeightQuantizer):
                        found[module_name, parameter] = item
    return found


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Point name → quantizer of everything that is rounded between layers, in the order of the modules that do it."""
    return {module.point: module for module in model.modules() if isinstance(module, ActivationQuantizer)}


def input_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Activation point → quantizer, in the order of the first consumer."""
    found = activation_quantizers(model)
    return {name: quantizer for name, quantizer in found.items() if not isinstance(quantizer, OutputQuantizer)}


def output_quantizers(model: nn.Module) -> dict[str, OutputQuantizer]:
    """Module name → quantizer of its output."""
    found = ((name, getattr(module, "output_quantizer", None)) for name, module in model.named_modules())
    return {name: quantizer for name, quantizer in found if isinstance(quantizer, OutputQuantizer)}
