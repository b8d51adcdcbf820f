"""Quantization-aware fine-tuning: that it learns, and that an interrupted run ends like an undisturbed one."""

from __future__ import annotations

import copy
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tracequant as tq
from tracequant.core.errors import ArtifactError, DataError, ModelError, SettingsError
from tracequant.core.points import QuantizationPoints
from tracequant.quantization import checkpoint, training
from tracequant.quantization.quantizer import Quantizer, WeightQuantizer, activation_quantizers, weight_quantizers

torch.set_num_threads(1)

TASK = tq.ClassificationTask()
LAYERS = ("one", "two", "three", "four")  # of Net


class Net(nn.Module):
    """Four layers, BatchNorm and dropout: state and randomness that a resume must restore."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.one = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(dropout)
        self.two = nn.Linear(12, 12, bias=False)
        self.three = nn.Linear(12, 12)
        self.four = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.one(x)).relu())
        x = x + self.two(x).relu()
        x = self.three(x).relu()
        return torch.as_tensor(self.four(x))


class TiedNet(nn.Module):
    """Input and output layer share one square weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 6)
        self.middle = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.middle(self.into(x).relu()).relu()))


def dataset(samples: int = 96) -> TensorDataset:
    """Three overlapping clusters: a problem that a trained net solves and a 1-bit net must work for."""
    generator = torch.Generator().manual_seed(1)
    centres = 2 * torch.randn(3, 6, generator=generator)
    targets = torch.randint(0, 3, (samples,), generator=generator)
    return TensorDataset(centres[targets] + torch.randn(samples, 6, generator=generator), targets)


def loader(batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=batch_size, shuffle=True)


def one_batch() -> list[Any]:
    return [tuple(dataset().tensors)]


