"""Fine-tuning in several processes, gloo on the CPU: the parameters of one process that sees all batches at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import tracequant as tq
from test_distributed import together
from tracequant import distributed, finetuning
from tracequant.errors import ArtifactError, DataError
from tracequant.plan import BitPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

TASK = tq.ClassificationTask()


class Net(nn.Module):
    """Two layers with a branch that may be left out; BatchNorm and dropout where asked for."""

    def __init__(self, norm: bool, dropout: float) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.two = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.two(self.drop(self.norm(self.one(x)).relu())))


def data(samples: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


def batches(size: int, samples: int = 48) -> list[tuple[Tensor, Tensor]]:
    x, y = data(samples).tensors
    return [(x[i : i + size], y[i : i + size]) for i in range(0, samples, size)]


def quantized(norm: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = Net(norm, dropout).eval()
    curvature = tq.estimate_curvature(model, batches(24), TASK, method="gauss_newton", draws="exact")
    sensitivity = tq.measure_sensitivity(model, curvature, batches(24), TASK, (3, 4), (4,))
    plan: BitPlan = tq.solve(sensitivity, average_bits=4)
    return tq.quantize(model, plan, batches(24), TASK)


State = dict[str, Any]  # arrays: tensors are not pickled, but shared with a process that has ended


def trained(loader: Any, model: nn.Module | None = None, **options: Any) -> tuple[list[float], State]:
    model = quantized() if model is None else copy.deepcopy(model)
    result = tq.finetune(model, loader, TASK, **({"steps": 5, "learning_rate": 0.05} | options))
    return result.losses, {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def assert_equal(states: list[State]) -> None:
    for other in states[1:]:
        assert list(other) == list(states[0])
        assert all(np.array_equal(other[name], array) for name, array in states[0].items())


def test_a_step_of_two_processes_is_one_of_both_batches() -> None:
    """Scales are left alone: the step of an activation's depends on the number of values that it sees."""
    model = quantized()
    losses, state = trained(batches(8), model, scales="fixed")
    found = together(lambda: trained(batches(4), model, scales="fixed"))
    assert_equal([states for _, states in found])
    for own_losses, own_state in found:
        assert own_losses == pytest.approx(losses, rel=1e-5)
        for name, array in state.items():
            np.testing.assert_allclose(own_state[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"batchnorm": "reestimate"}, {"ema": 0.5}, {"optimizer": "adamw"}])
def test_all_processes_end_alike(options: dict[str, Any]) -> None:
    model = quantized(norm=True, dropout=0.3)
    found = together(lambda: trained(DataLoader(data(), 4, shuffle=True), model, **options), 3)
    assert_equal([state for _, state in found])
    assert found[0][0] == found[1][0] == found[2][0]
    assert not np.array_equal(found[0][1]["two.bias"], model.state_dict()["two.bias"].numpy())


def test_the_first_process_gives_the_others_its_model() -> None:
    def work() -> State:
        model = quantized()
        with torch.no_grad():
            model.two.bias += distributed.rank()
        return trained(batches(4), model, steps=1)[1]

    assert_equal(together(work))


class Numbers(Dataset[tuple[Tensor, int]]):
    """Its own indices, each beside a random number, and a list of what was loaded."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded.append(index)
        return torch.rand(()), index


def test_a_loaders_batches_are_shared_out_before_they_are_loaded() -> None:
    def work() -> tuple[list[list[int]], list[float], list[int]]:
        numbers = Numbers()
        own = list(distributed.own_share(DataLoader(numbers, 3, shuffle=True), 7))
        return [labels.tolist() for _, labels in own], torch.cat([x for x, _ in own]).tolist(), numbers.loaded

    (first, random, loaded), (second, others, _) = together(work)
    torch.manual_seed(7)
    order = list(DataLoader(Numbers(), 3, shuffle=True).batch_sampler)
    assert (first, second) == (order[0::2], order[1::2])
    assert sorted(loaded) == sorted(index for batch in first for index in batch)
    assert set(random).isdisjoint(others)  # augmentation is every process's own


def test_other_iterables_are_dealt_out_in_full_rounds() -> None:
    def rounds() -> Iterator[int]:
        yield from range(8)

    found = together(lambda: list(distributed.own_share(rounds(), 0)), 3)
    assert found == [[0, 3], [1, 4], [2, 5]]


def test_an_interrupted_run_of_two_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model = quantized(norm=True, dropout=0.3)
    options = {"steps": 12, "checkpoint_every": 4}

    class Failing:
        """A loader whose batches end the run after some."""

        def __init__(self) -> None:
            self.served = 0

        def __iter__(self) -> Iterator[Any]:
            for batch in batches(4):
                self.served += 1
                if self.served > 15:
                    raise ConnectionError
                yield batch

    def work() -> tuple[Any, Any]:
        whole = trained(batches(4), model, checkpoint=tmp_path / "whole.pt", **options)
        with pytest.raises(ConnectionError):
            trained(Failing(), model, checkpoint=tmp_path / "run.pt", **options)
        distributed.gather(None)
        return whole, trained(batches(4), model, checkpoint=tmp_path / "run.pt", **options)

    for whole, resumed in together(work):
        assert resumed[0] == whole[0]
        assert_equal([whole[1], resumed[1]])
    with pytest.raises(ArtifactError, match=r"other settings \(processes\)"):
        trained(batches(4), model, checkpoint=tmp_path / "run.pt", **options)


def test_a_parameter_without_gradient_keeps_none() -> None:
    def work() -> list[list[float] | None]:
        one, two, three = (nn.Parameter(torch.ones(2)) for _ in range(3))
        one.grad = torch.full((2,), float(distributed.rank()))
        if distributed.rank() == 1:
            two.grad = torch.full((2,), 6.0)
        distributed.average_gradients([one, two, three])
        return [None if p.grad is None else p.grad.tolist() for p in (one, two, three)]

    for one, two, three in together(work):
        assert one == [0.5, 0.5]
        assert two == [3.0, 3.0]
        assert three is None


def test_too_few_batches_are_said() -> None:
    found = together(lambda: trained(batches(48)))
    assert all(isinstance(error, DataError) for error in found)
    assert "at least one batch for each of 2 processes" in str(found[0])


def test_statistics_are_averaged_and_grids_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the mean of equal zero points is no whole number for some numbers of processes; packing truncates."""
    averaged: list[Tensor] = []
    monkeypatch.setattr(distributed, "average", averaged.extend)
    model = quantized(norm=True)
    finetuning._average_statistics(model)
    found = {name for name, buffer in model.named_buffers() if any(buffer is tensor for tensor in averaged)}
    assert found == {"norm.running_mean", "norm.running_var"}
    assert any(name.endswith("zero_point") for name, _ in model.named_buffers())


def test_a_distributed_sampler_orders_every_pass_anew() -> None:
    def work() -> list[list[int]]:
        numbers = Numbers()
        loader = DataLoader(numbers, 3, sampler=DistributedSampler(numbers))
        passes = [list(distributed.own_share(loader, seed)) for seed in (7, 8, 7)]
        return [torch.cat([labels for _, labels in own]).tolist() for own in passes]

    (first, second, again), _ = together(work)
    assert first != second
    assert first == again
