"""Norms of products of factors, for each sample and without forming what is large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def product_norms(a: Tensor, d: Tensor) -> Tensor:
    """‖D_n A_nᵀ‖² over groups, `[N]`, from `a` `[N, g, k, T]` and `d` `[N, g, o, T]`."""
    k, o, positions = a.shape[2], d.shape[2], a.shape[3]
    if positions == 1:
        return (a.square().sum((2, 3)) * d.square().sum((2, 3))).sum(1)
    if positions * (o + k) < o * k:
        return (torch.matmul(a.mT, a) * torch.matmul(d.mT, d)).sum((1, 2, 3))
    return torch.matmul(d, a.mT).square().sum((1, 2, 3))


def side_by_side(factors: Sequence[Factors]) -> Factors:
    """Factors `[N, g, k, T]` and `[N, g, o, T]` of several products along T: the sum of the products is one product."""
    if len(factors) == 1:
        return factors[0]
    return torch.cat([a for a, _ in factors], 3), torch.cat([d for _, d in factors], 3)
