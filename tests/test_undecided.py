"""Plans among which Ω does not choose, and choices that the errors of the traces leave open."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

import tracequant as tq
from tracequant.core.plan import BitPlan
from tracequant.core.points import Layer, QuantizationPoints
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.weight_grid import WeightGrid

BITS = (2, 3, 4, 8)


def table(
    traces: list[float],
    seed: int = 0,
    covariance: list[list[float]] | None = None,
    ties: tuple[tuple[int, ...], ...] = (),
) -> Sensitivity:
    """Layers l0, l1, ... of odd sizes."""
    rng = random.Random(seed)
    names = [f"l{i}" for i in range(len(traces))]
    points = QuantizationPoints(
        tuple(Layer(n, "Linear", ((n, "weight"),), (rng.randint(1, 9), rng.randint(5, 30)), 0, 64) for n in names),
        (),
        tuple(tuple(names[i] for i in tie) for tie in ties),
        (),
        "0",
    )
    errors = {n: {b: rng.uniform(0.8, 1.2) * 4.0**-b for b in BITS} for n in names}
    return Sensitivity(
        points=points,
        weight_omega={n: {b: t * e for b, e in errors[n].items()} for n, t in zip(names, traces, strict=True)},
        activation_omega={},
        weight_errors=errors,
        activation_errors={},
        average_traces=dict(zip(names, traces, strict=True)),
        weight_grid=WeightGrid(),
        criterion="trace",
        trace_covariance=tuple(tuple(row[: i + 1]) for i, row in enumerate(covariance or [])),
    )


def perturbation(sensitivity: Sensitivity, bits: dict[str, int]) -> float:
    return math.fsum(sensitivity.weight_errors[name][b] for name, b in bits.items())


def within(sensitivity: Sensitivity, average: float) -> list[dict[str, int]]:
    """All assignments of at most so many bits on average."""
    layers = sensitivity.points.layers
    limit = average * sum(layer.numel for layer in layers)
    return [
        dict(zip(sensitivity.weight_omega, bits, strict=True))
        for bits in itertools.product(BITS, repeat=len(layers))
        if sum(b * layer.numel for b, layer in zip(bits, layers, strict=True)) <= limit
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("traces", [[0.0] * 5, [0.0, 1.0, 0.0, 0.0, 2.0], [1.0, 1e-14, 1e-15, 3.0, 0.0]])
def test_what_omega_leaves_open_goes_to_the_least_perturbation(traces: list[float], seed: int) -> None:
    """Against all plans within the budget: Ω is least, and ‖ΔW‖² least among those of that Ω."""
    sensitivity = table(traces, seed)
    plan = tq.solve(sensitivity, average_bits=3.6)
    plans = within(sensitivity, 3.6)

    def omega(bits: dict[str, int]) -> float:
        return math.fsum(sensitivity.weight_omega[name][b] for name, b in bits.items())

    least = min(map(omega, plans))
    assert plan.omega == pytest.approx(least, rel=1e-9, abs=0)
    assert plan.gap == 0
    if 0.0 in traces and 1e-14 not in traces:
        best = min(perturbation(sensitivity, bits) for bits in plans if omega(bits) <= least)
        assert perturbation(sensitivity, plan.weight_bits) == pytest.approx(best, rel=1e-9)


def test_bytes_that_are_left_are_used() -> None:
    """Layers of zero trace had the fewest bits, however much room there was."""
    plan = tq.solve(table([1.0, 0.0, 0.0]), average_bits=7.9)
    assert min(plan.weight_bits.values()) >= 4
    monotone = tq.solve(table([1.0, 0.0, 0.0]), average_bits=7.9, space="monotone")
    assert min(monotone.weight_bits.values()) >= 4
    tied = table([0.0, 0.0, 1.0], ties=((0, 1),))
    bits = tq.solve(tied, average_bits=6).weight_bits
    assert bits["l0"] == bits["l1"] > 2


def exchanges(sensitivity: Sensitivity, plan: BitPlan, average: float) -> dict[str, float]:
    """Layer → the least change of Ω over its error, over all exchanges between two layers within the budget."""
    names = list(plan.weight_bits)
    rows = sensitivity.trace_covariance
    covariance = np.array([[rows[max(i, j)][min(i, j)] for j in range(len(rows))] for i in range(len(rows))])
    ratios: dict[str, float] = {}
    for bits in within(sensitivity, average):
        changed = [name for name in names if bits[name] != plan.weight_bits[name]]
        if len(changed) != 2 or (bits[changed[0]] < plan.weight_bits[changed[0]]) == (
            bits[changed[1]] < plan.weight_bits[changed[1]]
        ):
            continue
        errors = sensitivity.weight_errors
        step = np.array([errors[name][bits[name]] - errors[name][plan.weight_bits[name]] for name in names])
        change = step @ np.array([sensitivity.average_traces[name] for name in names])
        for name in changed:
            ratios[name] = min(ratios.get(name, math.inf), change / math.sqrt(step @ covariance @ step))
    return ratios


@pytest.mark.parametrize("seed", range(6))
def test_undecided_layers_are_those_of_an_exchange_within_its_error(seed: int) -> None:
    random_numbers = np.random.default_rng(seed)
    traces = np.exp(random_numbers.normal(size=5))
    root = 0.15 * traces[:, None] * random_numbers.normal(size=(5, 5))
    sensitivity = table(traces.tolist(), seed, (root @ root.T).tolist())
    plan = tq.solve(sensitivity, average_bits=3.4)
    ratios = exchanges(sensitivity, plan, 3.4)
    assert set(plan.undecided) == {name for name, ratio in ratios.items() if ratio < 1}


def test_errors_that_move_all_layers_alike_leave_nothing_open() -> None:
    """Traces known to 50 %, their ratios exactly: every exchange keeps its sign, which single errors would not show."""
    traces = [4.0, 2.0, 1.0, 0.5]
    common = np.outer(traces, traces) * 0.25
    assert tq.solve(table(traces, 0, common.tolist()), average_bits=3.4).undecided == {}
    alone = np.diag(np.diag(common))
    assert tq.solve(table(traces, 0, alone.tolist()), average_bits=3.4).undecided


def test_the_plan_and_its_explanation_say_so(tmp_path) -> None:  # type: ignore[no-untyped-def]
    traces = [4.0, 2.0, 1.0, 0.5]
    sensitivity = table(traces, 0, np.diag(np.square(traces)).tolist())
    plan = tq.solve(sensitivity, average_bits=3.4)
    name, text = next(iter(plan.undecided.items()))
    assert "not decided by the data" in text
    assert f"{len(plan.undecided)} of 4 layers rest on a difference in Ω that is smaller than its error" in str(plan)
    explanation = tq.explain(sensitivity, plan)
    assert text in next(row.why for row in explanation.rows if row.name == name)
    assert explanation.doubt == plan.doubt
    assert plan.doubt in str(explanation)
    plan.save(tmp_path / "plan.json")
    assert tq.BitPlan.load(tmp_path / "plan.json").undecided == plan.undecided
    assert plan.with_bits({name: plan.weight_bits[name]}, sensitivity).undecided == {}
    certain = replace(sensitivity, trace_covariance=())
    assert tq.solve(certain, average_bits=3.4).doubt == ""
    assert "smaller than its error" not in str(tq.solve(certain, average_bits=3.4))
