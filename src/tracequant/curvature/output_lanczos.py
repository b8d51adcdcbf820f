"""Random cotangents of a loss that couples many outputs of a sample (Dice, focal over a softmax, CTC-like losses).

The Hessian H_L of such a loss is too large to be written down, but its products with vectors are cheap, and one product
serves all samples at once because H_L has a block for each sample. The Lanczos recurrence from a vector v of random
signs gives, for each sample, an orthonormal basis V and a small tridiagonal matrix T = Vᵀ H_L V. Then

    u₊ = ‖v‖ V f₊(T) e₁ ≈ f₊(H_L) v,    u₋ = ‖v‖ V f₋(T) e₁ ≈ f₋(H_L) v,    f±(x) = √max(±x, 0),

have E[u₊ u₊ᵀ − u₋ u₋ᵀ] = H_L: the positive part of H_L and its negative part. A factor that keeps the largest
eigenvalues alone would be biased, since the many small ones of a Dice loss have a large sum. Here nothing is left
out: because f₊² − f₋² is the identity, ‖u₊‖² − ‖u₋‖² = vᵀ H_L v holds after any number of steps, and what the
recurrence has not resolved only blurs small eigenvalues into one another. `error` says by how much u still changes.

A few eigenvalues stand out (of Dice: one or two for each class), and a sign vector meets their eigenvectors with a
random length. They come from one recurrence beforehand and get random signs of their own, which have length one: one
draw's spread fell from 1.4 to 0.13 of the trace on a small network with a Dice loss. Where these eigenvectors are all
of H_L, there is no rest, and their columns give the exact sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tracequant.core.errors import GaussNewtonError, ModelError
from tracequant.curvature.output_factors import Cotangents, draw_signs

# Products with H_L for each draw: the least of these after which u changes by less than `SETTLED`, or the most.
STEPS = (8, 12, 16, 24, 32, 48)
SETTLED = 0.01
# The recurrence that looks for eigenvalues apart, or for all of a low rank, takes more: the second where u has not
# settled in the first.
FIRST_STEPS = (32, 64)
# Eigenvalues apart that get signs of their own.
OUTLIERS = 16
# Elements of one basis: 512 MiB in float32.
BASIS_LIMIT = 2**27
LEAST_STEPS = 8
# Below this share of the largest eigenvalue an eigenvalue is rounding.
NEGLIGIBLE = 1e-7

# Share of a product's size that may lie in samples whose vectors are zero.
SEPARATE = 1e-5
INTERACTING = (
    "the samples of a batch interact in the loss, so that samples have no Hessian of their own; take sums and ratios"
    " for each sample and average them (a Dice ratio of the whole batch, for instance), use batches of one sample,"
    " or estimator='hutchinson'"
)

# Maps vectors `[N, D]`, one for each sample, to H_L times them.
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CoupledHessian:
    """H_L by its products. `tensors` are the outputs, flattened and joined to D elements for each of N samples.

    `values` `[N, k]` and `vectors` `[N, D, k]` are eigenpairs that are known, which are all of H_L if `complete`.
    A draw takes so many `steps`. `error` is how far its u is from the one of all steps that were tried, as a share of
    its length; 0 if `complete`.
    """

    tensors: list[Tensor]
    product: Product
    values: Tensor
    vectors: Tensor
    complete: bool
    steps: int = STEPS[-1]
    error: float = 0.0

    @property
    def kind(self) -> str:
        """What a result calls this shape."""
        return "low-rank" if self.complete else "coupled"

    def draw(self, generator: torch.Generator, number: int = 0) -> Iterator[Cotangents]:
        """As `OutputHessian.draw`."""
        signs = draw_signs(self.values, generator, number)
        both = []
        for sign in (1.0, -1.0):
            roots = (sign * self.values).clamp_min(0).sqrt()
            both.append(torch.einsum("ndk,nk->nd", self.vectors, roots * signs))
        if not self.complete:
            v = draw_signs(self.vectors.new_zeros(self.vectors.shape[:2]), generator, number)
            basis, matrices, _ = lanczos(self.product, _without(v, self.vectors), self.steps, self.vectors)
            both = [u + rest for u, rest in zip(both, square_roots(basis, matrices, v), strict=True)]
        sizes = [float(u.square().sum()) for u in both]
        for sign, u, size in zip((1.0, -1.0), both, sizes, strict=True):
            # A convex loss has rounding errors below zero, which deserve no pass of their own.
            if size > NEGLIGIBLE * max(sizes):
                yield self._split(u), sign

    def columns(self) -> Iterator[Cotangents]:
        """As `OutputHessian.columns`; `ModelError` where the rank is not low."""
        if not self.complete:
            raise ModelError(
                f"num_probes='exact' needs a loss whose Hessian has few eigenvalues in the {self.vectors.shape[1]}"
                " outputs of a sample, and this one has many: give a number of probes"
            )
        for k in range(self.values.shape[1]):
            for sign in (1.0, -1.0):
                roots = (sign * self.values[:, k : k + 1]).clamp_min(0).sqrt()
                if roots.any():
                    yield self._split(self.vectors[:, :, k] * roots), sign

    def _split(self, joined: Tensor) -> list[Tensor]:
        sizes = [tensor[0].numel() for tensor in self.tensors]
        return [part.reshape(t.shape) for part, t in zip(torch.split(joined, sizes, 1), self.tensors, strict=True)]


def coupled(
    tensors: list[Tensor], product: Callable[[list[Tensor]], list[Tensor]], generator: torch.Generator
) -> CoupledHessian:
    """H_L of the output tensors together; `product` maps vectors of their shapes to H_L times them.

    Raises `GaussNewtonError` where H_L has no block for each sample.
    """
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(counts) > 1 or 0 in counts:
        raise GaussNewtonError(
            f"the loss couples outputs of shapes {[list(tensor.shape) for tensor in tensors]}, which do not have the"
            " samples along their first axis; return outputs that have, or use estimator='hutchinson'"
        )
    sizes = [tensor[0].numel() for tensor in tensors]

    def flat(v: Tensor) -> Tensor:
        parts = [part.reshape(tensor.shape) for part, tensor in zip(torch.split(v, sizes, 1), tensors, strict=True)]
        return torch.cat([image.reshape(len(v), -1) for image in product(parts)], 1)

    like = tensors[0].detach().new_zeros(counts.pop(), sum(sizes))
    check_separate(flat, like, generator)
    start, other = (draw_signs(like, generator, 0) for _ in range(2))
    image = flat(other)
    for first_steps in FIRST_STEPS:
        basis, matrices, remainder = lanczos(flat, start, first_steps)
        values, vectors = _converged(basis, matrices, remainder)
        difference = torch.einsum("ndk,nk->nd", vectors, values * torch.einsum("ndk,nd->nk", vectors, other)) - image
        if float(difference.norm()) <= torch.finfo(like.dtype).eps ** 0.5 * float(image.norm()):
            return CoupledHessian(tensors, flat, values, vectors, complete=True)
        steps, error = _settled(basis, matrices, start)
        if error <= SETTLED and steps < basis.shape[1]:
            break
    return CoupledHessian(tensors, flat, values[:, :OUTLIERS], vectors[:, :, :OUTLIERS], False, steps, error)


def _settled(basis: Tensor, matrices: Tensor, start: Tensor) -> tuple[int, float]:
    """Steps after which u has settled, and how far it is then from the u of all steps; the most where it has not."""
    full = torch.stack(square_roots(basis, matrices, start))
    count, error = basis.shape[1], 0.0
    for count in STEPS:
        if count >= basis.shape[1]:
            # Nothing is left to compare with: what the last quarter of the steps changed.
            count = min(STEPS[-1], basis.shape[1])
            fewer = max(1, 3 * count // 4)
            before = torch.stack(square_roots(basis[:, :fewer], matrices[:, :fewer, :fewer], start))
            return count, float((full - before).norm() / full.norm())
        u = torch.stack(square_roots(basis[:, :count], matrices[:, :count, :count], start))
        error = float((full - u).norm() / full.norm())
        if error <= SETTLED:
            break
    return count, error


def check_separate(product: Product, like: Tensor, generator: torch.Generator) -> None:
    """Raise `GaussNewtonError` if a vector that is zero for some samples has an image there.

    Two samples differ in a bit of their numbers, so that one product for each bit finds any pair.
    """
    numbers = torch.arange(len(like), device=like.device)
    for bit in range((len(like) - 1).bit_length()):
        present = (numbers >> bit & 1).bool().unsqueeze(1)
        sizes = product(draw_signs(like, generator, 0) * present).double().square().sum(1, keepdim=True)
        if float(sizes[~present].sum()) > SEPARATE**2 * float(sizes.sum()):
            raise GaussNewtonError(INTERACTING)


def lanczos(product: Product, start: Tensor, steps: int, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Basis `[N, m, D]`, T `[N, m, m]` in float64 and the last remainder β_m `[N]` of each sample's own recurrence.

    m is `steps`, or less where D or memory is small. `known` eigenvectors `[N, D, k]`, to which `start` is orthogonal,
    are kept out. A sample whose recurrence has ended has vectors of zeros from there on.
    """
    samples, width = start.shape
    steps = max(1, min(steps, width, max(LEAST_STEPS, BASIS_LIMIT // max(1, start.numel()))))
    tiny = torch.finfo(start.dtype)
    basis = start.new_zeros(samples, steps, width)
    matrices = start.new_zeros(samples, steps, steps, dtype=torch.float64)
    norms = start.norm(dim=1, keepdim=True)
    vector = start / norms.clamp_min(tiny.tiny)
    scale, remainder = torch.zeros_like(norms), torch.zeros_like(norms)
    for j in range(steps):
        basis[:, j] = vector
        image = product(vector)
        matrices[:, j, j] = (vector * image).sum(1).double()
        scale = torch.maximum(scale, image.norm(dim=1, keepdim=True))
        # All earlier vectors, and not the last two alone: rounding would bring eigenvalues back a second time. Twice
        # is enough.
        for _ in range(2):
            earlier = basis[:, : j + 1]
            # Sample by sample: a batched product with one vector each runs far slower than the products alone.
            shares = [torch.mv(own.T, torch.mv(own, w)) for own, w in zip(earlier, image, strict=True)]
            image = image - torch.stack(shares)
            image = image if known is None else _without(image, known)
        remainder = image.norm(dim=1, keepdim=True)
        remainder = remainder * (remainder > 10 * tiny.eps * scale)
        vector = image / remainder.clamp_min(tiny.tiny) * (remainder > 0)
        if j + 1 < steps:
            matrices[:, j, j + 1] = matrices[:, j + 1, j] = remainder.squeeze(1).double()
    return basis, matrices, remainder.squeeze(1).double()


def square_roots(basis: Tensor, matrices: Tensor, start: Tensor) -> list[Tensor]:
    """f₊(H_L) and f₋(H_L) times the vector that the recurrence started from, which is its first basis vector's part."""
    values, inner = torch.linalg.eigh(matrices)
    length = (basis[:, 0] * start).sum(1, keepdim=True).double()
    results = []
    for sign in (1.0, -1.0):
        roots = (sign * values).clamp_min(0).sqrt()
        weights = torch.einsum("nij,nj->ni", inner, roots * inner[:, 0]) * length
        pairs = zip(basis, weights.to(basis.dtype), strict=True)
        results.append(torch.stack([torch.mv(vectors.T, w) for vectors, w in pairs]))
    return results


def _converged(basis: Tensor, matrices: Tensor, remainder: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[N, k]`, the largest first, and eigenvectors `[N, D, k]`; zeros where a sample has fewer than k."""
    values, inner = torch.linalg.eigh(matrices)
    largest = values.abs().amax(1, keepdim=True)
    # ‖H y − θ y‖ of y = V s is β s_m.
    residuals = remainder.unsqueeze(1) * inner[:, -1].abs()
    usable = (residuals <= torch.finfo(basis.dtype).eps ** 0.5 * largest) & (values.abs() > NEGLIGIBLE * largest)
    values = values * usable
    order = values.abs().argsort(dim=1, descending=True)[:, : int(usable.sum(1).max())]
    values = values.gather(1, order)
    inner = inner.gather(2, order.unsqueeze(1).expand(-1, inner.shape[1], -1)) * (values != 0).unsqueeze(1)
    return values.to(basis.dtype), torch.einsum("njd,njk->ndk", basis, inner.to(basis.dtype))


def _without(v: Tensor, vectors: Tensor) -> Tensor:
    """What orthonormal `vectors` `[N, D, k]` leave of v `[N, D]`."""
    return v - torch.stack([torch.mv(y, torch.mv(y.T, w)) for y, w in zip(vectors, v, strict=True)])
