"""The self-check against rounding by hand, and what it remembers."""

import copy
import dataclasses
import math

import pytest
import scipy.stats
import torch
from safetensors.torch import save_file
from torch import nn

from models import conv_net, images, residual_net, snapshot
from test_sensitivity import made_up
from tracequant import (
    Check,
    ClassificationTask,
    ModelError,
    WeightGrid,
    check_criteria,
    discover,
    measure_perturbation,
)
from tracequant.core.evaluations import spearman
from tracequant.measure.check import _load
from tracequant.model.hooks import weight_parameter
from tracequant.quantization.grid import choose_weight_grid

TASK = ClassificationTask()
NEAREST = WeightGrid(rounding="nearest")
BITS = (2, 4)


def rounded(model: nn.Module, bits: dict[str, int]) -> nn.Module:
    """A copy with the named layers rounded."""
    changed = copy.deepcopy(model)
    for name, num_bits in bits.items():
        weight = changed.get_parameter(f"{name}.weight")
        grid = choose_weight_grid(weight.detach(), num_bits, 0, NEAREST)
        weight.data.copy_(grid.round(weight.detach()))
    return changed


def loss(model: nn.Module, batches: list) -> float:
    return TASK.evaluate(model, batches).loss


def test_spearman_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 10, 50):
        a = torch.randint(0, 6, (size,), generator=generator).tolist()
        b = [x + torch.randint(0, 4, (1,), generator=generator).item() for x in a]
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert math.isnan(spearman([1.0], [2.0]))
    assert math.isnan(spearman([1.0, 1.0], [2.0, 3.0]))


def test_losses_scores_and_responses_by_hand() -> None:
    """Two batches of unequal size; the response form is the loss at the outputs plus their single changes."""
    batches = images((4, 2))
    model = conv_net()
    points = discover(model, batches, TASK)
    expansion = measure_perturbation(model, batches, TASK, points, weight_bits=BITS, weight_grid=NEAREST)
    before = snapshot(model)
    found = check_criteria(
        model,
        batches,
        TASK,
        made_up(points),
        weight_bits=BITS,
        weight_grid=NEAREST,
        perturbation=expansion,
        plans=3,
    )
    assert snapshot(model) == before
    model.eval()
    base = loss(model, batches)
    assert found.samples == 6
    assert found.float_loss == pytest.approx(base)
    assert [(row.layer, row.num_bits) for row in found.layers] == [
        (n, b) for n in ("conv1", "conv2", "fc") for b in BITS
    ]
    alone = {}
    for row in found.layers:
        alone[row.layer, row.num_bits] = loss(rounded(model, {row.layer: row.num_bits}), batches) - base
        assert row.loss_change == pytest.approx(alone[row.layer, row.num_bits], abs=1e-12)
        assert row.scores["first+quadratic"] == pytest.approx(expansion.omega(True)[row.layer][row.num_bits])
    assert len({row.loss_change for row in found.layers}) == 6
    for plan in found.plans:
        assert plan.offered == BITS
        assert plan.loss_change == pytest.approx(loss(rounded(model, plan.weight_bits), batches) - base, abs=1e-12)
        assert plan.scores["measured"] == pytest.approx(sum(alone[option] for option in plan.weight_bits.items()))
        total = 0.0
        for x, y in batches:
            z = model(x).detach()
            moved = sum(rounded(model, dict([option]))(x).detach() - z for option in plan.weight_bits.items())
            total += len(y) * float(torch.nn.functional.cross_entropy(z + moved, y))
        assert plan.scores["response"] == pytest.approx(total / 6 - base, abs=1e-10)
        assert plan.scores["response"] != pytest.approx(plan.scores["measured"], rel=1e-3)


def test_correlations_are_of_their_groups_and_the_best_is_trusted() -> None:
    batches = images((6,))
    model = residual_net()
    points = discover(model, batches, TASK)
    expansion = measure_perturbation(model, batches, TASK, points, weight_bits=(2, 3, 4))
    found = check_criteria(
        model,
        batches,
        TASK,
        made_up(points),
        weight_bits=(2, 3, 4),
        perturbation=expansion,
        plans=6,
        offered=[(2, 3), (3, 4)],
    )
    assert found.groups == ["2 bits", "3 bits", "4 bits", "all bits", "plans of 2, 3 bits", "plans of 3, 4 bits"]
    two = [row for row in found.layers if row.num_bits == 2]
    want = scipy.stats.spearmanr([row.scores["l2"] for row in two], [row.loss_change for row in two]).statistic
    assert found.correlations["l2"]["2 bits"] == pytest.approx(want)
    some = [row for row in found.plans if row.offered == (3, 4)]
    assert len(some) == 6
    want = scipy.stats.spearmanr([row.scores["quadratic"] for row in some], [row.loss_change for row in some]).statistic
    assert found.correlations["quadratic"]["plans of 3, 4 bits"] == pytest.approx(want)
    assert found.correlations["measured"].keys() == {"plans of 2, 3 bits", "plans of 3, 4 bits"}

    def worth(metric: str) -> float:
        return sum(found.correlations[metric][f"plans of {bits} bits"] for bits in ("2, 3", "3, 4"))

    solvable = [metric for metric in found.correlations if metric not in ("measured", "response")]
    assert found.trusted in solvable
    assert worth(found.trusted) == max(worth(metric) for metric in solvable)
    none = check_criteria(model, batches, TASK, made_up(points), weight_bits=(2, 3), plans=0)
    assert none.plans == ()
    assert none.trusted == max(("trace", "l2"), key=lambda metric: none.correlations[metric]["all bits"])


