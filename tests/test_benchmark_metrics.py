"""The benchmarks' own metrics: products between layers, inverted and random traces."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablation_metrics
import cross_terms
import tracequant as tq
from models import images, residual_net
from test_perturbation import BITS, TASK, explicit
from test_sensitivity import made_up
from tracequant.core import cost
from tracequant.core.sensitivity import combine
from tracequant.core.settings import PlanSettings
from tracequant.quantization.rounding import round_weights

WIDTHS = (2, 4, 8)
NEAREST = tq.WeightGrid(rounding="nearest")


def nearest_errors(
    model: nn.Module, points: tq.QuantizationPoints, bits: tuple[int, ...]
) -> dict[str, dict[int, float]]:
    """‖ΔW‖² of rounding to the nearest, which reads no data."""
    by_layer = {layer.name: bits for layer in points.layers}
    return round_weights(model, [], TASK, points, by_layer, weight_grid=NEAREST).errors


@pytest.mark.parametrize("metric", ["cross", "first+cross"])
def test_a_plan_has_the_square_of_the_sum(metric: str) -> None:
    """½E[(Σ u·ΔW)²] + ΣE[g·ΔW] of whole plans."""
    batches = images((4, 3))
    points = tq.discover(residual_net(), batches, TASK)
    perturbation = tq.measure_perturbation(residual_net(), batches, TASK, points, weight_bits=BITS, weight_grid=NEAREST)
    first, second = explicit(residual_net(), batches, TASK)
    names = [layer.name for layer in points.layers]
    for bits in itertools.islice(itertools.product(BITS, repeat=len(names)), 0, None, 7):
        plan = dict(zip(names, bits, strict=True))
        taken = torch.tensor([float(plan[n] == b) for n in names for b in BITS], dtype=torch.float64)
        want = 0.5 * taken @ second @ taken + (first @ taken if metric == "first+cross" else 0.0)
        got = cross_terms.scores(perturbation)[metric](plan)
        assert got == pytest.approx(float(want), rel=1e-8)
        assert abs(cross_terms.interaction(perturbation, plan)) > 1e-6 * abs(got)  # the products decide something


def crossed(seed: int, ties: tuple[tuple[str, ...], ...] = ()) -> tuple[tq.Sensitivity, tq.Perturbation]:
    """A sensitivity of `residual_net` and products made up at random, positive semidefinite."""
    points = dataclasses.replace(tq.discover(residual_net(), images((2,)), TASK), ties=ties)
    names = [layer.name for layer in points.layers]
    options = len(names) * len(WIDTHS)
    rng = np.random.default_rng(seed)
    c = rng.standard_normal((5, options)) * np.tile([1.0, 0.3, 0.05], len(names))
    products = c.T @ c
    rows = tuple(tuple(float(x) for x in products[i, : i + 1]) for i in range(options))
    slope = rng.standard_normal(options) * np.tile([0.3, 0.1, 0.02], len(names))
    perturbation = tq.Perturbation(points, WIDTHS, NEAREST, tuple(map(float, slope)), rows, 2, "made up")
    errors = {name: dict.fromkeys(WIDTHS, 1.0) for name in names}
    return combine(
        made_up(points), errors, {}, NEAREST, criterion="first+quadratic", perturbation=perturbation
    ), perturbation


def omega(table: tq.Sensitivity, perturbation: tq.Perturbation, bits: dict[str, int]) -> float:
    own = math.fsum(table.weight_omega[n][b] for n, b in bits.items())
    return own + cross_terms.interaction(perturbation, bits)


def brute_force(table: tq.Sensitivity, perturbation: tq.Perturbation, average_bits: float) -> float:
    best = math.inf
    units = table.points.weight_units
    for bits in itertools.product(WIDTHS, repeat=len(units)):
        plan = {name: b for unit, b in zip(units, bits, strict=True) for name in unit}
        if cost.weight_bits_total(table.points, plan) <= average_bits * cost.weight_count(table.points):
            best = min(best, omega(table, perturbation, plan))
    return best


@pytest.mark.parametrize("tied", [False, True])
def test_local_search_keeps_the_limit_and_finds_nearly_always_the_optimum(tied: bool) -> None:
    ties = (("block1.conv1", "block2.conv1"),) if tied else ()
    found = 0
    for seed in range(8):
        table, perturbation = crossed(seed, ties)
        plan = cross_terms.solve(table, perturbation, PlanSettings(average_bits=4.0))
        start = tq.solve(table, average_bits=4.0)
        assert plan.omega == pytest.approx(omega(table, perturbation, plan.weight_bits))
        assert plan.average_bits <= 4.0
        assert plan.omega <= omega(table, perturbation, start.weight_bits) + 1e-12
        assert plan.bound is None
        if tied:
            assert plan.weight_bits["block1.conv1"] == plan.weight_bits["block2.conv1"]
        best = brute_force(table, perturbation, 4.0)
        assert plan.omega >= best - 1e-9
        found += plan.omega <= best + 1e-9
    assert found >= 7


def test_rules_and_bops_hold_with_products_too() -> None:
    table, perturbation = crossed(3)
    limit = 0.6 * cost.bit_operations(table.points, dict.fromkeys(table.weight_omega, 8), {}) / 1e9
    request = PlanSettings(max_bops_g=limit, fixed_bits={"fc": 8}, space="monotone")
    plan = cross_terms.solve(table, perturbation, request)
    assert plan.weight_bits["fc"] == 8
    assert cost.bit_operations(table.points, plan.weight_bits, {}) / 1e9 <= limit
    ranked = sorted(table.points.layers, key=lambda layer: -table.average_traces[layer.name])
    bits = [plan.weight_bits[layer.name] for layer in ranked]
    assert bits == sorted(bits, reverse=True)


def test_inverted_and_random_deal_the_traces_out() -> None:
    model = residual_net()
    points = tq.discover(model, images(), TASK)
    curvature = made_up(points)
    errors = nearest_errors(model, points, (4,))
    activations = {point.name: {4: 0.25} for point in points.activations}
    measured = combine(curvature, errors, activations, NEAREST, criterion="trace")

    def dealt(metric: str, seed: int = 0) -> list[float]:
        table = ablation_metrics.sensitivity_by(metric, curvature=curvature, measured=measured, seed=seed)
        assert table.criterion == metric
        assert table.average_traces == measured.average_traces
        return [table.weight_omega[n][4] / errors[n][4] for n in errors]

    assert dealt("trace") == pytest.approx([i + 1 for i in range(len(errors))])
    assert dealt("inverted") == pytest.approx(dealt("trace")[::-1])
    inverted = ablation_metrics.sensitivity_by("inverted", curvature=curvature, measured=measured)
    own = [options[4] for options in measured.activation_omega.values()]
    assert [options[4] for options in inverted.activation_omega.values()] == pytest.approx(own[::-1])
    assert dealt("random", 1) == dealt("random", 1)
    assert sorted(dealt("random", 1)) == pytest.approx(dealt("trace"))
    assert len({tuple(dealt("random", seed)) for seed in range(5)}) > 1


def test_every_metric_of_the_ablations_makes_a_plan() -> None:
    model, batches = residual_net(), images()
    points = tq.discover(model, batches, TASK)
    eigenvalues = {layer.name: float(10 + i) for i, layer in enumerate(points.layers)}
    curvature = dataclasses.replace(made_up(points), top_eigenvalues=eigenvalues)
    measured = combine(curvature, nearest_errors(model, points, WIDTHS), {}, NEAREST, criterion="l2")
    perturbation = tq.measure_perturbation(model, batches, TASK, points, weight_bits=WIDTHS, weight_grid=NEAREST)
    for metric in ablation_metrics.ABLATION_METRICS:
        plan = ablation_metrics.plan_by(
            metric, PlanSettings(average_bits=4), curvature=curvature, measured=measured, perturbation=perturbation
        )
        assert 2 <= plan.average_bits <= 4
        assert (plan.bound is None) == ("cross" in metric)
