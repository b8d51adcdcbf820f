"""The door to all estimators."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from tracequant import distributed
from tracequant.curvature.batch_loop import Stop
from tracequant.curvature.choose_estimator import choose_method
from tracequant.curvature.gauss_newton import gauss_newton
from tracequant.curvature.hutchinson import Probes, hutchinson
from tracequant.curvature.pieces import Precision
from tracequant.curvature.products import Distribution
from tracequant.curvature.result import Curvature
from tracequant.errors import GaussNewtonError, ModelError, ResourceError
from tracequant.layers import discover
from tracequant.points import QuantizationPoints
from tracequant.task import Batches, Task, model_device, reusable

METHODS = ("auto", "gauss_newton", "hutchinson")


def estimate_curvature(
    model: nn.Module,
    batches: Batches,
    task: Task,
    *,
    method: str = "auto",
    draws: int | Literal["exact"] | None = None,
    seed: int = 0,
    points: QuantizationPoints | None = None,
    weights: bool = True,
    activations: bool = True,
    relative_error: float | None = None,
    stop: Stop | None = None,
    checkpoint: str | Path | None = None,
    precision: Precision = "float32",
    probes: Probes | None = None,
    distribution: Distribution | None = None,
    progress: bool = False,
) -> Curvature:
    """Average Hessian traces of all layers and activation points of `model` under `task`'s loss.

    `batches` are a few hundred samples, labelled. `method` is one of

    - "gauss_newton": one forward and a few backward passes; its traces equal the Hessian's for piecewise linear
      networks such as those with ReLU;
    - "hutchinson": thousands of products with the Hessian, for any network that can be differentiated twice;
    - "auto": compares the two on one batch and takes the fast one where they agree. The result's `reason` says which
      one and why. A warning says where Gauss-Newton cannot take the model at all.

    `draws` random vectors are used for each sample (gauss_newton, default 2; "exact" for a sum without random vectors)
    or for each batch (hutchinson, default 16). `points` come from `discover`, which is called if None is given.
    `weights` and `activations` say what is measured. The measurement ends early when every trace's error is below the
    share `relative_error` of it, or when `stop(curvature)` is true. `checkpoint` is a folder where finished batches are
    saved, and from which a later call continues. `precision` is "float32", "tf32" or "bfloat16". `probes` ("per_layer",
    the default, or "shared") and `distribution` ("rademacher", the default, or "gaussian") are options of hutchinson;
    "auto" uses them if it takes hutchinson.

    The model and torch's random state are left exactly as they were. Under `torchrun` all processes share the work.

    Raises `ModelError` for an option of a wrong value, and what the chosen estimator raises.
    """
    _check_choices(method, precision, probes, distribution)
    _check_numbers(draws, relative_error)
    if not (weights or activations):
        raise ModelError("weights=False and activations=False leave nothing to measure; set one of them to True")
    if method == "gauss_newton":
        for name, value in (("probes", probes), ("distribution", distribution)):
            if value is not None:
                raise ModelError(f"{name} is an option of method='hutchinson', and method='gauss_newton' was given")
    if method == "hutchinson" and draws == "exact":
        raise ModelError("draws='exact' is for gauss_newton; give hutchinson a number of draws")
    device = model_device(model)
    # Data loaders draw from torch's global generator, each time that they are iterated.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        batches = reusable(batches)
        if points is None:
            points = discover(model, batches, task)
        why = ""
        if method == "auto":
            # Of several processes all must take the same, whatever their own batch and memory would choose.
            method, why = distributed.gather(choose_method(model, batches, task, points, seed))[0]
            if method == "hutchinson" and draws == "exact":
                raise _not_exact(why)
        if method == "gauss_newton":
            try:
                return _with_reason(
                    why,
                    gauss_newton(
                        model,
                        batches,
                        task,
                        points,
                        draws=draws,
                        seed=seed,
                        weights=weights,
                        activations=activations,
                        relative_error=relative_error,
                        checkpoint=checkpoint,
                        stop=stop,
                        precision=precision,
                        progress=progress,
                    ),
                )
            except GaussNewtonError as error:
                if not why:  # the user's own choice
                    raise
                why = f"gauss_newton cannot take this model ({error})"
            if draws == "exact":
                raise _not_exact(why)
            warnings.warn(f"{why}; hutchinson, which takes longer, is used instead", stacklevel=2)
        assert draws != "exact"
        return _with_reason(
            why,
            hutchinson(
                model,
                batches,
                task,
                points,
                draws=draws,
                seed=seed,
                probes=probes or "per_layer",
                distribution=distribution or "rademacher",
                weights=weights,
                activations=activations,
                relative_error=relative_error,
                checkpoint=checkpoint,
                stop=stop,
                precision=precision,
                progress=progress,
            ),
        )


def _with_reason(why: str, result: Curvature) -> Curvature:
    return replace(result, reason=f"{why}; {result.reason}") if why else result


def _not_exact(why: str) -> ModelError:
    return ModelError(f"draws='exact' is for gauss_newton, which does not suit this model: {why}")


def _check_choices(method: Any, precision: Any, probes: Any, distribution: Any) -> None:
    """Raise an error for an option that is not one of its choices, also where the estimator would not read it."""
    if precision not in get_args(Precision):
        raise ResourceError(f"unknown precision {precision!r}; choose {', '.join(get_args(Precision))}")
    for name, value, choices in (
        ("method", method, METHODS),
        ("probes", probes, (*get_args(Probes), None)),
        ("distribution", distribution, (*get_args(Distribution), None)),
    ):
        if value not in choices:
            raise ModelError(f"unknown {name} {value!r}; choose {', '.join(c for c in choices if c is not None)}")


def _check_numbers(draws: Any, relative_error: Any) -> None:
    if draws is not None and draws != "exact" and (type(draws) is not int or draws < 1):
        raise ModelError(f"draws must be a whole number from 1, or 'exact', got {draws!r}")
    number = type(relative_error) in (int, float) and 0 < relative_error < math.inf
    if relative_error is not None and not number:
        raise ModelError(f"relative_error must be a number above 0, got {relative_error!r}")
