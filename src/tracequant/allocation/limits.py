"""The limits of a request: what every option uses of each resource, and how much there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracequant.allocation.problem import ROUNDING, Amounts, Decision, Limit
from tracequant.core import cost
from tracequant.core.errors import BudgetError
from tracequant.core.plan import MIB
from tracequant.core.points import ActivationPoint, Layer
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import Latency, PlanSettings


@dataclass(frozen=True)
class Offer:
    """What a problem decides about: the choices of bits, and the pairs of them that some layer multiplies."""

    sensitivity: Sensitivity
    decisions: Sequence[Decision]
    pairs: Sequence[tuple[int, int]]


def limits_of(offer: Offer, request: PlanSettings, latency: Latency) -> tuple[Limit, ...]:
    """The limits of a request that concern these decisions, with what every option uses of each."""
    found: list[Limit] = []
    if any(decision.weights for decision in offer.decisions):
        found += _of_size(offer, request)
        found += _of_weight_bits(offer, request)
    if any(decision.activations for decision in offer.decisions):
        found += _of_activation_bits(offer, request)
    found += _of_bit_operations(offer, request)
    found += _of_latency(offer, request, latency)
    return tuple(found)


def _of_size(offer: Offer, request: PlanSettings) -> list[Limit]:
    if request.max_size_mib is None:
        return []
    base, grid = base_bytes(offer.sensitivity), offer.sensitivity.weight_grid
    return [
        Limit(
            name="max_size_mib",
            resource="size",
            asked=f"at most {request.max_size_mib:g} MiB on disk",
            bound=_whole(request.max_size_mib * MIB + 1e-6) - base,
            amounts=_of_weights(offer, lambda layer, b: cost.code_bytes(layer, b, grid)),
            price_unit=MIB,
            say=lambda used: f"{rounded_up((base + used) / MIB, 6):.6f} MiB",
        )
    ]


def _of_weight_bits(offer: Offer, request: PlanSettings) -> list[Limit]:
    count = cost.weight_count(offer.sensitivity.points)
    bits = _of_weights(offer, lambda layer, b: layer.numel * b)
    found = []
    # The slack makes "12x" feasible where 32 / 12 was rounded down.
    if request.compression is not None:
        found.append(
            Limit(
                name="compression",
                resource="weight_bits",
                asked=f"weights compressed at least {request.compression:g}x",
                bound=_whole(32 / request.compression * count * (1 + ROUNDING)),
                amounts=bits,
                price_unit=count,
                say=lambda used: f"{rounded_down(32 * count / used, 3):.3f}x",
            )
        )
    if request.average_bits is not None:
        found.append(
            Limit(
                name="average_bits",
                resource="weight_bits",
                asked=f"at most {request.average_bits:g} bits on average",
                bound=_whole(request.average_bits * count * (1 + ROUNDING)),
                amounts=bits,
                price_unit=count,
                say=lambda used: f"{rounded_up(used / count, 3):.3f} bits",
            )
        )
    return found


def _of_activation_bits(offer: Offer, request: PlanSettings) -> list[Limit]:
    by_name = offer.sensitivity.points.activation_by_name
    elements = math.fsum(by_name[name].numel for decision in offer.decisions for name in decision.activations)
    limited = (request.activation_compression, request.average_activation_bits, request.max_activation_mib)
    if not elements and any(limit is not None for limit in limited):
        raise BudgetError("a limit on activations needs their number of elements, which this table does not give")
    bits = _of_activations(offer, lambda point, b: point.numel * b)
    found = []
    if request.activation_compression is not None:
        found.append(
            Limit(
                name="activation_compression",
                resource="activation_bits",
                asked=f"activations compressed at least {request.activation_compression:g}x",
                bound=32 / request.activation_compression * elements,
                amounts=bits,
                price_unit=elements,
                say=lambda used: f"{rounded_down(32 * elements / used, 3):.3f}x for activations",
            )
        )
    if request.average_activation_bits is not None:
        found.append(
            Limit(
                name="average_activation_bits",
                resource="activation_bits",
                asked=f"activations at most {request.average_activation_bits:g} bits on average",
                bound=request.average_activation_bits * elements,
                amounts=bits,
                price_unit=elements,
                say=lambda used: f"{rounded_up(used / elements, 3):.3f} bits for activations",
            )
        )
    return found


def _of_bit_operations(offer: Offer, request: PlanSettings) -> list[Limit]:
    if request.max_bops_g is None:
        return []
    return [
        Limit(
            name="max_bops_g",
            resource="bops",
            asked=f"at most {request.max_bops_g:g} G BOPs",
            bound=_whole(request.max_bops_g * 1e9 + 1e-6),
            amounts=_of_products(offer, lambda layer, w, a: layer.macs * w * a, np.int64),
            price_unit=1e9,
            say=lambda used: f"{_trim(rounded_up(used / 1e9, 9))} G BOPs",
        )
    ]


def _of_latency(offer: Offer, request: PlanSettings, latency: Latency) -> list[Limit]:
    if request.max_latency_ms is None:
        return []
    return [
        Limit(
            name="max_latency_ms",
            resource="latency",
            asked=f"at most {request.max_latency_ms:g} ms",
            bound=request.max_latency_ms,
            amounts=_of_products(offer, _reader(latency), float),
            price_unit=1.0,
            say=lambda used: f"{rounded_up(used, 6):.6f} ms",
        )
    ]


def _of_weights(offer: Offer, price: Callable[[Layer, int], int]) -> Amounts:
    """Amounts of a resource that depends on the bits of weights alone."""
    by_name = offer.sensitivity.points.by_name
    single = tuple(
        np.array([sum(price(by_name[name], b) for name in decision.weights) for b in decision.bits])
        for decision in offer.decisions
    )
    return Amounts(single, _no_pairs(offer))


def _of_activations(offer: Offer, price: Callable[[ActivationPoint, int], float]) -> Amounts:
    """Amounts of a resource that depends on the bits of activations alone."""
    by_name = offer.sensitivity.points.activation_by_name
    single = tuple(
        np.array([math.fsum(price(by_name[name], b) for name in decision.activations) for b in decision.bits])
        for decision in offer.decisions
    )
    return Amounts(single, _no_pairs(offer))


def _no_pairs(offer: Offer) -> tuple[NDArray[Any], ...]:
    """Tables of zeros: a pair of options uses no more than its two options."""
    bits = [len(decision.bits) for decision in offer.decisions]
    return tuple(np.zeros((bits[d], bits[e]), dtype=np.int64) for d, e in offer.pairs)


def _of_products(offer: Offer, price: Callable[[Layer, int, int], float], dtype: type) -> Amounts:
    """Amounts of a resource that depends on the bits of a layer's weight and input together."""
    decisions = offer.decisions
    weight_of, input_of = owners(decisions)
    single: list[NDArray[Any]] = [np.zeros(len(decision.bits), dtype=dtype) for decision in decisions]
    tables: dict[tuple[int, int], NDArray[Any]] = {
        pair: np.zeros((len(decisions[pair[0]].bits), len(decisions[pair[1]].bits)), dtype) for pair in offer.pairs
    }
    for layer in offer.sensitivity.points.layers:
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


