"""The stated error over probes against the true one, and the properties of the signs that it rests on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from tracequant.curvature.output_factors import GROUP, OutputHessian, draw_signs

TASK = tq.ClassificationTask()
SEEDS = 40


def conv1d() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Several convolutions and 30 classes, between all of which the outputs waver."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width, wider in ((4, 8), (8, 12), (12, 16)):
        layers += [nn.Conv1d(width, wider, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 30)).double()
    return model, (torch.randn(16, 4, 20, dtype=torch.float64), torch.arange(16) % 30)


def trained_conv1d() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Noisy prototypes of 20 classes, learned as far as they can be: few samples and few classes waver."""
    torch.manual_seed(0)
    prototypes = torch.randn(20, 3, 16, dtype=torch.float64)
    model = nn.Sequential(
        *(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 12, 3), nn.ReLU(), nn.Conv1d(12, 12, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(120, 20)),
    ).double()

    def draw() -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 20, (64,))
        return prototypes[labels] + 1.5 * torch.randn(64, 3, 16).double(), labels

    fit(model, draw, 150)
    inputs, labels = draw()
    return model.eval(), (inputs[:32], labels[:32])


def conv2d() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Handwritten digits, learned well: a few images waver, between three classes or four."""
    torch.manual_seed(2)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).double().unsqueeze(1) / 8 - 1, torch.from_numpy(digits.target)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    ).double()

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, len(images), (64,))
        return images[chosen], labels[chosen]

    fit(model, draw, 200)
    return model.eval(), (images[:48], labels[:48])


def fit(model: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], steps: int) -> None:
    """Train a little."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        inputs, labels = draw()
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def regression() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A diagonal output Hessian: all columns weigh the same."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 20)).double()
    return model, (torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 20, dtype=torch.float64))


@pytest.mark.parametrize("make", [conv1d, trained_conv1d, conv2d, regression])
def test_the_stated_error_is_right(make) -> None:  # type: ignore[no-untyped-def]
    """Two stated errors hold the exact trace in about 95 %, and no layer errs by more than is stated."""
    model, batch = make()
    task = tq.ClassificationTask(loss=F.mse_loss) if make is regression else TASK

    def measured(num_probes: int | str, seed: int = 0) -> dict[str, tq.TraceEstimate]:
        return tq.estimate_curvature(
            model, [batch], task, estimator="gauss_newton", num_probes=num_probes, seed=seed, activations=False
        ).weights

    truth = measured("exact")
    for num_probes in (2, 3, 4):
        draws = [measured(num_probes, seed) for seed in range(SEEDS)]
        beyond = [
            abs(draw[name].trace - truth[name].trace) > 2 * draw[name].standard_error
            for draw in draws
            for name in truth
        ]
        assert sum(beyond) / len(beyond) <= 0.06, num_probes
        for name, exact in truth.items():
            error = math.sqrt(sum((draw[name].trace - exact.trace) ** 2 for draw in draws) / SEEDS)
            stated = math.sqrt(sum(draw[name].standard_error ** 2 for draw in draws) / SEEDS)
            assert error <= 1.3 * stated, (num_probes, name)
            # Nor is it so large that it says nothing.
            assert stated <= 0.5 * exact.trace, (num_probes, name)


def signs(columns: int, rows: int, samples: int = 4000) -> Tensor:
    """`[rows, samples, columns]`, each row from a generator in the same state."""
    like = torch.empty(samples, columns, dtype=torch.float64)
    return torch.stack([draw_signs(like, torch.Generator().manual_seed(5), row) for row in range(rows)])


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_the_first_columns_cancel_and_every_other_pair_is_seen_or_not_by_chance(rows: int) -> None:
    drawn = signs(70, rows)
    products = drawn[..., :, None] * drawn[..., None, :]
    mean = products.mean(0)  # [samples, columns, columns]
    leading = mean[:, :rows, :rows] - torch.eye(rows, dtype=torch.float64)
    assert not leading.any()
    pairs = [(0, rows), (rows - 1, rows), (1, 63), (3, 64), (62, 69), (31, 32)]
    for j, k in pairs:
        error = mean[:, j, k].square().mean()
        stated = (products[:, :, j, k].var(0) / rows).mean()
        assert error == pytest.approx(1 / rows, rel=0.15)
        assert stated == pytest.approx(1 / rows, rel=0.15)


def test_three_rows_err_no_more_than_they_state() -> None:
    drawn = signs(8, 3)
    products = drawn[..., :, None] * drawn[..., None, :]
    error = products.mean(0).square().mean(0)
    stated = (products.var(0) / 3).mean(0)
    distinct = ~torch.eye(8, dtype=torch.bool)
    assert (error <= 1.15 * stated)[distinct].all()
    assert error[0, 7] == pytest.approx(1 / 3, rel=0.15)


def test_every_row_has_signs_of_its_own_and_positions_are_independent() -> None:
    like = torch.empty(3, 5, 4, 7)
    rows = [draw_signs(like, torch.Generator().manual_seed(0), row) for row in range(GROUP)]
    assert all(row.abs().eq(1).all() for row in rows)
    assert len({tuple(row.flatten().tolist()) for row in rows}) == GROUP
    # The same class at two positions: a pair that rows of one matrix over classes alone would never show.
    products = torch.stack(rows)[:, :, 2, 0, 0] * torch.stack(rows)[:, :, 2, 1, 3]
    assert (products.mean(0).abs() < 1).all()


def test_signs_lead_by_size() -> None:
    """The two largest eigenvalues, or elements, have products that cancel in two probes, wherever they stand."""
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(500, 9, generator=generator, dtype=torch.float64)
    h[:, 3], h[:, 8] = 5.0, 4.0
    hessian = OutputHessian("diagonal", [h], [h])
    rows = []
    for number in range(2):
        ((vectors, _),) = hessian.draw(torch.Generator().manual_seed(1), number)
        rows.append(vectors[0])
    assert (rows[0][:, 3] * rows[0][:, 8] + rows[1][:, 3] * rows[1][:, 8]).abs().max() < 1e-12
