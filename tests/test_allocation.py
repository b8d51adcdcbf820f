"""From sensitivities to plans: the search space, the frontier, budgets. All of it without torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracequant as tq
from tracequant.allocation.pareto import Assignment, Unit, pareto_frontier
from tracequant.allocation.space import full_space, monotone_space
from tracequant.core import cost
from tracequant.core.errors import BudgetError, SettingsError
from tracequant.core.plan import MIB, reprice
from tracequant.core.points import ActivationPoint, Layer, QuantizationPoints, StoredTensor
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.weight_grid import WeightGrid

PAPER_BITS = (1, 2, 4, 8)


def make_sensitivity(
    layers: int = 5,
    weight_bits: Sequence[int] = (2, 3, 4, 8),
    activation_bits: Sequence[int] = (4, 8),
    ties: tuple[tuple[str, ...], ...] = (),
    grid: WeightGrid | None = None,
    seed: int = 0,
    activation_numel: float = 64.0,
) -> Sensitivity:
    """A network of linear layers of odd sizes, Ω falling about fourfold with every bit."""
    rng = random.Random(seed)
    names = [f"block{i}.fc" for i in range(layers)]
    shapes = [(rng.randint(1, 30), rng.randint(1, 30)) for _ in names]
    points = QuantizationPoints(
        layers=tuple(
            Layer(name, "Linear", ((name, "weight"),), shape, 0, math.prod(shape), name)
            for name, shape in zip(names, shapes, strict=True)
        ),
        activations=tuple(
            ActivationPoint(name, (name,), activation_numel + 3 * i, i == 0) for i, name in enumerate(names)
        ),
        ties=ties,
        float_tensors=tuple(
            StoredTensor(f"{name}.bias", "F32", (shape[0],)) for name, shape in zip(names, shapes, strict=True)
        ),
        fingerprint="0123456789abcdef",
    )
    traces = {name: 10 ** rng.uniform(-2, 2) for name in names}

    def errors(options: Sequence[int]) -> dict[int, float]:
        return {b: 4.0**-b * rng.uniform(0.8, 1.25) for b in options}

    weight_errors = {name: errors(weight_bits) for name in names}
    activation_errors = {
        point.name: errors((8,) if point.is_model_input else activation_bits)
        for point in points.activations
        if activation_bits
    }
    return Sensitivity(
        points=points,
        weight_omega={name: {b: traces[name] * e for b, e in weight_errors[name].items()} for name in names},
        activation_omega={n: {b: 3 * e for b, e in options.items()} for n, options in activation_errors.items()},
        weight_errors=weight_errors,
        activation_errors=activation_errors,
        average_traces=traces,
        weight_grid=grid or WeightGrid(),
        criterion="trace",
    )


def assignments(units: Sequence[Unit], monotone: bool = False) -> list[Assignment]:
    """Every assignment there is."""
    found = []
    for choice in itertools.product(*(range(len(unit.bits)) for unit in units)):
        bits = [unit.bits[i] for unit, i in zip(units, choice, strict=True)]
        if monotone and any(later > earlier for earlier, later in itertools.pairwise(bits)):
            continue
        total = sum(unit.cost[i] for unit, i in zip(units, choice, strict=True))
        omega = sum(unit.omega[i] for unit, i in zip(units, choice, strict=True))
        found.append(Assignment(choice, total, omega))
    return found


def brute_force_frontier(units: Sequence[Unit], monotone: bool = False) -> list[tuple[int, float]]:
    """(cost, Ω) of the assignments that no other one matches in cost and beats in Ω."""
    frontier: list[tuple[int, float]] = []
    for total, omega in sorted((a.cost, a.omega) for a in assignments(units, monotone)):
        if not frontier or omega < frontier[-1][1] - 1e-12:
            frontier.append((total, omega))
    return frontier


@st.composite
def unit_lists(draw: st.DrawFn, largest: int = 6) -> list[Unit]:
    """Units with odd sizes; Ω on a grid of 1/8, so that sums are exact and ties are common."""
    bits = tuple(sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=3))))
    units = []
    for i in range(draw(st.integers(1, largest))):
        numel = draw(st.integers(1, 50))
        omega = draw(st.lists(st.integers(0, 200), min_size=len(bits), max_size=len(bits)))
        units.append(Unit(f"u{i}", bits, tuple(numel * b for b in bits), tuple(o / 8 for o in sorted(omega)[::-1])))
    return units


# The search space


def test_search_space_of_resnet50_as_in_the_paper() -> None:
    """Appendix B: L = 50, m = 4; 4^50 ≈ 1.3e30 and |B| ≈ 2.3e4."""
    assert monotone_space(50, 4) == 23_426
    assert full_space(50, 4) == 4**50
    assert f"{full_space(50, 4):.1e}" == "1.3e+30"


@pytest.mark.parametrize("options", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6])
def test_space_sizes_against_enumeration(layers: int, options: int) -> None:
    everything = list(itertools.product(range(options), repeat=layers))
    falling = [bits for bits in everything if list(bits) == sorted(bits, reverse=True)]
    assert full_space(layers, options) == len(everything)
    assert monotone_space(layers, options) == len(falling)


# The frontier


@settings(max_examples=150, deadline=None)
@given(units=unit_lists(), group=st.integers(1, 4))
def test_frontier_is_exact_where_nothing_is_dropped(units: list[Unit], group: int) -> None:
    result = pareto_frontier(units, group=group, keep=10**6)
    assert [(a.cost, a.omega) for a in result] == brute_force_frontier(units)


@settings(max_examples=150, deadline=None)
@given(units=unit_lists(), group=st.integers(1, 4))
def test_monotone_frontier_is_exact_where_nothing_is_dropped(units: list[Unit], group: int) -> None:
    result = pareto_frontier(units, monotone=True, group=group, keep=10**6)
    assert [(a.cost, a.omega) for a in result] == brute_force_frontier(units, monotone=True)


@settings(max_examples=60, deadline=None)
@given(
    units=unit_lists(largest=12),
    monotone=st.booleans(),
    options=st.sampled_from([{}, {"keep": 1}, {"keep": 3, "intervals": 1}, {"group": 2, "intervals": 7}]),
)
def test_every_frontier_is_feasible_and_falls(units: list[Unit], monotone: bool, options: dict[str, int]) -> None:
    """With the paper's settings and with settings that drop nearly everything."""
    result = pareto_frontier(units, monotone, **options)

    for assignment in result:
        bits = [unit.bits[i] for unit, i in zip(units, assignment.choice, strict=True)]
        assert assignment.cost == sum(unit.cost[i] for unit, i in zip(units, assignment.choice, strict=True))
        assert assignment.omega == sum(unit.omega[i] for unit, i in zip(units, assignment.choice, strict=True))
        if monotone:
            assert bits == sorted(bits, reverse=True)
    for cheap, dear in itertools.pairwise(result):
        assert cheap.cost < dear.cost
        assert cheap.omega > dear.omega
    assert result[0].cost == sum(unit.cost[0] for unit in units)


