"""Layers that not every batch reaches, such as the experts of a mixture: zero there, an error only if none does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from models import CLASSES, build
from tracequant.curvature.spectrum import top_eigenvalues
from tracequant.quantization.rounding import round_weights

TASK = tq.ClassificationTask()


class Experts(nn.Module):
    """Sends every sample to the expert that its first feature names; `dense` computes the same with all experts."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.stem = nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()  # nobody is sent to the last expert
        hidden = F.relu(self.stem(x))
        if self.dense:
            mixed = [expert(hidden) * (chosen == number).unsqueeze(1) for number, expert in enumerate(self.experts)]
            return self.head(F.relu(torch.stack(mixed).sum(0)))
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                result = result.index_add(0, rows, expert(hidden[rows]))
        return self.head(F.relu(result))


def batches_of(*signs: float) -> list[tuple[Tensor, Tensor]]:
    """A batch of three samples for each sign of the first feature; 0 for a batch with both."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for sign in signs:
        x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        x[:, 0] = x[:, 0].abs() * (torch.tensor([1.0, -1.0, 1.0]) if sign == 0 else sign)
        batches.append((x, torch.randint(0, CLASSES, (3,), generator=generator)))
    return batches


def points(model: nn.Module, exclude: tuple[str, ...] = ("experts.2",)) -> tq.QuantizationPoints:
    return tq.discover(model, batches_of(0), TASK, exclude=exclude)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Rows that a router picks take a pass of each sample, which is announced."""
    warnings.filterwarnings("ignore", message=".*cannot be told apart.*")


@pytest.mark.parametrize(("method", "probes"), [("gauss_newton", "exact"), ("gauss_newton", 2), ("hutchinson", 3)])
def test_a_batch_that_misses_an_expert_counts_zero_for_it(method: str, probes: int | str, tmp_path: Path) -> None:
    sparse, dense = build(lambda: Experts(False)), build(lambda: Experts(True))
    batches = batches_of(1, -1, 1)
    options = {"estimator": method, "num_probes": probes, "activations": False}
    expected = tq.estimate_curvature(dense, batches, TASK, points=points(dense), **options)
    found = tq.estimate_curvature(sparse, batches, TASK, points=points(sparse), checkpoint=tmp_path, **options)
    resumed = tq.estimate_curvature(sparse, batches, TASK, points=points(sparse), checkpoint=tmp_path, **options)
    assert resumed == found
    for name, estimate in expected.weights.items():
        assert estimate.trace > 0
        assert found.weights[name].trace == pytest.approx(estimate.trace, rel=1e-8)
        assert found.weights[name].sampling_error == pytest.approx(estimate.sampling_error, rel=1e-8)
        assert found.weights[name].samples == 9


def test_perturbations_and_eigenvalues_count_zero_too() -> None:
    sparse, dense = build(lambda: Experts(False)), build(lambda: Experts(True))
    batches = batches_of(1, -1)
    # GPTQ would round an expert by the samples sent to it, and the dense one by all of them.
    options = {"weight_bits": (2, 4), "num_probes": "exact", "weight_grid": tq.WeightGrid(rounding="nearest")}
    found, expected = (
        tq.measure_perturbation(model, batches, TASK, points(model), **options) for model in (sparse, dense)
    )
    assert found.first_order == pytest.approx(expected.first_order, rel=1e-8)
    for row, wanted in zip(found.products, expected.products, strict=True):
        assert row == pytest.approx(wanted, rel=1e-8, abs=1e-14)
    ours, theirs = (top_eigenvalues(model, batches, TASK, points(model), k=1, seed=0) for model in (sparse, dense))
    assert ours == {name: pytest.approx(values, rel=1e-6) for name, values in theirs.items()}


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, found: tq.estimate_curvature(model, batches_of(1, -1), TASK, points=found, num_probes=1),
        lambda model, found: tq.estimate_curvature(
            model, batches_of(1, -1), TASK, points=found, num_probes=1, estimator="hutchinson"
        ),
        lambda model, found: tq.measure_perturbation(model, batches_of(1, -1), TASK, found, weight_bits=(4,)),
        lambda model, found: top_eigenvalues(model, batches_of(1, -1), TASK, found, k=1),
    ],
    ids=["gauss_newton", "hutchinson", "perturbation", "eigenvalues"],
)
def test_an_expert_that_no_batch_reaches_is_named(
    measure: Callable[[nn.Module, tq.QuantizationPoints], object],
) -> None:
    model = build(lambda: Experts(False))
    everything = points(build(lambda: Experts(True)), exclude=())
    message = r"does not depend on layer experts\.2 in any batch; give batches that reach.*exclude=\['experts\.2'\]"
    with pytest.raises(tq.ModelError, match=message):
        measure(model, everything)


def test_gptq_rounds_an_expert_that_no_batch_reaches_to_the_nearest() -> None:
    model, bits = build(lambda: Experts(False)), {f"experts.{number}": (2, 4) for number in range(3)}
    everything = points(build(lambda: Experts(True)), exclude=())
    nearest, gptq = (
        round_weights(
            model, batches_of(1, 0, -1), TASK, everything, bits, weight_grid=tq.WeightGrid(rounding=rounding)
        ).layers
        for rounding in ("nearest", "gptq")
    )
    for num_bits in (2, 4):
        ours, wanted = gptq["experts.2"][num_bits], nearest["experts.2"][num_bits]
        assert torch.equal(ours.values, wanted.values)
        assert ours.output_error == wanted.output_error == pytest.approx(wanted.squared_error)
        for name in ("experts.0", "experts.1"):
            assert not torch.equal(gptq[name][num_bits].codes, nearest[name][num_bits].codes)


def test_a_measurement_does_not_stop_before_every_expert_was_reached() -> None:
    model = build(lambda: Experts(False))
    asked: list[int] = []

    def stop(curvature: tq.Curvature) -> bool:
        asked.append(curvature.samples)
        return True

    batches = batches_of(1, 1, -1, 1)
    found = tq.estimate_curvature(model, batches, TASK, points=points(model), num_probes=1, stop=stop)
    assert asked == [9]
    assert found.weights["experts.0"].trace > 0


@pytest.mark.parametrize("probes", ["exact", 2])
def test_a_saturated_batch_counts_zero(probes: int | str) -> None:
    """One image whose loss has a second derivative of exactly zero must not end the measurement of the others."""
    model = build(lambda: nn.Sequential(nn.Linear(2, CLASSES)))
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    certain = [(torch.full((1, 2), 1e6, dtype=torch.float64), torch.tensor([0]))]
    ordinary = [(x, torch.tensor([1]))]
    options = {"num_probes": probes, "activations": False, "seed": 0}
    alone = tq.estimate_curvature(model, ordinary, TASK, **options).weights["0"]
    both = tq.estimate_curvature(model, [*ordinary, *certain], TASK, **options).weights["0"]
    assert both.trace == pytest.approx(alone.trace / 2, rel=1e-12)
    assert alone.trace > 0
    with pytest.raises(tq.TracequantError, match="no curvature in the model's outputs in any batch"):
        tq.estimate_curvature(model, certain * 2, TASK, **options)
