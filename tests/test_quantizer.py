"""Grids, the choice of ranges, and the straight-through rounding that fine-tuning differentiates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tracequant.core.errors import ModelError
from tracequant.core.packed_layout import symmetric_zero_point
from tracequant.core.weight_grid import WeightGrid
from tracequant.quantization import grid
from tracequant.quantization.convert import quantize_activation, quantize_weight
from tracequant.quantization.grid import Grid, choose_grid, choose_weight_grid, grid_for_range
from tracequant.quantization.quantizer import (
    ActivationQuantizer,
    FakeQuantize,
    Quantizer,
    activation_quantizers,
    weight_quantizers,
)

torch.set_num_threads(1)

BITS = range(1, 9)
# Every magnitude a trained tensor can have, far from where float32 itself gives up.
SCALES = st.floats(min_value=2.0**-60, max_value=2.0**60, width=32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def appendix_a(values: Tensor, first: float, last: float, num_bits: int) -> Tensor:
    """Clamp, index, value: the three lines of Appendix A for one tensor with one range, in Python floats."""
    delta = (last - first) / (2**num_bits - 1)
    result = []
    for value in values.flatten().tolist():
        clamped = min(max(value, first), last)
        index = round((clamped - first) / delta)
        result.append(delta * index + first)
    return torch.tensor(result, dtype=torch.float64).reshape(values.shape)


def ends(grid: Grid) -> tuple[Tensor, Tensor]:
    """q_0 and q_{2^k-1}."""
    return -grid.zero_point * grid.scale, (2**grid.num_bits - 1 - grid.zero_point) * grid.scale


# Codes and values


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_quantize_gives_back_the_codes_that_were_dequantized(
    num_bits: int, symmetric: bool, data: st.DataObject
) -> None:
    channels = data.draw(st.integers(1, 4), "channels")
    scale = torch.tensor(data.draw(st.lists(SCALES, min_size=channels, max_size=channels), "scales")).reshape(-1, 1)
    if symmetric:
        zero_point = torch.full_like(scale, symmetric_zero_point(num_bits))
    else:
        points = st.lists(st.integers(0, 2**num_bits - 1), min_size=channels, max_size=channels)
        zero_point = torch.tensor(data.draw(points, "zero points"), dtype=torch.float32).reshape(-1, 1)
    grid = Grid(scale, zero_point, num_bits)
    codes = torch.arange(2**num_bits, dtype=torch.float32).repeat(channels, 1)

    values = grid.dequantize(codes)

    assert torch.equal(grid.quantize(values), codes)
    assert torch.equal(grid.round(values), values)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("channel_axis", [None, 0, 1])
def test_rounding_twice_is_rounding_once_on_chosen_grids(
    num_bits: int, symmetric: bool, channel_axis: int | None
) -> None:
    values = random(5, 7, 3, seed=num_bits) * torch.logspace(-6, 6, 5)[:, None, None]

    grid = choose_grid(values, num_bits, symmetric, channel_axis)
    codes = grid.quantize(values)

    expected = {None: [1, 1, 1], 0: [5, 1, 1], 1: [1, 7, 1]}[channel_axis]
    assert list(grid.scale.shape) == list(grid.zero_point.shape) == expected
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 2**num_bits - 1
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_is_the_formula_of_appendix_a(num_bits: int, symmetric: bool) -> None:
    """Float64 random values never sit within rounding error of the middle between two grid points."""
    values = random(400, seed=num_bits, dtype=torch.float64)
    low, high = torch.tensor(-1.1, dtype=torch.float64), torch.tensor(1.9, dtype=torch.float64)
    grid = grid_for_range(low, high, num_bits, symmetric)
    first, last = (float(end) for end in ends(grid))

    naive = appendix_a(values, first, last, num_bits)

    torch.testing.assert_close(grid.round(values), naive, rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_outside_the_range_go_to_the_ends(num_bits: int, symmetric: bool) -> None:
    grid = grid_for_range(torch.tensor(-1.0), torch.tensor(2.0), num_bits, symmetric)
    first, last = ends(grid)

    rounded = grid.round(torch.tensor([-1e6, float(first) * 3 - 1, float(last) * 3 + 1, 1e6]))

    assert rounded.tolist() == [float(first), float(first), float(last), float(last)]


@pytest.mark.parametrize("num_bits", BITS)
@settings(max_examples=60, deadline=None)
@given(low=st.floats(-1e4, 1e4, width=32), high=st.floats(-1e4, 1e4, width=32))
def test_asymmetric_grids_hold_zero_and_cover_the_range(num_bits: int, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    grid = grid_for_range(torch.tensor(low), torch.tensor(high), num_bits, symmetric=False)
    zero = torch.zeros(())
    first, last = ends(grid)

    assert grid.round(zero) == 0
    assert grid.zero_point == grid.zero_point.round()
    assert 0 <= grid.zero_point <= 2**num_bits - 1
    # Moving the zero point to an integer may shift the range by half a step, not more.
    half = 0.5 * float(grid.scale) * (1 + 1e-5)
    assert float(first) <= min(low, 0.0) + half
    assert float(last) >= max(high, 0.0) - half


@pytest.mark.parametrize("num_bits", BITS)
@settings(max_examples=40, deadline=None)
@given(low=st.floats(-1e4, 1e4, width=32), high=st.floats(-1e4, 1e4, width=32))
def test_symmetric_grids_cover_the_range(num_bits: int, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    first, last = ends(grid_for_range(torch.tensor(low), torch.tensor(high), num_bits, symmetric=True))

    slack = 1e-6 * max(abs(low), abs(high)) + 1e-30
    assert float(first) <= min(low, 0.0) + slack
    assert float(last) >= max(high, 0.0) - slack


def test_symmetric_grids_have_the_documented_levels() -> None:
    """Balanced at 1 and 2 bits, two's complement from 3 bits on."""
    one, two, three = (grid_for_range(torch.tensor(-3.0), torch.tensor(3.0), k, True) for k in (1, 2, 3))

    assert one.dequantize(torch.arange(2.0)).tolist() == [-3.0, 3.0]
    assert two.dequantize(torch.arange(4.0)).tolist() == [-3.0, -1.0, 1.0, 3.0]
    assert three.dequantize(torch.arange(8.0)).tolist() == [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("num_bits", [3, 4, 5, 6, 7, 8])
def test_two_s_complement_uses_its_longer_negative_side(num_bits: int) -> None:
    """A range that reaches further down than up needs no larger step than the negative side does."""
    half = 2 ** (num_bits - 1)
    grid = grid_for_range(torch.tensor(-float(half)), torch.tensor(float(half - 1)), num_bits, True)

    assert float(grid.scale) == 1.0
    assert grid.round(torch.tensor(0.0)) == 0.0


# Choosing the range


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("channel_axis", [None, 0, 2])
def test_mse_range_is_never_worse_than_minmax(num_bits: int, symmetric: bool, channel_axis: int | None) -> None:
    values = random(6, 5, 40, seed=num_bits) ** 3 * torch.logspace(-3, 3, 6)[:, None, None]

    def error(method: str) -> Tensor:
        grid = choose_grid(values, num_bits, symmetric, channel_axis, method)  # type: ignore[arg-type]
        squared = (grid.round(values) - values).double().square()
        return squared.sum() if channel_axis is None else squared.movedim(channel_axis, 0).flatten(1).sum(1)

    mse, minmax = error("mse"), error("minmax")

    assert (mse <= minmax * (1 + 1e-6)).all()
    if num_bits in (2, 3, 4):
        # Heavy tails: somewhere, clipping them must pay, or nothing was searched.
        assert (mse < 0.9 * minmax).any()


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_is_the_best_of_the_shrunk_ranges(
    symmetric: bool, num_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain loop over all shares, channel by channel; many shares together or one at a time are the same."""
    values = random(6, 400, seed=3) ** 3
    chosen = choose_grid(values, num_bits, symmetric, 0, "mse")

    for channel, row in enumerate(values):
        errors = []
        for step in range(grid.SHARES):
            shrink = 1 - step / grid.SHARES
            trial = grid_for_range(row.min() * shrink, row.max() * shrink, num_bits, symmetric)
            errors.append(float((trial.round(row) - row).double().square().sum()))
        own = Grid(chosen.scale[channel], chosen.zero_point[channel], num_bits)
        error = float((own.round(row) - row).double().square().sum())
        assert error <= 1.02 * min(errors)
        assert error < 0.9 * errors[0] or num_bits > 3
    monkeypatch.setattr(grid, "TOGETHER", 1)
    alone = choose_grid(values, num_bits, symmetric, 0, "mse")
    assert torch.equal(alone.scale, chosen.scale)
    assert torch.equal(alone.zero_point, chosen.zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [1, 2, 3, 5, 8])
def test_range_search_leaves_out_no_share_that_could_be_best(num_bits: int, symmetric: bool) -> None:
    """The same ranges as a search over all coarse shares and then their neighbours, whatever the row looks like."""

    def error(row: torch.Tensor, step: int) -> float:
        shrink = 1 - step / grid.SHARES
        trial = grid_for_range(row.min() * shrink, row.max() * shrink, num_bits, symmetric)
        return float((trial.round(row) - row).square().sum())

    normal = random(12, 90, seed=5)
    # Heavy tails, one outlier, one sign only, a sign with a small other side, few values, values far from zero.
    rows = [normal[0], normal[1] ** 5, normal[2].abs(), -normal[3].abs(), normal[4].abs() - 0.1, normal[5] + 9]
    rows += [torch.where(torch.arange(90) == 7, 40.0, normal[6]), normal[7].sign(), 0.1 - normal[8].exp()]
    values = torch.stack(rows)
    chosen = choose_grid(values, num_bits, symmetric, 0, "mse")
    for channel, row in enumerate(values):
        coarse = min(range(0, grid.SHARES, grid.STRIDE), key=lambda step, row=row: error(row, step))
        around = [min(max(coarse + i, 0), grid.SHARES - 1) for i in range(1 - grid.STRIDE, grid.STRIDE)]
        least = min(error(row, step) for step in around)
        own = Grid(chosen.scale[channel], chosen.zero_point[channel], num_bits)
        assert float((own.round(row) - row).square().sum()) == pytest.approx(least, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_range_search_rounds_less_often_at_many_bits(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = []
    original = Grid.round
    monkeypatch.setattr(Grid, "round", lambda self, values: rounded.append(self.num_bits) or original(self, values))
    monkeypatch.setattr(grid, "TOGETHER", 1)
    for num_bits in (2, 8):
        choose_grid(random(4, 400, seed=3), num_bits, symmetric, 0, "mse")
    assert rounded.count(8) < 0.6 * rounded.count(2) <= 0.6 * (grid.SHARES // grid.STRIDE + 2 * grid.STRIDE - 1)


def test_two_bit_gaussian_error_is_the_known_optimum() -> None:
    """The best uniform 4-level quantizer of a unit Gaussian has mean squared error 0.1188 (Max 1960, Table II)."""
    values = random(200_000)
    grid = choose_grid(values, 2, symmetric=True)

    assert float((grid.round(values) - values).square().mean()) == pytest.approx(0.1188, rel=0.02)
    assert float(grid.scale) == pytest.approx(0.9957, rel=0.03)


def test_one_bit_grid_is_the_mean_magnitude() -> None:
    """±α with the least squared error has α = mean |w|, and then the error is the variance of |w|."""
    values = random(5000, seed=4)
    chosen = choose_grid(values, 1, symmetric=True)

    assert float(chosen.scale) / 2 == pytest.approx(float(values.abs().mean()), rel=0.03)
    assert float((chosen.round(values) - values).square().mean()) == pytest.approx(float(values.abs().var()), rel=0.01)


def test_percentile_leaves_out_the_share_it_is_given() -> None:
    """1,000 values, central 98 %: the ends are the 10th from below and the 10th from above."""
    values = torch.arange(1000.0) - 500
    shuffled = values[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    grid = choose_grid(shuffled, 8, symmetric=False, method="percentile", percentile=98.0)

    assert float(grid.scale) == pytest.approx((490 - -491) / 255, rel=1e-6)
    inside = choose_grid(values.clamp(-491, 490), 8, symmetric=False, method="minmax")
    assert torch.equal(grid.scale, inside.scale)
    assert torch.equal(grid.zero_point, inside.zero_point)


def test_percentile_works_per_channel_and_ignores_one_outlier() -> None:
    values = random(3, 4000, seed=1)
    values[1, 17] = 1e6
    grid = choose_grid(values, 4, channel_axis=0, method="percentile", percentile=99.9)
    minmax = choose_grid(values, 4, channel_axis=0, method="minmax")

    assert float(grid.scale.max()) < 2
    assert float(minmax.scale[1]) > 1e5


def test_minmax_covers_every_value() -> None:
    values = random(50, 4, seed=2)
    for symmetric in (True, False):
        for num_bits in (4, 8):
            grid = choose_grid(values, num_bits, symmetric, 1, "minmax")
            assert ((grid.round(values) - values).abs() <= grid.scale * 1.001).all()


def test_per_channel_is_each_channel_by_itself() -> None:
    values = random(4, 6, 3, 3, seed=5) * torch.tensor([0.01, 1, 5, 100]).reshape(-1, 1, 1, 1)
    for axis, count in ((0, 4), (1, 6)):
        grid = choose_weight_grid(values, 3, axis, WeightGrid())
        for channel in range(count):
            part = values.select(axis, channel)
            alone = choose_grid(part, 3)
            assert float(alone.scale) == pytest.approx(float(grid.scale.flatten()[channel]), rel=1e-6)


def test_weight_grid_settings_reach_the_grid() -> None:
    values = random(4, 30, seed=6) ** 3 + 2
    default = choose_weight_grid(values, 4, 0, WeightGrid())
    per_tensor = choose_weight_grid(values, 4, 0, WeightGrid(per_channel=False))
    asymmetric = choose_weight_grid(values, 4, 0, WeightGrid(symmetric=False))
    minmax = choose_weight_grid(values, 4, 0, WeightGrid(range="minmax"))

    assert default.scale.shape == (4, 1)
    assert per_tensor.scale.shape == (1, 1)
    assert (default.zero_point == 8).all()
    assert (asymmetric.zero_point < 8).any()
    assert torch.equal(minmax.scale, choose_grid(values, 4, channel_axis=0, method="minmax").scale)
    assert (default.scale <= minmax.scale).all()
    assert (default.scale < minmax.scale).any()


# Tensors that are not like weights


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["mse", "minmax", "percentile"])
def test_zeros_stay_zero(num_bits: int, symmetric: bool, method: str) -> None:
    """A pruned channel must not come to life, whatever its neighbours hold."""
    values = torch.stack([torch.zeros(8), random(8, seed=1)])

    for axis, tensor in ((None, torch.zeros(8)), (0, values)):
        grid = choose_grid(tensor, num_bits, symmetric, axis, method)  # type: ignore[arg-type]
        assert torch.isfinite(grid.scale).all()
        assert (grid.scale > 0).all()
        rounded = grid.round(tensor)
        zeros = rounded if axis is None else rounded[0]
        assert zeros.abs().max() < 1e-6


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [1.0, -1.0, 3e-20, -7e8])
def test_a_constant_is_represented_well(num_bits: int, symmetric: bool, value: float) -> None:
    """A single value other than zero is an end of some grid, and min-max puts it there."""
    values = torch.full((3, 5), value)
    for method in ("minmax", "mse", "percentile"):
        grid = choose_grid(values, num_bits, symmetric, 0, method)  # type: ignore[arg-type]
        assert torch.isfinite(grid.round(values)).all()
        torch.testing.assert_close(grid.round(values), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1, 1)])
def test_a_single_element(num_bits: int, shape: tuple[int, ...]) -> None:
    values = torch.full(shape, 0.37)
    for axis in (None, 0):
        for symmetric in (True, False):
            grid = choose_grid(values, num_bits, symmetric, axis)
            assert grid.scale.shape == shape
            torch.testing.assert_close(grid.round(values), values, rtol=1e-6, atol=0)


def test_one_value_per_channel_in_one_dimension() -> None:
    values = torch.tensor([1.0, -20.0, 300.0])
    grid = choose_grid(values, 4, channel_axis=0, method="minmax")
    torch.testing.assert_close(grid.round(values), values)


@pytest.mark.parametrize("axis", [None, 0])
def test_a_tensor_without_elements_is_refused(axis: int | None) -> None:
    with pytest.raises(ModelError, match="without elements"):
        choose_grid(torch.zeros(3, 0), 4, channel_axis=axis)


@pytest.mark.parametrize("num_bits", [-1, 0, 9, 32])
def test_bits_outside_one_to_eight_are_refused(num_bits: int) -> None:
    with pytest.raises(ModelError, match=rf"from 1 to 8, got {num_bits}"):
        choose_grid(torch.ones(3), num_bits)
    with pytest.raises(ModelError, match=rf"from 1 to 8, got {num_bits}"):
        grid_for_range(torch.tensor(0.0), torch.tensor(1.0), num_bits, True)


def test_choosing_a_grid_leaves_the_values_alone_and_outside_autograd() -> None:
    values = nn.Parameter(random(3, 4))
    before = values.detach().clone()
    grid = choose_grid(values, 3, channel_axis=0)

    assert torch.equal(values, before)
    assert not grid.scale.requires_grad
    assert not grid.zero_point.requires_grad


# Fake quantization


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 0])
def test_fake_quantize_is_round_bit_for_bit(num_bits: int, symmetric: bool, axis: int | None) -> None:
    values = random(6, 50, seed=num_bits) * torch.logspace(-2, 2, 6)[:, None]
    grid = choose_grid(values, num_bits, symmetric, axis)

    for scale in (grid.scale, grid.scale.clone().requires_grad_()):
        result = FakeQuantize.apply(values, scale, grid.zero_point, num_bits)
        assert torch.equal(result, grid.round(values))


def lsq_reference(
    values: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients element by element.

    Inside the range the output is s * round(v / s) up to the zero point, and the straight-through estimator takes the
    derivative of round as 1: d/ds = round(v / s) - v / s. Outside it is the end of the grid, (end code - z) * s.
    """
    grad_values = torch.zeros_like(values)
    grad_scale = torch.zeros_like(scale)
    for row in range(values.shape[0]):
        s, z = float(scale[row, 0]), float(zero_point[row, 0])
        smallest, largest = -z * s, (2**num_bits - 1 - z) * s
        for column in range(values.shape[1]):
            value, up = float(values[row, column]), float(upstream[row, column])
            if value < smallest:
                grad_scale[row, 0] += up * -z
            elif value > largest:
                grad_scale[row, 0] += up * (2**num_bits - 1 - z)
            else:
                grad_values[row, column] = up
                # round(x + z) - z and not round(x): half-integer zero points of balanced grids.
                grad_scale[row, 0] += up * (round(value / s + z) - z - value / s)
    return grad_values, grad_scale


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_naive_formula(num_bits: int, symmetric: bool) -> None:
    values = random(3, 40, seed=num_bits, dtype=torch.float64)
    full = choose_grid(values, num_bits, symmetric, 0, "minmax")
    # A part of the range, so that both ends clip.
    grid = Grid(full.scale * 0.6, full.zero_point, num_bits)
    upstream = random(3, 40, seed=99, dtype=torch.float64)
    leaf, scale = values.clone().requires_grad_(), grid.scale.clone().requires_grad_()

    result = FakeQuantize.apply(leaf, scale, grid.zero_point, num_bits)
    grad_values, grad_scale = torch.autograd.grad(result, (leaf, scale), upstream)

    naive_values, naive_scale = lsq_reference(values, grid.scale, grid.zero_point, num_bits, upstream)
    clipped = naive_values == 0
    assert clipped.any()
    assert not clipped.all()
    assert torch.equal(grad_values, naive_values)
    torch.testing.assert_close(grad_scale, naive_scale, rtol=1e-10, atol=1e-10)


def test_gradient_is_one_inside_and_zero_outside() -> None:
    """3-bit grid from -4 to 3: the ends themselves are inside."""
    values = torch.tensor([-9.0, -4.1, -4.0, -0.2, 0.0, 2.9, 3.0, 3.1, 50.0], requires_grad=True)
    FakeQuantize.apply(values, torch.tensor(1.0), torch.tensor(4.0), 3).sum().backward()

    assert values.grad is not None
    assert values.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_scale_gradient_follows_the_loss() -> None:
    """Clipped values, where the estimator is the true derivative: compare with a finite difference."""
    values = torch.tensor([[-30.0, 20.0, 40.0]], dtype=torch.float64)
    scale = torch.tensor([[1.5]], dtype=torch.float64, requires_grad=True)
    zero = torch.tensor([[3.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, -2.0, 5.0]], dtype=torch.float64)

    (FakeQuantize.apply(values, scale, zero, 3) * weights).sum().backward()

    def loss(step: float) -> float:
        return float((Grid(scale.detach() + step, zero, 3).round(values) * weights).sum())

    assert float(scale.grad) == pytest.approx((loss(1e-4) - loss(-1e-4)) / 2e-4, rel=1e-8)  # type: ignore[arg-type]


def test_scale_without_gradient_still_passes_the_values_gradient() -> None:
    values = torch.tensor([0.4, 9.0], requires_grad=True)
    FakeQuantize.apply(values, torch.tensor(1.0), torch.tensor(0.0), 2).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 0]


def test_a_quantizer_has_a_scale_of_its_own() -> None:
    values = random(4, 9)
    grid = choose_grid(values, 2, channel_axis=0)
    before = grid.scale.clone()
    quantizer = Quantizer(grid)

    assert torch.equal(quantizer(values), grid.round(values))
    assert quantizer.scale.requires_grad
    with torch.no_grad():
        quantizer.scale.mul_(2)
    assert torch.equal(grid.scale, before), "training must not write into the grid that the quantizer was made from"
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}
    assert "num_bits=2" in repr(quantizer)


