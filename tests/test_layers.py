"""Discovery of quantization points, and the hook that reads and replaces tensors at them."""

import copy
import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import (
    CLASSES,
    EnergyTask,
    attention_net,
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
from tracequant import ClassificationTask, DataError, ModelError, QuantizationPoints, discover, estimate_curvature
from tracequant.model.discover import quantizable_names
from tracequant.model.hooks import reading, weight_parameter

TASK = ClassificationTask()


def energy_points(model: nn.Module, *arguments: Tensor) -> QuantizationPoints:
    """Points of a model that is called with these arguments."""
    return discover(model, [arguments], EnergyTask())


def names(points: QuantizationPoints) -> list[str]:
    return [layer.name for layer in points.layers]


# Which layers


def test_layers_are_named_by_qualified_module_name():
    points = discover(residual_net(), images(), TASK)
    assert names(points) == [
        "stem", "block1.conv1", "block1.conv2", "block1.downsample", "block2.conv1", "block2.conv2", "fc",
    ]  # fmt: skip
    assert points.by_name["block1.downsample"].kind == "Conv2d"
    assert points.by_name["block1.downsample"].shape == (6, 4, 1, 1)
    assert points.by_name["fc"].sites == (("fc", "weight"),)
    assert points.by_name["fc"].numel == 30
    assert names(points) == quantizable_names(residual_net())


@pytest.mark.parametrize(
    ("module", "inputs", "kind", "channel_axis", "channels"),
    [
        (nn.Conv1d(2, 3, 3), (2, 7), "Conv1d", 0, 3),
        (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), "Conv3d", 0, 3),
        (nn.ConvTranspose1d(2, 3, 3), (2, 7), "ConvTranspose1d", 1, 3),
        (nn.ConvTranspose2d(2, 3, 3), (2, 4, 4), "ConvTranspose2d", 1, 3),
        (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3), "ConvTranspose3d", 1, 3),
        (nn.Linear(2, 3, bias=False), (2,), "Linear", 0, 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_is_found_with_its_output_channels(module, inputs, kind, channel_axis, channels):
    points = energy_points(nn.Sequential(module), torch.randn(2, *inputs))
    (layer,) = points.layers
    assert (layer.name, layer.kind, layer.channel_axis, layer.channels) == ("0", kind, channel_axis, channels)
    assert layer.activation == "0"


def test_a_model_that_is_one_layer():
    """The root module has no name of its own; its weight is called by the parameter's."""
    points = energy_points(nn.Linear(5, 7), torch.randn(2, 5))
    (layer,) = points.layers
    assert (layer.name, layer.sites, layer.macs) == ("weight", (("", "weight"),), 35)
    (point,) = points.activations
    assert layer.activation == point.name
    assert point.consumers == ("",)
    assert [tensor.name for tensor in points.float_tensors] == ["bias"]


def test_patterns_match_whole_names():
    """`layer1.*` is not a prefix: it takes neither layer10 nor a layer called layer1 itself."""
    model = nn.ModuleDict({f"layer{i}": nn.Sequential(nn.Linear(3, 3)) for i in (1, 10)})
    model["layer"] = nn.Linear(3, 3)
    model.forward = lambda x: model["layer"](model["layer10"](model["layer1"](x)))

    def found(**options) -> list[str]:
        return names(discover(model, [(torch.randn(2, 3),)], EnergyTask(), **options))

    assert found() == ["layer1.0", "layer10.0", "layer"]
    assert found(include=["layer1.*"]) == ["layer1.0"]
    assert found(exclude=["layer1.*"]) == ["layer10.0", "layer"]
    assert found(include=["layer"]) == ["layer"]
    assert found(include=["layer*.0"], exclude=["layer10.0"]) == ["layer1.0"]
    assert found(include=["layer", "layer1.0"]) == ["layer1.0", "layer"]  # the model's order


@pytest.mark.parametrize("option", ["include", "exclude", "ties"])
def test_a_pattern_without_a_match_is_an_error(option):
    patterns = ["fc", "conv"] if option == "include" else ["conv"]
    with pytest.raises(ModelError, match=rf"{option} pattern 'conv' matches no layer; there are conv1, conv2, fc"):
        discover(conv_net(), images(), TASK, **{option: patterns})


def test_a_tie_may_name_layers_that_are_left_out():
    """A task names all blocks of its model; an analysis may leave some out."""
    points = discover(conv_net(), images(), TASK, exclude=["conv*"], ties=["conv*", "fc"])
    assert names(points) == ["fc"]
    assert points.ties == ()


def test_patterns_that_leave_no_layer_are_an_error():
    with pytest.raises(ModelError, match="no layer is left"):
        discover(conv_net(), images(), TASK, include=["conv*"], exclude=["conv?"])


def test_ties_group_layers():
    points = discover(residual_net(), images(), TASK, ties=["block1.*", "block2.*", "fc"])
    assert points.ties == (
        ("block1.conv1", "block1.conv2", "block1.downsample"),
        ("block2.conv1", "block2.conv2"),
    )
    assert points.weight_units == (("stem",), *points.ties, ("fc",))


def test_a_layer_in_two_ties_is_an_error():
    with pytest.raises(ModelError, match=r"block1\.conv1 is in two ties, 'block1\.\*' and '\*\.conv1'"):
        discover(residual_net(), images(), TASK, ties=["block1.*", "*.conv1"])


def test_ties_take_no_excluded_layer():
    points = discover(residual_net(), images(), TASK, exclude=["block1.conv2"], ties=["block1.*"])
    assert points.ties == (("block1.conv1", "block1.downsample"),)


def test_tied_weights_are_one_layer_with_two_sites():
    points = discover(tied_net(), [token_batch()], TASK)
    assert names(points) == ["embedding", "hidden"]
    layer = points.by_name["embedding"]
    assert layer.sites == (("embedding", "weight"), ("out", "weight"))
    assert layer.macs == 5 * 7 * 4  # the lookup multiplies nothing, the output layer does at each of 5 positions
    assert layer.activation == "out"  # tokens are integers: only the second site reads a tensor to quantize
    assert [point.name for point in points.activations] == ["hidden", "out"]
    assert [tensor.name for tensor in points.float_tensors] == ["hidden.bias"]


def test_no_quantizable_layer_is_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    with pytest.raises(ModelError, match="Sequential has no quantizable layer"):
        discover(model, labelled(3), TASK)


def test_a_parametrized_model_is_refused():
    model = gelu_mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(ModelError, match=r"module 2 computes its weight .*fuse_weight_norm"):
        discover(model, labelled(6), TASK)


def test_an_old_style_weight_norm_is_refused():
    """Its `weight` is no parameter but is computed before each call: a quantized one would be overwritten."""
    model = gelu_mlp()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[2])
    with pytest.raises(ModelError, match=r"module 2 computes its weight .*fuse_weight_norm"):
        discover(model, labelled(6), TASK)


def test_a_lazy_layer_is_refused():
    with pytest.raises(ModelError, match="layer 0 is lazy"):
        discover(nn.Sequential(nn.LazyLinear(5)), labelled(3), TASK)


# Multiply-accumulates, all worked out by hand


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        # 6 output channels, 4 x 4 places, each sums over 2 channels of its group and 9 taps.
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 8, 8), 6 * 16 * 2 * 9),
        (nn.Conv2d(3, 5, (1, 3), bias=False), (3, 4, 6), 5 * (4 * 4) * 3 * 3),
        (nn.Conv2d(4, 4, 3, dilation=2, groups=4), (4, 7, 7), 4 * 9 * 9),  # 7 - 2·2 = 3 places a side, depthwise
        # Every input element of 4 x 5 x 5 is spread over 3 output channels of its group and 9 taps.
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), 100 * 3 * 9),
        (nn.Linear(5, 7), (5,), 35),
        (nn.Linear(5, 7), (3, 5), 105),  # applied at 3 positions of each sample
    ],
)
def test_macs_of_one_sample(module, shape, macs):
    for samples in (1, 3):
        points = energy_points(nn.Sequential(module), torch.randn(samples, *shape))
        assert points.layers[0].macs == macs