@pytest.mark.parametrize("monotone", [False, True])
def test_paper_settings_are_close_to_exact_on_a_deep_network(monotone: bool) -> None:
    """54 layers at a = 5, b = 200, t = 5 against an exact dynamic programme over cost."""
    rng = random.Random(7)
    units = []
    for i in range(54):
        numel = rng.randint(1, 40)
        trace = 10 ** rng.uniform(-2, 2)
        units.append(
            Unit(f"u{i}", PAPER_BITS, tuple(numel * b for b in PAPER_BITS), tuple(trace * 4.0**-b for b in PAPER_BITS))
        )
    result = pareto_frontier(units, monotone)
    budget = 4 * sum(unit.cost[0] for unit in units)
    found = min(a.omega for a in result if a.cost <= budget)

    # best[last option][cost]: least Ω of the units so far; in the full space the last option does not restrict.
    best: dict[tuple[int, int], float] = {(len(PAPER_BITS) - 1, 0): 0.0}
    for unit in units:
        following: dict[tuple[int, int], float] = {}
        for (last, spent), omega in best.items():
            for option in range(last + 1 if monotone else len(PAPER_BITS)):
                key = (option if monotone else last, spent + unit.cost[option])
                if key[1] <= budget:
                    following[key] = min(following.get(key, math.inf), omega + unit.omega[option])
        best = following
    exact = min(best.values())
    # The heuristic ends 2.2 % above the optimum in the full space and on it in the monotone one.
    assert exact * (1 - 1e-9) <= found <= exact * 1.05


def test_monotone_frontier_keeps_partial_plans_that_can_still_take_many_bits() -> None:
    """After two units, bits (8, 1) beat (4, 4) at about the same cost, but only (4, 4) can go on with 4."""
    units = [
        Unit("first", (1, 4, 8), (1, 4, 8), (50.0, 5.0, 0.0)),
        Unit("second", (1, 4, 8), (1, 4, 8), (6.0, 5.0, 0.0)),
        Unit("third", (1, 4, 8), (1, 2, 3), (1000.0, 1.0, 0.0)),
    ]
    result = pareto_frontier(units, monotone=True, group=2, intervals=3, keep=1)
    assert Assignment((1, 1, 1), 10, 11.0) in result


def test_frontier_of_nothing_is_the_empty_assignment() -> None:
    assert pareto_frontier([]) == [Assignment((), 0, 0.0)]


def test_units_may_offer_different_bits() -> None:
    """As activations do: the model's input is offered 8 bits only."""
    units = [Unit("input", (8,), (80,), (1.0,)), Unit("a", (4, 8), (40, 80), (3.0, 1.0))]
    assert [a.choice for a in pareto_frontier(units)] == [(0, 0), (0, 1)]


