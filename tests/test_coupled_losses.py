"""Losses that couple many outputs of a sample: Dice, focal over a softmax, CTC-like and contrastive losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from models import build, exact_hessian, labelled
from tracequant.core.errors import GaussNewtonError
from tracequant.curvature import passes
from tracequant.curvature.output_factors import draw_signs
from tracequant.curvature.output_hessian import factor
from tracequant.curvature.output_lanczos import CoupledHessian, lanczos, square_roots

Loss = Callable[[Tensor, Tensor], Tensor]
SAMPLES = 2


def dice(z: Tensor, y: Tensor) -> Tensor:
    """Soft Dice over the classes of every sample."""
    p, t = z.softmax(1), F.one_hot(y, z.shape[1]).movedim(-1, 1).to(z.dtype)
    return (1 - (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)).mean()


def squared_dice(z: Tensor, y: Tensor) -> Tensor:
    p, t = z.softmax(1), F.one_hot(y, z.shape[1]).movedim(-1, 1).to(z.dtype)
    return (1 - 2 * (p * t).sum((2, 3)) / (p.square().sum((2, 3)) + t.sum((2, 3)) + 1)).mean()


def binary_dice(z: Tensor, y: Tensor) -> Tensor:
    p, t = z.sigmoid().flatten(1), (y == 0).to(z.dtype).unsqueeze(1).expand_as(z).flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


def dice_and_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return dice(z, y) + F.cross_entropy(z, y)


def focal(z: Tensor, y: Tensor) -> Tensor:
    log_p = z.flatten(1).log_softmax(1)[:, 7]
    return ((1 - log_p.exp()).square() * -log_p).mean()


def paths(z: Tensor, y: Tensor) -> Tensor:
    """A CTC-like loss: minus the logarithm of the summed probability of all ways to stay in or leave class 0 once."""
    log_p = z.mean(3).log_softmax(1)  # time is the last axis
    stay, left = log_p[:, 0, 0], log_p[:, 1, 0]
    for t in range(1, log_p.shape[2]):
        left = torch.logaddexp(left, stay) + log_p[:, 1, t]
        stay = stay + log_p[:, 0, t]
    return -torch.logaddexp(stay, left).mean()


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    """The parts of a sample are told apart by their directions."""
    parts = F.normalize(z.flatten(2).mT, dim=2)
    return -(parts @ parts.mT / 0.2).log_softmax(2).diagonal(dim1=1, dim2=2).mean()


LOSSES: dict[str, Loss] = {
    loss.__name__: loss for loss in (dice, squared_dice, binary_dice, dice_and_cross_entropy, focal, paths, contrastive)
}


def outputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(SAMPLES, 3, 7, 8, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), torch.randint(0, 3, (SAMPLES, 7, 8), generator=generator)


def exact_blocks(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """The Hessian `[N, D, D]` of every sample's share of the loss."""
    width = z[0].numel()
    blocks = [
        exact_hessian(lambda q, n=n: loss(q.view_as(z[:1]), y[n : n + 1]), z[n].detach().flatten())  # type: ignore[misc]
        for n in range(len(z))
    ]
    return torch.stack([block.reshape(width, width) for block in blocks]) / len(z)


def factored(loss: Loss, z: Tensor, y: Tensor) -> CoupledHessian:
    hessian = factor(tq.ClassificationTask(loss=loss), z, (None, y), torch.Generator().manual_seed(1))
    assert isinstance(hessian, CoupledHessian)
    return hessian


def hadamard(width: int) -> Tensor:
    """Sign vectors of `width` elements whose outer products have the identity for their mean."""
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < width:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows[:, :width]


@pytest.mark.parametrize("name", ["dice", "focal", "paths"])
def test_draws_have_the_hessian_for_their_mean(name: str) -> None:
    """The bias of the recurrence is within the stated error; its trace has none."""
    z, y = outputs()
    hessian, expected = factored(LOSSES[name], z, y), exact_blocks(LOSSES[name], *outputs())
    width = z[0].numel()
    rows = hadamard(width)
    signs = draw_signs(torch.zeros(1, width, dtype=torch.float64), torch.Generator().manual_seed(0), 0)
    mean = torch.einsum("ndk,nk,nek->nde", hessian.vectors, hessian.values, hessian.vectors)
    if not hessian.complete:
        for row in rows:
            v = (row * signs).expand(SAMPLES, -1)
            v = v - torch.einsum("ndk,nk->nd", hessian.vectors, torch.einsum("ndk,nd->nk", hessian.vectors, v))
            basis, matrices, _ = lanczos(hessian.product, v, hessian.steps, hessian.vectors)
            for sign, u in zip((1.0, -1.0), square_roots(basis, matrices, v), strict=True):
                mean += sign * torch.einsum("ni,nj->nij", u, u) / len(rows)
    difference = torch.linalg.eigvalsh(mean - expected).abs().sum()
    size = torch.linalg.eigvalsh(expected).abs().sum()
    assert difference <= max(hessian.error, 1e-6) * size
    assert hessian.error < 0.1
    assert (mean - expected).diagonal(dim1=1, dim2=2).sum().abs() <= 1e-6 * size