def build(kind: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return kind()


def by_hand(points: QuantizationPoints, weight_bits: int, activation_bits: int) -> tq.BitPlan:
    return tq.BitPlan(
        weight_bits={layer.name: weight_bits for layer in points.layers},
        activation_bits={point.name: activation_bits for point in points.activations if activation_bits},
        size_bytes=0,
        weight_code_bits=0,
        weight_count=1,
        omega=0.0,
        activation_omega=0.0,
        weight_grid=tq.WeightGrid(rounding="nearest"),  # training has more to mend
        fingerprint=points.fingerprint,
        solver="by hand",
        budget="none",
    )


def quantized(weight_bits: int = 3, activation_bits: int = 4, kind: type[nn.Module] = Net) -> nn.Module:
    model = build(kind)
    return tq.quantize(
        model, one_batch(), TASK, by_hand(tq.discover(model, one_batch(), TASK), weight_bits, activation_bits)
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    return [*weight_quantizers(model).values(), *activation_quantizers(model).values()]


# Learning


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(1, 8), (2, 4), (3, 3), (4, 0), (8, 8)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_loss_goes_down(weight_bits: int, activation_bits: int, optimizer: str) -> None:
    model = quantized(weight_bits, activation_bits)
    before = TASK.evaluate(model, one_batch())
    start = state_of(model)

    result = tq.finetune(model, loader(), TASK, steps=60, learning_rate=0.02, optimizer=optimizer)  # type: ignore[arg-type]

    after = TASK.evaluate(model, one_batch())
    assert after.loss < 0.7 * before.loss
    assert after.metric > 85
    assert len(result.losses) == result.steps_run == 60
    assert sum(result.losses[-6:]) < 0.7 * sum(result.losses[:6])
    # Weights, scales and biases all took part, and the grids still hold.
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    for kind in ("original", "scale", "bias", "running_mean"):
        assert any(name.endswith(kind) for name in moved), kind
    assert not any(name.endswith("zero_point") for name in moved)
    for name in ("one", "two", "three", "four"):
        for channel in model.get_submodule(name).weight.detach():  # type: ignore[union-attr, operator]
            assert channel.unique().numel() <= 2**weight_bits


def test_scales_can_be_held() -> None:
    model = quantized()
    before = {id(q): q.scale.detach().clone() for q in quantizers_of(model)}
    tq.finetune(model, loader(), TASK, steps=5, scales="fixed")
    assert all(torch.equal(q.scale, before[id(q)]) for q in quantizers_of(model))
    tq.finetune(model, loader(), TASK, steps=5, scales="lsq")
    assert not any(torch.equal(q.scale, before[id(q)]) for q in quantizers_of(model))


def test_scales_stay_positive() -> None:
    """A step that would carry one across zero ends at a hundredth of where it began."""
    model = quantized(2, 2)
    before = [q.scale.detach().clone() for q in quantizers_of(model)]
    tq.finetune(model, loader(), TASK, steps=15, learning_rate=1.0)
    shares = torch.cat(
        [(q.scale.detach() / scale).flatten() for q, scale in zip(quantizers_of(model), before, strict=True)]
    )
    assert shares.min() == pytest.approx(0.01, rel=1e-5)


def test_the_learning_rate_falls_along_a_cosine() -> None:
    """Seen from the steps of a parameter with a constant gradient: SGD with Nesterov momentum written out."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.layer(x))

    task = tq.ClassificationTask(loss=lambda outputs, targets: outputs.mean())
    batches = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))]
    model = Slope()
    model = tq.quantize(model, batches, task, by_hand(tq.discover(model, batches, task), 4, 0))
    expected = model.layer.bias.item()  # type: ignore[union-attr, operator]
    velocity = 0.0
    for step in range(7):
        velocity = 0.9 * velocity + 1.0
        expected -= 0.1 * 0.5 * (1 + math.cos(math.pi * step / 7)) * (1.0 + 0.9 * velocity)

    tq.finetune(model, batches, task, steps=7, learning_rate=0.1)

    assert model.layer.bias.item() == pytest.approx(expected, rel=1e-5)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("kind", [Net, TiedNet])
def test_one_step_moves_scales_by_the_rule_of_learned_step_sizes(kind: type[nn.Module]) -> None:
    """g / sqrt(elements of the scale · largest code), once for every scale, tied or not (Esser et al., Section 2.2)."""
    model = quantized(4, 5, kind)
    if kind is Net:
        model.get_submodule("drop").p = 0.0  # type: ignore[assignment]
    reference = copy.deepcopy(model).train()
    calls: dict[Quantizer, list[tuple[Tensor, Tensor]]] = {quantizer: [] for quantizer in quantizers_of(reference)}

    def note(quantizer: Quantizer, args: tuple[Tensor], rounded: Tensor) -> None:
        rounded.register_hook(lambda grad: calls[quantizer].append((args[0].detach(), grad)))

    for quantizer in calls:
        quantizer.register_forward_hook(note)  # type: ignore[arg-type]
    inputs, targets = one_batch()[0]
    nn.functional.cross_entropy(reference(inputs), targets).backward()
    expected = []
    for quantizer in quantizers_of(reference):
        scale, zero = quantizer.scale.detach(), quantizer.zero_point
        is_weight = isinstance(quantizer, WeightQuantizer)
        top, largest = 2**quantizer.num_bits - 1, 7 if is_weight else 31
        slope = torch.zeros_like(scale)
        for values, grad in calls[quantizer]:
            position = values / scale + zero
            inside = (position >= 0) & (position <= top)
            ends = position.clamp(0, top) - zero
            step = grad * torch.where(inside, position.round() - position, ends)
            slope += step.sum_to_size(scale.shape) / math.sqrt(values.numel() / scale.numel() * largest)
        # The first step of Nesterov's momentum is 1 + 0.9 times the gradient.
        expected.append(scale - 0.01 * 1.9 * slope)
    before = [quantizer.scale.detach().clone() for quantizer in quantizers_of(model)]

    tq.finetune(model, one_batch(), TASK, steps=1, learning_rate=0.01)

    for old, new, want in zip(before, quantizers_of(model), expected, strict=True):
        torch.testing.assert_close(new.scale.detach() - old, want - old, rtol=2e-3, atol=1e-9)


def test_weight_decay_spares_scales_biases_and_norms() -> None:
    """With a loss of zero slope only decay moves anything."""
    task = tq.ClassificationTask(loss=lambda outputs, targets: 0.0 * outputs.sum())
    model = quantized()
    before = state_of(model)
    tq.finetune(model, one_batch(), task, steps=1, learning_rate=0.1, weight_decay=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("original"):
            torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 1.9 * 0.5))
        else:
            assert torch.equal(parameter, before[name]), name


def test_modes_and_gradients_are_in_order_afterwards() -> None:
    model = quantized().eval()
    model.get_submodule("drop").train()
    modes = {name: module.training for name, module in model.named_modules()}

    tq.finetune(model, loader(), TASK, steps=3)

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_runs_in_training_mode() -> None:
    """Dropout and BatchNorm are on even if the model came in evaluation mode."""
    model = quantized().eval()
    mean = model.get_submodule("norm").running_mean.clone()  # type: ignore[union-attr, operator]
    tq.finetune(model, loader(), TASK, steps=2)
    assert not torch.equal(model.get_submodule("norm").running_mean, mean)  # type: ignore[arg-type]


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    model = quantized().train()
    norm: Any = model.get_submodule("norm")
    before = copy.deepcopy(norm.state_dict())

    tq.finetune(model, loader(), TASK, steps=4, batchnorm="freeze")

    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(norm.state_dict()[name], before[name])
    assert not torch.equal(norm.weight, before["weight"])
    assert norm.training


def test_reestimated_batchnorm_holds_the_mean_over_batches() -> None:
    """One batch again and again: its statistics exactly, whatever training left; all else as without."""
    plain, model = quantized().eval(), quantized().eval()
    tq.finetune(plain, one_batch(), TASK, steps=3)
    tq.finetune(model, one_batch(), TASK, steps=3, batchnorm="reestimate")

    hidden = model.get_submodule("one")(one_batch()[0][0]).detach()
    norm: Any = model.get_submodule("norm")
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, hidden.var(0))
    assert norm.momentum == 0.1
    assert not norm.training
    plain_norm: Any = plain.get_submodule("norm")
    assert not torch.allclose(norm.running_mean, plain_norm.running_mean)
    assert torch.equal(norm.weight, plain_norm.weight)


def test_the_moving_average_is_what_remains() -> None:
    """Weights and scales after four steps, averaged by hand."""
    start = quantized()
    names = [name for name, _ in start.named_parameters()]
    seen: list[list[Tensor]] = []

    class Noting(tq.ClassificationTask):
        """Notes the parameters that a step begins with."""

        def outputs(self, model: nn.Module, batch: Any) -> Any:
            seen.append([p.detach().clone() for p in model.parameters()])
            return super().outputs(model, batch)

    model = copy.deepcopy(start)
    tq.finetune(model, loader(), Noting(), steps=4, learning_rate=0.05)
    path = [*seen, [p.detach() for p in model.parameters()]]
    expected = [value.clone() for value in path[0]]
    for values in path[1:]:
        expected = [0.7 * old + 0.3 * new for old, new in zip(expected, values, strict=True)]

    averaged = copy.deepcopy(start)
    tq.finetune(averaged, loader(), TASK, steps=4, learning_rate=0.05, ema=0.7)

    for name, value, parameter in zip(names, expected, averaged.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), value, msg=name)


class Images(nn.Module):
    """A convolutional net, for what concerns the layout of images."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x)).relu()
        x = (x + self.two(x)).relu()
        return torch.as_tensor(self.head(x.mean((2, 3))))


def image_batches() -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(3)
    ]


def test_channels_last_leaves_volumes_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    batches = [(torch.randn(4, 1, 3, 3, 3), torch.tensor([0, 1, 0, 1]))]
    model = tq.quantize(model, batches, TASK, by_hand(tq.discover(model, batches, TASK), 4, 4))
    assert len(tq.finetune(model, batches, TASK, steps=2, channels_last=True).losses) == 2


def quantized_images() -> nn.Module:
    model = build(Images)
    return tq.quantize(model, image_batches(), TASK, by_hand(tq.discover(model, image_batches(), TASK), 3, 4))


def test_channels_last_changes_the_speed_and_not_the_training() -> None:
    start = quantized_images()
    plain, last = copy.deepcopy(start), copy.deepcopy(start)
    layouts = []

    class Layouts(tq.ClassificationTask):
        def outputs(self, model: nn.Module, batch: Any) -> Any:
            weight: Any = model.get_submodule("two").parametrizations["weight"].original  # type: ignore[index]
            layouts.append([t.is_contiguous(memory_format=torch.channels_last) for t in (batch[0], weight)])
            return super().outputs(model, batch)

    expected = tq.finetune(plain, image_batches(), TASK, steps=2).losses
    found = tq.finetune(last, image_batches(), Layouts(), steps=2, channels_last=True).losses

    assert layouts == [[True, True]] * 2
    assert found == pytest.approx(expected, rel=1e-3)
    for name, tensor in last.state_dict().items():
        assert tensor.is_contiguous(), name
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_is_the_same_training() -> None:
    """torch.compile changes the order of sums; hooks and parametrizations go through it."""
    start, teacher = quantized_images(), build(Images)
    options: dict[str, Any] = {"steps": 4, "teacher": teacher}
    plain, compiled = copy.deepcopy(start), copy.deepcopy(start)
    expected = tq.finetune(plain, image_batches(), TASK, **options).losses
    found = tq.finetune(compiled, image_batches(), TASK, compile=True, **options).losses
    assert found == pytest.approx(expected, rel=1e-3)
    assert compiled._compiled_call_impl is None
    assert teacher._compiled_call_impl is None
    for name, tensor in compiled.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_model_is_compiled_once() -> None:
    """One graph for the quantized model and one for the teacher, however many batches come."""
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    tq.finetune(quantized_images(), image_batches(), TASK, steps=6, teacher=build(Images), compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2


def test_losses_of_a_device_are_read_some_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU: nothing is lost, checkpoints hold all losses, and a bad one is found at the next reading."""
    expected = tq.finetune(quantized(), loader(), TASK, steps=13).losses
    monkeypatch.setattr(training, "_losses_at_a_time", lambda device: 5)
    path = tmp_path / "run.pt"
    found = tq.finetune(quantized(), loader(), TASK, steps=13, checkpoint=path, checkpoint_every=4).losses
    assert found == expected
    assert torch.load(path, weights_only=True)["losses"] == expected

    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(outputs, targets) * (math.nan if len(calls) == 3 else 1.0)

    with pytest.raises(DataError, match="the loss became nan in fine-tuning, at step 2;"):
        tq.finetune(quantized(), loader(), tq.ClassificationTask(loss), steps=9)
    assert len(calls) == 5


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    start = quantized()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(100 + len(runs))
        model = copy.deepcopy(start)
        runs.append((tq.finetune(model, loader(), TASK, steps=8, seed=seed).losses, state_of(model)))
    assert runs[0][0] == runs[1][0]
    assert_same_state(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_epochs_are_shuffled_differently() -> None:
    """Two epochs of a loader without dropout visit the samples in different orders."""
    seen: list[Tensor] = []

    class Noting(tq.ClassificationTask):
        def outputs(self, model: nn.Module, batch: Any) -> Any:
            seen.append(batch[0][:, 0].clone())
            return super().outputs(model, batch)

    tq.finetune(quantized(), loader(32), Noting(), steps=6)
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)


def test_the_global_random_state_is_untouched() -> None:
    model, batches = quantized(), loader()
    torch.manual_seed(77)
    before = torch.get_rng_state()
    tq.finetune(model, batches, TASK, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DataError):
        tq.finetune(model, [], TASK, steps=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_steps_change_nothing() -> None:
    model = quantized()
    before = state_of(model)
    result = tq.finetune(model, loader(), TASK, steps=0)
    assert (result.losses, result.steps_run) == ([], 0)
    assert_same_state(before, state_of(model))


# The teacher


def test_pure_distillation_follows_the_teacher_and_not_the_labels() -> None:
    teacher = build().eval()
    start = quantized(2, 4)
    losses = []
    for shift in (0, 1):
        batches = [(inputs, (targets + shift) % 3) for inputs, targets in one_batch()]
        model = copy.deepcopy(start)
        losses.append(
            tq.finetune(model, batches, TASK, steps=40, learning_rate=0.05, teacher=teacher, distillation=1.0).losses
        )
        inputs = one_batch()[0][0]
        with torch.no_grad():
            close = TASK.distillation_loss(model.eval()(inputs), teacher(inputs), batches[0])
            far = TASK.distillation_loss(start.eval()(inputs), teacher(inputs), batches[0])
        assert close < 0.7 * far
    assert losses[0] == losses[1]


def test_the_loss_is_the_stated_mixture() -> None:
    teacher = build().eval()
    start = quantized()
    start.get_submodule("drop").p = 0.0  # type: ignore[assignment]

    def first_loss(**options: Any) -> float:
        return tq.finetune(copy.deepcopy(start), one_batch(), TASK, steps=1, **options).losses[0]

    alone, pure = first_loss(), first_loss(teacher=teacher, distillation=1.0)
    assert first_loss(teacher=teacher, distillation=0.25) == pytest.approx(0.75 * alone + 0.25 * pure, rel=1e-6)
    assert first_loss(teacher=teacher, distillation=0.0) == alone
    inputs, targets = one_batch()[0]
    outputs = start.train()(inputs)
    assert alone == pytest.approx(nn.functional.cross_entropy(outputs, targets).item(), rel=1e-6)
    own, taught = outputs.softmax(1), teacher(inputs).softmax(1)
    divergence = (taught * (taught.log() - own.log())).sum(1).mean()
    assert pure == pytest.approx(divergence.item(), rel=1e-4)


def test_features_are_the_inputs_of_quantized_layers() -> None:
    """The extra term is the mean over layers of the relative squared distance of their inputs, before rounding."""
    teacher = build().eval()
    start = quantized(2, 3)
    start.get_submodule("drop").p = 0.0  # type: ignore[assignment]
    options: dict[str, Any] = {"steps": 1, "teacher": teacher, "distillation": 0.0}
    plain = tq.finetune(copy.deepcopy(start), one_batch(), TASK, **options).losses[0]
    extra = tq.finetune(copy.deepcopy(start), one_batch(), TASK, feature_distillation=0.5, **options).losses[0] - plain

    def inputs_of(model: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles = [
            # Before any hook of a quantizer.
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: found.update({name: args[0].detach()}), prepend=True
            )
            for name in LAYERS
        ]
        model(one_batch()[0][0])
        for handle in handles:
            handle.remove()
        return found

    own, taught = inputs_of(start.train()), inputs_of(teacher)
    terms = [float(((own[n] - taught[n]) ** 2).sum() / (taught[n] ** 2).sum()) for n in LAYERS]
    assert terms[0] == 0
    assert min(terms[1:]) > 0
    assert extra == pytest.approx(0.5 * sum(terms) / 4, rel=1e-4)


def test_hooks_on_features_are_gone_afterwards() -> None:
    model, teacher = quantized(), build()
    before = [len(module._forward_pre_hooks) for net in (model, teacher) for module in net.modules()]
    tq.finetune(model, loader(), TASK, steps=2, teacher=teacher, feature_distillation=1.0)
    with pytest.raises(Interrupted):
        tq.finetune(model, Failing(loader(), 1), TASK, steps=3, teacher=teacher, feature_distillation=1.0)
    assert [len(module._forward_pre_hooks) for net in (model, teacher) for module in net.modules()] == before


@pytest.mark.parametrize("mode", [True, False])
def test_the_teacher_stays_as_it_was(mode: bool) -> None:
    """It teaches in evaluation mode, so that neither its dropout nor its BatchNorm moves."""
    teacher = build().train(mode)
    before = state_of(teacher)
    tq.finetune(quantized(), loader(), TASK, steps=4, teacher=teacher)
    assert_same_state(before, state_of(teacher))
    assert teacher.training == mode
    assert teacher.get_submodule("drop").training == mode
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", ["distillation", "feature_distillation"])
def test_distillation_without_a_teacher_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} is 0.25, which needs a teacher; pass teacher="):
        tq.finetune(quantized(), loader(), TASK, steps=1, **{name: 0.25})
    with pytest.raises(SettingsError, match=rf"^{name} is 0.25, which needs a teacher"):
        tq.finetune(quantized(), loader(), TASK, tq.FinetuneSettings(**{name: 0.25}))  # type: ignore[arg-type]
    assert len(tq.finetune(quantized(), loader(), TASK, steps=1, **{name: 0.0}).losses) == 1


def test_the_default_share_of_distillation_is_refused_only_where_it_was_asked_for() -> None:
    with pytest.raises(SettingsError, match=r"^distillation is 0\.5, which needs a teacher"):
        tq.finetune(quantized(), loader(), TASK, steps=1, distillation=0.5)
    assert len(tq.finetune(quantized(), loader(), TASK, tq.FinetuneSettings(steps=1)).losses) == 1


def test_features_need_a_teacher_with_the_same_layer_names() -> None:
    class Renamed(nn.Module):
        """Net with two of its layers under other names."""

        def __init__(self) -> None:
            super().__init__()
            net = Net()
            self.one, self.norm, self.second, self.third, self.four = net.one, net.norm, net.two, net.three, net.four

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.one(x)).relu()
            return torch.as_tensor(self.four(self.third(x + self.second(x).relu()).relu()))

    model, teacher = quantized(), build(Renamed)
    with pytest.raises(ModelError, match=r"the teacher has no two, three; pass a teacher with"):
        tq.finetune(model, loader(), TASK, steps=1, teacher=teacher, feature_distillation=0.5)
    assert len(tq.finetune(model, loader(), TASK, steps=1, teacher=teacher).losses) == 1


class Positions(nn.Module):
    """Logits at every position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 8, 1)
        self.two = nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.two(self.one(x).relu()))


