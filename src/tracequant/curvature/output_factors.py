"""Factored Hessians of the loss with respect to the outputs: random cotangents and all columns of a factor.

The choice of L and of the signs decides how noisy a draw is, since ‖Jᵀ L v‖² = Σ_k ‖Jᵀ L_k‖² + Σ_{k≠l} v_k v_l ⟨Jᵀ L_k,
Jᵀ L_l⟩. The inputs that decide a trace waver between two or three classes. In the Cholesky factor the first column has
all the curvature between the first two classes, while the more obvious columns √p_c (e_c − p) are opposite to one
another there, and one draw gives anything between nothing and twice the value. And the signs of successive probes are
not independent but random signs times the rows of a Hadamard matrix: in 2^m probes all products of the first 2^m
columns cancel (`draw_signs`). Eigenvectors count from the largest eigenvalue, the elements of a diagonal from the
largest where each sample has one row of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tracequant.core.errors import ModelError

# Draws whose signs are rows of one Hadamard matrix.
GROUP = 64
# Elements of the outputs that a factor is applied to at a time.
CHUNK_ELEMENTS = 1 << 22
# Up to so many classes are sorted.
SORTED = 4096

# One backward pass: a vector for every output tensor, and the sign that its squared norms count with.
Cotangents = tuple[list[Tensor], float]


@dataclass(frozen=True)
class OutputHessian:
    """A factored H_L. `tensors` are the model's outputs that the loss depends on; `kind` says which shape was found.

    `first` and `second` are α and p (softmax), h (diagonal, in `first`), eigenvalues and eigenvectors (dense, and
    blocks: `[N, C, ...]` and `[N, C, C, ...]`, positions last). With softmax and blocks the classes C are on axis 1
    here and on `axis` of the tensor.
    """

    kind: str
    tensors: list[Tensor]
    first: list[Tensor]
    second: Tensor | None = None
    axis: int = 1

    def draw(self, generator: torch.Generator, number: int = 0) -> Iterator[Cotangents]:
        """Random cotangents u with E[Σ sign · u uᵀ] = H_L: one pass, or two where H_L has both signs.

        Draws whose `number` lies in the same `GROUP` belong together: they must come from generators in the same state.
        """
        row = number % GROUP
        if self.kind == "softmax":
            yield [self._softmax(draw_signs(self._probabilities, generator, row))], 1.0
        elif self.kind in ("diagonal", "zero"):
            signs = [_by_size(draw_signs(h, generator, row), h) for h in self.first]
            for sign in self._present_signs():
                yield [(sign * h).clamp_min(0).sqrt() * v for h, v in zip(self.first, signs, strict=True)], sign
        else:
            signs = [_by_size(draw_signs(self.first[0], generator, row), self.first[0])]
            for sign in self._present_signs():
                yield [self._turned((sign * self.first[0]).clamp_min(0).sqrt() * signs[0])], sign

    def columns(self) -> Iterator[Cotangents]:
        """All columns of the factor, one backward pass each: the exact trace."""
        if self.kind == "softmax":
            p = self._probabilities
            if p.ndim > 2:
                raise ModelError(
                    f"num_probes='exact' needs outputs [samples, classes], got {list(p.shape)}: every position would"
                    " take passes of its own; give a number of probes"
                )
            # The last column is zero: probabilities add up to one.
            for c in range(p.shape[1] - 1):
                yield [self._softmax(torch.zeros_like(p).index_fill_(1, torch.tensor(c, device=p.device), 1.0))], 1.0
            return
        rows = [h.flatten(1) if h.ndim > 1 else h.unsqueeze(1) for h in self.first]
        for k, row in enumerate(rows):
            for i in range(row.shape[1]):
                for sign in (1.0, -1.0):
                    part = (sign * row[:, i]).clamp_min(0).sqrt()
                    if not part.any():
                        continue
                    unit = [torch.zeros_like(other) for other in rows]
                    unit[k][:, i] = part
                    vectors = [u.view_as(h) for u, h in zip(unit, self.first, strict=True)]
                    yield (vectors if self.kind == "diagonal" else [self._turned(vectors[0])]), sign

    @property
    def _probabilities(self) -> Tensor:
        assert self.second is not None
        return self.second

    def _softmax(self, v: Tensor) -> Tensor:
        """√α L v, L the Cholesky factor of diag(p) − p pᵀ, v in the order of decreasing p, classes along axis 1.

        With the tails q_k = Σ_{j>k} p_j: L_kk = √(p_k q_k / q_{k−1}) and L_ik = −p_i √(p_k / (q_{k−1} q_k)) for i > k.
        """
        samples = max(1, CHUNK_ELEMENTS // max(1, v[:1].numel()))
        # A language model has so many classes that intermediates of all samples would be larger than its activations.
        pairs = zip(self._probabilities.split(samples), v.split(samples), strict=True)  # type: ignore[no-untyped-call]
        product = torch.cat([_cholesky_product(p, rows) for p, rows in pairs])
        return (self.first[0].sqrt() * product).movedim(1, self.axis)

    def _turned(self, v: Tensor) -> Tensor:
        """The sum of the eigenvectors times v."""
        assert self.second is not None
        product = torch.einsum("nij...,nj...->ni...", self.second, v)
        return product.view_as(self.tensors[0]) if self.kind == "dense" else product.movedim(1, self.axis)

    def _present_signs(self) -> list[float]:
        largest = max(float(h.abs().max()) for h in self.first)
        # A convex loss has rounding errors below zero, which deserve no pass of their own.
        return [sign for sign in (1.0, -1.0) if any(float((sign * h).max()) > 1e-7 * largest for h in self.first)] or [
            1.0
        ]


class Part(Protocol):
    """The factored Hessian of some of the outputs."""

    @property
    def kind(self) -> str:
        """The shape that was found."""

    @property
    def tensors(self) -> list[Tensor]:
        """The outputs."""

    def draw(self, generator: torch.Generator, number: int = 0) -> Iterator[Cotangents]:
        """Random cotangents, as `OutputHessian.draw`."""

    def columns(self) -> Iterator[Cotangents]:
        """All columns, as `OutputHessian.columns`."""


@dataclass(frozen=True)
class SeparateHessians:
    """Factored Hessians of several output tensors without mixed derivatives: H_L is block diagonal."""

    parts: Sequence[Part]

    @property
    def kind(self) -> str:
        """The shapes that were found, each once."""
        return " and ".join(dict.fromkeys(part.kind for part in self.parts))

    @property
    def tensors(self) -> list[Tensor]:
        """The outputs of all parts."""
        return [tensor for part in self.parts for tensor in part.tensors]

    def draw(self, generator: torch.Generator, number: int = 0) -> Iterator[Cotangents]:
        """As `OutputHessian.draw`: one pass for all parts, or two where any of them has both signs."""
        drawn = [{sign: vectors for vectors, sign in part.draw(generator, number)} for part in self.parts]
        for sign in (1.0, -1.0):
            if any(sign in own for own in drawn):
                yield self._filled(lambda i, sign=sign: drawn[i].get(sign)), sign  # type: ignore[misc]

    def columns(self) -> Iterator[Cotangents]:
        """As `OutputHessian.columns`, those of one part after those of another."""
        for number, part in enumerate(self.parts):
            for vectors, sign in part.columns():
                yield self._filled(lambda i, n=number, v=vectors: v if i == n else None), sign  # type: ignore[misc]

    def _filled(self, given: Callable[[int], list[Tensor] | None]) -> list[Tensor]:
        """Vectors for the outputs of all parts, zero where a part is given none."""
        vectors = []
        for number, part in enumerate(self.parts):
            own = given(number)
            vectors.extend([torch.zeros_like(tensor) for tensor in part.tensors] if own is None else own)
        return vectors


def _cholesky_product(p: Tensor, v: Tensor) -> Tensor:
    """L v for the Cholesky factor L of diag(p) − p pᵀ with classes by falling p, in the order of the classes."""
    order = p.argsort(dim=1, descending=True) if p.shape[1] <= SORTED else _leading_first(p)
    p = p.gather(1, order)
    # From the smallest up, so that small tails keep their digits.
    from_here = p.flip(1).cumsum(1).flip(1)
    tail = torch.cat([from_here[:, 1:], torch.zeros_like(p[:, :1])], 1)
    tiny = torch.finfo(p.dtype).tiny ** 0.5  # its square is still above zero
    safe, before = tail.clamp_min(tiny), from_here.clamp_min(tiny)
    beside = (p / before / safe).sqrt() * v * (tail > tiny)
    earlier = torch.cat([torch.zeros_like(beside[:, :1]), beside[:, :-1].cumsum(1)], 1)
    product = (p * tail / before).sqrt() * v - p * earlier
    return torch.zeros_like(product).scatter(1, order, product)


def _leading_first(p: Tensor) -> Tensor:
    """An order of the classes that begins with the `GROUP` likeliest; the others stay where they are if they can.

    The factor is exact in any order, and only the likeliest classes matter for how noisy it is: sorting the vocabulary
    of a language model at every position would take longer than the model.
    """
    top = p.topk(GROUP, dim=1).indices
    order = torch.arange(p.shape[1], device=p.device).view(1, -1, *([1] * (p.ndim - 2))).repeat(len(p), 1, *p.shape[2:])
    # What stood in the first places goes where the likeliest came from.
    inside = top < GROUP
    stay = torch.zeros_like(top).scatter_add(1, top.clamp_max(GROUP - 1), inside.long()) > 0
    left = torch.argsort(inside.long(), dim=1, stable=True)
    moved = torch.argsort(stay.long(), dim=1, stable=True)
    order.scatter_(1, top.gather(1, left), moved)
    order[:, :GROUP] = top
    return order


def draw_signs(like: Tensor, generator: torch.Generator, row: int) -> Tensor:
    """Random signs in the shape of `like`, a different set for every `row` below `GROUP`; columns along axis 1.

    Every column has a random sign and a random index, and its sign in a row is the random one times the entry of
    Sylvester's Hadamard matrix at (row, index). Rows 0, 1, ... of generators in the same state have the same indices.

    With independent indices a product of two columns' signs would have a mean over n rows of variance 1/n, which the
    spread between the rows states rightly on average. With the indices 0, 1, 2, ... it would cancel for most pairs, but
    a pair that does not cancel would not change from row to row either: an error that the spread never shows. Here the
    indices are those of a nested random permutation (Owen's scrambling in base 2) within each block of `GROUP` columns:
    bit j of the index is bit j of the column's number, turned over or not by a coin that all columns have in common
    whose higher bits agree. So the first 2^m columns cancel among themselves over 2^m rows, for every m; every other
    pair is as likely to be seen as not.
    """
    columns = like.shape[1] if like.ndim > 1 else 1
    # One number for each column: its sign, and the coins of the sets of columns that it is the first of.
    random = torch.randint(0, 2 * GROUP, like.shape, generator=generator, device=like.device, dtype=torch.uint8)
    bits = random & 1
    number = torch.arange(columns, device=like.device)
    for j in range(GROUP.bit_length() - 1):
        if row >> j & 1:
            coins = (random >> (j + 1)) & 1
            index = (number >> j & 1).to(torch.uint8)
            if like.ndim > 1:
                coins = coins.index_select(1, number >> (j + 1) << (j + 1))
                index = index.view(1, -1, *([1] * (like.ndim - 2)))
            bits = bits ^ coins ^ index
    return 2 * bits.to(like.dtype) - 1


def _by_size(signs: Tensor, values: Tensor) -> Tensor:
    """The signs along axis 1 dealt out by falling |value|, where samples have little more than one row of values."""
    if values.ndim < 2 or values[0].numel() > GROUP * GROUP:
        return signs
    return torch.zeros_like(signs).scatter(1, values.abs().argsort(dim=1, descending=True, stable=True), signs)
