"""Hutchinson's options: a shared probe or one per layer, and products by reverse or forward mode.

    python benchmarks/hutchinson_probes.py

Time to a relative error r is (seconds per draw) · (error of one draw / r)², so seconds · error² decides. Both ways are
run in turn in one process; the error of one draw is that of the median layer. ResNet20 on CIFAR-10 is added where
TRACEQUANT_DATA holds it.

The library differentiates gᵀz backwards, through a graph that is built once for all draws. Forward mode carries z
through the computation of g instead: it keeps no second graph, but every product calls the model again.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import tracequant as tq
from data import data_folder
from tracequant.core.settings import TaskOptions
from tracequant.curvature.hutchinson import ProbeScope
from tracequant.curvature.products import draw_probe, first_derivatives, hessian_vector_product, require_grad
from tracequant.model.batches import Batch
from tracequant.model.hooks import weight_parameter
from tracequant.model.state import double_backward, frozen_evaluation
from tracequant.model.task import forward
from tracequant.tasks.registry import load_task

# Layer name and vector to the product of the layer's Hessian block with the vector.
Product = Callable[[str, Tensor], Tensor]


def reverse_products(model: nn.Module, batch: Batch, task: tq.Task, points: tq.QuantizationPoints) -> Product:
    """Products from one graph of the gradients."""
    parameters = require_grad(model, points)
    _, loss = forward(task, model, batch)
    gradients = first_derivatives(loss, {"weights": {name: [p] for name, p in parameters.items()}})["weights"]
    return lambda name, z: hessian_vector_product(gradients[name], [parameters[name]], [z])[0]


def forward_products(model: nn.Module, batch: Batch, task: tq.Task, points: tq.QuantizationPoints) -> Product:
    """Products for which z goes through the forward and backward pass as a tangent."""
    require_grad(model, points)

    def product(name: str, z: Tensor) -> Tensor:
        with forward_ad.dual_level(), dual_weight(model, points, name, z) as weight:
            _, loss = forward(task, model, batch)
            (gradient,) = torch.autograd.grad(loss, weight)
            tangent: Tensor = forward_ad.unpack_dual(gradient).tangent.detach()  # type: ignore[no-untyped-call]
            return tangent

    return product


@contextmanager
def dual_weight(model: nn.Module, points: tq.QuantizationPoints, name: str, tangent: Tensor) -> Iterator[Tensor]:
    """Give the layer's weight this tangent inside the block; yields the weight to differentiate by."""
    layer = points.by_name[name]
    primal = weight_parameter(model, layer).detach().requires_grad_()
    dual = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    # A module's attribute accepts nothing but an nn.Parameter, its dictionary of parameters any tensor.
    places: list[tuple[dict[str, Any], str]] = [
        (model.get_submodule(module)._parameters, parameter) for module, parameter in layer.sites
    ]
    originals = [parameters[parameter] for parameters, parameter in places]
    try:
        for parameters, parameter in places:
            parameters[parameter] = dual
        yield primal
    finally:
        for (parameters, parameter), original in zip(places, originals, strict=True):
            parameters[parameter] = original


def compare_modes(setup: tq.TaskSetup, points: tq.QuantizationPoints, draws: int = 2) -> float:
    """How many times as long products by forward mode take, of every layer on every batch; both must agree."""
    seconds = {reverse_products: 0.0, forward_products: 0.0}
    random = torch.Generator().manual_seed(0)
    with frozen_evaluation(setup.model), double_backward():
        for batch in setup.calibration:
            shapes = {layer.name: weight_parameter(setup.model, layer) for layer in points.layers}
            probes = [(n, draw_probe(w, "rademacher", random)) for _ in range(draws) for n, w in shapes.items()]
            found = []
            for build in seconds:
                start = time.perf_counter()
                product = build(setup.model, batch, setup.task, points)
                found.append([product(name, z) for name, z in probes])
                seconds[build] += time.perf_counter() - start
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
    return seconds[forward_products] / seconds[reverse_products]


def measure(name: str, setup: tq.TaskSetup, draws: int) -> None:
    """Print seconds per draw, error per draw and their product for both kinds of probe."""
    points = tq.discover(setup.model, setup.calibration, setup.task)
    work: dict[ProbeScope, float] = {}
    print(f"\n{name}: {len(points.layers)} layers")
    for probes in ("shared", "per_layer"):
        start = time.perf_counter()
        curvature = tq.estimate_curvature(
            setup.model,
            setup.calibration,
            setup.task,
            estimator="hutchinson",
            num_probes=draws,
            points=points,
            probe_scope=probes,
        )
        seconds = (time.perf_counter() - start) / draws
        error = statistics.median(e.relative_error for e in curvature.weights.values()) * draws**0.5
        work[probes] = seconds * error**2
        print(f"  {probes:10s} {seconds:8.3f} s per draw, relative error of one draw {error:6.2f} (median layer)")
    print(f"  a product by forward mode takes {compare_modes(setup, points):.1f} times as long")
    ratio = work["shared"] / work["per_layer"]
    print(f"  to the same error a shared probe takes {ratio:.1f} times as long as probes per layer")


def main() -> None:
    """Measure on the digits network and, where the data is at hand, on ResNet20."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    measure("digits, 256 images", load_task("digits", TaskOptions(samples=256)), draws=64)
    folder = data_folder("cifar10", "cifar10_weights")
    if folder is None:
        print("\nResNet20/CIFAR-10 skipped: TRACEQUANT_DATA does not hold cifar10 and cifar10_weights")
        return
    options = TaskOptions(
        data_dir=str(folder / "cifar10"), weights=str(folder / "cifar10_weights" / "resnet20.safetensors"), samples=64
    )
    measure("ResNet20/CIFAR-10, 64 images", load_task("cifar10", options), draws=16)


if __name__ == "__main__":
    main()
