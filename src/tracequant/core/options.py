"""Options that are declared once: fields of a frozen dataclass with a default, a range and a help text. No torch.

    @dataclass(frozen=True)
    class TrainingSettings:
        steps: int = option(400, "number of training steps", minimum=0)

        def __post_init__(self) -> None:
            validate(self)

    @takes(TrainingSettings)
    def train(model: Model, settings: TrainingSettings | None = None, **fields: object) -> None:
        settings = resolve(TrainingSettings, settings, fields)

`train(model, steps=10)` and `train(model, TrainingSettings(steps=10))` are the same call, and `help(train)` lists the
fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from tracequant.core.errors import SettingsError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


@dataclass(frozen=True)
class Option:
    """What a field of a settings class says about itself, beyond its type and its default.

    Numbers lie in `minimum` <= x <= `maximum` and `above` < x < `below`. In tuples and dictionaries every number does.
    The rest is for the command line: `flag` replaces the name made from the field, `metavar` stands for the value,
    `panel` is the group in the help, and an `expert` option is left out of the short help. An option that is not
    `decisive` says where values are computed and not which they are.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    flag: str | None = None
    metavar: str | None = None
    panel: str = ""
    expert: bool = False
    decisive: bool = True

    @property
    def range(self) -> str:
        """The limits as a comparison, such as ">= 0 and < 1"; empty if there are none."""
        limits = ((">=", self.minimum), (">", self.above), ("<=", self.maximum), ("<", self.below))
        return " and ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)

    def contains(self, number: float) -> bool:
        """Whether the number is within all limits."""
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    flag: str | None = None,
    metavar: str | None = None,
    panel: str = "",
    expert: bool = False,
    decisive: bool = True,
) -> Any:
    """A dataclass field with this default that carries an `Option`; a required field where the default is `...`."""
    described = Option(help, minimum, maximum, above, below, flag, metavar, panel, expert, decisive)
    if default is ...:
        return dataclasses.field(metadata={"option": described})
    return dataclasses.field(default=default, metadata={"option": described})


def options(kind: Any) -> dict[str, Option]:
    """The `Option` of every field of a settings class that was declared by `option`, in the order of the fields."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(kind) if "option" in field.metadata}


def validate(settings: Any) -> None:
    """Check all fields of a settings object against their types and ranges; to be called by its `__post_init__`.

    Each value gets the exact type of its field: an integer becomes a float, a list becomes a tuple, a NumPy number
    becomes a Python number. Equal settings are then equal in a file too. Raises `SettingsError`.
    """
    kind: Any = type(settings)
    described, annotations = options(kind), _annotations(kind)
    for field in dataclasses.fields(kind):
        rules = described.get(field.name, _UNLIMITED)
        value = getattr(settings, field.name)
        try:
            checked = _checked(value, annotations[field.name], rules)
        except _Mismatch:
            raise SettingsError(_complaint(field.name, value, annotations[field.name], rules), field.name) from None
        object.__setattr__(settings, field.name, checked)  # the class is frozen, and this object is not finished yet


def ascending(settings: Any, *names: str, required: Iterable[str] = ()) -> None:
    """Sort the numbers of these fields, each once: their order says nothing, and equal requests are then equal.

    To be called after `validate`. Raises `SettingsError` if a field that is `required` has none.
    """
    for name in names:
        numbers_once = tuple(sorted(set(getattr(settings, name))))
        if not numbers_once and name in required:
            raise SettingsError(f"{name} is empty; name at least one", name)
        object.__setattr__(settings, name, numbers_once)


def resolve(kind: type[S], settings: S | None, fields: Mapping[str, object], without: Collection[str] = ()) -> S:
    """The settings with `fields` replaced; without settings, the defaults of `kind` with `fields` replaced.

    The fields in `without` are no arguments of the function. Raises `SettingsError` if a field does not exist or a
    value is not allowed.
    """
    names = [field.name for field in dataclasses.fields(typing.cast(Any, kind)) if field.name not in without]
    for name in fields:
        if name not in names:
            raise SettingsError(
                f"{name} is not an argument here; {kind.__name__} has {', '.join(names)}{_suggestion(name, names)}",
                name,
            )
    if settings is None:
        return kind(**fields)
    if not isinstance(settings, kind):
        raise SettingsError(
            f"settings must be a {kind.__name__}, got {settings!r}; pass single values by keyword, such as"
            f" {names[0]}=...",
            "settings",
        )
    return typing.cast(S, dataclasses.replace(typing.cast(Any, settings), **fields))


def takes(kind: type[Any], without: Collection[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for a function that takes the fields of `kind` as `**fields`.

    Its signature and its docstring then list the fields with their defaults and help texts, except those in `without`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        by_keyword = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=field.type,
            )
            for field in dataclasses.fields(kind)
            if field.name not in without
        ]
        typing.cast(Any, function).__signature__ = signature.replace(parameters=[*own, *by_keyword])
        listing = "\n".join(
            f"    {name}: {_help_line(described)}" for name, described in options(kind).items() if name not in without
        )
        text = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = f"{text}\n\nFields of {kind.__name__}:\n\n{listing}\n"
        return function

    return decorate


def decisive(settings: Any) -> dict[str, object]:
    """The fields that decide values and differ from their defaults, by name; nested settings are dictionaries.

    A new option with its default therefore changes nothing that was recorded before there was one.
    """
    kind: Any = type(settings)
    described, annotations = options(kind), _annotations(kind)
    chosen: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(annotations[field.name]):
            if nested := decisive(value):
                chosen[field.name] = nested
        elif described[field.name].decisive and value != field.default:
            chosen[field.name] = value
    return chosen


class _Mismatch(Exception):
    """A value does not fit its annotation or its range."""


_UNLIMITED = Option("")


def _annotations(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _checked(value: Any, annotation: Any, rules: Option) -> Any:
    """The value in the type that the annotation asks for, or `_Mismatch`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _checked_union(value, arguments, rules)
    if origin is typing.Literal:
        # 1 == True == 1.0 in Python, but not in a file.
        return _only(value, any(type(value) is type(choice) and value == choice for choice in arguments))
    if origin is tuple:
        items = tuple(_only(value, isinstance(value, (tuple, list))))
        if len(arguments) != 2 or arguments[1] is not ...:
            raise TypeError(f"{annotation} is not supported; declare tuple[X, ...]")
        return tuple(_checked(item, arguments[0], rules) for item in items)
    if origin is dict:
        items = _only(value, isinstance(value, Mapping)).items()
        # A range is one of values; keys are names, or bit widths.
        return {_checked(key, arguments[0], _UNLIMITED): _checked(item, arguments[1], rules) for key, item in items}
    if annotation is bool:
        return _only(value, isinstance(value, bool))
    if annotation is int:
        integer = int(_only(value, isinstance(value, numbers.Integral) and not isinstance(value, bool)))
        return _only(integer, rules.contains(integer))
    if annotation is float:
        number = float(_only(value, isinstance(value, numbers.Real) and not isinstance(value, bool)))
        return _only(number, math.isfinite(number) and rules.contains(number))
    if isinstance(annotation, type):
        return _only(value, isinstance(value, annotation))
    raise TypeError(f"a field of a settings class cannot have the type {annotation}")