def test_groups_with_too_many_configurations_are_split() -> None:
    """Eight options for each of twelve layers in one group of twelve would be 7e10 rows."""
    bits = tuple(range(1, 9))
    units = [Unit(f"u{i}", bits, bits, tuple(4.0**-b for b in bits)) for i in range(12)]
    result = pareto_frontier(units, group=12)
    assert result[0].cost == 12
    assert result[-1].cost == 96


# Solving


def plans_by_force(sensitivity: Sensitivity, monotone: bool = False) -> list[dict[str, int]]:
    """All plans that keep to the ties (and, in the monotone space, to the order of average traces of the units)."""
    units = sensitivity.points.weight_units
    offered = sorted(next(iter(sensitivity.weight_omega.values())))

    def trace(unit: tuple[str, ...]) -> float:
        numels = [sensitivity.points.by_name[name].numel for name in unit]
        total = sum(sensitivity.average_traces[name] * n for name, n in zip(unit, numels, strict=True))
        return total / sum(numels)

    plans = []
    for bits in itertools.product(offered, repeat=len(units)):
        ranked = [b for _, b in sorted(zip(map(trace, units), bits, strict=True), reverse=True)]
        if not monotone or ranked == sorted(ranked, reverse=True):
            plans.append({name: b for unit, b in zip(units, bits, strict=True) for name in unit})
    return plans


def omega_of(sensitivity: Sensitivity, bits: dict[str, int]) -> float:
    return math.fsum(sensitivity.weight_omega[name][b] for name, b in bits.items())


def bytes_of(sensitivity: Sensitivity, bits: dict[str, int]) -> int:
    activations = {name: max(options) for name, options in sensitivity.activation_omega.items()}
    return cost.size_bytes(sensitivity.points, bits, activations, sensitivity.weight_grid)


def check_plan(sensitivity: Sensitivity, plan: tq.BitPlan) -> None:
    """A plan's figures agree with its bits."""
    assert list(plan.weight_bits) == [layer.name for layer in sensitivity.points.layers]
    assert plan.size_bytes == cost.size_bytes(
        sensitivity.points, plan.weight_bits, plan.activation_bits, sensitivity.weight_grid
    )
    assert plan.weight_code_bits == sum(
        layer.numel * plan.weight_bits[layer.name] for layer in sensitivity.points.layers
    )
    assert plan.weight_count == sum(layer.numel for layer in sensitivity.points.layers)
    assert plan.average_bits == plan.weight_code_bits / plan.weight_count
    assert plan.compression == 32 / plan.average_bits
    assert plan.size_mib == plan.size_bytes / 2**20
    assert plan.omega == omega_of(sensitivity, plan.weight_bits)
    assert plan.activation_omega == math.fsum(
        sensitivity.activation_omega[name][b] for name, b in plan.activation_bits.items()
    )
    assert plan.fingerprint == sensitivity.points.fingerprint
    assert plan.weight_grid == sensitivity.weight_grid
    for group in sensitivity.points.ties:
        assert len({plan.weight_bits[name] for name in group}) == 1


TIES = (("block1.fc", "block3.fc"),)
VARIANTS = [
    pytest.param((), WeightGrid(), id="plain"),
    pytest.param(TIES, WeightGrid(), id="tied"),
    pytest.param((), WeightGrid(per_channel=False), id="per tensor"),
    pytest.param(TIES, WeightGrid(symmetric=False), id="asymmetric, tied"),
]


@pytest.mark.parametrize(("ties", "grid"), VARIANTS)
@pytest.mark.parametrize("space", ["full", "monotone"])
@pytest.mark.parametrize("method", ["exact", "pareto"])
@pytest.mark.parametrize("seed", range(4))
def test_size_budget_gets_the_best_plan_that_fits(
    ties: tuple[tuple[str, ...], ...], grid: WeightGrid, space: str, method: str, seed: int
) -> None:
    sensitivity = make_sensitivity(ties=ties, grid=grid, seed=seed)
    options = plans_by_force(sensitivity, space == "monotone")
    sizes = [bytes_of(sensitivity, bits) for bits in options]
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        limit = round(min(sizes) + share * (max(sizes) - min(sizes)))

        plan = tq.solve(sensitivity, max_size_mib=limit / MIB, space=space, solver=method)  # type: ignore[arg-type]

        check_plan(sensitivity, plan)
        assert plan.size_bytes <= limit
        assert plan.weight_bits in options
        best = min(omega_of(sensitivity, b) for b, s in zip(options, sizes, strict=True) if s <= limit)
        assert plan.omega == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("ties", [(), TIES])
