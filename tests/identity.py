"""The identity H_ii = G_ii measured: what the structural check of the package is held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tracequant.core.points import QuantizationPoints
from tracequant.curvature.output_hessian import loss_hessian
from tracequant.curvature.products import draw_probe, first_derivatives, hessian_vector_product, require_grad
from tracequant.model.batches import Batch
from tracequant.model.state import double_backward, frozen_evaluation
from tracequant.model.task import Task, forward

CHECKED_LAYERS = 4
# Float32 rounding leaves 1e-6 to 1e-4; a GELU or SiLU network differs by percents and more.
TOLERANCE = 1e-3


def block_differences(
    model: nn.Module,
    batch: Batch,
    task: Task,
    points: QuantizationPoints,
    generator: torch.Generator,
) -> dict[str, float]:
    """‖H_ii v − G_ii v‖ / ‖G_ii v‖ for one random v and one batch, of the layers that would show a difference."""
    result: dict[str, float] = {}
    with frozen_evaluation(model), double_backward():
        parameters = require_grad(model, points)
        with _counting_calls(model, points) as calls:
            outputs, loss = forward(task, model, batch)
        names = _some_layers(points, calls)
        tensors, product = loss_hessian(task, outputs, batch)
        slopes, _ = first_derivatives(loss, {"weights": {name: [parameters[name]] for name in names}})
        gradients = slopes["weights"]
        for name in names:
            weight = parameters[name]
            vector = draw_probe(weight, "rademacher", generator)
            (hessian,) = hessian_vector_product(gradients[name], [weight], [vector])
            gauss_newton = gauss_newton_product(tensors, product, weight, vector)
            size = float(gauss_newton.norm())
            difference = float((hessian - gauss_newton).norm())
            # Where nothing reaches the layer (a last layer of zeros, say) there is nothing to compare.
            if size > 0 or difference > 0:
                result[name] = difference / size if size > 0 else math.inf
    assert result
    return result


def gauss_newton_product(
    tensors: list[Tensor], product: Callable[[list[Tensor]], list[Tensor]], weight: Tensor, vector: Tensor
) -> Tensor:
    """G v = Jᵀ H_L J v for one weight, the graph kept; `product` maps vectors of the outputs' shapes to H_L times them.

    J v comes from differentiating Jᵀw, which is linear in w, once more.
    """
    dummies = [torch.zeros_like(tensor, requires_grad=True) for tensor in tensors]
    (pulled,) = torch.autograd.grad(tensors, weight, dummies, create_graph=True)
    pushed = torch.autograd.grad(pulled, dummies, vector, retain_graph=True, allow_unused=True)
    tangents = [torch.zeros_like(t) if p is None else p for p, t in zip(pushed, tensors, strict=True)]
    (result,) = torch.autograd.grad(tensors, weight, product(tangents), retain_graph=True)
    return result


def _some_layers(points: QuantizationPoints, calls: dict[str, int]) -> list[str]:
    """Layers that read the model's input, embeddings, those called more than once, and a few at even distances."""
    inputs = {point.name for point in points.activations if point.is_model_input}
    first = [layer.name for layer in points.layers if layer.activation in inputs or layer.kind == "Embedding"]
    rest = [layer.name for layer in points.layers if layer.name not in first]
    repeated = [name for name in rest if calls[name] > 1]
    step = max(1, len(rest) // CHECKED_LAYERS)
    return list(dict.fromkeys([*first[:CHECKED_LAYERS], *repeated, *rest[::step][:CHECKED_LAYERS]]))


@contextmanager
def _counting_calls(model: nn.Module, points: QuantizationPoints) -> Iterator[dict[str, int]]:
    """How often each layer's modules are called in the block."""
    calls = {layer.name: 0 for layer in points.layers}

    def counter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    with ExitStack() as stack:
        for layer in points.layers:
            for module_name, _ in layer.sites:
                handle = model.get_submodule(module_name).register_forward_hook(counter(layer.name))
                stack.callback(handle.remove)
        yield calls
