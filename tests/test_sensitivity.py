"""Ω against loops written out by hand: which sums, which means, which tensors."""

import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from models import (
    CLASSES,
    EnergyTask,
    build,
    conv_net,
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
    ResourceError,
    Sensitivity,
    SettingsError,
    TraceEstimate,
    WeightGrid,
    discover,
    estimate_curvature,
)
from tracequant.curvature.spectrum import top_eigenvalues
from tracequant.measure import sensitivity as sensitivity_module
from tracequant.model import memory
from tracequant.quantization.calibrate import calibrate
from tracequant.quantization.grid import Grid, choose_weight_grid

TASK = ClassificationTask()
# The arithmetic of Eq. 10 is that of rounding to the nearest.
NEAREST = WeightGrid(rounding="nearest")
measure_sensitivity = functools.partial(sensitivity_module.measure_sensitivity, weight_grid=NEAREST)


def made_up(points: QuantizationPoints, average_trace: float = 1.0, activations: bool = True) -> Curvature:
    """A curvature whose average traces are this number times 1, 2, 3 ..., layers first, then activation points."""

    def estimates(numels: dict[str, float], first: int) -> dict[str, TraceEstimate]:
        return {
            name: TraceEstimate(
                trace=average_trace * (first + index) * numel,
                average_trace=average_trace * (first + index),
                standard_error=0.0,
                sampling_error=0.0,
                numel=numel,
                num_probes=1,
                samples=1,
            )
            for index, (name, numel) in enumerate(numels.items())
        }

    layers = {layer.name: float(layer.numel) for layer in points.layers}
    tensors = {point.name: point.numel for point in points.activations}
    return Curvature(
        points=points,
        weights=estimates(layers, 1),
        activations=estimates(tensors, 1 + len(layers)) if activations else {},
        estimator="made up",
        reason="",
        seed=0,
        samples=1,
    )


def squared_error(tensor: Tensor, grid: Grid) -> float:
    """‖Q(x) − x‖², element by element in Python: the nearest of the grid's levels, ends included."""
    shape = tensor.shape
    scales = grid.scale.expand(shape).flatten().tolist()
    zeros = grid.zero_point.expand(shape).flatten().tolist()
    total = 0.0
    for value, scale, zero in zip(tensor.detach().flatten().tolist(), scales, zeros, strict=True):
        total += min((scale * (code - zero) - value) ** 2 for code in range(2**grid.num_bits))
    return total


@pytest.mark.parametrize(
    "weight_grid",
    [NEAREST, WeightGrid(per_channel=False, symmetric=False, range="minmax", rounding="nearest")],
    ids=str,
)
def test_weight_omega_is_average_trace_times_the_sum_of_squares(weight_grid):
    """Eq. 10 with the grids that conversion will use, for a strided grouped convolution as for a linear layer."""
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK), average_trace=0.5)
    result = measure_sensitivity(
        model, images(), TASK, curvature, weight_bits=(4, 2), activation_bits=(), weight_grid=weight_grid
    )
    assert list(result.weight_omega) == ["conv1", "conv2", "fc"]
    for index, layer in enumerate(curvature.points.layers):
        weight = model.get_parameter(f"{layer.name}.weight")
        assert list(result.weight_omega[layer.name]) == [2, 4]
        for num_bits in (2, 4):
            grid = choose_weight_grid(weight, num_bits, 0, weight_grid)
            error = squared_error(weight, grid)
            assert error > 1e-4
            assert result.weight_errors[layer.name][num_bits] == pytest.approx(error, rel=1e-9)
            assert result.weight_omega[layer.name][num_bits] == pytest.approx(0.5 * (index + 1) * error, rel=1e-9)
        assert result.average_traces[layer.name] == 0.5 * (index + 1)
    assert result.weight_grid == weight_grid
    assert result.points == curvature.points


def test_a_transposed_convolution_has_scales_for_its_output_channels():
    """They are on the second axis; along the first, every row would have another range."""
    model = nn.Sequential(nn.ConvTranspose2d(3, 2, 2)).double()
    with torch.no_grad():
        model[0].weight[:, 1] *= 100
    batches = [(torch.randn(2, 3, 4, 4, dtype=torch.float64),)]
    points = discover(model, batches, EnergyTask())
    result = measure_sensitivity(
        model, batches, EnergyTask(), made_up(points), weight_bits=(4,), activation_bits=(), weight_grid=NEAREST
    )
    want = sum(
        squared_error(part, choose_weight_grid(part, 4, 0, WeightGrid(per_channel=False)))
        for part in model[0].weight.detach().unbind(1)
    )
    assert result.weight_errors["0"][4] == pytest.approx(want, rel=1e-9)


