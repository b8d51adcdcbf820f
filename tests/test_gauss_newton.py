"""Gauss-Newton traces against exact Hessians from `torch.func`, in float64: the same for piecewise linear networks."""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

import tracequant as tq
from models import (
    attention_net,
    build,
    exact_hessian,
    images,
    residual_net,
    shared_head_net,
    snapshot,
    tied_net,
    token_batch,
)
from tracequant.core.errors import SecondDerivativeError
from tracequant.curvature import gradient_norms, matrix_norms
from tracequant.curvature.output_hessian import factor
from tracequant.curvature.sweep import Rows, Sweep

CLASSES = 4
TASK = tq.ClassificationTask()


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64 with random parameters and BatchNorm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model


class SharedTwice(nn.Module):
    """One linear layer called on two views of the input, as a detector's head is on pyramid levels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.layer(x)) + F.relu(self.layer(x.flip(1))))


class Recurrent(nn.Module):
    """A linear layer called on its own output, behind another: the network is quadratic in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.layer(F.relu(self.layer(F.relu(self.first(x)))))))


class Folded(nn.Module):
    """A linear layer applied to two crops of each image as rows of one batch, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.inner = nn.Linear(3 * 4, 5)
        self.outer = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        crops = torch.stack([x[:, :, :3, :3], x[:, :, 1:, 1:]], 1).flatten(0, 1)
        rows = F.relu(self.conv(crops)).flatten(1)
        return self.outer(F.relu(self.inner(rows)).view(len(x), -1))


class PositionsTwice(nn.Module):
    """A linear layer over positions, called twice, whose output is overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.relu_(self.inner(F.relu_(self.inner(x)))).flatten(1))


def tokens() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(7, 3, padding_idx=2), nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, CLASSES)
    )


def head(features: int) -> list[nn.Module]:
    return [nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(features, CLASSES)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), *head(64)), seeded(3, 2, 4, 4)),
    "groups, stride, dilation, no bias": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, padding=2, dilation=2, groups=2, bias=False), *head(54)),
        seeded(3, 4, 5, 6),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU6(), nn.Conv2d(3, 2, 1), *head(8)),
        seeded(2, 3, 4, 4),
    ),
    "same padding": (lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 5), padding="same"), *head(36)), seeded(2, 2, 3, 4)),
    "circular": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), *head(18)),
        seeded(2, 2, 3, 3),
    ),
    "reflect": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 3, padding=2, padding_mode="reflect"), *head(14)),
        seeded(2, 2, 5),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.LeakyReLU(0.1), *head(9)), seeded(3, 2, 7)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2, padding=1), nn.MaxPool3d(2), *head(16)), seeded(2, 1, 3, 3, 3)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2, padding=1, output_padding=1), *head(108)),
        seeded(2, 2, 3, 3),
    ),
    "transposed groups": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 4, 3, stride=2, groups=2, dilation=2), *head(36)),
        seeded(3, 4, 3),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6, bias=False), *head(6)), seeded(4, 5)),
    "linear over positions": (lambda: nn.Sequential(nn.Linear(3, 4), *head(24)), seeded(3, 2, 3, 3)),
    "linear over positions, no bias": (
        lambda: nn.Sequential(nn.Linear(3, 4, bias=False), *head(24)),
        seeded(3, 2, 3, 3),
    ),
    "linear over positions, called twice": (PositionsTwice, seeded(3, 2, 3)),
    "shared layer": (SharedTwice, seeded(3, 5)),
    "folded batch": (Folded, seeded(3, 2, 4, 4)),
    "embedding": (tokens, torch.tensor([[0, 2, 2, 6, 0], [1, 1, 1, 5, 2], [3, 4, 5, 6, 0]])),
}  # fmt: skip


def oscillating(z: Tensor, y: Tensor) -> Tensor:
    """An elementwise loss whose second derivative has both signs."""
    return (torch.sin(2 * z) + 0.1 * z**3).sum(1).mean()


def coupled(z: Tensor, y: Tensor) -> Tensor:
    """A loss whose Hessian is neither diagonal nor a softmax's, and indefinite."""
    return ((z[:, :-1] * z[:, 1:]).sum(1) + z.square().sum(1).sqrt()).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    "weighted": lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=z.dtype)),
    "squared": lambda z, y: F.mse_loss(z, F.one_hot(y, CLASSES).to(z.dtype)),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, CLASSES).to(z.dtype)),
    "smooth L1": lambda z, y: F.smooth_l1_loss(z, F.one_hot(y, CLASSES).to(z.dtype), beta=2.0),
    "both signs": oscillating,
    "coupled": coupled,
}
KINDS = {
    "squared": "diagonal",
    "binary": "diagonal",
    "smooth L1": "diagonal",
    "both signs": "diagonal",
    "coupled": "dense",
}


