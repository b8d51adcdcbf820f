"""Bootstrapped plans: layers that the data decide clearly keep their bits, those on the edge do not."""

import pytest

from tracequant.allocation import solve
from tracequant.curvature.result import Curvature, TraceEstimate
from tracequant.points import Layer, QuantizationPoints
from tracequant.sensitivity_result import combine
from tracequant.settings import PlanSettings, WeightGrid
from tracequant.stability import plan_stability

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
    sensitivity = combine(curvature, errors, {}, WeightGrid(), "trace")
    plan = solve(sensitivity, average_bits=3)
    found = plan_stability(sensitivity, curvature, plan, SETTINGS)
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


def test_without_several_values_there_is_no_answer() -> None:
    curvature = made_of({"a": (1.0,)})
    sensitivity = combine(curvature, {"a": {2: 1.0}}, {}, WeightGrid(), "trace")
    plan = solve(sensitivity, average_bits=2)
    assert plan_stability(sensitivity, curvature, plan, SETTINGS) is None