def test_a_layer_counts_by_its_size():
    """A hundred copies of a small layer's rows at the same average trace: a hundred times its Ω, not the same."""
    small, large = nn.Linear(4, 4, bias=False), nn.Linear(4, 400, bias=False)
    with torch.no_grad():
        large.weight.copy_(small.weight.repeat(100, 1))
    model = nn.Sequential(small, large).double()
    batches = labelled(4)
    curvature = made_up(discover(model, batches, TASK))
    same = dataclasses.replace(curvature.weights["0"], average_trace=2.0)
    curvature = dataclasses.replace(curvature, weights={"0": same, "1": same})
    result = measure_sensitivity(
        model, batches, TASK, curvature, weight_bits=(2, 3, 8), activation_bits=(), weight_grid=NEAREST
    )
    for num_bits in (2, 3, 8):
        assert result.weight_omega["1"][num_bits] == pytest.approx(100 * result.weight_omega["0"][num_bits], rel=1e-9)


def test_activation_omega_is_a_mean_over_samples(device):
    """Batches of 3 and 1: the sum of squares over each sample's elements, averaged over the four samples."""
    model = conv_net().to(device)
    batches = images(sizes=(3, 1))
    curvature = made_up(discover(model, batches, TASK), average_trace=0.5)
    result = measure_sensitivity(model, batches, TASK, curvature, weight_bits=(8,), activation_bits=(3, 2))
    assert list(result.activation_omega) == ["conv1", "conv2", "fc"]
    grids = calibrate(model, batches, TASK, curvature.points, bits={"conv2": [2, 3], "fc": [2, 3]})
    net = copy.deepcopy(model).eval()
    pictures = torch.cat([inputs for inputs, _ in batches]).to(device)
    with torch.no_grad():
        hidden = torch.relu(net.bn1(net.conv1(pictures)))
        pooled = torch.relu(net.bn2(net.conv2(hidden))).mean((2, 3))
    for factor, (name, tensor) in zip((5, 6), {"conv2": hidden, "fc": pooled}.items(), strict=True):
        assert list(result.activation_omega[name]) == [2, 3]
        for num_bits in (2, 3):
            error = sum(squared_error(sample, grids[name][num_bits]) for sample in tensor) / 4
            assert error > 1e-4
            assert result.activation_errors[name][num_bits] == pytest.approx(error, rel=1e-9)
            assert result.activation_omega[name][num_bits] == pytest.approx(0.5 * factor * error, rel=1e-9)


def test_consumers_of_one_tensor_count_it_once():
    """Two convolutions read the images and two the first block's input: each tensor has its error once."""
    model = residual_net()
    batches = images(sizes=(2, 1))
    points = discover(model, batches, TASK)
    shared = next(point for point in points.activations if len(point.consumers) == 2)
    result = measure_sensitivity(model, batches, TASK, made_up(points), weight_bits=(8,), activation_bits=(3,))
    grid = calibrate(model, batches, TASK, points, bits={shared.name: [3]})[shared.name][3]
    with torch.no_grad():
        tensor = torch.relu(model.stem(torch.cat([inputs for inputs, _ in batches])))
    assert result.activation_errors[shared.name][3] == pytest.approx(squared_error(tensor, grid) / 3, rel=1e-9)


def test_a_head_called_on_several_tensors_counts_them_all():
    model = shared_head_net()
    batches = images(sizes=(2,))
    points = discover(model, batches, TASK)
    result = measure_sensitivity(model, batches, TASK, made_up(points), weight_bits=(8,), activation_bits=(3,))
    grid = calibrate(model, batches, TASK, points, bits={"head": [3]})["head"][3]
    with torch.no_grad():
        levels = [torch.tanh(conv(batches[0][0])) for conv in (model.fine, model.coarse)]
    want = sum(squared_error(level, grid) for level in levels) / 2
    assert result.activation_errors["head"][3] == pytest.approx(want, rel=1e-9)


