"""Where samples lie inside a model, in batches that a first one does not tell about: against samples one at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import tracequant as tq
from models import CLASSES
from tracequant.curvature.sample_axis import by_sample, factors, find_outer

TASK = tq.ClassificationTask(
    forward=lambda model, inputs: model(*inputs) if isinstance(inputs, tuple) else model(inputs)
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.fc(self.rnn(packed)[1][0])


class Unpadded(nn.Module):
    """A linear layer on the tokens that a mask picks, added up for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.fc = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        rows = F.relu(self.token(x[mask]))
        sums = torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, mask.nonzero()[:, 0], rows)
        return self.fc(sums)


class PositionsFirst(nn.Module):
    """Linear layers over positions `[T, N, C]`; the last position is what the output reads."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.inner, self.fc = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.inner(x.transpose(0, 1).contiguous()))
        return self.fc(hidden[-1] if self.last else hidden.sum(0))


def lengths(*values: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda x: (x, torch.tensor(values))


def alone(inputs: object, n: int) -> object:
    return tuple(x[n : n + 1] for x in inputs) if isinstance(inputs, tuple) else inputs[n : n + 1]  # type: ignore[index]


CASES: dict[str, tuple[Callable[[], nn.Module], list[object]]] = {
    "packed": (Packed, [lengths(4, 4, 4, 4)(random(4, 4, 3)), lengths(4, 4, 2, 2)(random(4, 4, 3, seed=1))]),
    "packed, sums alike": (Packed, [lengths(3, 3, 3, 3, 4, 2)(random(6, 4, 3))]),
    "unpadded": (Unpadded, [lengths(4, 4, 4, 4)(random(4, 4, 3)), lengths(4, 4, 2, 2)(random(4, 4, 3, seed=1))]),
    "positions of other numbers": (lambda: PositionsFirst(False), [random(4, 1, 3), random(4, 4, 3), random(4, 8, 3)]),
    "last position": (lambda: PositionsFirst(True), [random(4, 5, 3), random(6, 7, 3)]),
    "first samples dead": (
        lambda: PositionsFirst(False),
        [torch.cat([torch.zeros(4, 3, 3, dtype=torch.float64), random(2, 3, 3)]), random(6, 3, 3, seed=2)],
    ),
    "one sample dead": (
        lambda: PositionsFirst(True),
        [torch.cat([torch.zeros(1, 3, 3, dtype=torch.float64), random(5, 3, 3)])],
    ),
}


@pytest.mark.filterwarnings("ignore:layers .* are read by operations")
@pytest.mark.parametrize("case", CASES)
def test_every_batch_is_what_its_samples_are_alone(case: str) -> None:
    make, batches = CASES[case]
    torch.manual_seed(0)
    model = make().double().eval()
    if "dead" in case:
        with torch.no_grad():
            model.inner.bias.fill_(-0.5)
    labelled = [(x, torch.arange(len(x[0] if isinstance(x, tuple) else x)) % CLASSES) for x in batches]
    singles = [(alone(x, n), y[n : n + 1]) for x, y in labelled for n in range(len(y))]
    options = {"num_probes": "exact", "estimator": "gauss_newton"}
    expected = tq.estimate_curvature(model, singles, TASK, **options)
    found = tq.estimate_curvature(model, labelled, TASK, points=expected.points, activations=False, **options)
    for name, values in expected.weight_values.items():
        assert found.weight_values[name] == pytest.approx(values, rel=1e-9, abs=1e-14)


class Masks(nn.Module):
    """One weight as it is and transposed: convolutions that must not be added up as if they were one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 2, 3), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        return self.fc(F.relu(F.conv2d(x, w) + F.conv2d(x, w.transpose(2, 3))).mean((2, 3)))


class TwoWeights(nn.Module):
    """A product of a weight with itself, which has no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = nn.Linear(3, 4, bias=False), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(x @ self.inner.weight.T @ (self.inner.weight @ self.inner.weight.T)))


@pytest.mark.filterwarnings("ignore:layers .* are read by operations")
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("make", "shape"), [(Masks, (2, 4, 5)), (TwoWeights, (3,))])
def test_weights_that_are_read_in_other_ways_too(make: type[nn.Module], shape: tuple[int, ...], samples: int) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    x = random(samples, *shape)
    y = torch.arange(samples) % CLASSES
    name = "conv" if make is Masks else "inner"
    curvature = tq.estimate_curvature(model, [(x, y)], TASK, num_probes="exact", estimator="gauss_newton")
    weight = model.get_submodule(name).weight
    z = model(x)
    p = z.detach().softmax(1)
    expected = 0.0
    for n in range(samples):
        rows = torch.stack([torch.autograd.grad(c, weight, retain_graph=True)[0].flatten() for c in z[n]])
        expected += float(torch.einsum("ci,cd,di->", rows, torch.diag(p[n]) - torch.outer(p[n], p[n]), rows)) / samples
    assert curvature.weights[name].trace == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [2, 5, 64])
@pytest.mark.parametrize("outer", [1, 3, "all"])
def test_rows_say_whose_they_are(outer: int | str, samples: int) -> None:
    each, number = 6, 6 if outer == "all" else outer
    rows = random(number, samples, each // number, 2).reshape(-1, 2)
    scaled = (rows.view(number, samples, -1) * factors(samples)[None, :, None]).reshape(-1, 2)
    assert find_outer(rows, scaled, samples) == (outer, True)
    arranged = by_sample(rows, samples, outer)  # type: ignore[arg-type]
    assert torch.equal(by_sample(scaled, samples, outer), arranged * factors(samples)[:, None, None])  # type: ignore[arg-type]
    assert find_outer(rows, scaled.flip(0), samples)[0] is None
    assert find_outer(torch.zeros_like(rows), torch.zeros_like(rows), samples) == (1, False)
    one = torch.zeros_like(rows)
    one[0] = 1
    assert find_outer(one, one, samples) == (1, False)  # the first row is the first sample's in every order


@pytest.mark.parametrize("gap", [12.0, 17.0, 30.0])
@pytest.mark.parametrize("classes", [10, 1000])
def test_confident_batches_are_those_of_a_softmax(gap: float, classes: int) -> None:
    """In float32 nearly all of H_L is rounding there."""
    torch.manual_seed(0)
    model = nn.Linear(4, classes, bias=False).eval()
    x = torch.randn(8, 4)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[:8] = torch.linalg.pinv(x)[:, :8].T[:8] * gap if classes >= 8 else 0
    for size in (1, 4, 8):
        batches = [(x[i : i + size], torch.zeros(size).long()) for i in range(0, 8, size)]
        curvature = tq.estimate_curvature(model, batches, TASK, estimator="gauss_newton")
        assert "softmax" in curvature.reason
        assert "coupled" not in curvature.reason