def test_macs_of_a_module_that_is_called_several_times_add_up():
    layer = discover(shared_head_net(), images(), TASK).by_name["head"]
    assert layer.macs == CLASSES * 4 * (64 + 16)


def test_self_attention():
    """Query, key and value are one tensor and share one point; the fused function never calls `out_proj` itself."""
    sequence = labelled(6, 3)
    points = discover(attention_net(), sequence, TASK)
    assert names(points) == ["embed", "attention.in_proj_weight", "attention.out_proj", "fc"]
    in_proj, out_proj = points.by_name["attention.in_proj_weight"], points.by_name["attention.out_proj"]
    assert in_proj.sites == (("attention", "in_proj_weight"),)
    assert in_proj.shape == (12, 4)
    assert in_proj.macs == 3 * 6 * 4 * 4
    assert out_proj.macs == 6 * 4 * 4
    assert in_proj.activation == "attention"
    assert out_proj.activation is None
    assert [point.name for point in points.activations] == ["embed", "attention", "fc"]
    assert points.activation_by_name["attention"].numel == 6 * 4


def test_attention_to_a_memory_of_other_widths():
    model = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)
    points = energy_points(model, torch.randn(2, 5, 4), torch.randn(2, 6, 3), torch.randn(2, 6, 2))
    macs = {layer.name: layer.macs for layer in points.layers}
    assert macs == {
        "q_proj_weight": 5 * 4 * 4,
        "k_proj_weight": 6 * 3 * 4,
        "v_proj_weight": 6 * 2 * 4,
        "out_proj": 5 * 4 * 4,
    }
    (point,) = points.activations
    assert point.numel == 5 * 4 + 6 * 3 + 6 * 2