def _checked_union(value: Any, choices: Iterable[Any], rules: Option) -> Any:
    for choice in choices:
        try:
            return _checked(value, choice, rules)
        except _Mismatch:
            continue
    raise _Mismatch


def _only(value: Any, allowed: bool) -> Any:
    if not allowed:
        raise _Mismatch
    return value


def _complaint(name: str, value: Any, annotation: Any, rules: Option) -> str:
    expected = _expectation(annotation, rules)
    if isinstance(value, float) and not math.isfinite(value):
        expected = expected.replace("a number", "a finite number")
    return f"{name} must be {expected}, got {value!r}{_suggestion(value, _choices(annotation))}"


def _expectation(annotation: Any, rules: Option) -> str:
    """What a value must be, in words that follow "must be"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    limits = f" {rules.range}" if rules.range else ""
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expectation(argument, rules) for argument in arguments)
    if origin is typing.Literal:
        *first, last = map(repr, arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple:
        return f"a sequence whose every item is {_expectation(arguments[0], rules)}"
    if origin is dict:
        return f"a dictionary from {_expectation(arguments[0], _UNLIMITED)} to {_expectation(arguments[1], rules)}"
    names = {bool: "True or False", int: f"an integer{limits}", float: f"a number{limits}", str: "a string"}
    return "None" if annotation is type(None) else names.get(annotation, f"a {annotation.__name__}")


def _choices(annotation: Any) -> list[str]:
    """The strings that an annotation allows, at any depth."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return [choice for choice in arguments if isinstance(choice, str)]
    return [choice for argument in arguments for choice in _choices(argument)]


def _suggestion(value: object, known: Iterable[str]) -> str:
    """A question about the nearest of the known names, or the one with these initials (lr); empty if none is near."""
    if not isinstance(value, str):
        return ""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1)
    near += [name for name in names if "_" in name and value == "".join(word[:1] for word in name.split("_"))]
    return f"; did you mean {near[0]!r}?" if near else ""


def _help_line(described: Option) -> str:
    return f"{described.help} ({described.range})" if described.range else described.help
