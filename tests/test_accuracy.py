"""Solving by accuracy: the search, what it remembers, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import tiny_task
import tracequant as tq
from tracequant.measure import accuracy
from tracequant.measure.accuracy import NEIGHBOURS, _smallest
from tracequant.report.frontiers import evaluated_plans


@pytest.fixture(scope="module")
def case() -> tuple[tq.TaskSetup, tq.Sensitivity]:
    setup = tiny_task.build()
    curvature = tq.estimate_curvature(setup.model, setup.calibration, setup.task, estimator="gauss_newton")
    table = tq.measure_sensitivity(
        setup.model, setup.calibration, setup.task, curvature, weight_bits=(1, 2, 3, 8), activation_bits=(4,)
    )
    return setup, table


def search(case: tuple[tq.TaskSetup, tq.Sensitivity], **options: object) -> tq.AccuracySearch:
    setup, table = case
    return tq.solve_by_accuracy(
        setup.model, setup.calibration, setup.task, table, evaluation=setup.evaluation, **options
    )


def test_a_metric_that_the_first_batch_has_not(case: tuple[tq.TaskSetup, tq.Sensitivity]) -> None:
    """As mAP has no value on images without boxes."""

    class Whole(type(case[0].task)):  # type: ignore[misc]
        def evaluate(self, model: object, batches: object, progress: bool = False) -> tq.Evaluation:
            if len(list(batches)) < 2:  # type: ignore[call-overload]
                raise tq.DataError("no metric here")
            return tq.Evaluation("mAP %", 50.0, 1.0, 2)

    setup = case[0]
    batch = next(iter(setup.evaluation))
    found = accuracy.Evaluator(setup.model, setup.calibration, Whole(), evaluation=[batch, batch]).results
    assert (found.float_metric, found.metric_name) == (50.0, "mAP %")


@pytest.mark.parametrize("threshold", [1_000, 1_003, 20_000, 54_321, 100_999])
def test_bisection_finds_the_edge_to_its_resolution(threshold: int) -> None:
    sizes = np.arange(1_000, 101_000)
    asked: list[int] = []

    def passes(index: int) -> bool:
        asked.append(index)
        return bool(sizes[index] >= threshold)

    best = _smallest(sizes, passes)
    assert threshold <= sizes[best] <= threshold * 1.003
    assert len(asked) <= 30


def test_a_smaller_plan_behind_a_dip_is_found() -> None:
    """Between 40,000 and 40,600 nothing passes, from 39,300 on it does: the bisection stops above the gap."""
    sizes = np.arange(1_000, 101_000)

    def passes(index: int) -> bool:
        return bool(sizes[index] >= 40_600 or 39_300 <= sizes[index] < 40_000)

    best = sizes[_smallest(sizes, passes)]
    assert 39_300 <= best < 40_000
    below = [best * (1 - share) for share in NEIGHBOURS]
    assert all(size < 39_300 for size in below)


def test_one_plan_alone() -> None:
    assert _smallest(np.array([5]), lambda index: True) == 0


def test_the_plan_keeps_to_the_drop_and_is_what_was_evaluated(case) -> None:
    setup, _ = case
    found = search(case, max_accuracy_drop=2.0)
    assert found.found.metric >= found.float_metric - 2.0
    assert found.plan.weight_bits == found.found.weight_bits
    assert found.plan.activation_bits == found.found.activation_bits
    quantized = tq.quantize(setup.model, setup.calibration, setup.task, found.plan)
    measured = setup.task.evaluate(quantized, setup.evaluation)
    assert (measured.metric, measured.loss) == (found.found.metric, found.found.loss)
    smaller = [step for step in found.steps if step.size_bytes < found.plan.size_bytes]
    assert smaller
    assert all(step.metric < found.float_metric - 2.0 for step in smaller)
    assert "at most 2 points below the float model" in found.plan.budget
    assert "by evaluation" in found.plan.solver


def test_loss_alone_and_both_together(case) -> None:
    loose = search(case, max_loss_increase=0.3)
    assert loose.found.loss <= loose.float_loss + 0.3
    both = search(case, max_loss_increase=0.3, max_accuracy_drop=1.0)
    assert both.found.loss <= both.float_loss + 0.3
    assert both.found.metric >= both.float_metric - 1.0
    assert both.plan.size_bytes >= loose.plan.size_bytes


def test_rules_hold(case) -> None:
    found = search(case, max_accuracy_drop=30.0, fixed_bits={"0": 8}, min_bits={"6": 3})
    assert all(step.weight_bits["0"] == 8 and step.weight_bits["6"] >= 3 for step in found.steps)


def test_evaluations_are_kept_and_not_repeated(case, tmp_path, monkeypatch) -> None:
    setup, table = case
    cache = tmp_path / "evaluations.json"
    calls: list[tq.BitPlan] = []
    quantize = accuracy.quantize

    def counted(model, batches, task, plan, **options):
        calls.append(plan)
        return quantize(model, batches, task, plan, **options)

    monkeypatch.setattr(accuracy, "quantize", counted)
    first = search(case, max_accuracy_drop=2.0, cache=cache)
    saved = tq.Evaluations.load(cache)
    assert len(calls) == len(first.steps) == len(saved.plans)
    assert saved.float_metric == first.float_metric
    calls.clear()
    evaluated: list[tuple[object, int]] = []
    evaluate = type(setup.task).evaluate
    with monkeypatch.context() as patch:
        patch.setattr(
            type(setup.task),
            "evaluate",
            lambda self, model, batches, *rest: (
                evaluated.append((model, len(batches))),
                evaluate(self, model, batches, *rest),
            )[1],
        )
        assert search(case, max_accuracy_drop=2.0, cache=cache) == first
    assert not calls
    assert evaluated == [(setup.model, 1)]  # one batch, to see that metric and loss are still the same
    search(case, max_accuracy_drop=1.0, cache=cache)
    assert len(tq.Evaluations.load(cache).plans) == len(saved.plans) + len(calls)
    # Other data: nothing of it is believed.
    calls.clear()
    x, y = setup.evaluation[0]
    tq.solve_by_accuracy(
        setup.model,
        setup.calibration,
        setup.task,
        table,
        evaluation=[(x[:100], y[:100])],
        max_accuracy_drop=2.0,
        cache=cache,
    )
    assert calls
    assert tq.Evaluations.load(cache).samples == 100
    # Nor is anything of the same data under another metric of the same name.
    calls.clear()
    with monkeypatch.context() as patch:
        metric = type(setup.task).metric
        patch.setattr(type(setup.task), "metric", lambda self, *given: metric(self, *given) / 2)
        tq.solve_by_accuracy(
            setup.model,
            setup.calibration,
            setup.task,
            table,
            evaluation=[(x[:100], y[:100])],
            max_accuracy_drop=2.0,
            cache=cache,
        )
    assert calls


def test_evaluations_of_another_weight_grid_are_not_taken(case, tmp_path) -> None:
    """The same bits on another grid are another model; a file that does not name the grid is not believed either."""
    setup, table = case
    cache = tmp_path / "evaluations.json"
    plan = tq.uniform_plan(table, 2)
    other = dataclasses.replace(plan, weight_grid=tq.WeightGrid(per_channel=False, range="minmax"))

    def evaluated(plan: tq.BitPlan, cache: Path | None = cache) -> tq.EvaluatedPlan:
        return accuracy.Evaluator(
            setup.model, setup.calibration, setup.task, evaluation=setup.evaluation, cache=cache
        ).of(plan)

    first, second = evaluated(plan), evaluated(other)
    assert second == evaluated(other, None) != first
    assert evaluated(plan) == first
    assert len(tq.Evaluations.load(cache).plans) == 2
    document = json.loads(cache.read_text())
    document["plans"] = [dict(row, metric=0.0) for row in document["plans"][:1]]
    del document["plans"][0]["weight_grid"]
    cache.write_text(json.dumps(document))
    assert evaluated(plan) == first
    shown = evaluated_plans(table, tq.Evaluations.load(cache))
    assert [row for row, _ in shown] == [first]


def test_an_interrupted_search_goes_on(case, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "evaluations.json"
    quantize = accuracy.quantize
    calls = 0

    def power_cut(model, batches, task, plan, **options):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return quantize(model, batches, task, plan, **options)

    monkeypatch.setattr(accuracy, "quantize", power_cut)
    with pytest.raises(KeyboardInterrupt):
        search(case, max_accuracy_drop=2.0, cache=cache)
    assert len(tq.Evaluations.load(cache).plans) == 2
    resumed = search(case, max_accuracy_drop=2.0, cache=cache)
    assert calls == 1 + len(resumed.steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give max_accuracy_drop"),
        ({"max_accuracy_drop": -1.0}, "max_accuracy_drop must be a number >= 0"),
        ({"max_loss_increase": float("nan")}, "max_loss_increase must be a finite number"),
        ({"max_accuracy_drop": 1.0, "max_size_mib": 2.0}, "and max_size_mib too"),
        ({"max_accuracy_drop": 1.0, "solver": "pareto"}, "walks the exact frontier"),
        ({"max_accuracy_drop": 1.0, "criterion": "l2"}, "by criterion 'quadratic', the plan was asked for by 'l2'"),
        ({"max_accuracy_drop": 1.0, "colour": 3}, "colour is not an argument here"),
        ({"max_accuracy_drop": 0.0, "max_loss_increase": 0.0, "allowed_bits": {"*": (1,)}}, "even the largest plan"),
    ],
)
def test_what_is_refused(case, options, message) -> None:
    with pytest.raises((tq.BudgetError, tq.SettingsError), match=message):
        search(case, **options)
