"""Curvature of the loss: average Hessian traces of layers and activations.

Adding a method means one file and one entry in `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tracequant.curvature.hutchinson import hutchinson
from tracequant.curvature.result import Curvature
from tracequant.errors import DataError, ModelError
from tracequant.layers import discover
from tracequant.points import QuantizationPoints
from tracequant.task import Batches, Task, reusable

ESTIMATORS: dict[str, Callable[..., Curvature]] = {"hutchinson": hutchinson}


def estimate_curvature(
    model: nn.Module,
    batches: Batches,
    task: Task,
    method: str = "auto",
    draws: int = 16,
    seed: int = 0,
    points: QuantizationPoints | None = None,
    **options: Any,
) -> Curvature:
    """Average Hessian traces of all layers and activation points of `model` under `task`'s loss.

    `batches` are a few hundred samples, labelled. `points` come from `discover` (called here if None). `method` names
    an estimator; "auto" takes the one that suits the model and says why in the result's `reason`. Further `options` go
    to the estimator: `probes`, `distribution`, `weights`, `activations`, `progress`. The model is left exactly as it
    was.
    """
    if draws < 1:
        raise DataError(f"draws must be at least 1, got {draws}")
    if method != "auto" and method not in ESTIMATORS:
        raise ModelError(f"unknown method {method!r}; choose auto or {', '.join(sorted(ESTIMATORS))}")
    batches = reusable(batches)
    if points is None:
        points = discover(model, batches, task)
    name = "hutchinson" if method == "auto" else method
    return ESTIMATORS[name](model, batches, task, points, draws=draws, seed=seed, **options)
