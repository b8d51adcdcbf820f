"""Plans near the frontiers: optimal ones first, then moves of one width at equal size."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest

import tracequant as tq
from test_allocation import make_sensitivity
from tracequant.allocation.near_frontier import MOST_MOVES, SIZES, plans_near_frontiers
from tracequant.core.sensitivity import Sensitivity

BITS = (2, 3, 4, 8)


def two_criteria(layers: int = 8, ties: tuple[tuple[str, ...], ...] = ()) -> dict[str, Sensitivity]:
    """Two tables of one network whose optimal plans differ."""
    first = make_sensitivity(layers, BITS, (), ties)
    factors = random.Random(1)
    omega = {name: (factors.uniform(0.1, 10), row) for name, row in first.weight_omega.items()}
    other = {name: {b: factor * value for b, value in row.items()} for name, (factor, row) in omega.items()}
    return {"trace": first, "quadratic": dataclasses.replace(first, weight_omega=other)}


def average(table: Sensitivity, bits: dict[str, int]) -> float:
    numels = {layer.name: layer.numel for layer in table.points.layers}
    return sum(numels[name] * b for name, b in bits.items()) / sum(numels.values())


def test_optimal_plans_come_first_and_the_others_are_near_them() -> None:
    tables = two_criteria()
    drawn = plans_near_frontiers(tables, BITS, 60, seed=0)
    assert len(drawn) == 60
    assert len({tuple(plan.weight_bits.values()) for plan in drawn}) == 60
    sizes = sorted({plan.average_bits for plan in drawn})
    assert len(sizes) == SIZES
    assert sizes[0] > 2
    assert sizes[-1] < 8
    assert max(Counter(plan.average_bits for plan in drawn).values()) == 12
    for size in sizes:
        at = [plan for plan in drawn if plan.average_bits == size]
        optimal = {c: tq.solve(table, average_bits=size).weight_bits for c, table in tables.items()}
        found = {c: plan.weight_bits for plan in at if not plan.moved for c in plan.criteria}
        assert found == optimal
        assert not at[0].moved
        for plan in at:
            base = optimal[plan.criteria[0]]
            changed = {name for name, b in plan.weight_bits.items() if b != base[name]}
            assert len(changed) == plan.moved <= MOST_MOVES
            assert all(abs(BITS.index(plan.weight_bits[n]) - BITS.index(base[n])) == 1 for n in changed)
    near = [abs(average(tables["trace"], p.weight_bits) / p.average_bits - 1) for p in drawn if p.moved]
    assert sorted(near)[len(near) // 2] < 0.03


def test_only_offered_bits_and_ties_kept() -> None:
    ties = (("block0.fc", "block3.fc"), ("block1.fc", "block2.fc", "block6.fc"))
    drawn = plans_near_frontiers(two_criteria(ties=ties), (4, 2), 30, seed=0)
    assert len(drawn) == 30
    assert {b for plan in drawn for b in plan.weight_bits.values()} == {2, 4}
    assert all(len({plan.weight_bits[name] for name in group}) == 1 for plan in drawn for group in ties)


def test_more_plans_begin_with_the_same_and_the_seed_decides() -> None:
    tables = two_criteria()
    some = plans_near_frontiers(tables, BITS, 43, seed=0)
    assert plans_near_frontiers(tables, BITS, 60, seed=0)[:43] == some
    assert plans_near_frontiers(tables, BITS, 43, seed=1) != some
    few = plans_near_frontiers(tables, BITS, 8, seed=0)
    assert {plan.average_bits for plan in few} == {4.0}  # enough of one size to be ranked


@pytest.mark.parametrize(("offered", "most"), [((2, 4), 2**2), ((3,), 1)])
def test_a_small_network_has_no_more_plans(offered: tuple[int, ...], most: int) -> None:
    drawn = plans_near_frontiers(two_criteria(layers=2), offered, 80, seed=0)
    assert 0 < len(drawn) <= most
