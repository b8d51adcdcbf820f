"""Hutchinson's traces against exact Hessians from `torch.func`, in float64, and the traps around them."""

import copy
import functools
import gc
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import (
    CLASSES,
    EnergyTask,
    attention_net,
    build,
    conv_net,
    exact_hessian,
    gelu_mlp,
    images,
    labelled,
    residual_net,
    shared_head_net,
    snapshot,
    tied_net,
    token_batch,
)
from tracequant import (
    ClassificationTask,
    Curvature,
    DataError,
    ModelError,
    QuantizationPoints,
    SettingsError,
    Task,
    discover,
    top_eigenvalues,
)
from tracequant import estimate_curvature as estimate_by_any_method
from tracequant.core.curvature import summarize
from tracequant.curvature.hutchinson import hutchinson
from tracequant.curvature.products import (
    draw_probe,
    exact_block,
    first_derivatives,
    hessian_vector_product,
    reading_variables,
    require_grad,
)
from tracequant.model.state import frozen_evaluation
from tracequant.model.task import forward

TASK = ClassificationTask()
estimate_curvature = functools.partial(estimate_by_any_method, estimator="hutchinson")
# Standard errors that an estimate may lie off: by chance once in two million times, and all seeds are fixed.
SIGMAS = 5


def tiny_mlp() -> nn.Module:
    """Two linear layers of 6 weights each around a tanh, without biases: every Hessian block is full and indefinite."""
    return build(lambda: nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)))


def tiny_batch(size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, 2, generator=generator, dtype=torch.float64) * 2, torch.arange(size) % 2


def reference_block(model: nn.Module, weight: str, loss: Callable[[Any], Tensor], *inputs: Tensor) -> Tensor:
    """The Hessian [n, n] of `loss(outputs)` with respect to one parameter, by `torch.func` on a copy of the model."""
    model = copy.deepcopy(model).eval()
    value = model.get_parameter(weight).detach()
    with sdpa_kernel(SDPBackend.MATH):
        return exact_hessian(lambda w: loss(functional_call(model, {weight: w}, inputs)), value)


