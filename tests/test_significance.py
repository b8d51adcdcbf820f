"""What stands for traces that noise has decided: expectations against numerical integration, and the limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate

from tracequant.core.curvature import Curvature, TraceEstimate
from tracequant.core.points import Layer, QuantizationPoints
from tracequant.core.sensitivity import Sensitivity, combine
from tracequant.core.significance import replacements, trace_covariance
from tracequant.core.weight_grid import WeightGrid

NUMEL = 8
ERRORS = {2: 1.0, 4: 0.1}


def curvature(
    averages: dict[str, tuple[float, float]],
    *,
    estimator: str = "hutchinson",
    values: dict[str, tuple[float, ...]] | None = None,
    kinds: dict[str, str] | None = None,
    eigenvalues: dict[str, float] | None = None,
) -> Curvature:
    """Layers of 8 weights with these average traces and errors of them."""
    points = QuantizationPoints(
        tuple(Layer(n, (kinds or {}).get(n, "Linear"), ((n, "weight"),), (2, 4), 0, 8) for n in averages),
        (),
        (),
        (),
        "0",
    )
    weights = {
        name: TraceEstimate(NUMEL * mean, mean, NUMEL * error, math.inf, float(NUMEL), 4, 30)
        for name, (mean, error) in averages.items()
    }
    return Curvature(points, weights, {}, estimator, "", 0, 30, weight_values=values, top_eigenvalues=eigenvalues)


def gauss_newton(values: dict[str, tuple[float, ...]]) -> Curvature:
    """From traces by sample."""
    averages = {name: (float(np.mean(row)) / NUMEL, 0.0) for name, row in values.items()}
    return curvature(averages, estimator="gauss_newton", values=values)


def table(measured: Curvature, criterion: str = "trace") -> Sensitivity:
    return combine(measured, dict.fromkeys(measured.weights, ERRORS), {}, WeightGrid(), criterion=criterion)


KNOWN = {"a": (1.0, 0.01), "b": (4.0, 0.01), "c": (0.25, 0.0025), "d": (0.5, 0.01)}


@pytest.mark.parametrize(("value", "error"), [(0.1, 0.2), (-0.3, 0.2), (0.0, 0.05), (-0.01, 0.0), (1.5, 3.0)])
def test_the_expectation_given_a_signed_value(value: float, error: float) -> None:
    result, _ = replacements(curvature(KNOWN | {"noisy": (value, error)}))
    assert set(result) == {"noisy"}
    logs = [math.log(mean) for mean, _ in KNOWN.values()]
    noise = sum((e / m) ** 2 for m, e in KNOWN.values()) / len(KNOWN)
    mean, spread = np.mean(logs), math.sqrt(np.var(logs, ddof=1) - noise)
    sigma = max(error, -value)

    def density(log: float) -> float:
        return math.exp(-0.5 * ((log - mean) / spread) ** 2 - 0.5 * ((value - math.exp(log)) / sigma) ** 2)

    def moment(power: int) -> float:
        integral, _ = scipy.integrate.quad(lambda log: math.exp(power * log) * density(log), -20, 10, limit=500)
        return float(integral)

    expected = moment(1) / moment(0)
    assert result["noisy"].measured == value
    assert result["noisy"].used == pytest.approx(expected, rel=1e-3)
    assert result["noisy"].error == pytest.approx(math.sqrt(moment(2) / moment(0) - expected**2), rel=1e-2)


def test_the_expectation_is_closer_to_the_truth_than_zero_or_the_value() -> None:
    """Over many networks whose layers are as the assumption says; noise as large as a middling trace."""
    random = np.random.default_rng(0)
    clipped = shrunk = used = true = 0.0
    for _ in range(200):
        truth = np.exp(random.normal(0.0, 1.5, 12))
        errors = np.where(np.arange(12) < 8, 0.05 * truth, 1.0)
        values = truth + errors * random.normal(size=12)
        names = [f"layer{i}" for i in range(12)]
        result, _ = replacements(curvature({n: (v, e) for n, v, e in zip(names, values, errors, strict=True)}))
        for name, own in result.items():
            i = names.index(name)
            clipped += (max(values[i], 0.0) - truth[i]) ** 2
            shrunk += (own.used - truth[i]) ** 2
            used, true = used + own.used, true + truth[i]
    # The squared error is 0.82 of that of values whose negative ones count as zero, and the mean is right.
    assert shrunk < 0.9 * clipped
    assert used == pytest.approx(true, rel=0.1)


def test_significant_traces_stay_as_they_are() -> None:
    measured = curvature(KNOWN | {"edge": (0.1, 0.049), "noisy": (0.1, 0.051)})
    result = table(measured)
    assert set(result.replaced) == {"noisy"}
    for name in (*KNOWN, "edge"):
        assert result.average_traces[name] == measured.weights[name].average_trace
        assert result.weight_omega[name] == {b: e * measured.weights[name].average_trace for b, e in ERRORS.items()}
    assert result.average_traces["noisy"] == result.replaced["noisy"].used > 0
    assert result.weight_omega["noisy"][2] == result.replaced["noisy"].used


def test_layers_of_the_same_kind_say_more() -> None:
    """Three of a kind are enough to go by; below that all layers do."""
    small = {f"conv{i}": (1e-3 * i, 1e-6) for i in (1, 2, 3)}
    kinds = dict.fromkeys((*small, "noisy"), "Conv2d")
    result, _ = replacements(curvature(KNOWN | small | {"noisy": (-1.0, 100.0)}, kinds=kinds))
    assert 5e-4 < result["noisy"].used < 5e-3
    del small["conv1"]
    fewer, _ = replacements(curvature(KNOWN | small | {"noisy": (-1.0, 100.0)}, kinds=kinds))
    assert fewer["noisy"].used > 0.1


def test_nothing_significant_leaves_the_decision_to_the_perturbation() -> None:
    result = table(curvature({"a": (0.1, 1.0), "b": (-2.0, 1.0), "c": (0.0, 3.0)}))
    assert result.average_traces == {"a": 2.0, "b": 2.0, "c": 2.0}


def test_one_layer() -> None:
    assert not table(curvature({"a": (1.0, 0.1)})).replaced
    assert table(curvature({"a": (-1.0, 0.1)})).average_traces == {"a": 1.0}
    assert table(curvature({"a": (1.0, math.inf)})).average_traces == {"a": 1.0}


def test_zero_everywhere_is_left_alone() -> None:
    result = table(gauss_newton({"a": (0.0, 0.0, 0.0), "b": (0.0, 0.0, 0.0)}))
    assert not result.replaced
    assert result.average_traces == {"a": 0.0, "b": 0.0}


def test_exact_zeros_become_as_large_as_the_samples_allow() -> None:
    """The rule of succession: of 30 samples none has a gradient, so one in 32 may have what is usual."""
    values = {name: tuple(8 * mean * v for v in [1.0, 0.5, 1.5] * 10) for name, (mean, _) in KNOWN.items()}
    measured = gauss_newton(values | {"dead": (0.0,) * 30})
    result, _ = replacements(measured)
    logs = [math.log(mean) for mean, _ in KNOWN.values()]
    assert set(result) == {"dead"}
    assert result["dead"].used == pytest.approx(math.exp(np.mean(logs) + np.var(logs, ddof=1) / 2) / 32)


def test_what_moves_all_layers_alike_is_no_doubt_about_one() -> None:
    """One sample has nearly everything, in all layers: every trace is uncertain, their ratios are not."""
    common = [1e-3] * 29 + [1.0]
    values = {name: tuple(8 * mean * v for v in common) for name, (mean, _) in KNOWN.items()}
    assert not replacements(gauss_newton(values))[0]
    # A layer whose values come from a sample of its own is in doubt, and moves towards the others, by little.
    alone = (1e-3,) * 28 + (40.0, 1e-3)
    (doubtful,) = replacements(gauss_newton(values | {"alone": alone}))[0].values()
    assert 0.3 * doubtful.measured < doubtful.used < 3 * doubtful.measured
    assert doubtful.used != doubtful.measured


def test_a_gauss_newton_trace_of_one_sample_is_kept() -> None:
    assert not replacements(gauss_newton({"a": (3.0,), "b": (1e-9,)}))[0]


def test_eigenvalues_of_zero_or_less_are_replaced() -> None:
    measured = curvature(KNOWN, eigenvalues={"a": 8.0, "b": 16.0, "c": -2.0, "d": 0.0})
    result = table(measured, "eigenvalue")
    assert set(result.replaced) == {"c", "d"}
    assert result.weight_omega["a"][2] == 1.0
    assert result.weight_omega["c"][2] == result.replaced["c"].used > 0
    assert result.average_traces == {name: mean for name, (mean, _) in KNOWN.items()}
    assert not result.trace_covariance


def test_covariances_and_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    random = np.random.default_rng(0)
    rows = random.gamma(2.0, size=(3, 20))
    measured = gauss_newton({name: tuple(row) for name, row in zip("abc", rows, strict=True)})
    result = table(measured)
    expected = np.cov(rows / NUMEL) / 20
    for i, row in enumerate(result.trace_covariance):
        assert row == pytest.approx(expected[i, : i + 1])
    noisy = table(curvature(KNOWN | {"noisy": (-1.0, 2.0)}))
    assert noisy.trace_covariance[1] == pytest.approx((0.0, 0.01**2))
    assert noisy.trace_covariance[4][4] == pytest.approx(noisy.replaced["noisy"].error ** 2)
    noisy.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(tmp_path / "sensitivity.json") == noisy
    assert trace_covariance(curvature({"a": (1.0, math.inf)}), {}) == ()
