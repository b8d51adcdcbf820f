"""From sensitivities and a budget to a bit plan. No torch: another budget takes no model and no second of import."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from tracequant import cost
from tracequant.allocation import dynamic, problem
from tracequant.allocation.pareto import Unit, pareto_frontier
from tracequant.allocation.problem import Problem
from tracequant.allocation.space import full_space, monotone_space
from tracequant.errors import BudgetError
from tracequant.plan import BitPlan
from tracequant.sensitivity_result import Sensitivity
from tracequant.settings import Latency, PlanSettings

Space = Literal["full", "monotone"]
Method = Literal["exact", "pareto"]

# How far above the largest plan a budget may be before it is refused: as far as rounding it to a readable number takes
# it.
SLACK = 1e-3

__all__ = [
    "Frontier", "Method", "Space", "check", "frontier", "full_space", "monotone_space", "reprice", "solve",
    "uniform_plan",
]  # fmt: skip


def solve(
    sensitivity: Sensitivity,
    max_size_mb: float | None = None,
    compression: float | None = None,
    average_bits: float | None = None,
    average_activation_bits: float | None = None,
    method: Method = "exact",
    space: Space = "full",
    ranking: dict[str, float] | None = None,
    *,
    activation_compression: float | None = None,
    max_activation_mb: float | None = None,
    max_bops_g: float | None = None,
    max_latency_ms: float | None = None,
    latency: Latency | None = None,
    fixed_bits: Mapping[str, int] | None = None,
    min_bits: Mapping[str, int] | None = None,
    allowed_bits: Mapping[str, Iterable[int]] | None = None,
    allowed_activation_bits: Mapping[str, Iterable[int]] | None = None,
) -> BitPlan:
    """The plan of least Ω, of weights and activations together, within all the limits that are given.

    Limits, at least one: `max_size_mb`, every byte of the packed file in MB of 2^20 bytes; `compression` and
    `average_bits` of the weights of quantized layers, the paper's W-Comp; `activation_compression` and
    `average_activation_bits`, over elements for one sample; `max_activation_mb`, the largest tensor that a layer reads,
    for one sample (`cost.peak_activation_bytes`); `max_bops_g`, 10^9 times multiply-accumulates times weight bits times
    activation bits for one sample; `max_latency_ms`, a sum over layers of `latency`, a table layer → weight bits →
    input bits → milliseconds (`read_latency`).

    Bits: `fixed_bits`, `min_bits` and `allowed_bits` go from a shell pattern of layer names to bits, and all rules that
    match a layer hold; `allowed_activation_bits` is for activation points, except the model's input, which keeps its 8
    bits. Activations take the most bits allowed, unless a limit on average activation bits, BOPs or latency makes them
    part of the choice.

    `method` "exact" finds a proven optimum with HiGHS; "pareto" is the search of HAWQ-V2's Appendix E, for one limit on
    size or weight bits. `space` "monotone" keeps to 𝓑 (Section 2.3): no layer has fewer bits than one of smaller
    average trace, or of smaller `ranking` (a value per layer, such as HAWQ's λ/n) where that is given.

    Sensitivities with products between layers (metrics "cross" and "first+cross") are searched from that plan on, by
    changes of one and of two decisions; nothing is proven about the result.

    Raises `BudgetError` if no plan is within the limits, naming the ones that bind and the nearest that can be met, or
    if even the largest plan is.
    """
    request = PlanSettings(
        max_size_mb, compression, average_bits, average_activation_bits, activation_compression, max_activation_mb,
        max_bops_g, max_latency_ms, latency, _plain(fixed_bits), _plain(min_bits), _listed(allowed_bits),
        _listed(allowed_activation_bits), space, method,
    )  # fmt: skip
    from tracequant.allocation import exact  # here: importing scipy.optimize takes half a second

    check(request)
    problems = problem.build(sensitivity, request, ranking)
    choices: list[tuple[int, ...]] = []
    bounds: list[float] = []
    prices: dict[str, float] = {}
    for part in problems:
        if method == "pareto" and any(decision.weights for decision in part.decisions):
            choices.append(_pareto_choice(part))
            continue
        solution = exact.minimise(part)
        if solution is None:
            _refuse(part)
        choices.append(solution.choice)
        bounds.append(solution.bound)
        for limit, price in zip(part.limits, solution.prices, strict=True):
            if price > 0:
                prices[limit.resource] = prices.get(limit.resource, 0.0) + price * limit.price_unit
    _refuse_too_large(problems)
    if sensitivity.interactions is not None:
        from tracequant.allocation import cross

        choices = [
            cross.improve(part, sensitivity, choice) if any(d.weights for d in part.decisions) else choice
            for part, choice in zip(problems, choices, strict=True)
        ]
        bits = _bits(problems, choices)
        asked = problem.describe(request, problems)
        return _priced(sensitivity, *bits, f"{method} and local search, {space} space", asked)
    bits = _bits(problems, choices)
    plan = _priced(sensitivity, *bits, f"{method}, {space} space", problem.describe(request, problems))
    if method == "pareto":
        return plan
    bound = math.fsum(bounds)
    proven = plan.total_omega - bound <= exact.TOLERANCE * abs(plan.total_omega)
    return replace(plan, bound=plan.total_omega if proven else bound, prices=prices)


def check(request: PlanSettings) -> None:
    """Raise `BudgetError` for a request that makes no sense whatever the sensitivities are."""
    if request.by_accuracy:
        problem.check_losses(request)
        return
    problem.check_numbers(request)
    if request.method not in ("exact", "pareto"):
        raise BudgetError(f"unknown method {request.method!r}; choose 'exact' or 'pareto'")
    if request.method == "pareto":
        given = [name for name in problem.WEIGHT_LIMITS if getattr(request, name) is not None]
        if len(given) != 1 or given[0] in ("max_bops_g", "max_latency_ms"):
            raise BudgetError(
                "Appendix E's search (method 'pareto') takes exactly one of max_size_mb, compression and average_bits,"
                f" got {', '.join(given) or 'none'}; leave the method at 'exact'"
            )


class Frontier(Sequence[BitPlan]):
    """All plans of a frontier by increasing size and decreasing Ω; a plan is made when it is asked for.

    `size_bytes` and `omega` (of the weights, and of the inputs where those share the weights' bits) are arrays over all
    of them: an exact frontier may have 100,000 plans.
    """

    def __init__(
        self, size_bytes: NDArray[np.int64], omega: NDArray[np.float64], plan: Callable[[int], BitPlan]
    ) -> None:
        self.size_bytes, self.omega, self._plan = size_bytes, omega, plan

    def __len__(self) -> int:
        return len(self.size_bytes)

    @overload
    def __getitem__(self, index: int) -> BitPlan: ...
    @overload
    def __getitem__(self, index: slice) -> list[BitPlan]: ...
    def __getitem__(self, index: int | slice) -> BitPlan | list[BitPlan]:
        if isinstance(index, slice):
            return [self._plan(i) for i in range(len(self))[index]]
        return self._plan(range(len(self))[index])

    def __iter__(self) -> Iterator[BitPlan]:
        return (self._plan(i) for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Frontier({len(self):,} plans, {self.size_bytes[0]:,} to {self.size_bytes[-1]:,} bytes)"


def frontier(
    sensitivity: Sensitivity,
    average_activation_bits: float | None = None,
    space: Space = "full",
    method: Method = "exact",
    *,
    activation_bits: dict[str, int] | None = None,
    fixed_bits: Mapping[str, int] | None = None,
    min_bits: Mapping[str, int] | None = None,
    allowed_bits: Mapping[str, Iterable[int]] | None = None,
) -> Frontier:
    """All plans that no other beats in file size or Ω of the weights, by increasing size.

    "exact" finds every one of them by dynamic programming over bytes, "pareto" those that Appendix E finds. Activations
    are as in `solve`, or those of `activation_bits`, such as a plan's. Raises `BudgetError` as `solve` does, where the
    exact tables would not fit into memory, and for sensitivities with products between layers.
    """
    if sensitivity.interactions is not None:
        raise BudgetError(
            f"metric {sensitivity.metric!r} has products between layers, which no frontier is known for; take"
            f" {sensitivity.metric.replace('cross', 'quadratic')!r}, or solve for one budget"
        )
    request = PlanSettings(
        # A size that no plan exceeds: only the file's bytes are wanted, as costs.
        max_size_mb=1e12,
        average_activation_bits=average_activation_bits,
        fixed_bits=_plain(fixed_bits),
        min_bits=_plain(min_bits),
        allowed_bits=_listed(allowed_bits),
        space=space,
        method=method,
    )
    check(request)
    if activation_bits is None:
        activation_bits = decided_activations(sensitivity, request)
    else:
        sensitivity = replace(
            sensitivity,
            activation_omega={name: {b: sensitivity.activation_omega[name][b]} for name, b in activation_bits.items()},
        )
    part = problem.build(sensitivity, replace(request, average_activation_bits=None))[0]
    units, members = _units(part)
    label = f"{method}, {space} space"
    base = problem.base_bytes(sensitivity)

    def plan(choice: Sequence[int]) -> BitPlan:
        found = [0] * len(part.decisions)
        for d, option in zip(members, choice, strict=True):
            found[d] = option
        weights, shared = _bits([part], [found])
        return _priced(sensitivity, weights, {**activation_bits, **shared}, label, "frontier")

    if method == "exact":
        points = dynamic.exact_frontier(units, space == "monotone")
        return Frontier(points.cost + base, points.omega, lambda i: plan(points.choice(i)))
    found = pareto_frontier(units, space == "monotone")
    sizes = np.array([assignment.cost + base for assignment in found])
    return Frontier(sizes, np.array([a.omega for a in found]), lambda i: plan(found[i].choice))


def uniform_plan(
    sensitivity: Sensitivity,
    num_bits: int,
    average_activation_bits: float | None = None,
    activation_bits: dict[str, int] | None = None,
) -> BitPlan:
    """Every layer at `num_bits`: the direct quantization that a mixed plan is compared with.

    Activations as in `solve`, or those of `activation_bits`, such as a plan's.
    """
    offered = sorted({b for options in sensitivity.weight_omega.values() for b in options})
    bound_to = sensitivity.activation_omega if sensitivity.same_bits else {}
    if any(num_bits not in options for options in (*sensitivity.weight_omega.values(), *bound_to.values())):
        raise BudgetError(f"sensitivities were measured at {offered} bits, not at {num_bits}")
    if sensitivity.same_bits:
        activation_bits = dict.fromkeys(bound_to, num_bits)
    elif activation_bits is None:
        request = PlanSettings(average_bits=32, average_activation_bits=average_activation_bits)
        check(request)
        activation_bits = decided_activations(sensitivity, request)
    weight_bits = dict.fromkeys(sensitivity.weight_omega, num_bits)
    return _priced(sensitivity, weight_bits, activation_bits, "uniform", f"{num_bits} bits everywhere")


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
    priced = _priced(sensitivity, plan.weight_bits, plan.activation_bits, plan.method, plan.budget)
    return replace(priced, bound=plan.bound, prices=plan.prices)


def _plain(rules: Mapping[str, int] | None) -> dict[str, int] | None:
    return None if rules is None else dict(rules)


def _listed(rules: Mapping[str, Iterable[int]] | None) -> dict[str, tuple[int, ...]] | None:
    return None if rules is None else {pattern: tuple(sorted(bits)) for pattern, bits in rules.items()}


def decided_activations(sensitivity: Sensitivity, request: PlanSettings) -> dict[str, int]:
    """Bits of the activations under a request, where they are decided apart from the weights."""
    if sensitivity.same_bits:
        return {}
    from tracequant.allocation import exact

    part = problem.build(sensitivity, request)[1]
    solution = exact.minimise(part)
    if solution is None:
        _refuse(part)
    return _bits([part], [solution.choice])[1]


def _units(part: Problem) -> tuple[list[Unit], list[int]]:
    """The decisions about weights as units of the frontier searches, in the chain's order, and which they are.

    The cost is that of the problem's one limit on weights.
    """
    if len(part.limits) != 1:
        raise BudgetError(
            "a frontier and Appendix E's search take one limit, on size or weight bits, got"
            f" {', '.join(limit.name for limit in part.limits)}; leave the method at 'exact'"
        )
    (limit,) = part.limits
    members = list(part.chain) or [d for d, decision in enumerate(part.decisions) if decision.weights]
    units = [
        Unit(
            part.decisions[d].weights[0],
            part.decisions[d].bits,
            tuple(int(amount) for amount in limit.amounts.single[d]),
            tuple(float(omega) for omega in part.objective.single[d]),
        )
        for d in members
    ]
    return units, members


def _pareto_choice(part: Problem) -> tuple[int, ...]:
    """The best choice that Appendix E finds within the problem's one limit on weights."""
    units, members = _units(part)
    feasible = [a for a in pareto_frontier(units, bool(part.chain)) if a.cost <= part.limits[0].bound]
    if not feasible:
        _refuse(part)
    found = dict(zip(members, feasible[-1].choice, strict=True))
    return tuple(found.get(d, 0) for d in range(len(part.decisions)))


def _bits(problems: Sequence[Problem], choices: Sequence[Sequence[int]]) -> tuple[dict[str, int], dict[str, int]]:
    """Bits by layer and by activation point, from the option chosen for every decision."""
    weight_bits: dict[str, int] = {}
    activation_bits: dict[str, int] = {}
    for part, choice in zip(problems, choices, strict=True):
        for decision, option in zip(part.decisions, choice, strict=True):
            weight_bits |= dict.fromkeys(decision.weights, decision.bits[option])
            activation_bits |= dict.fromkeys(decision.activations, decision.bits[option])
    return weight_bits, activation_bits


def _priced(
    sensitivity: Sensitivity, weight_bits: dict[str, int], activation_bits: dict[str, int], method: str, budget: str
) -> BitPlan:
    """The plan for given bits, in the model's order, with its size and Ω."""
    points, grid = sensitivity.points, sensitivity.weight_grid
    weight_bits = {layer.name: weight_bits[layer.name] for layer in points.layers}
    activation_bits = {name: activation_bits[name] for name in sensitivity.activation_omega}
    return BitPlan(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        size_bytes=cost.size_bytes(points, weight_bits, activation_bits, grid),
        weight_code_bits=cost.weight_bits_total(points, weight_bits),
        weight_count=cost.weight_count(points),
        omega=math.fsum(sensitivity.weight_omega[name][b] for name, b in weight_bits.items())
        + sensitivity.interaction(weight_bits),
        activation_omega=math.fsum(sensitivity.activation_omega[n][b] for n, b in activation_bits.items()),
        weight_grid=grid,
        fingerprint=points.fingerprint,
        method=method,
        budget=budget,
    )


# Budgets that no plan meets, or every plan


def _refuse_too_large(problems: Sequence[Problem]) -> None:
    """Raise `BudgetError` if the largest plan is within all limits on weights: none of them says anything."""
    limits = [(limit, part) for part in problems for limit in part.limits if limit.name in problem.WEIGHT_LIMITS]
    largest = [limit.amounts.most() for limit, _ in limits]
    idle = [
        limit.bound > most * (1 + SLACK) + (1 if isinstance(most, int) else 0)
        for (limit, _), most in zip(limits, largest, strict=True)
    ]
    if not limits or not all(idle):
        return
    needs = ", ".join(limit.say(most) for (limit, _), most in zip(limits, largest, strict=True))
    asked = ", ".join(limit.asked for limit, _ in limits)
    raise BudgetError(
        f"the budget, {asked}, is above the largest plan: with every layer at its most bits of"
        f" {_offered(limits[0][1])} it needs {needs}; ask for less, or offer more bits (--bits)"
    )


def _refuse(part: Problem) -> NoReturn:
    """Raise `BudgetError` with the limits that cannot be met, alone or together, and the nearest that can."""
    from tracequant.allocation import exact

    if exact.minimise(replace(part, limits=())) is None:
        raise BudgetError(
            "no plan keeps to the monotone space under these rules: a layer of larger average trace may not have fewer"
            " bits than one of smaller; change fixed_bits, min_bits or allowed_bits, or search the full space"
        )
    alone = [exact.nearest(replace(part, limits=(limit,)), limit) for limit in part.limits]
    broken = [
        (limit, least)
        for limit, least in zip(part.limits, alone, strict=True)
        if least is not None and not limit.allows(least)
    ]
    weights = any(decision.weights for decision in part.decisions)
    offer = "--bits" if weights else "--activation-bits"
    if broken:
        asked = ", ".join(limit.asked for limit, _ in broken)
        reached = ", ".join(limit.say(least) for limit, least in broken)
        kept = "" if weights else " (the model's input keeps 8)"
        raise BudgetError(
            f"no plan fits the budget, {asked}: with the fewest bits of {_offered(part)}{kept} the nearest is"
            f" {reached}; ask for that or more room, or offer fewer bits ({offer})"
        )
    ways = []
    for limit in part.limits:
        least = exact.nearest(part, limit)
        if least is not None and not limit.allows(least):
            ways.append(f"instead of {limit.asked}, {limit.say(least)}")
    raise BudgetError(
        f"no plan fits the budget: {', '.join(limit.asked for limit in part.limits)} can each be met, but not together;"
        f" the nearest with the others as they are: {'; or '.join(ways) or 'none by changing a single limit'}"
    )


def _offered(part: Problem) -> list[int]:
    """The weight bits that a problem has on offer; activation bits if it is about those alone."""
    about_weights = any(decision.weights for decision in part.decisions)
    return sorted({b for decision in part.decisions for b in decision.bits if decision.weights or not about_weights})