def test_ranges_are_chosen_on_all_batches():
    """The grid of 8 bits reaches the extremes, which sit in different batches and at odd places."""
    model = nn.Sequential(nn.Identity(), nn.Linear(3, CLASSES)).double()
    batches = labelled(3, sizes=(2, 2, 2))
    batches[0][0][1, 1] = -50
    batches[2][0][0, 2] = 70
    points = discover(model, batches, TASK)
    grid = calibrate(model, batches, TASK, points, bits={"1": [8]})["1"][8]
    low, high = (float(grid.dequantize(torch.tensor(code))) for code in (0.0, 255.0))
    assert low == pytest.approx(-50, abs=1)
    assert high == pytest.approx(70, abs=1)


def test_a_tensor_that_is_never_negative_gets_the_whole_grid():
    model = conv_net()
    points = discover(model, images(), TASK)
    grid = calibrate(model, images(), TASK, points, bits={"conv2": [4]})["conv2"][4]
    assert grid.zero_point.item() == 0


def test_a_batch_may_leave_a_tensor_empty():
    """As a detector's second stage does where the first finds nothing."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, CLASSES), nn.Linear(CLASSES, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            x = torch.tanh(self.first(inputs))
            return x + self.second(x[: 3 if len(x) > 2 else 0]).sum(0)

    model, batches = build(Sometimes), labelled(6, sizes=(3, 2))
    curvature = made_up(discover(model, batches, TASK))
    both = measure_sensitivity(model, batches, TASK, curvature, activation_bits=(4,)).activation_errors["second"][4]
    full = measure_sensitivity(model, batches[:1], TASK, curvature, activation_bits=(4,)).activation_errors["second"][4]
    assert both == pytest.approx(full * 3 / 5)


def test_the_automatic_criterion_follows_the_rounding_and_the_estimator():
    """Samples that interact have no expansion: who had to ask for Hutchinson's estimator gets a table all the same."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, CLASSES), nn.Linear(CLASSES, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            x = torch.tanh(self.first(inputs))
            return x + self.second(x.mean(0, keepdim=True) + x.sum(0))

    model, batches = build(Mixing), labelled(6)
    curvature = estimate_curvature(model, batches, TASK, estimator="hutchinson", num_probes=2)

    def criterion(curvature: Curvature, weight_grid: WeightGrid, model: nn.Module = model) -> str:
        return measure_sensitivity(model, batches, TASK, curvature, weight_grid=weight_grid).criterion

    assert criterion(curvature, WeightGrid()) == criterion(curvature, NEAREST) == "trace"
    model = gelu_mlp()
    curvature = estimate_curvature(model, batches, TASK, num_probes=2)
    assert criterion(curvature, WeightGrid(), model) == "quadratic"
    assert criterion(curvature, NEAREST, model) == "trace"


def test_negative_traces_are_replaced():
    """Where no trace is positive all layers count alike, and ‖ΔW‖² decides; the measured traces stay in the table."""
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK), average_trace=-1.0)
    with pytest.warns(UserWarning, match=r"3 of 3 layers .* not significantly above zero \(conv1, conv2, fc\)"):
        result = measure_sensitivity(model, images(), TASK, curvature, weight_bits=(2, 4), activation_bits=(4,))
    assert result.average_traces == dict.fromkeys(("conv1", "conv2", "fc"), 2.0)
    assert {name: own.measured for name, own in result.replaced.items()} == {"conv1": -1.0, "conv2": -2.0, "fc": -3.0}
    for name, options in result.weight_errors.items():
        assert result.weight_omega[name] == {num_bits: 2.0 * error for num_bits, error in options.items()}
    assert len(result.replaced_activations) == len(result.activation_omega)
    assert all(omega > 0 for options in result.activation_omega.values() for omega in options.values())
    assert "trace -1 is not significantly positive, counts as 2" in str(result)


def test_the_l2_metric_leaves_the_trace_out():
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK), average_trace=-7.0)
    result = measure_sensitivity(model, images(), TASK, curvature, criterion="l2")
    assert result.criterion == "l2"
    assert result.weight_omega == result.weight_errors
    assert result.activation_omega == result.activation_errors
    with pytest.raises(SettingsError, match=r"criterion must be .*, got 'l1'"):
        measure_sensitivity(model, images(), TASK, curvature, criterion="l1")


