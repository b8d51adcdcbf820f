"""Why every layer has its bits, in a few words, and how ranks, bits and tables are written. Plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from tracequant.core.sensitivity import Sensitivity


def short_reasons(
    sensitivity: Sensitivity, weight_bits: Mapping[str, int], notes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Layer name → the rank of its trace, and what one step to fewer or more bits would change; after its note, if any.

    Shares are of the weights' Ω. A step takes the layers along that are tied to it.
    """
    ranks = trace_ranks(sensitivity)
    table = sensitivity.weight_omega
    total = abs(math.fsum(table[name][b] for name, b in weight_bits.items())) or 1.0
    found = {}
    for unit in sensitivity.points.weight_units:
        now = weight_bits[unit[0]]
        common = set.intersection(*(set(table[name]) for name in unit))
        fewer, more = neighbours(common, now)
        steps = []
        for num_bits in (fewer, more):
            if num_bits is not None:
                change = math.fsum(table[name][num_bits] - table[name][now] for name in unit) / total
                steps.append(f"{_change(change)} at {in_bits(num_bits)}")
        for name in unit:
            parts = [(notes or {}).get(name, ""), f"trace {ordinal(ranks[name])} of {len(ranks)}"]
            others = [other for other in unit if other != name]
            if others:
                parts.append(f"tied to {others[0] if len(others) == 1 else f'{len(others)} others'}")
            if steps:
                parts.append(f"Ω {', '.join(steps)}")
            found[name] = "; ".join(part for part in parts if part)
    return {layer.name: found[layer.name] for layer in sensitivity.points.layers}


def trace_ranks(sensitivity: Sensitivity) -> dict[str, int]:
    """Layer name → the place of its average trace, 1 for the largest."""
    ranked = sorted(sensitivity.points.layers, key=lambda layer: -sensitivity.average_traces[layer.name])
    return {layer.name: i + 1 for i, layer in enumerate(ranked)}


def neighbours(options: Collection[int], now: int) -> tuple[int | None, int | None]:
    """The next bit widths below and above."""
    return max((b for b in options if b < now), default=None), min((b for b in options if b > now), default=None)


def ordinal(number: int) -> str:
    """A place in an order, such as "3rd"."""
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def in_bits(number: int) -> str:
    """A bit width in words."""
    return f"{number} bit{'' if number == 1 else 's'}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of a table in plain text; the columns in `right` end at one place, the others begin at one."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def _change(share: float) -> str:
    """A change in percent with its sign, to two digits where it is small."""
    return f"{100 * share:+.0f}%" if abs(share) >= 0.1 else f"{100 * share:+.2g}%"
