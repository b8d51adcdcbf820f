"""Factors of the loss's Hessian with respect to the model's outputs, found by differentiating the loss alone.

With H_L = L S Lᵀ, S diagonal of signs, a layer's Gauss-Newton trace is Σ_k s_k ‖Jᵀ L_k‖² over the columns L_k, or in
expectation ‖Jᵀ L v‖² (for each sign) over random sign vectors v. The model takes no part here, so any number of
derivatives is cheap.

Four shapes of H_L are recognised from its products with random vectors, whatever the loss is called:

- softmax: α (diag(p) − p pᵀ) at every position, which cross-entropy has with any labels, label smoothing and class
  weights. L is its Cholesky factor with the classes in the order of their probabilities, which has a closed form;
- diagonal: any sum over output elements (squared error, binary cross-entropy, focal, smooth-L1), columns √|h_i| e_i;
- dense: anything else with at most `DENSE_LIMIT` outputs for each sample, by eigenvectors;
- blocks: at every position a block of its own (a box whose four numbers the loss takes together), by eigenvectors.

Positions are all axes but the samples' and the classes', which is the second or the last one.

Of several output tensors between which the loss has no mixed derivatives (a detector's classes and boxes, say) each may
have a shape of its own.

The choice of L and of the signs decides how noisy a draw is, since ‖Jᵀ L v‖² = Σ_k ‖Jᵀ L_k‖² + Σ_{k≠l} v_k v_l ⟨Jᵀ L_k,
Jᵀ L_l⟩. The inputs that decide a trace waver between two or three classes. In the Cholesky factor the first column has
all the curvature between the first two classes, while the more obvious columns √p_c (e_c − p) are opposite to one
another there, and one draw gives anything between nothing and twice the value. And the signs of successive probes are
not independent but random signs times the rows of a Hadamard matrix: in 2^m probes all products of the first 2^m
columns cancel (`_signs`). Eigenvectors count from the largest eigenvalue, the elements of a diagonal from the largest
where each sample has one row of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracequant.core.errors import GaussNewtonError, ModelError
from tracequant.model.batches import Batch
from tracequant.model.memory import out_of_memory
from tracequant.model.task import Task, total_loss

DENSE_LIMIT = 128
# Elements of all blocks at all positions: 512 MiB in float64.
BLOCKS_LIMIT = 2**26
TOLERANCE = 1e-3
# Draws whose signs are rows of one Hadamard matrix.
GROUP = 64

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
            yield [self._softmax(_signs(self._probabilities, generator, row))], 1.0
        elif self.kind == "diagonal":
            signs = [_by_size(_signs(h, generator, row), h) for h in self.first]
            for sign in self._present_signs():
                yield [(sign * h).clamp_min(0).sqrt() * v for h, v in zip(self.first, signs, strict=True)], sign
        else:
            signs = [_by_size(_signs(self.first[0], generator, row), self.first[0])]
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
        rows = [h.flatten(1) for h in self.first]
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
        p, order = self._probabilities.sort(dim=1, descending=True)
        # From the smallest up, so that small tails keep their digits.
        from_here = p.flip(1).cumsum(1).flip(1)
        tail = torch.cat([from_here[:, 1:], torch.zeros_like(p[:, :1])], 1)
        tiny = torch.finfo(p.dtype).tiny ** 0.5  # its square is still above zero
        safe, before = tail.clamp_min(tiny), from_here.clamp_min(tiny)
        beside = (p / before / safe).sqrt() * v * (tail > tiny)
        earlier = torch.cat([torch.zeros_like(beside[:, :1]), beside[:, :-1].cumsum(1)], 1)
        product = (p * tail / before).sqrt() * v - p * earlier
        columns = self.first[0].sqrt() * torch.zeros_like(product).scatter(1, order, product)
        return columns.movedim(1, self.axis)

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


@dataclass(frozen=True)
class SeparateHessians:
    """Factored Hessians of several output tensors without mixed derivatives: H_L is block diagonal."""

    parts: list[OutputHessian]

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


Factored = OutputHessian | SeparateHessians


def factor(task: Task, outputs: Any, batch: Batch, generator: torch.Generator) -> Factored:
    """The factored Hessian of the batch's mean loss with respect to its outputs.

    A task's own `output_hessian(outputs, batch)` is taken where it returns one. Raises `ModelError` if H_L is of no
    shape that can be factored, or zero.
    """
    own = task.output_hessian(outputs, batch)
    if own is not None:
        return _from_user(own, differentiable(outputs))
    tensors, product = loss_hessian(task, outputs, batch)
    probe = [torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device) for v in tensors]
    image = product(probe)
    if not any(v.any() for v in image):
        raise GaussNewtonError(
            "the loss has no curvature in the model's outputs (an absolute error, say): its traces are zero"
        )
    if len(tensors) == 1:
        return _factor_one(tensors[0], probe[0], image[0], lambda v: product([v])[0])
    diagonal = product([torch.ones_like(v) for v in probe])
    if _close([h * v for h, v in zip(diagonal, probe, strict=True)], image):
        return OutputHessian("diagonal", tensors, diagonal)
    parts = []
    for number, tensor in enumerate(tensors):

        def alone(vector: Tensor, number: int = number) -> Tensor:
            vectors = [vector if i == number else torch.zeros_like(v) for i, v in enumerate(probe)]
            return product(vectors)[number]

        # What the other tensors' vectors add to this one's image is a mixed derivative.
        if not _close([alone(probe[number])], [image[number]]):
            raise GaussNewtonError(
                "the loss has mixed derivatives between the model's outputs, which cannot be factored one by one; give"
                " the task one output tensor, or use estimator='hutchinson'"
            )
        parts.append(_factor_one(tensor, probe[number], image[number], alone))
    return SeparateHessians(parts)


def _factor_one(tensor: Tensor, probe: Tensor, image: Tensor, product: Callable[[Tensor], Tensor]) -> OutputHessian:
    """The factored Hessian by one output tensor, `image` being its product with the random vector `probe`."""
    z = tensor.detach()
    axes = [] if z.ndim < 2 else [1] if z.ndim == 2 else [1, z.ndim - 1]
    for axis in axes if image.any() else []:
        p = z.softmax(axis)
        expected = p * probe - p * (p * probe).sum(axis, keepdim=True)
        scale = (image * expected).sum(axis, keepdim=True) / (
            expected.square().sum(axis, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        )
        if bool((scale >= 0).all()) and _close([scale * expected], [image]):
            return OutputHessian("softmax", [tensor], [scale.movedim(axis, 1)], p.movedim(axis, 1), axis)
    diagonal = product(torch.ones_like(z))
    if _close([diagonal * probe], [image]):
        return OutputHessian("diagonal", [tensor], [diagonal])
    if z.ndim >= 2 and z[0].numel() <= DENSE_LIMIT:
        return _dense([tensor], _rows(z, product), image, probe)
    for axis in axes:
        if z.shape[axis] <= DENSE_LIMIT and z.numel() * z.shape[axis] <= BLOCKS_LIMIT:
            blocks = _blocks(z, axis, product)
            if _close([torch.einsum("nij...,nj...->ni...", blocks, probe.movedim(axis, 1))], [image.movedim(axis, 1)]):
                values, vectors = torch.linalg.eigh(blocks.movedim((1, 2), (-2, -1)))
                return OutputHessian(
                    "blocks", [tensor], [values.movedim(-1, 1)], vectors.movedim((-2, -1), (1, 2)), axis
                )
    raise GaussNewtonError(
        "the loss's Hessian with respect to the outputs is neither that of a softmax nor diagonal, it couples more than"
        f" {DENSE_LIMIT} outputs of a sample, and those of different positions (or it is too large to try); give the"
        " task an output_hessian, or use estimator='hutchinson'"
    )


def loss_hessian(task: Task, outputs: Any, batch: Batch) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]:
    """The outputs in which the loss bends, and the function that maps vectors v of their shapes to H_L v.

    The loss is taken at detached copies of the outputs, so that outputs that depend on one another do not count twice.
    """
    leaves, structure = pytree.tree_flatten(outputs)
    tensors = differentiable(outputs)
    heads = {id(tensor): tensor.detach().requires_grad_() for tensor in tensors}
    # A copy for the loss, which may work in place.
    free = pytree.tree_unflatten([heads[id(x)].clone() if id(x) in heads else x for x in leaves], structure)
    z = list(heads.values())
    try:
        gradients = torch.autograd.grad(total_loss(task, free, batch), z, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise GaussNewtonError(
            f"the loss cannot be differentiated with respect to the outputs alone: {error}"
        ) from error
    used = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
    if not used:
        raise GaussNewtonError("the loss is linear in the model's outputs: its Gauss-Newton trace is zero")
    slopes, points = [gradients[i] for i in used], [z[i] for i in used]

    def product(vectors: list[Tensor]) -> list[Tensor]:
        try:
            images = torch.autograd.grad(slopes, points, vectors, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ModelError(f"the loss has no second derivative with respect to the outputs: {error}") from error
        return [torch.zeros_like(v) if image is None else image for image, v in zip(images, vectors, strict=True)]

    return [tensors[i] for i in used], product


def differentiable(outputs: Any) -> list[Tensor]:
    """The tensors among the outputs that depend on a weight, each once."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    unique = list({id(leaf): leaf for leaf in leaves}.values())
    if not unique:
        raise GaussNewtonError(
            "the task's outputs hold no tensor that depends on a weight (custom classes are not looked into)"
        )
    return unique


