"""Squared norms of each sample's weight gradient of a convolution, by the form that should take the least time.

With the unfolded input A_n `[k, T]` and the gradient of the output D_n `[o, T]`, the norm is that of D_n A_nᵀ.
Unfolding copies every pixel once for each place in the kernel, which takes longer than the multiplications, so three
forms do without:

- *grouped*: the gradient by the library's own weight gradient of a convolution, with the samples as groups (CPU only:
  GPU libraries are slow at many groups);
- *pixels*: (AᵀA)_tt' is a sum of entries of the Gram matrix of the input's pixels, one for each place in the kernel;
- *shifted*: where every group has one input channel, the gradient at a place of the kernel is a product of images, one
  of them shifted.

A count of multiplications and copies chooses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from tracequant.curvature.matrix_norms import product_norms, side_by_side
from tracequant.curvature.operations import Convolution

# Measured on a CPU, in multiplications that take as long as handling one element: copying it when unfolding, writing
# it to a gradient of a convolution with many groups, adding it up in the Gram form over pixels.
UNFOLD, WRITE, ADD = 150, 400, 100
# The same for one shift of an image with one input channel for each output: a multiplication of two pixels, and what
# every shift costs.
SHIFT_PIXEL, SHIFT = 0.75, 450
# Shifted images stay in a processor's cache where they are taken so many elements at a time, not `CHUNK_ELEMENTS`.
CACHE_SHARE = 10
# By how much the grouped form is slower than its multiplications where a group has only a few channels.
FEW_CHANNELS = 10


class Pair(NamedTuple):
    """A convolution of `x` `[N, C, ...]`, the gradient of whose output is `y` `[N, O, ...]`."""

    x: Tensor
    y: Tensor
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def positions(self) -> int:
        return self.y[0, 0].numel()


def pair(geometry: Convolution, read: Tensor, gradient: Tensor) -> Pair:
    """What was read `[N, C, ...]` and the gradient of the output `[N, O, ...]` of a convolution.

    A transposed convolution is a convolution's backward pass: input and output change places. Where output_padding is
    so large that the convolution would have more positions, zeros take theirs.
    """
    shape, stride, padding = geometry.weight_shape, geometry.stride, geometry.padding
    dilation, groups = geometry.dilation, geometry.groups
    if not geometry.transposed:
        return Pair(read, gradient, shape, stride, padding, dilation, groups)
    counts = [
        (n + 2 * p - e * (k - 1) - 1) // s + 1
        for n, k, s, p, e in zip(gradient.shape[2:], shape[2:], stride, padding, dilation, strict=True)
    ]
    missing = [(0, count - n) for count, n in zip(counts, read.shape[2:], strict=True)]
    if any(after for _, after in missing):
        read = F.pad(read, [size for sides in reversed(missing) for size in sides])
    return Pair(gradient, read, shape, stride, padding, dilation, groups)


def squared_norms(pairs: Sequence[Pair]) -> Tensor:
    """‖Σ_pairs D_n A_nᵀ‖² for every sample `[N]`."""
    form, _ = _cheapest(pairs)
    return form(pairs)


def largest_intermediate(pairs: Sequence[Pair]) -> float:
    """Elements of the largest tensor that the norm of one sample makes."""
    return _cheapest(pairs)[1]


def gradients(c: Pair) -> Tensor:
    """Each sample's gradient, `[N, weights]`."""
    places = math.prod(c.kernel)
    if places == 1 or c.x.device.type != "cpu":
        return _unfolded_gradients(c)
    if c.weight_shape[1] == 1 and SHIFT_PIXEL * c.positions + SHIFT < c.positions + WRITE:
        return _shifted_gradients(c)
    return _grouped_gradients(c)


def _cheapest(convolutions: Sequence[Pair]) -> tuple[Callable[[Sequence[Pair]], Tensor], float]:
    """The form to take, and the elements of its largest intermediate for one sample."""
    first = convolutions[0]
    weights = math.prod(first.weight_shape)
    outputs = first.weight_shape[0]
    inputs = first.weight_shape[1] * math.prod(first.kernel)  # k of one group
    places = math.prod(first.kernel)
    positions = sum(c.positions for c in convolutions)
    unfolded = float(positions * inputs * first.groups)
    gram = positions**2 * (first.groups * inputs + outputs)
    copy = UNFOLD * unfolded if places > 1 else 0.0
    options = [(min(weights * positions, gram) + copy, _unfolded_norms, max(unfolded, positions**2, weights))]
    if first.x.device.type == "cpu" and places > 1:
        slow = FEW_CHANNELS if 1 < first.weight_shape[1] < 8 else 1
        options.append((weights * (slow * positions + WRITE), _grouped_norms, weights))
    if len(convolutions) == 1 and first.groups == 1 and places > 1:
        pixels = math.prod(s + 2 * p for s, p in zip(first.x.shape[2:], first.padding, strict=True))
        work = 1.5 * (pixels**2 * first.x.shape[1] + positions**2 * outputs) + ADD * places * positions**2
        options.append((work, _pixel_norms, pixels**2 + 2 * positions**2))
    if first.weight_shape[1] == 1 and places > 1:
        work = weights * (SHIFT_PIXEL * positions + SHIFT)
        options.append((work, _shifted_norms, CACHE_SHARE * outputs * max(c.positions for c in convolutions)))
    _, form, size = min(options, key=lambda option: option[0])
    return form, size


