"""How the shell gives the values of settings: lists of bits, PATTERN=BITS rules, tables, paths."""

from __future__ import annotations

import functools
import operator
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import typer

from tracequant.core.settings import CRITERIA, Criterion, Latency
from tracequant.core.tables import read_latency


@dataclass(frozen=True)
class Reader:
    """How the shell gives a value of one type.

    typer reads a `shell_type`; `value` makes the field's value of it and raises an error that names the flag; `shown`
    is the way back, for a default.
    """

    shell_type: Any
    value: Callable[[Any, str], Any]
    shown: Callable[[Any], Any]


def reader(annotation: Any) -> Reader:
    """The reader of a field's type; a type that this module does not know is read by typer."""
    kinds = typing.get_args(annotation)
    if type(None) not in kinds:
        return _READERS.get(annotation) or Reader(annotation, _as_it_is, shown=lambda value: value)
    plain = reader(functools.reduce(operator.or_, (kind for kind in kinds if kind is not type(None))))

    def value(text: Any, flag: str) -> Any:
        # typer gives an empty list for a repeatable option that is absent.
        return None if text is None or text == [] else plain.value(text, flag)

    return Reader(plain.shell_type | None, value, lambda default: None if default is None else plain.shown(default))


def parse_bits(text: str, flag: str) -> tuple[int, ...]:
    """Bit widths from a list such as 2,3,4,8; "none" is the empty list where an option allows it."""
    if flag == "--activation-bits" and text.strip() == "none":
        return ()
    try:
        bits = tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        bad_parameter(f"{flag} takes numbers from 1 to 8 separated by commas, got {text!r}")
    if not all(1 <= num_bits <= 8 for num_bits in bits):
        bad_parameter(f"{flag} takes bit widths from 1 to 8, got {text!r}")
    return bits


def parse_criteria(text: str) -> list[Criterion]:
    """Criteria from a list such as trace,l2."""
    names = [name.strip() for name in text.split(",")]
    chosen: list[Criterion] = [criterion for name in names for criterion in CRITERIA if criterion == name]
    if len(chosen) != len(names):
        bad_parameter(f"--criteria takes some of {', '.join(CRITERIA)}, got {text!r}")
    return chosen


def absolute(path: str | None) -> str | None:
    """An existing path as seen from anywhere: the run may be resumed from another folder."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def absolute_task(spec: str) -> str:
    """A task with the path of its file made absolute."""
    file, colon, function = spec.rpartition(":")
    return f"{absolute(file)}{colon}{function}" if colon else spec


def bad_parameter(text: str) -> NoReturn:
    """Raise the error that prints a command's usage."""
    raise typer.BadParameter(text)


def _as_it_is(value: Any, flag: str) -> Any:
    return value


def _rules(texts: list[str], flag: str) -> dict[str, tuple[int, ...]]:
    """PATTERN=LIST options as a dictionary."""
    rules: dict[str, tuple[int, ...]] = {}
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        if not (pattern and equals):
            bad_parameter(f"{flag} takes PATTERN=BITS, such as 'layer1.*=4', got {text!r}")
        rules[pattern] = parse_bits(bits, flag)
    return rules


def _single_rules(texts: list[str], flag: str) -> dict[str, int]:
    """PATTERN=BITS options as a dictionary."""
    rules = _rules(texts, flag)
    for pattern, bits in rules.items():
        if len(bits) != 1:
            bad_parameter(f"{flag} takes one bit width for {pattern!r}; --allowed-bits takes several")
    return {pattern: bits[0] for pattern, bits in rules.items()}


def _shown_rules(rules: dict[str, Any]) -> list[str]:
    return [f"{pattern}={bits}" for pattern, bits in rules.items()]


# A field of another type that typer does not read needs an entry here.
_READERS: dict[Any, Reader] = {
    tuple[int, ...]: Reader(str, parse_bits, shown=lambda bits: ",".join(map(str, bits)) or "none"),
    tuple[str, ...]: Reader(list[str], lambda texts, flag: tuple(texts), shown=list),
    dict[str, int]: Reader(list[str], _single_rules, shown=_shown_rules),
    dict[str, tuple[int, ...]]: Reader(list[str], _rules, shown=_shown_rules),
    Latency: Reader(Path, lambda path, flag: read_latency(path), shown=str),
    int | Literal["exact"]: Reader(
        str, lambda text, flag: int(text) if text.lstrip("-").isdigit() else text, shown=str
    ),
}
