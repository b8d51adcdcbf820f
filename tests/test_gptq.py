"""Compensated rounding: Grams against the model, sweeps against a naive reference, and what must never happen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from tracequant.core.errors import ModelError
from tracequant.core.weight_grid import WeightGrid
from tracequant.model.hooks import replaced_weights, weight_parameter
from tracequant.quantization import input_gram, rounding
from tracequant.quantization.compensate import Piece, compensate
from tracequant.quantization.gptq import descend, factorize, sweep
from tracequant.quantization.grid import Grid, choose_weight_grid
from tracequant.quantization.input_gram import input_grams
from tracequant.quantization.rounding import round_weights

TASK = tq.CallableTask(
    forward=lambda model, batch: model(batch[0]),
    loss=lambda outputs, batch: outputs.square().flatten(1).sum(1).mean(),
)


class Padded(nn.Module):
    """A convolution that pads inside its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.pad(x, (0, 1, 2, 1)))


class ByHand(nn.Module):
    """A weight that no module of torch's holds, as `[inputs, outputs]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.weight = nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight  # type: ignore[no-any-return]


class Twice(nn.Module):
    """A layer that is called twice: errors of both calls count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x), self.layer(x.flip(-1) * 3)], 1)


# A model with one layer, called "layer" or the model itself, and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, bias=False), (3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), padding=(2, 1), dilation=(1, 2), bias=False), (3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1, bias=False), (2, 4, 5, 3)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1, stride=2, bias=False), (6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2, bias=False), (4, 6, 6)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (2, 5, 5)),
    "same": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2, bias=False), (2, 6, 6)),
    "padded inside": (Padded, (4, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, bias=False), (4, 5, 5)),
    "transposed, grouped": (
        lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, padding=2, groups=2, dilation=2, bias=False),
        (4, 7),
    ),
    "transposed, 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=(2, 1, 3), bias=False), (2, 3, 3, 2)),
    "linear": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear, leading axes": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "by hand": (ByHand, (3, 5)),
    "called twice": (Twice, (3, 8)),
}


def single(name: str, samples: int = 6) -> tuple[nn.Module, list[Any]]:
    """A model of one layer in float64, and batches of unequal size."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model = build().double().eval()
    x = torch.randn(samples, *shape, dtype=torch.float64)
    # Inputs that are correlated, of unequal size and far from zero mean.
    x = x + 0.7 * x.roll(1, 1) + torch.linspace(-1, 2, shape[0]).view(-1, *([1] * (len(shape) - 1)))
    return model, [(x[: samples // 3],), (x[samples // 3 :],)]


def outputs(model: nn.Module, batches: list[Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for (x,) in batches])


def pieces_of(model: nn.Module, batches: list[Any]) -> tuple[tq.QuantizationPoints, list[Any]]:
    points = tq.discover(model, batches, TASK)
    (grams,) = input_grams(model, batches, TASK, points).values()
    return points, list(grams)


@pytest.mark.parametrize("name", LAYERS)
def test_a_gram_knows_what_a_change_of_the_weight_does_to_the_outputs(name: str) -> None:
    """Σ_rows ΔW A ΔWᵀ times the positions is the squared change of the layer's outputs, for any ΔW."""
    model, batches = single(name)
    points, grams = pieces_of(model, batches)
    (layer,) = points.layers
    weight = weight_parameter(model, layer).detach()
    change = torch.randn(weight.shape, dtype=torch.float64)
    before = outputs(model, batches)
    with replaced_weights(model, {layer.name: weight + change}, points):
        want = (outputs(model, batches) - before).square().sum()
    got = 0.0
    for gram in grams:
        matrix = change.flatten()[gram.positions]
        got += gram.rows * float((torch.matmul(matrix, gram.gram) * matrix).sum())
    assert got == pytest.approx(float(want), rel=1e-10)
    covered = torch.cat([gram.positions.flatten() for gram in grams])
    assert sorted(covered.tolist()) == list(range(weight.numel()))


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "transposed, grouped", "linear, leading axes"])
def test_the_sum_of_squared_errors_is_the_layers_measured_output_error(name: str) -> None:
    """At small damping GPTQ's own account of its error is what the outputs show."""
    model, batches = single(name, samples=24)
    points, (gram,) = pieces_of(model, batches)
    (layer,) = points.layers
    weight = weight_parameter(model, layer).detach()
    factor = factorize(gram.gram, torch.float64, damping=1e-12)
    grid = choose_weight_grid(weight, 3, layer.channel_axis, WeightGrid())
    piece = Piece(gram.positions, factor)
    levels = Grid(*(piece.arranged(part.expand(weight.shape)) for part in (grid.scale, grid.zero_point)), grid.num_bits)
    codes = sweep(piece.arranged(weight)[None], factor, Grid(levels.scale[None], levels.zero_point[None], 3))[0]
    rounded = weight.clone().flatten()
    rounded[gram.positions] = factor.restored(levels.dequantize(codes))
    before = outputs(model, batches)
    with replaced_weights(model, {layer.name: rounded.view(weight.shape)}, points):
        want = float((outputs(model, batches) - before).square().sum()) / gram.rows
    assert piece.output_error(rounded.view(weight.shape) - weight) == pytest.approx(want, rel=1e-6)
    nearest = grid.round(weight) - weight
    assert want < piece.output_error(nearest)