def test_a_teacher_weighs_the_same_at_any_number_of_positions() -> None:
    """The same sequence repeated: loss and distance are means over positions, and neither changes."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(4, 2, 8, generator=generator), torch.randint(0, 3, (4, 8), generator=generator)
    teacher = build(Positions)
    losses = []
    for copies in (1, 64):
        batches = [(inputs.repeat(1, 1, copies), targets.repeat(1, copies))]
        points = tq.discover(teacher, batches, TASK)
        model = tq.quantize(teacher, batches, TASK, by_hand(points, 2, 0))
        losses.append(tq.finetune(model, batches, TASK, steps=1, teacher=teacher, distillation=0.5).losses[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# Interruptions


class Interrupted(Exception):
    """The power went."""


class Failing:
    """A loader that breaks off after a number of batches, counted over all epochs."""

    def __init__(self, batches: DataLoader[Any], after: int) -> None:
        self._batches = batches
        self._left = after

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if self._left == 0:
                raise Interrupted
            self._left -= 1
            yield batch


RESUMES = [
    pytest.param({}, 7, id="first epoch"),
    pytest.param({}, 12, id="at a checkpoint"),
    pytest.param({}, 19, id="fourth epoch"),
    pytest.param({"optimizer": "adamw"}, 10, id="adamw"),
    pytest.param({"batchnorm": "freeze", "scales": "fixed"}, 10, id="frozen"),
    pytest.param({"distillation": 0.3, "teacher": True}, 10, id="teacher"),
    pytest.param({"feature_distillation": 0.3, "teacher": True}, 10, id="features"),
    pytest.param({"ema": 0.9}, 10, id="averaged"),
    pytest.param({"ema": 0.9, "batchnorm": "reestimate"}, 13, id="averaged, reestimated"),
    pytest.param({"channels_last": True}, 10, id="channels last"),
]


@pytest.mark.parametrize(("options", "after"), RESUMES)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh model", "same model"])
def test_an_interrupted_run_ends_with_the_same_bits(
    options: dict[str, Any], after: int, fresh: bool, tmp_path: Path
) -> None:
    start = quantized()
    options = {"steps": 20, "seed": 3, "learning_rate": 0.03, "checkpoint_every": 4, **options}
    if options.get("teacher"):
        options["teacher"] = build()
    undisturbed = copy.deepcopy(start)
    whole = tq.finetune(undisturbed, loader(), TASK, checkpoint=tmp_path / "whole.pt", **options)

    model = copy.deepcopy(start)
    with pytest.raises(Interrupted):
        tq.finetune(model, Failing(loader(), after), TASK, checkpoint=tmp_path / "run.pt", **options)
    if fresh:
        model = copy.deepcopy(start)
    torch.manual_seed(999)
    resumed = tq.finetune(model, loader(), TASK, checkpoint=tmp_path / "run.pt", **options)

    assert 0 < resumed.steps_run < 20
    assert resumed.steps_run == 20 - after // 4 * 4
    assert resumed.losses == whole.losses
    assert_same_state(state_of(model), state_of(undisturbed))


def test_several_interruptions_in_a_row(tmp_path: Path) -> None:
    start = quantized()
    options: dict[str, Any] = {"steps": 18, "checkpoint_every": 3}
    undisturbed = copy.deepcopy(start)
    whole = tq.finetune(undisturbed, loader(), TASK, **options)

    model = copy.deepcopy(start)
    for after in (5, 8, 14):
        with pytest.raises(Interrupted):
            tq.finetune(model, Failing(loader(), after), TASK, checkpoint=tmp_path / "run.pt", **options)
    resumed = tq.finetune(model, loader(), TASK, checkpoint=tmp_path / "run.pt", **options)

    assert resumed.losses == whole.losses
    assert_same_state(state_of(model), state_of(undisturbed))


def test_checkpoints_do_not_change_the_run(tmp_path: Path) -> None:
    start = quantized()
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    plain = tq.finetune(first, loader(), TASK, steps=7)
    saved = tq.finetune(second, loader(), TASK, steps=7, checkpoint=tmp_path / "run.pt", checkpoint_every=2)
    assert plain.losses == saved.losses
    assert_same_state(state_of(first), state_of(second))
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    start = quantized()
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    done = tq.finetune(first, loader(), TASK, steps=6, checkpoint=tmp_path / "run.pt", checkpoint_every=4)
    again = tq.finetune(second, loader(), TASK, steps=6, checkpoint=tmp_path / "run.pt", checkpoint_every=4)
    assert again.losses == done.losses
    assert again.steps_run == 0
    assert_same_state(state_of(first), state_of(second))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch, tracequant as tq
from safetensors.torch import save_file
from test_finetune import TASK, loader, quantized

class Killing:
    def __iter__(self):
        for batch in loader():
            if {after} == self.count:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            yield batch
    count = 0

model = quantized()
tq.finetune(model, Killing(), TASK, steps=20, seed=3, checkpoint={path!r}, checkpoint_every=4)
save_file(dict(model.state_dict()), {path!r} + ".state")
"""


