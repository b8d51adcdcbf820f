"""The door to all estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tracequant.core.curvature import Curvature
from tracequant.core.errors import ModelError, SettingsError
from tracequant.core.options import resolve, takes
from tracequant.core.points import QuantizationPoints
from tracequant.core.settings import CurvatureSettings
from tracequant.curvature.batch_loop import Stop
from tracequant.curvature.choose_estimator import identity
from tracequant.curvature.gauss_newton import gauss_newton
from tracequant.curvature.hutchinson import hutchinson
from tracequant.model import distributed
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import model_device
from tracequant.model.discover import discover
from tracequant.model.task import Task

# Options that one estimator alone reads.
_OWN: dict[str, tuple[str, ...]] = {
    "gauss_newton": ("target_sampling_error",),
    "hutchinson": ("probe_scope", "distribution", "target_standard_error"),
}


@takes(CurvatureSettings)
def estimate_curvature(
    model: nn.Module,
    batches: Batches,
    task: Task,
    settings: CurvatureSettings | None = None,
    *,
    points: QuantizationPoints | None = None,
    seed: int = 0,
    weights: bool = True,
    activations: bool = True,
    stop: Stop | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    **fields: object,
) -> Curvature:
    """Average Hessian traces of all layers and activation points of `model` under `task`'s loss.

    `batches` are a few hundred samples, labelled. `estimator` is one of

    - "gauss_newton": one forward and a few backward passes, for any network; its traces equal the Hessian's where the
      network is piecewise linear in each layer, as those with ReLU are;
    - "auto": gauss_newton, and the result's `reason` says whether its traces equal the Hessian's or what bends;
    - "hutchinson": thousands of products with the Hessian, for any network that can be differentiated twice.

    `points` come from `discover`, which is called if None is given. `weights` and `activations` say what is measured.
    The measurement ends early when every trace is known to the target that `settings` give, or when `stop(curvature)`
    is true. `checkpoint` is a folder where finished batches are saved, and from which a later call resumes.

    The model and torch's random state are left exactly as they were. Under `torchrun` all processes share the work.

    Raises `SettingsError` for options that do not exist, have a wrong value, or belong to another estimator, and what
    the chosen estimator raises.
    """
    request = resolve(CurvatureSettings, settings, fields)
    _refuse_others_options(request)
    if not (weights or activations):
        raise ModelError("weights=False and activations=False leave nothing to measure; set one of them to True")
    device = model_device(model)
    # Data loaders draw from torch's global generator, each time that they are iterated.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        batches = reusable(batches)
        if points is None:
            points = discover(model, batches, task)
        estimator: Callable[..., Curvature]
        if request.estimator == "hutchinson":
            estimator = partial(
                hutchinson,
                probe_scope=request.probe_scope,
                distribution=request.distribution,
                target_standard_error=request.target_standard_error,
            )
        else:
            estimator = partial(gauss_newton, target_sampling_error=request.target_sampling_error)
        why = ""
        if request.estimator == "auto":
            # Of several processes all must say the same.
            why = distributed.gather(identity(model, batches, task, points, seed))[0]
        result = estimator(
            model,
            batches,
            task,
            points,
            num_probes=request.num_probes,
            seed=seed,
            weights=weights,
            activations=activations,
            checkpoint=checkpoint,
            stop=stop,
            precision=request.precision,
            progress=progress,
        )
    return replace(result, reason=f"{why}; {result.reason}") if why else result


def _refuse_others_options(request: CurvatureSettings) -> None:
    """Raise `SettingsError` for an option that the chosen estimator does not read."""
    estimator = "gauss_newton" if request.estimator == "auto" else request.estimator
    if request.estimator == "hutchinson" and request.num_probes == "exact":
        raise SettingsError("num_probes='exact' is for gauss_newton; give hutchinson a number of probes", "num_probes")
    default = CurvatureSettings()
    for owner, names in _OWN.items():
        for name in names:
            if owner != estimator and getattr(request, name) != getattr(default, name):
                raise SettingsError(
                    f"{name} is an option of estimator={owner!r}, and estimator={request.estimator!r} was given", name
                )
