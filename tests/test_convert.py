"""From a plan to a fake-quantized model: what is rounded, what stays float, and that the argument stays as it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tracequant as tq
from models import snapshot
from tracequant.core import cost
from tracequant.core.errors import ModelError
from tracequant.core.points import QuantizationPoints
from tracequant.quantization.convert import dequantized_state, quantize_activation
from tracequant.quantization.grid import choose_grid, choose_weight_grid
from tracequant.quantization.quantizer import activation_quantizers, input_quantizers, weight_quantizers

torch.set_num_threads(1)

TASK = tq.ClassificationTask()


class Residual(nn.Module):
    """A branch point read by two convolutions, BatchNorm, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.right = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.left(x) + self.right(x)).relu()
        return torch.as_tensor(self.head(self.drop(x.mean((2, 3)))))


class Words(nn.Module):
    """Tied embedding, attention and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return torch.as_tensor(self.out(x.mean(1)))


def images(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 2, 5, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(2)
    ]


def sentences() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 9, (8, 6), generator=generator), torch.randint(0, 9, (8,), generator=generator))]


def build(kind: Callable[[], nn.Module] = Residual) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind().eval()


def plan_for(
    points: QuantizationPoints, weight_bits: int = 3, activation_bits: int = 4, grid: tq.WeightGrid | None = None
) -> tq.BitPlan:
    weights = {layer.name: weight_bits for layer in points.layers}
    activations = {point.name: activation_bits for point in points.activations if activation_bits}
    grid = grid or tq.WeightGrid()
    return tq.BitPlan(
        weight_bits=weights,
        activation_bits=activations,
        size_bytes=cost.size_bytes(points, weights, activations, grid),
        weight_code_bits=cost.weight_bits_total(points, weights),
        weight_count=cost.weight_count(points),
        omega=0.0,
        activation_omega=0.0,
        weight_grid=grid,
        fingerprint=points.fingerprint,
        solver="by hand",
        budget="none",
    )


def quantized_residual(weight_bits: int = 3, activation_bits: int = 4) -> tuple[nn.Module, nn.Module]:
    model = build()
    plan = plan_for(tq.discover(model, images(), TASK), weight_bits, activation_bits)
    return model, tq.quantize(model, images(), TASK, plan)


def inputs_read(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """What every layer with weights reads when the model runs, after all pre-hooks."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):

            def hook(_module: nn.Module, args: tuple[Tensor], _output: Tensor, name: str = name) -> None:
                seen[name] = args[0].detach()

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


# The argument


def test_a_plan_of_other_weights_is_followed_with_a_warning() -> None:
    model = build()
    plan = plan_for(tq.discover(model, images(), TASK))
    with torch.no_grad():
        model.head.weight[0, 0] += 1  # type: ignore[operator]
    with pytest.warns(UserWarning, match="the plan was made for other weights than the model's"):
        quantized = tq.quantize(model, images(), TASK, plan)
    assert len(weight_quantizers(quantized)) == len(plan.weight_bits)


@pytest.mark.parametrize("training", [False, True])
def test_the_argument_is_left_exactly_as_it_was(training: bool) -> None:
    model = build().train(training)
    model.left.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = copy.deepcopy(model.state_dict())
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    plan = plan_for(tq.discover(model, images(), TASK))
    rng = torch.get_rng_state()

    quantized = tq.quantize(model, images(), TASK, plan)

    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))  # type: ignore[arg-type]
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    # Nothing is shared either: changing the copy cannot reach back.
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert not own & {p.data_ptr() for p in (*quantized.parameters(), *quantized.buffers())}
    assert quantized.training == training


def test_classes_stay_what_they_are() -> None:
    model, quantized = quantized_residual()
    for name, module in model.named_modules():
        assert isinstance(quantized.get_submodule(name), type(module)), name
    assert isinstance(quantized, Residual)


# Names


def test_a_plan_for_another_model_is_refused() -> None:
    model = build()
    plan = plan_for(tq.discover(model, images(), TASK))
    for name in ("lef", "left.weight", "nowhere", "norm", "drop", "*"):
        wrong = replace(plan, weight_bits={**plan.weight_bits, name: 4})
        with pytest.raises(ModelError) as refused:
            tq.quantize(model, images(), TASK, wrong)
        assert f"the plan names layer {name}, which this model does not have" in str(refused.value)


