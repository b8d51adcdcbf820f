"""Factors of the loss's Hessian: exact as a whole, and chosen so that a draw says nearly everything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from tracequant.curvature import output_factors
from tracequant.curvature.output_factors import OutputHessian, SeparateHessians
from tracequant.curvature.output_hessian import factor
from tracequant.curvature.output_lanczos import CoupledHessian

TASK = tq.ClassificationTask()


def softmax_hessian(logits: Tensor) -> OutputHessian:
    """The factor for the sum of the samples' cross-entropies."""
    task = tq.ClassificationTask(loss=lambda z, y: F.cross_entropy(z, y, reduction="sum"))
    shape = (len(logits), *logits.shape[2:])
    hessian = factor(
        task, logits.detach().clone().requires_grad_(), (None, torch.zeros(shape, dtype=torch.long)), torch.Generator()
    )
    assert isinstance(hessian, OutputHessian)
    return hessian


def outer(hessian: OutputHessian | SeparateHessians) -> Tensor:
    """Σ over columns of L_k L_kᵀ for each sample."""
    return sum(torch.einsum("ni,nj->nij", u[0].flatten(1), u[0].flatten(1)) for u, _ in hessian.columns())  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 60.0, 400.0])
def test_the_softmax_factor_is_a_factor(dtype: torch.dtype, scale: float) -> None:
    """Also where most probabilities underflow to zero, and where all are equal."""
    torch.manual_seed(0)
    logits = (scale * torch.randn(6, 7)).to(dtype)
    logits[-1] += torch.arange(7) * 0.01  # one sample that wavers in any case
    logits[-1] /= max(scale, 1.0)
    p = logits.softmax(1)
    expected = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    hessian = softmax_hessian(logits)
    assert len(list(hessian.columns())) == 7 - 1  # probabilities add up to one
    found = outer(hessian)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= 10 * torch.finfo(dtype).eps


def test_two_classes_take_one_draw() -> None:
    """An input that wavers between two classes has a Hessian of rank one: every draw gives it exactly."""
    torch.manual_seed(0)
    logits = torch.full((5, 4), -60.0, dtype=torch.float64)
    logits[torch.arange(5), torch.tensor([0, 1, 2, 3, 0])] = torch.rand(5, dtype=torch.float64)
    logits[torch.arange(5), torch.tensor([2, 3, 1, 0, 3])] = torch.rand(5, dtype=torch.float64)
    hessian, weight = softmax_hessian(logits), torch.randn(5, 4, dtype=torch.float64)
    p = logits.softmax(1)
    expected = (p * weight.square()).sum(1) - (p * weight).sum(1).square()
    for seed in range(4):
        ((u,), sign) = next(iter(hessian.draw(torch.Generator().manual_seed(seed))))
        assert sign == 1
        assert (u * weight).sum(1).square() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["softmax", "diagonal", "dense"])
def test_a_group_of_draws_is_exact(kind: str) -> None:
    """As many draws of a group as there are columns, rounded up to a power of two, leave no error."""
    torch.manual_seed(0)
    outputs = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    mixing = torch.randn(6, 6, dtype=torch.float64)
    losses = {
        "softmax": lambda z, y: F.cross_entropy(z, y),
        "diagonal": lambda z, y: F.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.3)),
        "dense": lambda z, y: (z @ mixing).square().square().mean(),
    }
    task = tq.ClassificationTask(loss=losses[kind])
    hessian = factor(task, outputs, (None, torch.tensor([0, 1, 2])), torch.Generator())
    assert hessian.kind == kind
    expected = outer(hessian)
    drawn = torch.zeros_like(expected)
    for number in range(8):
        for (u,), sign in hessian.draw(torch.Generator().manual_seed(5), number):
            drawn += sign * torch.einsum("ni,nj->nij", u, u) / 8
    assert torch.allclose(drawn, expected, rtol=1e-9, atol=1e-12)


def coupled_boxes(z: Tensor, axis: int) -> Tensor:
    """A loss whose Hessian has a block of both signs at every position."""
    mixing = torch.tensor([[1.0, 0.5, 0.2], [-0.3, 1.0, 0.4], [0.1, -0.6, 1.0]], dtype=z.dtype)
    mixed = torch.einsum("ij,njp->nip", mixing, z.movedim(axis, 1))
    return (mixed.square().square() - 3 * mixed.prod(1, keepdim=True)).mean()


