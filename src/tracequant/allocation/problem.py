"""A request for bits as an optimisation problem: decisions, what their options add up to, and limits. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracequant import cost
from tracequant.errors import BudgetError
from tracequant.match import match_names
from tracequant.plan import MEGABYTE
from tracequant.points import ActivationPoint, Layer
from tracequant.sensitivity_result import Sensitivity
from tracequant.settings import Latency, PlanSettings

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


def build(sensitivity: Sensitivity, request: PlanSettings, ranking: dict[str, float] | None = None) -> list[Problem]:
    """The problems whose solutions together are the plan: weights and activations apart where no limit couples them.

    Activations have a choice only where a limit concerns them; otherwise they take the most bits that are allowed.
    """
    latency = request.latency if request.latency is not None else sensitivity.latency
    weights, activations = _decisions(sensitivity, request)
    coupled = request.max_bops_g is not None or request.max_latency_ms is not None or sensitivity.same_bits
    if coupled:
        groups = [_share_bits(sensitivity, weights, activations) if sensitivity.same_bits else [*weights, *activations]]
    else:
        groups = [weights, activations]
    problems = []
    for decisions in groups:
        pairs = _pairs(sensitivity, decisions) if coupled else []
        omega = Amounts(
            tuple(np.array([_omega(sensitivity, decision, b) for b in decision.bits]) for decision in decisions),
            tuple(np.zeros((len(decisions[d].bits), len(decisions[e].bits))) for d, e in pairs),
        )
        limits = _limits(sensitivity, request, decisions, pairs, latency)
        chain = _chain(sensitivity, decisions, ranking) if request.space == "monotone" else ()
        problems.append(Problem(tuple(decisions), tuple(pairs), omega, limits, chain))
    return problems


def base_bytes(sensitivity: Sensitivity) -> int:
    """The part of the file that no choice of bits changes."""
    points, grid = sensitivity.points, sensitivity.weight_grid
    one_bit = {layer.name: 1 for layer in points.layers}
    total = cost.size_bytes(points, one_bit, dict.fromkeys(sensitivity.activation_omega, 8), grid)
    return total - sum(cost.code_bytes(layer, 1, grid) for layer in points.layers)


# Which bits


def _decisions(sensitivity: Sensitivity, request: PlanSettings) -> tuple[list[Decision], list[Decision]]:
    points = sensitivity.points
    rules: list[_Rule] = [
        *(("fixed_bits", pattern, {bits}) for pattern, bits in (request.fixed_bits or {}).items()),
        *(("min_bits", pattern, set(range(least, 33))) for pattern, least in (request.min_bits or {}).items()),
        *(("allowed_bits", pattern, set(bits)) for pattern, bits in (request.allowed_bits or {}).items()),
    ]
    offered = _allowed("layer", sensitivity.weight_omega, rules)
    weights = []
    for names in points.weight_units:
        bits = tuple(b for b in offered[names[0]] if all(b in offered[name] for name in names))
        if not bits:
            raise BudgetError(f"layers {', '.join(names)} are tied and have no bits in common: {_each(offered, names)}")
        weights.append(Decision(names, (), bits))

    inputs = {p.name for p in points.activations if p.is_model_input}
    rules = [
        ("allowed_activation_bits", pattern, set(bits))
        for pattern, bits in (request.allowed_activation_bits or {}).items()
    ]
    # The tensor that the caller hands over arrives in its own width, so patterns do not apply to it.
    choosable = {name: omega for name, omega in sensitivity.activation_omega.items() if name not in inputs}
    offered = {
        **{name: tuple(sorted(omega)) for name, omega in sensitivity.activation_omega.items() if name in inputs},
        **_allowed("activation", choosable, rules),
    }
    if request.max_activation_mb is not None:
        offered = _within_peak(sensitivity, offered, request.max_activation_mb)
    limited = (
        request.average_activation_bits,
        request.activation_compression,
        request.max_bops_g,
        request.max_latency_ms,
    )
    if all(limit is None for limit in limited) and not sensitivity.same_bits:
        offered = {name: bits[-1:] for name, bits in offered.items()}
    return weights, [Decision((), (name,), offered[name]) for name in sensitivity.activation_omega]


_Rule = tuple[str, str, set[int]]


def _allowed(kind: str, offered: dict[str, dict[int, float]], rules: Iterable[_Rule]) -> dict[str, tuple[int, ...]]:
    """The bits that sensitivities cover and that every rule with a matching shell pattern allows, by name."""
    left = {name: tuple(sorted(omega)) for name, omega in offered.items()}
    for rule, pattern, keep in rules:
        for name in match_names([pattern], list(left), rule, kind, BudgetError):
            bits = tuple(b for b in left[name] if b in keep)
            if not bits:
                raise BudgetError(
                    f"{rule} of {pattern!r} leaves {kind} {name} no bit width: it has the choice of"
                    f" {list(left[name])}; allow one of them, or measure others (--bits, --activation-bits)"
                )
            left[name] = bits
    return left


def _within_peak(
    sensitivity: Sensitivity, offered: dict[str, tuple[int, ...]], megabytes: float
) -> dict[str, tuple[int, ...]]:
    """The bits at which each activation, for one sample, is no larger than the peak."""
    points = sensitivity.points
    limit = megabytes * MEGABYTE * (1 + ROUNDING)
    least = {name: bits[0] for name, bits in offered.items()}
    peak = cost.peak_activation_bytes(points, least)
    if peak > limit:
        largest = max(points.activations, key=lambda point: point.numel * least.get(point.name, cost.FLOAT_BITS))
        raise BudgetError(
            f"no plan fits the budget, activations of at most {megabytes:g} MB: the input of {largest.name} has"
            f" {largest.numel:,.0f} elements and needs {_ceil(peak / MEGABYTE, 6):.6f} MB at"
            f" {least.get(largest.name, cost.FLOAT_BITS)} bits, its fewest; ask for that or more room, or offer fewer"
            " bits (--activation-bits)"
        )
    numel = {name: points.activation_by_name[name].numel for name in offered}
    return {name: tuple(b for b in bits if numel[name] * b / 8 <= limit) for name, bits in offered.items()}


def _share_bits(
    sensitivity: Sensitivity, weights: Sequence[Decision], activations: Sequence[Decision]
) -> list[Decision]:
    """Decisions merged so that every layer's weight and input have one choice together."""
    merged = [*weights, *activations]
    for layer in sensitivity.points.layers:
        parts = [d for d in merged if layer.name in d.weights or (layer.activation or "") in d.activations]
        if len(parts) < 2:
            continue
        first, second = parts
        bits = tuple(b for b in first.bits if b in second.bits)
        if not bits:
            raise BudgetError(
                f"layer {layer.name} and its input share their bits and have none in common: {list(first.bits)} and"
                f" {list(second.bits)}"
            )
        joined = Decision(first.weights + second.weights, first.activations + second.activations, bits)
        merged = [joined if d is first else d for d in merged if d is not second]
    return merged


