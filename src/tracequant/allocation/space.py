"""The size of the search space (HAWQ-V2, Appendix B)."""

from __future__ import annotations

import math


def full_space(layers: int, options: int) -> int:
    """Number of assignments of `options` bit widths to `layers` layers, m^L.

    >>> f"{full_space(50, 4):.1e}"
    '1.3e+30'
    """
    return int(options**layers)


def counted(number: int) -> str:
    """A number of assignments in digits, or as a power of ten.

    >>> counted(390625), counted(full_space(50, 4))
    ('390,625', 'about 10^30.1')
    """
    return f"{number:,}" if number < 10**9 else f"about 10^{math.log10(number):.1f}"


def monotone_space(layers: int, options: int) -> int:
    """Number of assignments in which a layer with a larger average trace never has fewer bits: Σ_j C(m, j) C(L−1, j−1).

    >>> monotone_space(50, 4)
    23426
    """
    return sum(math.comb(options, j) * math.comb(layers - 1, j - 1) for j in range(1, options + 1))
