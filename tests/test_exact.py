"""The exact solver and the exact frontier against brute force, for every mix of limits and rules."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tracequant as tq
from tracequant.allocation import dynamic, milp
from tracequant.allocation.explain import exchange_rates, explain
from tracequant.allocation.pareto import Unit
from tracequant.core import cost
from tracequant.core.errors import BudgetError
from tracequant.core.plan import MIB
from tracequant.core.points import ActivationPoint, Layer, QuantizationPoints, StoredTensor
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings
from tracequant.core.weight_grid import WeightGrid

WEIGHT_LIMITS = ("max_size_mib", "compression", "average_bits", "max_bops_g", "max_latency_ms")
ACTIVATION_LIMITS = ("average_activation_bits", "activation_compression", "max_activation_mib")
COUPLING = ("max_bops_g", "max_latency_ms")
FEW = settings(max_examples=150, deadline=None)


def make(
    layers: int,
    seed: int,
    weight_bits: tuple[int, ...] = (2, 3, 4, 8),
    activation_bits: tuple[int, ...] = (4, 8),
    reads: tuple[int | None, ...] | None = None,
    ties: tuple[tuple[int, ...], ...] = (),
    spread: float = 2.0,
) -> Sensitivity:
    """Layers l0, l1, ... of odd sizes; layer i reads activation `reads[i]`; Ω over 10^±spread."""
    rng = random.Random(seed)
    names = [f"l{i}" for i in range(layers)]
    reads = reads if reads is not None else tuple(range(layers))
    shapes = [(rng.randint(1, 20), rng.randint(1, 40)) for _ in names]
    used = sorted({point for point in reads if point is not None}) if activation_bits else []
    first_reader = {point: names[reads.index(point)] for point in used}
    points = QuantizationPoints(
        layers=tuple(
            Layer(
                name, "Linear", ((name, "weight"),), shape, 0, math.prod(shape) * rng.randint(1, 30),
                None if reads[i] is None or not used else first_reader[reads[i]],  # type: ignore[index]
            )
            for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
        ),
        activations=tuple(
            ActivationPoint(
                first_reader[point],
                tuple(name for name, read in zip(names, reads, strict=True) if read == point),
                rng.choice([1.0, 1.0, 0.5]) * rng.randint(1, 60),
                position == 0 and rng.random() < 0.5,
            )
            for position, point in enumerate(used)
        ),
        ties=tuple(tuple(names[i] for i in group) for group in ties),
        float_tensors=tuple(StoredTensor(f"{name}.bias", "F32", (5,)) for name in names),
        fingerprint="f",
    )  # fmt: skip
    traces = {name: 10 ** rng.uniform(-spread, spread) for name in names}
    omega = {n: {b: traces[n] * 4.0**-b * rng.uniform(0.7, 1.4) for b in weight_bits} for n in names}
    activation_omega = {
        point.name: {
            b: 10 ** rng.uniform(-spread, spread) * 4.0**-b for b in ((8,) if point.is_model_input else activation_bits)
        }
        for point in points.activations
    }
    return Sensitivity(points, omega, activation_omega, omega, activation_omega, traces, WeightGrid(), "trace")


def latency_table(sensitivity: Sensitivity, seed: int, rising: bool = True) -> dict[str, dict[int, dict[int, float]]]:
    """Milliseconds that mostly rise with bits, or are in no order at all."""
    rng = random.Random(seed)
    table: dict[str, dict[int, dict[int, float]]] = {}
    for layer in sensitivity.points.layers:
        inputs = sensitivity.activation_omega.get(layer.activation or "", {32: 0.0})
        scale = rng.uniform(0.1, 1.0)
        table[layer.name] = {
            w: {a: scale * ((w + a) * rng.uniform(0.9, 1.1) if rising else rng.uniform(1, 10)) for a in inputs}
            for w in sensitivity.weight_omega[layer.name]
        }
    return table


@dataclass
class Everything:
    """Every plan there is, each figure worked out from its definition, as arrays over all plans."""

    sensitivity: Sensitivity
    request: PlanSettings
    choices: list[tuple[dict[str, int], dict[str, int]]] = field(init=False)
    omega: NDArray[np.float64] = field(init=False)
    used: dict[str, NDArray[Any]] = field(init=False)

    def __post_init__(self) -> None:
        points = self.sensitivity.points
        request = self.request
        weights = {
            name: [
                b
                for b in sorted(options)
                if b == (request.fixed_bits or {}).get(name, b)
                and b >= (request.min_bits or {}).get(name, 0)
                and b in (request.allowed_bits or {}).get(name, (b,))
            ]
            for name, options in self.sensitivity.weight_omega.items()
        }
        free = any(
            getattr(request, name) is not None
            for name in ("average_activation_bits", "activation_compression", *COUPLING)
        )
        inputs = {}
        for point in points.activations:
            bits = sorted(self.sensitivity.activation_omega[point.name])
            if not point.is_model_input:
                bits = [b for b in bits if b in (request.allowed_activation_bits or {}).get(point.name, (b,))]
            if request.max_activation_mib is not None:
                bits = [b for b in bits if point.numel * b / 8 <= request.max_activation_mib * MIB]
            inputs[point.name] = bits if free else bits[-1:]
        units = points.weight_units
        shared = [[b for b in weights[unit[0]] if all(b in weights[name] for name in unit)] for unit in units]
        self.choices = [
            (
                {name: b for unit, b in zip(units, bits[: len(units)], strict=True) for name in unit},
                dict(zip(inputs, bits[len(units) :], strict=True)),
            )
            for bits in itertools.product(*shared, *inputs.values())
            if request.space == "full" or self._falling(units, bits)
        ]
        bits = np.array([[*w.values(), *a.values()] for w, a in self.choices], dtype=int).reshape(
            len(self.choices), len(weights) + len(inputs)
        )
        names = list(self.choices[0][0]) + list(inputs) if self.choices else []
        column = {name: bits[:, i] for i, name in enumerate(names[: len(weights)])}
        input_column = {name: bits[:, len(weights) + i] for i, name in enumerate(inputs)}
        if not self.choices:
            return
        float_input = np.full(len(bits), 32)

        def look_up(table: dict[int, Any], chosen: NDArray[Any]) -> NDArray[Any]:
            return np.vectorize(table.__getitem__, otypes=[type(next(iter(table.values())))])(chosen)

        self.omega = sum(
            (look_up(self.sensitivity.weight_omega[n], column[n]) for n in column), np.zeros(len(bits))
        ) + sum((look_up(self.sensitivity.activation_omega[n], input_column[n]) for n in input_column), 0.0)
        grid = self.sensitivity.weight_grid
        sizes = {n: {b: cost.code_bytes(points.by_name[n], b, grid) for b in range(1, 9)} for n in column}
        codes = sum(look_up(sizes[n], column[n]) for n in column)
        first = cost.size_bytes(points, *self.choices[0], grid)
        count = sum(layer.numel for layer in points.layers)
        elements = math.fsum(point.numel for point in points.activations)
        average = sum(layer.numel * column[layer.name] for layer in points.layers) / count
        self.used = {
            "max_size_mib": (first - codes[0] + codes) / MIB,
            "average_bits": average,
            "compression": -32 / average,
            "max_bops_g": sum(
                layer.macs * column[layer.name] * input_column.get(layer.activation or "", float_input)
                for layer in points.layers
            )
            / 1e9,
        }
        if elements:
            spent = sum(p.numel * input_column[p.name] for p in points.activations) / elements
            self.used |= {"average_activation_bits": spent, "activation_compression": -32 / spent}
        if request.latency is not None:
            self.used["max_latency_ms"] = sum(
                np.array(
                    [
                        request.latency[layer.name][int(w)][int(a)]
                        for w, a in zip(
                            column[layer.name], input_column.get(layer.activation or "", float_input), strict=True
                        )
                    ]
                )
                for layer in points.layers
            )

    def _falling(self, units: tuple[tuple[str, ...], ...], bits: tuple[int, ...]) -> bool:
        points, traces = self.sensitivity.points, self.sensitivity.average_traces

        def rank(unit: tuple[str, ...]) -> float:
            numel = [points.by_name[name].numel for name in unit]
            return math.fsum(n * traces[name] for n, name in zip(numel, unit, strict=True)) / sum(numel)

        order = sorted(range(len(units)), key=lambda i: rank(units[i]), reverse=True)
        return all(bits[i] >= bits[j] for i, j in itertools.pairwise(order))

    def within(self) -> NDArray[np.bool_]:
        """Which plans keep to all limits; a limit met to within rounding is kept."""
        kept = np.ones(len(self.choices), dtype=bool)
        for name, used in self.used.items():
            asked = getattr(self.request, name)
            if asked is not None:
                limit = -asked if "compression" in name else asked
                kept &= used <= limit + 1e-12 * abs(limit)
        return kept


@st.composite
def requests(draw: st.DrawFn) -> tuple[Sensitivity, PlanSettings]:
    """A network of up to 8 layers and 4 bit widths, and any mix of limits, rules and space, feasible or not."""
    seed = draw(st.integers(0, 2**32))
    rng = random.Random(seed)
    chosen = draw(st.sets(st.sampled_from(WEIGHT_LIMITS + ACTIVATION_LIMITS), min_size=1, max_size=4))
    free_inputs = bool(chosen & {*COUPLING, "average_activation_bits", "activation_compression"})
    layers = draw(st.sampled_from([4, 3, 2, 1] if free_inputs else [6, 7, 8, 5, 3, 1]))
    options = draw(st.integers(2, 4 if layers <= 6 else 3))
    weight_bits = tuple(sorted(rng.sample(range(1, 9), options)))
    activation_bits = draw(st.sampled_from([(), (8,), (4, 8), (4, 6, 8)]))
    reads = tuple(draw(st.sampled_from([None, *range(i + 1)])) for i in range(layers))
    ties = draw(st.sampled_from([(), ((0, 1),), ((0, 1, 2),), ((0, 2), (1, 3))]))
    ties = tuple(group for group in ties if max(group) < layers)
    sensitivity = make(layers, seed, weight_bits, activation_bits, reads, ties, draw(st.sampled_from([0.5, 2, 6])))
    names = list(sensitivity.weight_omega)
    rules: dict[str, Any] = {}
    if draw(st.integers(0, 3)) == 0:
        rules["fixed_bits"] = {rng.choice(names): rng.choice(weight_bits)}
    if draw(st.integers(0, 3)) == 0:
        rules["min_bits"] = {rng.choice(names): rng.choice(weight_bits)}
    if draw(st.integers(0, 3)) == 0:
        rules["allowed_bits"] = {rng.choice(names): tuple(sorted(rng.sample(weight_bits, 2)))}
    inputs = [point.name for point in sensitivity.points.activations if not point.is_model_input]
    if inputs and draw(st.integers(0, 3)) == 0:
        rules["allowed_activation_bits"] = {rng.choice(inputs): (rng.choice(activation_bits),)}
    rules["space"] = draw(st.sampled_from(["full", "full", "monotone"]))
    if "max_latency_ms" in chosen:
        rules["latency"] = latency_table(sensitivity, seed, rising=draw(st.booleans()))
    if "max_activation_mib" in chosen and sensitivity.points.activations:
        largest = max(point.numel for point in sensitivity.points.activations)
        rules["max_activation_mib"] = largest * rng.choice([4, 6, 8, 8]) / 8 / MIB
    asked: dict[str, Any] = {}
    # Limits around those of one plan, so that all of them matter.
    everything = Everything(sensitivity, PlanSettings(**rules, **dict.fromkeys(chosen & set(COUPLING), 1.0)))
    if everything.choices:
        plan = rng.randrange(len(everything.choices))
        for name in sorted(chosen & everything.used.keys()):
            used = abs(float(everything.used[name][plan]))
            slack = rng.choice([1.0, 1.02, 1.1, 1.3, 0.9])
            asked[name] = used / slack if "compression" in name else used * slack
        if not asked and "max_activation_mib" not in rules:
            asked["average_bits"] = float(everything.used["average_bits"][plan])
    elif "max_activation_mib" not in rules:
        asked["average_bits"] = 4.0
    return sensitivity, PlanSettings(**rules, **asked)


def solve(sensitivity: Sensitivity, request: PlanSettings) -> tq.BitPlan:
    return tq.solve(sensitivity, request)


@settings(max_examples=400, deadline=None)
@given(requests())
def test_equal_to_brute_force_under_every_mix_of_limits(case: tuple[Sensitivity, PlanSettings]) -> None:
    sensitivity, request = case
    everything = Everything(sensitivity, request)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            plan = solve(sensitivity, request)
    except BudgetError:
        assert not everything.choices or not everything.within().any()
        return
    if warned:
        limits = [name for name in WEIGHT_LIMITS if getattr(request, name) is not None]
        assert "above the largest plan" in str(warned[0].message)
        assert limits
        assert all(
            np.max(everything.used[name]) <= getattr(request, name) * (-1 if "compression" in name else 1)
            for name in limits
        )
    allowed = np.flatnonzero(everything.within())
    best = everything.omega[allowed].min()
    assert (plan.weight_bits, plan.activation_bits) in [everything.choices[i] for i in allowed]
    assert plan.total_omega == pytest.approx(best, rel=1e-9)
    assert plan.gap == 0.0
    assert plan.bound == plan.total_omega
    if request.max_size_mib is not None:
        size = cost.size_bytes(sensitivity.points, plan.weight_bits, plan.activation_bits, sensitivity.weight_grid)
        assert size == plan.size_bytes <= request.max_size_mib * MIB + 1e-6


@FEW
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 8),
    options=st.integers(1, 4),
    space=st.sampled_from(["full", "monotone"]),
    tied=st.booleans(),
)
def test_exact_frontier_is_that_of_brute_force(seed: int, layers: int, options: int, space: str, tied: bool) -> None:
    rng = random.Random(seed)
    bits = tuple(sorted(rng.sample(range(1, 9), options)))
    ties = ((0, layers - 1),) if tied and layers > 2 else ()
    sensitivity = make(layers, seed, bits, ties=ties)
    fixed = {"l1": rng.choice(bits)} if layers > 2 and rng.random() < 0.3 else None
    request = PlanSettings(average_bits=32, space=space, fixed_bits=fixed)  # type: ignore[arg-type]
    everything = Everything(sensitivity, request)
    if not everything.choices:
        return
    activation_omega = math.fsum(options[max(options)] for options in sensitivity.activation_omega.values())
    sizes = np.round(everything.used["max_size_mib"] * MIB).astype(int)
    expected: list[tuple[int, float]] = []
    for i in np.lexsort((everything.omega, sizes)):
        omega = everything.omega[i] - activation_omega
        if not expected or omega < expected[-1][1] * (1 - 1e-9):
            expected.append((int(sizes[i]), float(omega)))

    front = tq.frontier(sensitivity, space=space, fixed_bits=fixed)  # type: ignore[arg-type]

    assert front.size_bytes.tolist() == [size for size, _ in expected]
    assert front.omega == pytest.approx([omega for _, omega in expected], rel=1e-6)
    for i in {0, len(front) // 2, len(front) - 1}:
        plan = front[i]
        assert plan.size_bytes == front.size_bytes[i]
        assert plan.omega == pytest.approx(front.omega[i], rel=1e-12)
        assert (plan.weight_bits, plan.activation_bits) in everything.choices


@FEW
@given(
    costs=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True), min_size=1, max_size=5),
    factor=st.sampled_from([1, 4, 256]),
    monotone=st.booleans(),
    data=st.data(),
)
def test_dynamic_programme_for_any_costs(
    costs: list[list[int]], factor: int, monotone: bool, data: st.DataObject
) -> None:
    """Costs and Ω in any order, options of equal Ω, units of different measures, units without a choice."""
    units = []
    for i, options in enumerate(costs):
        scale = factor if i % 2 else 4 * factor
        omega = data.draw(st.lists(st.integers(0, 20), min_size=len(options), max_size=len(options)))
        bits = tuple(range(1, len(options) + 1))
        units.append(Unit(f"u{i}", bits, tuple(scale * c for c in options), tuple(o / 8 for o in omega)))
    found: dict[int, float] = {}
    for choice in itertools.product(*(range(len(unit.bits)) for unit in units)):
        if monotone and any(
            units[i].bits[a] < units[i + 1].bits[b] for i, (a, b) in enumerate(itertools.pairwise(choice))
        ):
            continue
        total = sum(unit.cost[j] for unit, j in zip(units, choice, strict=True))
        omega = sum(unit.omega[j] for unit, j in zip(units, choice, strict=True))
        found[total] = min(found.get(total, math.inf), omega)
    expected: list[tuple[int, float]] = []
    for total, omega in sorted(found.items()):
        if not expected or omega < expected[-1][1]:
            expected.append((total, omega))

    points = dynamic.exact_frontier(units, monotone)

    assert list(zip(points.cost.tolist(), points.omega.tolist(), strict=True)) == expected
    for i, (total, omega) in enumerate(expected):
        choice = points.choice(i)
        assert sum(unit.cost[j] for unit, j in zip(units, choice, strict=True)) == total
        assert sum(unit.omega[j] for unit, j in zip(units, choice, strict=True)) == omega


@pytest.mark.parametrize("seed", range(6))
def test_eight_layers_of_four_widths(seed: int) -> None:
    """65,536 assignments, three limits at once, Ω over twelve orders of magnitude, a tie in every other network."""
    sensitivity = make(8, seed, ties=((1, 4, 6),) if seed % 2 else (), spread=6.0)
    table = latency_table(sensitivity, seed)
    fixed = {point.name: (8,) for point in sensitivity.points.activations if not point.is_model_input}
    everything = Everything(sensitivity, PlanSettings(max_bops_g=1.0, latency=table, allowed_activation_bits=fixed))
    assert len(everything.choices) == 4 ** (6 if seed % 2 else 8)
    rng = random.Random(seed)
    for names in itertools.combinations(["max_size_mib", "average_bits", "max_bops_g", "max_latency_ms"], 3):
        plan = rng.randrange(len(everything.choices))
        limits = {name: float(everything.used[name][plan]) * rng.uniform(1, 1.1) for name in names}
        request = PlanSettings(latency=table, allowed_activation_bits=fixed, **limits)  # type: ignore[arg-type]
        everything.request = request

        plan = solve(sensitivity, request)

        assert plan.total_omega == pytest.approx(everything.omega[everything.within()].min(), rel=1e-9)
        assert plan.gap == 0.0


def test_inputs_that_several_layers_read_are_decided_once() -> None:
    """Three layers read one tensor and are tied to others: the products of bits are still exact."""
    sensitivity = make(6, 4, (2, 4, 8), (4, 6, 8), reads=(0, 0, 0, 3, 3, 5), ties=((0, 3), (2, 5)))
    everything = Everything(sensitivity, PlanSettings(max_bops_g=1.0))
    for share in (0.02, 0.1, 0.3, 0.5, 0.8):
        limit = float(np.quantile(everything.used["max_bops_g"], share))
        everything.request = PlanSettings(max_bops_g=limit)

        plan = tq.solve(sensitivity, max_bops_g=limit)

        assert plan.total_omega == pytest.approx(everything.omega[everything.within()].min(), rel=1e-9)
        used = cost.bit_operations(sensitivity.points, plan.weight_bits, plan.activation_bits)
        assert used <= limit * 1e9 + 1e-6


def test_layers_and_inputs_that_share_their_bits() -> None:
    sensitivity = replace(make(5, 9, (4, 6, 8), (4, 6, 8)), same_bits=True)
    names = list(sensitivity.weight_omega)
    offered = {name: sorted(sensitivity.activation_omega[name]) for name in names}  # the model's input has 8 only
    for share in (0.2, 0.5, 0.9):
        plans = []
        for bits in itertools.product(*([b for b in (4, 6, 8) if b in offered[name]] for name in names)):
            chosen = dict(zip(names, bits, strict=True))
            omega = sum(sensitivity.weight_omega[n][b] + sensitivity.activation_omega[n][b] for n, b in chosen.items())
            plans.append((cost.bit_operations(sensitivity.points, chosen, chosen), omega))
        limit = float(np.quantile([used for used, _ in plans], share))

        plan = tq.solve(sensitivity, max_bops_g=limit / 1e9)

        assert plan.weight_bits == plan.activation_bits
        best = min(omega for used, omega in plans if used <= math.floor(limit + 1e-6))
        assert plan.total_omega == pytest.approx(best, rel=1e-9)
        assert tq.uniform_plan(sensitivity, 8).activation_bits == dict.fromkeys(names, 8)


def big(layers: int = 60, seed: int = 1) -> Sensitivity:
    return make(layers, seed, (2, 3, 4, 5, 6, 8), (4, 6, 8))


def test_same_request_same_plan() -> None:
    first = tq.solve(big(), average_bits=3.7, max_bops_g=0.005)
    assert first == tq.solve(big(), average_bits=3.7, max_bops_g=0.005)
    assert first.prices.keys() <= {"weight_bits", "bops"}


def test_exact_is_never_worse_than_appendix_e_and_lies_on_the_frontier() -> None:
    sensitivity = big()
    front = tq.frontier(sensitivity)
    for average in (2.2, 3.1, 4.4, 6.0):
        found = tq.solve(sensitivity, average_bits=average, solver="pareto")
        best = tq.solve(sensitivity, average_bits=average)
        assert best.omega <= found.omega
        assert found.bound is None
        assert found.gap is None
        same_size = tq.solve(sensitivity, max_size_mib=best.size_mib)
        on_front = front.omega[np.searchsorted(front.size_bytes, best.size_bytes, side="right") - 1]
        assert same_size.omega == pytest.approx(on_front, rel=1e-9)
    pareto = tq.frontier(sensitivity, solver="pareto")
    best_of_size = front.omega[np.searchsorted(front.size_bytes, pareto.size_bytes, side="right") - 1]
    assert (pareto.omega >= best_of_size * (1 - 1e-9)).all()


def test_frontier_is_a_sequence() -> None:
    front = tq.frontier(make(5, 3))
    assert len(front) == len(list(front)) == len(front.size_bytes)
    assert front[-1] == list(front)[-1]
    assert front[:3] == [front[0], front[1], front[2]]
    with pytest.raises(IndexError):
        front[len(front)]
    assert str(len(front)) in repr(front)


def test_a_frontier_too_large_for_memory_is_refused() -> None:
    """Two sizes without a common measure."""
    units = [Unit("a", (1, 2), (0, 10**10), (1.0, 0.0)), Unit("b", (1, 2), (0, 10**10 + 1), (1.0, 0.0))]
    with pytest.raises(BudgetError, match='solver="pareto"'):
        dynamic.exact_frontier(units)


# Prices and reasons


def test_price_is_the_slope_of_the_frontier() -> None:
    sensitivity = big(120)
    plan = tq.solve(sensitivity, max_size_mib=0.03)
    assert plan.prices.keys() == {"size"}
    step = 300 / MIB
    wider = tq.solve(sensitivity, max_size_mib=0.03 + step)
    narrower = tq.solve(sensitivity, max_size_mib=0.03 - step)
    slope = (narrower.omega - wider.omega) / (2 * step)
    assert plan.prices["size"] == pytest.approx(slope, rel=0.1)
    (rate,) = exchange_rates(plan)
    assert re.match(r"0\.\d+ MiB more would take about [\d.]+% off the total Ω", rate)


def test_why_sets_a_step_beside_the_price() -> None:
    sensitivity = big()
    tight = tq.solve(sensitivity, average_bits=3, max_bops_g=0.003)
    assert {"weight_bits", "bops"} >= tight.prices.keys() != set()
    rows = explain(sensitivity, tight).rows
    assert any("the same spent on other layers takes off" in row.why for row in rows)
    assert any("input: " in row.why and "G BOPs" in row.why for row in rows)
    free = tq.solve(sensitivity, average_bits=3, solver="pareto")
    assert not any("other layers" in row.why for row in explain(sensitivity, free).rows)
    assert exchange_rates(free) == []


def test_huge_limits_say_that_they_are_above_everything() -> None:
    for limits in ({"max_size_mib": 1e300}, {"compression": 1e-300}, {"max_bops_g": 1e300, "average_bits": 31}):
        with pytest.warns(UserWarning, match="above the largest plan"):
            plan = tq.solve(make(4, 0), **limits)  # type: ignore[arg-type]
        assert set(plan.weight_bits.values()) == {8}


def test_layers_without_any_sensitivity_take_the_least_perturbation() -> None:
    """Traces of zero, as dead layers leave: all plans have Ω 0, and bytes go where ‖ΔW‖² says."""
    sensitivity = make(5, 0)
    nothing = {name: dict.fromkeys(options, 0.0) for name, options in sensitivity.weight_omega.items()}
    by_perturbation = replace(sensitivity, weight_omega=sensitivity.weight_errors)
    plan = tq.solve(replace(sensitivity, weight_omega=nothing), average_bits=5)
    assert plan.weight_bits == tq.solve(by_perturbation, average_bits=5).weight_bits
    assert plan.gap == 0.0


# Limits that cannot be met


UNITS = {
    "max_size_mib": r"([\d.]+) MiB",
    "compression": r"([\d.]+)x",
    "average_bits": r"([\d.]+) bits",
    "max_bops_g": r"([\d.]+) G BOPs",
    "max_latency_ms": r"([\d.]+) ms",
    "average_activation_bits": r"([\d.]+) bits for",
    "activation_compression": r"([\d.]+)x for",
    "max_activation_mib": r"([\d.]+) MiB at",
}


@pytest.mark.parametrize("name", list(UNITS))
@pytest.mark.parametrize("seed", range(3))
def test_nearest_limit_is_named_and_then_accepted(name: str, seed: int) -> None:
    sensitivity = make(6, seed, activation_bits=(3, 5, 7))
    latency = latency_table(sensitivity, seed)
    others = {"average_bits": 4.0} if name in ACTIVATION_LIMITS else {}
    impossible = 1e4 if "compression" in name else 1e-7
    with pytest.raises(BudgetError, match="no plan fits the budget") as refused:
        tq.solve(sensitivity, latency=latency, **others, **{name: impossible})  # type: ignore[arg-type]
    nearest = float(re.findall(UNITS[name], str(refused.value).split(";")[0])[-1])

    plan = tq.solve(sensitivity, latency=latency, **others, **{name: nearest})  # type: ignore[arg-type]

    assert plan.gap == 0.0
    worse = nearest * (1.1 if "compression" in name else 0.9)
    with pytest.raises(BudgetError):
        tq.solve(sensitivity, latency=latency, **others, **{name: worse})  # type: ignore[arg-type]


def test_all_limits_that_cannot_be_met_are_named() -> None:
    with pytest.raises(BudgetError) as refused:
        tq.solve(make(4, 0), average_bits=1.5, max_bops_g=1e-9, max_size_mib=1.0)
    message = str(refused.value)
    assert "at most 1.5 bits on average" in message
    assert "at most 1e-09 G BOPs" in message
    assert "1 MiB" not in message
    assert "2.000 bits" in message


def test_limits_that_conflict_name_the_nearest_of_each() -> None:
    """Hardware on which 2 bits are slower than 8: a small file and a fast one exclude each other."""
    sensitivity = make(4, 5, (2, 8), ())
    latency = {name: {2: {32: 2.0}, 8: {32: 1.0}} for name in sensitivity.weight_omega}
    with pytest.raises(BudgetError, match="can each be met, but not together") as refused:
        tq.solve(sensitivity, average_bits=2.5, max_latency_ms=4.0, latency=latency)
    bits = float(re.findall(r"on average, ([\d.]+) bits", str(refused.value))[-1])
    milliseconds = float(re.findall(r"ms, ([\d.]+) ms", str(refused.value))[-1])

    assert bits == 8.0
    assert tq.solve(sensitivity, average_bits=bits, max_latency_ms=4.0, latency=latency).average_bits == 8.0
    assert tq.solve(sensitivity, average_bits=2.5, max_latency_ms=milliseconds, latency=latency).average_bits <= 2.5


def test_rules_that_leave_nothing_are_refused() -> None:
    sensitivity = make(3, 0, activation_bits=(4, 8))
    falling = sorted(sensitivity.average_traces, key=sensitivity.average_traces.__getitem__, reverse=True)
    against = dict(zip(falling, (2, 3, 4), strict=True))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"fixed_bits": {"x*": 4}}, r"fixed_bits pattern 'x\*' matches no layer; there are l0, l1, l2"),
        ({"fixed_bits": {"l1": 5}}, r"fixed_bits of 'l1' leaves layer l1 no bit width: .*\[2, 3, 4, 8\]"),
        ({"min_bits": {"*": 4}, "allowed_bits": {"l2": [2, 3]}}, "allowed_bits of 'l2' leaves layer l2"),
        ({"allowed_activation_bits": {"l1": [6]}}, "leaves activation l1 no bit width"),
        ({"space": "monotone", "fixed_bits": against}, "no plan keeps to the monotone space"),
    ]
    for keywords, message in cases:
        with pytest.raises(BudgetError, match=message):
            tq.solve(sensitivity, average_bits=4, **keywords)


def test_rules_hold() -> None:
    sensitivity = make(6, 2, activation_bits=(4, 6, 8))
    plan = tq.solve(
        sensitivity,
        average_bits=4.5,
        fixed_bits={"l0": 8},
        min_bits={"l[1-3]": 3},
        allowed_bits={"*": (2, 4, 8)},
        allowed_activation_bits={"*": (4, 6)},
    )
    assert plan.weight_bits["l0"] == 8
    assert all(plan.weight_bits[f"l{i}"] >= 4 for i in (1, 2, 3))
    assert set(plan.weight_bits.values()) <= {2, 4, 8}
    inputs = {p.name: p.is_model_input for p in sensitivity.points.activations}
    assert all(bits == (8 if inputs[name] else 6) for name, bits in plan.activation_bits.items())


def test_latency_without_an_entry_is_refused_by_name() -> None:
    sensitivity = make(3, 0)
    with pytest.raises(BudgetError, match="needs a table of milliseconds"):
        tq.solve(sensitivity, max_latency_ms=1.0)
    table = latency_table(sensitivity, 0)
    del table["l1"][3]
    with pytest.raises(BudgetError, match=r"no entry for layer l1 at 3 weight bits with an input of \d bits; it has"):
        tq.solve(sensitivity, max_latency_ms=100.0, latency=table)
    assert tq.solve(sensitivity, max_latency_ms=18.0, latency=table, allowed_bits={"l1": [2, 4, 8]}).gap == 0.0
    del table["l1"]
    with pytest.raises(BudgetError, match="the latency table has no layer l1; it has l0, l2"):
        tq.solve(sensitivity, max_latency_ms=100.0, latency=table)


def test_peak_activation_memory_is_kept() -> None:
    sensitivity = make(6, 0, activation_bits=(4, 6, 8))
    largest = max(point.numel for point in sensitivity.points.activations if not point.is_model_input)
    limit = largest * 6 / 8
    plan = tq.solve(sensitivity, average_bits=4, max_activation_mib=limit / MIB)
    assert cost.peak_activation_bytes(sensitivity.points, plan.activation_bits) <= limit
    assert min(plan.activation_bits.values()) == 6
    assert "no activation above" in plan.budget


def test_a_plan_saved_before_bounds_existed_still_loads() -> None:
    document = tq.solve(make(3, 0), average_bits=4).to_json()
    del document["bound"], document["prices"]
    old = tq.BitPlan.from_json(document)
    assert old.bound is None
    assert old.gap is None


def test_only_the_stray_line_is_kept_off_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with milp.without_stray_lines():
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\nof another thread\n")
    os.write(1, b"afterwards\n")
    assert capfd.readouterr().out == "of another thread\nafterwards\n"
