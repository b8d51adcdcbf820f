"""From sensitivities and a budget to a bit plan. No torch: another budget takes no model and no second of import."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tracequant import cost
from tracequant.allocation.pareto import Assignment, Unit, pareto_frontier
from tracequant.allocation.space import full_space, monotone_space
from tracequant.errors import BudgetError
from tracequant.plan import MEGABYTE, BitPlan
from tracequant.sensitivity_result import Sensitivity

Space = Literal["full", "monotone"]

# How far above the largest plan a budget may be before it is refused: as far as rounding it to a readable number takes
# it.
SLACK = 1e-3

__all__ = ["Budget", "Space", "frontier", "full_space", "monotone_space", "reprice", "solve", "uniform_plan"]


@dataclass(frozen=True)
class Budget:
    """What a plan may cost: exactly one of a file size in MB of 2^20 bytes, a compression of the weights, average bits.

    `compression` and `average_bits` count the weights of the quantized layers only, as the paper's W-Comp does;
    `max_size_mb` counts every byte of the file.
    """

    max_size_mb: float | None = None
    compression: float | None = None
    average_bits: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.max_size_mb, self.compression, self.average_bits) if v is not None]
        if len(given) != 1:
            raise BudgetError(
                "give exactly one budget: max_size_mb (--max-size-mb), compression (--compression) or average_bits"
                f" (--average-bits); got {len(given)}"
            )
        if not (math.isfinite(given[0]) and given[0] > 0):
            raise BudgetError(f"the budget must be a positive number, got {given[0]}")

    def __str__(self) -> str:
        if self.max_size_mb is not None:
            return f"at most {self.max_size_mb:g} MB on disk"
        if self.compression is not None:
            return f"weights compressed at least {self.compression:g}x"
        return f"at most {self.average_bits:g} bits on average"


def solve(
    sensitivity: Sensitivity,
    max_size_mb: float | None = None,
    compression: float | None = None,
    average_bits: float | None = None,
    average_activation_bits: float | None = None,
    method: Literal["pareto"] = "pareto",
    space: Space = "full",
    ranking: dict[str, float] | None = None,
) -> BitPlan:
    """The plan of least Ω within the budget (HAWQ-V2, Section 2.3 and Appendix E).

    Activations take the most bits they are offered, or the plan of least Ω whose average over elements stays within
    `average_activation_bits`. `space` "monotone" keeps to 𝓑: no layer has fewer bits than one of smaller average trace,
    or of smaller `ranking` (a value per layer, such as HAWQ's λ/n) where that is given.

    Raises `BudgetError` if no plan is small enough, naming the smallest, or if even the largest is.
    """
    if method != "pareto":
        raise BudgetError(f"unknown method {method!r}; this version offers 'pareto'")
    budget = Budget(max_size_mb, compression, average_bits)
    units, by_size = _weight_units(sensitivity, budget, space, ranking), budget.max_size_mb is not None
    activation_bits = _activation_plan(sensitivity, average_activation_bits)
    base = _base_bytes(sensitivity, activation_bits)
    if by_size:
        limit = math.floor(budget.max_size_mb * MEGABYTE + 1e-6) - base  # type: ignore[operator]
    else:
        bits = budget.average_bits if budget.compression is None else 32 / budget.compression
        # The slack makes "12x" feasible where 32 / 12 was rounded down.
        limit = math.floor(bits * cost.weight_count(sensitivity.points) * (1 + 1e-12))  # type: ignore[operator]
    smallest, largest = sum(unit.cost[0] for unit in units), sum(unit.cost[-1] for unit in units)
    if limit < smallest or limit > largest * (1 + SLACK) + 1:
        _refuse(sensitivity, budget, base, smallest, largest, too_small=limit < smallest)
    feasible = [a for a in pareto_frontier(units, space == "monotone") if a.cost <= limit]
    return _plan(sensitivity, units, feasible[-1], activation_bits, base, f"pareto, {space} space", str(budget))


def frontier(
    sensitivity: Sensitivity, average_activation_bits: float | None = None, space: Space = "full"
) -> list[BitPlan]:
    """All plans that Appendix E finds not dominated in file size and Ω, by increasing size."""
    units = _weight_units(sensitivity, Budget(max_size_mb=1.0), space, None)
    activation_bits = _activation_plan(sensitivity, average_activation_bits)
    base = _base_bytes(sensitivity, activation_bits)
    return [
        _plan(sensitivity, units, assignment, activation_bits, base, f"pareto, {space} space", "frontier")
        for assignment in pareto_frontier(units, space == "monotone")
    ]


def uniform_plan(sensitivity: Sensitivity, num_bits: int, average_activation_bits: float | None = None) -> BitPlan:
    """Every layer at `num_bits`: the direct quantization that a mixed plan is compared with."""
    offered = sorted({b for options in sensitivity.weight_omega.values() for b in options})
    if num_bits not in offered:
        raise BudgetError(f"sensitivities were measured at {offered} bits, not at {num_bits}")
    units = [Unit(name, (num_bits,), (0,), (omega[num_bits],)) for name, omega in sensitivity.weight_omega.items()]
    activation_bits = _activation_plan(sensitivity, average_activation_bits)
    base = _base_bytes(sensitivity, activation_bits)
    assignment = Assignment((0,) * len(units), 0, math.fsum(unit.omega[0] for unit in units))
    return _plan(sensitivity, units, assignment, activation_bits, base, "uniform", f"{num_bits} bits everywhere")


def reprice(sensitivity: Sensitivity, plan: BitPlan) -> BitPlan:
    """The same bits with size and Ω worked out anew: for a plan whose bits were edited by hand.

    Raises `BudgetError` if the plan does not name exactly the layers that were measured, at bits that were measured.
    """
    for kind, chosen, offered in (
        ("layer", plan.weight_bits, sensitivity.weight_omega),
        ("activation", plan.activation_bits, sensitivity.activation_omega),
    ):
        for name, num_bits in chosen.items():
            if num_bits not in offered.get(name, {}):
                widths = sorted(offered.get(name, {})) or "no"
                raise BudgetError(
                    f"the plan gives {kind} {name} {num_bits} bits, sensitivities cover {widths} bits for it"
                )
        if missing := offered.keys() - chosen.keys():
            raise BudgetError(f"the plan gives no bits to {kind} {min(missing)}")
    base = _base_bytes(sensitivity, plan.activation_bits)
    return _priced(sensitivity, plan.weight_bits, plan.activation_bits, base, plan.method, plan.budget)


def _weight_units(
    sensitivity: Sensitivity, budget: Budget, space: Space, ranking: dict[str, float] | None
) -> list[Unit]:
    """One unit per layer or tie; in the monotone space sorted by rank (average trace), largest first."""
    points, grid = sensitivity.points, sensitivity.weight_grid

    def layer_cost(name: str, num_bits: int) -> int:
        layer = points.by_name[name]
        if budget.max_size_mb is None:
            return layer.numel * num_bits
        return cost.code_bytes(layer, num_bits, grid)

    units = []
    for names in points.weight_units:
        bits = tuple(sorted(sensitivity.weight_omega[names[0]]))
        units.append(
            Unit(
                names[0],
                bits,
                tuple(sum(layer_cost(name, b) for name in names) for b in bits),
                tuple(math.fsum(sensitivity.weight_omega[name][b] for name in names) for b in bits),
            )
        )
    if space == "monotone":
        members = {names[0]: names for names in points.weight_units}
        ranks = sensitivity.average_traces if ranking is None else ranking

        def unit_rank(unit: Unit) -> float:
            layers = [points.by_name[name] for name in members[unit.name]]
            return math.fsum(n.numel * ranks[n.name] for n in layers) / sum(n.numel for n in layers)

        units.sort(key=unit_rank, reverse=True)
    return units


# Activations of different sizes average to a fraction of an element; costs are whole numbers of this part of a bit.
_FINE = 1000


def _activation_plan(sensitivity: Sensitivity, average_bits: float | None) -> dict[str, int]:
    """Bits by activation point: the most that is offered, or the least Ω within an average over elements."""
    if not sensitivity.activation_omega:
        return {}
    points = sensitivity.points.activation_by_name
    units = [
        Unit(
            name,
            tuple(sorted(omega)),
            tuple(round(_FINE * points[name].numel * b) for b in sorted(omega)),
            tuple(omega[b] for b in sorted(omega)),
        )
        for name, omega in sensitivity.activation_omega.items()
    ]
    if average_bits is None:
        return {unit.name: unit.bits[-1] for unit in units}
    total = _FINE * math.fsum(points[unit.name].numel for unit in units)
    smallest = math.ceil(sum(unit.cost[0] for unit in units) / total * 1e3) / 1e3
    feasible = [a for a in pareto_frontier(units) if a.cost <= average_bits * total + len(units)]
    if not feasible:
        raise BudgetError(
            f"activations cannot average {average_bits:g} bits: the least is {smallest:.3f} (the model's input keeps"
            f" 8); ask for at least that, or offer fewer bits with activation_bits (--activation-bits)"
        )
    best = feasible[-1]
    return {unit.name: unit.bits[i] for unit, i in zip(units, best.choice, strict=True)}


def _base_bytes(sensitivity: Sensitivity, activation_bits: dict[str, int]) -> int:
    """The part of the file that no choice of weight bits changes."""
    points, grid = sensitivity.points, sensitivity.weight_grid
    one_bit = {layer.name: 1 for layer in points.layers}
    total = cost.size_bytes(points, one_bit, activation_bits, grid)
    return total - sum(cost.code_bytes(layer, 1, grid) for layer in points.layers)


def _plan(
    sensitivity: Sensitivity,
    units: Sequence[Unit],
    assignment: Assignment,
    activation_bits: dict[str, int],
    base: int,
    method: str,
    budget: str,
) -> BitPlan:
    chosen = {unit.name: unit.bits[i] for unit, i in zip(units, assignment.choice, strict=True)}
    tied = {name: names[0] for names in sensitivity.points.weight_units for name in names}
    bits = {layer.name: chosen.get(layer.name, chosen.get(tied[layer.name], 0)) for layer in sensitivity.points.layers}
    return _priced(sensitivity, bits, activation_bits, base, method, budget)


def _priced(
    sensitivity: Sensitivity,
    bits: dict[str, int],
    activation_bits: dict[str, int],
    base: int,
    method: str,
    budget: str,
) -> BitPlan:
    """The plan for given bits, with its size and Ω; `base` is the part of the file that weight bits do not change."""
    points, grid = sensitivity.points, sensitivity.weight_grid
    return BitPlan(
        weight_bits=bits,
        activation_bits=activation_bits,
        size_bytes=base + sum(cost.code_bytes(layer, bits[layer.name], grid) for layer in points.layers),
        weight_code_bits=cost.weight_bits_total(points, bits),
        weight_count=cost.weight_count(points),
        omega=math.fsum(sensitivity.weight_omega[name][b] for name, b in bits.items()),
        activation_omega=math.fsum(sensitivity.activation_omega[n][b] for n, b in activation_bits.items()),
        weight_grid=grid,
        fingerprint=points.fingerprint,
        method=method,
        budget=budget,
    )


def _refuse(sensitivity: Sensitivity, budget: Budget, base: int, smallest: int, largest: int, too_small: bool) -> None:
    """Raise `BudgetError` in the unit in which the budget was given."""
    count = cost.weight_count(sensitivity.points)
    edge = smallest if too_small else largest
    # Rounded so that the number named is one that is accepted.
    if budget.max_size_mb is not None:
        nearest = f"{math.ceil((base + edge) / MEGABYTE * 1e6) / 1e6:.6f} MB"
    elif budget.compression is not None:
        nearest = f"{math.floor(32 * count / edge * 1e3) / 1e3:.3f}x"
    else:
        nearest = f"{math.ceil(edge / count * 1e3) / 1e3:.3f} bits"
    offered = sorted({b for options in sensitivity.weight_omega.values() for b in options})
    if too_small:
        raise BudgetError(
            f"no plan fits the budget, {budget}: with every layer at its fewest bits of {offered} the smallest is"
            f" {nearest}; ask for that or more room, or offer fewer bits (--bits)"
        )
    raise BudgetError(
        f"the budget, {budget}, is above the largest plan: with every layer at its most bits of {offered} it needs"
        f" {nearest}; ask for less, or offer more bits (--bits)"
    )
