"""Eigenvalues of Hessian blocks by Lanczos' method: HAWQ's measure (the largest), and the density of all.

Lanczos' method turns products with H into a small tridiagonal T whose eigenvalues approach the outermost ones of H. The
same T gives the density of all eigenvalues (stochastic Lanczos quadrature): from a random start of unit length, the
eigenvalues of T are the nodes and the squared first components of its eigenvectors the weights of a quadrature rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tracequant.curvature.collect import generator
from tracequant.curvature.hutchinson import (
    draw_probe,
    first_derivatives,
    hessian_vector_product,
    require_grad,
)
from tracequant.curvature.result import Density
from tracequant.errors import ModelError
from tracequant.model_state import double_backward, frozen_evaluation
from tracequant.points import QuantizationPoints
from tracequant.progress import track
from tracequant.task import Batches, Task, checked, forward, model_device, reusable

# v, flat, to H v, flat.
_Operator = Callable[[Tensor], Tensor]


def top_eigenvalues(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    k: int = 1,
    tolerance: float = 1e-2,
    steps: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, tuple[float, ...]]:
    """Layer name → the `k` eigenvalues of largest magnitude of its block, largest first, signs kept.

    The block is that of the mean loss over all of `batches`, whose graph is built anew for every product if there is
    more than one. Each value is within `tolerance` of its size from an eigenvalue, or a warning says that `steps`
    products did not suffice. Memory: `steps` vectors of a layer's size.
    """
    if k < 1 or steps < 1:
        raise ModelError(f"k and steps must be at least 1, got {k} and {steps}")
    result: dict[str, tuple[float, ...]] = {}
    late = []
    with _blocks(model, batches, task, points) as block:
        for number, layer in enumerate(track(points.layers, "Top eigenvalues", progress)):
            random = generator(seed, number, device=model_device(model))
            operator, like = block([layer.name])
            start = draw_probe(like, "gaussian", random)
            values, residuals = _outermost(operator, start, k, tolerance, min(steps, len(like)))
            if any(r > tolerance * abs(v) for r, v in zip(residuals, values, strict=True)):
                late.append(layer.name)
            result[layer.name] = tuple(values)
    if late:
        warnings.warn(
            f"eigenvalues of {len(late)} layers ({', '.join(late[:3])}{', ...' if len(late) > 3 else ''}) are not known"
            f" to {tolerance:g} after {steps} products; allow more steps, or a larger tolerance",
            stacklevel=2,
        )
    return result


def spectral_density(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    layer: str | None = None,
    draws: int = 8,
    steps: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Density:
    """The density of the Hessian's eigenvalues, of one layer's block or of all layers' weights together.

    `draws` starting vectors of `steps` products each (stochastic Lanczos quadrature). Memory: `steps` vectors.
    """
    names = [own.name for own in points.layers] if layer is None else [layer]
    if layer is not None and layer not in points.by_name:
        raise ModelError(f"there is no layer {layer!r}; layers are {', '.join(list(points.by_name)[:6])}, ...")
    if draws < 1 or steps < 1:
        raise ModelError(f"draws and steps must be at least 1, got {draws} and {steps}")
    nodes, weights = [], []
    with _blocks(model, batches, task, points) as block:
        operator, like = block(names)
        for draw in track(range(draws), "Density", progress):
            random = generator(seed, draw, device=model_device(model))
            start = draw_probe(like, "gaussian", random)
            diagonal, beside = _tridiagonal(operator, start, min(steps, len(like)))
            values, vectors = _eigen(diagonal, beside)
            nodes.append(tuple(values.tolist()))
            weights.append(tuple((vectors[0] ** 2).tolist()))
    return Density(layer, len(like), tuple(nodes), tuple(weights))


@contextmanager
def _blocks(
    model: nn.Module, batches: Batches, task: Task, points: QuantizationPoints
) -> Iterator[Callable[[list[str]], tuple[_Operator, Tensor]]]:
    """Yield a function from layer names to the operator of their joint block and a vector of its size."""
    with frozen_evaluation(model), double_backward():
        parameters = require_grad(model, points)
        data = list(checked(reusable(batches), task, model))
        total = sum(task.batch_size(batch) for batch in data)

        def gradients(index: int) -> dict[str, list[Tensor]]:
            _, loss = forward(task, model, data[index])
            return first_derivatives(loss, {"weights": {name: [p] for name, p in parameters.items()}})["weights"]

        kept = gradients(0) if len(data) == 1 else None

        def block(names: list[str]) -> tuple[_Operator, Tensor]:
            targets = [parameters[name] for name in names]
            sizes = [target.numel() for target in targets]

            def product(vector: Tensor) -> Tensor:
                parts = [part.view_as(t) for part, t in zip(torch.split(vector, sizes), targets, strict=True)]
                result = torch.zeros_like(vector)
                for index, batch in enumerate(data):
                    slopes = kept or gradients(index)
                    own = hessian_vector_product([slopes[name][0] for name in names], targets, parts)
                    share = task.batch_size(batch) / total
                    result += share * torch.cat([part.detach().flatten() for part in own])
                return result

            return product, torch.cat([target.detach().flatten() for target in targets])

        yield block


def _lanczos(operator: _Operator, start: Tensor, steps: int) -> Iterator[tuple[float, float]]:
    """Yield the next entry on T's diagonal and beside it; ends early where the start's subspace is exhausted."""
    vector = start / start.norm()
    all_vectors = vector.new_empty(steps, len(vector))
    size = 0.0
    for step in range(steps):
        all_vectors[step] = vector
        basis = all_vectors[: step + 1]
        image = operator(vector)
        diagonal = float(vector @ image)
        # Twice against all vectors: in finite arithmetic Lanczos' recurrence alone loses orthogonality, and finds the
        # large eigenvalues again and again.
        for _ in range(2):
            image = image - basis.mT @ (basis @ image)
        beside = float(image.norm())
        size = max(size, abs(diagonal), beside)
        exhausted = beside <= 10 * torch.finfo(vector.dtype).eps * size
        yield diagonal, 0.0 if exhausted else beside
        if exhausted:
            return
        vector = image / beside


def _tridiagonal(operator: _Operator, start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    pairs = list(_lanczos(operator, start, steps))
    return [diagonal for diagonal, _ in pairs], [beside for _, beside in pairs]


def _eigen(diagonal: list[float], beside: list[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues and eigenvectors (columns) of the tridiagonal matrix."""
    inner = np.array(beside[: len(diagonal) - 1])
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1))
    return values, vectors


def _outermost(
    operator: _Operator, start: Tensor, k: int, tolerance: float, steps: int
) -> tuple[list[float], list[float]]:
    """The `k` eigenvalues of largest magnitude, and how far each may be from an eigenvalue of the operator."""
    diagonal: list[float] = []
    beside: list[float] = []
    values: list[float] = []
    residuals: list[float] = []
    for a, b in _lanczos(operator, start, steps):
        diagonal.append(a)
        beside.append(b)
        found, vectors = _eigen(diagonal, beside)
        order = np.argsort(-np.abs(found))[:k]
        values = found[order].tolist()
        # ‖H x − θ x‖ of a Ritz pair is the last component of T's eigenvector times the entry beside the diagonal.
        residuals = (b * np.abs(vectors[-1, order])).tolist()
        if len(values) == min(k, len(start)) and all(
            r <= tolerance * abs(v) for r, v in zip(residuals, values, strict=True)
        ):
            break
    return values, residuals
