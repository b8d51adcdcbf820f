"""Squared norms of each sample's weight gradient, without forming the gradients of a whole batch.

A convolution or linear layer's gradient for sample n is G_n = D_n A_nᵀ, with A_n `[k, T]` the unfolded input and D_n
`[o, T]` the gradient of the output, T positions. Then ‖G_n‖² costs o·k·T multiplications by forming G_n, or T²(o + k)
by the Gram form Σ (AᵀA) ⊙ (DᵀD). Unfolding copies every pixel once for each place in the kernel, which takes longer
than the multiplications, so two forms do without:

- *grouped*: G_n by the library's own weight gradient of a convolution, with the samples as groups (CPU only: GPU
  libraries are slow at many groups);
- *pixels*: (AᵀA)_tt' is a sum of entries of the Gram matrix of the input's pixels, one for each place in the kernel.

The form that should take the least time is chosen by its count of multiplications and copies. Positions of several
calls of one layer are laid side by side along T, which adds their gradients up before squaring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from tracequant.model.kinds import CONVOLUTIONS, TRANSPOSED

# Elements of the largest intermediate: samples are taken in chunks that stay below it.
CHUNK_ELEMENTS = 1 << 23

# Measured on a CPU, in multiplications that take as long as handling one element: copying it when unfolding, writing
# it to a gradient of a convolution with many groups, adding it up in the Gram form over pixels.
UNFOLD, WRITE, ADD = 150, 400, 100
# By how much the grouped form is slower than its multiplications where a group has only a few channels.
FEW_CHANNELS = 10

Call = tuple[Tensor, Tensor]


class _Convolution(NamedTuple):
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


def supported(module: nn.Module) -> bool:
    """Whether `squared_norms` covers the module: kind, options, and a forward that no subclass has replaced."""
    base = next((kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules")), None)
    if base is None or type(module).forward is not base.forward:  # type: ignore[attr-defined]
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear))


def squared_norms(module: nn.Module, calls: list[Call], samples: int) -> Tensor:
    """‖G_n‖² for every sample, float64 `[samples]`, from the (input, gradient of the output) of each call."""
    calls = [folded for call in calls for folded in _by_sample(module, call, samples)]
    if isinstance(module, nn.Embedding):
        size = float(sum(a[0].numel() * max(a[0].numel(), d.shape[-1]) for a, d in calls))
        parts = [_embedding_norms(module, chunk) for chunk in _chunks(calls, samples, size)]
    elif isinstance(module, nn.Linear):
        rows = [(_rows_last(a).unsqueeze(1), _rows_last(d).unsqueeze(1)) for a, d in _cast(module, calls)]
        parts = [
            _norms(*_side_by_side(chunk)) for chunk in _chunks(rows, samples, sum(_positions_cost(*c) for c in rows))
        ]
    else:
        convolutions = [_as_convolution(module, a, d) for a, d in _cast(module, calls)]
        form, size = _cheapest(convolutions)
        pairs = [(c.x, c.y) for c in convolutions]
        parts = []
        for chunk in _chunks(pairs, samples, size):
            own = [c._replace(x=x, y=y) for c, (x, y) in zip(convolutions, chunk, strict=True)]
            parts.append(form(own))
    return torch.cat([part.double() for part in parts])


def responses(module: nn.Module, call: Call, directions: Sequence[Tensor]) -> list[Tensor]:
    """What each direction V, taken for the weight, would add to the output of a call, in the output's shape.

    With D_n the gradient of the output, ⟨G_n, V⟩ is the sum over sample n of D_n times it: no G_n is formed.
    """
    a, d = call
    if isinstance(module, nn.Embedding):
        mask = _embedding_mask(module, a).unsqueeze(-1)
        return [F.embedding(a, direction) * mask for direction in directions]
    ((a, d),) = _cast(module, [call])
    if isinstance(module, nn.Linear):
        return [F.linear(a, direction) for direction in directions]
    if isinstance(module, CONVOLUTIONS):
        return [module._conv_forward(a, direction, None) for direction in directions]
    geometry = cast(nn.ConvTranspose2d, module)
    shape = zip(
        d.shape[2:], a.shape[2:], geometry.kernel_size, geometry.stride, cast(Any, geometry.padding),
        geometry.dilation, strict=True,
    )  # fmt: skip
    # As large as this call's output was, whatever was asked for in the call.
    extra = tuple(n - ((m - 1) * s - 2 * p + e * (k - 1) + 1) for n, m, k, s, p, e in shape)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d.ndim - 3]
    rest: Any = (geometry.stride, geometry.padding, extra, geometry.groups, geometry.dilation)
    return [function(a, direction, None, *rest) for direction in directions]


def total_gradient(module: nn.Module, calls: list[Call], samples: int) -> Tensor:
    """Σ_n G_n in the shape of the weight, for checking that the calls explain all of the gradient."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    total = torch.zeros_like(weight)
    if isinstance(module, nn.Embedding):
        for index, d in calls:
            rows = d * _embedding_mask(module, index).unsqueeze(-1)
            total.index_add_(0, index.flatten(), rows.flatten(0, -2).to(total.dtype))
        return total
    for a, d in _cast(module, calls):
        if isinstance(module, nn.Linear):
            total += d.flatten(0, -2).mT @ a.flatten(0, -2)
        else:
            convolution = _as_convolution(module, a, d)
            total += _weight_gradient(convolution)
    return total


