"""Whether a layer's Gauss-Newton block equals its Hessian block: measured on the model, not guessed from class names.

H_ii − G_ii = Σ_k (∂L/∂z_k) ∂²z_k/∂W_i²: it vanishes where no operation behind layer i bends. So the layers that read
the model's input, which have the whole network behind them, find any such operation, a functional one too; a few
layers further on are tried as well, for networks with several branches, and so are layers called more than once:
applied to its own output, a layer is not linear in its weights. One random v and the first batch: Hv and Gv agree to
rounding, or the identity does not hold.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn

from tracequant.core.errors import (
    DataError,
    GaussNewtonError,
    ModelError,
    ResourceError,
    SecondDerivativeError,
    TaskError,
)
from tracequant.core.points import QuantizationPoints
from tracequant.curvature.output_hessian import factor, loss_hessian
from tracequant.curvature.products import draw_probe, first_derivatives, hessian_vector_product, require_grad
from tracequant.model.batches import Batch, Batches
from tracequant.model.device import arithmetic, model_device
from tracequant.model.memory import out_of_memory
from tracequant.model.state import double_backward, frozen_evaluation
from tracequant.model.task import Task, checked, forward

# Float32 rounding leaves 1e-6 to 1e-4; a GELU or SiLU network differs by percents and more.
TOLERANCE = 1e-3
CHECKED_LAYERS = 4
CHECKED_SAMPLES = 8

_BENT = (
    nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Softmax,
    nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.MultiheadAttention, nn.RMSNorm, nn.LSTM, nn.GRU,
)  # fmt: skip


def choose_estimator(
    model: nn.Module, batches: Batches, task: Task, points: QuantizationPoints, seed: int
) -> tuple[Literal["gauss_newton", "hutchinson"], str]:
    """The estimator that suits the model, and why; a warning too where Gauss-Newton cannot take the model."""
    generator = torch.Generator(model_device(model)).manual_seed(seed)
    try:
        batch = next(iter(checked(batches, task, model)))
        with arithmetic("float32", model):
            defects = _defects(model, batch, task, points, generator)
    except SecondDerivativeError:
        return "gauss_newton", (
            "an operation has no second derivative, so that the Hessian cannot be had; these are Gauss-Newton traces,"
            " which may differ from it"
        )
    except GaussNewtonError as error:
        return "hutchinson", fall_back(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            f"memory does not suffice to compare estimators on {CHECKED_SAMPLES} samples ({error}); name one"
            " (estimator='gauss_newton'), or use smaller inputs or another device"
        ) from None
    name = max(defects, key=lambda layer: defects[layer])
    if defects[name] <= TOLERANCE:
        return "gauss_newton", f"Hessian and Gauss-Newton products agree to {max(defects[name], 1e-7):.0e}"
    share = f"{defects[name]:.1%}" if defects[name] < 1 else "more than 100%"
    return "hutchinson", f"the Gauss-Newton block of {name} differs from its Hessian's by {share}{_cause(model)}"


def fall_back(error: GaussNewtonError) -> str:
    """Why Hutchinson takes over from Gauss-Newton, which raised this error; a warning says it too."""
    why = f"gauss_newton cannot take this model ({error})"
    warnings.warn(f"{why}; hutchinson, which takes longer, is used instead", stacklevel=3)
    return why


def _defects(
    model: nn.Module, batch: Batch, task: Task, points: QuantizationPoints, generator: torch.Generator
) -> dict[str, float]:
    """`block_differences` on a few samples, which show a difference as well as all of them do, if that is possible."""
    if task.batch_size(batch) > CHECKED_SAMPLES:
        # A batch may resist being divided, and a few samples may all be classified with certainty.
        with suppress(TaskError, ModelError, DataError):
            few = task.select(batch, 0, CHECKED_SAMPLES)
            return block_differences(model, few, task, points, generator)
    return block_differences(model, batch, task, points, generator)


def block_differences(
    model: nn.Module,
    batch: Batch,
    task: Task,
    points: QuantizationPoints,
    generator: torch.Generator,
) -> dict[str, float]:
    """‖H_ii v − G_ii v‖ / ‖G_ii v‖ for one random v and one batch, of the layers that would show a difference."""
    result: dict[str, float] = {}
    with frozen_evaluation(model), double_backward():
        parameters = require_grad(model, points)
        with _counting_calls(model, points) as calls:
            outputs, loss = forward(task, model, batch)
        names = _some_layers(points, calls)
        factor(task, outputs, batch, generator)  # fails where gauss_newton would
        tensors, product = loss_hessian(task, outputs, batch)
        gradients = first_derivatives(loss, {"weights": {name: [parameters[name]] for name in names}})["weights"]
        for name in names:
            weight = parameters[name]
            vector = draw_probe(weight, "rademacher", generator)
            (hessian,) = hessian_vector_product(gradients[name], [weight], [vector])
            try:
                gauss_newton = gauss_newton_product(tensors, product, weight, vector)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                raise GaussNewtonError(f"layer {name} has no Gauss-Newton product: {error}") from error
            size = float(gauss_newton.norm())
            difference = float((hessian - gauss_newton).norm())
            # Where nothing reaches the layer (a last layer of zeros, say) there is nothing to compare.
            if size > 0 or difference > 0:
                result[name] = difference / size if size > 0 else math.inf
    if not result:
        raise ModelError(
            "no signal reaches the layers, so that estimators cannot be compared: is the last layer all zeros, the"
            " model untrained? name an estimator (estimator='gauss_newton') to measure it all the same"
        )
    return result


def gauss_newton_product(
    tensors: list[Tensor], product: Callable[[list[Tensor]], list[Tensor]], weight: Tensor, vector: Tensor
) -> Tensor:
    """G v = Jᵀ H_L J v for one weight, the graph kept; `product` maps vectors of the outputs' shapes to H_L times them.

    J v comes from differentiating Jᵀw, which is linear in w, once more.
    """
    dummies = [torch.zeros_like(tensor, requires_grad=True) for tensor in tensors]
    (pulled,) = torch.autograd.grad(tensors, weight, dummies, create_graph=True)
    pushed = torch.autograd.grad(pulled, dummies, vector, retain_graph=True, allow_unused=True)
    tangents = [torch.zeros_like(t) if p is None else p for p, t in zip(pushed, tensors, strict=True)]
    (result,) = torch.autograd.grad(tensors, weight, product(tangents), retain_graph=True)
    return result


def _some_layers(points: QuantizationPoints, calls: dict[str, int]) -> list[str]:
    """Layers that read the model's input, embeddings, those called more than once, and a few at even distances."""
    inputs = {point.name for point in points.activations if point.is_model_input}
    first = [layer.name for layer in points.layers if layer.activation in inputs or layer.kind == "Embedding"]
    rest = [layer.name for layer in points.layers if layer.name not in first]
    repeated = [name for name in rest if calls[name] > 1]
    step = max(1, len(rest) // CHECKED_LAYERS)
    return list(dict.fromkeys([*first[:CHECKED_LAYERS], *repeated, *rest[::step][:CHECKED_LAYERS]]))


@contextmanager
def _counting_calls(model: nn.Module, points: QuantizationPoints) -> Iterator[dict[str, int]]:
    """How often each layer's modules are called in the block."""
    calls = {layer.name: 0 for layer in points.layers}

    def counter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    with ExitStack() as stack:
        for layer in points.layers:
            for module_name, _ in layer.sites:
                handle = model.get_submodule(module_name).register_forward_hook(counter(layer.name))
                stack.callback(handle.remove)
        yield calls


def _cause(model: nn.Module) -> str:
    """The last module that is known to bend, which lies behind most layers; functional calls have no name."""
    bent = [(name, module) for name, module in model.named_modules() if isinstance(module, _BENT)]
    if bent:
        name, module = bent[-1]
        return f" (for instance {name}, {type(module).__name__}, is not piecewise linear)"
    return " (an operation that is not piecewise linear, called as a function)"