@pytest.mark.parametrize("space", ["full", "monotone"])
@pytest.mark.parametrize("average", [2.0, 2.5, 3.3, 4.0, 6.1, 8.0])
def test_average_bits_and_compression_get_the_best_plan_that_fits(
    ties: tuple[tuple[str, ...], ...], space: str, average: float
) -> None:
    sensitivity = make_sensitivity(ties=ties, seed=11)
    count = sum(layer.numel for layer in sensitivity.points.layers)
    options = plans_by_force(sensitivity, space == "monotone")

    def code_bits(bits: dict[str, int]) -> int:
        return sum(layer.numel * bits[layer.name] for layer in sensitivity.points.layers)

    plan = tq.solve(sensitivity, average_bits=average, space=space)  # type: ignore[arg-type]
    other = tq.solve(sensitivity, compression=32 / average, space=space)  # type: ignore[arg-type]

    check_plan(sensitivity, plan)
    assert plan.average_bits <= average * (1 + 1e-9)
    assert plan.weight_bits == other.weight_bits
    best = min(omega_of(sensitivity, bits) for bits in options if code_bits(bits) <= average * count * (1 + 1e-12))
    assert plan.omega == pytest.approx(best, rel=1e-12)


def test_an_average_that_is_met_exactly_is_not_lost_to_rounding() -> None:
    """100 weights at 2.3 bits are 230 bits, but 2.3 * 100 is 229.99999999999997 in floating point."""
    names = ("large", "small")
    layers = tuple(
        Layer(name, "Linear", ((name, "weight"),), (1, n), 0, n, None) for name, n in zip(names, (70, 30), strict=True)
    )
    points = QuantizationPoints(layers, (), (), (), "f")
    omega = {name: {2: 1.0, 3: 0.5} for name in names}
    sensitivity = Sensitivity(points, omega, {}, omega, {}, dict.fromkeys(names, 1.0), WeightGrid(), "trace")

    plan = tq.solve(sensitivity, average_bits=2.3)

    assert plan.weight_bits == {"large": 2, "small": 3}
    assert plan.average_bits == 2.3


def test_twelvefold_compression_is_reached_exactly() -> None:
    layer = Layer("a", "Linear", (("a", "weight"),), (2, 100), 0, 200, None)
    other = Layer("b", "Linear", (("b", "weight"),), (1, 100), 0, 100, None)
    points = QuantizationPoints((layer, other), (), (), (), "f")
    omega = {name: {2: 1.0, 4: 0.0} for name in "ab"}
    sensitivity = Sensitivity(points, omega, {}, omega, {}, dict.fromkeys("ab", 1.0), WeightGrid(), "trace")

    plan = tq.solve(sensitivity, compression=12)

    assert plan.weight_bits == {"a": 2, "b": 4}
    assert plan.compression == pytest.approx(12, rel=1e-12)


def test_monotone_plans_follow_the_average_traces() -> None:
    sensitivity = make_sensitivity(layers=12, seed=3)
    order = sorted(sensitivity.average_traces, key=sensitivity.average_traces.__getitem__, reverse=True)
    for average in (2.5, 4, 6):
        plan = tq.solve(sensitivity, average_bits=average, space="monotone")
        bits = [plan.weight_bits[name] for name in order]
        assert bits == sorted(bits, reverse=True)
        assert plan.omega >= tq.solve(sensitivity, average_bits=average).omega


def test_ties_share_bits_and_are_charged_together() -> None:
    ties = (("block0.fc", "block2.fc", "block4.fc"), ("block1.fc", "block5.fc"))
    sensitivity = make_sensitivity(layers=7, ties=ties, seed=5)
    seen = set()
    for plan in tq.frontier(sensitivity):
        check_plan(sensitivity, plan)
        seen.add(tuple(plan.weight_bits.values()))
    assert len(seen) > 10
    assert any(len(set(bits)) > 1 for bits in seen)