def _by_sample(module: nn.Module, call: Call, samples: int) -> list[Call]:
    """The call with samples along the leading axis, where it held several rows for each (windows, crops)."""
    a, d = call
    if len(a) == samples:
        return [call]
    a, d = a.reshape(samples, -1, *a.shape[1:]), d.reshape(samples, -1, *d.shape[1:])
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return [(a, d)]
    return list(zip(a.unbind(1), d.unbind(1), strict=True))


def _cast(module: nn.Module, calls: list[Call]) -> list[Call]:
    """The calls in the weight's precision, which autocast may have left."""
    dtype: torch.dtype = module.weight.dtype  # type: ignore[assignment]
    return [(a.to(dtype), d.to(dtype)) for a, d in calls]


def _chunks(calls: list[Call], samples: int, size: float) -> Iterator[list[Call]]:
    """The calls of a few samples at a time, so that intermediates of `size` a sample stay below `CHUNK_ELEMENTS`."""
    step = max(1, min(samples, int(CHUNK_ELEMENTS / max(size, 1.0))))
    for start in range(0, samples, step):
        yield [(a[start : start + step], d[start : start + step]) for a, d in calls]


def _norms(a: Tensor, d: Tensor) -> Tensor:
    """‖D_n A_nᵀ‖² over groups, `a` `[N, g, k, T]`, `d` `[N, g, o, T]`."""
    k, o, positions = a.shape[2], d.shape[2], a.shape[3]
    if positions == 1:
        return (a.square().sum((2, 3)) * d.square().sum((2, 3))).sum(1)
    if positions * (o + k) < o * k:
        return (torch.matmul(a.mT, a) * torch.matmul(d.mT, d)).sum((1, 2, 3))
    return torch.matmul(d, a.mT).square().sum((1, 2, 3))


def _positions_cost(a: Tensor, d: Tensor) -> float:
    """Elements of the larger of the product that `_norms` makes and its inputs, for one sample."""
    g, k, o, positions = a.shape[1], a.shape[2], d.shape[2], a.shape[3]
    product = positions**2 if positions * (o + k) < o * k else o * k
    return float(g * max(product, positions * max(o, k)))


def _side_by_side(calls: list[Call]) -> Call:
    """Inputs `[N, g, k, T]` and output gradients `[N, g, o, T]` of all calls along T."""
    if len(calls) == 1:
        return calls[0]
    return torch.cat([a for a, _ in calls], 3), torch.cat([d for _, d in calls], 3)


