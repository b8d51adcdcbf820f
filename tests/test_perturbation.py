"""The expansion of the loss in the roundings, against Jacobians and Hessians written out."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import (
    CLASSES,
    EnergyTask,
    attention_net,
    build,
    conv_net,
    images,
    labelled,
    residual_net,
    shared_head_net,
    snapshot,
    tied_net,
    token_batch,
)
from test_sensitivity import made_up
from tracequant import (
    ClassificationTask,
    ModelError,
    Perturbation,
    QuantizationPoints,
    Task,
    WeightGrid,
    discover,
    estimate_curvature,
)
from tracequant.core.sensitivity import combine
from tracequant.core.settings import CRITERIA, EXPANSIONS
from tracequant.curvature import batch_loop
from tracequant.curvature.output_hessian import loss_hessian
from tracequant.measure import perturbation, sensitivity
from tracequant.model.hooks import reading, weight_parameter
from tracequant.model.state import frozen_evaluation
from tracequant.model.task import total_loss
from tracequant.quantization.calibrate import calibrate
from tracequant.quantization.grid import choose_weight_grid
from tracequant.quantization.rounding import round_weights

TASK = ClassificationTask()
NEAREST = WeightGrid(rounding="nearest")
# The expansion is compared with roundings that a test can make itself.
measure_perturbation = functools.partial(perturbation.measure_perturbation, weight_grid=NEAREST)
measure_sensitivity = functools.partial(sensitivity.measure_sensitivity, weight_grid=NEAREST)


def nearest_errors(model: nn.Module, points: QuantizationPoints) -> dict[str, dict[int, float]]:
    """‖ΔW‖² of rounding to the nearest, which reads no data."""
    bits = {layer.name: BITS for layer in points.layers}
    return round_weights(model, [], TASK, points, bits, weight_grid=NEAREST).errors


BITS = (2, 4)


def explicit(model: nn.Module, batches: list[Any], task: Task, bits: tuple[int, ...] = BITS) -> tuple[Tensor, Tensor]:
    """E[g·ΔW] `[options]` and JᵀH_L J `[options, options]`, J the outputs' derivatives along every rounding."""
    points = discover(model, batches, task)
    model.eval()
    weights = [weight_parameter(model, layer) for layer in points.layers]
    moves = [
        [choose_weight_grid(w.detach(), b, layer.channel_axis, NEAREST).round(w.detach()) - w.detach() for b in bits]
        for w, layer in zip(weights, points.layers, strict=True)
    ]
    first: Any = 0
    second: Any = 0
    samples = 0
    for batch in batches:
        outputs = task.outputs(model, batch)
        shape, flat = outputs.shape, outputs.flatten()
        rows = []
        for value in flat:
            gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            rows.append(
                torch.stack(
                    [
                        torch.zeros((), dtype=flat.dtype) if g is None else (g * move).sum()
                        for g, own in zip(gradients, moves, strict=True)
                        for move in own
                    ]
                )
            )
        jacobian = torch.stack(rows)
        z = flat.detach()

        def loss(z: Tensor, batch: Any = batch, shape: Any = shape) -> Tensor:
            return task.loss(z.reshape(shape), batch)

        size = task.batch_size(batch)
        first = first + size * torch.func.grad(loss)(z) @ jacobian
        second = second + size * jacobian.T @ torch.func.jacrev(torch.func.jacrev(loss))(z) @ jacobian
        samples += size
    return first / samples, second / samples


def square(result: Perturbation) -> Tensor:
    """The products as a symmetric matrix."""
    size = len(result.products)
    lower = torch.zeros(size, size, dtype=torch.float64)
    for i, row in enumerate(result.products):
        lower[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
    return lower + lower.tril(-1).T


def alone(module: nn.Module) -> Callable[[], nn.Module]:
    return lambda: build(lambda: nn.Sequential(module, nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)))


class Geometry(nn.Module):
    """Layers of many geometries in one network of images 3 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2, padding="same", groups=4)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.line = nn.Conv1d(2, 3, 5, stride=3)
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.dilated(torch.relu(self.reflect(x))))
        x = torch.relu(self.up(x, output_size=(16, 15)))
        return self.fc(torch.relu(self.line(x.flatten(2))).mean(2))


class MaskedNet(nn.Module):
    """A weight is multiplied by a mask before it is read, which no operation that is known does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.masked, self.fc = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, CLASSES)
        self.register_buffer("mask", (torch.arange(20) % 3 > 0).view(4, 5).double())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.fc(torch.relu(nn.functional.linear(hidden, self.masked.weight * self.mask)))