def test_attention_whose_key_is_its_value():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    memory = torch.randn(2, 6, 4)
    points = energy_points(model, torch.randn(2, 5, 4), memory, memory)
    assert points.by_name["in_proj_weight"].macs == (5 + 6 + 6) * 4 * 4
    assert points.activations[0].numel == 5 * 4 + 6 * 4


# Which tensors


def test_a_residual_branch_point_is_shared_by_its_convolutions():
    """Convolutions that read one tensor share its quantizer; the addition that reads it too is no consumer."""
    points = discover(residual_net(), images(), TASK)
    consumers = {point.name: point.consumers for point in points.activations}
    assert consumers == {
        "stem": ("stem",),
        "block1.conv1": ("block1.conv1", "block1.downsample"),
        "block1.conv2": ("block1.conv2",),
        "block2.conv1": ("block2.conv1",),
        "block2.conv2": ("block2.conv2",),
        "fc": ("fc",),
    }
    assert points.activation_by_name["block1.conv1"].numel == 4 * 8 * 8
    assert points.by_name["block1.downsample"].activation == "block1.conv1"
    assert points.by_name["block2.conv1"].activation == "block2.conv1"


def test_the_identity_path_reads_the_original_tensor():
    """With zeros at every point of the second block, the block still adds its own input."""
    model = residual_net().eval()
    batch = images()[0][0]
    points = discover(model, images(), TASK)
    x = model.block1(torch.relu(model.stem(batch)))
    want = torch.relu(model.block2.bn2(torch.zeros_like(x)) + x)  # its convolutions have no bias

    def read(name: str, tensor: Tensor) -> Tensor | None:
        return torch.zeros_like(tensor) if name.startswith("block2.") else None

    with reading(model, points, read):
        torch.testing.assert_close(model(batch), model.fc(want.mean((2, 3))), rtol=0, atol=0)


def test_a_head_applied_to_several_tensors_is_one_point():
    points = discover(shared_head_net(), images(), TASK)
    assert [(point.consumers, point.numel) for point in points.activations] == [
        (("fine", "coarse"), 3 * 8 * 8),
        (("head",), 4 * (8 * 8 + 4 * 4)),
    ]


def test_only_the_tensor_the_caller_hands_over_is_the_model_input():
    flags = {p.name: p.is_model_input for p in discover(shared_head_net(), images(), TASK).activations}
    assert flags == {"fine": True, "head": False}
    normalised = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)).double()
    (point,) = discover(normalised, labelled(6), TASK).activations
    assert not point.is_model_input


