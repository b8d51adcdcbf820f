"""Rounded outputs: where convolutions need them, what they do to values and gradients, and that they travel along."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from models import EnergyTask
from tracequant.core import cost
from tracequant.core.errors import ModelError
from tracequant.deploy.packed import read_packed
from tracequant.quantization.quantizer import activation_quantizers, input_quantizers, output_quantizers

TASK = EnergyTask()
ANY = (-math.inf, math.inf)
RECTIFIED = (0.0, math.inf)


def conv(width_in: int = 3, width: int = 3, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, size, padding=size // 2)


class Net(nn.Module):
    """Three convolutions `a`, `b`, `c` with BatchNorm `na`, `nb`, and a ReLU module, joined by a function."""

    def __init__(self, join: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = conv(), conv(), conv()
        self.na, self.nb = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.join = join
        for norm in (self.na, self.nb):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def pictures(count: int = 2, size: int = 6) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def outputs_of(join: Callable[[Net, Tensor], Tensor], exclude: tuple[str, ...] = ()) -> dict[str, tuple[float, float]]:
    """Module → limits of every output point of a `Net` with this join."""
    points = tq.discover(Net(join).eval(), [(pictures(),)], TASK, exclude=exclude)
    assert len({point.name for point in points.outputs}) == len(points.outputs)
    return {point.module: (point.low, point.high) for point in points.outputs}


def plan_for(points: tq.QuantizationPoints, num_bits: int = 8) -> tq.BitPlan:
    weights = {layer.name: num_bits for layer in points.layers}
    activations = {point.name: num_bits for point in points.activations}
    size = cost.size_bytes(points, weights, activations, tq.WeightGrid())
    return tq.BitPlan(weights, activations, size, 0, 1, 0.0, 0.0, tq.WeightGrid(), "", "by hand", "none")


def quantized_net(join: Callable[[Net, Tensor], Tensor], num_bits: int = 8) -> tuple[nn.Module, nn.Module, tq.BitPlan]:
    """The float model, the quantized one and its plan."""
    model = Net(join).eval()
    plan = plan_for(tq.discover(model, [(pictures(),)], TASK), num_bits)
    return model, tq.quantize(model, [(pictures(),)], TASK, plan), plan


# Joins, by what they are


def residual(net: Net, x: Tensor) -> Tensor:
    """A ResNet's block: the stem's output also takes the identity path, and one ReLU module serves all."""
    x = net.relu(net.na(net.a(x)))
    out = net.nb(net.b(x))
    out += x
    return net.c(net.relu(out)).mean((2, 3))


def concatenated(net: Net, x: Tensor) -> Tensor:
    """Inception's: branches rectified by a function, joined, and read by a pooling as well as by a convolution."""
    joined = torch.cat([F.relu(net.na(net.a(x))), F.relu(net.nb(net.b(x)), inplace=True)], 1)[:, :3]
    return net.c(joined).mean((2, 3)) + F.avg_pool2d(joined, 3).mean((2, 3))


def straight(net: Net, x: Tensor) -> Tensor:
    return net.c(F.relu(net.nb(net.b(F.max_pool2d(net.relu(net.na(net.a(x))), 2))))).mean((2, 3))


def cat_read_by_one(net: Net, x: Tensor) -> Tensor:
    joined = torch.cat([F.relu(net.na(net.a(x))), F.relu(net.nb(net.b(x)))], 2)
    return net.c(joined).mean((2, 3))


def dense(net: Net, x: Tensor) -> Tensor:
    """DenseNet's: BatchNorm reads what was concatenated, and cannot be folded."""
    joined = torch.cat([net.a(x), net.b(x)], 2)
    return net.c(F.relu(net.na(joined))).mean((2, 3))


def called_twice(net: Net, x: Tensor) -> Tensor:
    """A head on two levels of a pyramid, its results read by an activation function."""
    levels = [x, F.avg_pool2d(x, 2)]
    return sum(net.c(torch.sigmoid(net.a(level))).mean((2, 3)) for level in levels)  # type: ignore[return-value]