def exact_weight_traces(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """Traces of all Hessian blocks by `torch.func.hessian`."""
    traces = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:

            def value(w: Tensor, name: str = name) -> Tensor:
                return loss(functional_call(model, {name: w}, (x,)), y)

            block = exact_hessian(value, parameter.detach())
            traces[name.removesuffix(".weight")] = torch.trace(block).item()
    return traces


def exact(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tq.Curvature:
    task = tq.ClassificationTask(loss=loss)
    return tq.estimate_curvature(model, [(x, y)], task, num_probes="exact", estimator="gauss_newton")


def labels(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % CLASSES


@pytest.mark.parametrize("network", NETWORKS)
def test_weight_traces_equal_the_hessians(network: str) -> None:
    make, x = NETWORKS[network]
    model = randomized(make())
    y = labels(x)
    curvature = exact(model, x, y, F.cross_entropy)
    expected = exact_weight_traces(model, x, y, F.cross_entropy)
    assert {name: e.trace for name, e in curvature.weights.items()} == pytest.approx(expected, rel=1e-9)
    assert "a backward pass for each sample" not in curvature.reason
    assert all(e.standard_error == 0 and e.samples == len(x) for e in curvature.weights.values())


class Cancelling(nn.Module):
    """A layer called three times whose gradients cancel: what is left of them is rounding, in any order another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4, bias=False)
        self.other = nn.Linear(8, 4)
        self.outer = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, 0], x[:, 1]
        nothing = self.inner(first) + self.inner(second) - self.inner(first + second)
        return self.outer(F.relu(self.other(first) + nothing))


def test_rounding_of_a_gradient_that_cancels_is_no_difference() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 8)
    curvature = exact(Cancelling().eval(), x, labels(x), F.cross_entropy)
    assert "a backward pass for each sample" not in curvature.reason
    assert 0 <= curvature.weights["inner"].trace < 1e-9 * curvature.weights["other"].trace


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str) -> None:
    make, x = NETWORKS["linear"]
    model = randomized(make())
    curvature = exact(model, x, labels(x), LOSSES[loss])
    expected = exact_weight_traces(model, x, labels(x), LOSSES[loss])
    assert {name: e.trace for name, e in curvature.weights.items()} == pytest.approx(expected, rel=1e-8)
    assert f"{KINDS.get(loss, 'softmax')} output Hessian" in curvature.reason


@pytest.mark.parametrize("loss", ["cross-entropy", "both signs", "coupled"])
def test_draws_agree_with_the_exact_sum_within_their_error(loss: str) -> None:
    make, x = NETWORKS["conv"]
    model = randomized(make())
    batch, task = [(x, labels(x))], tq.ClassificationTask(loss=LOSSES[loss])
    truth = exact(model, x, labels(x), LOSSES[loss])
    drawn = tq.estimate_curvature(model, batch, task, num_probes=400, seed=3, estimator="gauss_newton")
    for family in ("weights", "activations"):
        for name, estimate in getattr(drawn, family).items():
            # Of the last layer's gradient with a diagonal output Hessian the norm is the same for all signs.
            assert abs(estimate.trace - getattr(truth, family)[name].trace) <= 5 * estimate.standard_error + 1e-9
            assert estimate.standard_error < 0.5 * abs(estimate.trace) + 0.05


@pytest.mark.parametrize("network", ["conv", "depthwise", "conv1d", "linear", "transposed"])
def test_activation_traces_equal_the_hessians(network: str) -> None:
    """The trace over an input's own activation, averaged over inputs."""
    make, x = NETWORKS[network]
    model = randomized(make())
    y = labels(x)
    curvature = exact(model, x, y, F.cross_entropy)
    for index in range(len(model)):
        if str(index) not in curvature.activations:
            continue
        # In-place ReLUs would overwrite the point at which the Hessian is taken.
        tail = copy.deepcopy(model[index:])
        for module in tail.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        values = model[:index](x.clone()).detach()
        traces = [
            torch.trace(exact_hessian(lambda a: F.cross_entropy(tail(a[None]), y[n : n + 1]), values[n])).item()  # noqa: B023
            for n in range(len(x))
        ]
        estimate = curvature.activations[str(index)]
        assert estimate.trace == pytest.approx(sum(traces) / len(traces), rel=1e-9)
        assert estimate.numel == values[0].numel()


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_both_forms_of_the_squared_norm(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, d = seeded(3, 2, 5, 7), seeded(3, 2, 4, 7, seed=1)
    expected = torch.einsum("ngot,ngkt->ngok", d, a).square().sum((1, 2, 3))
    if form == "direct":  # 7 positions and a wide gradient would favour the Gram form; few features favour this one
        a, d = a[:, :, :2], d[:, :, :2]
        expected = torch.einsum("ngot,ngkt->ngok", d, a).square().sum((1, 2, 3))
    else:
        a, d = a.repeat(1, 1, 8, 1), d.repeat(1, 1, 8, 1)
        expected = 64 * expected
    assert torch.allclose(matrix_norms.product_norms(a, d), expected, rtol=1e-12)


def test_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    make, x = NETWORKS["groups, stride, dilation, no bias"]
    whole = exact(randomized(make()), x, labels(x), F.cross_entropy)
    monkeypatch.setattr(gradient_norms, "CHUNK_ELEMENTS", 1)
    pieces = exact(randomized(make()), x, labels(x), F.cross_entropy)
    for name in whole.weights:
        assert pieces.weights[name].trace == pytest.approx(whole.weights[name].trace, rel=1e-12)


def test_batches_and_their_sizes_do_not_matter() -> None:
    make, x = NETWORKS["conv"]
    model, x, y = randomized(make()), seeded(6, 2, 4, 4), torch.arange(6) % CLASSES
    whole = exact(model, x, y, F.cross_entropy)
    parts = [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]
    split = tq.estimate_curvature(model, parts, TASK, num_probes="exact", estimator="gauss_newton")
    for family in ("weights", "activations"):
        for name, estimate in getattr(whole, family).items():
            other = getattr(split, family)[name]
            assert other.trace == pytest.approx(estimate.trace, rel=1e-12)
            assert other.sampling_error == pytest.approx(estimate.sampling_error, rel=1e-9)


class Branches(nn.Module):
    """The input through a body, added to itself or laid beside it along the channels."""

    def __init__(self, body: nn.Module, beside: bool) -> None:
        super().__init__()
        self.body, self.beside = body, beside

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat([x, y], 1) if self.beside else x + y


def random_body(draw: Callable[[st.SearchStrategy], int], channels: int, size: int, depth: int) -> tuple:
    """A few random convolutions, bends, pools and branches; with the channels and the size that come out."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["conv", "conv", "grouped", "add", "beside", "pool"]))
        if kind in ("add", "beside") and depth:
            inner, out, _ = random_body(draw, channels, 0, depth - 1)
            if kind == "add" and out != channels:
                inner = nn.Sequential(inner, nn.Conv2d(out, channels, 1))
            layers.append(Branches(inner, kind == "beside"))
            channels = channels + out if kind == "beside" else channels
        elif kind == "pool" and size > 1:
            layers.append(draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2)])))
            size //= 2
        else:
            groups = channels if kind == "grouped" else 1
            out = groups * draw(st.integers(1, 2))
            # In a branch the size must stay.
            padding, stride, kernel = (1, 1, 3)
            if size:
                padding, stride = draw(st.integers(0, 1)), draw(st.integers(1, 2))
                kernel = draw(st.integers(1, min(3, size + 2 * padding)))
                size = (size + 2 * padding - kernel) // stride + 1
            layers.append(nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=draw(st.booleans())))
            bends = [
                nn.ReLU(),
                nn.ReLU(inplace=True),
                nn.LeakyReLU(0.2),
                nn.PReLU(out),
                nn.ReLU6(),
                nn.BatchNorm2d(out),
            ]
            layers.append(draw(st.sampled_from(bends)))
            channels = out
    return nn.Sequential(*layers), channels, size


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_random_relu_networks(data: st.DataObject) -> None:
    """Branches that are added or laid side by side, groups, pools; losses with a softmax, a diagonal, or neither."""
    size = data.draw(st.integers(3, 5))
    x = seeded(2, 2, size, size, seed=data.draw(st.integers(0, 99)))
    body, channels, size = random_body(data.draw, 2, size, 2)
    model = randomized(nn.Sequential(body, nn.Flatten(), nn.Linear(channels * size * size, CLASSES)))
    loss = LOSSES[data.draw(st.sampled_from(["cross-entropy", "smoothed", "squared", "binary", "coupled"]))]
    expected = exact_weight_traces(model, x, labels(x), loss)
    hypothesis.assume(all(expected.values()))  # not all units of a layer are dead
    found = exact(model, x, labels(x), loss)
    assert {name: e.trace for name, e in found.weights.items()} == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert "a backward pass for each sample" not in found.reason


def test_attention_projections_are_layers_like_others() -> None:
    """The function reads the weights itself, positions first; here against Gauss-Newton by Jacobians."""
    model = attention_net()
    batch = (seeded(2, 3, 3), torch.tensor([0, 1]))
    curvature = tq.estimate_curvature(model, [batch], TASK, num_probes="exact", estimator="gauss_newton")
    assert "a backward pass for each sample" not in curvature.reason
    for name, _ in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in curvature.weights:
            assert curvature.weights[layer].trace == pytest.approx(jacobian_trace(model, name, *batch), rel=1e-9)


def jacobian_trace(model: nn.Module, name: str, x: Tensor, y: Tensor) -> float:
    """Tr(G) = Tr(Jᵀ H_L J), the Jacobian formed."""
    parameter = model.get_parameter(name).detach()

    def outputs(w: Tensor) -> Tensor:
        return functional_call(model, {name: w}, (x,))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.func.jacrev(outputs)(parameter).flatten(2)
    z = outputs(parameter)
    p = z.softmax(1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nci,ncd,ndi->", jacobian, blocks, jacobian).item() / len(x)


def test_auto_takes_gauss_newton_where_it_is_exact_and_says_so() -> None:
    make, x = NETWORKS["conv"]
    curvature = tq.estimate_curvature(randomized(make()), [(x, labels(x))], TASK)
    assert curvature.estimator == "gauss_newton"
    assert "these Gauss-Newton traces equal the Hessian's" in curvature.reason


def test_auto_notices_a_layer_applied_to_its_own_output() -> None:
    model, x = randomized(Recurrent()), seeded(4, 5)
    curvature = tq.estimate_curvature(model, [(x, labels(x))], TASK, num_probes=1)
    assert curvature.estimator == "gauss_newton"
    assert "not the Hessian's: a layer applied to its own output bends" in curvature.reason
    slow = exact(model, x, labels(x), F.cross_entropy)
    assert slow.weights["layer"].trace == pytest.approx(jacobian_trace(model, "layer.weight", x, labels(x)), rel=1e-9)


class FunctionalGelu(nn.Module):
    """Bends in a function that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


def test_auto_is_not_fooled_by_functional_calls() -> None:
    x = seeded(4, 5)
    curvature = tq.estimate_curvature(randomized(FunctionalGelu()), [(x, labels(x))], TASK, num_probes=1)
    assert curvature.estimator == "gauss_newton"
    assert "not the Hessian's: GELU bends behind 1 of 2 layers" in curvature.reason


def test_auto_names_the_operation_that_bends() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, CLASSES)))
    x = seeded(4, 5)
    curvature = tq.estimate_curvature(model, [(x, labels(x))], TASK, num_probes=1)
    assert curvature.estimator == "gauss_newton"
    assert "SiLU bends behind 1 of 2 layers" in curvature.reason


@pytest.mark.parametrize("make", [residual_net, shared_head_net, tied_net])
def test_the_model_comes_back_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = make()
    batches = token_or_image(model)
    model.train()
    before, rng = snapshot(model), torch.get_rng_state()
    for method in ("gauss_newton", "auto"):
        tq.estimate_curvature(model, batches, TASK, estimator=method)
        assert snapshot(model) == before
        assert torch.equal(rng, torch.get_rng_state())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def token_or_image(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        return [token_batch()]
    return images((2, 2))


def test_same_seed_same_result() -> None:
    make, x = NETWORKS["conv"]
    model, batch = randomized(make()), [(x, labels(x))]
    first = tq.estimate_curvature(model, batch, TASK, seed=5)
    assert tq.estimate_curvature(model, batch, TASK, seed=5) == first
    assert tq.estimate_curvature(model, batch, TASK, seed=6) != first


def test_idle_layer_is_named() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES)))
    model.add_module("spare", nn.Identity())
    model.spare.add_module("idle", nn.Linear(2, 2))
    x = seeded(3, 5)
    with pytest.raises(tq.ModelError, match=r"layer spare\.idle in any batch;.* with exclude=\['spare\.idle'\]$"):
        exact(model, x, labels(x), F.cross_entropy)