def _chain(
    sensitivity: Sensitivity, decisions: Sequence[Decision], ranking: dict[str, float] | None
) -> tuple[int, ...]:
    """Decisions about weights by falling average trace (or `ranking`), weighted by size within a tie."""
    ranks = sensitivity.average_traces if ranking is None else ranking

    def rank(d: int) -> float:
        layers = [sensitivity.points.by_name[name] for name in decisions[d].weights]
        return math.fsum(layer.numel * ranks[layer.name] for layer in layers) / sum(layer.numel for layer in layers)

    return tuple(sorted((d for d, decision in enumerate(decisions) if decision.weights), key=rank, reverse=True))


def _omega(sensitivity: Sensitivity, decision: Decision, bits: int) -> float:
    return math.fsum(
        [sensitivity.weight_omega[name][bits] for name in decision.weights]
        + [sensitivity.activation_omega[name][bits] for name in decision.activations]
    )


def _each(offered: dict[str, tuple[int, ...]], names: Iterable[str]) -> str:
    return "; ".join(f"{name}: {list(offered[name])}" for name in names)


# What options cost


def _pairs(sensitivity: Sensitivity, decisions: Sequence[Decision]) -> list[tuple[int, int]]:
    """Pairs (weights, input) of different decisions that both have a choice and that some layer multiplies."""
    weight_of, input_of = _owners(decisions)
    found: dict[tuple[int, int], None] = {}
    for layer in sensitivity.points.layers:
        d, e = weight_of[layer.name], input_of.get(layer.activation or "")
        if e is not None and d != e and len(decisions[d].bits) > 1 and len(decisions[e].bits) > 1:
            found[d, e] = None
    return list(found)


def _owners(decisions: Sequence[Decision]) -> tuple[dict[str, int], dict[str, int]]:
    return (
        {name: d for d, decision in enumerate(decisions) for name in decision.weights},
        {name: d for d, decision in enumerate(decisions) for name in decision.activations},
    )