def test_a_tensor_that_the_task_makes_of_the_batch_is_the_model_input():
    class Scaling(ClassificationTask):
        def outputs(self, model, batch):
            return model(F.pad(batch[0] / 255, (0, 1)))

    (stem, *others) = discover(shared_head_net(), images(), Scaling()).activations
    assert stem.is_model_input
    assert not any(point.is_model_input for point in others)


def test_an_excluded_layer_is_no_consumer():
    points = discover(residual_net(), images(), TASK, exclude=["block1.conv1", "stem"])
    assert points.activation_by_name["block1.downsample"].consumers == ("block1.downsample",)
    assert "stem" not in points.activation_by_name
    assert "stem.weight" in {tensor.name for tensor in points.float_tensors}


def test_inputs_given_by_keyword_are_read():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    points = energy_points(Keyword(), torch.randn(2, 3))
    assert points.by_name["fc"].activation == "fc"
    assert points.by_name["fc"].macs == 3 * CLASSES


# What is stored besides


@pytest.mark.parametrize(
    ("build", "batches"),
    [
        (conv_net, images()),
        (residual_net, images()),
        (shared_head_net, images()),
        (gelu_mlp, labelled(6)),
        (attention_net, labelled(6, 3)),
    ],
)
def test_layers_and_float_tensors_make_up_the_state_dict(build, batches):
    """Every entry is either a quantized weight or a float tensor, never both; nothing is left out."""
    model = build()
    points = discover(model, batches, TASK)
    weights = {".".join(site): layer.shape for layer in points.layers for site in layer.sites}
    floats = {tensor.name: tensor.shape for tensor in points.float_tensors}
    assert len(floats) == len(points.float_tensors)
    assert not weights.keys() & floats.keys()
    assert weights | floats == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_float_tensors_know_their_type():
    batches = [(inputs.float(), targets) for inputs, targets in images()]
    tensors = {tensor.name: tensor.dtype for tensor in discover(conv_net().float(), batches, TASK).float_tensors}
    assert tensors["bn1.num_batches_tracked"] == "I64"
    assert tensors["bn1.running_var"] == "F32"
    assert tensors["fc.bias"] == "F32"


def test_a_module_registered_under_two_names_is_stored_once():
    """The state dictionary repeats a shared module's tensors; the sum of all sizes must not."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first
            self.fc = nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.second(self.first(x)))

    model = Twice()
    points = energy_points(model, torch.randn(2, 3))
    assert names(points) == ["first", "fc"]
    stored = sum(layer.numel for layer in points.layers) + sum(math.prod(t.shape) for t in points.float_tensors)
    assert stored == sum(parameter.numel() for parameter in model.parameters())


def test_state_that_cannot_be_stored_is_named():
    model = gelu_mlp()
    model.register_buffer("spectrum", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ModelError, match=r"state spectrum is of type torch\.complex64"):
        discover(model, labelled(6), TASK)


def test_the_fingerprint_tells_weights_apart():
    model = conv_net()
    fingerprint = discover(model, images(), TASK).fingerprint
    assert discover(copy.deepcopy(model), images(), TASK).fingerprint == fingerprint
    model.bn1.running_mean[0] += 1e-12
    assert discover(model, images(), TASK).fingerprint != fingerprint


def test_points_survive_a_file(tmp_path):
    points = discover(tied_net(), [token_batch()], TASK)
    points.save(tmp_path / "points.json")
    assert QuantizationPoints.load(tmp_path / "points.json") == points


# Reading and replacing


def test_reading_replaces_what_it_returns(device):
    """A tensor returned takes the place of the layer's input, None leaves it; afterwards all is as before."""
    model = gelu_mlp().to(device)
    inputs = labelled(6)[0][0].to(device)
    points = discover(model, labelled(6), TASK)
    plain = model(inputs)
    seen = []

    def read(name: str, tensor: Tensor) -> Tensor | None:
        seen.append((name, tuple(tensor.shape)))
        return torch.ones_like(tensor) if name == "2" else None

    with reading(model, points, read):
        replaced = model(inputs)
    assert seen == [("0", (4, 6)), ("2", (4, 8))]
    torch.testing.assert_close(replaced, (model[2].weight.sum(1) + model[2].bias).expand(4, -1))
    assert torch.equal(model(inputs), plain)


