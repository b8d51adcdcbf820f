"""A request for bits as an optimisation problem: decisions, what their options add up to, and limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

# A sum of floats may exceed a limit by this share of it and still count as equal.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Decision:
    """One choice of bits: for tied weights, for an activation point, or for both where they share their bits."""

    weights: tuple[str, ...]
    activations: tuple[str, ...]
    bits: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Amounts:
    """What a choice adds up to: an amount for each option of each decision, and for each pair of options of two.

    `pairs[i][j, k]` belongs to option j of the first and option k of the second decision of `Problem.pairs[i]`.
    """

    single: tuple[NDArray[Any], ...]
    pairs: tuple[NDArray[Any], ...]

    def total(self, choice: Sequence[int], pairs: Sequence[tuple[int, int]]) -> float:
        """The sum for one option index per decision; exact for whole numbers."""
        terms: list[float] = [amounts[j].item() for amounts, j in zip(self.single, choice, strict=True)]
        terms += [table[choice[d], choice[e]].item() for table, (d, e) in zip(self.pairs, pairs, strict=True)]
        return sum(terms) if all(isinstance(term, int) for term in terms) else math.fsum(terms)

    def least(self) -> float:
        """The sum of the least amounts: no choice has less."""
        total: float = sum(amounts.min().item() for amounts in (*self.single, *self.pairs))
        return total

    def most(self) -> float:
        """The sum of the largest amounts: no choice has more."""
        total: float = sum(amounts.max().item() for amounts in (*self.single, *self.pairs))
        return total


@dataclass(frozen=True, eq=False)
class Limit:
    """A resource that a plan may use up to `bound`, and how to say so in the unit in which it was asked for."""

    name: str
    resource: str
    asked: str
    bound: float
    amounts: Amounts
    price_unit: float
    say: Callable[[float], str]

    def allows(self, amount: float) -> bool:
        """Whether the amount is within the limit; sums of floats are given their rounding."""
        return amount <= self.bound + (ROUNDING * abs(self.bound) if isinstance(amount, float) else 0)


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise `objective` over one option per decision within `limits`.

    Along `chain` (indices of decisions) bits never increase: the space 𝓑 of HAWQ-V2, Section 2.3.
    """

    decisions: tuple[Decision, ...]
    pairs: tuple[tuple[int, int], ...]
    objective: Amounts
    limits: tuple[Limit, ...]
    chain: tuple[int, ...] = ()

    def allows(self, choice: Sequence[int]) -> bool:
        """Whether the choice keeps to the limits and to the chain."""
        bits = [self.decisions[d].bits[choice[d]] for d in self.chain]
        return all(a >= b for a, b in itertools.pairwise(bits)) and all(
            limit.allows(limit.amounts.total(choice, self.pairs)) for limit in self.limits
        )


def chosen_bits(problems: Sequence[Problem], choices: Sequence[Sequence[int]]) -> tuple[dict[str, int], dict[str, int]]:
    """Bits by layer and by activation point, from the option chosen for every decision."""
    weight_bits: dict[str, int] = {}
    activation_bits: dict[str, int] = {}
    for problem, choice in zip(problems, choices, strict=True):
        for decision, option in zip(problem.decisions, choice, strict=True):
            weight_bits |= dict.fromkeys(decision.weights, decision.bits[option])
            activation_bits |= dict.fromkeys(decision.activations, decision.bits[option])
    return weight_bits, activation_bits
