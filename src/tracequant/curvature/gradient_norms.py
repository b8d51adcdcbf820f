"""Squared norms of each sample's weight gradient, without forming the gradients of a whole batch.

A convolution or linear layer's gradient for sample n is G_n = D_n A_nᵀ, with A_n `[k, T]` the unfolded input and D_n
`[o, T]` the gradient of the output, T positions. Then ‖G_n‖² costs o·k·T multiplications by forming G_n, or T²(o + k)
by the Gram form Σ (AᵀA) ⊙ (DᵀD); the cheaper one is taken. Positions of several calls of one layer are laid side by
side along T, which adds their gradients up before squaring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracequant.layers import CONVOLUTIONS, TRANSPOSED

# Elements of the largest intermediate: samples are taken in chunks that stay below it.
CHUNK_ELEMENTS = 1 << 24

Call = tuple[Tensor, Tensor]


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
    parts = []
    for chunk in _chunks(module, calls, samples):
        norms = (
            _embedding_norms(module, chunk) if isinstance(module, nn.Embedding) else _norms(*_positions(module, chunk))
        )
        parts.append(norms.double())
    return torch.cat(parts)


def total_gradient(module: nn.Module, calls: list[Call], samples: int) -> Tensor:
    """Σ_n G_n in the shape of the weight, for checking that the calls explain all of the gradient."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    total = torch.zeros_like(weight)
    for chunk in _chunks(module, calls, samples):
        if isinstance(module, nn.Embedding):
            for index, d in chunk:
                rows = d * _embedding_mask(module, index).unsqueeze(-1)
                total.index_add_(0, index.flatten(), rows.flatten(0, -2).to(total.dtype))
        else:
            a, d = _positions(module, chunk)
            # Groups lead both in a convolution's weight [o, k] and, being the input channels, in a transposed one's.
            total += torch.einsum("ngot,ngkt->gok", d, a).reshape(weight.shape)
    return total


def _chunks(module: nn.Module, calls: list[Call], samples: int) -> Iterator[list[Call]]:
    """The calls of a few samples at a time, so that unfolded inputs stay below `CHUNK_ELEMENTS`."""
    calls = [folded for call in calls for folded in _by_sample(module, call, samples)]
    size = sum(_unfolded_elements(module, a, d) for a, d in calls) / samples
    step = max(1, min(samples, int(CHUNK_ELEMENTS / max(size, 1.0))))
    for start in range(0, samples, step):
        yield [(a[start : start + step], d[start : start + step]) for a, d in calls]


def _by_sample(module: nn.Module, call: Call, samples: int) -> list[Call]:
    """The call with samples along the leading axis, where it held several rows for each (windows, crops)."""
    a, d = call
    if len(a) == samples:
        return [call]
    a, d = a.reshape(samples, -1, *a.shape[1:]), d.reshape(samples, -1, *d.shape[1:])
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return [(a, d)]
    return list(zip(a.unbind(1), d.unbind(1), strict=True))


def _norms(a: Tensor, d: Tensor) -> Tensor:
    """‖D_n A_nᵀ‖² over groups, `a` `[N, g, k, T]`, `d` `[N, g, o, T]`."""
    k, o, positions = a.shape[2], d.shape[2], a.shape[3]
    if positions == 1:
        return (a.square().sum((2, 3)) * d.square().sum((2, 3))).sum(1)
    if positions * (o + k) < o * k:
        return (torch.matmul(a.mT, a) * torch.matmul(d.mT, d)).sum((1, 2, 3))
    return torch.matmul(d, a.mT).square().sum((1, 2, 3))


def _positions(module: nn.Module, calls: list[Call]) -> Call:
    """Inputs `[N, g, k, T]` and output gradients `[N, g, o, T]` of all calls, side by side along T."""
    pairs = [_unfold(module, a, d) for a, d in calls]
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _ in pairs], 3), torch.cat([d for _, d in pairs], 3)


def _unfold(module: nn.Module, a: Tensor, d: Tensor) -> Call:
    d = d.to(module.weight.dtype)  # type: ignore[arg-type]
    a = a.to(d.dtype)
    if isinstance(module, nn.Linear):
        return _rows_last(a).unsqueeze(1), _rows_last(d).unsqueeze(1)
    if isinstance(module, TRANSPOSED):
        # A transposed convolution is the convolution's backward pass: input and output change places.
        margin = cast(tuple[int, ...], module.padding)  # no strings here, unlike in a convolution
        patches = _patches(d, module.kernel_size, module.stride, margin, module.dilation)
        return _grouped(patches, module.groups), _grouped(a.flatten(2), module.groups)
    assert isinstance(module, CONVOLUTIONS)
    if module.padding_mode == "zeros":
        # In F.pad's order, with "same" and "valid" resolved.
        padding = list(module._reversed_padding_repeated_twice)
        a = F.pad(a, padding) if any(padding) else a
    else:
        a = F.pad(a, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    patches = _patches(a, module.kernel_size, module.stride, (0,) * len(module.kernel_size), module.dilation)
    return _grouped(patches, module.groups), _grouped(d.flatten(2), module.groups)


def _rows_last(x: Tensor) -> Tensor:
    """`[N, ..., m]` to `[N, m, T]`."""
    return x.reshape(len(x), -1, x.shape[-1]).mT


def _grouped(x: Tensor, groups: int) -> Tensor:
    """`[N, g · m, T]` to `[N, g, m, T]`."""
    return x.reshape(len(x), groups, -1, x.shape[2])


def _patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Patches `[N, C · prod(kernel), T]` of `x` `[N, C, ...]` for any number of dimensions, channels outermost."""
    if any(padding):
        x = F.pad(x, [p for size in reversed(padding) for p in (size, size)])
    if all(size == 1 for size in kernel):
        steps = tuple(slice(None, None, step) for step in stride)
        return x[(slice(None), slice(None), *steps)].flatten(2)
    x = x.contiguous()
    spatial = x.shape[2:]
    counts = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)
    ]
    strides = x.stride()[2:]
    view = x.as_strided(
        (*x.shape[:2], *kernel, *counts),
        (
            *x.stride()[:2],
            *(s * d for s, d in zip(strides, dilation, strict=True)),
            *(s * step for s, step in zip(strides, stride, strict=True)),
        ),
    )
    return view.reshape(len(x), x.shape[1] * math.prod(kernel), math.prod(counts))


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


def _unfolded_elements(module: nn.Module, a: Tensor, d: Tensor) -> float:
    """Size of the larger intermediate of one call on a whole batch."""
    if isinstance(module, nn.Embedding):
        return float(a.numel() * max(a.numel() // len(a), d.shape[-1]))
    kernel = math.prod(getattr(module, "kernel_size", (1,)))
    inputs = (d if isinstance(module, TRANSPOSED) else a).numel() * kernel
    if isinstance(module, CONVOLUTIONS):
        inputs //= max(1, math.prod(module.stride))
    return float(max(inputs, len(d) * module.weight.numel()))  # type: ignore[operator]