def test_an_unknown_activation_is_refused() -> None:
    """`right` reads the tensor of the point `left`: it has no point of its own."""
    model = build()
    plan = plan_for(tq.discover(model, images(), TASK))
    for name in ("right", "nowhere"):
        wrong = replace(plan, activation_bits={**plan.activation_bits, name: 4})
        with pytest.raises(ModelError, match=f"the plan names activation {name}, which this model does not have"):
            tq.quantize(model, images(), TASK, wrong)


def test_quantizing_twice_is_refused() -> None:
    _, quantized = quantized_residual()
    plan = plan_for(tq.discover(build(), images(), TASK))
    with pytest.raises(ModelError, match="module stem is quantized already"):
        tq.quantize(quantized, images(), TASK, plan)


@pytest.mark.parametrize("num_bits", [0, 9])
def test_bits_outside_the_range_are_refused(num_bits: int) -> None:
    model = build()
    plan = plan_for(tq.discover(model, images(), TASK))
    with pytest.raises(ModelError, match="from 1 to 8"):
        tq.quantize(model, images(), TASK, replace(plan, weight_bits={**plan.weight_bits, "head": num_bits}))
    with pytest.raises(ModelError, match="from 1 to 8"):
        tq.quantize(model, images(), TASK, replace(plan, activation_bits={**plan.activation_bits, "head": num_bits}))


# Weights and activations


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_take_at_most_two_to_the_b_values_in_each_channel(num_bits: int, per_channel: bool) -> None:
    model = build()
    points = tq.discover(model, images(), TASK)
    nearest = tq.WeightGrid(per_channel, rounding="nearest")
    quantized = tq.quantize(model, images(), TASK, plan_for(points, num_bits, 0, nearest))

    for layer in points.layers:
        weight = quantized.get_submodule(layer.name).weight.detach()  # type: ignore[union-attr, operator]
        for part in weight if per_channel else [weight]:  # type: ignore[union-attr]
            assert part.unique().numel() <= 2**num_bits
        original = model.get_submodule(layer.name).weight
        expected = choose_weight_grid(original, num_bits, 0, nearest).round(original)  # type: ignore[arg-type]
        assert torch.equal(weight, expected)
        assert not torch.equal(weight, original)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_bits", [1, 2, 3, 5, 8])
def test_activations_take_at_most_two_to_the_b_values_at_every_consumer(num_bits: int) -> None:
    """On data that was never calibrated on, in evaluation and in training mode."""
    _, quantized = quantized_residual(8, num_bits)
    batch = 3 * images(seed=5)[0][0]

    for training in (False, True):
        read = inputs_read(quantized.train(training), batch)
        assert set(read) == {"stem", "left", "right", "head"}
        for name, tensor in read.items():
            assert 1 < tensor.unique().numel() <= 2**num_bits, name
            # Zero padding and ReLU need the zero.
            grid = quantized.get_submodule(name).input_quantizer.grid  # type: ignore[union-attr]
            assert grid.round(torch.zeros(1)) == 0  # type: ignore[union-attr, operator]


def test_activations_stay_float_where_the_plan_says_so() -> None:
    model, quantized = quantized_residual(8, 0)
    assert activation_quantizers(quantized) == {}
    read = inputs_read(quantized, images()[0][0])
    assert torch.equal(read["stem"], images()[0][0])
    assert torch.equal(read["left"], read["right"])
    assert inputs_read(model, images()[0][0]).keys() == read.keys()


def test_layers_outside_the_plan_stay_float() -> None:
    model = build()
    points = tq.discover(model, images(), TASK, include=("left", "head"))
    quantized = tq.quantize(model, images(), TASK, plan_for(points))

    assert list(weight_quantizers(quantized)) == [("left", "weight"), ("head", "weight")]
    for name in ("stem", "right"):
        assert torch.equal(quantized.get_submodule(name).weight, model.get_submodule(name).weight)  # type: ignore[arg-type]
    read = inputs_read(quantized, images()[0][0])
    assert torch.equal(read["stem"], images()[0][0])
    assert read["left"].unique().numel() <= 16 < read["right"].unique().numel()


def test_single_activations_may_stay_float() -> None:
    model = build()
    plan = plan_for(tq.discover(model, images(), TASK))
    quantized = tq.quantize(model, images(), TASK, replace(plan, activation_bits={"head": 2}))
    read = inputs_read(quantized, images()[0][0])
    assert list(activation_quantizers(quantized)) == ["head"]
    assert read["head"].unique().numel() <= 4
    assert torch.equal(read["stem"], images()[0][0])


