"""The benchmarks' variants of fine-tuning: that they do what the paper's ablations ask for."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracequant as tq
from test_finetune import (
    LAYERS,
    TASK,
    Failing,
    Images,
    Interrupted,
    TiedNet,
    assert_same_state,
    build,
    by_hand,
    image_batches,
    loader,
    one_batch,
    quantized,
    quantized_images,
    quantizers_of,
    state_of,
)
from tracequant.quantization.grid import choose_grid
from tracequant.quantization.quantizer import activation_quantizers, weight_quantizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from ablations import (
    ClippingOnly,
    ProgressiveOrder,
    SmoothedTask,
    clipping_only,
    quantized_weights,
)
from cifar10_resnet20 import OURS, RECIPES, variant

OMEGA = {"one": 4.0, "two": 1.0, "three": 3.0, "four": 2.0}
FALLING = ["one", "three", "four", "two"]


class Watching(tq.ClassificationTask):
    """Notes in every training step which weights and activations are on a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[set[str]] = []
        self.activations: list[bool] = []

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """The logits, with notes taken."""
        rounded: dict[int, bool] = {}

        def note(quantizer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            rounded[id(quantizer)] = not torch.equal(args[0], output)

        handles = [quantizer.register_forward_hook(note) for quantizer in quantizers_of(model)]
        outputs = super().outputs(model, batch)
        for handle in handles:
            handle.remove()
        self.weights.append({site[0] for site, q in weight_quantizers(model).items() if rounded[id(q)]})
        (activations,) = {rounded[id(q)] for q in activation_quantizers(model).values()}
        self.activations.append(activations)
        return outputs


def layers_on(step: int, names: list[str], stages: int) -> set[str]:
    """The layers that are quantized in one of eight steps."""
    return set(names[: 4 * (step * stages // 8 + 1) // stages])


@pytest.mark.parametrize("order", ["sensitive_first", "sensitive_last"])
@pytest.mark.parametrize("stages", [1, 2, 4, 9])
def test_weights_are_switched_on_in_stages(order: Any, stages: int) -> None:
    """Eight steps: in stage s of n, from step 8 s / n on, the first 4 (s + 1) / n layers; activations with the last."""
    watching, model = Watching(), quantized()
    names = FALLING if order == "sensitive_first" else FALLING[::-1]
    with ProgressiveOrder(model, OMEGA, 8, order, stages) as switching:
        tq.finetune(model, loader(), watching, steps=8, on_step=switching)
    groups = min(stages, 4)
    assert watching.weights == [layers_on(step, names, groups) for step in range(8)]
    assert watching.activations == [step * groups // 8 == groups - 1 for step in range(8)]
    assert not any(quantizer._forward_hooks for quantizer in quantizers_of(model))


def test_a_weight_that_was_float_gets_a_grid_for_what_it_has_become() -> None:
    model = quantized()
    weight = next(weight for weight in quantized_weights(model) if weight.layer == "two")
    before = weight.quantizer.scale.detach().clone()
    with ProgressiveOrder(model, OMEGA, 8, "sensitive_first", 2) as switching:

        def on_step(step: int) -> None:
            switching(step)
            if step == 4:
                assert torch.equal(weight.quantizer.scale, choose_grid(weight.original, 3, channel_axis=0).scale)
                assert not torch.equal(weight.quantizer.scale, before)

        tq.finetune(model, loader(), TASK, steps=8, learning_rate=0.1, on_step=on_step)


def test_tied_weights_and_single_layers_have_one_name() -> None:
    assert [weight.layer for weight in quantized_weights(quantized(kind=TiedNet))] == ["into", "middle"]
    layer = nn.Linear(6, 3)
    plan = by_hand(tq.discover(layer, one_batch(), TASK), 3, 4)
    (alone,) = quantized_weights(tq.quantize(layer, one_batch(), TASK, plan))
    assert alone.layer == "weight"
    watching, model = Watching(), quantized(kind=TiedNet)
    with ProgressiveOrder(model, {"into": 2.0, "middle": 1.0}, 4, "sensitive_first", 2) as switching:
        tq.finetune(model, loader(), watching, steps=4, on_step=switching)
    assert watching.weights == [{"into", "out"}] * 2 + [{"into", "out", "middle"}] * 2


def test_every_layer_needs_its_omega() -> None:
    with pytest.raises(ValueError, match="omega lacks the layers two, three, four"):
        ProgressiveOrder(quantized(), {"one": 1.0}, 8)


@pytest.mark.parametrize(("stages", "after"), [(3, 10), (4, 17), (2, 11)])
def test_an_interrupted_run_in_stages_ends_with_the_same_bits(stages: int, after: int, tmp_path: Path) -> None:
    """With two stages and a checkpoint every 5 of 20 steps, one is written exactly where the second stage begins."""
    start = quantized()
    options: dict[str, Any] = {"steps": 20, "seed": 3, "learning_rate": 0.03, "checkpoint_every": 5}

    def train(batches: Any, path: Path) -> tuple[list[float], nn.Module]:
        model = copy.deepcopy(start)
        with ProgressiveOrder(model, OMEGA, 20, "sensitive_first", stages) as switching:
            result = tq.finetune(model, batches, TASK, checkpoint=path, on_step=switching, **options)
        return result.losses, model

    losses, whole = train(loader(), tmp_path / "whole.pt")
    with pytest.raises(Interrupted):
        train(Failing(loader(), after), tmp_path / "run.pt")
    resumed_losses, resumed = train(loader(), tmp_path / "run.pt")
    assert resumed_losses == losses
    assert_same_state(state_of(resumed), state_of(whole))


def test_label_smoothing_is_torchs() -> None:
    start = quantized()
    start.get_submodule("drop").p = 0.0  # type: ignore[assignment]
    inputs, targets = one_batch()[0]
    expected = nn.functional.cross_entropy(start.train()(inputs), targets, label_smoothing=0.2).item()
    task = SmoothedTask(TASK, 0.2)
    assert tq.finetune(copy.deepcopy(start), one_batch(), task, steps=1).losses[0] == pytest.approx(expected, rel=1e-6)
    teacher = build()
    alone = tq.finetune(copy.deepcopy(start), one_batch(), TASK, steps=1, teacher=teacher, distillation=1.0).losses
    assert tq.finetune(start, one_batch(), task, steps=1, teacher=teacher, distillation=1.0).losses == alone


def test_clipping_learns_from_clipped_values_alone() -> None:
    """Choi et al. 2018, Eq. 4: the output's derivative with respect to the threshold is 1 above it and 0 below."""
    values = torch.tensor([0.3, 1.1, 2.9, 3.0, 3.5, 8.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    scale = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    rounded: Tensor = ClippingOnly.apply(values, scale, torch.zeros(1, dtype=torch.float64), 2, 0.5)  # type: ignore
    (rounded * weights).sum().backward()
    # The threshold is 3 scales: 3 * (5 + 6), times the gradient scale.
    assert float(scale.grad) == pytest.approx(0.5 * 33)  # type: ignore[arg-type]
    assert values.grad is not None
    assert values.grad.tolist() == [1, 2, 3, 4, 0, 0]


def test_clipping_changes_how_scales_learn_and_nothing_else() -> None:
    start = quantized(3, 3)
    by_steps, by_clipping = copy.deepcopy(start), copy.deepcopy(start)
    first = tq.finetune(by_steps, loader(), TASK, steps=3).losses
    with clipping_only(by_clipping):
        losses = tq.finetune(by_clipping, loader(), TASK, steps=3).losses
    assert losses[0] == first[0]
    for name in LAYERS:
        scales = [weight_quantizers(model)[name, "weight"].scale.detach() for model in (by_steps, by_clipping, start)]
        assert not torch.allclose(scales[0], scales[1], rtol=1e-5), name
    assert not any(quantizer._forward_hooks for quantizer in quantizers_of(by_clipping))


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_of_the_benchmark_trains(recipe: str) -> None:
    model = quantized()
    with variant(model, TASK, OMEGA, 3, RECIPES[recipe]) as (task, options):
        losses = tq.finetune(model, loader(), task, steps=3, teacher=build(), **OURS | options).losses
    assert len(losses) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stages_and_clipping_go_through_torch_compile() -> None:
    start = quantized_images()
    losses = []
    for compiled in (False, True):
        model = copy.deepcopy(start)
        omega = {"one": 1.0, "two": 3.0, "head": 2.0}
        with clipping_only(model), ProgressiveOrder(model, omega, 4, stages=2) as switching:
            options: dict[str, Any] = {"steps": 4, "teacher": build(Images), "compile": compiled}
            losses.append(tq.finetune(model, image_batches(), TASK, on_step=switching, **options).losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
