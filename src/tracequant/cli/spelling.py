"""The library's errors name Python arguments; here they are translated to the options of the command line."""

from __future__ import annotations

import functools
import re

from tracequant.cli.options import FieldOption, field_options
from tracequant.core.settings import AnalysisSettings, FinetuneSettings, PlanSettings


@functools.cache
def _entries() -> dict[str, FieldOption]:
    kinds = (AnalysisSettings, PlanSettings, FinetuneSettings)
    return {entry.name: entry for kind in kinds for entry in field_options(kind)}


def in_shell_words(text: str) -> str:
    """The text with arguments spelled as options: `precision='bfloat16'` becomes `--precision bfloat16`.

    A bare name is translated where it can be nothing else: one with an underscore.

    >>> in_shell_words("try average_bits=3, or a smaller max_size_mib")
    'try --average-bits 3, or a smaller --max-size-mib'
    """
    names = sorted(_entries(), key=len, reverse=True)
    given = re.compile(rf"(?<![\w.-])({'|'.join(names)})=('[^']*'|\"[^\"]*\"|[\w.+-]*\w)")
    bare = re.compile(rf"(?<![\w.=-])({'|'.join(name for name in names if '_' in name)})(?![\w=(])")

    def with_value(match: re.Match[str]) -> str:
        entry, value = _entries()[match[1]], match[2].strip("'\"")
        switches = entry.flag.split("/")
        if entry.annotation is bool:
            on, off = switches if len(switches) == 2 else (entry.flag, entry.flag.replace("--", "--no-", 1))
            return on if value == "True" else off
        return f"{entry.flag} {value}"

    return bare.sub(lambda match: _entries()[match[1]].flag.split("/")[0], given.sub(with_value, text))