def reference_matrix(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[tuple[str, str], Tensor]:
    """All blocks H_ij of the cross-entropy of a model of two linear layers, `0` and `2`."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = {name: part.view(shapes[name]) for name, part in zip(shapes, flat.split(sizes), strict=True)}
        return F.cross_entropy(functional_call(model, parts, (batch[0],)), batch[1])

    full = exact_hessian(loss, torch.cat([p.detach().flatten() for p in model.parameters()]))
    rows = [block.split(sizes, 1) for block in full.split(sizes, 0)]
    layers = [name.removesuffix(".weight") for name in shapes]
    return {(a, b): rows[i][j] for i, a in enumerate(layers) for j, b in enumerate(layers)}


def traces_by_unit_vectors(model: nn.Module, batch: Any, task: Task, points: QuantizationPoints) -> dict[str, float]:
    """Σ_k e_kᵀHe_k of every activation point for one batch: what the estimator expects, without its noise."""
    with frozen_evaluation(model):
        require_grad(model, points)
        with reading_variables(model, points) as variables:
            _, loss = forward(task, model, batch)
        gradients = first_derivatives(loss, {"activations": variables})[0]["activations"]
        traces = {}
        for name, tensors in variables.items():
            traces[name] = 0.0
            for position, tensor in enumerate(tensors):
                for index in range(tensor.numel()):
                    vectors = [torch.zeros_like(t) for t in tensors]
                    vectors[position].view(-1)[index] = 1
                    products = hessian_vector_product(gradients[name], tensors, vectors)
                    traces[name] += products[position].view(-1)[index].item()
    return traces


# Weights


def test_the_mean_over_all_sign_vectors_is_the_trace(device):
    """Σ_z zᵀHz / 2ⁿ = Tr(H) with no error at all, and each Hz is the product with the matrix."""
    model, batch = tiny_mlp().to(device), tuple(tensor.to(device) for tensor in tiny_batch())
    points = discover(model, [batch], TASK)
    with frozen_evaluation(model):
        parameters = require_grad(model, points)
        _, loss = forward(TASK, model, batch)
        gradients = first_derivatives(loss, {"weights": {n: [p] for n, p in parameters.items()}})[0]["weights"]
        for name, parameter in parameters.items():
            block = reference_block(model, f"{name}.weight", lambda out: F.cross_entropy(out, batch[1]), batch[0])
            values = []
            for signs in itertools.product((-1.0, 1.0), repeat=parameter.numel()):
                z = torch.tensor(signs, dtype=torch.float64, device=device)
                (product,) = hessian_vector_product(gradients[name], [parameter], [z.view_as(parameter)])
                torch.testing.assert_close(product.flatten(), block @ z, rtol=1e-10, atol=1e-12)
                values.append((z @ product.flatten()).item())
            assert math.fsum(values) / len(values) == pytest.approx(block.trace().item(), rel=1e-10)
            assert max(values) - min(values) > 0.01  # single draws differ: the mean is what agrees


@pytest.mark.parametrize(
    ("make", "batch", "layers"),
    [
        (conv_net, images()[0], {"conv1": "conv1.weight", "conv2": "conv2.weight", "fc": "fc.weight"}),
        (residual_net, images()[0], {"stem": "stem.weight", "block1.downsample": "block1.downsample.weight"}),
        (shared_head_net, images()[0], {"head": "head.weight"}),
        (gelu_mlp, labelled(6)[0], {"0": "0.weight", "2": "2.weight"}),
        (tied_net, token_batch(), {"embedding": "embedding.weight", "hidden": "hidden.weight"}),
        (
            attention_net,
            labelled(5, 3)[0],
            {"attention.in_proj_weight": "attention.in_proj_weight", "attention.out_proj": "attention.out_proj.weight"},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_blocks_are_the_exact_hessians(make, batch, layers):
    """Convolutions under BatchNorm, a shared head, tied weights (the total over both places) and fused attention."""
    model = make()
    points = discover(model, [batch], TASK)
    for layer, parameter in layers.items():
        want = reference_block(model, parameter, lambda out: F.cross_entropy(out, batch[1]), batch[0])
        got = exact_block(model, batch, TASK, points, layer)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
        assert want.abs().max() > 1e-4


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", ["per_layer", "shared"])
def test_error_and_variance_are_those_of_theory(probes, distribution):
    """The estimate lies within 5 standard errors, and the variance of a draw is the known one.

    2‖offdiag H_ii‖_F² (Rademacher) or 2‖H_ii‖_F² (Gaussian), and Σ_{j≠i} ‖H_ij‖_F² more for a shared probe. The
    variance of a sample variance over 1500 draws allows 20 %; the three formulas lie further apart than that.
    """
    draws = 1500
    model, batch = tiny_mlp(), tiny_batch()
    points = discover(model, [batch], TASK)
    blocks = reference_matrix(model, batch)
    result = hutchinson(
        model,
        [batch],
        TASK,
        points,
        num_probes=draws,
        probe_scope=probes,
        distribution=distribution,
        seed=1,
        activations=False,
    )
    assert result.activations == {}
    for name, other in (("0", "2"), ("2", "0")):
        own = blocks[name, name]
        off_diagonal = 2 * (own - own.diag().diag()).square().sum().item()
        everything = 2 * own.square().sum().item()
        beside = blocks[name, other].square().sum().item()
        variance = off_diagonal if distribution == "rademacher" else everything
        variance += beside if probes == "shared" else 0
        assert everything > 1.3 * off_diagonal
        assert beside > 0.4 * off_diagonal
        estimate = result.weights[name]
        assert abs(estimate.trace - own.trace().item()) < SIGMAS * math.sqrt(variance / draws)
        assert draws * estimate.standard_error**2 == pytest.approx(variance, rel=0.2)
        assert (estimate.num_probes, estimate.samples, estimate.numel) == (draws, 4, 6.0)
        assert estimate.average_trace == estimate.trace / 6


def test_batches_count_by_their_samples(device):
    """The trace of the mean loss over all samples, from batches of 5, 1 and 2."""
    model = tiny_mlp().to(device)
    inputs, targets = tiny_batch(8)
    inputs[5] *= 3
    batches = [(inputs[a:b], targets[a:b]) for a, b in ((0, 5), (5, 6), (6, 8))]
    points = discover(model, batches, TASK)
    result = hutchinson(model, batches, TASK, points, num_probes=300, activations=False)
    for name in ("0", "2"):
        blocks = [
            reference_block(model.cpu(), f"{name}.weight", lambda out, t=t: F.cross_entropy(out, t), x)
            for x, t in batches
        ]
        want = sum(size * block.trace().item() for size, block in zip((5, 1, 2), blocks, strict=True)) / 8
        unweighted = sum(block.trace().item() for block in blocks) / 3
        variance = sum(
            (size / 8) ** 2 * 2 * (block - block.diag().diag()).square().sum().item() / 300
            for size, block in zip((5, 1, 2), blocks, strict=True)
        )
        assert abs(result.weights[name].trace - want) < SIGMAS * math.sqrt(variance)
        assert abs(unweighted - want) > SIGMAS * math.sqrt(variance)
        assert result.weights[name].standard_error == pytest.approx(math.sqrt(variance), rel=0.25)
    assert result.samples == 8


def test_summary_of_draws_and_batches_by_hand():
    """Batches of 1 and 3 samples with means 2 and 4; variances of the means 1 and 4; spread between batches."""
    estimate = summarize([[1.0, 3.0], [2.0, 6.0]], [1, 3], numel=7)
    assert estimate.trace == 0.25 * 2 + 0.75 * 4
    assert estimate.average_trace == 3.5 / 7
    assert estimate.standard_error == pytest.approx(math.sqrt(0.25**2 * 1 + 0.75**2 * 4))
    assert estimate.sampling_error == pytest.approx(math.sqrt(2 * (0.25**2 * 1.5**2 + 0.75**2 * 0.5**2)))
    assert (estimate.num_probes, estimate.samples) == (2, 4)
    assert estimate.relative_error == estimate.standard_error / 3.5


def test_one_draw_and_one_batch_leave_the_errors_unknown():
    estimate = summarize([[-3.0]], [4], numel=2)
    assert (estimate.trace, estimate.standard_error, estimate.sampling_error) == (-3.0, math.inf, math.inf)
    assert summarize([[-1.0, -3.0]], [4], numel=2).relative_error == pytest.approx(1 / 2)


class Polynomial(EnergyTask):
    """A layer of two weights (x, y) sees the identity matrix: the loss is the polynomial c₀x² + c₁y² itself."""

    def batch_size(self, batch: Any) -> int:
        return 1


def polynomial(first: float, second: float) -> tuple[nn.Module, list[Any], Task]:
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    task = Polynomial(torch.tensor([[first], [second]], dtype=torch.float64))
    return model, [(torch.eye(2, dtype=torch.float64),)], task


@pytest.mark.parametrize("probes", ["per_layer", "shared"])
@pytest.mark.parametrize(("first", "second", "trace"), [(100, 1, 202), (100, 99, 398), (-3, 1, -4), (0.5, -0.5, 0)])
def test_a_diagonal_hessian_takes_one_draw(first, second, trace, probes):
    """F1 = 100x² + y² and F2 = 100x² + 99y² of the paper, a negative trace (kept negative) and a saddle."""
    model, batches, task = polynomial(first, second)
    curvature = estimate_curvature(model, batches, task, num_probes=1, probe_scope=probes, activations=False)
    assert curvature.weights["0"].trace == pytest.approx(trace, abs=1e-10)
    assert curvature.weights["0"].average_trace == pytest.approx(trace / 2, abs=1e-10)
    many = estimate_curvature(model, batches, task, num_probes=4, probe_scope=probes, activations=False)
    assert many.weights["0"].standard_error == pytest.approx(0, abs=1e-10)


def test_the_top_eigenvalue_cannot_tell_what_the_trace_tells():
    """Both polynomials have the largest eigenvalue 200, while their traces are 202 and 398."""
    for second in (1, 99):
        model, batches, task = polynomial(100, second)
        points = discover(model, batches, task)
        before = snapshot(model)
        values = top_eigenvalues(model, batches, task, points, tolerance=1e-7)
        assert values == {"0": (pytest.approx(200, rel=1e-4),)}
        assert snapshot(model) == before
    model, batches, task = polynomial(3, -40)
    found = top_eigenvalues(model, batches, task, discover(model, batches, task))
    assert found["0"] == (pytest.approx(-80, rel=1e-2),)  # the largest in magnitude, with its sign


def test_probes_have_unit_covariance():
    """E[z zᵀ] = I; signs are ±1 and balanced; type, shape and generator are as asked."""
    like = torch.empty(3, 2, dtype=torch.float64)
    for distribution in ("rademacher", "gaussian"):
        generator = torch.Generator().manual_seed(0)
        rows = torch.stack([draw_probe(like, distribution, generator).flatten() for _ in range(4000)])
        assert rows.dtype == torch.float64
        torch.testing.assert_close(
            rows.T @ rows / 4000, torch.eye(6).double(), rtol=0, atol=SIGMAS * math.sqrt(2 / 4000)
        )
        torch.testing.assert_close(rows.mean(0), torch.zeros(6).double(), rtol=0, atol=SIGMAS / math.sqrt(4000))
        assert (rows.abs() == 1).all() == (distribution == "rademacher")


# Activations


class ElementwiseTask(Task):
    """Vectors of any length in a list; a layer of one weight maps each element; the loss sums fourth powers.

    The Hessian with respect to a vector x is diagonal, 12 w²(wx + b)²: one Rademacher draw gives its exact trace.
    """

    def outputs(self, model: nn.Module, batch: list[Tensor]) -> list[Tensor]:
        return [model(vector[:, None])[:, 0] for vector in batch]

    def loss(self, outputs: list[Tensor], batch: list[Tensor]) -> Tensor:
        return torch.stack([out.pow(4).sum() for out in outputs]).mean()

    def metric(self, outputs: Any, batch: Any) -> float:
        return 0.0

    def batch_size(self, batch: list[Tensor]) -> int:
        return len(batch)


@pytest.mark.parametrize("sizes", [(6,), (1, 1, 1, 1, 1, 1), (3, 1, 2)], ids=str)
def test_activation_traces_average_over_inputs_of_any_size_in_any_batches(sizes, device):
    """Exact in one draw, the same for every way to cut six vectors of lengths 1 to 9 into batches."""
    model = nn.Sequential(nn.Linear(1, 1)).double().to(device)
    w, b = 0.7, -0.3
    with torch.no_grad():
        model[0].weight.fill_(w)
        model[0].bias.fill_(b)
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (1, 9, 2, 5, 3, 4)]
    rest = iter(vectors)
    batches = [list(itertools.islice(rest, size)) for size in sizes]
    curvature = estimate_curvature(model, batches, ElementwiseTask(), num_probes=1)
    each = [sum(12 * w**2 * (w * x + b) ** 2 for x in vector.tolist()) for vector in vectors]
    estimate = curvature.activations["0"]
    assert estimate.trace == pytest.approx(sum(each) / 6, rel=1e-12)
    assert estimate.numel == pytest.approx(24 / 6)
    assert estimate.average_trace == pytest.approx(sum(each) / 6 / 4, rel=1e-12)
    assert (estimate.samples, curvature.samples) == (6, 6)
    weight = sum(12 * x**2 * (w * x + b) ** 2 for vector in vectors for x in vector.tolist()) / 6
    assert curvature.weights["0"].trace == pytest.approx(weight, rel=1e-12)


class ImagesTask(Task):
    """Images of different sizes in a list, labelled; the model is fully convolutional and pools its logits."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.cat([model(image[None]).mean((2, 3)) for image in batch[0]])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def metric(self, outputs: Any, batch: Any) -> float:
        return 0.0

    def batch_size(self, batch: Any) -> int:
        return len(batch[0])


def images_of_different_sizes() -> tuple[nn.Module, list[Tensor], Tensor]:
    model = build(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # positive and negative parts of the traces must not cancel
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 3), (4, 3), (3, 5))
    return (
        model,
        [torch.randn(2, *size, generator=generator, dtype=torch.float64) for size in sizes],
        torch.tensor([0, 3, 1]),
    )


