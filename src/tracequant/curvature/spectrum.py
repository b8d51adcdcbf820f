"""The largest eigenvalue of each layer's Hessian block: HAWQ's measure, for comparison with the trace."""

from __future__ import annotations

import torch
from torch import nn

from tracequant.curvature.hutchinson import (
    draw_probe,
    first_derivatives,
    hessian_vector_product,
    require_grad,
)
from tracequant.model_state import double_backward, frozen_evaluation
from tracequant.points import QuantizationPoints
from tracequant.progress import track
from tracequant.task import Batches, Task, checked, forward, model_device, reusable


def top_eigenvalues(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    iterations: int = 20,
    tolerance: float = 1e-2,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """Layer name → the eigenvalue of largest magnitude of its block, by power iteration on the first of `batches`.

    Stops for a layer when two successive Rayleigh quotients differ by less than `tolerance` of their size, or after
    `iterations`. The quotient approaches the eigenvalue from below in magnitude for a positive semi-definite block.
    """
    generator = torch.Generator(model_device(model)).manual_seed(seed)
    result: dict[str, float] = {}
    with frozen_evaluation(model), double_backward():
        parameters = require_grad(model, points)
        batch = next(iter(checked(reusable(batches), task, model)))
        _, loss = forward(task, model, batch)
        targets = {name: [parameter] for name, parameter in parameters.items()}
        gradients = first_derivatives(loss, {"weights": targets})["weights"]
        for name in track(list(parameters), "Top eigenvalues", progress):
            vector = draw_probe(parameters[name], "gaussian", generator)
            quotient = 0.0
            for _ in range(iterations):
                vector = vector / vector.norm().clamp_min(1e-30)
                (product,) = hessian_vector_product(gradients[name], targets[name], [vector])
                before, quotient = quotient, (vector * product).sum().item()
                vector = product.detach()
                if abs(quotient - before) <= tolerance * abs(quotient):
                    break
            result[name] = quotient
    return result