def masked_net() -> nn.Module:
    return build(MaskedNet)


class CrossNet(nn.Module):
    """Attention whose keys and values are one tensor, so that its weight is split in two, and a reordered weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        memory = x.flip(1)
        x = self.attention(x, memory, memory, need_weights=False)[0]
        weight = self.fc.weight.view(CLASSES, 2, 2).permute(1, 0, 2).reshape(2 * CLASSES, 2)
        return torch.nn.functional.linear(x.mean(1)[:, :2], weight)[:, :CLASSES]


class Energy(EnergyTask):
    """Energy of outputs whose batch is one tensor."""

    def __init__(self) -> None:
        super().__init__(0.5)


CASES = {
    "conv": (conv_net, images((4, 3)), TASK),
    "residual": (residual_net, images((3,)), TASK),
    "called twice": (shared_head_net, images((3,)), TASK),
    "geometry": (lambda: build(Geometry), images((2, 1)), TASK),
    "tied": (tied_net, [(token_batch()[0],)], Energy()),
    "attention": (attention_net, labelled(4, 3, sizes=(3,)), TASK),
    "cross-attention": (lambda: build(CrossNet), labelled(4, 3, sizes=(3,)), TASK),
    "masked": (masked_net, labelled(6, sizes=(3, 1)), TASK),
}


@pytest.mark.filterwarnings("ignore:layers .* are read by operations")
@pytest.mark.parametrize("name", CASES)
def test_against_jacobian_and_hessian_of_the_outputs(name: str) -> None:
    make, batches, task = CASES[name]
    model = make()
    points = discover(model, batches, task)
    result = measure_perturbation(model, batches, task, points, weight_bits=BITS, num_probes="exact")
    first, second = explicit(make(), batches, task)
    assert float(second.abs().max()) > 1e-6
    torch.testing.assert_close(
        torch.tensor(result.first_order, dtype=torch.float64), first, rtol=1e-8, atol=1e-10 * float(first.abs().max())
    )
    torch.testing.assert_close(square(result), second, rtol=1e-8, atol=1e-10 * float(second.abs().max()))
    assert result.samples == sum(task.batch_size(batch) for batch in batches)


@pytest.mark.filterwarnings("ignore:layers .* are read by operations")
@pytest.mark.parametrize("draws", ["exact", 64])
@pytest.mark.parametrize("name", [name for name in CASES if name != "tied"])
def test_activations_against_derivatives_along_their_rounding(name: str, draws: Any) -> None:
    """Of outputs and loss with t Δa added to what all consumers of an activation read, by t at 0."""
    make, batches, task = CASES[name]
    model = make()
    points = discover(model, batches, task)
    result = measure_perturbation(
        model, batches, task, points, weight_bits=(4,), activation_bits=(3, 2), num_probes=draws
    )
    grids = calibrate(model, batches, task, points, bits={p.name: [2, 3, 8] for p in points.activations})
    total = sum(task.batch_size(batch) for batch in batches)
    assert set(result.activation_second) == {point.name for point in points.activations}
    for point in points.activations:
        assert list(result.activation_second[point.name]) == ([8] if point.is_model_input else [2, 3])
        for bits in result.activation_second[point.name]:
            first = second = 0.0
            for batch in batches:

                def outputs(t: Tensor, grid: Any = grids[point.name][bits], batch: Any = batch) -> Tensor:
                    moved: dict[int, tuple[Tensor, Tensor]] = {}

                    def read(own: str, a: Tensor) -> Tensor | None:
                        if own != point.name:  # noqa: B023 - called at once
                            return None
                        return moved.setdefault(id(a), (a, a + t * (grid.round(a) - a).detach()))[1]

                    with frozen_evaluation(model), reading(model, points, read):
                        return torch.as_tensor(task.outputs(model, batch))

                zero = torch.zeros((), dtype=torch.float64)
                z = outputs(zero).detach().requires_grad_()
                along = torch.autograd.functional.jacobian(outputs, zero)
                (slope,) = torch.autograd.grad(total_loss(task, z, batch), z)
                _, product = loss_hessian(task, z, batch)
                share = task.batch_size(batch) / total
                first += share * float((slope * along).sum())
                second += share * 0.5 * float((along * product([along])[0]).sum())
            assert result.activation_first[point.name][bits] == pytest.approx(first, rel=1e-8, abs=1e-12)
            # 64 signs of one group are exact where there are no more columns.
            assert result.activation_second[point.name][bits] == pytest.approx(second, rel=1e-8, abs=1e-12)
    assert any(value > 1e-8 for own in result.activation_second.values() for value in own.values())


@pytest.mark.filterwarnings("ignore:.*fewer bits lower the loss:UserWarning")
def test_the_expansion_of_activations_is_their_omega(tmp_path: Path) -> None:
    model, batches = conv_net(), images((4, 3))
    curvature = estimate_curvature(model, batches, TASK, estimator="gauss_newton")
    tables = {
        metric: measure_sensitivity(
            model, batches, TASK, curvature, weight_bits=BITS, activation_bits=(2, 4), criterion=metric
        )
        for metric in ("trace", "quadratic", "first+quadratic")
    }
    expansion = measure_perturbation(model, batches, TASK, curvature.points, weight_bits=BITS, activation_bits=(2, 4))
    assert tables["quadratic"].activation_omega == expansion.activation_second
    for name, own in tables["first+quadratic"].activation_omega.items():
        assert own == {b: expansion.activation_second[name][b] + expansion.activation_first[name][b] for b in own}
    expansion.save(tmp_path / "perturbation.json")
    assert Perturbation.load(tmp_path / "perturbation.json") == expansion
    # One without activations gives them half of the trace's.
    weights_only = measure_perturbation(model, batches, TASK, curvature.points, weight_bits=BITS)
    table = combine(
        curvature,
        tables["trace"].weight_errors,
        tables["trace"].activation_errors,
        NEAREST,
        criterion="quadratic",
        perturbation=weights_only,
    )
    for name, own in table.activation_omega.items():
        assert own == pytest.approx({b: x / 2 for b, x in tables["trace"].activation_omega[name].items()})


@pytest.mark.parametrize("draws", ["exact", 4])
def test_activations_of_processes_and_microbatches_add_up(draws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes have some of the draws each, and memory for two samples at a time takes nothing away."""
    model, batches = conv_net(), images((6,))
    points = discover(model, batches, TASK)

    def measured() -> Perturbation:
        return measure_perturbation(
            model, batches, TASK, points, weight_bits=BITS, activation_bits=(2, 4), num_probes=draws
        )

    def assert_close(found: Perturbation) -> None:
        for one, other in (
            (found.activation_second, alone.activation_second),
            (found.activation_first, alone.activation_first),
        ):
            for name, own in one.items():
                assert own == pytest.approx(other[name], rel=1e-9, abs=1e-14)

    alone = measured()
    with monkeypatch.context() as patch:
        patch.setattr(batch_loop, "_shares", lambda *given: 3)
        assert_close(measured())
    if draws == "exact":  # other samples' signs would be others
        monkeypatch.setattr(batch_loop._Collector, "_expected_count", lambda collector, whole: 3)
        found = measured()
        assert "batches cut to 2 samples" in found.reason
        assert_close(found)