@pytest.mark.parametrize("space", ["full", "monotone"])
def test_frontier_plans_are_ordered_and_solve_picks_from_them(space: str) -> None:
    sensitivity = make_sensitivity(layers=8, seed=2)
    plans = tq.frontier(sensitivity, space=space)  # type: ignore[arg-type]

    for plan in plans:
        check_plan(sensitivity, plan)
    for small, large in itertools.pairwise(plans):
        assert small.size_bytes < large.size_bytes
        assert small.omega > large.omega
    # Rows are padded to 32 bits, so that a short row has more bits for the same bytes.
    assert plans[0].size_bytes == tq.uniform_plan(sensitivity, 2).size_bytes
    assert plans[-1].omega == tq.uniform_plan(sensitivity, 8).omega
    middle = plans[len(plans) // 2]
    chosen = tq.solve(sensitivity, max_size_mib=middle.size_mib, space=space)  # type: ignore[arg-type]
    assert chosen.weight_bits == middle.weight_bits


def test_uniform_plan_has_the_same_bits_everywhere() -> None:
    sensitivity = make_sensitivity(ties=TIES)
    for num_bits in (2, 3, 4, 8):
        plan = tq.uniform_plan(sensitivity, num_bits)
        check_plan(sensitivity, plan)
        assert set(plan.weight_bits.values()) == {num_bits}
        assert plan.average_bits == num_bits
        assert plan.solver == "uniform"
    with pytest.raises(BudgetError, match=re.escape("measured at [2, 3, 4, 8] bits, not at 5")):
        tq.uniform_plan(sensitivity, 5)


def test_plan_says_what_it_is() -> None:
    plan = tq.solve(make_sensitivity(), average_bits=4)
    assert plan.budget == "at most 4 bits on average"
    assert "full" in plan.solver
    assert "bits on average" in plan.summary
    assert "MiB" in plan.summary


def test_printed_plan_shows_layers_bits_and_reasons() -> None:
    sensitivity = make_sensitivity(ties=TIES)
    plan = tq.solve(sensitivity, average_bits=5, fixed_bits={"block0.fc": 4})
    lines = str(plan).split("\n")
    assert lines[0] == plan.summary
    assert lines[1].startswith("In float: ")  # biases have more than a twentieth of the parameters
    assert lines[2].split() == ["layer", "bits", "why"]
    for line, (name, num_bits) in zip(lines[3:], plan.weight_bits.items(), strict=False):
        assert line.split()[:2] == [name, str(num_bits)]
        assert line.endswith(plan.reasons[name])
    assert plan.reasons["block0.fc"].startswith("only 4 bits allowed; trace ")
    assert lines[-1] == "inputs of layers: 5 at 8 bits"
    ((tied, other), *_) = sensitivity.points.ties
    assert f"tied to {other}" in plan.reasons[tied]
    assert "only" not in plan.reasons[tied]
    # The step that a reason tells of is one of the whole tie, in the weights' Ω.
    table, now = sensitivity.weight_omega, plan.weight_bits[tied]
    more = min(b for b in table[tied] if b > now)
    change = sum(table[name][more] - table[name][now] for name in (tied, other)) / plan.omega
    told = re.search(rf"([+-][\d.e-]+)% at {more} bits", plan.reasons[tied])
    assert told is not None
    assert float(told[1]) == pytest.approx(100 * change, abs=0.5, rel=0.05)


def test_printed_plan_fits_a_screen() -> None:
    plan = tq.solve(make_sensitivity(layers=200), average_bits=4)
    lines = str(plan).split("\n")
    assert len(lines) <= 35
    assert max(map(len, lines[1:])) <= 100
    shown = len(lines) - 5  # the summary, what stays in float, the head, the line that says how many more, the inputs
    assert f"... {200 - shown} more" in lines[-2]
    assert len(plan.reasons) == 200


def test_reasons_make_no_other_plan_and_old_files_load(tmp_path: Path) -> None:
    plan = tq.solve(make_sensitivity(), average_bits=4)
    document = plan.to_json()
    del document["reasons"]
    old = tq.BitPlan.from_json(document)
    assert old == plan
    assert "block0.fc" in str(old)
    plan.save(tmp_path / "plan.json")
    assert tq.BitPlan.load(tmp_path / "plan.json").reasons == plan.reasons


def test_explanation_has_a_row_for_every_layer_and_prints() -> None:
    sensitivity = make_sensitivity()
    plan = tq.solve(sensitivity, average_bits=4)
    explanation = tq.explain(sensitivity, plan)
    lines = str(explanation).split("\n")
    assert [row.name for row in explanation.rows] == list(plan.weight_bits)
    for line, row in zip(lines[1:], explanation.rows, strict=False):
        assert line.split()[:2] == [row.name, str(plan.weight_bits[row.name])]
        assert line.endswith(row.why)
    (rate,) = explanation.rates
    assert lines[-1] == rate


# Plans that are edited


def test_an_edited_plan_is_priced_anew() -> None:
    sensitivity = make_sensitivity()
    plan = tq.solve(sensitivity, average_bits=4, average_activation_bits=6)
    edited = plan.with_bits({"block[12].*": 2, "block2.fc": 3}, sensitivity, activation_bits={"block4*": 4})
    assert edited.weight_bits == plan.weight_bits | {"block1.fc": 2, "block2.fc": 3}
    assert edited.activation_bits == plan.activation_bits | {"block4.fc": 4}
    check_plan(sensitivity, edited)
    raw = dataclasses.replace(plan, weight_bits=edited.weight_bits, activation_bits=edited.activation_bits)
    assert edited == dataclasses.replace(reprice(sensitivity, raw), solver="edited", bound=None, prices={})
    assert (edited.solver, edited.bound, edited.gap, edited.prices) == ("edited", None, None, {})
    assert edited.budget == plan.budget
    assert [name for name, why in edited.reasons.items() if why.startswith("edited; ")] == ["block1.fc", "block2.fc"]
    everything = plan.with_bits({"*": 4}, sensitivity)
    changed = {name for name, num_bits in plan.weight_bits.items() if num_bits != 4}
    assert {name for name, why in everything.reasons.items() if why.startswith("edited")} == changed != set()
    assert everything.size_bytes == tq.uniform_plan(sensitivity, 4).size_bytes
    # The model's input keeps its 8 bits.
    assert plan.with_bits({}, sensitivity, activation_bits={"*": 4}).activation_bits["block0.fc"] == 8


def test_ties_hold_in_an_edited_plan() -> None:
    sensitivity = make_sensitivity(ties=TIES)
    plan = tq.solve(sensitivity, average_bits=4)
    ((tied, other), *_) = sensitivity.points.ties
    others = [b for b in (2, 3, 4, 8) if b != plan.weight_bits[tied]]
    with pytest.raises(BudgetError, match=f"tied layers have the same bits.*{tied}: {others[0]}"):
        plan.with_bits({tied: others[0]}, sensitivity)
    assert plan.with_bits({tied: others[0], other: others[0]}, sensitivity).weight_bits[other] == others[0]
    by_hand = dataclasses.replace(plan, weight_bits=plan.weight_bits | {tied: others[0]})
    with pytest.raises(BudgetError, match="tied layers have the same bits"):
        reprice(sensitivity, by_hand)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"weight_bits": {"Block1.fc": 4}}, "weight_bits pattern 'Block1.fc' matches no layer; there are block0.fc"),
        ({"weight_bits": {"block1.fc": 5}}, "layer block1.fc 5 bits, sensitivities cover [2, 3, 4, 8] bits"),
        (
            {"weight_bits": {}, "activation_bits": {"block0.fc": 4}},
            "activation_bits pattern 'block0.fc' matches no activation; there are block1.fc",
        ),
        (
            {"weight_bits": {}, "activation_bits": {"block1.fc": 2}},
            "activation block1.fc 2 bits, sensitivities cover [4, 8]",
        ),
    ],
)
def test_edits_that_are_refused(edit: dict[str, dict[str, int]], message: str) -> None:
    sensitivity = make_sensitivity()
    plan = tq.solve(sensitivity, average_bits=4)
    with pytest.raises(BudgetError, match=re.escape(message)):
        plan.with_bits(sensitivity=sensitivity, **edit)