def _as_convolution(module: nn.Module, a: Tensor, d: Tensor) -> _Convolution:
    # The geometry of both kinds of module has the same names.
    geometry = cast(nn.Conv2d, module)
    padding: Any = geometry.padding
    shape = tuple(geometry.weight.shape)
    if isinstance(module, TRANSPOSED):
        # A transposed convolution is a convolution's backward pass: input and output change places. Where
        # output_padding
        # is so large that the convolution would have more positions, zeros take theirs.
        counts = [
            (n + 2 * p - e * (k - 1) - 1) // s + 1
            for n, k, s, p, e in zip(
                d.shape[2:], geometry.kernel_size, geometry.stride, padding, geometry.dilation, strict=True
            )
        ]
        missing = [(0, count - n) for count, n in zip(counts, a.shape[2:], strict=True)]
        if any(after for _, after in missing):
            a = F.pad(a, [size for pair in reversed(missing) for size in pair])
        return _Convolution(d, a, shape, geometry.stride, padding, geometry.dilation, geometry.groups)
    if isinstance(padding, str) or geometry.padding_mode != "zeros":
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        # In F.pad's order, with "same" and "valid" resolved.
        a = F.pad(a, geometry._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(geometry.kernel_size)
    return _Convolution(a, d, shape, geometry.stride, padding, geometry.dilation, geometry.groups)


def _cheapest(convolutions: list[_Convolution]) -> tuple[Any, float]:
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
    _, form, size = min(options, key=lambda option: option[0])
    return form, size


def _unfolded_norms(convolutions: list[_Convolution]) -> Tensor:
    pairs = [(_grouped(_patches(c), c.groups), _grouped(c.y.flatten(2), c.groups)) for c in convolutions]
    return _norms(*_side_by_side(pairs))


def _grouped_norms(convolutions: list[_Convolution]) -> Tensor:
    """‖G_n‖² from the gradients of all samples, which a convolution with the samples as groups gives."""
    total: Tensor | None = None
    for c in convolutions:
        samples = len(c.x)
        joined = c._replace(
            x=c.x.reshape(1, -1, *c.x.shape[2:]),
            y=c.y.reshape(1, -1, *c.y.shape[2:]),
            weight_shape=(samples * c.weight_shape[0], *c.weight_shape[1:]),
            groups=samples * c.groups,
        )
        gradient = _weight_gradient(joined).view(samples, -1)
        total = gradient if total is None else total.add_(gradient)
    assert total is not None
    norms: Tensor = torch.linalg.vector_norm(total, dim=1)
    return norms.square()


def _pixel_norms(convolutions: list[_Convolution]) -> Tensor:
    """The Gram form, AᵀA added up from the Gram matrix of the padded input's pixels."""
    (c,) = convolutions
    x = F.pad(c.x, [p for size in reversed(c.padding) for p in (size, size)]) if any(c.padding) else c.x
    flat, y = x.flatten(2), c.y.flatten(2)
    pixels = torch.matmul(flat.mT, flat).view(len(x), *x.shape[2:], *x.shape[2:])
    counts = c.y.shape[2:]
    total: Tensor | None = None
    for place in _places(c.kernel):
        window = tuple(
            slice(k * d, k * d + s * (count - 1) + 1, s)
            for k, d, s, count in zip(place, c.dilation, c.stride, counts, strict=True)
        )
        shifted = pixels[(slice(None), *window, *window)]
        total = shifted.clone() if total is None else total.add_(shifted)
    assert total is not None
    return total.view(len(x), -1).mul_(torch.matmul(y.mT, y).view(len(x), -1)).sum(1)


def _places(kernel: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All index tuples of a kernel."""
    if not kernel:
        yield ()
        return
    for first in range(kernel[0]):
        for rest in _places(kernel[1:]):
            yield (first, *rest)


def _weight_gradient(c: _Convolution) -> Tensor:
    """Σ_n G_n of a convolution, by the library."""
    function = (conv1d_weight, conv2d_weight, conv3d_weight)[len(c.kernel) - 1]
    return cast(
        Tensor,
        function(c.x, c.weight_shape, c.y, c.stride, c.padding, c.dilation, c.groups),  # type: ignore[no-untyped-call]
    )


def _rows_last(x: Tensor) -> Tensor:
    """`[N, ..., m]` to `[N, m, T]`."""
    return x.reshape(len(x), -1, x.shape[-1]).mT


def _grouped(x: Tensor, groups: int) -> Tensor:
    """`[N, g · m, T]` to `[N, g, m, T]`."""
    return x.reshape(len(x), groups, -1, x.shape[2])


def _patches(c: _Convolution) -> Tensor:
    """The unfolded input `[N, C · prod(kernel), T]` for any number of dimensions, channels outermost."""
    x = F.pad(c.x, [p for size in reversed(c.padding) for p in (size, size)]) if any(c.padding) else c.x
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


def _embedding_mask(module: nn.Embedding, index: Tensor) -> Tensor:
    """1 where an index is trained, 0 at the padding index, which has no gradient."""
    return index != (-1 if module.padding_idx is None else module.padding_idx)


def _embedding_norms(module: nn.Embedding, calls: list[Call]) -> Tensor:
    """The Gram form, where (AᵀA)_tt' is 1 if positions t and t' hold the same index, else 0."""
    index = torch.cat([a.reshape(len(a), -1) for a, _ in calls], 1)
    d = torch.cat([d.reshape(len(d), -1, d.shape[-1]) for _, d in calls], 1) * _embedding_mask(module, index).unsqueeze(
        2
    )
    same = index.unsqueeze(2) == index.unsqueeze(1)
    return (torch.matmul(d, d.mT) * same).sum((1, 2))
