"""Choices that several stages must agree on. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WeightGrid:
    """How weight grids are made: the same in sensitivity, conversion and the packed file.

    `range`: "mse" (least squared error, the default), "percentile" or "minmax" (the paper's Appendix A with the whole
    range).
    """

    per_channel: bool = True
    symmetric: bool = True
    range: Literal["minmax", "percentile", "mse"] = "mse"