class Optional(nn.Module):
    """A layer whose second input is there for some batches only, as a head without proposals."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.extra = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + (self.extra(x + 1) if float(x[0, 0]) > 0 else 0)


def test_a_tensor_that_some_batches_never_reach_counts_as_zero_there() -> None:
    model, x = randomized(Optional()), seeded(2, 5)
    x[:, 0] = torch.tensor([1.0, -1.0])
    batches = [(x[:1], labels(x)[:1]), (x[1:], labels(x)[1:])]
    both, first = (
        tq.estimate_curvature(model, chosen, TASK, num_probes="exact", estimator="gauss_newton", weights=False)
        for chosen in (batches, batches[:1])
    )
    assert both.activations["extra"].trace == pytest.approx(first.activations["extra"].trace / 2)


class BatchCoupled(nn.Module):
    """Subtracts the batch's mean, so that samples are not independent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(F.relu(h - h.mean(0)))


class SequenceFirst(nn.Module):
    """Positions along the first axis, samples along the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.transpose(0, 1)))).sum(0)


def test_samples_that_interact_are_refused() -> None:
    x = seeded(3, 5)
    with pytest.raises(tq.ModelError, match="one sample"):
        exact(randomized(BatchCoupled()), x, labels(x), F.cross_entropy)


@pytest.mark.parametrize("positions", [1, 2, 3, 6])
def test_positions_may_come_before_samples(positions: int) -> None:
    model, x = randomized(SequenceFirst()), seeded(3, positions, 5)
    curvature = exact(model, x, labels(x), F.cross_entropy)
    expected = exact_weight_traces(model, x, labels(x), F.cross_entropy)
    assert {name: e.trace for name, e in curvature.weights.items()} == pytest.approx(expected, rel=1e-9)
    one = [(x[n : n + 1], labels(x)[n : n + 1]) for n in range(3)]
    alone = tq.estimate_curvature(model, one, TASK, num_probes="exact", estimator="gauss_newton")
    for family in ("weight_values", "activation_values"):
        for name, values in getattr(alone, family).items():
            assert getattr(curvature, family)[name] == pytest.approx(values, rel=1e-9)


def test_one_sample_at_a_time_serves_any_layout() -> None:
    model, x = randomized(SequenceFirst()), seeded(3, 4, 5)
    batches = [(x[n : n + 1], labels(x)[n : n + 1]) for n in range(3)]
    curvature = tq.estimate_curvature(model, batches, TASK, num_probes="exact", estimator="gauss_newton")
    expected = exact_weight_traces(model, x, labels(x), F.cross_entropy)
    assert {name: e.trace for name, e in curvature.weights.items()} == pytest.approx(expected, rel=1e-9)


class KnownHessian(tq.ClassificationTask):
    """A task that supplies its output Hessian: here half of the true one, to see that it is used."""

    def output_hessian(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        p = outputs.detach().softmax(1)
        return 0.5 * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)


def test_output_hessian_of_the_user_is_used() -> None:
    make, x = NETWORKS["linear"]
    model, batch = randomized(make()), [(x, labels(x))]
    own = tq.estimate_curvature(model, batch, KnownHessian(), num_probes="exact", estimator="gauss_newton")
    expected = exact_weight_traces(model, x, labels(x), F.cross_entropy)
    assert {name: 2 * e.trace for name, e in own.weights.items()} == pytest.approx(expected, rel=1e-9)


def test_factor_of_a_large_coupled_loss_needs_no_matrix() -> None:
    """The norm of 200 outputs has one eigenvalue 199 times, which no eigenvector of a short recurrence stands for."""
    z = seeded(2, 200).requires_grad_()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum(1).sqrt().mean()

    hessian = factor(
        tq.ClassificationTask(loss=loss), z, (z, torch.zeros(2, dtype=torch.long)), torch.Generator().manual_seed(0)
    )
    assert hessian.kind == "coupled"
    direction = z.detach() / z.detach().norm(dim=1, keepdim=True)
    for seed in range(3):
        (((u,), sign),) = hessian.draw(torch.Generator().manual_seed(seed))
        assert sign == 1
        # H z = 0, and all else is stretched by the same factor.
        assert (u * direction).sum(1).abs().max() < 1e-9
        ratio = u.square().sum(1) * 2 * z.detach().norm(dim=1)
        assert ((ratio - 199).abs() < 30).all()


@pytest.mark.parametrize("num_probes", [0, -1, 1.5, "all"])
def test_num_probes_is_checked(num_probes: object) -> None:
    with pytest.raises(tq.SettingsError, match="num_probes must be an integer >= 1"):
        tq.estimate_curvature(
            build(FunctionalGelu), [(seeded(2, 5), torch.zeros(2).long())], TASK, num_probes=num_probes
        )


class Same(nn.Conv2d):
    """Pads in a forward of its own, so that the module's input is not what its weight meets."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class FunctionalFirst(nn.Module):
    """The first layer's weight is used without calling its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(F.linear(x, self.first.weight)))


class Written(nn.Module):
    """One inner layer `weight` [4, 5], read in the way that is given, between a ReLU and the last layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.inner, self.last = nn.Linear(5, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, w = F.relu(self.first(x)), self.inner.weight
        if self.way == "tied to its transpose":
            return self.last(F.relu(F.linear(F.relu(F.linear(h, w)) @ w, w)).sum(1))
        y = WAYS[self.way](h, w)
        return self.last(F.relu(y).sum(1))


# Positions [N, T, 5] and a weight [4, 5] to [N, T, 4].
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda h, w: h @ w.T,
    "weight first": lambda h, w: (w @ h.mT).mT,
    "weight first, one matrix": lambda h, w: (w @ h.flatten(0, 1).T).T.view(*h.shape[:2], 4),
    "addmm": lambda h, w: torch.addmm(torch.ones(4, dtype=h.dtype), h.flatten(0, 1), w.t(), alpha=0.5).view(
        *h.shape[:2], 4
    ),
    "einsum": lambda h, w: torch.einsum("ntk,ok->nto", h, w),
    "bmm": lambda h, w: torch.bmm(h.flatten(0, 1)[None], w.T[None])[0].view(*h.shape[:2], 4),
    "baddbmm": lambda h, w: torch.baddbmm(
        torch.ones(1, 1, 4, dtype=h.dtype), h.flatten(0, 1)[None], w.T[None], alpha=2
    )[0].view(*h.shape[:2], 4),
    "grouped": lambda h, w: torch.einsum(
        "ntgk,gok->ntgo", h[..., :4].unflatten(2, (2, 2)), w[:, :4].reshape(2, 2, 4)[:, :, :2]
    ).flatten(2),
    "convolution of width one": lambda h, w: F.conv1d(h.mT, w[:, :, None]).mT,
    "convolution over rows": lambda h, w: F.conv2d(h.unsqueeze(1), w.view(4, 1, 1, 5)).squeeze(3).mT,
    "convolution padded by hand": lambda h, w: F.conv2d(F.pad(h, (1, 0)).unsqueeze(1), w.view(4, 1, 1, 5))[..., 0].mT,
    "in pieces": lambda h, w: torch.cat([F.linear(h, piece) for piece in w.split([1, 3])], 2),
    "in chunks of columns": lambda h, w: sum(F.linear(a, b) for a, b in zip(h.split(3, 2), w.split(3, 1), strict=True)),
    "positions first": lambda h, w: F.linear(h.transpose(0, 1).contiguous(), w).transpose(0, 1),
    "called twice": lambda h, w: F.linear(h[:, :1], w) + F.linear(h[:, 1:], w),
    "copied": lambda h, w: F.linear(h, w.clone().contiguous()),
}


