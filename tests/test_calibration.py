"""What calibration keeps of the tensors that it sees, and what activation errors keep alive."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import CLASSES, labelled
from tracequant import ClassificationTask, discover
from tracequant.measure.sensitivity import _activation_errors
from tracequant.quantization import calibrate as calibration
from tracequant.quantization.calibrate import _RangeSample, calibrate
from tracequant.quantization.grid import choose_grid

TASK = ClassificationTask()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """A pool of 16 calls of 64 values."""
    monkeypatch.setattr(calibration, "RANGE_SAMPLE", 64)
    monkeypatch.setattr(calibration, "POOL", 16 * 66)
    return 16 * 66


def values(sample: _RangeSample) -> Tensor:
    return torch.cat(sample._parts)


def filled(calls: int, seed: int = 0, start: int = 0) -> _RangeSample:
    """A sample of calls whose values are their numbers, counted from `start`, plus fractions."""
    generator = torch.Generator().manual_seed(seed)
    sample = _RangeSample("layer")
    for call in range(start, start + calls):
        sample.add(call + torch.rand(100, generator=generator), generator)
    return sample


def test_as_long_as_the_pool_has_room_all_that_is_drawn_is_kept(small: int) -> None:
    """Of each call its drawn values and its extremes, in the order of the calls."""
    generator, same = (torch.Generator().manual_seed(3) for _ in range(2))
    tensors = [torch.randn(4, 25, generator=torch.Generator().manual_seed(n)) for n in range(16)]
    sample, expected = _RangeSample("layer"), []
    for tensor in tensors:
        sample.add(tensor, generator)
        flat = tensor.flatten()
        drawn = flat[torch.randint(100, (64,), generator=same)]
        expected.append(torch.cat([drawn, flat.min()[None], flat.max()[None]]))
    assert torch.equal(values(sample), torch.cat(expected))
    grid = sample.grids([4])[4]
    assert torch.equal(grid.scale, choose_grid(torch.cat(expected), 4, symmetric=False).scale)


@pytest.mark.parametrize("calls", [17, 100, 1000])
def test_a_pool_that_is_full_holds_equal_shares_of_all_calls(small: int, calls: int) -> None:
    sample = filled(calls)
    found = values(sample)
    assert small // 3 < len(found) <= small
    halves = [int((found < calls / 2).sum()), int((found >= calls / 2).sum())]
    assert sum(halves) == len(found)
    assert abs(halves[0] - halves[1]) < 5 * len(found) ** 0.5
    assert torch.equal(found, values(filled(calls)))


def test_extremes_are_kept_exactly(small: int) -> None:
    """They are two values of 50,000, in calls of their own."""
    generator = torch.Generator().manual_seed(0)
    sample = _RangeSample("layer")
    for call in range(500):
        tensor = torch.rand(100, generator=generator)
        tensor[7] = {3: -5.0, 400: 9.0}.get(call, 0.5)
        sample.add(tensor, generator)
    assert [float(x) for x in sample._extremes] == [-5.0, 9.0]
    grid = sample.grids([8])[8]
    kept = torch.cat([values(sample), torch.tensor([-5.0, 9.0])])
    assert torch.equal(grid.scale, choose_grid(kept, 8, symmetric=False).scale)


@pytest.mark.parametrize(("first", "second"), [(10, 300), (300, 10), (300, 500), (0, 300), (300, 0)])
def test_samples_that_are_joined_give_all_values_the_same_chance(small: int, first: int, second: int) -> None:
    """Also where one of them has been halved more often than the other."""
    joined = filled(first)
    joined.take(filled(second, seed=1, start=first))
    found = values(joined)
    assert small // 3 < len(found) <= small
    expected = len(found) * first / (first + second)
    assert abs(int((found < first).sum()) - expected) < 5 * max(expected, 1) ** 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_not_lost_in_a_full_pool(small: int, value: float) -> None:
    sample = filled(3)
    sample.add(torch.tensor([value]), torch.Generator())
    sample.take(filled(500))
    with pytest.raises(calibration.ModelError, match="the input of layer layer is NaN or infinite"):
        sample.grids([4])


class Repeated(nn.Module):
    """A head that is called for every one of many positions, on a tensor made for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, CLASSES)
        self.double()
        self.read: list[weakref.ref[Tensor]] = []
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), CLASSES, dtype=x.dtype)
        for position in x.unbind(1):
            total = total + self.head(self.made(position))
        return total

    def made(self, position: Tensor) -> Tensor:
        made = position * 2
        self.read = [reference for reference in self.read if reference() is not None]
        self.read.append(weakref.ref(made))
        self.most = max(self.most, len(self.read))
        return made


def test_a_head_that_is_called_often_takes_no_more_memory(small: int) -> None:
    model, batches = Repeated(), labelled(400, 3, sizes=(30, 30))
    points = discover(model, batches, TASK)
    kept: list[int] = []
    take = _RangeSample._take

    def spy(self: _RangeSample, *arguments: Any) -> None:
        take(self, *arguments)
        kept.append(sum(len(part) for part in self._parts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_RangeSample, "_take", spy)
        grids = calibrate(model, batches, TASK, points, bits={"head": [4]})
    assert len(kept) > 800
    assert max(kept) <= small
    model.most = 0
    found = _activation_errors(model, batches, TASK, points, grids, False)
    assert model.most <= 2
    grid = grids["head"][4]
    expected = sum(float((grid.round(2 * x) - 2 * x).square().sum()) for x, _ in batches) / 60
    assert found["head"][4] == pytest.approx(expected)


class InPlace(nn.Module):
    """Two layers read one tensor object, the second after it has been overwritten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        z = self.first(x)
        return z + self.second(x.relu_())


def test_a_tensor_that_was_overwritten_is_another() -> None:
    model, batches = InPlace(), labelled(6, sizes=(40,))
    points = discover(model, batches, TASK)
    assert list(points.activation_by_name) == ["first", "second"]
    grids = calibrate(model, batches, TASK, points, bits={"first": [3], "second": [3]})
    found = _activation_errors(model, batches, TASK, points, grids, False)
    x = batches[0][0] * 1.5
    for name, tensor in (("first", x), ("second", x.relu())):
        grid = grids[name][3]
        assert found[name][3] == pytest.approx(float((grid.round(tensor) - tensor).square().sum()) / 40)
