"""Options of the command line, made from the fields of the settings (`tracequant.core.settings`).

A command declares a parameter of a settings class, and `with_settings` replaces it by one option for every field of the
class. Default, range, help text and panel are those of the field.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tracequant.cli.requests import reader
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
    """Marks a parameter of a settings class: the command has no options for these fields."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class FieldOption:
    """One field of a settings class as an option: its type and default in Python, and its spelling in the shell."""

    name: str
    annotation: Any
    default: Any
    option: Option

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """The option's spelling: `--average-bits`, or `--eigenvalues/--no-eigenvalues` for a switch."""
        if self.option.flag is not None:
            return self.option.flag
        word = self.name.replace("_", "-")
        return f"--{word}/--no-{word}" if self.annotation is bool else f"--{word}"

    @property
    def switches(self) -> tuple[str, str]:
        """The flags that mean True and False; only a switch has them."""
        on, off = self.flag.split("/")
        return on, off

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
            yield FieldOption(field.name, hints[field.name], field.default, field.metadata["option"])


def build(kind: Any, values: Mapping[str, Any], without: Collection[str] = ()) -> Any:
    """The settings object from the values of a command's parameters; the fields in `without` keep their defaults."""
    hints = typing.get_type_hints(kind)
    by_name = {entry.name: entry for entry in field_options(kind)}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in without:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            fields[field.name] = build(hints[field.name], values, without)
        else:
            entry = by_name[field.name]
            fields[field.name] = reader(entry.annotation).value(values[entry.parameter], entry.flag)
    return kind(**fields)


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter of a settings class replaced by the options of its fields."""
    hints = typing.get_type_hints(function, include_extras=True)
    settings: dict[str, tuple[Any, tuple[str, ...]]] = {}
    plain: list[inspect.Parameter] = []
    entries: list[FieldOption] = []
    for parameter in inspect.signature(function).parameters.values():
        annotation = hints[parameter.name]
        kind, without = _settings_class(annotation)
        if kind is None:
            plain.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
        else:
            settings[parameter.name] = kind, without
            entries += [entry for entry in field_options(kind) if entry.name not in without]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        arguments = {parameter.name: values[parameter.name] for parameter in plain}
        objects = {name: build(kind, values, without) for name, (kind, without) in settings.items()}
        function(**arguments, **objects)

    parameters = [*map(_parameter, entries), *plain]
    if any(entry.option.expert for entry in entries):
        parameters.append(_HELP_ALL)
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
    option, field_reader = entry.option, reader(entry.annotation)
    info = typer.Option(
        entry.flag,
        help=f"{option.help}  [{option.range}]" if option.range else option.help,
        metavar=option.metavar,
        rich_help_panel=option.panel,
        hidden=option.expert,
        show_default=not entry.required and entry.default not in (None, ()),
    )
    return inspect.Parameter(
        entry.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if entry.required else field_reader.shown(entry.default),
        annotation=Annotated[field_reader.shell_type, info],
    )


def _show_all(context: typer.Context, wanted: bool) -> None:
    """Print the help with the options for experts, and exit."""
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        print(context.get_help())
        raise typer.Exit


_HELP_ALL = inspect.Parameter(
    "help_all",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--help-all",
            help="show all options, those for experts too, and exit",
            is_eager=True,
            callback=_show_all,
            rich_help_panel="Output",
        ),
    ],
)
