"""The exact solver and the exact frontier against brute force, for every mix of limits and rules."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tracequant as tq
from tracequant import cost
from tracequant.allocation import dynamic, exact, problem
from tracequant.allocation.pareto import Unit
from tracequant.errors import BudgetError
from tracequant.explain import exchange_rates, explain
from tracequant.plan import MEGABYTE
from tracequant.points import ActivationPoint, Layer, QuantizationPoints, StoredTensor
from tracequant.sensitivity_result import Sensitivity
from tracequant.settings import PlanSettings, WeightGrid

WEIGHT_LIMITS = ("max_size_mb", "compression", "average_bits", "max_bops_g", "max_latency_ms")
ACTIVATION_LIMITS = ("average_activation_bits", "activation_compression", "max_activation_mb")
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
            if request.max_activation_mb is not None:
                bits = [b for b in bits if point.numel * b / 8 <= request.max_activation_mb * MEGABYTE]
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
            "max_size_mb": (first - codes[0] + codes) / MEGABYTE,
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
    layers = draw(st.integers(1, 4 if free_inputs else 8))
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
    if "max_activation_mb" in chosen and sensitivity.points.activations:
        largest = max(point.numel for point in sensitivity.points.activations)
        rules["max_activation_mb"] = largest * rng.choice([4, 6, 8, 8]) / 8 / MEGABYTE
    asked: dict[str, Any] = {}
    # Limits around those of one plan, so that all of them matter.
    everything = Everything(sensitivity, PlanSettings(**rules, **dict.fromkeys(chosen & set(COUPLING), 1.0)))
    if everything.choices:
        plan = rng.randrange(len(everything.choices))
        for name in sorted(chosen & everything.used.keys()):
            used = abs(float(everything.used[name][plan]))
            slack = rng.choice([1.0, 1.02, 1.1, 1.3, 0.9])
            asked[name] = used / slack if "compression" in name else used * slack
    if not asked and "max_activation_mb" not in rules:
        asked["average_bits"] = 4.0
    return sensitivity, PlanSettings(**rules, **asked)


def solve(sensitivity: Sensitivity, request: PlanSettings) -> tq.BitPlan:
    return tq.solve(sensitivity, **{name: getattr(request, name) for name in request.__dataclass_fields__})


@settings(max_examples=400, deadline=None)
@given(requests())
def test_equal_to_brute_force_under_every_mix_of_limits(case: tuple[Sensitivity, PlanSettings]) -> None:
    sensitivity, request = case
    everything = Everything(sensitivity, request)
    try:
        plan = solve(sensitivity, request)
    except BudgetError as error:
        if "above the largest plan" in str(error):
            limits = [name for name in WEIGHT_LIMITS if getattr(request, name) is not None]
            assert all(
                np.max(everything.used[name]) <= getattr(request, name) * (-1 if "compression" in name else 1)
                for name in limits
            )
        else:
            assert not everything.choices or not everything.within().any()
        return
    allowed = np.flatnonzero(everything.within())
    best = everything.omega[allowed].min()
    assert (plan.weight_bits, plan.activation_bits) in [everything.choices[i] for i in allowed]
    assert plan.total_omega == pytest.approx(best, rel=1e-9)
    assert plan.gap == 0.0
    assert plan.bound == plan.total_omega
    if request.max_size_mb is not None:
        size = cost.size_bytes(sensitivity.points, plan.weight_bits, plan.activation_bits, sensitivity.weight_grid)
        assert size == plan.size_bytes <= request.max_size_mb * MEGABYTE + 1e-6


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
    sizes = np.round(everything.used["max_size_mb"] * MEGABYTE).astype(int)
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