def _unfolded_norms(convolutions: Sequence[Pair]) -> Tensor:
    pairs = [(_grouped(_patches(c), c.groups), _grouped(c.y.flatten(2), c.groups)) for c in convolutions]
    return product_norms(*side_by_side(pairs))


def _grouped_norms(convolutions: Sequence[Pair]) -> Tensor:
    """‖G_n‖² from the gradients of all samples, which a convolution with the samples as groups gives."""
    return _total(_grouped_gradients, convolutions).square().sum(1)


def _shifted_norms(convolutions: Sequence[Pair]) -> Tensor:
    """‖G_n‖² from the gradients of all samples where every group has one input channel."""
    return _total(_shifted_gradients, convolutions).square().sum(1)


def _total(gradients: Callable[[Pair], Tensor], convolutions: Sequence[Pair]) -> Tensor:
    total = gradients(convolutions[0])
    for c in convolutions[1:]:
        total.add_(gradients(c))
    return total


def _grouped_gradients(c: Pair) -> Tensor:
    samples = len(c.x)
    joined = c._replace(
        x=c.x.reshape(1, -1, *c.x.shape[2:]),
        y=c.y.reshape(1, -1, *c.y.shape[2:]),
        weight_shape=(samples * c.weight_shape[0], *c.weight_shape[1:]),
        groups=samples * c.groups,
    )
    return _weight_gradient(joined).view(samples, -1)


def _shifted_gradients(c: Pair) -> Tensor:
    """G_n at a place of the kernel sums the products of the output and the input shifted by it."""
    x = _padded(c).unsqueeze(2)
    y = c.y.reshape(len(c.y), c.groups, -1, *c.y.shape[2:])
    axes = tuple(range(3, y.ndim))
    return torch.stack(
        [(x[(slice(None), slice(None), slice(None), *window)] * y).sum(axes) for window in _windows(c)], 3
    ).flatten(1)


def _unfolded_gradients(c: Pair) -> Tensor:
    return torch.matmul(_grouped(c.y.flatten(2), c.groups), _grouped(_patches(c), c.groups).mT).flatten(1)


def _pixel_norms(convolutions: Sequence[Pair]) -> Tensor:
    """The Gram form, AᵀA added up from the Gram matrix of the padded input's pixels."""
    (c,) = convolutions
    x = _padded(c)
    flat, y = x.flatten(2), c.y.flatten(2)
    pixels = torch.matmul(flat.mT, flat).view(len(x), *x.shape[2:], *x.shape[2:])
    total: Tensor | None = None
    for window in _windows(c):
        shifted = pixels[(slice(None), *window, *window)]
        total = shifted.clone() if total is None else total.add_(shifted)
    assert total is not None
    return total.view(len(x), -1).mul_(torch.matmul(y.mT, y).view(len(x), -1)).sum(1)


def _windows(c: Pair) -> Iterator[tuple[slice, ...]]:
    """For each place in the kernel, the pixels of the padded input that it meets, one for each position."""
    for place in itertools.product(*(range(size) for size in c.kernel)):
        yield tuple(
            slice(k * d, k * d + s * (count - 1) + 1, s)
            for k, d, s, count in zip(place, c.dilation, c.stride, c.y.shape[2:], strict=True)
        )


def _padded(c: Pair) -> Tensor:
    return F.pad(c.x, [p for size in reversed(c.padding) for p in (size, size)]) if any(c.padding) else c.x


def _weight_gradient(c: Pair) -> Tensor:
    """Σ_n G_n of a convolution, by the library."""
    function = (conv1d_weight, conv2d_weight, conv3d_weight)[len(c.kernel) - 1]
    return cast(
        Tensor,
        function(c.x, c.weight_shape, c.y, c.stride, c.padding, c.dilation, c.groups),  # type: ignore[no-untyped-call]
    )


def _grouped(x: Tensor, groups: int) -> Tensor:
    """`[N, g · m, T]` to `[N, g, m, T]`."""
    return x.reshape(len(x), groups, -1, x.shape[2])


def _patches(c: Pair) -> Tensor:
    """The unfolded input `[N, C · prod(kernel), T]` for any number of dimensions, channels outermost."""
    x = _padded(c)
    if all(size == 1 for size in c.kernel):
        counts = c.y.shape[2:]
        steps = tuple(slice(0, s * (count - 1) + 1, s) for s, count in zip(c.stride, counts, strict=True))
        return x[(slice(None), slice(None), *steps)].flatten(2)
    x = x.contiguous()
    strides = x.stride()[2:]
    view = x.as_strided(
        (*x.shape[:2], *c.kernel, *c.y.shape[2:]),
        (
            *x.stride()[:2],
            *(s * d for s, d in zip(strides, c.dilation, strict=True)),
            *(s * step for s, step in zip(strides, c.stride, strict=True)),
        ),
    )
    return view.reshape(len(x), x.shape[1] * math.prod(c.kernel), c.positions)