def by_least_squares(weight: Tensor, gram: Tensor, order: list[int], scale: Tensor, num_bits: int) -> Tensor:
    """GPTQ as it is defined: after each column the others are solved for anew, by least squares, in float64."""
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    rounded = torch.zeros_like(weight)
    for row in range(len(weight)):
        present = weight[row].clone()
        done: list[int] = []
        for column in order:
            rounded[row, column] = (present[column] / scale[row]).round().clamp(low, high) * scale[row]
            done.append(column)
            left = [c for c in order if c not in done]
            if left:
                # min over Δ_left of Δ A Δᵀ with Δ_done fixed: A_ll Δ_l = −A_ld Δ_d
                fixed = rounded[row, done] - weight[row, done]
                change = torch.linalg.solve(gram[left][:, left], -gram[left][:, done] @ fixed)
                present[left] = weight[row, left] + change
    return rounded


@pytest.mark.parametrize("columns", [5, 70])
def test_a_sweep_is_the_least_squares_solution_of_every_step(columns: int) -> None:
    """Blocks of columns and one Cholesky factor for the definition, columns after columns; 70 cross a block's end."""
    torch.manual_seed(1)
    x = torch.randn(200, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    gram, weight = x.T @ x / 200, torch.randn(3, columns, dtype=torch.float64)
    factor = factorize(gram[None], torch.float64, damping=1e-9)
    scale = torch.full((1, 1, 3, 1), 0.4, dtype=torch.float64)
    grid = Grid(scale, torch.full_like(scale, 8.0), 4)
    codes = sweep(factor.arranged(weight[None]), factor, grid)[0]
    order = factor.order[0].tolist()
    assert order == gram.diagonal().argsort(descending=True).tolist()
    got = factor.restored(grid.dequantize(codes)[0])[0]
    damped = gram + 1e-9 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(got, by_least_squares(weight, damped, order, scale.flatten(), 4))


def test_descent_ends_where_no_single_code_can_improve() -> None:
    torch.manual_seed(2)
    x = torch.randn(100, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    factor = factorize((x.T @ x / 100)[None], torch.float64)
    weight = torch.randn(1, 4, 6, dtype=torch.float64)
    scale = torch.full((1, 1, 4, 1), 0.7, dtype=torch.float64)
    grid = Grid(scale, torch.full_like(scale, 1.5), 2)
    codes = grid.quantize(weight[None])
    errors = [factor.error(grid.dequantize(codes) - weight)]
    for _ in range(20):
        codes = descend(weight, codes, factor, grid)
        errors.append(factor.error(grid.dequantize(codes) - weight))
    assert all(bool((after <= before + 1e-12).all()) for before, after in itertools.pairwise(errors))
    assert bool((errors[-1] < errors[0]).any())
    for column, level in itertools.product(range(6), range(4)):
        other = codes.clone()
        other[..., column] = level
        assert bool((factor.error(grid.dequantize(other) - weight) >= errors[-1] - 1e-12).all())


GRIDS = [
    WeightGrid(), WeightGrid(per_channel=False), WeightGrid(symmetric=False),
    WeightGrid(per_channel=False, symmetric=False),
]  # fmt: skip


@pytest.mark.parametrize("settings", GRIDS, ids=str)
@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["conv2d", "depthwise", "transposed, grouped", "by hand"])
def test_codes_lie_on_the_grid_and_err_less_than_the_nearest(name: str, num_bits: int, settings: WeightGrid) -> None:
    """Balanced grids of 1 and 2 bits, scales across rows and of the whole tensor, ranges that are not symmetric."""
    model, batches = single(name, samples=24)
    points, grams = pieces_of(model, batches)
    (layer,) = points.layers
    weight = weight_parameter(model, layer).detach()
    pieces = [Piece.of(gram, weight.dtype) for gram in grams]
    codes, grid = compensate(weight, pieces, num_bits, layer.channel_axis, settings)
    assert codes.shape == weight.shape
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= 2**num_bits - 1
    assert torch.equal(codes, codes.round())
    nearest = choose_weight_grid(weight, num_bits, layer.channel_axis, settings)
    assert grid.scale.shape == nearest.scale.shape
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)  # as packing takes them from the weight
    error = sum(piece.output_error(grid.dequantize(codes) - weight) for piece in pieces)
    assert error <= sum(piece.output_error(nearest.round(weight) - weight) for piece in pieces) * (1 + 1e-9)