def _rows(z: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """H_L of each sample `[N, D, D]`, one product per output element for all samples together."""
    width = z[0].numel()
    rows = []
    for i in range(width):
        unit = torch.zeros_like(z).flatten(1)
        unit[:, i] = 1
        rows.append(product(unit.view_as(z)).flatten(1))
    return torch.stack(rows, 1)


def _blocks(z: Tensor, axis: int, product: Callable[[Tensor], Tensor]) -> Tensor:
    """H_L's block at every position, `[N, C, C, ...]`, if it has no others: one product for each class."""
    rows = []
    for i in range(z.shape[axis]):
        unit = torch.zeros_like(z)
        unit.select(axis, i).fill_(1)
        rows.append(product(unit).movedim(axis, 1))
    found = torch.stack(rows, 1)
    return (found + found.transpose(1, 2)) / 2


def _dense(tensors: list[Tensor], blocks: Tensor, image: Tensor, probe: Tensor) -> OutputHessian:
    if not _close([torch.einsum("nij,nj->ni", blocks, probe.flatten(1))], [image.flatten(1)]):
        raise GaussNewtonError(
            "the samples of a batch interact in the loss, so that samples have no Hessian of their own; use"
            " estimator='hutchinson', or batches of one sample"
        )
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    return OutputHessian("dense", tensors, [values], vectors)


def _from_user(own: Tensor, tensors: list[Tensor]) -> OutputHessian:
    if len(tensors) != 1:
        raise ModelError("output_hessian serves models with one output tensor; this one has several")
    (z,) = tensors
    width = z[0].numel()
    if own.shape == z.shape:
        return OutputHessian("diagonal", tensors, [own])
    if own.shape == (len(z), width, width):
        return _dense(tensors, own, torch.einsum("nij,nj->ni", own, z.detach().flatten(1)), z.detach())
    raise ModelError(
        f"output_hessian returned shape {list(own.shape)}, expected {list(z.shape)} (a diagonal) or"
        f" {[len(z), width, width]} (one block for each sample)"
    )


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors agree in norm."""
    difference = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(y.double().square().sum()) for y in b)
    return difference <= TOLERANCE**2 * size


def _signs(like: Tensor, generator: torch.Generator, row: int) -> Tensor:
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
