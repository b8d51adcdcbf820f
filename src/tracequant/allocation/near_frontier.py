"""Plans near the exact frontiers of several criteria: those among which a criterion has to tell good from bad."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tracequant.allocation.solve import solve
from tracequant.core.points import QuantizationPoints
from tracequant.core.sensitivity import Sensitivity

# The most sizes at which plans are drawn, spread geometrically: each bit more divides what rounding costs. There are
# fewer where each would have less than so many plans to rank.
SIZES = 5
PLANS_OF_SIZE = 8
# The most units that are moved by one width; the sizes of plans that were moved differ by no more than this share.
MOST_MOVES = 4
SAME_SIZE = 0.02
# Draws that are tried for one plan before its criterion's turn passes.
TRIES = 40


@dataclass(frozen=True)
class DrawnPlan:
    """A plan with bits out of `offered` near the one that is optimal by all `criteria` at `average_bits`.

    `moved` units have other bits than that one.
    """

    offered: tuple[int, ...]
    average_bits: float
    criteria: tuple[str, ...]
    moved: int
    weight_bits: dict[str, int]


def plans_near_frontiers(
    tables: Mapping[str, Sensitivity], offered: Sequence[int], count: int, seed: int
) -> list[DrawnPlan]:
    """Up to `count` different plans with bits out of `offered`, in turn at each of up to five sizes.

    The first ones of a size are the optimal plans by each criterion of `tables`. The others are these with up to
    four units (ties together) moved by one width each, at equal size to 2 % where that is possible. Of 40 plans and
    more, a larger `count` begins with the same ones. There are fewer than `count` where the network has no more.
    """
    bits = tuple(sorted(set(offered)))
    low, high = bits[0], bits[-1]
    steps = min(SIZES, max(1, count // PLANS_OF_SIZE)) if high > low else 1
    sizes = [low * (high / low) ** ((index + 0.5) / steps) for index in range(steps)]
    streams = [_plans_of_size(tables, bits, size, random.Random(f"{seed} {bits} {size:.6f}")) for size in sizes]
    drawn: list[DrawnPlan] = []
    known: set[tuple[int, ...]] = set()
    while streams and len(drawn) < count:
        for stream in list(streams):
            plan = next((p for p in stream if tuple(p.weight_bits.values()) not in known), None)
            if plan is None:
                streams.remove(stream)
            elif len(drawn) < count:
                drawn.append(plan)
                known.add(tuple(plan.weight_bits.values()))
    return drawn


def _plans_of_size(
    tables: Mapping[str, Sensitivity], offered: tuple[int, ...], size: float, order: random.Random
) -> Iterator[DrawnPlan]:
    """The criteria's optimal plans of this size, then changes of them; the end is where no more are found."""
    optimal: dict[tuple[int, ...], DrawnPlan] = {}
    for criterion, table in tables.items():
        weight_bits = solve(_restricted(table, offered), average_bits=size).weight_bits
        key = tuple(weight_bits.values())
        before = optimal[key].criteria if key in optimal else ()
        optimal[key] = DrawnPlan(offered, size, (*before, criterion), 0, weight_bits)
    yield from optimal.values()
    points = next(iter(tables.values())).points
    known = set(optimal)
    active = list(optimal.values())
    while active:
        for plan in list(active):
            moved = _moved(plan, points, known, order)
            if moved is None:
                active.remove(plan)
            else:
                known.add(tuple(moved.weight_bits.values()))
                yield moved


def _moved(
    plan: DrawnPlan, points: QuantizationPoints, known: set[tuple[int, ...]], order: random.Random
) -> DrawnPlan | None:
    """The plan with some units moved by one width, the nearest in size of those drawn; None if all are `known`."""
    units = points.weight_units
    size = _stored_bits(points, plan.weight_bits)
    best, least = None, math.inf
    for _ in range(TRIES):
        weight_bits = dict(plan.weight_bits)
        chosen = order.sample(units, min(len(units), order.randint(1, MOST_MOVES)))
        for unit in chosen:
            index = plan.offered.index(weight_bits[unit[0]])
            index = min(max(index + order.choice((-1, 1)), 0), len(plan.offered) - 1)
            weight_bits |= dict.fromkeys(unit, plan.offered[index])
        if tuple(weight_bits.values()) in known:
            continue
        distance = abs(_stored_bits(points, weight_bits) / size - 1)
        if distance < least:
            moves = sum(weight_bits[unit[0]] != plan.weight_bits[unit[0]] for unit in units)
            best, least = replace(plan, moved=moves, weight_bits=weight_bits), distance
        if least <= SAME_SIZE:
            break
    return best


def _stored_bits(points: QuantizationPoints, weight_bits: Mapping[str, int]) -> int:
    return sum(points.by_name[name].numel * num_bits for name, num_bits in weight_bits.items())


def _restricted(table: Sensitivity, offered: tuple[int, ...]) -> Sensitivity:
    """The same table with these widths alone."""

    def cut(values: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
        return {name: {b: options[b] for b in offered} for name, options in values.items()}

    return replace(table, weight_omega=cut(table.weight_omega), weight_errors=cut(table.weight_errors))