def traces_agree(model: nn.Module, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> str:
    """Compare with exact Hessians; returns the reason."""
    curvature = exact(model, x, labels(x), loss)
    expected = exact_weight_traces(model, x, labels(x), loss)
    assert {name: e.trace for name, e in curvature.weights.items()} == pytest.approx(expected, rel=1e-8)
    return curvature.reason


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.sampled_from([way for way in WAYS if way != "grouped"]),
    st.sampled_from(list(LOSSES)),
    st.integers(2, 3),
    st.integers(2, 4),
    st.integers(0, 99),
)
def test_a_layer_however_it_is_written(way: str, loss: str, samples: int, positions: int, seed: int) -> None:
    x = seeded(samples, positions, 5, seed=seed)
    reason = traces_agree(randomized(Written(way)), x, LOSSES[loss])
    assert "a backward pass for each sample" not in reason


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_layer(way: str) -> None:
    if way == "grouped":  # reads a part of the weight, by a slice: a pass for each sample
        with pytest.warns(UserWarning, match="layers inner are read by operations"):
            reason = traces_agree(randomized(Written(way)), seeded(3, 2, 5))
        assert "a backward pass for each sample for inner" in reason
        return
    assert "a backward pass for each sample" not in traces_agree(randomized(Written(way)), seeded(3, 2, 5))


