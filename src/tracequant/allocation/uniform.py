"""Uniform plans: the same bits for every layer."""

from __future__ import annotations

from tracequant.allocation.activations import decided_activations
from tracequant.allocation.request import check_request
from tracequant.core.errors import BudgetError
from tracequant.core.plan import BitPlan, priced
from tracequant.core.reasons import in_bits
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings


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
        check_request(request)
        activation_bits = decided_activations(sensitivity, request)
    weight_bits = dict.fromkeys(sensitivity.weight_omega, num_bits)
    return priced(sensitivity, weight_bits, activation_bits, solver="uniform", budget=f"{in_bits(num_bits)} everywhere")


def nearest_uniform(sensitivity: Sensitivity, plan: BitPlan) -> tuple[int, BitPlan]:
    """The offered width at which a uniform plan's file is nearest in size to the plan's, and that uniform plan."""
    offered = sorted({b for options in sensitivity.weight_omega.values() for b in options})
    plans = {b: uniform_plan(sensitivity, b, activation_bits=plan.activation_bits) for b in offered}
    best = min(offered, key=lambda b: abs(plans[b].size_bytes - plan.size_bytes))
    return best, plans[best]