def test_a_killed_process_is_gone_on_with_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, and a fresh process that knows only the checkpoint."""

    def run(name: str, after: int) -> int:
        script = KILLED.format(tests=str(Path(__file__).parent), after=after, path=str(tmp_path / name))
        return subprocess.run([sys.executable, "-c", script], check=False).returncode

    assert run("whole", -1) == 0
    assert run("run", 11) == -signal.SIGKILL
    assert not (tmp_path / "run.state").exists()
    assert len(torch.load(tmp_path / "run", weights_only=True)["losses"]) == 8
    assert run("run", -1) == 0
    assert_same_state(load_file(tmp_path / "run.state"), load_file(tmp_path / "whole.state"))


CHANGES = {
    "steps": 9,
    "learning_rate": 0.02,
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "scales": "fixed",
    "batchnorm": "freeze",
    "feature_distillation": 0.5,
    "distillation": 0.25,
    "ema": 0.9,
    "channels_last": True,
    "seed": 1,
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_checkpoint_of_other_settings_is_refused(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "checkpoint": tmp_path / "run.pt", "teacher": build()}
    tq.finetune(quantized(), loader(), TASK, **options)
    model = quantized()
    before = state_of(model)
    with pytest.raises(ArtifactError, match=rf"other settings \({name}\); delete it"):
        tq.finetune(model, loader(), TASK, **options | {name: CHANGES[name]})
    assert_same_state(before, state_of(model))


def test_a_checkpoint_with_or_without_a_teacher_is_another_setting(tmp_path: Path) -> None:
    tq.finetune(quantized(), loader(), TASK, steps=4, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ArtifactError, match="teacher"):
        tq.finetune(quantized(), loader(), TASK, steps=4, checkpoint=tmp_path / "run.pt", teacher=build())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    tq.finetune(quantized(kind=TiedNet), loader(), TASK, steps=4, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ArtifactError, match=r"other settings \(bits\)|of another model or plan"):
        tq.finetune(quantized(), loader(), TASK, steps=4, checkpoint=tmp_path / "run.pt")


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    """Bits are not in the state dict: going on from 8-bit scales with 2 bits would look like a resume and be none."""
    tq.finetune(quantized(8), loader(), TASK, steps=4, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ArtifactError, match=r"of another model or plan|other settings"):
        tq.finetune(quantized(2), loader(), TASK, steps=4, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    tq.finetune(quantized(), loader(), TASK, steps=4, checkpoint=path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ArtifactError, match=r"run\.pt cannot be read .*delete it"):
        tq.finetune(quantized(), loader(), TASK, steps=4, checkpoint=path)


FOREIGN: dict[str, Any] = {
    "a list": [1, 2, 3],
    "a number": 5,
    "a state dict": {"weight": torch.ones(3)},
    "settings alone": {"settings": {}},
    "settings a number": {"settings": 3},
}


@pytest.mark.parametrize("kind", list(FOREIGN))
def test_other_files_are_not_taken_for_checkpoints(kind: str, tmp_path: Path) -> None:
    torch.save(FOREIGN[kind], tmp_path / "run.pt")
    with pytest.raises(ArtifactError, match="delete it"):
        tq.finetune(quantized(), loader(), TASK, steps=4, checkpoint=tmp_path / "run.pt")


def test_a_checkpoint_from_a_cpu_is_resumed_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is simulated. Its random numbers start anew, the rest of the state is restored."""
    path = tmp_path / "run.pt"
    options: dict[str, Any] = {"steps": 6, "checkpoint": path, "checkpoint_every": 4}
    start = quantized()
    whole = tq.finetune(copy.deepcopy(start), loader(), TASK, **options | {"checkpoint": None}).losses
    with pytest.raises(Interrupted):
        tq.finetune(copy.deepcopy(start), Failing(loader(), 5), TASK, **options)
    monkeypatch.setattr(checkpoint, "model_device", lambda model: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    with pytest.warns(UserWarning, match=r"written on a CPU .* the GPU's random numbers start anew"):
        resumed = tq.finetune(start, loader(), TASK, **options)
    assert resumed.steps_run == 2
    assert resumed.losses == whole  # the dropout of the simulated GPU draws from the CPU


@pytest.mark.parametrize("missing", ["model", "optimizer", "stream", "rng", "losses"])
def test_a_checkpoint_that_lacks_a_part_is_refused(missing: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    tq.finetune(quantized(), loader(), TASK, steps=4, checkpoint=path)
    state = torch.load(path, weights_only=True)
    del state[missing]
    torch.save(state, path)
    with pytest.raises(ArtifactError, match="delete it"):
        tq.finetune(quantized(), loader(), TASK, steps=4, checkpoint=path)


# What cannot be trained


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ModelError, match="not quantized"):
        tq.finetune(build(), loader(), TASK, steps=2)


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(DataError, match="no batches"):
        tq.finetune(quantized(), [], TASK, steps=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_before_it_does_harm(value: float) -> None:
    """The third loss is bad: the step is not taken and the weights stay finite."""
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(outputs, targets) * (value if len(calls) == 3 else 1.0)

    model = quantized()
    with pytest.raises(DataError, match=r"the loss became (nan|inf) in fine-tuning"):
        tq.finetune(model, loader(), tq.ClassificationTask(loss), steps=9)
    assert len(calls) == 3
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_that_are_not_finite_are_named() -> None:
    batches = [*one_batch() * 2, (torch.full((4, 6), math.nan), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(DataError, match=r"batch 2.* NaN or infinite"):
        tq.finetune(quantized(), batches, TASK, steps=5)


def test_targets_out_of_range_are_named() -> None:
    with pytest.raises(DataError, match="target 5 is out of range"):
        tq.finetune(quantized(), [(torch.ones(4, 6), torch.full((4,), 5))], TASK, steps=2)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", -1, "an integer >= 0"),
        ("steps", 2.5, "an integer >= 0"),
        ("learning_rate", -0.1, "a number >= 0"),
        ("distillation", 1.5, "a number >= 0 and <= 1"),
        ("distillation", -0.1, "a number >= 0 and <= 1"),
        ("feature_distillation", -1.0, "a number >= 0"),
        ("ema", 1.0, "a number >= 0 and < 1"),
        ("optimizer", "lion", "'sgd' or 'adamw'"),
        ("scales", "pact", "'lsq' or 'fixed'"),
        ("batchnorm", "frozen", "'train', 'freeze' or 'reestimate'"),
    ],
)
def test_values_that_make_no_sense_are_refused(name: str, value: object, expected: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} must be {expected}, got {value!r}") as error:
        tq.finetune(quantized(), loader(), TASK, **{name: value})  # type: ignore[arg-type]
    assert error.value.argument == name


def test_an_argument_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^step is not an argument here; .*; did you mean 'steps'\?$"):
        tq.finetune(quantized(), loader(), TASK, step=3)
    with pytest.raises(SettingsError, match=r"^lr is not an argument here; .*; did you mean 'learning_rate'\?$"):
        tq.finetune(quantized(), loader(), TASK, lr=0.1)


def test_settings_and_fields_by_keyword_are_the_same_call() -> None:
    recipe = tq.FinetuneSettings(steps=4, learning_rate=0.05, optimizer="adamw")
    losses = [
        tq.finetune(quantized(), loader(), TASK, recipe).losses,
        tq.finetune(quantized(), loader(), TASK, steps=4, learning_rate=0.05, optimizer="adamw").losses,
        tq.finetune(quantized(), loader(), TASK, tq.FinetuneSettings(optimizer="adamw"), steps=4, learning_rate=0.05)
        .losses,
    ]  # fmt: skip
    assert losses[0] == losses[1] == losses[2]


def test_a_callback_hears_of_every_step_before_it() -> None:
    heard: list[int] = []
    model = quantized()
    before = model.get_submodule("four").bias.detach().clone()  # type: ignore[union-attr, operator]

    def on_step(step: int) -> None:
        heard.append(step)
        assert torch.equal(model.get_submodule("four").bias.detach(), before) == (step == 0)  # type: ignore[union-attr, operator, arg-type]

    tq.finetune(model, loader(), TASK, steps=3, on_step=on_step)
    assert heard == [0, 1, 2]


def test_a_one_shot_iterator_serves_for_all_epochs() -> None:
    """96 samples in batches of 16: more steps than the iterator has batches."""
    batches = list(DataLoader(dataset(), batch_size=16))
    first, second = quantized(), quantized()
    once = tq.finetune(first, iter(batches), TASK, steps=10)
    again = tq.finetune(second, batches, TASK, steps=10)
    assert once.losses == again.losses
