"""Eigenvalues of Hessian blocks by Lanczos' method: HAWQ's measure (the largest), and the density of all.

The largest eigenvalues come from ARPACK (`scipy.sparse.linalg.eigsh`), which restarts Lanczos' method with a small
basis: it keeps about 20 vectors of a layer's size however many products it takes.

The density of all eigenvalues needs no restarts. Lanczos' method turns products with H into a small tridiagonal T
(stochastic Lanczos quadrature): from a random start of unit length, the eigenvalues of T are the nodes and the squared
first components of its eigenvectors the weights of a quadrature rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from tracequant.core.curvature import Density
from tracequant.core.errors import ModelError, ResourceError
from tracequant.core.points import QuantizationPoints
from tracequant.core.progress import track
from tracequant.curvature.products import (
    draw_probe,
    first_derivatives,
    generator,
    hessian_vector_product,
    require_grad,
)
from tracequant.model import memory
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import check_parameters, measuring, model_device
from tracequant.model.hooks import idle_layers
from tracequant.model.state import double_backward
from tracequant.model.task import Task, checked, forward

# v, flat, to H v, flat.
_Operator = Callable[[Tensor], Tensor]
_Product = Callable[[NDArray[Any]], NDArray[Any]]

# Vectors that ARPACK keeps, where the eigenvalues asked for do not need more.
BASIS = 20
# Vectors that are held apart from the basis and the result: ARPACK's three work vectors, residual, v, H v and a copy.
WORK_VECTORS = 7
# A tolerance with which ARPACK takes every Ritz value for an eigenvalue.
_ANY = 1e10


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
    more than one batch. Each value is within `tolerance` of its size from an eigenvalue, or a warning says that about
    `steps` products did not suffice. Memory: max(2k + 1, 20) vectors of a layer's size, and a few more.

    Raises `ResourceError` naming the layer whose vectors do not fit into memory.
    """
    if k < 1 or steps < 1:
        raise ModelError(f"k and steps must be at least 1, got {k} and {steps}")
    result: dict[str, tuple[float, ...]] = {}
    search = _Search(k, tolerance, steps)
    with _blocks(model, batches, task, points) as block:
        for number, layer in enumerate(track(points.layers, "Top eigenvalues", progress)):
            random = generator(seed, number, device=model_device(model))
            operator, like = block([layer.name])
            values, _ = search.run(layer.name, operator, draw_probe(like, "gaussian", random))
            result[layer.name] = tuple(values)
    search.warn()
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

    Signs of the vectors are arbitrary, but the same for the same seed. Raises `ModelError` for an unknown layer and one
    of fewer than `k` weights, and `ResourceError` where the vectors do not fit into memory; warns as `top_eigenvalues`
    does.
    """
    if layer not in points.by_name:
        raise _unknown_layer(layer, points)
    shape = points.by_name[layer].shape
    if not 1 <= k <= points.by_name[layer].numel or steps < 1:
        raise ModelError(
            f"layer {layer} has {points.by_name[layer].numel} weights: k must be from 1 to that, got {k}, and steps at"
            f" least 1, got {steps}"
        )
    search = _Search(k, tolerance, steps)
    with _blocks(model, batches, task, points) as block:
        random = generator(seed, 0, device=model_device(model))
        operator, like = block([layer])
        values, vectors = search.run(layer, operator, draw_probe(like, "gaussian", random))
        rows = torch.from_numpy(np.ascontiguousarray(vectors.T)).to(like)
    search.warn()
    return tuple(values), rows.view(k, *shape)


def _unknown_layer(layer: str, points: QuantizationPoints) -> ModelError:
    return ModelError(f"there is no layer {layer!r}; layers are {', '.join(list(points.by_name)[:6])}, ...")


def spectral_density(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    layer: str | None = None,
    num_probes: int = 8,
    steps: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Density:
    """The density of the Hessian's eigenvalues, of one layer's block or of all layers' weights together.

    `num_probes` starting vectors of `steps` products each (stochastic Lanczos quadrature). Memory: `steps` vectors.
    """
    names = [own.name for own in points.layers] if layer is None else [layer]
    if layer is not None and layer not in points.by_name:
        raise _unknown_layer(layer, points)
    if num_probes < 1 or steps < 1:
        raise ModelError(f"probes and steps must be at least 1, got {num_probes} and {steps}")
    nodes, weights = [], []
    with _blocks(model, batches, task, points) as block:
        operator, like = block(names)
        for draw in track(range(num_probes), "Density", progress):
            random = generator(seed, draw, device=model_device(model))
            start = draw_probe(like, "gaussian", random)
            diagonal, off_diagonal = _tridiagonal(operator, start, min(steps, len(like)))
            values, vectors = _eigen(diagonal, off_diagonal)
            nodes.append(tuple(values.tolist()))
            weights.append(tuple((vectors[0] ** 2).tolist()))
    return Density(layer, len(like), tuple(nodes), tuple(weights))


@contextmanager
def _blocks(
    model: nn.Module, batches: Batches, task: Task, points: QuantizationPoints
) -> Iterator[Callable[[list[str]], tuple[_Operator, Tensor]]]:
    """Yield a function from layer names to the operator of their joint block and a vector of its size."""
    check_parameters(model)
    with measuring(model), double_backward():
        parameters = require_grad(model, points)
        data = list(checked(reusable(batches), task, model))
        total = sum(task.batch_size(batch) for batch in data)

        # Of each batch the layers that it does not reach, once its gradients were taken.
        idle: dict[int, tuple[str, ...]] = {}

        def gradients(index: int) -> dict[str, list[Tensor]]:
            _, loss = forward(task, model, data[index])
            families = {"weights": {name: [parameter] for name, parameter in parameters.items()}}
            slopes, idle[index] = first_derivatives(loss, families)
            return slopes["weights"]

        with _graph():
            kept = gradients(0) if len(data) == 1 else None

        def block(names: list[str]) -> tuple[_Operator, Tensor]:
            targets = [parameters[name] for name in names]
            sizes = [target.numel() for target in targets]

            @_graph()
            def product(vector: Tensor) -> Tensor:
                parts = [part.view_as(t) for part, t in zip(torch.split(vector, sizes), targets, strict=True)]
                result = torch.zeros_like(vector)
                for index, batch in enumerate(data):
                    slopes = kept or gradients(index)
                    own = hessian_vector_product([slopes[name][0] for name in names], targets, parts)
                    share = task.batch_size(batch) / total
                    result += share * torch.cat([part.detach().flatten() for part in own])
                if never := [name for name in names if all(name in absent for absent in idle.values())]:
                    raise idle_layers(never)
                return result

            return product, torch.cat([target.detach().flatten() for target in targets])

        yield block


@contextmanager
def _graph() -> Iterator[None]:
    """Inside the block a lack of memory is put down to the samples' graph."""
    try:
        yield
    except Exception as error:
        if not memory.out_of_memory(error):
            raise
        raise memory.GraphTooLarge(
            f"memory does not suffice for the graph of a batch, which second derivatives need ({error}); give the"
            " samples in smaller batches, or fewer of them"
        ) from None