def exact_activation_blocks() -> dict[str, list[Tensor]]:
    """For each image alone, the Hessians of its loss with respect to the image and to what the second layer reads."""
    model, pictures, targets = images_of_different_sizes()
    blocks: dict[str, list[Tensor]] = {"0": [], "2": []}
    for picture, target in zip(pictures, targets, strict=True):
        tail = {"0": model, "2": model[2]}
        tensor = {"0": picture, "2": model[1](model[0](picture)).detach()}
        for name in blocks:
            blocks[name].append(
                exact_hessian(lambda a, net=tail[name], t=target: F.cross_entropy(net(a).mean((1, 2)), t), tensor[name])
            )
    return blocks


@pytest.mark.parametrize("sizes", [(3,), (1, 1, 1), (1, 2)], ids=str)
def test_activation_traces_of_a_convolutional_net_are_the_mean_of_each_inputs_own(sizes):
    """Whatever shares a batch, the expectation is the mean of Tr(H_i), H_i the Hessian of image i's loss."""
    model, pictures, targets = images_of_different_sizes()
    expectation = {"0": 0.0, "2": 0.0}
    start = 0
    points = discover(model, [(pictures, targets)], ImagesTask())
    for size in sizes:
        batch = (pictures[start : start + size], targets[start : start + size])
        start += size
        for name, value in traces_by_unit_vectors(model, batch, ImagesTask(), points).items():
            expectation[name] += size / 3 * value
    for name, blocks in exact_activation_blocks().items():
        assert expectation[name] == pytest.approx(sum(b.trace().item() for b in blocks) / 3, rel=1e-9)


