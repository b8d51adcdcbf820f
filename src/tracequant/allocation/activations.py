"""Bits of the activations where no limit couples them with the weights."""

from __future__ import annotations

from tracequant.allocation import exact
from tracequant.allocation.build import build
from tracequant.allocation.problem import chosen_bits
from tracequant.allocation.refuse import refuse
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings


def decided_activations(sensitivity: Sensitivity, request: PlanSettings) -> dict[str, int]:
    """Bits of the activations under a request, where they are decided apart from the weights."""
    if sensitivity.same_bits:
        return {}
    problem = build(sensitivity, request)[1]
    solution = exact.minimise(problem)
    if solution is None:
        refuse(problem)
    return chosen_bits([problem], [solution.choice])[1]
