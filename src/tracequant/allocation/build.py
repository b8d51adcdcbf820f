"""From sensitivities and a request to the problems whose solutions together are the plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from tracequant.allocation.limits import Offer, limits_of, owners, rounded_up
from tracequant.allocation.problem import ROUNDING, Amounts, Decision, Problem
from tracequant.core import cost
from tracequant.core.errors import BudgetError
from tracequant.core.match import match_names
from tracequant.core.plan import MIB
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import PlanSettings


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
        limits = limits_of(Offer(sensitivity, decisions, pairs), request, latency)
        chain = _chain(sensitivity, decisions, ranking) if request.space == "monotone" else ()
        problems.append(Problem(tuple(decisions), tuple(pairs), omega, limits, chain))
    return problems


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
    if request.max_activation_mib is not None:
        offered = _within_peak(sensitivity, offered, request.max_activation_mib)
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
                    f" {list(left[name])}; allow one of them, or measure other bits"
                )
            left[name] = bits
    return left


def _within_peak(
    sensitivity: Sensitivity, offered: dict[str, tuple[int, ...]], mib: float
) -> dict[str, tuple[int, ...]]:
    """The bits at which each activation, for one sample, is no larger than the peak."""
    points = sensitivity.points
    limit = mib * MIB * (1 + ROUNDING)
    least = {name: bits[0] for name, bits in offered.items()}
    peak = cost.peak_activation_bytes(points, least)
    if peak > limit:
        largest = max(points.activations, key=lambda point: point.numel * least.get(point.name, cost.FLOAT_BITS))
        raise BudgetError(
            f"no plan fits the budget, activations of at most {mib:g} MiB: the input of {largest.name} has"
            f" {largest.numel:,.0f} elements and needs {rounded_up(peak / MIB, 6):.6f} MiB at"
            f" {least.get(largest.name, cost.FLOAT_BITS)} bits, its fewest; ask for that or more room, or offer fewer"
            " bits (activation_bits)"
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


def _pairs(sensitivity: Sensitivity, decisions: Sequence[Decision]) -> list[tuple[int, int]]:
    """Pairs (weights, input) of different decisions that both have a choice and that some layer multiplies."""
    weight_of, input_of = owners(decisions)
    found: dict[tuple[int, int], None] = {}
    for layer in sensitivity.points.layers:
        d, e = weight_of[layer.name], input_of.get(layer.activation or "")
        if e is not None and d != e and len(decisions[d].bits) > 1 and len(decisions[e].bits) > 1:
            found[d, e] = None
    return list(found)