JOINS: dict[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, tuple[float, float]]]] = {
    "straight on": (straight, {"c": ANY}),
    "residual addition in place": (residual, {"na": RECTIFIED, "nb": ANY, "c": ANY}),
    "concatenation read by others too": (concatenated, {"na": RECTIFIED, "nb": RECTIFIED, "c": ANY}),
    "concatenation read by one quantizer": (cat_read_by_one, {"c": ANY}),
    "BatchNorm after a concatenation": (dense, {"a": ANY, "b": ANY, "c": ANY}),
    "a head called twice": (called_twice, {"a": ANY, "c": ANY}),
    "no BatchNorm": (lambda net, x: net.b(x + F.relu(net.a(x))), {"a": RECTIFIED}),
    "functional ReLU in place": (lambda net, x: net.b(x + F.relu_(net.na(net.a(x)))), {"na": RECTIFIED}),
    "ReLU6": (lambda net, x: net.b(x + F.relu6(net.na(net.a(x)))), {"na": (0.0, 6.0)}),
    "clamp": (lambda net, x: net.b(x + net.a(x).clamp(min=0, max=2)), {"a": (0.0, 2.0)}),
    "one limit": (lambda net, x: net.b(x + net.a(x).clamp(max=1)), {"a": (-math.inf, 1.0)}),
    "hardtanh": (lambda net, x: net.b(x + F.hardtanh(net.a(x))), {"a": (-1.0, 1.0)}),
    "SiLU": (lambda net, x: net.b(F.silu(net.na(net.a(x)))), {"na": ANY}),
    "leaky ReLU": (lambda net, x: net.b(F.leaky_relu(net.a(x))), {"a": ANY}),
    "average pooling": (lambda net, x: net.b(F.avg_pool2d(net.na(net.a(x)), 2)), {"na": ANY}),
    "a view in between": (lambda net, x: net.b(net.a(x).flatten(2).relu().view(2, 3, 6, 6)), {}),
    "two readers before BatchNorm": (lambda net, x: (lambda y: net.b(net.na(y) + y))(net.a(x)), {"a": ANY}),
    "dropout": (lambda net, x: net.b(F.dropout(net.na(net.a(x)), 0.5, net.training)), {}),
    "parts": (lambda net, x: net.b(torch.cat(net.a(x).chunk(3, 1)[::-1], 1)), {"a": ANY}),
    "an output of the model": (lambda net, x: net.na(net.a(x)), {}),
    "an output in another shape": (lambda net, x: net.a(x).permute(0, 2, 3, 1).reshape(2, -1), {}),
    "outputs joined": (lambda net, x: torch.cat([net.a(x).flatten(1), net.b(x).flatten(1)], 1), {}),
    "a part written to": (lambda net, x: written(net, x), {"a": ANY}),
}  # fmt: skip


def written(net: Net, x: Tensor) -> Tensor:
    """The convolution's output changes behind the back of its name."""
    y = net.a(x)
    y[:, 0] += 1
    return net.b(y)


@pytest.mark.parametrize("name", list(JOINS))
def test_which_outputs_are_rounded(name: str) -> None:
    join, expected = JOINS[name]
    assert outputs_of(join) == expected


def test_limits_are_those_of_all_calls() -> None:
    """One quantizer serves both calls of `a`, of which only one is rectified."""

    def join(net: Net, x: Tensor) -> Tensor:
        return net.b(x + F.relu(net.a(x)) + torch.sigmoid(net.a(2 * x)))

    assert outputs_of(join) == {"a": ANY}


def test_excluded_layers_are_not_rounded() -> None:
    assert outputs_of(residual, exclude=("b",)) == {"na": RECTIFIED, "c": ANY}