def test_a_plan_is_edited_with_its_own_sensitivity() -> None:
    sensitivity = make_sensitivity()
    plan = tq.solve(sensitivity, average_bits=4)
    other = dataclasses.replace(sensitivity, points=dataclasses.replace(sensitivity.points, fingerprint="another"))
    with pytest.raises(BudgetError, match=r"fingerprint 0123456789abcdef, the sensitivity for one of another"):
        plan.with_bits({"*": 4}, other)


def test_inputs_that_share_the_bits_of_weights_follow_an_edit() -> None:
    sensitivity = dataclasses.replace(make_sensitivity(activation_bits=(2, 3, 4, 8)), same_bits=True)
    table = {name: {b: 1.0 / b for b in (2, 3, 4, 8)} for name in sensitivity.activation_omega}
    sensitivity = dataclasses.replace(sensitivity, activation_omega=table)
    plan = tq.solve(sensitivity, average_bits=4)
    edited = plan.with_bits({"block2.fc": 2, "block0.fc": 3}, sensitivity)
    assert edited.activation_bits == edited.weight_bits == plan.weight_bits | {"block2.fc": 2, "block0.fc": 3}
    first, second, *rest = sensitivity.points.layers
    shared = dataclasses.replace(
        sensitivity,
        points=dataclasses.replace(
            sensitivity.points, layers=(first, dataclasses.replace(second, activation=first.name), *rest)
        ),
    )
    plan = tq.solve(shared, average_bits=4)
    other = 2 if plan.weight_bits[first.name] != 2 else 3
    with pytest.raises(BudgetError, match="layers that read one input have its bits"):
        plan.with_bits({first.name: other}, shared)


def test_inputs_that_share_the_bits_of_weights_have_none_of_their_own() -> None:
    """Bits for the input that are not those of the weight are refused, also where the weight's are edited as well."""
    sensitivity = dataclasses.replace(make_sensitivity(activation_bits=(2, 3, 4, 8)), same_bits=True)
    table = {name: {b: 1.0 / b for b in (2, 3, 4, 8)} for name in sensitivity.activation_omega}
    sensitivity = dataclasses.replace(sensitivity, activation_omega=table)
    plan = tq.uniform_plan(sensitivity, 8)
    for weight_bits in ({}, {"block1.fc": 3}):
        with pytest.raises(BudgetError, match=r"layer block1.fc would have [83] and its input block1.fc 4;"):
            plan.with_bits(weight_bits, sensitivity, activation_bits={"block1.fc": 4})
    agreed = plan.with_bits({"block1.fc": 4}, sensitivity, activation_bits={"block1.fc": 4})
    assert agreed == plan.with_bits({"block1.fc": 4}, sensitivity)
    assert agreed.activation_bits["block1.fc"] == 4


