"""The bit plan: which layer and which activation gets how many bits, and what that costs. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tracequant.core import cost
from tracequant.core.errors import BudgetError
from tracequant.core.files import Saveable
from tracequant.core.match import match_names
from tracequant.core.points import QuantizationPoints
from tracequant.core.reasons import aligned, in_bits, short_reasons
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.weight_grid import WeightGrid

MIB = 1 << 20
# Resource → the unit that `BitPlan.prices` are for.
PRICE_UNITS = {
    "size": "MiB",
    "weight_bits": "bit per weight on average",
    "activation_bits": "bit per activation on average",
    "bops": "G BOPs",
    "latency": "ms",
}
# The most layers that a printed plan lists.
PRINTED_LAYERS = 30


@dataclass(frozen=True)
class BitPlan(Saveable):
    """Bit widths by layer and activation point, with what they cost. `print(plan)` shows layers, bits and reasons.

    `size_bytes` is the exact size of the packed file, header, scales, biases and everything else included;
    `model_size` is that of the whole float model, and what of it stays in float (None without a model).
    `weight_code_bits` counts the weights' bits alone and `weight_count` the weights, the paper's accounting. `omega`
    is the sum of Ω over layers, `activation_omega` that over activation points. `budget` repeats what was asked.

    `bound` is a proven lower bound on `omega + activation_omega` over all plans within the budget that were searched;
    None where nothing was proven (Appendix E's search, a uniform plan, an edited one). `prices` are the rates of
    exchange at the limits that bind: by how much the least Ω falls, in units of the loss, for one unit more of a
    resource (`PRICE_UNITS`).

    `reasons` says of every layer in a few words why it has its bits; `tracequant.explain` says more. Plans that differ
    in their reasons alone are equal. `undecided` says of layers whose bits rest on a difference in Ω smaller than its
    error which exchange with another layer the data leave open.
    """

    weight_bits: dict[str, int]
    activation_bits: dict[str, int]
    size_bytes: int
    weight_code_bits: int
    weight_count: int
    omega: float
    activation_omega: float
    weight_grid: WeightGrid
    fingerprint: str
    solver: str
    budget: str
    bound: float | None = None
    prices: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    undecided: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    model_size: cost.ModelSize | None = None

    @property
    def total_omega(self) -> float:
        """Ω of weights and activations together, which the exact solver minimises."""
        return self.omega + self.activation_omega

    @property
    def gap(self) -> float | None:
        """How far the plan may be from the best one, as a share of its Ω: 0 for a proven optimum, None if unknown."""
        if self.bound is None:
            return None
        return (self.total_omega - self.bound) / abs(self.total_omega) if self.total_omega > self.bound else 0.0

    @property
    def size_mib(self) -> float:
        """Size of the packed file in MiB (2^20 bytes)."""
        return self.size_bytes / MIB

    @property
    def average_bits(self) -> float:
        """Bits for each weight of the quantized layers, on average."""
        return self.weight_code_bits / self.weight_count

    @property
    def compression(self) -> float:
        """The paper's W-Comp: 32 bits over the average bits of the quantized weights, nothing else counted."""
        return 32 / self.average_bits

    @property
    def file_compression(self) -> float | None:
        """Bytes of the whole float32 model over those of the packed file; None without a model."""
        return None if self.model_size is None else self.model_size.float_bytes / self.size_bytes

    @property
    def whole_size(self) -> str:
        """The whole file before and after, the share of the parameters that are quantized, and W-Comp, in words."""
        weights = f"{self.average_bits:.2f} bits on average (W-Comp {self.compression:.2f}x, these weights alone)"
        if self.model_size is None:
            return f"{self.size_mib:.4g} MiB of weights, at {weights}"
        before, share = self.model_size.float_bytes, self.model_size.quantized_share
        return (
            f"{before / MIB:.4g} MiB in float32, {self.size_mib:.4g} MiB packed"
            f" ({cost.change_of_size(before, self.size_bytes)}); {share:.1%} of the parameters quantized, at {weights}"
        )

    @property
    def summary(self) -> str:
        """The plan in one line: `whole_size`, and how many layers have how many bits."""
        return f"BitPlan: {self.whole_size}; layers: {_spread(self.weight_bits)}; Ω weights {self.omega:.4g}"

    @property
    def doubt(self) -> str:
        """A sentence about the layers whose bits the data do not decide; empty where there are none."""
        if not self.undecided:
            return ""
        names = ", ".join([*list(self.undecided)[:3], *(["..."] if len(self.undecided) > 3 else [])])
        return (
            f"the bits of {len(self.undecided)} of {len(self.weight_bits)} layers rest on a difference in Ω that is"
            f" smaller than its error ({names}); more samples would decide them"
        )

    def with_bits(
        self,
        weight_bits: Mapping[str, int],
        sensitivity: Sensitivity,
        *,
        activation_bits: Mapping[str, int] | None = None,
    ) -> BitPlan:
        """The plan with other bits for some layers, and with the size and the Ω that it then really has.

        `weight_bits` goes from a shell pattern of layer names to bits, such as `{"layer1.*": 4, "fc": 8}`, and
        `activation_bits` from one of activation points; where several patterns match, the last one holds. The model's
        input keeps its bits. `sensitivity` is the table that the plan was solved from: it knows the file's layout and
        the Ω of every width. The limits that the plan was solved for are not checked, and nothing is proven about it.

        Raises `BudgetError` for a pattern that matches nothing, for bits that were not measured, for tied layers that
        would have different bits, for an input that would have other bits than the layers that read it where the table
        has one width for both, and for a sensitivity of another model.
        """
        points = sensitivity.points
        if self.fingerprint != points.fingerprint:
            raise BudgetError(
                f"the plan is for a model of fingerprint {self.fingerprint}, the sensitivity for one of"
                f" {points.fingerprint}; give the sensitivity that the plan was solved from"
            )
        changed = _changes("weight_bits", "layer", weight_bits, list(self.weight_bits))
        inputs = {point.name for point in points.activations if point.is_model_input}
        choosable = [name for name in self.activation_bits if name not in inputs]
        changed_activations = _changes("activation_bits", "activation", activation_bits or {}, choosable)
        bits = self.weight_bits | changed
        if sensitivity.same_bits:
            _check_agreement(points, bits, changed_activations)
            changed_activations |= _shared_bits(points, bits, changed)
        edited = replace(self, weight_bits=bits, activation_bits=self.activation_bits | changed_activations)
        again = reprice(sensitivity, edited)
        edits = {name: "edited" for name, num_bits in changed.items() if num_bits != self.weight_bits[name]}
        reasons = short_reasons(sensitivity, bits, edits)
        return replace(again, solver="edited", bound=None, prices={}, reasons=reasons, undecided={})

    def __str__(self) -> str:
        shown = list(self.weight_bits.items())
        if len(shown) > PRINTED_LAYERS:
            shown = shown[: PRINTED_LAYERS - 1]
        rows = [(name, str(num_bits), self.reasons.get(name, "")) for name, num_bits in shown]
        lines = [self.summary]
        if self.model_size is not None and self.model_size.in_float:
            lines.append(self.model_size.in_float)
        lines.extend(aligned(("layer", "bits", "why"), rows, right={1}))
        if more := len(self.weight_bits) - len(shown):
            lines.append(f"... {more} more: plan.weight_bits, plan.reasons and tracequant.explain have all layers")
        if self.activation_bits:
            lines.append(f"inputs of layers: {_spread(self.activation_bits)}")
        if self.doubt:
            lines.append(self.doubt)
        return "\n".join(lines)


def priced(
    sensitivity: Sensitivity,
    weight_bits: Mapping[str, int],
    activation_bits: Mapping[str, int],
    *,
    solver: str,
    budget: str,
    notes: Mapping[str, str] | None = None,
) -> BitPlan:
    """The plan for given bits, in the model's order, with its size and Ω; `notes` begin the reasons of some layers."""
    points, grid = sensitivity.points, sensitivity.weight_grid
    weights = {layer.name: weight_bits[layer.name] for layer in points.layers}
    activations = {name: activation_bits[name] for name in sensitivity.activation_omega}
    return BitPlan(
        weight_bits=weights,
        activation_bits=activations,
        size_bytes=cost.size_bytes(points, weights, activations, grid),
        weight_code_bits=cost.weight_bits_total(points, weights),
        weight_count=cost.weight_count(points),
        omega=math.fsum(sensitivity.weight_omega[name][b] for name, b in weights.items()),
        activation_omega=math.fsum(sensitivity.activation_omega[n][b] for n, b in activations.items()),
        weight_grid=grid,
        fingerprint=points.fingerprint,
        solver=solver,
        budget=budget,
        reasons=short_reasons(sensitivity, weights, notes),
        model_size=cost.model_size(points),
    )


def reprice(sensitivity: Sensitivity, plan: BitPlan) -> BitPlan:
    """The same bits with size and Ω worked out anew: for a plan whose bits were edited in its file.

    Raises `BudgetError` if the plan does not name exactly the layers that were measured, at bits that were measured,
    and for tied layers of different bits.
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
    _check_ties(sensitivity.points, plan.weight_bits)
    again = priced(sensitivity, plan.weight_bits, plan.activation_bits, solver=plan.solver, budget=plan.budget)
    return replace(again, bound=plan.bound, prices=plan.prices)


def _changes(rule: str, kind: str, patterns: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    return {
        name: num_bits
        for pattern, num_bits in patterns.items()
        for name in match_names([pattern], names, rule, kind, BudgetError)
    }


def _check_ties(points: QuantizationPoints, weight_bits: Mapping[str, int]) -> None:
    for group in points.weight_units:
        if len({weight_bits[name] for name in group}) > 1:
            each = ", ".join(f"{name}: {weight_bits[name]}" for name in group)
            raise BudgetError(f"tied layers have the same bits, and these would differ ({each}); name all of them")


def _check_agreement(
    points: QuantizationPoints, weight_bits: Mapping[str, int], activation_bits: Mapping[str, int]
) -> None:
    """Raise `BudgetError` if a layer and its input, which have one width in this table, would have different ones."""
    for layer in points.layers:
        num_bits = activation_bits.get(layer.activation or "", weight_bits[layer.name])
        if num_bits != weight_bits[layer.name]:
            raise BudgetError(
                f"in this table a layer and its input have the same bits, and layer {layer.name} would have"
                f" {weight_bits[layer.name]} and its input {layer.activation} {num_bits}; change weight_bits alone,"
                " and the input follows"
            )


def _shared_bits(
    points: QuantizationPoints, weight_bits: Mapping[str, int], changed: Mapping[str, int]
) -> dict[str, int]:
    """The bits of the inputs of changed layers, where a layer's input has as many bits as its weight."""
    found = {}
    for name in changed:
        activation = points.by_name[name].activation
        if activation is None:
            continue
        readers = [layer.name for layer in points.layers if layer.activation == activation]
        if len({weight_bits[reader] for reader in readers}) > 1:
            each = ", ".join(f"{reader}: {weight_bits[reader]}" for reader in readers)
            raise BudgetError(
                f"layers that read one input have its bits, and these would differ ({each}); name all of them"
            )
        found[activation] = weight_bits[name]
    return found


def _spread(bits: Mapping[str, int]) -> str:
    counts: dict[int, int] = {}
    for num_bits in bits.values():
        counts[num_bits] = counts.get(num_bits, 0) + 1
    return ", ".join(f"{count} at {in_bits(num_bits)}" for num_bits, count in sorted(counts.items()))