def test_a_value_changed_in_place_is_another_one() -> None:
    """`b` and `c` read the same tensor object before and after a ReLU in place: they share no quantizer."""

    def join(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        z = net.b(y)
        y.relu_()
        return (z + net.c(y)).mean((2, 3))

    points = tq.discover(Net(join).eval(), [(pictures(),)], TASK)
    assert [point.consumers for point in points.activations] == [("a",), ("b",), ("c",)]


def test_transposed_convolutions_and_linear_layers_have_none() -> None:
    """No runtime here has integer kernels that would need them."""
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(147, 4), nn.SiLU())
    assert tq.discover(model.eval(), [(pictures(),)], TASK).outputs == ()


def test_points_with_outputs_survive_a_file(tmp_path: Path) -> None:
    points = tq.discover(Net(residual).eval(), [(pictures(),)], TASK)
    points.save(tmp_path / "points.json")
    assert tq.QuantizationPoints.load(tmp_path / "points.json") == points


# What they do


def test_outputs_take_256_values_and_rectify() -> None:
    model, quantized, _ = quantized_net(residual)
    seen = {}
    for name, quantizer in output_quantizers(quantized).items():
        quantizer.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output.detach().clone()})
        )  # type: ignore[misc]
    quantized(pictures())
    assert set(seen) == {"na", "nb", "c"}
    assert all(values.unique().numel() <= 256 for values in seen.values())
    assert float(seen["na"].min()) == 0  # before the ReLU: the quantizer has done its work
    assert output_quantizers(quantized)["na"].zero_point == 0
    assert float(seen["nb"].min()) < 0
    with torch.no_grad():
        assert (quantized(pictures()) - model(pictures())).abs().max() < 0.02 * model(pictures()).abs().max()


def test_a_rectified_range_spends_no_code_below_zero() -> None:
    _, quantized, _ = quantized_net(residual)
    values = []
    model = Net(residual).eval()
    model.na.register_forward_hook(lambda module, args, output: values.append(output.detach().clone()))
    model(pictures())
    highest = float(values[0].max())
    scale = output_quantizers(quantized)["na"].scale.item()
    assert 0.7 * highest < 255 * scale < 1.01 * highest


@pytest.mark.parametrize("ceiling", [6.0, 0.5])
def test_a_range_ends_at_the_clamp(ceiling: float) -> None:
    _, quantized, _ = quantized_net(lambda net, x: net.b(x + net.a(x).clamp(0, ceiling)))
    assert 255 * output_quantizers(quantized)["a"].scale.item() <= ceiling * 1.001


def test_outputs_have_8_bits_whatever_the_plan() -> None:
    _, quantized, _ = quantized_net(residual, num_bits=2)
    assert {quantizer.num_bits for quantizer in input_quantizers(quantized).values()} == {2}
    assert {quantizer.num_bits for quantizer in output_quantizers(quantized).values()} == {8}


def test_a_plan_without_activations_has_no_outputs() -> None:
    model = Net(residual).eval()
    points = tq.discover(model, [(pictures(),)], TASK)
    weights = {layer.name: 4 for layer in points.layers}
    plan = tq.BitPlan(weights, {}, 0, 0, 1, 0.0, 0.0, tq.WeightGrid(), "", "by hand", "none")
    assert activation_quantizers(tq.quantize(model, [(pictures(),)], TASK, plan)) == {}


def test_an_input_in_float_leaves_the_output_in_float() -> None:
    """A runtime computes such a convolution in float anyway."""
    model = Net(residual).eval()
    points = tq.discover(model, [(pictures(),)], TASK)
    weights = {layer.name: 4 for layer in points.layers}
    plan = tq.BitPlan(weights, {"b": 8}, 0, 0, 1, 0.0, 0.0, tq.WeightGrid(), "", "by hand", "none")
    assert list(output_quantizers(tq.quantize(model, [(pictures(),)], TASK, plan))) == ["nb"]