@pytest.mark.parametrize("probes", ["per_layer", "shared"])
def test_activation_draws_estimate_the_mean_of_each_inputs_own(probes):
    """Random draws over one batch of three images: within 5 standard errors, with the variance of a probe alone."""
    model, pictures, targets = images_of_different_sizes()
    points = discover(model, [(pictures, targets)], ImagesTask())
    draws = 400
    result = hutchinson(
        model, [(pictures, targets)], ImagesTask(), points, num_probes=draws, probe_scope=probes, weights=False
    )
    assert result.weights == {}
    for name, blocks in exact_activation_blocks().items():
        want = sum(block.trace().item() for block in blocks) / 3
        variance = sum(2 * (block - block.diag().diag()).square().sum().item() for block in blocks) / 9
        estimate = result.activations[name]
        error = math.sqrt(variance / draws)
        if probes == "per_layer":
            assert estimate.standard_error == pytest.approx(error, rel=0.25)
        else:
            error = estimate.standard_error
        assert abs(estimate.trace - want) < SIGMAS * error
        assert SIGMAS * error < 0.7 * abs(want)  # tight enough to tell the mean over the inputs from their sum
        numel = sum(len(block) for block in blocks) / 3
        assert estimate.numel == pytest.approx(numel)
        assert estimate.average_trace == pytest.approx(estimate.trace / numel)