def test_extra_scores_rank_plans_and_are_never_trusted() -> None:
    batches, model = images((6,)), residual_net()
    points = discover(model, batches, TASK)
    plain = check_criteria(model, batches, TASK, made_up(points), weight_bits=BITS, plans=6)
    changes = {tuple(plan.weight_bits.items()): plan.loss_change for plan in plain.plans}
    found = check_criteria(
        model,
        batches,
        TASK,
        made_up(points),
        weight_bits=BITS,
        plans=6,
        extra_scores={"oracle": lambda b: changes[tuple(b.items())]},
    )
    assert found.correlations["oracle"] == {"plans of 2, 4 bits": pytest.approx(1.0)}
    assert found.trusted == plain.trusted
    assert all("oracle" not in row.scores for row in found.layers)


def test_tied_layers_have_the_same_bits_in_random_plans() -> None:
    batches = images((2,))
    model = residual_net()
    points = dataclasses.replace(discover(model, batches, TASK), ties=(("stem", "fc"),))
    found = check_criteria(model, batches, TASK, made_up(points), weight_bits=(2, 3, 4, 8), plans=8)
    assert all(plan.weight_bits["stem"] == plan.weight_bits["fc"] for plan in found.plans)
    assert len({tuple(plan.weight_bits.values()) for plan in found.plans}) == 8


class Counting(ClassificationTask):
    """Counts forward passes."""

    passes = 0

    def outputs(self, model, batch):
        Counting.passes += 1
        return super().outputs(model, batch)


def test_nothing_is_measured_twice(tmp_path) -> None:
    batches, model = images((4,)), conv_net()
    points = discover(model, batches, TASK)
    first = check_criteria(model, batches, Counting(), made_up(points), weight_bits=BITS, plans=4, cache=tmp_path)
    Counting.passes = 0
    again = check_criteria(model, batches, Counting(), made_up(points), weight_bits=BITS, plans=4, cache=tmp_path)
    assert again == first
    assert Counting.passes == 1  # the loss by which the data are known again
    more = check_criteria(model, batches, Counting(), made_up(points), weight_bits=BITS, plans=6, cache=tmp_path)
    assert more.plans[:4] == first.plans
    assert Counting.passes <= 4
    other = [(x + 0.1, y) for x, y in batches]
    assert (
        check_criteria(model, other, TASK, made_up(points), weight_bits=BITS, plans=4, cache=tmp_path).layers
        != first.layers
    )
    first.save(tmp_path / "check.json")
    assert Check.load(tmp_path / "check.json") == first


def test_what_was_kept_comes_back_on_the_models_device(tmp_path) -> None:
    save_file({"000000": torch.ones(2, 3)}, tmp_path / "x.safetensors", {"losses": "[0.5]"})
    losses, (outputs,) = _load(tmp_path / "x.safetensors", torch.device("meta"))
    assert losses == [0.5]
    assert outputs.device.type == "meta"


def test_bits_that_were_not_measured_are_refused() -> None:
    model = conv_net()
    with pytest.raises(ModelError, match=r"plans of \[2, 8\] bits were asked for, layers are measured at \[2, 4\]"):
        check_criteria(
            model, images(), TASK, made_up(discover(model, images(), TASK)), weight_bits=BITS, offered=[(2, 8)]
        )


def test_weights_come_back_where_the_loss_fails() -> None:
    class Failing(ClassificationTask):
        calls = 0

        def loss(self, outputs, batch):
            Failing.calls += 1
            if Failing.calls > 3:
                raise KeyboardInterrupt
            return super().loss(outputs, batch)

    model = conv_net()
    points = discover(model, images(), TASK)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        check_criteria(model, images(), Failing(), made_up(points), weight_bits=BITS)
    assert snapshot(model) == before
    assert weight_parameter(model, points.layers[0]).requires_grad