def test_a_weight_tied_to_its_transpose() -> None:
    """An autoencoder whose decoder is its encoder's transpose bends in the weight: here against Jacobians."""
    model, x = randomized(Written("tied to its transpose")), seeded(3, 2, 5)
    curvature = exact(model, x, labels(x), F.cross_entropy)
    assert "a backward pass for each sample" not in curvature.reason
    expected = jacobian_trace(model, "inner.weight", x, labels(x))
    assert curvature.weights["inner"].trace == pytest.approx(expected, rel=1e-9)


class LanguageModel(nn.Module):
    """Tokens and positions looked up, the output tied to the tokens' weight, attention to a memory between."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4, padding_idx=2), nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1])[None]
        x = self.tokens(tokens) + self.positions(place)
        x = x + self.attention(x, x.flip(1), x.flip(1), need_weights=False)[0]
        return self.out(x).transpose(1, 2)


def _masked(vector: Tensor, sample: int) -> list[Tensor]:
    """The vector, zero for all samples but one."""
    return [vector * (torch.arange(len(vector)) == sample).view(-1, *([1] * (vector.ndim - 1)))]


def test_tied_and_shared_lookups() -> None:
    """The position's gradient is summed over samples, except behind the sum that spreads it over them."""
    model = randomized(LanguageModel())
    tokens = torch.tensor([[0, 2, 2, 6], [1, 1, 5, 2], [3, 4, 5, 0]])
    names = ("tokens.weight", "positions.weight", "attention.in_proj_weight", "attention.out_proj.weight")
    weights = {name: model.get_parameter(name) for name in names}
    outputs = model(tokens)
    sweep = Sweep([outputs], Rows(3, 0, 3), weights, {})
    assert not sweep.locate_samples().slow
    vector = seeded(*outputs.shape)
    found: dict[str, Tensor] = {}

    def on_layer(name: str, parts: list[list[gradient_norms.Call]]) -> None:
        found[name] = sum(gradient_norms.squared_norms(calls, torch.float64) for calls in parts)

    sweep.run([vector], keep=True, on_layer=on_layer, on_activation=lambda *_: None)
    for n in range(3):
        gradients = torch.autograd.grad(outputs, list(weights.values()), _masked(vector, n), retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            assert float(found[name][n]) == pytest.approx(float(gradient.square().sum()), rel=1e-12)


class Masked(nn.Module):
    """A weight that is multiplied by a mask before it is read, beside a convolution that pads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = Same(2, 3, 3, stride=2), nn.Linear(12, 6)
        self.last = nn.Linear(6, CLASSES)
        self.register_buffer("mask", (torch.arange(72) % 3 > 0).view(6, 12).double())

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x)).flatten(1)
        return self.last(F.relu(F.linear(h, self.inner.weight * self.mask)))


def test_what_cannot_be_recorded_takes_a_pass_of_each_sample_alone() -> None:
    """Announced before it starts, and the same however the batch is divided."""
    model, x = randomized(Masked()), seeded(3, 2, 4, 4)
    with pytest.warns(UserWarning, match="a batch of 3 samples costs 3 forward passes"):
        assert "a backward pass for each sample for inner" in traces_agree(model, x)
    batches = [(x[:1], labels(x)[:1]), (x[1:], labels(x)[1:])]
    with pytest.warns(UserWarning, match="layers inner are read by operations"):
        split = tq.estimate_curvature(model, batches, TASK, num_probes="exact", estimator="gauss_newton")
    expected = exact_weight_traces(model, x, labels(x), F.cross_entropy)
    assert {name: e.trace for name, e in split.weights.items()} == pytest.approx(expected, rel=1e-9)


class MaskedCoupled(Masked):
    """The same, whose samples interact."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x).mean(0)


def test_samples_that_interact_behind_such_a_layer_are_refused() -> None:
    x = seeded(3, 2, 4, 4)
    with pytest.raises(tq.ModelError, match="one sample"):
        exact(randomized(MaskedCoupled()), x, labels(x), F.cross_entropy)


@pytest.mark.parametrize("case", ["own padding", "functional first layer"])
def test_layers_whose_modules_are_not_called_as_usual(case: str) -> None:
    if case == "own padding":
        model = nn.Sequential(Same(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES))
        x = seeded(2, 2, 4, 4)
    else:
        model, x = FunctionalFirst(), seeded(3, 5)
    assert "a backward pass for each sample" not in traces_agree(randomized(model), x)


class ManyOutputs(nn.Module):
    """Outputs that depend on one another, one of them twice, one that the loss does not bend in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, CLASSES), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x)
        return {"hidden": h, "again": h, "logits": self.b(F.relu(h)), "linear": self.c(F.relu(h))}


class ManyOutputsTask(tq.Task):
    """A squared error, a squared penalty on the hidden layer, and a linear term."""

    def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return model(batch[0])

    def loss(self, outputs: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = outputs["hidden"].square().sum(1).mean()
        return F.mse_loss(outputs["logits"], batch[0][:, :CLASSES]) + 0.1 * hidden + outputs["linear"].mean()

    def metric(self, outputs: object, batch: object) -> float:
        return 0.0

    def batch_size(self, batch: tuple[Tensor, Tensor]) -> int:
        return len(batch[0])


def test_outputs_that_depend_on_one_another() -> None:
    model, x, task = randomized(ManyOutputs()), seeded(3, 5), ManyOutputsTask()
    points = tq.discover(model, [(x, x)], task, exclude=["c"])
    result = tq.estimate_curvature(model, [(x, x)], task, num_probes="exact", points=points)
    assert result.estimator == "gauss_newton"
    for name in ("a", "b"):

        def value(w: Tensor, name: str = name) -> Tensor:
            return task.loss(functional_call(model, {f"{name}.weight": w}, (x,)), (x, x))

        block = exact_hessian(value, model.get_submodule(name).weight.detach())
        assert result.weights[name].trace == pytest.approx(torch.trace(block).item(), rel=1e-9)


class SigmoidOnce(torch.autograd.Function):
    """A custom function without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := x.sigmoid())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (1 - y) * gradient


