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

from tracequant.core.curvature import Density
from tracequant.core.errors import ModelError
from tracequant.core.points import QuantizationPoints
from tracequant.core.progress import track
from tracequant.curvature.products import (
    draw_probe,
    first_derivatives,
    generator,
    hessian_vector_product,
    require_grad,
)
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import measuring, model_device
from tracequant.model.state import double_backward
from tracequant.model.task import Task, checked, forward

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
            values, residuals, _ = _outermost(operator, start, k, tolerance, min(steps, len(like)))
            if any(r > tolerance * abs(v) for r, v in zip(residuals, values, strict=True)):
                late.append(layer.name)
            result[layer.name] = tuple(values)
    _warn_of_late(late, tolerance, steps)
    return result


def top_eigenvectors(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    layer: str,
    k: int = 2,
    tolerance: float = 1e-2,
    steps: int = 100,
    seed: int = 0,
) -> tuple[tuple[float, ...], Tensor]:
    """The `k` eigenvalues of largest magnitude of a layer's block, and orthonormal eigenvectors `[k, *layer.shape]`.

    Signs of the vectors are arbitrary, but the same for the same seed. An eigenvalue that is there several times has
    one vector; where that leaves fewer than `k`, as in a multiple of the identity, any orthogonal direction completes
    them. Raises `ModelError` for an unknown layer and one of fewer than `k` weights; warns as `top_eigenvalues` does.
    """
    if layer not in points.by_name:
        raise _unknown_layer(layer, points)
    shape = points.by_name[layer].shape
    if not 1 <= k <= points.by_name[layer].numel or steps < 1:
        raise ModelError(
            f"layer {layer} has {points.by_name[layer].numel} weights: k must be from 1 to that, got {k}, and steps at"
            f" least 1, got {steps}"
        )
    with _blocks(model, batches, task, points) as block:
        random = generator(seed, 0, device=model_device(model))
        operator, like = block([layer])
        start = draw_probe(like, "gaussian", random)
        values, residuals, vectors = _outermost(operator, start, k, tolerance, min(steps, len(like)))
        late = any(r > tolerance * abs(v) for r, v in zip(residuals, values, strict=True))
        while len(vectors) < k:
            other = draw_probe(like, "gaussian", random)
            for _ in range(2):  # once leaves a rounding error of the part that was removed
                other = other - vectors.mT @ (vectors @ other)
                other = other / other.norm()
            vectors = torch.cat([vectors, other[None]])
            values.append(float(other @ operator(other)))
    _warn_of_late([layer] if late else [], tolerance, steps)
    return tuple(values), vectors.view(k, *shape)


def _warn_of_late(late: list[str], tolerance: float, steps: int) -> None:
    """Warn of layers whose eigenvalues have not converged."""
    if late:
        warnings.warn(
            f"eigenvalues of {len(late)} layers ({', '.join(late[:3])}{', ...' if len(late) > 3 else ''}) are not known"
            f" to {tolerance:g} after {steps} products; allow more steps, or a larger tolerance",
            stacklevel=3,
        )


def _unknown_layer(layer: str, points: QuantizationPoints) -> ModelError:
    return ModelError(f"there is no layer {layer!r}; layers are {', '.join(list(points.by_name)[:6])}, ...")


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
        raise _unknown_layer(layer, points)
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
    with measuring(model), double_backward():
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


def _lanczos(operator: _Operator, start: Tensor, steps: int) -> Iterator[tuple[float, float, Tensor]]:
    """Yield T's next entry on the diagonal and beside it, and the vectors so far, in rows.

    Ends early where the start's subspace is exhausted.
    """
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
        yield diagonal, 0.0 if exhausted else beside, basis
        if exhausted:
            return
        vector = image / beside


def _tridiagonal(operator: _Operator, start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    entries = list(_lanczos(operator, start, steps))
    return [diagonal for diagonal, _, _ in entries], [beside for _, beside, _ in entries]


def _eigen(diagonal: list[float], beside: list[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues and eigenvectors (columns) of the tridiagonal matrix."""
    inner = np.array(beside[: len(diagonal) - 1])
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1))
    return values, vectors


def _outermost(
    operator: _Operator, start: Tensor, k: int, tolerance: float, steps: int
) -> tuple[list[float], list[float], Tensor]:
    """The `k` eigenvalues of largest magnitude, how far each may be from a true one, and their vectors in rows."""
    diagonal: list[float] = []
    beside: list[float] = []
    values: list[float] = []
    residuals: list[float] = []
    for a, b, basis in _lanczos(operator, start, steps):
        diagonal.append(a)
        beside.append(b)
        found, vectors = _eigen(diagonal, beside)
        order = np.argsort(-np.abs(found))[:k]
        values = found[order].tolist()
        # ‖H x − θ x‖ of a Ritz pair is the last component of T's eigenvector times the entry beside the diagonal.
        residuals = (b * np.abs(vectors[-1, order])).tolist()
        spanned = basis
        if len(values) == min(k, len(start)) and all(
            r <= tolerance * abs(v) for r, v in zip(residuals, values, strict=True)
        ):
            break
    return values, residuals, torch.from_numpy(vectors[:, order].T.copy()).to(spanned) @ spanned