@pytest.mark.parametrize("name", LOSSES)
def test_draws_are_what_the_recurrence_gives(name: str) -> None:
    """The mean of many draws has the Hessian's quadratic forms, for directions that it meets and those it does not."""
    z, y = outputs()
    hessian, expected = factored(LOSSES[name], z, y), exact_blocks(LOSSES[name], *outputs())
    w = torch.randn(6, z[0].numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = []
    for seed in range(100):
        value = torch.zeros(SAMPLES, 6, dtype=torch.float64)
        for (u,), sign in hessian.draw(torch.Generator().manual_seed(seed)):
            value += sign * torch.einsum("ni,ki->nk", u.flatten(1), w).square()
        values.append(value)
    drawn = torch.stack(values)
    standard_error = drawn.std(0) / math.sqrt(len(drawn))
    truth = torch.einsum("nij,ki,kj->nk", expected, w, w)
    scale = torch.linalg.eigvalsh(expected).abs().sum(1, keepdim=True)
    assert ((drawn.mean(0) - truth).abs() <= 4.5 * standard_error + 0.03 * scale).all()


def saddle(z: Tensor, y: Tensor) -> Tensor:
    """Rank two, of both signs, across all outputs of a sample."""
    a, b = z.flatten(1).sum(1), (z.flatten(1) * torch.linspace(-1, 1, z[0].numel(), dtype=z.dtype)).sum(1)
    return (a.square().square() / 100 + a - b.square()).mean()


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).double()


def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 7, 8, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(0, 3, (4, 7, 8), generator=generator))]


def exact_traces(loss: Loss) -> dict[str, float]:
    """Tr(Jᵀ H_L J) of both convolutions by torch.func."""
    model, ((x, y),) = conv_net(), images()
    z = model(x)
    blocks = exact_blocks(loss, z, y)
    traces = {}
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight.detach()

        def forward(w: Tensor, name: str = name) -> Tensor:
            return torch.func.functional_call(model, {f"{name}.weight": w}, (x,)).flatten(1)

        jacobian = torch.func.jacrev(forward)(weight).detach().flatten(2)
        traces[name] = float(torch.einsum("nij,nip,njp->", blocks, jacobian, jacobian))
    return traces


@pytest.mark.parametrize("loss", [saddle, paths])
def test_a_low_rank_gives_the_exact_sum(loss: Loss) -> None:
    curvature = tq.estimate_curvature(
        conv_net(), images(), tq.ClassificationTask(loss=loss), num_probes="exact", estimator="gauss_newton"
    )
    assert "low-rank output Hessian" in curvature.reason
    assert {name: e.trace for name, e in curvature.weights.items()} == pytest.approx(exact_traces(loss), rel=1e-8)


@pytest.mark.parametrize("name", ["dice", "binary_dice", "dice_and_cross_entropy"])
def test_traces_of_a_network(name: str) -> None:
    """Of both signs as the Hessian's are: the positive part of H_L minus its negative part."""
    loss, found = LOSSES[name], []
    for seed in range(12):
        curvature = tq.estimate_curvature(
            conv_net(),
            images(),
            tq.ClassificationTask(loss=loss),
            seed=seed,
            activations=False,
            estimator="gauss_newton",
        )
        found.append([curvature.weights[layer].trace for layer in ("0", "2")])
    assert "coupled output Hessian" in curvature.reason
    drawn = torch.tensor(found, dtype=torch.float64)
    truth = torch.tensor([exact_traces(loss)[layer] for layer in ("0", "2")], dtype=torch.float64)
    standard_error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - truth).abs() <= 3.5 * standard_error).all()
    # The second layer's trace, whose positive and negative parts do not cancel, is not lost in noise.
    assert standard_error[1] <= 0.4 * truth[1].abs()


def test_dice_of_the_whole_batch_is_refused_with_the_cure() -> None:
    def of_the_batch(z: Tensor, y: Tensor) -> Tensor:
        p, t = z.softmax(1), F.one_hot(y, z.shape[1]).movedim(-1, 1).to(z.dtype)
        return 1 - ((2 * (p * t).sum((0, 2, 3)) + 1) / (p.sum((0, 2, 3)) + t.sum((0, 2, 3)) + 1)).mean()

    task = tq.ClassificationTask(loss=of_the_batch)
    with pytest.raises(GaussNewtonError, match=r"samples of a batch interact in the loss.*for each sample"):
        tq.estimate_curvature(conv_net(), images(), task, estimator="gauss_newton")
    single = [(x.unsqueeze(0), y.unsqueeze(0)) for x, y in zip(*images()[0], strict=True)]
    assert tq.estimate_curvature(conv_net(), single, task, estimator="gauss_newton").samples == 4


def test_many_eigenvalues_have_no_exact_sum() -> None:
    z, y = outputs()
    with pytest.raises(tq.ModelError, match="give a number of probes"):
        list(factored(dice, z, y).columns())


@pytest.mark.parametrize(("error", "text"), [(0.004, None), (0.03, "not settled (to within 5%)")])
def test_a_recurrence_that_has_not_settled_is_in_the_reason(
    error: float, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsettled(task: Any, outputs: Tensor, batch: Any, generator: torch.Generator) -> CoupledHessian:
        values, vectors = outputs.new_zeros(len(outputs), 0), outputs.new_zeros(*outputs.shape, 0)
        return CoupledHessian([outputs], lambda v: v, values, vectors, complete=False, error=error)

    monkeypatch.setattr(passes, "factor", unsettled)
    model = build(lambda: nn.Sequential(nn.Linear(6, 5)))
    reason = tq.estimate_curvature(model, labelled(6), tq.ClassificationTask(), num_probes=1).reason
    assert ("settled" in reason) == (text is not None)
    assert text is None or text in reason
