"""Products with the Hessian of the loss: random vectors, gradients, the tensors to differentiate by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.core.errors import ModelError, SecondDerivativeError
from tracequant.core.points import QuantizationPoints
from tracequant.model.batches import Batch
from tracequant.model.hooks import idle_layers, reading, weight_parameter
from tracequant.model.state import double_backward, frozen_evaluation
from tracequant.model.task import Task, forward

Distribution = Literal["rademacher", "gaussian"]

_NO_SECOND_DERIVATIVE = (
    "an operation of this model has no second derivative, which the Hessian needs; replace it by one that torch can"
    " differentiate twice, or use estimator='gauss_newton'"
)

# One cure for both estimators: neither can do without the loss's own second derivative.
LOSS_BENDS_NOT = (
    "torch cannot differentiate this loss twice with respect to the outputs, which every estimator needs; use a loss"
    " written in operations that it can, or estimator='gauss_newton' with a task whose output_hessian(outputs, batch)"
    " returns the second derivative (a Fisher matrix of the log-probabilities may stand for it)"
)


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
    takes in all of them and nothing else that reads the original (the identity path of a residual block).
    """
    variables: dict[str, list[Tensor]] = {point.name: [] for point in points.activations}
    nodes: dict[int, tuple[Tensor, Tensor]] = {}

    def read(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in nodes:
            node = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
            # The original is kept as well: its id must not be given to another tensor meanwhile.
            variables[name].append(node)
            nodes[id(tensor)] = (tensor, node)
        return nodes[id(tensor)][1]

    with reading(model, points, read):
        yield variables
    nodes.clear()


def first_derivatives(
    loss: Tensor, families: dict[str, dict[str, list[Tensor]]]
) -> tuple[dict[str, dict[str, list[Tensor]]], tuple[str, ...]]:
    """Gradients of the loss with respect to all targets, differentiable once more, in the shape of `families`.

    And the layers among the "weights" that the loss does not depend on, whose gradients are zero.
    """
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
    gradients = iter(found)
    result: dict[str, dict[str, list[Tensor]]] = {}
    idle: list[str] = []
    for family, targets in families.items():
        result[family] = {}
        for name, tensors in targets.items():
            own = [next(gradients) for _ in tensors]
            if all(gradient is None for gradient in own) and family == "weights":
                idle.append(name)
            # What the loss does not depend on has a zero gradient.
            result[family][name] = [
                torch.zeros_like(tensor) if gradient is None else gradient
                for gradient, tensor in zip(own, tensors, strict=True)
            ]
    check_differentiable([g for targets in result.values() for gradients in targets.values() for g in gradients])
    return result, tuple(idle)


def check_differentiable(gradients: Sequence[Tensor | None]) -> None:
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


def draw_probe(
    like: Tensor, distribution: Distribution, generator: torch.Generator, shape: Sequence[int] | None = None
) -> Tensor:
    """A random vector with E[z zᵀ] = I in the shape (unless another is given), dtype and device of `like`."""
    shape = like.shape if shape is None else shape
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    bits = torch.randint(0, 2, shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def culprit(model: nn.Module, task: Task, batch: Batch) -> str:
    """The innermost module that cannot be differentiated twice, by calling each again on its own inputs."""
    calls: list[tuple[str, nn.Module, Any]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: calls.append((name, module, pytree.tree_map(_copy, (args, kwargs))))

    def _copy(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(record(name), with_kwargs=True).remove)
        task.outputs(model, batch)
    for name, module, (args, kwargs) in calls:  # children come before their parents
        if not _differentiable_twice(module, args, kwargs):
            return f"{name or 'the model'} ({type(module).__name__})"
    return "the loss"


def _differentiable_twice(module: nn.Module, args: Any, kwargs: Any) -> bool:
    leaves, structure = pytree.tree_flatten((args, kwargs))
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    # A copy for the module, which may work in place.
    free = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
    own_args, own_kwargs = pytree.tree_unflatten(free, structure)
    outputs = [
        x for x in pytree.tree_leaves(module(*own_args, **own_kwargs)) if isinstance(x, Tensor) and x.requires_grad
    ]
    if not outputs or not inputs:
        return True
    try:
        slopes = torch.autograd.grad(
            outputs, inputs, [torch.ones_like(x) for x in outputs], create_graph=True, allow_unused=True
        )
        check_differentiable(slopes)
        bent = [slope for slope in slopes if slope is not None and slope.requires_grad]
        if bent:
            torch.autograd.grad(bent, inputs, [torch.ones_like(x) for x in bent], allow_unused=True)
    except (SecondDerivativeError, RuntimeError):
        return False
    return True


def exact_block(model: nn.Module, batch: Batch, task: Task, points: QuantizationPoints, name: str) -> Tensor:
    """The Hessian block `[n, n]` of one layer, one row per product: for small layers, to check estimates against."""
    with frozen_evaluation(model), double_backward():
        parameter = require_grad(model, points)[name]
        _, loss = forward(task, model, batch)
        gradients, idle = first_derivatives(loss, {"weights": {name: [parameter]}})
        if idle:
            raise idle_layers(idle)
        gradient = gradients["weights"][name]
        rows = []
        for index in range(parameter.numel()):
            unit = torch.zeros_like(parameter)
            unit.view(-1)[index] = 1
            rows.append(hessian_vector_product(gradient, [parameter], [unit])[0].flatten().detach())
        return torch.stack(rows)


def generator(seed: int, *key: int, device: torch.device) -> torch.Generator:
    """Random numbers of their own for a batch, a draw, ...: independent of what was drawn before."""
    state = np.random.SeedSequence((seed % 2**64, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) % 2**63)
