"""The library's errors name Python arguments; here they are translated to the options of the command line."""

from __future__ import annotations

import functools
import re

from tracequant.cli.options import FieldOption, field_options
from tracequant.core.settings import AnalysisSettings, FinetuneSettings, PlanSettings


def in_shell_words(text: str, argument: str | None = None) -> str:
    """The text with arguments spelled as options: `precision='bfloat16'` becomes `--precision bfloat16`.

    A name without a value is translated only where it cannot be an ordinary word or a piece of a path: it has an
    underscore, or it is the `argument` with which the message of a `SettingsError` begins.

    >>> in_shell_words("try average_bits=3, or a smaller max_size_mib")
    'try --average-bits 3, or a smaller --max-size-mib'
    >>> in_shell_words("for instance with exclude=['aux.*', 'head']")
    "for instance with --exclude 'aux.*' --exclude 'head'"
    >>> in_shell_words("steps must be an integer >= 0, got -1", "steps")
    '--finetune-steps must be an integer >= 0, got -1'
    >>> in_shell_words("give at least one budget: max_size_mib, compression, average_bits")
    'give at least one budget: --max-size-mib, --compression, --average-bits'
    """
    entries = _entries()
    if argument in entries and re.match(rf"{argument}\b", text):
        text = _bare(entries[argument]) + text.removeprefix(argument)
        text = text.replace(" or None, got", ", got")  # in the shell, None is to leave the option out
    text = re.sub(r"^(layer|block)s pattern\b", r"--\1 pattern", text)  # of `figures`, whose options are no settings
    with_value, alone = _patterns()
    text = with_value.sub(lambda match: _with_value(entries[match[1]], match[2]), text)
    text = alone.sub(lambda match: _bare(entries[match[1]]), text)
    return _in_a_list().sub(lambda match: _bare(entries[match[0]]), text)


@functools.cache
def _entries() -> dict[str, FieldOption]:
    """Every option that a command makes of a settings field, by the field's name."""
    kinds = (AnalysisSettings, PlanSettings, FinetuneSettings)
    return {entry.name: entry for kind in kinds for entry in field_options(kind)}


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds `name=value`, and a name alone."""
    names = sorted(_entries(), key=len, reverse=True)
    long_names = [name for name in names if "_" in name]
    value = r"\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[\w.+-]*\w"
    return (
        re.compile(rf"(?<![\w./'\"-])({'|'.join(names)})=({value})"),
        re.compile(rf"(?<![\w./'\"=-])({'|'.join(long_names)})(?![\w=(/'\"]|\.\w)"),
    )


@functools.cache
def _in_a_list() -> re.Pattern[str]:
    """What finds a name of one word that stands right before an option, in a list of options."""
    words = sorted((name for name in _entries() if "_" not in name), key=len, reverse=True)
    return re.compile(rf"(?<![\w./'\"=-])({'|'.join(words)})(?=(?:, | and | or )--\w)")


def _bare(entry: FieldOption) -> str:
    return entry.flag.split("/")[0]


def _with_value(entry: FieldOption, value: str) -> str:
    if entry.annotation is bool:
        on, off = entry.switches
        return on if value == "True" else off
    if value in ("True", "False"):  # a Python argument that shares its name with an option, which is no switch
        return f"{entry.name}={value}"
    if value.startswith("["):  # a repeatable option
        return " ".join(f"{entry.flag} {item}" for item in value[1:-1].split(", "))
    value = value.strip("'\"")
    return f"{entry.flag} {value}"