def test_solve_is_a_function_of_its_arguments() -> None:
    first, second = make_sensitivity(layers=20), make_sensitivity(layers=20)
    assert tq.solve(first, average_bits=3.7) == tq.solve(second, average_bits=3.7)
    assert first == second


def test_a_frontier_refuses_fields_that_it_cannot_keep_to() -> None:
    sensitivity = make_sensitivity()
    with pytest.raises(BudgetError, match="by criterion 'trace', the plan was asked for by 'l2'"):
        tq.frontier(sensitivity, criterion="l2")
    with pytest.raises(BudgetError, match=r"a frontier has plans of every size: leave out max_accuracy_drop$"):
        tq.frontier(sensitivity, max_accuracy_drop=1)


# Activations


def test_activations_take_the_most_bits_they_are_offered() -> None:
    sensitivity = make_sensitivity(activation_bits=(3, 5, 7))
    plan = tq.solve(sensitivity, average_bits=4)
    assert plan.activation_bits == {
        name: 8 if name == "block0.fc" else 7 for name in sensitivity.activation_omega
    }  # fmt: skip
    assert tq.solve(make_sensitivity(activation_bits=()), average_bits=4).activation_bits == {}


@pytest.mark.parametrize("average", [4.9, 5.0, 6.0, 7.5, 8.0, 20.0])
def test_average_activation_bits_get_the_best_that_fits(average: float) -> None:
    sensitivity = make_sensitivity(activation_bits=(4, 6, 8))
    numel = {point.name: point.numel for point in sensitivity.points.activations}
    names = list(sensitivity.activation_omega)

    plan = tq.solve(sensitivity, average_bits=4, average_activation_bits=average)

    check_plan(sensitivity, plan)
    spent = sum(numel[name] * plan.activation_bits[name] for name in names)
    assert spent <= average * sum(numel.values())
    assert plan.activation_bits["block0.fc"] == 8
    best = math.inf
    for bits in itertools.product(*(sensitivity.activation_omega[name] for name in names)):
        chosen = dict(zip(names, bits, strict=True))
        if sum(numel[name] * b for name, b in chosen.items()) <= average * sum(numel.values()):
            best = min(best, math.fsum(sensitivity.activation_omega[name][b] for name, b in chosen.items()))
    assert plan.activation_omega == pytest.approx(best, rel=1e-12)
    assert tq.frontier(sensitivity, average_activation_bits=average)[0].activation_bits == plan.activation_bits
    assert tq.uniform_plan(sensitivity, 4, average_activation_bits=average).activation_bits == plan.activation_bits


@pytest.mark.parametrize("numel", [64.0, 7.0, 1000.0, 33.3, 0.4])
def test_impossible_activation_average_names_one_that_works(numel: float) -> None:
    """`numel` is a mean over inputs, which need not be whole."""
    sensitivity = make_sensitivity(activation_numel=numel)
    for bad in (-1.0, math.nan):
        with pytest.raises(SettingsError, match=r"average_activation_bits must be a (finite )?number > 0"):
            tq.solve(sensitivity, average_bits=4, average_activation_bits=bad)
    with pytest.raises(BudgetError, match="the model's input keeps 8") as refused:
        tq.solve(sensitivity, average_bits=4, average_activation_bits=0.5)
    least = float(re.search(r"the nearest is ([\d.]+) bits", str(refused.value)).group(1))  # type: ignore[union-attr]

    plan = tq.solve(sensitivity, average_bits=4, average_activation_bits=least)

    assert [b for name, b in plan.activation_bits.items() if name != "block0.fc"] == [4, 4, 4, 4]


@pytest.mark.parametrize("numel", [7.4, 33.3, 0.6])
def test_activation_average_that_a_plan_meets_exactly_is_feasible(numel: float) -> None:
    sensitivity = make_sensitivity(activation_numel=numel, activation_bits=(5,))
    points = sensitivity.points
    exact = cost.average_activation_bits(points, {p.name: 8 if p.is_model_input else 5 for p in points.activations})

    plan = tq.solve(sensitivity, average_bits=4, average_activation_bits=exact)

    assert cost.average_activation_bits(points, plan.activation_bits) <= exact * (1 + 1e-9)


# Budgets that make no sense


def test_at_least_one_budget() -> None:
    with pytest.raises(BudgetError, match="at least one budget: max_size_mib, compression"):
        tq.solve(make_sensitivity())


