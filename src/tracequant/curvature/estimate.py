"""The door to all estimators. Adding one means one file and one entry in `ESTIMATORS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from tracequant import distributed
from tracequant.curvature.choose_estimator import choose_method
from tracequant.curvature.gauss_newton import gauss_newton
from tracequant.curvature.hutchinson import hutchinson
from tracequant.curvature.result import Curvature
from tracequant.errors import ModelError
from tracequant.layers import discover
from tracequant.points import QuantizationPoints
from tracequant.task import Batches, Task, reusable

ESTIMATORS: dict[str, Callable[..., Curvature]] = {"gauss_newton": gauss_newton, "hutchinson": hutchinson}


def estimate_curvature(
    model: nn.Module,
    batches: Batches,
    task: Task,
    method: str = "auto",
    draws: int | Literal["exact"] | None = None,
    seed: int = 0,
    points: QuantizationPoints | None = None,
    **options: Any,
) -> Curvature:
    """Average Hessian traces of all layers and activation points of `model` under `task`'s loss.

    `batches` are a few hundred samples, labelled. `method`: "gauss_newton" (one forward and a few backward passes;
    equal to the Hessian's traces for piecewise linear networks such as those with ReLU), "hutchinson" (any
    twice-differentiable network, thousands of products), or "auto", which compares the two on one batch and takes the
    fast one where they agree; the result's `reason` says which and why. `draws` random vectors are used for each batch
    (hutchinson, default 16) or sample (gauss_newton, default 2; "exact" for none). `points` come from `discover`
    (called here if None). The model is left exactly as it was.

    Further `options` go to the estimator: `weights`, `activations`, `progress`; `relative_error` and `stop` to end when
    enough is known; `checkpoint`, a folder to go on from; `precision` "float32", "tf32" or "bfloat16"; for hutchinson
    `probes` and `distribution`. See `gauss_newton`, `hutchinson` and `collect`. Under `torchrun` the work is
    shared out to all processes.
    """
    if draws is not None and draws != "exact" and (not isinstance(draws, int) or draws < 1):
        raise ModelError(f"draws must be a whole number from 1, or 'exact', got {draws!r}")
    if method != "auto" and method not in ESTIMATORS:
        raise ModelError(f"unknown method {method!r}; choose auto or {', '.join(sorted(ESTIMATORS))}")
    batches = reusable(batches)
    if points is None:
        points = discover(model, batches, task)
    if draws == "exact" and method == "hutchinson":
        raise ModelError("draws='exact' is for gauss_newton; give hutchinson a number of draws")
    why = ""
    if method == "auto":
        known = set().union(*(_own_options(name, options) for name in ESTIMATORS))
        if unknown := options.keys() - known:
            raise ModelError(f"there is no option {', '.join(sorted(unknown))}")
        # Of several processes all must take the same, whatever their own batch and memory would choose.
        method, why = distributed.gather(choose_method(model, batches, task, points, seed))[0]
        if method == "gauss_newton":
            try:
                return _call(method, why, model, batches, task, points, draws, seed, _own_options(method, options))
            except ModelError as error:
                method, why = "hutchinson", f"gauss_newton cannot take this model ({error})"
        if draws == "exact":
            raise ModelError(f"draws='exact' is for gauss_newton, which does not suit this model: {why}")
        options = _own_options(method, options)
    return _call(method, why, model, batches, task, points, draws, seed, options)


def _call(
    method: str,
    why: str,
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    draws: int | Literal["exact"] | None,
    seed: int,
    options: dict[str, Any],
) -> Curvature:
    if unknown := options.keys() - _own_options(method, options).keys():
        raise ModelError(f"method {method!r} has no option {', '.join(sorted(unknown))}")
    if draws is not None:
        options = options | {"draws": draws}
    result = ESTIMATORS[method](model, batches, task, points, seed=seed, **options)
    return replace(result, reason=f"{why}; {result.reason}") if why else result


def _own_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that the estimator knows; with "auto" the others were meant for the one not chosen."""
    known = inspect.signature(ESTIMATORS[method]).parameters
    return {name: value for name, value in options.items() if name in known}