def test_gradients_are_those_of_a_relu() -> None:
    """Through the rounding that rectifies, as through the ReLU: nothing from what was cut off, all from the rest."""
    _, quantized, _ = quantized_net(residual)
    quantizer = output_quantizers(quantized)["na"]
    values = torch.tensor([-3.0, -1e-4, 1e-4, 0.1], requires_grad=True)
    quantizer(values).relu().sum().backward()
    assert values.grad is not None
    assert values.grad[:2].tolist() == [0, 0]
    assert quantizer(values.detach())[:2].tolist() == [0, 0]
    assert values.grad[3] == 1


def test_gradients_reach_everything() -> None:
    _, quantized, _ = quantized_net(residual)
    quantized.train()(pictures()).square().sum().backward()
    for name, parameter in quantized.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    scales = [quantizer.scale.grad for quantizer in output_quantizers(quantized).values()]
    assert all(bool((gradient != 0).all()) for gradient in scales)


def test_fine_tuning_moves_their_scales() -> None:
    _, quantized, _ = quantized_net(residual)
    before = {name: quantizer.scale.item() for name, quantizer in output_quantizers(quantized).items()}
    tq.finetune(quantized, [(pictures(),)], TASK, steps=3, learning_rate=0.01)
    after = {name: quantizer.scale.item() for name, quantizer in output_quantizers(quantized).items()}
    assert all(after[name] != scale for name, scale in before.items())


# Where they go


@pytest.mark.parametrize(
    "name", ["residual addition in place", "a head called twice", "BatchNorm after a concatenation"]
)
def test_they_are_packed_to_the_promised_byte(name: str, tmp_path: Path) -> None:
    model, quantized, plan = quantized_net(JOINS[name][0], num_bits=4)
    tq.finetune(quantized, [(pictures(),)], TASK, steps=2, learning_rate=0.01)
    path = tmp_path / "model.safetensors"
    assert tq.pack(quantized.eval(), path) == plan.size_bytes == path.stat().st_size

    loaded = tq.load(path, copy.deepcopy(model))

    with torch.no_grad():
        assert torch.equal(loaded(pictures()), quantized(pictures()))
    assert set(output_quantizers(loaded)) == set(JOINS[name][1])
    assert {value.module for value in read_packed(path).outputs()} == set(JOINS[name][1])


def test_five_bytes_and_the_name_are_what_one_costs() -> None:
    points = tq.discover(Net(residual).eval(), [(pictures(),)], TASK)
    bits = {layer.name: 4 for layer in points.layers}
    activations = {point.name: 8 for point in points.activations}
    fewer = copy.copy(points)
    object.__setattr__(fewer, "outputs", points.outputs[:-1])
    sizes = [cost.size_bytes(p, bits, activations, tq.WeightGrid()) for p in (points, fewer)]
    # Scale and zero point; ,\"c\" in the header, which is padded to 8 bytes.
    assert abs(sizes[0] - sizes[1] - 5 - len(',\\"c\\"')) < 8


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    model, quantized, _ = quantized_net(residual)
    tq.pack(quantized, tmp_path / "model.safetensors")
    del model.nb
    with pytest.raises(ModelError, match="rounds the output of nb, which the model does not have"):
        tq.load(tmp_path / "model.safetensors", model)


def test_copies_are_on_their_own() -> None:
    _, quantized, _ = quantized_net(residual)
    twin = copy.deepcopy(quantized)
    with torch.no_grad():
        for quantizer in output_quantizers(quantized).values():
            quantizer.scale.mul_(7)
    _, fresh, _ = quantized_net(residual)
    with torch.no_grad():
        assert torch.equal(twin(pictures()), fresh(pictures()))
        assert not torch.equal(quantized(pictures()), fresh(pictures()))


def test_to_float_takes_them_away() -> None:
    model, quantized, _ = quantized_net(residual)
    plain = tq.to_float(quantized)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not any(module._forward_hooks for module in plain.modules())
    assert len(output_quantizers(quantized)) == 3
