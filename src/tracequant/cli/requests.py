"""From what the shell hands over to the values of settings: lists of bits, PATTERN=BITS rules, tables, paths."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, NoReturn

import typer

from tracequant.core.settings import CRITERIA, Criterion, Latency
from tracequant.core.tables import read_latency


def parse(annotation: Any, value: Any, flag: str) -> Any:
    """The value of a field of type `annotation` from an option's value; a wrong one is an error that names the flag."""
    if value is None:
        return None
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    kind = annotation if type(None) not in typing.get_args(annotation) else kinds[0] if len(kinds) == 1 else annotation
    if kind == tuple[int, ...]:
        return parse_bits(value, flag)
    if kind == tuple[str, ...]:
        return tuple(value)
    if kind == dict[str, int]:
        return _single(_rules(value, flag), flag) or None
    if kind == dict[str, tuple[int, ...]]:
        return _rules(value, flag) or None
    if kind == Latency:
        return read_latency(value)
    if len(kinds) > 1 and isinstance(value, str) and int in kinds:
        return int(value) if value.lstrip("-").isdigit() else value
    return value


def shown_default(annotation: Any, default: Any) -> Any:
    """A field's default as the option has it."""
    if isinstance(default, tuple) and typing.get_args(annotation)[0] is int:
        return ",".join(map(str, default)) or "none"
    return list(default) if isinstance(default, tuple) else default


def parse_bits(text: str, flag: str) -> tuple[int, ...]:
    """Bit widths from a list such as 2,3,4,8; "none" is the empty list where an option allows it."""
    if flag == "--activation-bits" and text.strip() == "none":
        return ()
    try:
        bits = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        bad_parameter(f"{flag} takes numbers from 1 to 8 separated by commas, got {text!r}")
    if not all(1 <= num_bits <= 8 for num_bits in bits):
        bad_parameter(f"{flag} takes bit widths from 1 to 8, got {text!r}")
    return bits


def parse_criteria(text: str) -> list[Criterion]:
    """Criteria from a list such as trace,l2."""
    names = [part.strip() for part in text.split(",")]
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


def _rules(texts: list[str], flag: str) -> dict[str, tuple[int, ...]]:
    """PATTERN=LIST options as a dictionary."""
    rules: dict[str, tuple[int, ...]] = {}
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        if not (pattern and equals):
            bad_parameter(f"{flag} takes PATTERN=BITS, such as 'layer1.*=4', got {text!r}")
        rules[pattern] = parse_bits(bits, flag)
    return rules


def _single(rules: dict[str, tuple[int, ...]], flag: str) -> dict[str, int]:
    for pattern, bits in rules.items():
        if len(bits) != 1:
            bad_parameter(f"{flag} takes one bit width for {pattern!r}; --allowed-bits takes several")
    return {pattern: bits[0] for pattern, bits in rules.items()}