class BranchNet(nn.Module):
    """A branch point that two layers and the identity path read, the second layer inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        x = torch.tanh(self.stem(inputs))
        return self.join(x, x, x)

    def join(self, left: Tensor, right: Tensor, identity: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(left)) * (1 + self.right(right)) + identity.square())


def test_a_branch_point_counts_all_consumers_and_leaves_the_identity_path_out():
    """The tensor that a shared quantizer replaces is what both layers read; the addition reads the original."""
    model = build(BranchNet)
    ((inputs, target),) = labelled(3, sizes=(1,))
    points = discover(model, [(inputs, target)], TASK)
    assert points.activation_by_name["left"].consumers == ("left", "right.0")
    x = torch.tanh(model.stem(inputs)).detach()

    def trace(function: Callable[[Tensor], Tensor]) -> float:
        return exact_hessian(lambda u: F.cross_entropy(function(u), target), x).trace().item()

    want = trace(lambda u: model.join(u, u, x))
    wrong = {
        "first consumer only": trace(lambda u: model.join(u, x, x)),
        "consumers apart": trace(lambda u: model.join(u, x, x)) + trace(lambda u: model.join(x, u, x)),
        "with the identity path": trace(lambda u: model.join(u, u, u)),
    }
    got = traces_by_unit_vectors(model, (inputs, target), TASK, points)["left"]
    assert got == pytest.approx(want, rel=1e-9)
    for value in wrong.values():
        assert value != pytest.approx(want, rel=0.02)
    draws = 300
    estimate = hutchinson(model, [(inputs, target)], TASK, points, num_probes=draws).activations["left"]
    block = exact_hessian(lambda u: F.cross_entropy(model.join(u, u, x), target), x)
    variance = 2 * (block - block.diag().diag()).square().sum().item()
    assert abs(estimate.trace - want) < SIGMAS * math.sqrt(variance / draws)


def test_the_branch_point_of_a_residual_net_with_in_place_operations():
    """`block1` of `ResidualNet`, where conv1 and downsample share their input, and `block2`, which adds its own."""
    model = residual_net().eval()
    ((picture, target),) = labelled(3, 3, 3, sizes=(1,))
    points = discover(model, [(picture, target)], TASK)
    got = traces_by_unit_vectors(model, (picture, target), TASK, points)
    x = torch.relu(model.stem(picture)).detach()
    y = model.block1(x).detach()

    def second(read: Tensor, identity: Tensor) -> Tensor:
        block = model.block2
        out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(read)))))
        return F.cross_entropy(model.fc(torch.relu(out + identity).mean((2, 3))), target)

    want = exact_hessian(lambda u: second(model.block1(u), model.block1(u)), x).trace().item()
    assert got["block1.conv1"] == pytest.approx(want, rel=1e-9)
    want = exact_hessian(lambda u: second(u, y), y).trace().item()
    assert got["block2.conv1"] == pytest.approx(want, rel=1e-9)
    with_identity = exact_hessian(lambda u: second(u, u), y).trace().item()
    assert with_identity != pytest.approx(want, rel=0.02)


def test_a_head_applied_to_several_tensors_sums_their_traces():
    model = shared_head_net()
    ((picture, target),) = labelled(3, 4, 4, sizes=(1,))
    points = discover(model, [(picture, target)], TASK)
    got = traces_by_unit_vectors(model, (picture, target), TASK, points)
    levels = [torch.tanh(conv(picture)).detach() for conv in (model.fine, model.coarse)]

    def loss(fine: Tensor, coarse: Tensor) -> Tensor:
        return F.cross_entropy(model.head(fine).mean((2, 3)) + model.head(coarse).mean((2, 3)), target)

    blocks = [
        exact_hessian(lambda u: loss(u, levels[1]), levels[0]),
        exact_hessian(lambda u: loss(levels[0], u), levels[1]),
    ]
    assert got["head"] == pytest.approx(sum(block.trace().item() for block in blocks), rel=1e-9)
    (estimate,) = [hutchinson(model, [(picture, target)], TASK, points, num_probes=2).activations["head"]]
    assert estimate.numel == sum(len(block) for block in blocks)


def test_attention_runs_under_the_kernel_that_has_a_second_derivative():
    """The fused attention of a plain call has none; the estimate comes out all the same, for all layers."""
    model = attention_net()
    batches = labelled(5, 3)
    curvature = estimate_curvature(model, batches, TASK, num_probes=200)
    points = curvature.points
    assert list(curvature.weights) == ["embed", "attention.in_proj_weight", "attention.out_proj", "fc"]
    assert list(curvature.activations) == ["embed", "attention", "fc"]
    for name, estimate in curvature.weights.items():
        block = exact_block(model, batches[0], TASK, points, name)
        variance = 2 * (block - block.diag().diag()).square().sum().item()
        assert abs(estimate.trace - block.trace().item()) < SIGMAS * math.sqrt(variance / 200)
    x = torch.tanh(model.embed(batches[0][0])).detach()
    with sdpa_kernel(SDPBackend.MATH):
        want = exact_hessian(
            lambda u: F.cross_entropy(model.fc(model.attention(u, u, u, need_weights=False)[0].mean(1)), batches[0][1]),
            x,
        )
    variance = 2 * (want - want.diag().diag()).square().sum().item()
    error = abs(curvature.activations["attention"].trace - want.trace().item())
    assert error < SIGMAS * math.sqrt(variance / 200)


# What the model is like afterwards, and what is refused


def lent_model() -> nn.Module:
    """In training mode but for one module, partly frozen, with gradients, dropout, BatchNorm and a missing bias."""
    model = nn.Sequential(conv_net(), nn.Dropout(0.5), nn.Linear(CLASSES, CLASSES, bias=False)).double().train()
    model[0].bn2.eval()
    model[0].conv1.weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[0].fc.weight.grad = torch.randn_like(model[0].fc.weight)
    model[0].bn1.weight.grad = torch.ones_like(model[0].bn1.weight)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    return model


@pytest.mark.parametrize("probes", ["per_layer", "shared"])
def test_the_model_is_left_exactly_as_it_was(probes, device):
    """Modes, requires_grad, gradients, BatchNorm statistics, hooks, weights and the global random state."""
    model = lent_model().to(device)
    before = snapshot(model)
    curvature = estimate_curvature(model, images(sizes=(3, 2)), TASK, num_probes=2, probe_scope=probes)
    assert snapshot(model) == before
    assert list(curvature.weights) == ["0.conv1", "0.conv2", "0.fc", "2"]  # frozen layers have a curvature too


def test_the_model_is_left_exactly_as_it_was_after_an_error():
    model = lent_model()
    before = snapshot(model)
    batches = images(sizes=(3, 2))
    batches[1][0][0] = torch.nan
    with pytest.raises(DataError, match="batch 1"):
        estimate_curvature(model, batches, TASK, num_probes=2)
    assert snapshot(model) == before


def test_analysis_is_of_the_model_in_evaluation_mode():
    """Training mode, dropout and frozen layers change nothing in the result."""
    trained = estimate_curvature(lent_model(), images(), TASK, num_probes=3)
    plain = lent_model().eval().requires_grad_(True)
    assert estimate_curvature(plain, images(), TASK, num_probes=3) == trained


def test_the_seed_decides_and_the_global_random_state_does_not():
    model, batches = gelu_mlp(), labelled(6, sizes=(3, 3))
    results = []
    for state in (0, 1):
        torch.manual_seed(state)
        results.append(estimate_curvature(model, batches, TASK, num_probes=2, seed=5))
    assert results[0] == results[1]
    assert results[0].seed == 5
    other = estimate_curvature(model, batches, TASK, num_probes=2, seed=6)
    assert other.weights["0"].trace != results[0].weights["0"].trace
    assert other.activations["2"].trace != results[0].activations["2"].trace


def test_draws_and_batches_have_probes_of_their_own():
    """The same batch twice, two draws each: equal probes would show as no spread between batches or draws."""
    estimate = estimate_curvature(gelu_mlp(), labelled(6) * 2, TASK, num_probes=2).weights["0"]
    assert estimate.standard_error > 0
    assert estimate.sampling_error > 0


def test_a_one_shot_iterator_serves_discovery_and_estimation():
    model, batches = gelu_mlp(), labelled(6, sizes=(3, 2))
    assert estimate_curvature(model, iter(batches), TASK, num_probes=2) == estimate_curvature(
        model, batches, TASK, num_probes=2
    )


def test_a_result_survives_a_file(tmp_path):
    curvature = estimate_curvature(gelu_mlp(), labelled(6), TASK, num_probes=1)
    curvature.save(tmp_path / "curvature.json")
    assert Curvature.load(tmp_path / "curvature.json") == curvature
    assert curvature.estimator == "hutchinson"
    assert curvature.reason == "1 rademacher probes for each of 1 batches, probes per layer"


class Unused(nn.Module):
    """A layer that never runs and one that runs to no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)
        self.idle = nn.Linear(6, 6)
        self.lost = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        self.lost(inputs)
        return self.fc(inputs)