def test_what_takes_the_slow_way_is_said() -> None:
    """Which is what makes the case "masked" a test of it."""
    batches = labelled(6, sizes=(3,))
    model = masked_net()
    with pytest.warns(UserWarning, match="layers masked are read by operations"):
        result = measure_perturbation(model, batches, TASK, discover(model, batches, TASK), weight_bits=BITS)
    assert "a backward pass for each sample for masked" in result.reason


def test_draws_and_division_into_batches_and_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 draws cancel all products of 5 columns; a batch cut into microbatches, or in two, is the same samples."""
    model = conv_net()
    points = discover(model, images((6,)), TASK)
    exact = measure_perturbation(model, images((6,)), TASK, points, weight_bits=BITS, num_probes="exact")
    drawn = measure_perturbation(model, images((6,)), TASK, points, weight_bits=BITS, num_probes=64)
    few = measure_perturbation(model, images((6,)), TASK, points, weight_bits=BITS, num_probes=1)
    torch.testing.assert_close(square(drawn), square(exact), rtol=1e-6, atol=1e-9)
    assert float((square(few) - square(exact)).norm() / square(exact).norm()) > 1e-3
    (x, y) = images((6,))[0]
    two = measure_perturbation(model, [(x[:2], y[:2]), (x[2:], y[2:])], TASK, points, weight_bits=BITS)
    torch.testing.assert_close(square(two), square(exact), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(batch_loop._Collector, "_expected_count", lambda self, whole: 3)
    cut = measure_perturbation(model, images((6,)), TASK, points, weight_bits=BITS)
    assert "cut to 2 samples" in cut.reason
    torch.testing.assert_close(square(cut), square(exact), rtol=1e-9, atol=1e-12)
    assert cut.first_order == pytest.approx(exact.first_order, rel=1e-9)


@pytest.mark.parametrize("draws", [None, 4])
def test_draws_that_processes_share_out_count_once(draws: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch for three processes: each has some of the draws, or takes all of the few columns for its share."""
    model, batches = conv_net(), images((6,))
    points = discover(model, batches, TASK)
    alone = measure_perturbation(model, batches, TASK, points, weight_bits=BITS, num_probes=draws)
    monkeypatch.setattr(batch_loop, "_shares", lambda *given: 3)
    shared = measure_perturbation(model, batches, TASK, points, weight_bits=BITS, num_probes=draws)
    torch.testing.assert_close(square(shared), square(alone), rtol=1e-9, atol=1e-12)
    assert shared.first_order == pytest.approx(alone.first_order, rel=1e-9)


