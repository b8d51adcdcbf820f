"""The state in which everything is measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracequant as tq
from models import CLASSES, labelled, snapshot
from test_sensitivity import made_up
from tracequant import ClassificationTask, RunError
from tracequant.measure.accuracy import Evaluator
from tracequant.measure.landscape import loss_landscapes
from tracequant.measure.sensitivity import _activation_errors
from tracequant.model import device
from tracequant.quantization.calibrate import calibrate

TASK = ClassificationTask()


class Spy(nn.Module):
    """Notes in every call torch's switches and whether it is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, CLASSES)
        self.double()
        self.seen: list[list[Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append([*now(), self.training])
        return self.outer(self.inner(x).relu())


class Own(ClassificationTask):
    """A task with an evaluation of its own, which knows nothing of any switches."""

    def evaluate(self, model: nn.Module, batches: Any, progress: bool = False) -> tq.Evaluation:
        for inputs, _ in batches:
            model(inputs)
        return tq.Evaluation("metric", 0.0, 0.0, 1)


def now() -> list[Any]:
    return [getattr(backend, name) for backend, name, _, _ in device._tf32_switches()]


def errors(model: nn.Module, batches: Any, points: Any) -> None:
    grids = calibrate(model, batches, TASK, points, bits={name: [4] for name in points.activation_by_name})
    _activation_errors(model, batches, TASK, points, grids, False)


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "evaluation": lambda model, batches, points: TASK.evaluate(model, batches),
    "accuracy": lambda model, batches, points: Evaluator(model, batches, Own(), evaluation=batches),
    "activations": errors,
    "check": lambda model, batches, points: tq.check_criteria(
        model, batches, TASK, made_up(points), held_out=labelled(6, seed=1), weight_bits=(4,), plans=1
    ),
    "landscape": lambda model, batches, points: loss_landscapes(model, batches, TASK, points, layers=["inner"], size=3),
    "curvature": lambda model, batches, points: tq.estimate_curvature(model, batches, TASK, points=points),
    "eigenvalues": lambda model, batches, points: tq.top_eigenvalues(model, batches, TASK, points),
    "expansion": lambda model, batches, points: tq.measure_perturbation(model, batches, TASK, points),
    "discovery": lambda model, batches, points: tq.discover(model, batches, TASK),
}


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_every_measurement_is_made_in_float32(measurement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, which is pretended here: torch computes convolutions there in TF32, unless it is told not to."""
    model, batches = Spy(), labelled(6)
    points = tq.discover(model, batches, TASK)
    model.seen.clear()
    model.train()
    switches = device._tf32_switches()
    state, before = snapshot(model), now()
    monkeypatch.setattr(device, "model_device", lambda model: torch.device("cuda"))
    try:
        for backend, name, on, _ in switches:
            setattr(backend, name, on)
        MEASUREMENTS[measurement](model, batches, points)
        assert now() == [on for _, _, on, _ in switches]
    finally:
        for (backend, name, _, _), value in zip(switches, before, strict=True):
            setattr(backend, name, value)
    assert model.seen
    assert all(seen == [*(off for _, _, _, off in switches), False] for seen in model.seen)
    assert snapshot(model) == state


def test_an_error_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Spy()
    before = now()
    monkeypatch.setattr(device, "model_device", lambda model: torch.device("cuda"))
    with suppress(ZeroDivisionError), device.measuring(model, "tf32"):
        assert now() == [on for _, _, on, _ in device._tf32_switches()]
        assert not model.training
        raise ZeroDivisionError
    assert now() == before
    assert model.training


def test_devices_by_name() -> None:
    assert device.choose_device("cpu") == torch.device("cpu")
    assert device.choose_device(torch.device("cpu")) == torch.device("cpu")
    assert device.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(RunError, match="device 'warp' cannot be used: "):
        device.choose_device("warp")
