"""Recognising the Hessian of a softmax in a loss, whatever the loss is called."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 1e-3
# Units of rounding that a product with a softmax's Hessian may be off by.
ROUNDING = 16
# Elements that are taken at a time.
CHUNK_ELEMENTS = 1 << 22


def class_axes(outputs: Tensor) -> list[int]:
    """The axes that can hold classes: the second one, and the last one where there are more."""
    if outputs.ndim < 3:
        return [1] if outputs.ndim == 2 else []
    # Of a sequence the longer axis is most often that of the classes.
    return [2, 1] if outputs.ndim == 3 and outputs.shape[2] > outputs.shape[1] else [1, outputs.ndim - 1]


def softmax_scale(outputs: Tensor, vector: Tensor, image: Tensor) -> tuple[int, Tensor] | None:
    """The axis of the classes and the factor α of every position if H = α (diag(p) − p pᵀ), with p = softmax(outputs).

    `image` is the product H v with a random `vector` v, both in the shape of the outputs. α >= 0 has the outputs' shape
    with 1 on the axis of the classes. None if H is of another kind.
    """
    eps = torch.finfo(outputs.dtype).eps
    samples = max(1, CHUNK_ELEMENTS // max(1, outputs[:1].numel()))
    for axis in class_axes(outputs):
        parts = [
            _fit(*rows, axis, eps)
            for rows in zip(outputs.split(samples), vector.split(samples), image.split(samples), strict=True)  # type: ignore[no-untyped-call]
        ]
        scale = torch.cat([part for part, _, _ in parts])
        # The scale of a mean is at most one, which serves where no position tells it.
        largest = float(scale.max()) if bool((scale > 0).any()) else 1.0
        difference, rounding = (math.sqrt(sum(part[i] for part in parts)) for i in (1, 2))
        allowed = TOLERANCE * float(torch.linalg.vector_norm(image)) + largest * rounding
        if bool((scale >= 0).all()) and difference <= allowed:
            return axis, scale
    return None


def _fit(outputs: Tensor, vector: Tensor, image: Tensor, axis: int, eps: float) -> tuple[Tensor, float, float]:
    """α of some samples, the squared distance of the image from a softmax, the square of its rounding where α is 1."""
    p = outputs.softmax(axis)
    weighted = p * vector
    expected = weighted - p * weighted.sum(axis, keepdim=True)
    # Where one class is certain, what is left of the difference is rounding in the precision of the loss.
    rounding = ROUNDING * eps * torch.linalg.vector_norm(weighted, dim=axis, keepdim=True)
    size = torch.linalg.vector_norm(expected, dim=axis, keepdim=True)
    scale = (image * expected).sum(axis, keepdim=True) / size.square().clamp_min(torch.finfo(p.dtype).tiny)
    scale = torch.where(size > rounding, scale, 0.0)
    distance = torch.linalg.vector_norm(scale * expected - image, dtype=torch.float64)
    return scale, float(distance.square()), float(torch.linalg.vector_norm(rounding, dtype=torch.float64).square())


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors agree in norm."""
    difference = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(y.double().square().sum()) for y in b)
    return difference <= TOLERANCE**2 * size