def _reader(latency: Latency) -> Callable[[Layer, int, int], float]:
    if not latency:
        raise BudgetError(
            "a latency limit needs a table of milliseconds by layer, weight bits and activation bits; give"
            " latency=TABLE, or a sensitivity table that has latencies"
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
            f" {have}. Add the entry, or allow fewer bits (allowed_bits, allowed_activation_bits)"
        )

    return read


def owners(decisions: Sequence[Decision]) -> tuple[dict[str, int], dict[str, int]]:
    """The decision about each layer's weight and about each activation point, by name."""
    return (
        {name: d for d, decision in enumerate(decisions) for name in decision.weights},
        {name: d for d, decision in enumerate(decisions) for name in decision.activations},
    )


def base_bytes(sensitivity: Sensitivity) -> int:
    """The part of the file that no choice of bits changes."""
    points, grid = sensitivity.points, sensitivity.weight_grid
    one_bit = {layer.name: 1 for layer in points.layers}
    total = cost.size_bytes(points, one_bit, dict.fromkeys(sensitivity.activation_omega, 8), grid)
    return total - sum(cost.code_bytes(layer, 1, grid) for layer in points.layers)


def _whole(value: float) -> int:
    return math.floor(min(value, 1e18))  # beyond that, no limit at all


def rounded_up(value: float, digits: int) -> float:
    """Rounded up, so that the number is accepted as a limit from above."""
    return math.ceil(value * 10.0**digits) / 10.0**digits


def rounded_down(value: float, digits: int) -> float:
    """Rounded down, so that the number is accepted as a limit from below."""
    return math.floor(value * 10.0**digits) / 10.0**digits


def _trim(value: float) -> str:
    return f"{value:.9f}".rstrip("0").rstrip(".")
