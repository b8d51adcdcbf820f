"""Why a layer got its bits, in figures and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from tracequant.core import cost
from tracequant.core.plan import MIB, PRICE_UNITS, BitPlan
from tracequant.core.points import Layer
from tracequant.core.reasons import aligned, in_bits, neighbours, ordinal, trace_ranks
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import Latency


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


@dataclass(frozen=True)
class Explanation:
    """A row for every layer of a plan, in the model's order, and the rates of exchange of the resources that bind.

    `doubt` is a sentence about the layers whose bits the data do not decide, empty where there are none.
    """

    rows: tuple[LayerRow, ...]
    rates: tuple[str, ...]
    doubt: str = ""

    def __str__(self) -> str:
        cells = [
            (
                row.name,
                str(row.num_bits),
                str(row.activation_bits or "float"),
                f"{row.average_trace:.3g}",
                f"{row.omega_share:.1%}",
                row.why,
            )
            for row in self.rows
        ]
        head = ("layer", "bits", "input bits", "Tr(H)/n", "share of Ω", "why")
        return "\n".join([*aligned(head, cells, right={1, 2, 3, 4}), *self.rates, *filter(None, [self.doubt])])


def explain(sensitivity: Sensitivity, plan: BitPlan, *, latency: Latency | None = None) -> Explanation:
    """Why every layer of `plan` has its bits: what it costs, and what a step to fewer or more bits would change.

    `sensitivity` is the table that the plan was solved from, and `latency` the one of milliseconds, where it was not
    the sensitivity's own. The explanation prints as a table; `rows` has its figures.
    """
    points = sensitivity.points
    rank = trace_ranks(sensitivity)
    steps = _Steps(sensitivity, plan, sensitivity.latency if latency is None else latency)
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
                why="; ".join(
                    [
                        f"trace {ordinal(rank[layer.name])} of {len(points.layers)}",
                        *steps.of(layer),
                        *([plan.undecided[layer.name]] if layer.name in plan.undecided else []),
                    ]
                ),
            )
        )
    return Explanation(tuple(rows), tuple(exchange_rates(plan)), plan.doubt)


def exchange_rates(plan: BitPlan) -> list[str]:
    """What a little more of every resource that binds would do to the least Ω, in words."""
    total = plan.total_omega or 1.0
    rates = []
    for resource, price in plan.prices.items():
        unit, part = PRICE_UNITS[resource], 1.0
        while price * part / total > 0.1:  # a step so large that the rate would not hold
            part /= 10
        rates.append(f"{part:g} {unit} more would take about {_percent(price * part / total)} off the total Ω")
    return rates


class _Steps:
    """What a step to the next bit width would cost and gain, and what the plan pays for that elsewhere."""

    def __init__(self, sensitivity: Sensitivity, plan: BitPlan, latency: Latency) -> None:
        self._sensitivity, self._plan, self._latency = sensitivity, plan, latency
        self._units = {name: names for names in sensitivity.points.weight_units for name in names}

    def of(self, layer: Layer) -> list[str]:
        """Sentences about a layer's weight, with those tied to it, and about its input where more bits are on offer."""
        group = self._units[layer.name]
        sentences = []
        if len(group) > 1:
            sentences.append(f"tied to {len(group) - 1} other{'s' if len(group) > 2 else ''}")
        omega, now = self._sensitivity.weight_omega[layer.name], self._plan.weight_bits[layer.name]
        fewer, more = neighbours(omega, now)
        shared = {
            self._sensitivity.points.by_name[name].activation or "" for name in group if self._sensitivity.same_bits
        } & self._plan.activation_bits.keys()
        for num_bits in (fewer, more):
            if num_bits is not None:
                sentences.append(self._step(num_bits, now, weights=group, activations=shared))
        name = layer.activation or ""
        if not self._sensitivity.same_bits and name in self._plan.activation_bits:
            now = self._plan.activation_bits[name]
            _, more = neighbours(self._sensitivity.activation_omega[name], now)
            if more is not None:
                sentences.append(self._step(more, now, activations={name}, prefix="input: "))
        return sentences

    def _step(
        self,
        num_bits: int,
        now: int,
        *,
        weights: Collection[str] = (),
        activations: Collection[str] = (),
        prefix: str = "",
    ) -> str:
        """The step from `now` to `num_bits` of some weights and activations, in words."""
        plan, table = self._plan, self._sensitivity
        stepped = replace(
            plan,
            weight_bits=plan.weight_bits | dict.fromkeys(weights, num_bits),
            activation_bits=plan.activation_bits | dict.fromkeys(activations, num_bits),
        )
        gain = math.fsum(table.weight_omega[name][now] - table.weight_omega[name][num_bits] for name in weights)
        gain += math.fsum(
            table.activation_omega[name][now] - table.activation_omega[name][num_bits] for name in activations
        )
        total = (plan.total_omega if plan.prices.keys() & {"bops", "latency"} else plan.omega) or 1.0
        if activations and not weights:
            total = plan.total_omega or 1.0
        used, worth = [], 0.0
        for resource, text in _RESOURCES.items():
            if resource not in ("size", *plan.prices):
                continue
            try:
                difference = abs(self._amount(resource, stepped) - self._amount(resource, plan))
            except KeyError:  # the latency table has no such entry, or is not at hand
                continue
            worth += plan.prices.get(resource, 0.0) * difference
            if difference and text:
                used.append(text(difference))
        amount = " and ".join(used) or "nothing"
        if num_bits < now:
            change = f"save {amount} and add {_percent(-gain / total)} to the total Ω"
        else:
            change = f"cost {amount} and take off {_percent(gain / total)}"
        elsewhere = f"; the same spent on other layers takes off {_percent(worth / total)}" if worth else ""
        return f"{prefix}{in_bits(num_bits)} would {change}{elsewhere}"

    def _amount(self, resource: str, plan: BitPlan) -> float:
        """How much of a resource a plan uses, in the unit of `PRICE_UNITS`."""
        points = self._sensitivity.points
        if resource == "size":
            grid = plan.weight_grid
            return sum(cost.code_bytes(layer, plan.weight_bits[layer.name], grid) for layer in points.layers) / MIB
        if resource == "weight_bits":
            return cost.weight_bits_total(points, plan.weight_bits) / plan.weight_count
        if resource == "activation_bits":
            return cost.average_activation_bits(points, plan.activation_bits)
        if resource == "bops":
            return cost.bit_operations(points, plan.weight_bits, plan.activation_bits) / 1e9
        return cost.latency_ms(points, plan.weight_bits, plan.activation_bits, self._latency)


_RESOURCES: dict[str, Callable[[float], str] | None] = {
    "size": lambda change: _bytes(round(change * MIB)),
    "weight_bits": None,  # the size says it better
    "activation_bits": lambda change: f"{change:.2g} bits per activation",
    "bops": lambda change: f"{change:.3g} G BOPs",
    "latency": lambda change: f"{change:.2g} ms",
}


def _bytes(count: int) -> str:
    return (
        f"{count} B"
        if count < 1024
        else f"{count / 1024:.1f} KiB"
        if count < 1 << 20
        else f"{count / (1 << 20):.2f} MiB"
    )


def _percent(share: float) -> str:
    if share < 0:
        return f"-{_percent(-share)}"
    if share >= 1:
        return f"{share:.1f} times"
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"
