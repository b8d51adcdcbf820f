"""Statistics of a quantized model: brought back to the float model's, and only where held-out inputs gain."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import tracequant as tq
from models import CLASSES, ConvNet, SharedHeadNet, build, images, labelled, residual_net, snapshot
from tracequant.quantization.statistics import MINIMUM_SAMPLES, correct_statistics

TASK = tq.ClassificationTask()


class Scaled(nn.Module):
    """A parametrization that multiplies each output channel's weights."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factors.view(-1, *[1] * (weight.ndim - 1))


class Plain(nn.Module):
    """A convolution and a linear layer with biases and no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.conv(images)).mean((2, 3)))


def scaled(model: nn.Module, *layers: str) -> nn.Module:
    """A copy whose layers have channels that are larger and smaller than the model's, by a parametrization."""
    quantized = copy.deepcopy(model)
    for name in layers:
        module = quantized.get_submodule(name)
        factors = torch.linspace(0.3, 2.0, len(module.weight), dtype=torch.float64)  # type: ignore[arg-type]
        parametrize.register_parametrization(module, "weight", Scaled(factors))
    return quantized


def logits(model: nn.Module, batches: list[Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(inputs) for inputs, _ in batches])


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith("weight")}


def test_scaled_channels_come_back_exactly() -> None:
    model = build(ConvNet)
    # Without a bias a scaled channel is undone by BatchNorm's statistics, up to its ε.
    for norm in (model.bn1, model.bn2):
        norm.eps = 0.0
    quantized = scaled(model, "conv1")
    batches = images((16, 16, 16, 16))
    wanted, spoiled = logits(model, batches), logits(quantized, batches)
    result = correct_statistics(quantized, model, batches, TASK)
    assert result.share == 1
    assert result.norms == 2
    assert result.distance_before is not None
    assert (spoiled - wanted).abs().max() > 1e-2
    torch.testing.assert_close(logits(quantized, batches), wanted, rtol=1e-9, atol=1e-10)
    factors = torch.linspace(0.3, 2.0, 4, dtype=torch.float64)
    torch.testing.assert_close(quantized.bn1.running_mean, model.bn1.running_mean * factors)
    torch.testing.assert_close(quantized.bn1.running_var, model.bn1.running_var * factors.square())