def test_biases_and_statistics_stay_as_they_were_with_the_nearest() -> None:
    model = build()
    points = tq.discover(model, images(), TASK)
    quantized = tq.quantize(model, images(), TASK, plan_for(points, grid=tq.WeightGrid(rounding="nearest")))
    before, after = model.state_dict(), dequantized_state(quantized)
    assert list(after) == [name for name in after if name in before]
    assert set(after) == set(before)
    for name, tensor in before.items():
        quantized_weight = name in {"stem.weight", "left.weight", "right.weight", "head.weight"}
        assert torch.equal(tensor, after[name]) != quantized_weight, name


def test_dequantized_state_runs_on_the_float_architecture() -> None:
    model, quantized = quantized_residual(3, 0)
    plain = copy.deepcopy(model)
    plain.load_state_dict(dequantized_state(quantized))
    batch = images(seed=3)[0][0]
    assert torch.equal(plain(batch), quantized(batch))
    assert not torch.equal(plain(batch), model(batch))


def test_eight_bits_hardly_change_the_outputs() -> None:
    """With 8 bits for weights and activations the output moves by far less than with 2."""
    batch = images(seed=3)[0][0]
    errors = {}
    for num_bits in (2, 4, 8):
        model, quantized = quantized_residual(num_bits, num_bits)
        with torch.no_grad():
            errors[num_bits] = float((quantized(batch) - model(batch)).norm() / model(batch).norm())
    assert errors[8] < 0.02
    assert errors[8] < errors[4] < errors[2]


# Sharing


def test_consumers_of_one_tensor_share_one_quantizer() -> None:
    _, quantized = quantized_residual()
    left, right, head = (quantized.get_submodule(n).input_quantizer for n in ("left", "right", "head"))  # type: ignore[union-attr]
    assert left is right
    assert left is not head
    assert list(input_quantizers(quantized)) == ["stem", "left", "head"]
    assert sum(1 for name, _ in quantized.named_parameters() if "input_quantizer" in name) == 3

    # Its gradient is the total over the consumers.
    quantized(images()[0][0]).sum().backward()
    total = left.scale.grad.clone()  # type: ignore[union-attr]
    parts = []
    for silent in ("left", "right"):
        quantized.zero_grad()
        module = quantized.get_submodule(silent)
        handle = module.register_forward_pre_hook(lambda _m, args: (args[0].detach(),))
        quantized(images()[0][0]).sum().backward()
        handle.remove()
        parts.append(left.scale.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(total, parts[0] + parts[1])
    assert all(part.abs().sum() > 0 for part in parts)


def test_tied_weights_share_one_quantizer_and_one_parameter() -> None:
    model = build(Words)
    quantized = tq.quantize(model, sentences(), TASK, plan_for(tq.discover(model, sentences(), TASK)))
    found = weight_quantizers(quantized)

    assert found["embed", "weight"] is found["out", "weight"]
    chains = [quantized.get_submodule(name).parametrizations.weight for name in ("embed", "out")]  # type: ignore[union-attr]
    assert chains[0].original is chains[1].original  # type: ignore[union-attr]
    assert torch.equal(quantized.embed.weight, quantized.out.weight)  # type: ignore[arg-type, union-attr]
    assert not torch.equal(quantized.embed.weight, model.embed.weight)  # type: ignore[arg-type, union-attr]


def test_attention_reads_quantized_projections_and_inputs() -> None:
    """Against a plain model that is given the rounded weights and, by a hook, the rounded input."""
    model = build(Words)
    quantized = tq.quantize(model, sentences(), TASK, plan_for(tq.discover(model, sentences(), TASK)))
    assert ("attention", "in_proj_weight") in weight_quantizers(quantized)
    assert ("attention.out_proj", "weight") in weight_quantizers(quantized)
    plain = build(Words)
    plain.load_state_dict(dequantized_state(quantized))
    grids = {name: quantizer.grid for name, quantizer in activation_quantizers(quantized).items()}
    assert set(grids) == {"attention", "out"}
    plain.attention.register_forward_pre_hook(lambda _m, args: tuple(grids["attention"].round(a) for a in args))
    plain.out.register_forward_pre_hook(lambda _m, args: (grids["out"].round(args[0]),))
    batch = sentences()[0][0]

    torch.testing.assert_close(quantized(batch), plain(batch), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(quantized(batch), model(batch), rtol=1e-3)


# Copies and files


def test_a_deepcopy_keeps_its_hooks() -> None:
    _, quantized = quantized_residual()
    batch = images(seed=2)[0][0]
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(batch), quantized(batch))
    assert twin.left.input_quantizer is twin.right.input_quantizer
    twin.stem.input_quantizer.detach(twin.stem)
    read = inputs_read(twin, batch)
    assert torch.equal(read["stem"], batch)
    assert inputs_read(quantized, batch)["stem"].unique().numel() <= 16


def test_the_state_dict_carries_everything() -> None:
    """PyTorch saves parametrized modules by their state dict; on a second conversion it gives the same model."""
    model, quantized = quantized_residual()
    with torch.no_grad():
        for quantizer in (*weight_quantizers(quantized).values(), *activation_quantizers(quantized).values()):
            quantizer.scale.mul_(1.1)
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    other = tq.quantize(model, images(), TASK, plan_for(tq.discover(model, images(), TASK)))
    batch = images(seed=2)[0][0]
    assert not torch.equal(other(batch), quantized(batch))

    other.load_state_dict(torch.load(file, weights_only=True))

    assert torch.equal(other(batch), quantized(batch))


def test_hooks_survive_saving_the_whole_module() -> None:
    """Activation quantizers alone, since PyTorch refuses to pickle a module with parametrized weights."""
    model = build()
    grid = choose_grid(torch.randn(200, generator=torch.Generator().manual_seed(0)), 2, symmetric=False)
    quantize_activation([model.left, model.right, model.left], "left", grid)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)

    loaded = torch.load(file, weights_only=False)

    batch = images()[0][0]
    assert torch.equal(loaded(batch), model(batch))
    assert loaded.left.input_quantizer is loaded.right.input_quantizer
    assert len(loaded.left._forward_pre_hooks) == 1, "a consumer that is named twice reads through one hook"
    read = inputs_read(loaded, batch)
    assert read["left"].unique().numel() <= 4
    loaded.left.input_quantizer.detach(loaded.left)
    assert inputs_read(loaded, batch)["left"].unique().numel() > 4
    assert inputs_read(model, batch)["left"].unique().numel() <= 4