def test_the_models_input_is_offered_8_bits_only():
    """Also where 8 bits are not among the widths asked for; a tensor inside the model gets what was asked for."""
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK))
    result = measure_sensitivity(model, images(), TASK, curvature, activation_bits=(4, 2, 4))
    assert {name: list(options) for name, options in result.activation_omega.items()} == {
        "conv1": [8],
        "conv2": [2, 4],
        "fc": [2, 4],
    }
    assert all(list(options) == [2, 3, 4, 5, 6, 8] for options in result.weight_omega.values())


@pytest.mark.parametrize("option", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("num_bits", [0, 9, -1])
def test_bits_outside_1_to_8_are_refused(option, num_bits):
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK))
    with pytest.raises(
        SettingsError,
        match=rf"{option} must be a sequence whose every item is an integer >= 1 and <= 8, got \(4, {num_bits}\)",
    ):
        measure_sensitivity(model, images(), TASK, curvature, **{option: (4, num_bits)})


def test_all_bits_from_1_to_8_are_measured_and_more_bits_err_less():
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK))
    bits = tuple(range(1, 9))
    result = measure_sensitivity(model, images(), TASK, curvature, weight_bits=bits, activation_bits=bits)
    for errors in (*result.weight_errors.values(), result.activation_errors["conv2"]):
        assert list(errors) == list(bits)
        assert all(errors[b + 1] < errors[b] for b in bits[:-1])


def test_no_weight_bits_are_refused():
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK))
    with pytest.raises(SettingsError, match="weight_bits is empty"):
        measure_sensitivity(model, images(), TASK, curvature, weight_bits=())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK))
    with torch.no_grad():
        model.conv2.weight[1, 0, 0, 0] = value
    with pytest.raises(ModelError, match="layer conv2 holds weights that are NaN or infinite"):
        measure_sensitivity(model, images(), TASK, curvature)


def test_activations_can_stay_in_float():
    """Without activation bits a curvature of weights alone will do; with them it will not."""
    model = conv_net()
    curvature = made_up(discover(model, images(), TASK), activations=False)
    result = measure_sensitivity(model, images(), TASK, curvature, activation_bits=())
    assert result.activation_omega == {}
    assert result.activation_errors == {}
    with pytest.raises(ModelError, match="measured for weights only"):
        measure_sensitivity(model, images(), TASK, curvature, activation_bits=(8,))


def test_a_tied_weight_is_measured_once():
    model = tied_net()
    curvature = made_up(discover(model, [token_batch()], TASK))
    result = measure_sensitivity(model, [token_batch()], TASK, curvature, weight_bits=(3,), activation_bits=(4,))
    assert list(result.weight_errors) == ["embedding", "hidden"]
    assert {name: list(options) for name, options in result.activation_errors.items()} == {"hidden": [4], "out": [4]}


def test_an_infinite_activation_is_named():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, CLASSES)).double()
    points = discover(model, labelled(6), TASK)
    with torch.no_grad():
        model[0].bias[0] = math.inf
    with pytest.raises(ModelError, match="the input of layer 1 is NaN or infinite"):
        calibrate(model, labelled(6), TASK, points, bits={"1": [8]})


def test_a_point_that_is_never_read_is_named():
    model = gelu_mlp()
    points = discover(model, labelled(6), TASK)
    task = ClassificationTask(forward=lambda model, inputs: model[2](inputs.new_zeros(4, 8)))
    with pytest.raises(ModelError, match="activation of layer 0 was never seen"):
        calibrate(model, labelled(6), task, points, bits={"0": [8]})


def test_the_model_is_left_as_it_was_and_an_iterator_will_do():
    """Three passes over the data are made: a one-shot iterator must serve them all."""
    model = residual_net().train()
    model.fc.eval()
    model.stem.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    batches = images(sizes=(2, 1))
    curvature = made_up(discover(model, batches, TASK))
    before = snapshot(model)
    result = measure_sensitivity(model, iter(batches), TASK, curvature)
    assert snapshot(model) == before
    assert result == measure_sensitivity(model, batches, TASK, curvature)


