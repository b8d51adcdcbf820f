"""Patterns of layer names: the one place that says which names a pattern matches.

A pattern is a shell pattern (`*`, `?`, `[...]`) for whole names, and upper and lower case differ on every system:
"layer1.*" matches "layer1.conv", not "layer10.conv" and not "Layer1.conv".
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from tracequant.core.errors import ModelError, TracequantError


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern matches, in their order; perhaps none.

    >>> matching("layer1.*", ["layer1.conv", "layer10.conv", "Layer1.conv"])
    ['layer1.conv']
    """
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def match_names(
    patterns: Iterable[str],
    names: Sequence[str],
    purpose: str,
    kind: str = "layer",
    error: type[TracequantError] = ModelError,
) -> list[str]:
    """The names that any of the patterns matches, in their own order.

    Raises `error` for a pattern that matches none of them; `purpose` is what the pattern was given for, `kind` what has
    the names.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = matching(pattern, names)
        if not hits:
            raise error(f"{purpose} pattern {pattern!r} matches no {kind}; there are {some_names(names) or 'none'}")
        matched.update(hits)
    return [name for name in names if name in matched]


def some_names(names: Sequence[str]) -> str:
    """The first six names as a list in words, and how many there are."""
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown}, ... ({len(names)} in all)"