def _lanczos(operator: _Operator, start: Tensor, steps: int) -> Iterator[tuple[float, float, Tensor]]:
    """Yield T's next entry on the diagonal and the one next to the diagonal, and the vectors so far, in rows.

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
        off_diagonal = float(image.norm())
        size = max(size, abs(diagonal), off_diagonal)
        exhausted = off_diagonal <= 10 * torch.finfo(vector.dtype).eps * size
        yield diagonal, 0.0 if exhausted else off_diagonal, basis
        if exhausted:
            return
        vector = image / off_diagonal


def _tridiagonal(operator: _Operator, start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    entries = list(_lanczos(operator, start, steps))
    return [diagonal for diagonal, _, _ in entries], [off_diagonal for _, off_diagonal, _ in entries]


def _eigen(diagonal: list[float], off_diagonal: list[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues and eigenvectors (columns) of the tridiagonal matrix."""
    inner = np.array(off_diagonal[: len(diagonal) - 1])
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1))
    return values, vectors


class _Search:
    """Finds the `k` eigenvalues of largest magnitude of one operator after another, and knows which came too late."""

    def __init__(self, k: int, tolerance: float, steps: int) -> None:
        self._k, self._tolerance, self._steps = k, tolerance, steps
        self._late: list[str] = []

    def run(self, name: str, operator: _Operator, start: Tensor) -> tuple[list[float], NDArray[Any]]:
        """At most `k` eigenvalues, the largest first, and their orthonormal vectors in columns.

        `ResourceError` names the layer whose vectors do not fit into memory.
        """
        numel = len(start)
        k = min(self._k, numel)
        basis = min(max(2 * k + 1, BASIS), max(k + 1, self._steps), numel)
        dense = numel <= max(2 * k + 1, BASIS)
        # scipy reserves as many vectors for the result as for the basis, of which it touches `k` and copies them.
        vectors = numel if dense else basis + 2 * k + WORK_VECTORS
        needed = vectors * numel * start.element_size()
        free = memory.available_bytes()
        if free is not None and needed > free:
            raise _too_large(name, vectors, needed)

        def product(vector: NDArray[Any]) -> NDArray[Any]:
            image: NDArray[Any] = operator(torch.from_numpy(vector.ravel()).to(start)).cpu().numpy()
            return image

        first = start.cpu().numpy()
        try:
            if dense:
                values, columns = _all_pairs(product, first)
            else:
                values, columns = self._restarted(name, product, first, k, basis)
        except MemoryError:  # numpy's; torch refuses memory for the samples' graph by other errors
            raise _too_large(name, vectors, needed) from None
        order = np.argsort(-np.abs(values), kind="stable")[:k]
        return values[order].tolist(), columns[:, order]

    def warn(self) -> None:
        """Warn of layers whose eigenvalues have not converged."""
        late = self._late
        if late:
            warnings.warn(
                f"eigenvalues of {len(late)} layers ({', '.join(late[:3])}{', ...' if len(late) > 3 else ''}) are not"
                f" known to {self._tolerance:g} after about {self._steps} products; allow more steps, or a larger"
                " tolerance",
                stacklevel=3,
            )

    def _restarted(
        self, name: str, product: _Product, start: NDArray[Any], k: int, basis: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Eigenvalues and vectors by ARPACK with so many basis vectors."""
        operator = LinearOperator((len(start), len(start)), matvec=product, dtype=start.dtype)
        # The first basis takes as many products as it has vectors, a restart about half as many.
        restarts = max(1, -(-(self._steps - basis) // max(1, basis // 2)))
        try:
            values, vectors = eigsh(operator, k, v0=start, ncv=basis, tol=self._tolerance, maxiter=restarts)
        except ArpackNoConvergence as error:
            self._late.append(name)
            converged = error.eigenvectors
        except ArpackError as error:
            if product(start).any():
                raise ModelError(f"the eigenvalues of layer {name} cannot be found: {error}") from error
            # ARPACK refuses a start that H maps to zero: the block of a dead layer.
            return np.zeros(k), np.eye(len(start), k, dtype=start.dtype)
        else:
            return values, vectors
        # What has converged is kept; the best guesses of a basis of the same size make up for the others.
        _, guesses = eigsh(operator, k, v0=start, ncv=basis, tol=_ANY, maxiter=1)
        spanned, _ = np.linalg.qr(np.hstack([converged, guesses]))
        images = np.stack([product(column) for column in spanned.T], axis=1)
        values, inner = np.linalg.eigh(_symmetric(spanned.T @ images))
        return values, spanned @ inner.astype(start.dtype)


def _all_pairs(product: _Product, like: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """All eigenvalues and vectors of a block that is small enough to be formed."""
    rows = [product(unit) for unit in np.eye(len(like), dtype=like.dtype)]
    values, vectors = np.linalg.eigh(_symmetric(np.stack(rows)))
    return values, vectors


def _symmetric(matrix: NDArray[Any]) -> NDArray[Any]:
    """The symmetric part, in float64."""
    exact = matrix.astype(np.float64)
    result: NDArray[Any] = (exact + exact.T) / 2
    return result


def _too_large(name: str, vectors: int, needed: int) -> ResourceError:
    return ResourceError(
        f"the eigenvalues of layer {name} need {vectors} vectors of its size, {needed / 2**20:,.0f} MiB in all, which"
        " do not fit into memory; leave the layer out, or use a machine with more memory"
    )