# Copies of a quantized model


class Branching(nn.Module):
    """One tensor read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.left(x) + self.right(x))


def quantized_branching() -> Branching:
    torch.manual_seed(0)
    model = Branching()
    for name in ("left", "right"):
        weight = model.get_submodule(name).weight
        quantize_weight(model, [(name, "weight")], choose_grid(weight, 3, channel_axis=0), 0, True)  # type: ignore[arg-type]
    grid = choose_grid(random(100, seed=8), 4, symmetric=False)
    quantize_activation([model.left, model.right], "left", grid)
    return model


def test_deepcopy_uses_its_own_quantizers() -> None:
    model = quantized_branching()
    inputs = random(5, 4, seed=9)
    before = model(inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs), before)
    own = {id(q) for q in (*weight_quantizers(model).values(), *activation_quantizers(model).values())}
    other = [*weight_quantizers(twin).values(), *activation_quantizers(twin).values()]
    assert len(other) == 3
    assert not own & {id(q) for q in other}
    assert twin.left.input_quantizer is twin.right.input_quantizer

    # Whatever happens to the copy leaves the original as it was, in values and in gradients.
    with torch.no_grad():
        for quantizer in other:
            quantizer.scale.mul_(1.7)
    assert not torch.equal(twin(inputs), before)
    assert torch.equal(model(inputs), before)
    twin(inputs).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(quantizer.scale.grad is not None for quantizer in other)


def test_deepcopy_survives_changes_of_the_original() -> None:
    model = quantized_branching()
    inputs = random(5, 4, seed=9)
    twin = copy.deepcopy(model)
    before = twin(inputs)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    model.left.input_quantizer.detach(model.left)

    assert torch.equal(twin(inputs), before)


def test_quantizers_are_found_once_and_in_order() -> None:
    model = quantized_branching()
    assert list(weight_quantizers(model)) == [("left", "weight"), ("right", "weight")]
    assert list(activation_quantizers(model)) == ["left"]
    assert weight_quantizers(Branching()) == {}
    assert activation_quantizers(Branching()) == {}


def test_quantized_model_output_is_the_float_model_on_rounded_tensors() -> None:
    """The hooks against rounding weights and inputs by hand."""
    model = quantized_branching()
    inputs = random(6, 4, seed=10)
    grid = activation_quantizers(model)["left"].grid
    read = grid.round(inputs)
    expected = torch.zeros(6, 3)
    for name in ("left", "right"):
        layer = model.get_submodule(name)
        chain = layer.parametrizations.weight  # type: ignore[union-attr]
        weight = chain[0].grid.round(chain.original)  # type: ignore[union-attr, index]
        bias = layer.bias if layer.bias is not None else 0.0
        expected = expected + read @ weight.T + bias

    torch.testing.assert_close(model(inputs), expected, rtol=1e-6, atol=1e-6)
    assert not math.isclose(float((read - inputs).abs().max()), 0.0)


# Sharing


class Branches(nn.Module):
    """Two convolutions read one tensor, and one of them is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1)
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return torch.as_tensor(self.left(x) + self.right(x))