def test_from_curvature_to_table_and_file(tmp_path):
    """The measured curvature of a model goes in unchanged, and the table comes back from its file equal."""
    model, batches = gelu_mlp(), labelled(6)
    curvature = estimate_curvature(model, batches, TASK, num_probes=4)
    result = measure_sensitivity(model, batches, TASK, curvature)
    for name, estimate in curvature.weights.items():
        assert result.average_traces[name] == estimate.average_trace
        for num_bits, omega in result.weight_omega[name].items():
            assert omega == max(estimate.average_trace, 0) * result.weight_errors[name][num_bits]
    for name, estimate in curvature.activations.items():
        for num_bits, omega in result.activation_omega[name].items():
            assert omega == max(estimate.average_trace, 0) * result.activation_errors[name][num_bits]
    result.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(tmp_path / "sensitivity.json") == result


def test_eigenvalues_on_as_many_samples_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for second derivatives takes more memory than the traces did."""
    tried = []

    def limited(model: nn.Module, batches: list[tuple[Tensor, Tensor]], *rest: object, **options: object) -> object:
        tried.append(len(batches[0][0]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return top_eigenvalues(model, batches, *rest, **options)

    model, batches = gelu_mlp(), labelled(6, sizes=(9,))
    curvature = estimate_curvature(model, batches, TASK, estimator="hutchinson", num_probes=1)
    with pytest.raises(DataError, match="yielded no batches"):
        sensitivity_module.with_eigenvalues(model, [], TASK, curvature)
    monkeypatch.setattr(sensitivity_module, "top_eigenvalues", limited)
    with pytest.warns(UserWarning, match="those of the first 2 samples, because the graph of more does not") as told:
        found = sensitivity_module.with_eigenvalues(model, batches, TASK, curvature)
    assert tried == [9, 4, 2]
    assert len(told) == 1
    few = [tuple(part[:2] for part in batches[0])]
    expected = top_eigenvalues(model, few, TASK, curvature.points, seed=0)
    assert found.top_eigenvalues == {name: values[0] for name, values in expected.items()}
    monkeypatch.setattr(sensitivity_module, "top_eigenvalues", lambda *a, **o: limited(model, [(torch.ones(9),)]))
    with pytest.raises(ResourceError, match="memory does not suffice for one sample"):
        sensitivity_module.with_eigenvalues(model, batches, TASK, curvature)


def test_vectors_that_do_not_fit_are_not_blamed_on_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer samples would not help, and are not tried."""
    model, batches = gelu_mlp(), labelled(6, sizes=(9,))
    curvature = estimate_curvature(model, batches, TASK, estimator="hutchinson", num_probes=1)
    tried = []

    def counted(model: nn.Module, batches: list[tuple[Tensor, Tensor]], *rest: object, **options: object) -> object:
        tried.append(len(batches[0][0]))
        return top_eigenvalues(model, batches, *rest, **options)

    monkeypatch.setattr(sensitivity_module, "top_eigenvalues", counted)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.warns(UserWarning, match="this analysis has no eigenvalues: the eigenvalues of layer 0 need") as told:
        found = sensitivity_module.with_eigenvalues(model, batches, TASK, curvature, required=False)
    assert len(told) == 1
    assert found == curvature
    with pytest.raises(ResourceError, match="the eigenvalues of layer 0 need"):
        measure_sensitivity(model, batches, TASK, curvature, activation_bits=(), criterion="eigenvalue")
    assert tried == [9, 9]


def test_a_gradient_that_praises_coarse_rounding_is_told() -> None:
    """Where most layers have the least Ω at few bits, and below zero, the loss is not the one of the training."""
    good, bad = {2: 3.0, 8: -0.1}, {2: -3.0, 8: 0.1}
    with pytest.warns(UserWarning, match="fewer bits lower the loss in 3 of 4 layers"):
        sensitivity_module._warn_of_falling_losses(table({"a": bad, "b": bad, "c": good, "d": bad}))
    sensitivity_module._warn_of_falling_losses(table({"a": good, "b": bad, "c": good, "d": bad}))


def table(omega: dict[str, dict[int, float]]) -> Sensitivity:
    """Ω by layer and bits, of the layers of nothing."""
    return SimpleNamespace(criterion="first+quadratic", weight_omega=omega)  # type: ignore[return-value]
