"""Bootstrapped plans: layers that the data decide clearly keep their bits, those on the edge do not."""

from dataclasses import replace

import pytest

from tracequant.allocation.solve import solve
from tracequant.allocation.stability import is_stable, plan_stability
from tracequant.core.curvature import Curvature, TraceEstimate
from tracequant.core.points import Layer, QuantizationPoints
from tracequant.core.sensitivity import combine
from tracequant.core.settings import PlanSettings
from tracequant.core.weight_grid import WeightGrid

SETTINGS = PlanSettings(average_bits=3)


def layer(name: str) -> Layer:
    return Layer(name, "Linear", ((name, "weight"),), (8, 8), 0, 64)


def made_of(values: dict[str, tuple[float, ...]]) -> Curvature:
    points = QuantizationPoints(tuple(layer(name) for name in values), (), (), (), "0")
    weights = {
        name: TraceEstimate(sum(v) / len(v), sum(v) / len(v) / 64, 0.0, 0.0, 64.0, 0, len(v))
        for name, v in values.items()
    }
    return Curvature(points, weights, {}, "gauss_newton", "", 0, 3, weight_values=values)


def shares(values: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """Stability of the plan for layers that differ in their traces alone."""
    curvature = made_of(values)
    errors = {name: {2: 1.0, 4: 0.1} for name in values}
    sensitivity = combine(curvature, errors, {}, WeightGrid(), criterion="trace")
    plan = solve(sensitivity, average_bits=3)
    found = plan_stability(sensitivity, plan, curvature, SETTINGS)
    assert found is not None
    return found


def test_clear_order_is_stable() -> None:
    assert shares({"a": (9.0, 10.0, 11.0, 10.0), "b": (1.0, 1.1, 0.9, 1.0)}) == {"a": 1.0, "b": 1.0}


def test_a_toss_up_is_not() -> None:
    found = shares({"a": (1.0, 3.0, 1.1, 2.8), "b": (3.0, 1.0, 2.7, 1.0)})
    assert 0.2 < found["a"] < 0.8
    assert found["a"] == pytest.approx(found["b"])


def test_common_fluctuations_of_all_layers_do_not_matter() -> None:
    """Samples are drawn together: what moves all traces alike leaves the plan alone."""
    common = (0.1, 100.0, 5.0, 0.01, 30.0)
    assert shares({"a": tuple(2 * v for v in common), "b": common}) == {"a": 1.0, "b": 1.0}


def test_a_budget_above_every_plan_warns_once_and_not_for_the_resamples() -> None:
    curvature = made_of({"a": (9.0, 10.0, 11.0), "b": (1.0, 1.1, 0.9)})
    sensitivity = combine(curvature, {name: {2: 1.0, 4: 0.1} for name in "ab"}, {}, WeightGrid(), criterion="trace")
    slack = PlanSettings(average_bits=9)
    with pytest.warns(UserWarning, match="above the largest plan") as warned:
        plan = solve(sensitivity, slack)
    assert len(warned) == 1
    # Here every warning is an error.
    assert plan_stability(sensitivity, plan, curvature, slack) == {"a": 1.0, "b": 1.0}


def test_without_several_values_there_is_no_answer() -> None:
    curvature = made_of({"a": (1.0,)})
    sensitivity = combine(curvature, {"a": {2: 1.0}}, {}, WeightGrid(), criterion="trace")
    plan = solve(sensitivity, average_bits=2)
    assert plan_stability(sensitivity, plan, curvature, SETTINGS) is None


def test_by_the_quadratic_criterion_a_layers_share_of_the_trace_is_drawn() -> None:
    """Where its Ω is the trace's times a factor of the layer's own, a resample changes both alike."""
    clear, toss_up = (
        {"a": (9.0, 10.0, 11.0), "b": (1.0, 1.1, 0.9)},
        {"a": (1.0, 3.0, 1.1, 2.8), "b": (3.0, 1.0, 2.7, 1.0)},
    )
    for values in (clear, toss_up):
        curvature = made_of(values)
        trace = combine(curvature, {name: {2: 1.0, 4: 0.1} for name in values}, {}, WeightGrid(), criterion="trace")
        quadratic = replace(trace, criterion="quadratic")
        plan = solve(trace, average_bits=3)
        assert plan_stability(quadratic, plan, curvature, SETTINGS) == plan_stability(trace, plan, curvature, SETTINGS)
        swapped = replace(quadratic, weight_omega={"a": trace.weight_omega["b"], "b": trace.weight_omega["a"]})
        other = plan_stability(swapped, solve(swapped, average_bits=3), curvature, SETTINGS)
        assert other is not None
        assert all(0 <= share <= 1 for share in other.values())


ERRORS = {2: 1.0, 4: 0.1}


def stable(values: dict[str, tuple[float, ...]], share: float, settings: PlanSettings | None = SETTINGS) -> bool:
    return is_stable(made_of(values), dict.fromkeys(values, ERRORS), WeightGrid(), settings=settings, share=share)


def test_the_rule_compares_the_least_stable_layer_with_the_share() -> None:
    clear = {"a": (9.0, 10.0, 11.0, 10.0), "b": (1.0, 1.1, 0.9, 1.0)}
    toss_up = {"a": (1.0, 3.0, 1.1, 2.8), "b": (3.0, 1.0, 2.7, 1.0)}
    assert stable(clear, 1.0)
    assert not stable(toss_up, 0.9)
    assert stable(toss_up, 0.2)
    # A third layer that is clear does not help the other two.
    assert not stable(toss_up | {"c": (500.0, 500.0, 500.0, 500.0)}, 0.9, PlanSettings(average_bits=10 / 3))


def test_without_a_budget_the_rule_takes_the_plan_half_way() -> None:
    """By 3 bits on average one of two layers gets 4, and which one is a toss-up; by 4 bits there is no choice."""
    toss_up = {"a": (1.0, 3.0, 1.1, 2.8), "b": (3.0, 1.0, 2.7, 1.0)}
    assert not stable(toss_up, 0.9, None)
    assert stable(toss_up, 1.0, PlanSettings(average_bits=4))


def test_half_way_is_within_what_the_rules_leave() -> None:
    """With every layer fixed there is no choice; with one fixed the others keep theirs, and where none is, no plan."""
    toss_up = {"a": (1.0, 3.0, 1.1, 2.8), "b": (3.0, 1.0, 2.7, 1.0)}
    assert stable(toss_up, 1.0, PlanSettings(fixed_bits={"*": 4}))
    assert stable(toss_up, 1.0, PlanSettings(fixed_bits={"*": 2}))
    assert stable(toss_up, 1.0, PlanSettings(max_bops_g=1.0, fixed_bits={"a": 4, "b": 2}))
    assert not stable(toss_up | {"c": (5.0, 5.0, 5.0, 5.0)}, 0.9, PlanSettings(fixed_bits={"c": 4}))
    assert not stable(toss_up, 0.0, PlanSettings(average_bits=1))


def test_a_resample_without_a_plan_keeps_no_layer() -> None:
    """In the monotone space the layer of larger trace must not be fixed to fewer bits, and here either may be it."""
    curvature = made_of({"a": (1.0, 3.0, 1.1, 2.8), "b": (2.0, 1.0, 2.7, 1.0)})
    errors = dict.fromkeys("ab", ERRORS)
    sensitivity = combine(curvature, errors, {}, WeightGrid(), criterion="trace")
    settings = PlanSettings(average_bits=3, space="monotone", fixed_bits={"a": 4, "b": 2})
    found = plan_stability(sensitivity, solve(sensitivity, settings), curvature, settings)
    assert found is not None
    assert 0.3 < found["a"] == found["b"] < 1


def test_one_value_is_never_stable() -> None:
    assert not stable({"a": (1.0,), "b": (9.0,)}, 0.0)


def test_a_budget_for_activations_does_not_disturb_the_rule() -> None:
    clear = {"a": (9.0, 10.0, 11.0, 10.0), "b": (1.0, 1.1, 0.9, 1.0)}
    assert stable(clear, 1.0, PlanSettings(average_bits=3, average_activation_bits=4))
