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

    `rounding`: "gptq" (the default) rounds one column of a weight after another and lets those that follow repair the
    error, on the inputs that the calibration data bring; scales are those of the least error that then remains.
    "nearest" is the paper's. `range` serves rounding to the nearest: "mse" (least squared error), "percentile" or
    "minmax" (the paper's Appendix A with the whole range).
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

    rounding: Literal["gptq", "nearest"] = option(
        "gptq",
        "gptq repairs the error of each weight's rounding in the weights that follow; nearest is the paper's",
        panel=QUANTIZATION,
    )

    def __post_init__(self) -> None:
        validate(self)