class CallsOnce(FunctionalGelu):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(SigmoidOnce.apply(self.a(x)))


def test_auto_without_a_second_derivative_says_what_it_gives() -> None:
    x = seeded(3, 5)
    curvature = tq.estimate_curvature(randomized(CallsOnce()), [(x, labels(x))], TASK)
    assert curvature.estimator == "gauss_newton"
    assert "may differ from the Hessian's: SigmoidOnceBackward or another operation has no second" in curvature.reason


def test_an_operation_of_the_model_without_a_second_derivative_is_none_of_gauss_newtons_concern() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 4), nn.Hardsigmoid(), nn.Linear(4, CLASSES)))
    x = seeded(3, 5)
    curvature = tq.estimate_curvature(model, [(x, labels(x))], TASK)
    assert curvature.estimator == "gauss_newton"
    assert "these Gauss-Newton traces equal the Hessian's" in curvature.reason


class TextTask(tq.ClassificationTask):
    """Sequences of three characters, read from `[N, 12, 5]` scores by `F.ctc_loss`."""

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        scores = outputs.log_softmax(2).movedim(1, 0)
        lengths = torch.full((len(outputs),), 12), torch.full((len(outputs),), 3)
        return F.ctc_loss(scores, batch[1], *lengths)


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton", "hutchinson"])
def test_a_loss_without_second_derivative_is_one_error_that_ends(estimator: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5))
    batch = (torch.randn(3, 12, 5), torch.randint(1, 5, (3, 3)))
    with pytest.raises(SecondDerivativeError, match=r"every estimator needs; use a loss.*output_hessian") as caught:
        tq.estimate_curvature(model, [batch], TextTask(), estimator=estimator, num_probes=1)
    assert "estimator='hutchinson'" not in str(caught.value)