def test_inputs_of_batchnorms_get_the_float_models_moments() -> None:
    """A reference of two plain loops: each BatchNorm in order, its input's moments over all batches."""
    model = residual_net()
    quantized = scaled(model, "stem", "block1.conv1", "block1.conv2", "block1.downsample")
    batch = images((64,))
    assert correct_statistics(quantized, model, batch, TASK).share == 1
    for name in ("block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2"):
        # Both normalised inputs, before the affine map: their moments agree where ε is small beside the variance.
        read = [normalised(network, name, batch[0][0]) for network in (quantized, model)]
        variance, mean = zip(*(torch.var_mean(values, (0, 2, 3), correction=0) for values in read), strict=True)
        torch.testing.assert_close(mean[0], mean[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(variance[0], variance[1], rtol=1e-3, atol=1e-3)


def normalised(model: nn.Module, name: str, inputs: Tensor) -> Tensor:
    norm: Any = model.get_submodule(name)
    values: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    with torch.no_grad():
        model.eval()(inputs)
    handle.remove()
    shape = (1, -1, 1, 1)
    return (values[0] - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()


def test_biases_repair_the_mean_without_batchnorm() -> None:
    model = build(Plain)
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        quantized.conv.weight += 0.3  # inputs with a mean: the outputs shift
    batches = [(inputs + 1, targets) for inputs, targets in images((32, 32, 32, 32))]
    result = correct_statistics(quantized, model, batches, TASK)
    assert result.share > 0
    assert result.norms == 0
    assert result.biases == 2
    assert set(quantized.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        inputs = torch.cat([inputs for inputs, _ in batches])
        shift = (F.conv2d(inputs, model.conv.weight) - F.conv2d(inputs, quantized.conv.weight)).mean((0, 2, 3))
    torch.testing.assert_close(quantized.conv.bias - model.conv.bias, result.share * shift)


def test_nothing_is_applied_where_it_would_not_gain() -> None:
    """An equal copy keeps its statistics bit for bit."""
    model = build(ConvNet)
    quantized = copy.deepcopy(model)
    before = snapshot(quantized)
    result = correct_statistics(quantized, model, images((16, 16)), TASK)
    assert result.share == 0
    assert snapshot(quantized) == before
    assert "left as they are" in str(result)


def test_a_fit_that_held_out_inputs_contradict_is_dropped() -> None:
    """Both halves have the same shapes, but what shifts one half's mean up shifts the other half's down."""
    model = build(Plain)
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        quantized.conv.weight += 0.3
    (first, targets), (second, _) = images((32, 32))
    before = snapshot(quantized)
    result = correct_statistics(quantized, model, [(first + 1, targets), (second - 1, targets)], TASK)
    assert result.share == 0
    assert snapshot(quantized) == before
    assert result.distance_before is not None
    assert result.distance_after is not None
    assert result.distance_after > result.distance_before


@pytest.mark.parametrize("sizes", [(64,), (20, 13, 7), (32, 32)])
def test_one_batch_or_several_gain_and_repeat_bit_by_bit(sizes: tuple[int, ...]) -> None:
    model = residual_net()
    first, second = (scaled(model, "block1.conv1", "block2.conv1") for _ in range(2))
    original = snapshot(model)
    results = [correct_statistics(quantized, model, images(sizes), TASK) for quantized in (first, second)]
    assert results[0] == results[1]
    assert results[0].share > 0
    assert results[0].fitted + results[0].judged == sum(sizes)
    assert snapshot(model) == original
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_loader_that_shuffles_gives_the_same_halves_each_time() -> None:
    class Shuffled:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def __iter__(self) -> Iterator[Any]:
            order = torch.randperm(4)
            self.seen.append(order)
            batches = images((16, 16, 16, 16))
            return iter([batches[i] for i in order])

    model = residual_net()
    quantized, loader = scaled(model, "block1.conv1"), Shuffled()
    state = torch.get_rng_state()
    correct_statistics(quantized, model, loader, TASK)
    assert len(loader.seen) == 3
    assert all(torch.equal(order, loader.seen[0]) for order in loader.seen)
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_hooks_and_weights_stay() -> None:
    model = residual_net()
    quantized = scaled(model, "block1.conv1")
    model.train()
    quantized.train()
    before = snapshot(quantized)
    correct_statistics(quantized, model, images((32, 32)), TASK)
    after = snapshot(quantized)
    assert after["modes"] == before["modes"]
    assert after["hooks"] == before["hooks"]
    assert after["rng"] == before["rng"]
    changed = {name for name in before["buffers"] if before["buffers"][name] != after["buffers"][name]}
    assert changed
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)
    moved = {name for name in before["parameters"] if before["parameters"][name] != after["parameters"][name]}
    assert all(name.endswith("bias") and "bn" not in name for name in moved)


def test_norms_that_are_frozen_or_of_another_kind_stay() -> None:
    torchvision = pytest.importorskip("torchvision")

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)
            self.frozen = torchvision.ops.FrozenBatchNorm2d(4)
            self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
            self.of_batch = nn.BatchNorm2d(4, track_running_stats=False)
            self.fc = nn.Linear(4, CLASSES, bias=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(F.relu(self.of_batch(self.instance(self.frozen(self.conv(images))))).mean((2, 3)))

    torch.manual_seed(0)
    model = Normed().double()
    quantized = scaled(model, "conv")
    before = snapshot(quantized)
    result = correct_statistics(quantized, model, images((16, 16)), TASK)
    assert snapshot(quantized) == before
    assert "neither" in str(result)


def test_a_layer_that_is_called_twice_has_one_bias_for_both() -> None:
    """Over all positions of both calls its outputs have the float model's mean."""
    model = build(SharedHeadNet)
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        quantized.head.weight += torch.linspace(-0.3, 0.3, len(quantized.head.weight)).view(-1, 1, 1, 1)
    batch = [(inputs + 1, targets) for inputs, targets in images((64,))]
    result = correct_statistics(quantized, model, batch, TASK)
    assert result.share == 1
    assert result.biases == 3
    means = []
    for network in (quantized, model):
        values: list[Tensor] = []
        handle = network.head.register_forward_hook(lambda module, args, out, values=values: values.append(out))
        logits(network, batch)
        handle.remove()
        assert [value.shape[-1] for value in values] == [8, 4]
        means.append(torch.cat([value.flatten(2) for value in values], 2).mean((0, 2)))
    torch.testing.assert_close(means[0], means[1])


@pytest.mark.parametrize("sizes", [(1,), (2 * MINIMUM_SAMPLES - 1,), (MINIMUM_SAMPLES, MINIMUM_SAMPLES - 1)])
def test_too_few_samples_change_nothing(sizes: tuple[int, ...]) -> None:
    model = residual_net()
    quantized = scaled(model, "block1.conv1")
    before = snapshot(quantized)
    result = correct_statistics(quantized, model, images(sizes), TASK)
    assert snapshot(quantized) == before
    assert result.distance_before is None
    assert "calibration samples" in str(result)


def test_outputs_without_classes_are_compared_by_their_difference() -> None:
    """A detector's or a regression's: the default distance is the mean square."""
    task = tq.CallableTask(lambda outputs, batch: F.mse_loss(outputs, F.one_hot(batch[1], CLASSES).double()))
    model = residual_net()
    quantized = scaled(model, "block1.conv1", "block2.conv2")
    result = correct_statistics(quantized, model, images((32, 32)), task)
    assert result.share > 0


def test_errors_name_what_is_wrong() -> None:
    model = build(ConvNet)
    batches = images((16, 16))
    with pytest.raises(tq.ModelError, match="expected a quantized copy"):
        correct_statistics(model, model, batches, TASK)
    with pytest.raises(tq.ModelError, match=r"layer block1.* is not in the float model|layer stem is not in"):
        correct_statistics(residual_net(), model, batches, TASK)
    with pytest.raises(tq.DataError, match="no batches"):
        correct_statistics(copy.deepcopy(model), model, [], TASK)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.conv1.weight[0] = math.inf
    with pytest.raises(tq.ModelError, match="layer bn1 are NaN or infinite"):
        correct_statistics(broken, model, batches, TASK)


def test_linear_layers_of_any_leading_axes() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, sequence: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.inner(sequence)).mean(1))

    model = build(Tokens)
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        quantized.inner.weight += 0.2
    batches = [(inputs + 1, targets) for inputs, targets in labelled(7, 6, sizes=(32, 32))]
    result = correct_statistics(quantized, model, batches, TASK)
    assert result.share > 0
    assert result.biases == 2
    with torch.no_grad():
        inputs = torch.cat([inputs for inputs, _ in batches])
        shift = (inputs @ (model.inner.weight - quantized.inner.weight).mT).mean((0, 1))
    torch.testing.assert_close(quantized.inner.bias - model.inner.bias, result.share * shift)


def test_rounding_errors_of_the_distance_are_no_gain() -> None:
    """A shift of all classes alike changes no probability: whatever falls by 2 % is float32's rounding."""
    model = build(SharedHeadNet)
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        quantized.head.weight += 0.2
    batches = [(inputs + 1, targets) for inputs, targets in images((32, 32))]
    assert correct_statistics(quantized, model, batches, TASK).share == 0
    assert torch.equal(quantized.head.bias, model.head.bias)