def shared_branches(num_bits: int = 3) -> tuple[Branches, ActivationQuantizer]:
    torch.manual_seed(0)
    model = Branches()
    grid = choose_grid(random(100).abs(), num_bits, symmetric=False)
    return model, quantize_activation([model.left, model.right], "left", grid)


def count_roundings(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    plain = Quantizer.forward

    def counting(self: Quantizer, values: Tensor) -> Tensor:
        calls.append(None)
        return plain(self, values)

    monkeypatch.setattr(Quantizer, "forward", counting)
    return calls


@pytest.mark.parametrize("training", [True, False])
def test_consumers_of_one_tensor_share_its_rounding(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, quantizer = shared_branches()
    calls = count_roundings(monkeypatch)
    inputs = random(2, 2, 5, 5)
    with torch.set_grad_enabled(training):
        for done in range(1, 4):
            outputs = model(inputs)
            assert len(calls) == done
            assert quantizer._shared is None
            hidden = quantizer.grid.round(model.stem(inputs).relu())
            conv = nn.functional.conv2d
            expected = conv(hidden, model.left.weight, model.left.bias, padding=1)
            torch.testing.assert_close(outputs, expected + conv(hidden, model.right.weight, model.right.bias))


def test_a_shared_rounding_has_the_gradients_of_two() -> None:
    inputs = random(2, 2, 5, 5)
    gradients = []
    for readers in (2, 1):
        model, quantizer = shared_branches()
        quantizer.readers = readers  # 1: nothing is shared
        model(inputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in (model.stem.weight, quantizer.scale, model.left.weight)])
    # The scale's gradient is scaled by calls: two calls of n elements each, or one whose upstream gradient is the sum.
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("change", ["values", "scale", "gradient mode"])
def test_a_shared_rounding_is_not_used_for_anything_else(change: str) -> None:
    """The second reader comes after something has changed: it gets a rounding of its own."""
    _, quantizer = shared_branches()
    values = random(4, 3).abs()
    first = quantizer(values)
    with torch.no_grad():
        if change == "values":
            values += 0.5
        elif change == "scale":
            quantizer.scale.mul_(1.5)
    with torch.set_grad_enabled(change != "gradient mode"):
        second = quantizer(values)
    assert second is not first
    assert torch.equal(second, quantizer.grid.round(values))


def test_copies_and_files_of_a_quantizer_in_the_middle_of_sharing() -> None:
    _, quantizer = shared_branches()
    values = random(4, 3).abs().requires_grad_() * 1.0
    rounded = quantizer(values)
    twin = copy.deepcopy(quantizer)
    assert twin._shared is None
    assert quantizer(values) is rounded
    assert torch.equal(twin(values), rounded)


def test_channels_last_has_the_gradients_of_contiguous_images() -> None:
    """The same numbers in another order in memory, and mixed orders of value and gradient."""
    images, upstream = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    grid = choose_grid(images, 3, symmetric=False)
    last = torch.channels_last
    found = []
    for value_format in (torch.contiguous_format, last):
        for gradient_format in (torch.contiguous_format, last):
            leaf = images.contiguous(memory_format=value_format).requires_grad_()
            scale = grid.scale.clone().requires_grad_()
            rounded = FakeQuantize.apply(leaf, scale, grid.zero_point, 3)
            found.append(
                torch.autograd.grad(rounded, (leaf, scale), upstream.contiguous(memory_format=gradient_format))
            )
    for values, scale in found[1:]:
        assert torch.equal(values, found[0][0])
        torch.testing.assert_close(scale, found[0][1], rtol=1e-5, atol=1e-6)


def test_narrow_values_have_gradients_as_under_autocast() -> None:
    """Activations in bfloat16, the scale in float32: as on a GPU, up to the precision of the values."""
    values, upstream = random(2, 3, 4, 5).bfloat16(), random(2, 3, 4, 5, seed=1)
    grid = choose_grid(values.float(), 3, symmetric=False)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf, scale = values.to(dtype).requires_grad_(), grid.scale.clone().requires_grad_()
        rounded = FakeQuantize.apply(leaf, scale, grid.zero_point, 3)
        found.append(torch.autograd.grad(rounded, (leaf, scale), upstream))
    assert found[1][0].dtype == torch.bfloat16
    torch.testing.assert_close(found[1][0].float(), found[0][0], rtol=1e-2, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1])