def test_it_is_what_the_loss_does_for_small_steps() -> None:
    """At 8 bits the rounding is small: the expansion must predict the loss itself, sign included."""
    batches = images((6,))
    model = conv_net().eval()
    points = discover(model, batches, TASK)
    omega = measure_perturbation(model, batches, TASK, points, weight_bits=(8,)).omega(first_order=True)
    before = TASK.evaluate(model, batches).loss
    for layer in points.layers:
        weight = weight_parameter(model, layer)
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(choose_weight_grid(saved, 8, layer.channel_axis, NEAREST).round(saved))
        change = TASK.evaluate(model, batches).loss - before
        with torch.no_grad():
            weight.copy_(saved)
        assert change == pytest.approx(omega[layer.name][8], rel=0.15)  # a few ReLUs switch


def test_the_model_comes_back_as_it_was_and_the_result_saves(tmp_path) -> None:
    model = residual_net()
    before = snapshot(model)
    result = measure_perturbation(model, images((3,)), TASK, discover(model, images(), TASK), weight_bits=BITS)
    assert snapshot(model) == before
    result.save(tmp_path / "p.json")
    assert Perturbation.load(tmp_path / "p.json") == result


def test_a_checkpoint_is_of_its_activation_grids(tmp_path: Path) -> None:
    """More batches widen the ranges: what was measured of the first batch is then not of these grids."""
    model, (batch,) = conv_net(), images()
    big = (batch[0] * 5, batch[1])
    points = discover(model, [batch], TASK)

    def measured(batches: list[Any], checkpoint: Path | None) -> Perturbation:
        return measure_perturbation(
            model, batches, TASK, points, weight_bits=(4,), activation_bits=(4,), checkpoint=checkpoint
        )

    first = measured([batch], tmp_path)
    assert measured([batch, big], tmp_path) == measured([batch, big], None)
    assert measured([batch], tmp_path) == first


def test_errors_name_what_is_wrong() -> None:
    model = conv_net()
    points = discover(model, images(), TASK)
    with pytest.raises(ModelError, match="num_probes must be"):
        measure_perturbation(model, images(), TASK, points, weight_bits=BITS, num_probes=0)
    with pytest.raises(ModelError, match="bit widths go from 1 to 8, got 9"):
        measure_perturbation(model, images(), TASK, points, weight_bits=(9,))
    with pytest.raises(ModelError, match="name at least one"):
        measure_perturbation(model, images(), TASK, points, weight_bits=())
    model.fc.weight.data.zero_()
    del model.conv2
    with pytest.raises(ModelError, match=r"layer conv2"):
        measure_perturbation(model, images(), TASK, points, weight_bits=BITS)