def test_a_loss_that_knows_one_batch_size_is_checked_on_the_whole_batch() -> None:
    x = seeded(4, 5)
    task = tq.ClassificationTask(loss=lambda z, y: F.cross_entropy(z.view(4, CLASSES), y.view(4)))
    curvature = tq.estimate_curvature(randomized(FunctionalGelu()), [(x, labels(x))], task)
    assert "GELU bends" in curvature.reason


class KnownTextTask(TextTask):
    """The cure of that error: the Fisher matrix of the scores' probabilities stands for the second derivative."""

    def output_hessian(self, outputs: Tensor, batch: object) -> Tensor:
        p = outputs.detach().softmax(2)
        fisher = torch.diag_embed(p) - p.unsqueeze(3) * p.unsqueeze(2)
        return torch.stack([torch.block_diag(*positions) for positions in fisher]) / p.numel()


def test_output_hessian_serves_a_loss_without_second_derivative() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5))
    batch = (torch.randn(3, 12, 5), torch.randint(1, 5, (3, 3)))
    assert tq.estimate_curvature(model, [batch], KnownTextTask()).weights["2"].trace > 0


def test_options_of_the_other_method_are_refused() -> None:
    model, x = randomized(FunctionalGelu()), seeded(2, 5)
    with pytest.raises(tq.SettingsError, match="probe_scope is an option of estimator='hutchinson'"):
        tq.estimate_curvature(model, [(x, labels(x))], TASK, estimator="gauss_newton", probe_scope="shared")
    with pytest.raises(tq.SettingsError, match="exact"):
        tq.estimate_curvature(model, [(x, labels(x))], TASK, num_probes="exact", estimator="hutchinson")


def test_a_loss_without_curvature_is_refused() -> None:
    make, x = NETWORKS["linear"]
    with pytest.raises(tq.ModelError, match=r"no curvature|linear in the model"):
        exact(randomized(make()), x, labels(x), lambda z, y: z.abs().mean())