def test_gradients_reach_weights_scales_and_inputs() -> None:
    _, quantized = quantized_residual()
    batch = images()[0][0].requires_grad_()
    quantized(batch).square().sum().backward()
    assert batch.grad is not None
    assert batch.grad.abs().sum() > 0
    for name, parameter in quantized.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_an_iterator_of_batches_is_enough() -> None:
    """Conversion passes over the batches more than once; a generator gives them only once."""
    model = build()
    plan = plan_for(tq.discover(model, images(), TASK))
    batch = images(seed=2)[0][0]
    once = tq.quantize(model, iter(images()), TASK, plan)
    again = tq.quantize(model, images(), TASK, plan)
    assert torch.equal(once(batch), again(batch))


# Back to an ordinary module


def test_to_float_is_an_ordinary_module_with_the_weights_of_the_codes() -> None:
    """No parametrization, hook or quantizer is left, the state dict is the float model's, and the argument stays."""
    model, quantized = quantized_residual()
    _, weights_only = quantized_residual(activation_bits=0)
    inputs = images()[0][0]
    quantized.eval()
    before = snapshot(quantized)

    plain = tq.to_float(quantized)

    assert snapshot(quantized) == before
    quantized(inputs)  # still whole: the copy shares the classes of its modules
    assert list(plain.state_dict()) == list(model.state_dict())
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert all(torch.equal(tensor, dequantized_state(quantized)[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(plain(inputs), weights_only.eval()(inputs))
    assert not torch.equal(plain(inputs), model(inputs))
    program = torch.export.export(plain, (inputs,))
    assert torch.allclose(program.module()(inputs), plain(inputs))
    assert sorted(program.state_dict) == sorted(model.state_dict())


def test_to_float_keeps_ties_and_attention() -> None:
    model, tokens = build(Words), sentences()[0][0]
    plan = plan_for(tq.discover(model, sentences(), TASK), activation_bits=0)
    quantized = tq.quantize(model, sentences(), TASK, plan).eval()
    plain = tq.to_float(quantized)
    assert plain.out.weight is plain.embed.weight
    assert len(list(plain.parameters())) == len(list(model.parameters()))
    assert torch.allclose(plain(tokens), quantized(tokens))  # the plain one may take torch's fused attention