def _products(
    sensitivity: Sensitivity,
    decisions: Sequence[Decision],
    pairs: Sequence[tuple[int, int]],
    price: Callable[[Layer, int, int], float],
    dtype: type,
) -> Amounts:
    """Amounts of a resource that depends on the bits of a layer's weight and input together."""
    weight_of, input_of = _owners(decisions)
    single: list[NDArray[Any]] = [np.zeros(len(decision.bits), dtype=dtype) for decision in decisions]
    tables: dict[tuple[int, int], NDArray[Any]] = {
        pair: np.zeros((len(decisions[pair[0]].bits), len(decisions[pair[1]].bits)), dtype) for pair in pairs
    }
    for layer in sensitivity.points.layers:
        d, e = weight_of[layer.name], input_of.get(layer.activation or "")
        if d == e:
            single[d] += [price(layer, b, b) for b in decisions[d].bits]
            continue
        input_bits = (cost.FLOAT_BITS,) if e is None else decisions[e].bits
        table: NDArray[Any] = np.array(
            [[price(layer, w, a) for a in input_bits] for w in decisions[d].bits], dtype=dtype
        )
        if e is not None and (d, e) in tables:
            tables[d, e] += table
        elif len(input_bits) == 1:
            single[d] += table[:, 0]
        else:
            assert e is not None
            single[e] += table[0]
    return Amounts(tuple(single), tuple(tables.values()))


def _limits(
    sensitivity: Sensitivity,
    request: PlanSettings,
    decisions: Sequence[Decision],
    pairs: Sequence[tuple[int, int]],
    latency: Latency,
) -> tuple[Limit, ...]:
    """The limits that concern these decisions."""
    points, grid = sensitivity.points, sensitivity.weight_grid
    flat = tuple(np.zeros((len(decisions[d].bits), len(decisions[e].bits)), dtype=np.int64) for d, e in pairs)

    def of_weights(price: Callable[[Layer, int], int]) -> Amounts:
        return Amounts(
            tuple(
                np.array([sum(price(points.by_name[name], b) for name in decision.weights) for b in decision.bits])
                for decision in decisions
            ),
            flat,
        )

    def of_activations(price: Callable[[ActivationPoint, int], float]) -> Amounts:
        by_name = points.activation_by_name
        return Amounts(
            tuple(
                np.array([math.fsum(price(by_name[n], b) for n in decision.activations) for b in decision.bits])
                for decision in decisions
            ),
            flat,
        )

    found = []
    if any(decision.weights for decision in decisions):
        count = cost.weight_count(points)
        if request.max_size_mb is not None:
            base = base_bytes(sensitivity)
            found.append(
                Limit(
                    "max_size_mb",
                    "size",
                    f"at most {request.max_size_mb:g} MB on disk",
                    _whole(request.max_size_mb * MEGABYTE + 1e-6) - base,
                    of_weights(lambda layer, b: cost.code_bytes(layer, b, grid)),
                    MEGABYTE,
                    lambda used: f"{_ceil((base + used) / MEGABYTE, 6):.6f} MB",
                )
            )
        bits = of_weights(lambda layer, b: layer.numel * b)
        # The slack makes "12x" feasible where 32 / 12 was rounded down.
        if request.compression is not None:
            found.append(
                Limit(
                    "compression",
                    "weight_bits",
                    f"weights compressed at least {request.compression:g}x",
                    _whole(32 / request.compression * count * (1 + ROUNDING)),
                    bits,
                    count,
                    lambda used: f"{_floor(32 * count / used, 3):.3f}x",
                )
            )
        if request.average_bits is not None:
            found.append(
                Limit(
                    "average_bits",
                    "weight_bits",
                    f"at most {request.average_bits:g} bits on average",
                    _whole(request.average_bits * count * (1 + ROUNDING)),
                    bits,
                    count,
                    lambda used: f"{_ceil(used / count, 3):.3f} bits",
                )
            )
    quantized = [points.activation_by_name[name] for decision in decisions for name in decision.activations]
    if quantized:
        elements = math.fsum(point.numel for point in quantized)
        limited = (request.activation_compression, request.average_activation_bits, request.max_activation_mb)
        if not elements and any(limit is not None for limit in limited):
            raise BudgetError("a limit on activations needs their number of elements, which this table does not give")
        spent = of_activations(lambda point, b: point.numel * b)
        if request.activation_compression is not None:
            found.append(
                Limit(
                    "activation_compression",
                    "activation_bits",
                    f"activations compressed at least {request.activation_compression:g}x",
                    32 / request.activation_compression * elements,
                    spent,
                    elements,
                    lambda used: f"{_floor(32 * elements / used, 3):.3f}x for activations",
                )
            )
        if request.average_activation_bits is not None:
            found.append(
                Limit(
                    "average_activation_bits",
                    "activation_bits",
                    f"activations at most {request.average_activation_bits:g} bits on average",
                    request.average_activation_bits * elements,
                    spent,
                    elements,
                    lambda used: f"{_ceil(used / elements, 3):.3f} bits for activations",
                )
            )
    if request.max_bops_g is not None:
        found.append(
            Limit(
                "max_bops_g",
                "bops",
                f"at most {request.max_bops_g:g} G BOPs",
                _whole(request.max_bops_g * 1e9 + 1e-6),
                _products(sensitivity, decisions, pairs, lambda layer, w, a: layer.macs * w * a, np.int64),
                1e9,
                lambda used: f"{_trim(_ceil(used / 1e9, 9))} G BOPs",
            )
        )
    if request.max_latency_ms is not None:
        found.append(
            Limit(
                "max_latency_ms",
                "latency",
                f"at most {request.max_latency_ms:g} ms",
                request.max_latency_ms,
                _products(sensitivity, decisions, pairs, _reader(latency), float),
                1.0,
                lambda used: f"{_ceil(used, 6):.6f} ms",
            )
        )
    return tuple(found)


