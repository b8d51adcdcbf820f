"""The bit plan: which layer and which activation gets how many bits. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from tracequant.core.files import Saveable
from tracequant.core.settings import WeightGrid

MEGABYTE = 1 << 20
# Resource → the unit that `BitPlan.prices` are for.
PRICE_UNITS = {
    "size": "MB",
    "weight_bits": "bit per weight on average",
    "activation_bits": "bit per activation on average",
    "bops": "G BOPs",
    "latency": "ms",
}


@dataclass(frozen=True)
class BitPlan(Saveable):
    """Bit widths by layer and activation point, with what they cost.

    `size_bytes` is the exact size of the packed file, header, scales, biases and everything else included.
    `weight_code_bits` counts the weights' bits alone and `weight_count` the weights, the paper's accounting. `omega`
    is the sum of Ω over layers, `activation_omega` that over activation points. `budget` repeats what was asked.

    `bound` is a proven lower bound on `omega + activation_omega` over all plans within the budget that were searched;
    None where nothing was proven (Appendix E's search, a uniform plan, one edited by hand). `prices` are the rates of
    exchange at the limits that bind: by how much the least Ω falls, in units of the loss, for one unit more of a
    resource (`PRICE_UNITS`).
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
    method: str
    budget: str
    bound: float | None = None
    prices: dict[str, float] = field(default_factory=dict)

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
    def size_mb(self) -> float:
        """Size of the packed file in MB of 2^20 bytes."""
        return self.size_bytes / MEGABYTE

    @property
    def average_bits(self) -> float:
        """Bits for each weight of the quantized layers, on average."""
        return self.weight_code_bits / self.weight_count

    @property
    def compression(self) -> float:
        """The paper's W-Comp: 32 bits over the average bits of the weights."""
        return 32 / self.average_bits

    def __str__(self) -> str:
        counts: dict[int, int] = {}
        for num_bits in self.weight_bits.values():
            counts[num_bits] = counts.get(num_bits, 0) + 1
        spread = ", ".join(f"{count} at {num_bits} bits" for num_bits, count in sorted(counts.items()))
        return (
            f"BitPlan: {self.size_mb:.4g} MB on disk, weights {self.average_bits:.2f} bits on average"
            f" ({self.compression:.2f}x); layers: {spread}; omega {self.omega:.4g}"
        )
