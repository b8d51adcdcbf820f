"""Options of the command line, made from the fields of the settings (`tracequant.core.settings`).

A command declares a parameter of a settings class, and `with_settings` replaces it by one option for every field of the
class. Default, range, help text and panel are those of the field.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tracequant.cli.requests import parse, shown_default
from tracequant.core.options import Option

RunPath = Annotated[Path, typer.Argument(help="run directory", metavar="RUN")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors", rich_help_panel="Output")]
AsJson = Annotated[
    bool, typer.Option("--json", help="print the result as JSON on standard output", rich_help_panel="Output")
]
Out = Annotated[
    Path, typer.Option("--out", help="run directory to make or to resume", metavar="RUN", rich_help_panel="Output")
]


@dataclass(frozen=True)
class Without:
    """Marks a parameter of a settings class: the command has no option for these fields."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class FieldOption:
    """One field of a settings class as an option: where the value goes, and how it is written in the shell."""

    name: str
    annotation: Any
    default: Any
    option: Option

    @classmethod
    def of(cls, field: dataclasses.Field[Any], annotation: Any) -> FieldOption:
        """The option of a field that `tracequant.core.options.option` declared."""
        return cls(field.name, annotation, field.default, field.metadata["option"])

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """The option's spelling: `--average-bits`, or `--symmetric/--asymmetric` for a switch."""
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    @property
    def parameter(self) -> str:
        """The name of the command's parameter, which presets use: the flag's first spelling."""
        return self.flag.split("/")[0].removeprefix("--").replace("-", "_")


def field_options(kind: type) -> Iterator[FieldOption]:
    """The options of a settings class, those of nested settings classes included."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from field_options(hints[field.name])
        else:
            yield FieldOption.of(field, hints[field.name])


def build(kind: Any, values: Mapping[str, Any]) -> Any:
    """The settings object from the command's parameters; what is missing keeps its default."""
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            fields[field.name] = build(hints[field.name], values)
            continue
        entry = FieldOption.of(field, hints[field.name])
        if entry.parameter in values:
            fields[field.name] = parse(entry.annotation, values[entry.parameter], entry.flag)
    return kind(**fields)


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter of a settings class replaced by the options of its fields."""
    hints = typing.get_type_hints(function, include_extras=True)
    settings: dict[str, tuple[Any, tuple[str, ...]]] = {}
    parameters: list[inspect.Parameter] = []
    has_experts = False
    for parameter in inspect.signature(function).parameters.values():
        annotation = hints[parameter.name]
        kind, without = _settings_class(annotation)
        if kind is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
            continue
        settings[parameter.name] = kind, without
        for entry in field_options(kind):
            if entry.name not in without:
                parameters.append(_parameter(entry))
                has_experts = has_experts or entry.option.expert
    if has_experts:
        help_all = inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_HelpAll)
        parameters.append(help_all)

    @functools.wraps(function)
    def command(**values: Any) -> None:
        values.pop("help_all", None)
        given = dict(values)
        for name, (kind, without) in settings.items():
            taken = [entry for entry in field_options(kind) if entry.name not in without]
            values[name] = build(kind, {entry.parameter: given[entry.parameter] for entry in taken})
            for entry in taken:
                values.pop(entry.parameter, None)
        function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _settings_class(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """The settings class that a parameter stands for and the fields it leaves out; None for any other parameter."""
    without: tuple[str, ...] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *extras = typing.get_args(annotation)
        without = next((extra.names for extra in extras if isinstance(extra, Without)), ())
    return (annotation, without) if dataclasses.is_dataclass(annotation) else (None, ())


def _parameter(entry: FieldOption) -> inspect.Parameter:
    """A command's parameter for one field."""
    option = entry.option
    kind = _shell_type(entry.annotation)
    info = typer.Option(
        entry.flag,
        help=f"{option.help}  [{option.range}]" if option.range else option.help,
        metavar=option.metavar,
        rich_help_panel=option.panel,
        hidden=option.expert,
        show_default=not entry.required and entry.default not in (None, ()),
    )
    default = inspect.Parameter.empty if entry.required else shown_default(entry.annotation, entry.default)
    return inspect.Parameter(
        entry.parameter, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _shell_type(annotation: Any) -> Any:
    """The type that typer parses for a field; what typer does not know arrives as text."""
    optional = type(None) in typing.get_args(annotation)
    plain = (
        next((a for a in typing.get_args(annotation) if a is not type(None)), annotation) if optional else annotation
    )
    if optional and len(typing.get_args(annotation)) > 2:
        return str | None  # a number or a word
    if plain in (bool, int, float, str) or typing.get_origin(plain) is Literal:
        return plain | None if optional else plain
    if typing.get_origin(plain) is tuple:
        return str if typing.get_args(plain)[0] is int else list[str]
    if plain == _LATENCY:
        return Path | None
    return list[str] | None


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        print(context.get_help())
        raise typer.Exit


_LATENCY = dict[str, dict[int, dict[int, float]]]
_HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        help="show all options, those for experts too, and exit",
        is_eager=True,
        callback=_show_all,
        rich_help_panel="Output",
    ),
]
