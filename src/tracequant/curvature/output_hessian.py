"""Factors of the loss's Hessian with respect to the model's outputs, found by differentiating the loss alone.

With H_L = L S Lᵀ, S diagonal of signs, a layer's Gauss-Newton trace is Σ_k s_k ‖Jᵀ L_k‖² over the columns L_k, or in
expectation ‖Jᵀ L v‖² (for each sign) over random sign vectors v. The model takes no part here, so any number of
derivatives is cheap.

Five shapes of H_L are recognised from its products with random vectors, whatever the loss is called:

- softmax: α (diag(p) − p pᵀ) at every position, which cross-entropy has with any labels, label smoothing and class
  weights. L is its Cholesky factor with the classes in the order of their probabilities, which has a closed form;
- diagonal: any sum over output elements (squared error, binary cross-entropy, focal, smooth-L1), columns √|h_i| e_i;
- dense: anything else with at most `DENSE_LIMIT` outputs for each sample, by eigenvectors;
- blocks: at every position a block of its own (a box whose four numbers the loss takes together), by eigenvectors;
- coupled: anything else that has a block for each sample (Dice, say), by products alone (`output_lanczos`).

Positions are all axes but the samples' and the classes', which is the second or the last one.

Of several output tensors between which the loss has no mixed derivatives (a detector's classes and boxes, say) each may
have a shape of its own. Others are coupled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracequant.core.errors import GaussNewtonError, ModelError, SecondDerivativeError
from tracequant.curvature.output_factors import OutputHessian, SeparateHessians
from tracequant.curvature.output_lanczos import INTERACTING, CoupledHessian, coupled
from tracequant.curvature.products import LOSS_BENDS_NOT, check_differentiable
from tracequant.model.batches import Batch
from tracequant.model.memory import out_of_memory
from tracequant.model.softmax import TOLERANCE, class_axes, close, softmax_scale
from tracequant.model.task import Task, total_loss

DENSE_LIMIT = 128
# Elements of all blocks at all positions: 512 MiB in float64.
BLOCKS_LIMIT = 2**26

# The kind of a batch's H_L that is zero.
ZERO = "zero"

Factored = OutputHessian | CoupledHessian | SeparateHessians


def factor(task: Task, outputs: Any, batch: Batch, generator: torch.Generator) -> Factored:
    """The factored Hessian of the batch's mean loss with respect to its outputs.

    A task's own `output_hessian(outputs, batch)` is taken where it returns one. Raises `ModelError` if H_L is of no
    shape that can be factored, or the loss is linear in the outputs. Where all samples are saturated H_L is zero, of
    the kind `ZERO`.
    """
    own = task.output_hessian(outputs, batch)
    if own is not None:
        return _from_user(own, differentiable(outputs))
    tensors, product = loss_hessian(task, outputs, batch)
    probe = [_random(v, generator) for v in tensors]
    image = product(probe)
    if not any(v.any() for v in image):
        # A batch whose samples are all saturated adds nothing; `check_curved` looks at all batches.
        return OutputHessian(ZERO, tensors, [torch.zeros_like(v) for v in probe])
    if len(tensors) == 1:
        return _factor_one(tensors[0], (probe[0], image[0]), lambda v: product([v])[0], generator)
    diagonal = product([torch.ones_like(v) for v in probe])
    if close([h * v for h, v in zip(diagonal, probe, strict=True)], image):
        return OutputHessian("diagonal", tensors, diagonal)
    parts: list[OutputHessian | CoupledHessian] = []
    for number, tensor in enumerate(tensors):

        def alone(vector: Tensor, number: int = number) -> Tensor:
            vectors = [vector if i == number else torch.zeros_like(v) for i, v in enumerate(probe)]
            return product(vectors)[number]

        # What the other tensors' vectors add to this one's image is a mixed derivative.
        if not close([alone(probe[number])], [image[number]]):
            return coupled(tensors, product, generator)
        parts.append(_factor_one(tensor, (probe[number], image[number]), alone, generator))
    return SeparateHessians(parts)


def check_curved(notes: Sequence[Sequence[str]]) -> None:
    """Raise `GaussNewtonError` if the H_L of every batch is zero, as the notes of each say."""
    if all(f"{ZERO} output Hessian" in of_batch for of_batch in notes):
        raise GaussNewtonError(
            "the loss has no curvature in the model's outputs in any batch (an absolute error, or predictions that are"
            " all certain): its Gauss-Newton traces are zero; use another loss, or estimator='hutchinson' where the"
            " model itself bends"
        )


def _factor_one(
    tensor: Tensor, pair: tuple[Tensor, Tensor], product: Callable[[Tensor], Tensor], generator: torch.Generator
) -> OutputHessian | CoupledHessian:
    """The factored Hessian by one output tensor; `pair` is a random vector and its product."""
    probe, image = pair
    z = tensor.detach()
    softmax = softmax_scale(z, probe, image) if image.any() else None
    if softmax is not None:
        axis, scale = softmax
        return OutputHessian("softmax", [tensor], [scale.movedim(axis, 1)], z.softmax(axis).movedim(axis, 1), axis)
    diagonal = product(torch.ones_like(z))
    if close([diagonal * probe], [image]):
        return OutputHessian("diagonal", [tensor], [diagonal])
    if z.ndim >= 2 and z[0].numel() <= DENSE_LIMIT:
        return _dense([tensor], _rows(z, product), image, probe)
    for axis in class_axes(z):
        small = z.shape[axis] <= DENSE_LIMIT and z.numel() * z.shape[axis] <= BLOCKS_LIMIT
        if small and not _reaches_others(probe, axis, product):
            blocks = _blocks(z, axis, product)
            if close([torch.einsum("nij...,nj...->ni...", blocks, probe.movedim(axis, 1))], [image.movedim(axis, 1)]):
                values, vectors = torch.linalg.eigh(blocks.movedim((1, 2), (-2, -1)))
                return OutputHessian(
                    "blocks", [tensor], [values.movedim(-1, 1)], vectors.movedim((-2, -1), (1, 2)), axis
                )
    return coupled([tensor], lambda v: [product(v[0])], generator)


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
        raise GaussNewtonError(
            "the loss is linear in the model's outputs: its Gauss-Newton traces are zero; use another loss, or"
            " estimator='hutchinson' where the model itself bends"
        )
    slopes, points = [gradients[i] for i in used], [z[i] for i in used]
    try:
        check_differentiable(slopes)
    except SecondDerivativeError as error:
        raise SecondDerivativeError(LOSS_BENDS_NOT) from error

    def product(vectors: list[Tensor]) -> list[Tensor]:
        try:
            images = torch.autograd.grad(slopes, points, vectors, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise SecondDerivativeError(f"{LOSS_BENDS_NOT} ({error})") from error
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


def _reaches_others(probe: Tensor, axis: int, product: Callable[[Tensor], Tensor]) -> bool:
    """Whether a vector at every other position has an image between; blocks would take a product for each class."""
    turned = probe.movedim(axis, 1).flatten(2)
    present = torch.arange(turned.shape[2], device=probe.device) % 2 == 0
    masked = (turned * present).view(probe.movedim(axis, 1).shape).movedim(1, axis)
    image = product(masked).movedim(axis, 1).flatten(2).double().square().sum((0, 1))
    return float(image[~present].sum()) > TOLERANCE**2 * float(image.sum())


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
    if not close([torch.einsum("nij,nj->ni", blocks, probe.flatten(1))], [image.flatten(1)]):
        raise GaussNewtonError(INTERACTING)
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    return OutputHessian("dense", tensors, [values], vectors)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """A random vector with a part that all positions share: a term of low rank in sums over positions must show."""
    shapes = [like.shape] if like.ndim < 3 else [like.shape, (*like.shape[:2], *([1] * (like.ndim - 2)))]
    terms = [torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device) for shape in shapes]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


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