def convolutions() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).eval()  # fmt: skip
    x = torch.rand(20, 3, 6, 6)
    return model, [(x[:12],), (x[12:],)]


def all_bits(points: tq.QuantizationPoints, bits: tuple[int, ...] = (2, 4)) -> dict[str, tuple[int, ...]]:
    return {layer.name: bits for layer in points.layers}


def test_what_is_priced_is_what_is_quantized_and_packed(tmp_path: Path) -> None:
    """One pass over the inputs; sensitivities, the quantized model and the packed file have the same codes."""
    model, batches = convolutions()
    points = tq.discover(model, batches, TASK)
    rounded = round_weights(model, batches, TASK, points, all_bits(points))
    curvature = tq.estimate_curvature(model, batches, TASK, points=points, activations=False)
    table = tq.measure_sensitivity(
        model, batches, TASK, curvature, weight_bits=(2, 4), activation_bits=(), rounded=rounded
    )
    assert table.weight_errors == rounded.errors
    plan = tq.uniform_plan(table, 2)
    alone = tq.quantize(model, batches, TASK, plan)  # rounds by itself, one width alone
    given = tq.quantize(model, batches, TASK, plan, rounded=rounded)
    for layer in points.layers:
        want = rounded.layers[layer.name][2].values
        for quantized in (alone, given):
            assert torch.equal(quantized.get_submodule(layer.name).weight, want)  # type: ignore[arg-type]
    assert tq.pack(given, tmp_path / "m.safetensors") == plan.size_bytes
    assert torch.equal(tq.load(tmp_path / "m.safetensors", model)(batches[0][0]), given(batches[0][0]))


def test_outputs_move_less_than_with_the_nearest() -> None:
    model, batches = convolutions()
    points = tq.discover(model, batches, TASK)
    before = outputs(model, batches)
    moved = {}
    for name in ("gptq", "nearest"):
        grid = WeightGrid(rounding=name)  # type: ignore[arg-type]
        rounded = round_weights(model, batches, TASK, points, all_bits(points), weight_grid=grid)
        for num_bits in (2, 4):
            values = {n: widths[num_bits].values for n, widths in rounded.layers.items()}
            with replaced_weights(model, values, points):
                moved[name, num_bits] = float((outputs(model, batches) - before).square().mean())
    assert moved["gptq", 2] < 0.5 * moved["nearest", 2]
    assert moved["gptq", 4] < 0.5 * moved["nearest", 4]