def exact(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The Hessian of each sample's loss, `[N, D, D]`."""
    hessians = [torch.autograd.functional.hessian(loss, z[n : n + 1].detach()) for n in range(len(z))]
    return torch.stack([h.reshape(z[0].numel(), -1) for h in hessians]) / len(z)


@pytest.mark.parametrize("axis", [1, 2])
def test_blocks_at_every_position(axis: int) -> None:
    torch.manual_seed(0)
    outputs = torch.randn(2, 3, 50, dtype=torch.float64).movedim(1, axis).contiguous().requires_grad_()
    task = tq.ClassificationTask(loss=lambda z, y: coupled_boxes(z, axis))
    hessian = factor(task, outputs, (None, torch.zeros(2)), torch.Generator().manual_seed(1))
    assert isinstance(hessian, OutputHessian)
    assert (hessian.kind, hessian.axis) == ("blocks", axis)
    expected = exact(lambda z: coupled_boxes(z, axis), outputs)
    passes = list(hessian.columns())
    assert {sign for _, sign in passes} == {1.0, -1.0}
    found = sum(sign * torch.einsum("ni,nj->nij", u.flatten(1), u.flatten(1)) for (u,), sign in passes)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    # As many draws as there are columns at a position leave no error there.
    drawn = torch.zeros(2, 50, 3, 3, dtype=torch.float64)
    for number in range(4):
        for (u,), sign in hessian.draw(torch.Generator().manual_seed(5), number):
            at = u.movedim(axis, 2)
            drawn += sign * torch.einsum("npi,npj->npij", at, at) / 4
    shape = (2, 3, 50, 3, 50) if axis == 1 else (2, 50, 3, 50, 3)
    order = (0, 2, 4, 1, 3) if axis == 1 else (0, 1, 3, 2, 4)
    blocks = expected.view(shape).permute(order).diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)
    assert torch.allclose(drawn, blocks, rtol=1e-9, atol=1e-12)


def test_classes_may_be_on_the_last_axis() -> None:
    """As a language model has them."""
    torch.manual_seed(0)
    outputs = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    task = tq.ClassificationTask(loss=lambda z, y: F.cross_entropy(z.mT, y))
    hessian = factor(task, outputs, (None, torch.zeros(2, 7, dtype=torch.long)), torch.Generator())
    assert isinstance(hessian, OutputHessian)
    assert (hessian.kind, hessian.axis) == ("softmax", 2)
    p = outputs.detach().softmax(2)
    expected = (torch.diag_embed(p) - p.unsqueeze(3) * p.unsqueeze(2)) / 14
    drawn = torch.zeros_like(expected)
    for number in range(8):
        for (u,), sign in hessian.draw(torch.Generator().manual_seed(5), number):
            drawn += sign * torch.einsum("npi,npj->npij", u, u) / 8
    assert torch.allclose(drawn, expected, rtol=1e-9, atol=1e-12)


class Detector(tq.ClassificationTask):
    """Classes by softmax, boxes by squares (some of them negative), and one output that the loss does not bend in."""

    mixed = 0.0

    def loss(self, outputs: dict[str, Tensor], batch: object) -> dict[str, Tensor]:
        classes, boxes = outputs["classes"], outputs["boxes"]
        signs = torch.tensor([1.0, -1.0, 2.0], dtype=boxes.dtype)
        return {
            "class": F.cross_entropy(classes, torch.tensor([0, 3])),
            "box": (signs * boxes.square()).mean() + self.mixed * (classes[:, :3] * boxes).sum(),
            "linear": outputs["linear"].abs().mean(),
        }


def detector_outputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    widths = {"classes": 5, "boxes": 3, "linear": 2}
    return {
        name: torch.randn(2, width, generator=generator, dtype=torch.float64).requires_grad_()
        for name, width in widths.items()
    }


def test_each_of_several_outputs_has_a_shape_of_its_own() -> None:
    outputs, task = detector_outputs(), Detector()
    hessian = factor(task, outputs, None, torch.Generator().manual_seed(0))
    assert isinstance(hessian, SeparateHessians)
    assert hessian.kind == "softmax and diagonal"
    assert [id(tensor) for tensor in hessian.tensors] == [id(tensor) for tensor in outputs.values()]
    p = outputs["classes"].detach().softmax(1)
    softmax = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / 2
    boxes = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)) * 2 / 6
    expected = torch.stack([torch.block_diag(softmax[n], boxes, torch.zeros(2, 2)) for n in range(2)])

    def total(passes: list[tuple[list[Tensor], float]]) -> Tensor:
        rows = [(torch.cat(vectors, 1), sign) for vectors, sign in passes]
        return sum(sign * torch.einsum("ni,nj->nij", u, u) for u, sign in rows)  # type: ignore[return-value]

    assert torch.allclose(total(list(hessian.columns())), expected, rtol=1e-9, atol=1e-12)
    drawn = [list(hessian.draw(torch.Generator().manual_seed(seed))) for seed in range(2000)]
    assert {sign for passes in drawn for _, sign in passes} == {1.0, -1.0}
    mean = sum(total(passes) for passes in drawn) / len(drawn)
    assert (mean - expected).abs().max() < 0.05


