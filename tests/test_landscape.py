"""Eigenvectors and loss landscapes, against the exact Hessian of small models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from tracequant.core.curvature import Landscapes
from tracequant.curvature.spectrum import top_eigenvectors
from tracequant.measure.landscape import loss_landscapes

Batch = tuple[Tensor, Tensor]


class SquaredError(tq.Task):
    """Half the squared error of a linear map, whose Hessian is known; counts how often the model is asked."""

    calls = 0
    stop_after: int | None = None

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return 0.5 * (outputs - batch[1]).square().sum(1).mean()

    def metric(self, outputs: Tensor, batch: Batch) -> float:
        return 0.0

    def batch_size(self, batch: Batch) -> int:
        return len(batch[1])


def regression() -> tuple[nn.Module, list[Batch], Tensor]:
    """A layer of 2 x 4 weights at their optimum, data with noise, and the exact Hessian `[8, 8]` of the mean loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.5])
    y = torch.randn(24, 2, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    moments = x.T @ x / len(x)
    return model, [(x[:16], y[:16]), (x[16:], y[16:])], torch.block_diag(moments, moments)


def test_eigenvectors_are_those_of_the_exact_hessian() -> None:
    """A network whose block has eight eigenvalues of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    batches = [(torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3)]
    task = tq.ClassificationTask()
    points = tq.discover(model, batches, task)

    def loss(weight: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {"0.weight": weight.view(2, 4)}, batches[0][0])
        return F.cross_entropy(logits, batches[0][1])

    hessian = torch.autograd.functional.hessian(loss, model[0].weight.detach().flatten())
    true, vectors = torch.linalg.eigh(hessian)
    order = true.abs().argsort(descending=True)[:3]
    values, found = top_eigenvectors(model, batches, task, points, layer="0", k=3, tolerance=1e-9)
    assert found.shape == (3, 2, 4)
    assert values == pytest.approx(true[order].tolist(), rel=1e-8)
    alignment = (found.flatten(1) @ vectors[:, order]).abs()
    torch.testing.assert_close(alignment, torch.eye(3, dtype=torch.float64), atol=1e-7, rtol=0)
    with pytest.raises(tq.ModelError, match="no layer 'nowhere'"):
        top_eigenvectors(model, batches, task, points, layer="nowhere")
    with pytest.raises(tq.ModelError, match="has 8 weights: k must be from 1 to that, got 9"):
        top_eigenvectors(model, batches, task, points, layer="0", k=9)


def test_a_multiple_of_the_identity_gets_orthogonal_directions() -> None:
    """Every direction is an eigenvector."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    x = math.sqrt(3) * torch.eye(3, dtype=torch.float64)
    batches, task = [(x, torch.zeros(3, 1, dtype=torch.float64))], SquaredError()
    points = tq.discover(model, batches, task)
    values, vectors = top_eigenvectors(model, batches, task, points, layer="0", k=2)
    assert values == pytest.approx((1.0, 1.0))
    torch.testing.assert_close(vectors.flatten(1) @ vectors.flatten(1).T, torch.eye(2, dtype=torch.float64))


def test_the_landscape_of_a_quadratic_is_that_quadratic() -> None:
    model, batches, hessian = regression()
    task = SquaredError()
    points = tq.discover(model, batches, task)
    before = model[0].weight.detach().clone()
    centre = task.evaluate(model, batches).loss

    found = loss_landscapes(model, batches, task, points, layers=["0"], size=5, seed=3)

    (landscape,) = found.layers
    # Both outputs have the same moments, so that every eigenvalue is there twice.
    true = torch.linalg.eigvalsh(hessian).flip(0)[:2].tolist()
    assert landscape.eigenvalues == pytest.approx(true, rel=1e-3)
    # By default as far as to where the quadratic term equals the loss.
    assert found.steps == pytest.approx([math.sqrt(2 * centre / true[0]) * i / 2 for i in (-2, -1, 0, 1, 2)], rel=1e-3)
    expected = [[centre + 0.5 * (true[0] * a * a + true[1] * b * b) for b in found.steps] for a in found.steps]
    torch.testing.assert_close(torch.tensor(landscape.losses), torch.tensor(expected), rtol=1e-3, atol=0)
    assert landscape.losses[2][2] == pytest.approx(centre, rel=1e-12)
    assert min(min(row) for row in landscape.losses) == landscape.losses[2][2]
    assert found.samples == 24
    assert torch.equal(model[0].weight, before)


def test_all_layers_have_the_same_grid() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [(torch.randn(8, 4), torch.arange(8) % 3)]
    task = tq.ClassificationTask()
    points = tq.discover(model, batches, task)
    found = loss_landscapes(model, batches, task, points, layers=["2", "0"], size=3, radius=0.25)
    assert found.steps == (-0.25, 0.0, 0.25)
    assert [own.layer for own in found.layers] == ["2", "0"]
    assert found.layers[0].losses[1][1] == found.layers[1].losses[1][1] == task.evaluate(model, batches).loss


def test_an_interrupted_landscape_goes_on_after_the_last_row(tmp_path: Path) -> None:
    model, batches, _ = regression()
    points = tq.discover(model, batches, SquaredError())
    whole = SquaredError()
    expected = loss_landscapes(model, batches, whole, points, layers=["0"], size=5)
    row = 5 * len(batches)
    path = tmp_path / "landscape.json"
    first = SquaredError()
    first.stop_after = whole.calls - 3 * row + 3  # in the middle of the third row
    with pytest.raises(KeyboardInterrupt):
        loss_landscapes(model, batches, first, points, layers=["0"], size=5, checkpoint=path)
    partial = Landscapes.load(path)
    assert [len(own.losses) for own in partial.layers] == [2]
    assert not partial.complete

    second = SquaredError()
    found = loss_landscapes(model, batches, second, points, layers=["0"], size=5, checkpoint=path)

    assert found == expected == Landscapes.load(path)
    assert second.calls == 3 * row + len(batches)  # and once at the centre, to see that the loss is the same
    assert list(tmp_path.iterdir()) == [path]  # the directions are gone


def test_what_another_request_has_left_is_not_taken(tmp_path: Path) -> None:
    model, batches, _ = regression()
    task, path = SquaredError(), tmp_path / "landscape.json"
    points = tq.discover(model, batches, task)
    loss_landscapes(model, batches, task, points, layers=["0"], size=3, radius=1.0, checkpoint=path)
    other = [(x + 1, y) for x, y in batches]
    found = loss_landscapes(model, other, task, points, layers=["0"], size=3, radius=1.0, checkpoint=path)
    assert found == loss_landscapes(model, other, task, points, layers=["0"], size=3, radius=1.0)
    path.write_text("{")
    assert loss_landscapes(model, other, task, points, layers=["0"], size=3, radius=1.0, checkpoint=path) == found


def test_a_loss_that_overflows_is_written_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
    task, path = SquaredError(), tmp_path / "landscape.json"
    points = tq.discover(model, batches, task)
    found = loss_landscapes(model, batches, task, points, layers=["0"], size=3, radius=1e30, checkpoint=path)
    losses = found.layers[0].losses
    assert losses[0][0] == math.inf
    assert losses[1][1] == pytest.approx(1.25)
    assert Landscapes.load(path) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "an odd number of points to a side, 3 or more, got 4"),
        ({"size": 1}, "got 1"),
        ({"radius": 0.0}, r"radius of a landscape must be positive, got 0\.0"),
        ({"layers": []}, "needs a layer"),
        ({"layers": ["1"]}, "no layer '1'; layers are 0"),
    ],
)
def test_bad_requests(options: dict[str, object], message: str) -> None:
    model, batches, _ = regression()
    task = SquaredError()
    points = tq.discover(model, batches, task)
    with pytest.raises(tq.ModelError, match=message):
        loss_landscapes(model, batches, task, points, **({"layers": ["0"]} | options))
