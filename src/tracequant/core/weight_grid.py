"""How weights are rounded: the settings that sensitivity, conversion and the packed file share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tracequant.core.options import option, validate

# The panel in which `--help` groups these options.
QUANTIZATION = "Quantization"


@dataclass(frozen=True)
class WeightGrid:
    """How weight grids are made: the same in sensitivity, conversion and the packed file.

    `range`: "mse" (least squared error, the default), "percentile" or "minmax" (the paper's Appendix A with the whole
    range).
    """

    per_channel: bool = option(
        True,
        "one scale for each output channel of a weight, or one for the whole tensor",
        flag="--per-channel/--per-tensor",
        panel=QUANTIZATION,
        expert=True,
    )
    symmetric: bool = option(
        True,
        "weight ranges are centred on zero, or need not be",
        flag="--symmetric/--asymmetric",
        panel=QUANTIZATION,
        expert=True,
    )
    range: Literal["mse", "percentile", "minmax"] = option(
        "mse", "how the range of a weight grid is chosen", flag="--weight-range", panel=QUANTIZATION, expert=True
    )

    def __post_init__(self) -> None:
        validate(self)