def _reader(latency: Latency) -> Callable[[Layer, int, int], float]:
    if not latency:
        raise BudgetError(
            "a latency limit needs a table of milliseconds by layer, weight bits and activation bits: latency="
            "tq.read_latency(file), --latency FILE, or a sensitivity table that has latencies"
        )

    def read(layer: Layer, weight_bits: int, input_bits: int) -> float:
        try:
            return latency[layer.name][weight_bits][input_bits]
        except KeyError:
            pass
        if layer.name not in latency:
            known = ", ".join(list(latency)[:6]) + (", ..." if len(latency) > 6 else "")
            raise BudgetError(f"the latency table has no layer {layer.name}; it has {known}")
        have = "; ".join(f"weights {w}: inputs {sorted(by)}" for w, by in sorted(latency[layer.name].items()))
        wanted = "an input in float (32 bits)" if input_bits == cost.FLOAT_BITS else f"an input of {input_bits} bits"
        raise BudgetError(
            f"the latency table has no entry for layer {layer.name} at {weight_bits} weight bits with {wanted}; it has"
            f" {have}. Add the entry, or allow fewer bits (--allow, --allow-activation)"
        )

    return read


# Numbers as a user writes them

WEIGHT_LIMITS = ("max_size_mb", "compression", "average_bits", "max_bops_g", "max_latency_ms")
ACTIVATION_LIMITS = ("average_activation_bits", "activation_compression", "max_activation_mb")


def check_numbers(request: PlanSettings) -> None:
    """Raise `BudgetError` unless there is a limit on something and every limit is a positive number."""
    given = {name: getattr(request, name) for name in (*WEIGHT_LIMITS, *ACTIVATION_LIMITS)}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        raise BudgetError(
            "give at least one budget: "
            + ", ".join(f"{name} (--{name.replace('_', '-')})" for name in (*WEIGHT_LIMITS, *ACTIVATION_LIMITS))
        )
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise BudgetError(f"{name} must be a positive number, got {value}")


def check_losses(request: PlanSettings) -> None:
    """Raise `BudgetError` for limits on what a plan loses that are no numbers, or have others beside them."""
    for name in ("max_accuracy_drop", "max_loss_increase"):
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BudgetError(f"{name} must be a number from 0, got {value}")
    if given := [name for name in WEIGHT_LIMITS if getattr(request, name) is not None]:
        raise BudgetError(
            f"the smallest plan within a loss of accuracy was asked for, and {', '.join(given)} besides; give either"
            " limits on what a plan loses or limits on what it costs"
        )
    if request.method != "exact":
        raise BudgetError("solving by accuracy walks the exact frontier; leave the method at 'exact'")


def describe(request: PlanSettings, problems: Iterable[Problem]) -> str:
    """The budget in words."""
    asked = [limit.asked for problem in problems for limit in problem.limits]
    if request.max_activation_mb is not None:
        asked.append(f"no activation above {request.max_activation_mb:g} MB")
    return ", ".join(asked)


def _whole(value: float) -> int:
    return math.floor(min(value, 1e18))  # beyond that, no limit at all


def _ceil(value: float, digits: int) -> float:
    """Rounded up, so that the number is one that is accepted."""
    return math.ceil(value * 10.0**digits) / 10.0**digits


def _floor(value: float, digits: int) -> float:
    return math.floor(value * 10.0**digits) / 10.0**digits


def _trim(value: float) -> str:
    return f"{value:.9f}".rstrip("0").rstrip(".")