@pytest.mark.parametrize("budgets", [{}, {"max_size_mib": 1.0, "compression": 8.0}, {"max_bops_g": 1.0}])
def test_appendix_e_takes_exactly_one_budget(budgets: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match=r"exactly one|at least one"):
        tq.solve(make_sensitivity(), solver="pareto", **budgets)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_size_mib", "compression", "average_bits"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_budgets_are_positive_numbers(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=rf"{name} must be a (finite )?number > 0 or None, got (0|-1|nan|inf|-inf)"):
        tq.solve(make_sensitivity(), **{name: value})  # type: ignore[arg-type]


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(SettingsError, match="solver must be 'exact' or 'pareto', got 'greedy'"):
        tq.solve(make_sensitivity(), average_bits=4, solver="greedy")  # type: ignore[arg-type]


SMALL = {"max_size_mib": 1e-5, "compression": 1e3, "average_bits": 0.1}
LARGE = {"max_size_mib": 1e5, "compression": 0.01, "average_bits": 31.0}
KEYWORDS = {"max_size_mib": r"([\d.]+) MiB", "compression": r"([\d.]+)x", "average_bits": r"([\d.]+) bits"}
OFFERS = [(2, 3, 4, 8), (1, 2), (3, 5), (3, 6), (5, 7), (6,), (3,)]


def nearest(message: str, name: str) -> float:
    """The budget that an error names: the last number in the unit that was asked in."""
    return float(re.findall(KEYWORDS[name], message.split(";")[0])[-1])


@pytest.mark.parametrize("weight_bits", OFFERS)
@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_too_small_a_budget_names_the_smallest_which_is_then_accepted(
    name: str, weight_bits: tuple[int, ...], seed: int
) -> None:
    sensitivity = make_sensitivity(layers=9, weight_bits=weight_bits, seed=seed)
    with pytest.raises(BudgetError, match="no plan fits the budget") as refused:
        tq.solve(sensitivity, **{name: SMALL[name]})  # type: ignore[arg-type]
    assert str(list(weight_bits)) in str(refused.value)

    plan = tq.solve(sensitivity, **{name: nearest(str(refused.value), name)})  # type: ignore[arg-type]

    # A byte more than needed may buy one bit somewhere, never more.
    assert plan.size_bytes - tq.uniform_plan(sensitivity, min(weight_bits)).size_bytes <= 4


@pytest.mark.parametrize("weight_bits", OFFERS)
@pytest.mark.parametrize("name", list(LARGE))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_budget_above_the_largest_plan_gives_that_plan_and_a_warning_that_names_it(
    name: str, weight_bits: tuple[int, ...], seed: int
) -> None:
    sensitivity = make_sensitivity(layers=9, weight_bits=weight_bits, seed=seed)
    with pytest.warns(UserWarning, match="above the largest plan, which has") as warned:
        plan = tq.solve(sensitivity, **{name: LARGE[name]})  # type: ignore[arg-type]

    assert len(warned) == 1
    assert warned[0].filename == __file__
    largest = tq.uniform_plan(sensitivity, max(weight_bits))
    assert plan.weight_bits == largest.weight_bits
    assert plan.gap == 0
    named = nearest(str(warned[0].message).partition("which has")[2], name)
    assert tq.solve(sensitivity, **{name: named}).size_bytes <= largest.size_bytes  # type: ignore[arg-type]


def test_rules_that_leave_less_than_the_budget_give_the_largest_plan_and_are_named() -> None:
    sensitivity = make_sensitivity(layers=9)
    with pytest.warns(UserWarning, match=r"above the largest plan that fixed_bits leave, which has 4\.000 bits"):
        plan = tq.solve(sensitivity, average_bits=5, fixed_bits={"*": 4})
    assert set(plan.weight_bits.values()) == {4}


# Saved files and imports


def test_a_saved_sensitivity_answers_like_the_original(tmp_path: Path) -> None:
    sensitivity = make_sensitivity(ties=TIES)
    sensitivity.save(tmp_path / "sensitivity.json")
    plan = tq.solve(sensitivity, average_bits=3.5)
    plan.save(tmp_path / "plan.json")

    assert tq.solve(Sensitivity.load(tmp_path / "sensitivity.json"), average_bits=3.5) == plan
    assert tq.BitPlan.load(tmp_path / "plan.json") == plan


def test_solving_does_not_import_torch(tmp_path: Path) -> None:
    make_sensitivity().save(tmp_path / "sensitivity.json")
    script = f"""
import sys
import tracequant.allocation
assert "torch" not in sys.modules, "import tracequant.allocation"
import tracequant as tq
sensitivity = tq.Sensitivity.load({str(tmp_path / "sensitivity.json")!r})
assert "torch" not in sys.modules, "Sensitivity.load"
plan = tq.solve(sensitivity, average_bits=4)
tq.frontier(sensitivity), tq.uniform_plan(sensitivity, 4)
assert "torch" not in sys.modules, "solve"
print(plan.size_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == tq.solve(make_sensitivity(), average_bits=4).size_bytes