@pytest.mark.parametrize("layer", ["idle", "lost"])
def test_a_layer_that_the_loss_does_not_depend_on_is_named(layer):
    model = build(Unused)
    points = discover(model, labelled(6), TASK, include=["fc", layer])
    with pytest.raises(ModelError, match=rf"does not depend on layer {layer} in any batch; .*exclude=\['{layer}'\]"):
        estimate_curvature(model, labelled(6), TASK, points=points)
    points = discover(model, labelled(6), TASK, exclude=["idle", "lost"])
    assert list(estimate_curvature(model, labelled(6), TASK, num_probes=1, points=points).weights) == ["fc"]


def test_an_activation_that_the_loss_ignores_has_no_trace():
    """Without the weights, a tensor that is read to no effect is no error: its trace is zero."""
    model = build(Unused)
    points = discover(model, [(torch.tanh(labelled(6)[0][0]), labelled(6)[0][1])], TASK, exclude=["idle"])
    model.forward = lambda x: (model.lost(x * 2), model.fc(x))[1]
    points = discover(model, labelled(6), TASK, exclude=["idle"])
    curvature = estimate_curvature(model, labelled(6), TASK, num_probes=1, points=points, weights=False)
    assert curvature.activations["lost"].trace == 0
    assert curvature.activations["fc"].trace != 0