# Metrics


def test_every_metric_is_the_formula_that_is_documented() -> None:
    model = conv_net()
    batches = images()
    points = discover(model, batches, TASK)
    eigenvalues = {layer.name: float(10 + i) for i, layer in enumerate(points.layers)}
    curvature = dataclasses.replace(made_up(points, average_trace=0.5), top_eigenvalues=eigenvalues)
    errors = round_weights(
        model, [], TASK, points, {layer.name: BITS for layer in points.layers}, weight_grid=NEAREST
    ).errors
    activations = {point.name: {4: 0.25} for point in points.activations}
    expansion = measure_perturbation(model, batches, TASK, points, weight_bits=BITS)
    numel = {layer.name: layer.numel for layer in points.layers}
    trace = {name: 0.5 * (i + 1) for i, name in enumerate(numel)}
    second = {(n, b): 0.5 * expansion.products[i][-1] for i, (n, b) in enumerate((n, b) for n in numel for b in BITS)}
    slope = dict(zip(second, expansion.first_order, strict=True))
    want = {
        "trace": lambda n, b: trace[n] * errors[n][b],
        "l2": lambda n, b: errors[n][b],
        "eigenvalue": lambda n, b: eigenvalues[n] / numel[n] * errors[n][b],
        "eigenvalue_alone": lambda n, b: eigenvalues[n] * errors[n][b],
        "quadratic": lambda n, b: second[n, b],
        "first+quadratic": lambda n, b: second[n, b] + slope[n, b],
    }
    assert {*want} == set(CRITERIA)
    for metric, formula in want.items():
        table = combine(curvature, errors, activations, NEAREST, criterion=metric, perturbation=expansion)
        assert table.criterion == metric
        assert table.weight_omega == {n: {b: pytest.approx(formula(n, b)) for b in BITS} for n in numel}
        for i, point in enumerate(points.activations):
            rank = 1 + len(numel) + i
            factor = 1.0 if metric == "l2" else 0.5 * rank * (0.5 if metric in EXPANSIONS else 1.0)
            assert table.activation_omega[point.name][4] == pytest.approx(0.25 * factor)


def test_metrics_refuse_what_they_have_no_ingredients_for() -> None:
    model = conv_net()
    points = discover(model, images(), TASK)
    errors = round_weights(
        model, [], TASK, points, {layer.name: BITS for layer in points.layers}, weight_grid=NEAREST
    ).errors
    curvature = made_up(points)
    with pytest.raises(ModelError, match="unknown criterion 'hessian'; choose trace, l2"):
        combine(curvature, errors, {}, NEAREST, criterion="hessian")
    with pytest.raises(ModelError, match="no eigenvalues"):
        combine(curvature, errors, {}, NEAREST, criterion="eigenvalue")
    with pytest.raises(ModelError, match="needs the roundings"):
        combine(curvature, errors, {}, NEAREST, criterion="quadratic")
    other = measure_perturbation(model, images(), TASK, points, weight_bits=(2, 3))
    with pytest.raises(ModelError, match=r"measured at \[2, 3\] bits"):
        combine(curvature, errors, {}, NEAREST, criterion="quadratic", perturbation=other)


def test_measure_sensitivity_measures_what_the_metric_needs() -> None:
    model = conv_net()
    batches = images()
    curvature = made_up(discover(model, batches, TASK))
    by_eigenvalue = measure_sensitivity(
        model, batches, TASK, curvature, weight_bits=BITS, activation_bits=(), criterion="eigenvalue"
    )
    ratio = {
        n: by_eigenvalue.weight_omega[n][2] / by_eigenvalue.weight_errors[n][2] for n in by_eigenvalue.weight_omega
    }
    assert all(value > 0 for value in ratio.values())
    quadratic = measure_sensitivity(
        model, batches, TASK, curvature, weight_bits=BITS, activation_bits=(), criterion="quadratic"
    )
    _, second = explicit(conv_net(), batches, TASK)
    got = [omega for by_bits in quadratic.weight_omega.values() for omega in by_bits.values()]
    assert got == pytest.approx((0.5 * second.diagonal()).tolist(), rel=1e-8)
