"""Passes that run out of memory, and how much memory there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import CLASSES, labelled, snapshot
from test_sensitivity import made_up
from tracequant import ClassificationTask, ResourceError, TaskError, WeightGrid, check_criteria, discover
from tracequant.measure.landscape import loss_landscapes
from tracequant.measure.sensitivity import _activation_errors
from tracequant.model import memory
from tracequant.model.memory import Microbatches
from tracequant.quantization.calibrate import calibrate

TASK = ClassificationTask()
# A loss whose value for a batch is not the mean of those of its halves.
WEIGHTED = ClassificationTask(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5], dtype=torch.float64)))


class Limited(nn.Module):
    """Has no memory for more than `limit` samples in a pass without gradients; `sizes` are those of its calls."""

    def __init__(self, limit: int = 100) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
        self.limit, self.sizes = limit, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[1](self.net[0](x))
        if not torch.is_grad_enabled():
            self.sizes.append(len(x))
            if len(x) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return self.net[2](hidden)


def evaluation(model: nn.Module, batches: Any, points: Any) -> Any:
    found = WEIGHTED.evaluate(model, batches)
    return [found.metric, found.loss]


def ranges(model: nn.Module, batches: Any, points: Any) -> Any:
    grids = calibrate(model, batches, TASK, points, bits={name: [4] for name in points.activation_by_name})
    return [float(own[4].scale) for own in grids.values()]


def errors(model: nn.Module, batches: Any, points: Any) -> Any:
    options = {name: [4] for name in points.activation_by_name}
    grids = calibrate(Limited(), batches, TASK, points, bits=options)
    found = _activation_errors(model, batches, TASK, points, grids, False)
    return [own[4] for own in found.values()]


def self_check(model: nn.Module, batches: Any, points: Any) -> Any:
    nearest = WeightGrid(rounding="nearest")
    found = check_criteria(
        model,
        labelled(6, seed=1),
        WEIGHTED,
        made_up(points),
        held_out=batches,
        weight_bits=(4,),
        weight_grid=nearest,
        plans=2,
    )
    return [row.loss_change for row in (*found.layers, *found.plans)]


def landscape(model: nn.Module, batches: Any, points: Any) -> Any:
    return loss_landscapes(model, batches, WEIGHTED, points, layers=["net.0"], size=3).layers[0].losses[1]


PASSES = [evaluation, ranges, errors, self_check, landscape]


@pytest.mark.parametrize("measure", PASSES)
def test_a_pass_that_does_not_fit_is_cut_and_finds_the_same(measure: Callable[..., Any]) -> None:
    """Loss and metric are those of the whole batch; batches after the first are cut at once."""
    batches = labelled(6, sizes=(8, 6))
    points = discover(Limited(), batches, TASK)
    model = Limited(limit=2)
    before = snapshot(model)
    found = measure(model, batches, points)
    assert found == pytest.approx(measure(Limited(), batches, points), rel=1e-12)
    assert model.sizes[:10] == [8, 4, 2, 2, 2, 2, 1, 2, 1, 2]
    assert max(model.sizes[2:]) == 2
    assert snapshot(model) == before


def test_discovery_takes_as_many_samples_as_fit() -> None:
    batches = labelled(6, sizes=(9,))
    model = Limited(limit=2)
    before = snapshot(model)
    assert discover(model, batches, TASK) == discover(Limited(), batches, TASK)
    assert model.sizes == [9, 4, 2]
    assert snapshot(model) == before
    with pytest.raises(ResourceError, match=r"memory does not suffice for one sample \(CUDA out of memory\)"):
        discover(Limited(limit=0), batches, TASK)
    with pytest.raises(ResourceError, match="a batch of 9 samples does not fit into memory, and the batch is one gra"):
        discover(Limited(limit=2), batches, Whole())


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ResourceError, match=r"does not suffice for one sample at a time \(CUDA out of memory\)"):
        TASK.evaluate(Limited(limit=0), labelled(6))


class Whole(ClassificationTask):
    """A task whose batches cannot be divided."""

    def select(self, batch: Any, start: int, stop: int) -> Any:
        raise TaskError("the batch is one graph")


def test_a_batch_that_cannot_be_divided_is_an_error() -> None:
    with pytest.raises(ResourceError, match="a batch of 4 samples does not fit into memory, and the batch is one gra"):
        Whole().evaluate(Limited(limit=2), labelled(6))
    assert Whole().evaluate(Limited(), labelled(6)).samples == 4


def test_other_errors_pass() -> None:
    def fail(batch: Any) -> None:
        raise error

    for error in (TaskError("no"), RuntimeError("no"), KeyError("no")):
        with pytest.raises(type(error), match="no"):
            Microbatches(TASK).run(labelled(6)[0], fail)


def test_nothing_of_a_failed_attempt_is_left() -> None:
    """Calibration counts the values of the batch once, though the first attempt had read half of them."""
    batches = labelled(6, sizes=(8,))
    points = discover(Limited(), batches, TASK)
    seen: list[int] = []

    def measure(batch: Any) -> int:
        seen.append(len(batch[0]))
        if len(seen) == 2 or len(batch[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(batch[0])

    assert Microbatches(TASK).run(batches[0], measure) == [2, 2, 2, 2]
    assert seen == [8, 4, 2, 2, 2, 2]
    found = errors(Limited(limit=2), batches, points)
    assert found == pytest.approx(errors(Limited(), batches, points))


# What is free


def test_a_control_group_bounds_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    system = memory.available_bytes()
    assert system is not None
    assert system > 10_000
    files = {"memory.max": "9000\n", "memory.current": "5000\n", "memory.stat": "anon 4000\ninactive_file 700\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory.available_bytes() == 4700
    (tmp_path / "memory.current").write_text("12000\n")
    assert memory.available_bytes() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() == pytest.approx(system, rel=0.5)


def test_the_address_space_bounds_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    used = memory.psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used + 2**20, -1))
    assert memory.available_bytes() == pytest.approx(2**20, abs=2**19)


def test_a_system_that_does_not_say_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(memory.psutil, "virtual_memory", fail)
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert memory.available_bytes() is None
