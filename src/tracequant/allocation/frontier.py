"""The frontier: all plans that no other beats in file size or Ω."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tracequant.allocation import dynamic
from tracequant.allocation.activations import decided_activations
from tracequant.allocation.build import build
from tracequant.allocation.limits import base_bytes
from tracequant.allocation.pareto import pareto_frontier, weight_units
from tracequant.allocation.problem import chosen_bits
from tracequant.allocation.request import LOSS_LIMITS, WEIGHT_LIMITS, check_criterion, check_request
from tracequant.core.errors import BudgetError
from tracequant.core.options import resolve, takes
from tracequant.core.plan import BitPlan, priced
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings


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


@takes(PlanSettings)
def frontier(
    sensitivity: Sensitivity,
    settings: PlanSettings | None = None,
    *,
    activation_bits: dict[str, int] | None = None,
    **fields: object,
) -> Frontier:
    """All plans that no other beats in file size or Ω of the weights, by increasing size.

    The rules are those fields of `PlanSettings` that limit no cost of the weights. `solver` "exact" finds every plan by
    dynamic programming over bytes, "pareto" those that Appendix E finds. Activations are as in `solve`, or those of
    `activation_bits`, such as a plan's.

    Raises `BudgetError` as `solve` does, for a limit on the weights or on what a plan loses, and where the exact tables
    would not fit into memory.
    """
    request = resolve(PlanSettings, settings, fields)
    check_criterion(request, sensitivity)
    if limits := [name for name in (*WEIGHT_LIMITS, *LOSS_LIMITS) if getattr(request, name) is not None]:
        raise BudgetError(f"a frontier has plans of every size: leave out {', '.join(limits)}")
    # A size that no plan exceeds: only the file's bytes are wanted, as costs.
    request = replace(request, max_size_mib=1e12)
    check_request(request)
    if activation_bits is None:
        activation_bits = decided_activations(sensitivity, request)
    else:
        sensitivity = replace(
            sensitivity,
            activation_omega={name: {b: sensitivity.activation_omega[name][b]} for name, b in activation_bits.items()},
        )
    problem = build(sensitivity, replace(request, average_activation_bits=None))[0]
    units, members = weight_units(problem)
    label = f"{request.solver}, {request.space} space"
    base = base_bytes(sensitivity)

    def plan(choice: Sequence[int]) -> BitPlan:
        found = [0] * len(problem.decisions)
        for d, option in zip(members, choice, strict=True):
            found[d] = option
        weights, shared = chosen_bits([problem], [found])
        return priced(sensitivity, weights, {**activation_bits, **shared}, solver=label, budget="frontier")

    if request.solver == "exact":
        points = dynamic.exact_frontier(units, request.space == "monotone")
        return Frontier(points.cost + base, points.omega, lambda i: plan(points.choice(i)))
    found = pareto_frontier(units, request.space == "monotone")
    sizes = np.array([assignment.cost + base for assignment in found])
    return Frontier(sizes, np.array([a.omega for a in found]), lambda i: plan(found[i].choice))
