"""Why a layer got its bits, in figures and in words. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tracequant import cost
from tracequant.plan import BitPlan
from tracequant.sensitivity_result import Sensitivity


@dataclass(frozen=True)
class LayerRow:
    """One layer of a plan: what it is, what it costs, and what a step to fewer or more bits would change."""

    name: str
    kind: str
    numel: int
    macs: int
    average_trace: float
    trace_rank: int
    num_bits: int
    activation_bits: int | None
    omega: float
    omega_share: float
    code_bytes: int
    why: str


def explain(sensitivity: Sensitivity, plan: BitPlan) -> list[LayerRow]:
    """A row for every layer of `plan`, in the model's order."""
    points = sensitivity.points
    ranked = sorted(points.layers, key=lambda layer: -sensitivity.average_traces[layer.name])
    rank = {layer.name: i + 1 for i, layer in enumerate(ranked)}
    rows = []
    for layer in points.layers:
        num_bits = plan.weight_bits[layer.name]
        omega = sensitivity.weight_omega[layer.name]
        rows.append(
            LayerRow(
                name=layer.name,
                kind=layer.kind,
                numel=layer.numel,
                macs=layer.macs,
                average_trace=sensitivity.average_traces[layer.name],
                trace_rank=rank[layer.name],
                num_bits=num_bits,
                activation_bits=plan.activation_bits.get(layer.activation or ""),
                omega=omega[num_bits],
                omega_share=omega[num_bits] / plan.omega if plan.omega else 0.0,
                code_bytes=cost.code_bytes(layer, num_bits, plan.weight_grid),
                why=_why(sensitivity, plan, layer.name, rank[layer.name]),
            )
        )
    return rows


def _why(sensitivity: Sensitivity, plan: BitPlan, name: str, rank: int) -> str:
    """What the next narrower and wider choice would cost and gain, for the layer or the tie that it is in."""
    points = sensitivity.points
    group = next(names for names in points.weight_units if name in names)
    options = sorted(sensitivity.weight_omega[name])
    index = options.index(plan.weight_bits[name])

    def omega(num_bits: int) -> float:
        return sum(sensitivity.weight_omega[member][num_bits] for member in group)

    def size(num_bits: int) -> int:
        return sum(cost.code_bytes(points.by_name[member], num_bits, plan.weight_grid) for member in group)

    now = options[index]
    parts = [f"trace {_ordinal(rank)} of {len(points.layers)}"]
    if len(group) > 1:
        parts.append(f"tied to {len(group) - 1} other{'s' if len(group) > 2 else ''}")
    total = plan.omega or 1.0
    if index > 0:
        fewer = options[index - 1]
        parts.append(
            f"{fewer} bits would save {_bytes(size(now) - size(fewer))} and add"
            f" {_percent((omega(fewer) - omega(now)) / total)} to the total Ω"
        )
    if index + 1 < len(options):
        more = options[index + 1]
        parts.append(
            f"{more} bits would cost {_bytes(size(more) - size(now))} and take off only"
            f" {_percent((omega(now) - omega(more)) / total)}"
        )
    return "; ".join(parts)


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _bytes(count: int) -> str:
    return (
        f"{count} B"
        if count < 1024
        else f"{count / 1024:.1f} KiB"
        if count < 1 << 20
        else f"{count / (1 << 20):.2f} MB"
    )


def _percent(share: float) -> str:
    if share >= 1:
        return f"{share:.1f} times"
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"