def test_the_output_error_is_that_of_eq_10_for_inputs_alike() -> None:
    """Uncorrelated inputs of one size: the weighted error is the squared error, and so is Ω that of the paper."""
    model = nn.Linear(4, 3, bias=False).double()
    x = 2.0 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    points = tq.discover(model, [(x,)], TASK)
    rounded = round_weights(model, [(x,)], TASK, points, all_bits(points))
    (name,) = rounded.layers
    for weight in rounded.layers[name].values():
        assert weight.output_error == pytest.approx(weight.squared_error, rel=0.011)  # the damping, 1 %


class Interrupted(Exception):
    pass


def test_a_killed_call_resumes_with_the_same_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = convolutions()
    points = tq.discover(model, batches, TASK)
    whole = round_weights(model, batches, TASK, points, all_bits(points))
    compute, done = rounding._compensated, []

    def dies(*arguments: Any) -> Any:
        if len(done) == 2:
            raise Interrupted
        done.append(arguments[3].name)
        return compute(*arguments)

    monkeypatch.setattr(rounding, "_compensated", dies)
    with pytest.raises(Interrupted):
        round_weights(model, batches, TASK, points, all_bits(points), cache=tmp_path)
    again: list[str] = []
    monkeypatch.setattr(rounding, "_compensated", lambda *a: (again.append(a[3].name), compute(*a))[1])
    resumed = round_weights(model, batches, TASK, points, all_bits(points), cache=tmp_path)
    assert again == [layer.name for layer in points.layers][2:]
    assert_equal(resumed, whole)
    # Other data, another grid and a damaged file are not taken for these.
    again.clear()
    round_weights(model, [(x + 1,) for (x,) in batches], TASK, points, all_bits(points), cache=tmp_path)
    round_weights(
        model, batches, TASK, points, all_bits(points), weight_grid=WeightGrid(per_channel=False), cache=tmp_path
    )
    assert len(again) == 6
    for damage in (lambda data: data[:100], lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]):
        for file in tmp_path.rglob("*.safetensors"):
            file.write_bytes(damage(file.read_bytes()))
        again.clear()
        assert_equal(round_weights(model, batches, TASK, points, all_bits(points), cache=tmp_path), whole)
        assert len(again) == 3


def assert_equal(first: tq.RoundedWeights, second: tq.RoundedWeights) -> None:
    assert first.errors == second.errors
    for name, widths in first.layers.items():
        for num_bits, weight in widths.items():
            other = second.layers[name][num_bits]
            assert torch.equal(weight.codes, other.codes)
            assert torch.equal(weight.grid.scale, other.grid.scale)


def test_layers_in_groups_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one layer's Gram at a time: as many passes, equal results."""
    model, batches = convolutions()
    points = tq.discover(model, batches, TASK)
    whole = round_weights(model, batches, TASK, points, all_bits(points))
    monkeypatch.setattr(rounding, "GRAM_BYTES", 1)
    passes = []
    monkeypatch.setattr(rounding, "input_grams", lambda *a, **k: (passes.append(1), input_grams(*a, **k))[1])
    parts = round_weights(model, batches, TASK, points, all_bits(points))
    assert len(passes) == 3
    for name, widths in whole.layers.items():
        assert torch.equal(widths[4].codes, parts.layers[name][4].codes)


def test_long_rows_are_compensated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = convolutions()
    points = tq.discover(model, batches, TASK)
    monkeypatch.setattr(input_gram, "COLUMNS", 50)
    grams = input_grams(model, batches, TASK, points)
    assert [len(parts) for parts in grams.values()] == [1, 1, 3]
    rounded = round_weights(model, batches, TASK, points, all_bits(points))
    nearest = round_weights(model, batches, TASK, points, all_bits(points), weight_grid=WeightGrid(rounding="nearest"))
    assert rounded.layers["5"][4].output_error < nearest.layers["5"][4].squared_error