def test_an_output_may_be_one_number_for_each_sample() -> None:
    """A tensor [N] has no axis of elements: its columns, and draws of any number, are as those of [N, 1]."""
    task = tq.CallableTask(lambda z, batch: (3 * z.square()).mean())
    z = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    hessian = factor(task, z, None, torch.Generator().manual_seed(0))
    expected = torch.full((4,), 6 / 4, dtype=torch.float64)
    passes = [list(hessian.columns())] + [list(hessian.draw(torch.Generator().manual_seed(0), n)) for n in (0, 1, 5)]
    for (vectors, sign), *others in passes:
        assert (sign, len(others)) == (1.0, 0)
        torch.testing.assert_close(vectors[0].square(), expected)


def test_outputs_that_the_loss_mixes_are_taken_together() -> None:
    task, outputs = Detector(), detector_outputs()
    task.mixed = 0.1
    hessian = factor(task, outputs, None, torch.Generator().manual_seed(0))
    assert isinstance(hessian, CoupledHessian)
    assert hessian.kind == "low-rank"
    found = sum(sign * torch.einsum("ni,nj->nij", torch.cat(u, 1), torch.cat(u, 1)) for u, sign in hessian.columns())
    mixed = torch.cat([torch.eye(3, dtype=torch.float64) * 0.1, torch.zeros(2, 3, dtype=torch.float64)])
    assert torch.allclose(found[:, :5, 5:8], mixed.expand(2, -1, -1), rtol=1e-9, atol=1e-9)


def test_draws_of_other_groups_are_new() -> None:
    """Beyond one group the signs come from other random numbers, so that more draws never repeat the first."""
    torch.manual_seed(0)
    model = nn.Linear(4, 100)
    batch = [(torch.randn(2, 4), torch.tensor([0, 1]))]
    values = tq.estimate_curvature(model, batch, TASK, num_probes=66, estimator="gauss_newton").weight_probes
    assert values is not None
    (row,) = values.values()
    assert row[64] != row[0]
    assert row[65] != row[1]


def test_standard_error_is_not_too_small() -> None:
    """Two stated errors hold the exact trace in 95 % of the cases, on a network of small layers too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9)).double()
    batch = [(torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 9)]
    truth = tq.estimate_curvature(model, batch, TASK, num_probes="exact", estimator="gauss_newton").weights
    within = total = 0
    for seed in range(30):
        found = tq.estimate_curvature(model, batch, TASK, num_probes=4, seed=seed, estimator="gauss_newton").weights
        for name, estimate in found.items():
            total += 1
            within += abs(estimate.trace - truth[name].trace) <= 2 * estimate.standard_error
    assert within / total >= 0.95


@pytest.mark.parametrize("positions", [(), (3,)])
def test_the_factor_is_exact_in_an_order_that_is_not_sorted(
    positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many classes only the likeliest are put first: every class is still there once, and L Lᵀ = diag(p) − p pᵀ."""
    monkeypatch.setattr(output_factors, "SORTED", 16)
    p = (2 * torch.randn(2, 150, *positions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).softmax(
        1
    )
    order = output_factors._leading_first(p)
    assert torch.equal(order.sort(1).values, torch.arange(150).view(1, -1, *([1] * len(positions))).expand_as(order))
    leading = p.gather(1, order)[:, : output_factors.GROUP]
    assert torch.equal(leading, p.sort(1, descending=True).values[:, : output_factors.GROUP])
    columns = [
        output_factors._cholesky_product(p, torch.zeros_like(p).index_fill_(1, torch.tensor(c), 1.0))
        for c in range(150)
    ]
    factor = torch.stack(columns, 2)
    found = torch.einsum("nik...,njk...->nij...", factor, factor)
    expected = torch.einsum("ni...,ij->nij...", p, torch.eye(150, dtype=torch.float64)) - torch.einsum(
        "ni...,nj...->nij...", p, p
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
