"""Priced plans: bits with the size and the Ω that they have."""

from __future__ import annotations

import math
from dataclasses import replace

from tracequant.allocation.activations import decided_activations
from tracequant.allocation.request import check
from tracequant.core import cost
from tracequant.core.errors import BudgetError
from tracequant.core.plan import BitPlan
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings


def priced(
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
        omega=math.fsum(sensitivity.weight_omega[name][b] for name, b in weight_bits.items()),
        activation_omega=math.fsum(sensitivity.activation_omega[n][b] for n, b in activation_bits.items()),
        weight_grid=grid,
        fingerprint=points.fingerprint,
        method=method,
        budget=budget,
    )


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
    again = priced(sensitivity, plan.weight_bits, plan.activation_bits, plan.method, plan.budget)
    return replace(again, bound=plan.bound, prices=plan.prices)


def uniform_plan(
    sensitivity: Sensitivity,
    num_bits: int,
    *,
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
    return priced(sensitivity, weight_bits, activation_bits, "uniform", f"{num_bits} bits everywhere")