def test_reading_sees_every_consumer_and_every_call():
    model = shared_head_net()
    points = discover(model, images(), TASK)
    seen = []
    with reading(model, points, lambda name, tensor: seen.append((name, tensor.shape[-1]))):
        model(images()[0][0])
    assert seen == [("fine", 8), ("fine", 8), ("head", 8), ("head", 4)]


def test_reading_keeps_query_key_and_value_one_tensor():
    """One tensor given three times is read once, so that attention stays self-attention after the replacement."""
    model = attention_net()
    points = discover(model, labelled(6, 3), TASK)
    received = []
    seen = []

    def read(name: str, tensor: Tensor) -> Tensor:
        seen.append(name)
        return tensor.clone()

    handles = []
    with reading(model, points, read):
        handles.append(model.attention.register_forward_pre_hook(lambda module, args: received.extend(args)))
        model(labelled(6, 3)[0][0])
    handles[0].remove()
    assert seen == ["embed", "attention", "fc"]
    assert received[0] is received[1] is received[2]


def test_reading_passes_over_integers():
    model = tied_net()
    points = discover(model, [token_batch()], TASK)
    everywhere = QuantizationPoints.from_json(
        {
            **points.to_json(),
            "activations": [{"name": "embedding", "consumers": ["embedding"], "numel": 5.0, "is_model_input": True}],
        }
    )
    with reading(model, everywhere, lambda name, tensor: pytest.fail(f"read {tensor.dtype} at {name}")):
        model(token_batch()[0])


def test_hooks_are_gone_after_reading_even_if_the_model_fails():
    model = conv_net()
    points = discover(model, images(), TASK)
    before = snapshot(model)

    def fail() -> None:
        with reading(model, points, lambda name, tensor: None):
            model(torch.zeros(1, 99, 8, 8, dtype=torch.float64))

    with pytest.raises(RuntimeError):
        fail()
    assert snapshot(model) == before


@pytest.mark.parametrize("build", [conv_net, residual_net])
def test_discovery_leaves_the_model_as_it_was(build):
    """Statistics, modes (mixed ones too), gradients, hooks and the global random state."""
    model = build().train()
    model.fc.eval()
    model.fc.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones_like(model.fc.bias)
    before = snapshot(model)
    discover(model, images(), TASK)
    assert snapshot(model) == before


def test_discovery_leaves_the_model_as_it_was_when_it_fails():
    model = conv_net().train()
    before = snapshot(model)
    with pytest.raises(DataError, match="out of range"):
        discover(model, [(images()[0][0], torch.tensor([0, 1, 2, CLASSES]))], TASK)
    assert snapshot(model) == before


def test_discovery_runs_the_model_in_evaluation_mode():
    """Dropout in the head would make no tensor differ in size, but BatchNorm refuses single samples in training."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double().train()
    assert len(discover(model, labelled(3, sizes=(1,)), TASK).layers) == 2


def test_weights_are_found_again_by_their_layer():
    model = tied_net()
    points = discover(model, [token_batch()], TASK)
    assert weight_parameter(model, points.by_name["embedding"]) is model.out.weight
    with pytest.raises(ModelError, match=re.escape("expected a weight of shape [7, 4], the model has nothing")):
        weight_parameter(conv_net(), points.by_name["embedding"])
    other = copy.deepcopy(model)
    other.hidden = nn.Linear(4, 9)
    with pytest.raises(ModelError, match=r"layer hidden: .*the model has \[9, 4\]"):
        weight_parameter(other, points.by_name["hidden"])


def test_layers_without_weights_are_left_out() -> None:
    """A Linear of no inputs, which some configurations leave behind."""

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that there is nothing to initialise
                self.none = nn.Linear(0, 3)
            self.some = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.some(x) + self.none(x[:, :0]))

    batches = [(torch.randn(5, 4), torch.arange(5) % 3)]
    points = discover(Empty(), batches, TASK)
    assert [layer.name for layer in points.layers] == ["some"]
    assert set(estimate_curvature(Empty(), batches, TASK, estimator="gauss_newton").weights) == {"some"}