# Other runtimes


def near_ties(scale: float, num_bits: int) -> Tensor:
    """A million values around the middles between codes, where float32 decides, and beyond both ends."""
    middles = torch.arange(-(2**num_bits) - 3, 2**num_bits + 4, dtype=torch.float64) + 0.5
    values = (middles * scale).float()
    steps = torch.linspace(-3, 3, 1_000_000 // len(values) + 1, dtype=torch.float64) * torch.finfo(torch.float32).eps
    around = (values.double()[:, None] * (1 + steps)).float()
    return torch.cat([values, around.flatten(), random(1000) * scale * 2**num_bits])


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("scale", [2.0**-5, 4.0])
def test_codes_are_those_of_torchs_fake_quantization(num_bits: int, scale: float) -> None:
    """Of a power of two the inverse, by which torch multiplies, is exact."""
    for zero_point in sorted({0, 1, 2 ** (num_bits - 1), 2**num_bits - 1}):
        values = near_ties(scale, num_bits)
        grid = Grid(torch.tensor(scale), torch.tensor(float(zero_point)), num_bits)
        expected = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, 2**num_bits - 1)
        assert torch.equal(grid.round(values), expected)


@pytest.mark.parametrize("scale", [0.03, 1 / 3, 7.1])
@pytest.mark.parametrize("zero_point", [0, 3, 131, 255])
def test_codes_are_those_of_onnx_runtime(scale: float, zero_point: int) -> None:
    ort = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"])]
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("zero_point", TensorProto.UINT8, [], [zero_point]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    codes = helper.make_tensor_value_info("codes", TensorProto.UINT8, [None])
    model = helper.make_model(
        helper.make_graph(nodes, "quantize", [x], [codes], constants),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = near_ties(scale, 8)
    grid = Grid(torch.tensor(scale), torch.tensor(float(zero_point)), 8)
    (expected,) = session.run(None, {"x": values.numpy()})
    assert torch.equal(grid.quantize(values).to(torch.uint8), torch.from_numpy(expected))


@pytest.mark.parametrize("num_bits", [1, 2])
def test_balanced_grids_round_to_the_nearest_of_their_levels(num_bits: int) -> None:
    """A channel with a half as zero point and one with a whole number, in one grid."""
    half = symmetric_zero_point(num_bits)
    grid = Grid(torch.tensor([[0.5], [0.5]]), torch.tensor([[half], [1.0]]), num_bits)
    values = torch.linspace(-3, 3, 1201).expand(2, -1)
    levels = (torch.arange(2**num_bits) - grid.zero_point) * grid.scale
    nearest = (values[:, :, None] - levels[:, None]).abs().amin(2)
    torch.testing.assert_close((grid.round(values) - values).abs(), nearest)
    balanced = Grid(torch.tensor(0.5), torch.tensor(half), num_bits)
    assert torch.equal(balanced.round(values[0]), grid.round(values)[0])