def test_a_tensor_that_some_batches_never_reach_counts_as_zero_there():
    """As the second stage of a detector that found nothing: the mean over samples takes in those of every batch."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, CLASSES), nn.Linear(CLASSES, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            x = torch.tanh(self.first(inputs))
            return self.second(x) if len(x) > 2 else x

    model, batches = build(Sometimes), labelled(6, sizes=(3, 2))
    points = discover(model, batches, TASK)
    both = estimate_curvature(model, batches, TASK, num_probes=1, points=points, weights=False).activations["second"]
    (one,) = [
        estimate_curvature(model, batches[:1], TASK, num_probes=1, points=points, weights=False).activations["second"]
    ]
    assert both.trace == pytest.approx(one.trace * 3 / 5)
    assert both.average_trace == pytest.approx(one.average_trace)


def test_a_loss_without_a_graph_is_explained():
    task = ClassificationTask(forward=lambda model, inputs: model(inputs).detach())
    with pytest.raises(ModelError, match="does not depend on any layer"):
        estimate_curvature(gelu_mlp(), labelled(6), task)


def test_a_loss_linear_in_a_layer_has_a_zero_hessian():
    task = ClassificationTask(loss=lambda logits, targets: logits.mean())
    curvature = estimate_curvature(gelu_mlp(), labelled(6), task, num_probes=2)
    assert curvature.weights["2"].trace == 0
    assert curvature.weights["0"].trace != 0  # through GELU it is curved


class CubeOnce(torch.autograd.Function):
    """x³ with a backward pass that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def test_an_operation_without_second_derivative_is_explained():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(CubeOnce.apply(self.first(inputs)))

    model = build(Model)
    before = snapshot(model)
    with pytest.raises(ModelError, match="no second derivative"):
        estimate_curvature(model, labelled(6), TASK, num_probes=1)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_probes": 0}, SettingsError, "num_probes must be an integer >= 1"),
        ({"estimator": "guess"}, SettingsError, "estimator must be .*, got 'guess'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        estimate_curvature(gelu_mlp(), labelled(6), TASK, **options)


def test_auto_takes_gauss_newton_for_a_smooth_network():
    assert estimate_curvature(gelu_mlp(), labelled(6), TASK, num_probes=1, estimator="auto").estimator == "gauss_newton"


class CountedCube(torch.autograd.Function):
    """x³, whose node in the graph can be seen to live: `alive` has a weak reference to a part of it."""

    alive: ClassVar[list[weakref.ref]] = []

    class Token:
        """Belongs to one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.token = CountedCube.Token()
        CountedCube.alive.append(weakref.ref(ctx.token))
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient

    @classmethod
    def count(cls) -> int:
        """Graphs that are alive."""
        return sum(reference() is not None for reference in cls.alive)


class CountedNet(nn.Module):
    """Two layers around a `CountedCube`; `seen` lists how many graphs were alive when each call began."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, CLASSES)
        self.seen: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(CountedCube.count())
        return self.second(CountedCube.apply(self.first(inputs)))


def test_no_graph_outlives_the_call():
    """Graphs go without the garbage collector's help, and repeated calls leave no tensor behind."""
    model, batches = build(CountedNet), labelled(6, sizes=(2, 2))
    CountedCube.alive.clear()
    tensors = []
    for _ in range(3):
        gc.disable()
        try:
            curvature = estimate_curvature(model, batches, TASK, num_probes=2)
            assert CountedCube.count() == 0
        finally:
            gc.enable()
        gc.collect()
        tensors.append(sum(issubclass(type(item), Tensor) for item in gc.get_objects()))
    assert len(CountedCube.alive) == 3 * (1 + 1 + 2)  # discovery, a look at the memory, and two batches, each time
    assert tensors[0] == tensors[1] == tensors[2]
    assert curvature.weights["first"].trace != 0


def test_a_batchs_graph_is_gone_before_the_next_is_built():
    """Otherwise the peak of memory is that of two batches."""
    model = build(CountedNet)
    estimate_curvature(model, labelled(6, sizes=(2, 2, 2)), TASK, num_probes=1)
    assert model.seen == [0] * 5


# Which module is to blame


class Called(nn.Module):
    """Two layers around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 4), nn.Linear(4, CLASSES), function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.function(self.first(inputs)))


def nested() -> nn.Module:
    """The activation two levels down, behind in-place ones that are innocent."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Hardsigmoid(), nn.Linear(4, 4))
    return nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.GELU(), inner), nn.Linear(4, CLASSES))


class InBlock(nn.Module):
    """A block that calls a function of its own between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.block, self.after = nn.Linear(6, 6), Called(F.hardsigmoid), nn.Linear(CLASSES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.after(torch.tanh(self.block(F.relu_(self.before(inputs)))))


@pytest.mark.parametrize(
    ("make", "loss", "name"),
    [
        (nested, F.cross_entropy, r"1\.1\.2 \(Hardsigmoid\)"),
        (InBlock, F.cross_entropy, r"block \(Called\)"),
        (lambda: Called(F.hardsigmoid), F.cross_entropy, r"the model \(Called\)"),
        (lambda: Called(torch.tanh), lambda z, y: F.hardsigmoid(z).square().mean(), "the loss"),
    ],
    ids=["module", "function in a block", "function in the model", "loss"],
)
def test_the_innermost_module_without_second_derivative_is_named(make, loss, name):
    model = build(make)
    before = snapshot(model)
    message = (
        "cannot differentiate this loss twice" if name == "the loss" else f"no second derivative.*; it is in {name}$"
    )
    with pytest.raises(ModelError, match=message):
        estimate_curvature(model, labelled(6), ClassificationTask(loss), num_probes=1)
    assert snapshot(model) == before