def test_many_positions_are_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the positions gives nearly the Gram of all, the same one every time."""
    torch.manual_seed(4)
    model = nn.Conv2d(2, 3, 3, bias=False)
    batches = [(torch.rand(8, 2, 40, 40),)]
    points = tq.discover(model, batches, TASK)
    (some,), (again,) = (next(iter(input_grams(model, batches, TASK, points).values())) for _ in range(2))
    assert some.rows == 8 * input_gram.POSITIONS
    assert torch.equal(some.gram, again.gram)
    monkeypatch.setattr(input_gram, "POSITIONS", 10**6)
    (every,) = next(iter(input_grams(model, batches, TASK, points).values()))
    assert every.rows == 8 * 38 * 38
    torch.testing.assert_close(some.gram, every.gram, rtol=0.05, atol=0.01)


def test_inputs_that_are_always_zero_and_one_image() -> None:
    """Fewer positions than columns, and columns without any: nothing is infinite, dead columns go to the nearest."""
    torch.manual_seed(5)
    model = nn.Linear(6, 4)
    x = torch.randn(1, 6)
    x[:, 2] = 0
    points = tq.discover(model, [(x,)], TASK)
    rounded = round_weights(model, [(x,)], TASK, points, all_bits(points, (3,)))
    weight = rounded.layers["weight" if "weight" in rounded.layers else next(iter(rounded.layers))][3]
    assert bool(weight.values.isfinite().all())
    dead = model.weight.detach()[:, 2:3]
    assert torch.equal(weight.values[:, 2:3], weight.grid.round(dead))
    nothing = torch.zeros(2, 6)
    silent = round_weights(model, [(nothing,)], TASK, points, all_bits(points, (3,)))
    assert bool(next(iter(silent.layers.values()))[3].values.isfinite().all())


def test_an_embedding_is_rounded_to_the_nearest() -> None:
    """Each of its rows is read alone, so that nothing can be repaired."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(24, 2))
    batches = [(torch.randint(9, (5, 3)),)]
    points = tq.discover(model, batches, TASK)
    rounded = round_weights(model, batches, TASK, points, all_bits(points))
    nearest = round_weights(model, batches, TASK, points, all_bits(points), weight_grid=WeightGrid(rounding="nearest"))
    assert torch.equal(rounded.layers["0"][2].codes, nearest.layers["0"][2].codes)
    assert not torch.equal(rounded.layers["2"][2].codes, nearest.layers["2"][2].codes)


def test_attention_and_recurrent_matrices_are_compensated() -> None:
    torch.manual_seed(7)

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.recurrent = nn.LSTM(8, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.recurrent(self.attention(x, x, x)[0])[0]  # type: ignore[no-any-return]

    model, batches = Sequence().eval(), [(torch.randn(6, 5, 8) + 1,)]
    points = tq.discover(model, batches, TASK)
    rounded = round_weights(model, batches, TASK, points, all_bits(points, (3,)))
    nearest = round_weights(
        model, batches, TASK, points, all_bits(points, (3,)), weight_grid=WeightGrid(rounding="nearest")
    )
    assert {"attention.in_proj_weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"} <= rounded.layers.keys()
    for name in rounded.layers:
        assert rounded.layers[name][3].output_error < nearest.layers[name][3].squared_error


def test_a_shuffled_memory_layout_changes_nothing() -> None:
    model, batches = convolutions()
    points = tq.discover(model, batches, TASK)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    first, second = (
        round_weights(net, batches, TASK, points, all_bits(points, (3,))).layers["0"][3] for net in (model, last)
    )
    assert torch.equal(first.codes, second.codes)


def test_an_input_that_is_not_a_number_is_named() -> None:
    model, batches = convolutions()
    points = tq.discover(model, batches, TASK)
    with torch.no_grad():
        model[0].bias[3] = torch.inf
    with pytest.raises(ModelError, match="the input of layer 2 is NaN or infinite"):
        round_weights(model, batches, TASK, points, all_bits(points))
    with torch.no_grad():
        model[2].weight[0] = torch.inf
    with pytest.raises(ModelError, match="layer 2 holds weights that are NaN"):
        round_weights(model, batches, TASK, points, all_bits(points))
    with pytest.raises(ModelError, match="from 1 to 8"):
        round_weights(model, batches, TASK, points, {"0": (9,)})
