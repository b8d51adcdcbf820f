"""Patterns of layer names: the one place that says which names a pattern matches."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Sequence


def match_names(patterns: Iterable[str], names: Sequence[str], purpose: str) -> list[str]:
    """The names that any of the shell patterns matches in full, in their own order; an idle pattern warns."""
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            warnings.warn(
                f"{purpose} pattern {pattern!r} matches no layer; layers are {some_names(names)}", stacklevel=3
            )
        matched.update(hits)
    return [name for name in names if name in matched]


def some_names(names: Sequence[str]) -> str:
    """The first six names as a list in words, and how many there are."""
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown}, ... ({len(names)} in all)"
