"""Recognising the Hessian of a softmax in a loss, whatever the loss is called."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3


def class_axes(outputs: Tensor) -> list[int]:
    """The axes that can hold classes: the second one, and the last one where there are more."""
    return [] if outputs.ndim < 2 else [1] if outputs.ndim == 2 else [1, outputs.ndim - 1]


def softmax_scale(outputs: Tensor, vector: Tensor, image: Tensor) -> tuple[int, Tensor] | None:
    """The axis of the classes and the factor α of every position if H = α (diag(p) − p pᵀ), with p = softmax(outputs).

    `image` is the product H v with a random `vector` v, both in the shape of the outputs. α >= 0 has the outputs' shape
    with 1 on the axis of the classes. None if H is of another kind.
    """
    for axis in class_axes(outputs):
        p = outputs.softmax(axis)
        expected = p * vector - p * (p * vector).sum(axis, keepdim=True)
        scale = (image * expected).sum(axis, keepdim=True) / (
            expected.square().sum(axis, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        )
        if bool((scale >= 0).all()) and close([scale * expected], [image]):
            return axis, scale
    return None


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors agree in norm."""
    difference = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(y.double().square().sum()) for y in b)
    return difference <= TOLERANCE**2 * size
