"""Hutchinson's estimator of Hessian traces, for weights and activations (HAWQ-V2, Sections 2.1 and 2.2).

For a random z with E[z zᵀ] = I the trace of a symmetric H is E[zᵀHz] (Eq. 6), estimated by the mean over draws (Eq.
7). Hz is had without forming H, by differentiating gᵀz once more. Any twice-differentiable model and loss will do, and
the Hessian is the exact one.

Weights: H is the block of one layer. A *shared* probe draws z for all layers at once and reads z_iᵀ(Hz)_i; that costs
one product for all layers but adds the variance Σ_j ‖H_ij‖_F² of the blocks beside the diagonal to the layer's own
2‖offdiag H_ii‖_F² (Rademacher) or 2‖H_ii‖_F² (Gaussian). A probe *per layer* has its own variance only.

Activations (Eq. 8-9): samples do not interact, so the Hessian with respect to the activations of a batch is block
diagonal, one block per input. A z drawn for the whole batch therefore gives the mean over the inputs of each input's
own zᵢᵀHᵢzᵢ, at the price of one product; inputs of different sizes need no padding and no special case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from tracequant.curvature.result import Curvature, TraceEstimate, summarize
from tracequant.errors import ModelError, SecondDerivativeError
from tracequant.layers import idle_layers, reading, weight_parameter
from tracequant.model_state import double_backward, frozen_evaluation
from tracequant.points import QuantizationPoints
from tracequant.progress import track
from tracequant.task import Batch, Batches, Task, checked, forward, model_device, reusable

Distribution = Literal["rademacher", "gaussian"]
Probes = Literal["shared", "per_layer"]


def hutchinson(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    draws: int = 16,
    seed: int = 0,
    probes: Probes = "per_layer",
    distribution: Distribution = "rademacher",
    weights: bool = True,
    activations: bool = True,
    progress: bool = False,
) -> Curvature:
    """Traces of every layer and activation point over all samples of `batches`, `draws` probes for each batch.

    Each batch gets probes of its own: for the same work the mean over batches is then less noisy than with one z for
    the whole set. The graph of a batch is built once and serves all draws. The model is given back as it came.

    Raises `ModelError` naming layers that the loss does not depend on, or saying that a second derivative is missing.
    """
    generator = torch.Generator(model_device(model)).manual_seed(seed)
    values: dict[str, dict[str, list[list[float]]]] = {"weights": {}, "activations": {}}
    sizes: list[int] = []
    numel = {layer.name: float(layer.numel) for layer in points.layers}
    activation_numel = {point.name: 0.0 for point in points.activations}
    with frozen_evaluation(model), double_backward():
        parameters = require_grad(model, points)
        for batch in track(checked(reusable(batches), task, model), "Hutchinson", progress):
            # In a function of its own, so that a batch's graph is gone before the next one is built.
            found, seen = _measure_batch(
                model, batch, task, points, parameters, weights, activations, (draws, probes, distribution, generator)
            )
            for family, rows in found.items():
                for name, row in rows.items():
                    values[family].setdefault(name, []).append(row)
            for name, count in seen.items():
                activation_numel[name] += count
            sizes.append(task.batch_size(batch))
    samples = sum(sizes)

    def estimates(family: str, sizes_of: dict[str, float]) -> dict[str, TraceEstimate]:
        return {name: summarize(rows, sizes, sizes_of[name]) for name, rows in values[family].items() if sizes_of[name]}

    return Curvature(
        points=points,
        weights=estimates("weights", numel),
        activations=estimates("activations", {name: n / samples for name, n in activation_numel.items()}),
        method="hutchinson",
        reason=f"{draws} {distribution} draws for each of {len(sizes)} batches, probes {probes.replace('_', ' ')}",
        seed=seed,
        samples=samples,
        weight_values={
            name: tuple(math.fsum(row) / len(row) for row in rows) for name, rows in values["weights"].items()
        },
    )


_Row = list[float]


def _measure_batch(
    model: nn.Module,
    batch: Batch,
    task: Task,
    points: QuantizationPoints,
    parameters: dict[str, Tensor],
    weights: bool,
    activations: bool,
    sampling: tuple[int, Probes, Distribution, torch.Generator],
) -> tuple[dict[str, dict[str, _Row]], dict[str, int]]:
    """Values of zᵀHz of one batch by family and name, and the number of elements of each activation."""
    with reading_variables(model, points) as variables:
        _, loss = forward(task, model, batch)
    families: dict[str, dict[str, list[Tensor]]] = {}
    if weights:
        families["weights"] = {name: [parameter] for name, parameter in parameters.items()}
    if activations:
        # A tensor that this batch never reached stays in, with the value zero.
        families["activations"] = dict(variables)
    gradients = first_derivatives(loss, families)
    rows = {family: _products(targets, gradients[family], *sampling) for family, targets in families.items()}
    return rows, {name: sum(tensor.numel() for tensor in tensors) for name, tensors in variables.items()}


def require_grad(model: nn.Module, points: QuantizationPoints) -> dict[str, Tensor]:
    """Layer name → parameter, with `requires_grad` set on these and on no other (frozen layers count too)."""
    weights = {layer.name: weight_parameter(model, layer) for layer in points.layers}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


@contextmanager
def reading_variables(model: nn.Module, points: QuantizationPoints) -> Iterator[dict[str, list[Tensor]]]:
    """Yield a dictionary that fills, during a forward pass, with the tensors each point's consumers read.

    Every tensor becomes a node of its own, the same for all its consumers, so that a derivative with respect to it
    takes in all of them and nothing that reads the original beside them (the identity path of a residual block).
    """
    variables: dict[str, list[Tensor]] = {point.name: [] for point in points.activations}
    nodes: dict[int, tuple[Tensor, Tensor]] = {}

    def read(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in nodes:
            node = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
            # The original is kept as well: its id must not be given to another tensor meanwhile.
            nodes[id(tensor)] = (tensor, node)
            variables[name].append(node)
        return nodes[id(tensor)][1]

    with reading(model, points, read):
        yield variables
    nodes.clear()


def first_derivatives(loss: Tensor, families: dict[str, dict[str, list[Tensor]]]) -> dict[str, dict[str, list[Tensor]]]:
    """Gradients of the loss with respect to all targets, differentiable once more, in the shape of `families`."""
    flat = [tensor for targets in families.values() for tensors in targets.values() for tensor in tensors]
    if not flat:
        raise ModelError("there is nothing to measure: neither weights nor activations that can be differentiated")
    try:
        found = torch.autograd.grad(loss, flat, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise ModelError(
                "the loss does not depend on any layer: is it computed under torch.no_grad(), or from detached outputs?"
            ) from error
        raise
    _check_differentiable(found)
    gradients = iter(found)
    result: dict[str, dict[str, list[Tensor]]] = {}
    idle: list[str] = []
    for family, targets in families.items():
        result[family] = {}
        for name, tensors in targets.items():
            own = [next(gradients) for _ in tensors]
            if all(gradient is None for gradient in own) and family == "weights":
                idle.append(name)
            # An activation that only a part of the loss reads has a zero gradient for the rest.
            result[family][name] = [
                torch.zeros_like(tensor) if gradient is None else gradient
                for gradient, tensor in zip(own, tensors, strict=True)
            ]
    if idle:
        raise idle_layers(idle)
    return result


def _check_differentiable(gradients: Sequence[Tensor | None]) -> None:
    """Raise `ModelError` if a gradient passed through an operation whose backward pass cannot be differentiated.

    torch marks such a place in the graph with an error node. Nothing leads from there to the weights, so that without
    this check the product would come out as zero and not fail.
    """
    pending = [gradient.grad_fn for gradient in gradients if gradient is not None and gradient.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name() == "torch::autograd::Error":
            raise SecondDerivativeError(_NO_SECOND_DERIVATIVE)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


_NO_SECOND_DERIVATIVE = (
    "an operation of this model has no second derivative, which Hutchinson's method needs; replace it by one that"
    " torch can differentiate twice, or use method='gauss_newton'"
)


def hessian_vector_product(gradients: list[Tensor], targets: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """H v for the block of `targets`, from their differentiable gradients; the graph is kept for further products."""
    # A gradient without a graph is constant in the targets: its second derivative is zero.
    pairs = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(target) for target in targets]
    try:
        products = torch.autograd.grad(
            [g for g, _ in pairs], targets, [v for _, v in pairs], retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        if any(text in str(error) for text in ("not implemented", "not supported", "differentiate twice")):
            raise SecondDerivativeError(f"{_NO_SECOND_DERIVATIVE} ({error})") from error
        raise
    return [
        torch.zeros_like(target) if product is None else product
        for product, target in zip(products, targets, strict=True)
    ]


def draw_probe(like: Tensor, distribution: Distribution, generator: torch.Generator) -> Tensor:
    """A random vector with E[z zᵀ] = I in the shape, dtype and device of `like`."""
    if distribution == "gaussian":
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def _products(
    targets: dict[str, list[Tensor]],
    gradients: dict[str, list[Tensor]],
    draws: int,
    probes: Probes,
    distribution: Distribution,
    generator: torch.Generator,
) -> dict[str, _Row]:
    """Target name → its values of zᵀHz, one per draw."""
    groups = [[name] for name in targets] if probes == "per_layer" else [list(targets)]
    rows: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(draws):
        for group in groups:
            flat = [tensor for name in group for tensor in targets[name]]
            vectors = [draw_probe(tensor, distribution, generator) for tensor in flat]
            products = hessian_vector_product(
                [gradient for name in group for gradient in gradients[name]], flat, vectors
            )
            terms = iter((v.double() * p.double()).sum() for v, p in zip(vectors, products, strict=True))
            for name in group:
                rows[name].append(sum(next(terms).item() for _ in targets[name]))
    return rows


def exact_block(model: nn.Module, batch: Batch, task: Task, points: QuantizationPoints, name: str) -> Tensor:
    """The Hessian block `[n, n]` of one layer, one row per product: for small layers, to check estimates against."""
    with frozen_evaluation(model), double_backward():
        parameter = require_grad(model, points)[name]
        _, loss = forward(task, model, batch)
        gradient = first_derivatives(loss, {"weights": {name: [parameter]}})["weights"][name]
        rows = []
        for index in range(parameter.numel()):
            unit = torch.zeros_like(parameter)
            unit.view(-1)[index] = 1
            rows.append(hessian_vector_product(gradient, [parameter], [unit])[0].flatten().detach())
        return torch.stack(rows)
