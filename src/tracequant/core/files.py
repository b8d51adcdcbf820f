"""Saving and loading: frozen dataclasses as JSON, and files that are either whole or not there at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from tracequant.core.errors import ArtifactError, SettingsError

FORMAT_VERSION = 3


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed onto it when the block ends and removed when it fails.

    A reader therefore sees the old file or the complete new one, never a part. Folders that are missing are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only the owner reads
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write plain JSON to `path`, whole or not at all; floats keep every bit."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path, advice: str = "delete it to have it made anew") -> Any:
    """The JSON value in `path`; `ArtifactError` if the file is missing, or damaged, which ends with the advice."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}); {advice}") from None


class Saveable:
    """Gives a frozen dataclass `save`, `load`, `to_json` and `from_json`; a loaded value equals the saved one."""

    def to_json(self) -> dict[str, Any]:
        """The value as plain JSON types, with its kind and the format version."""
        return {"kind": type(self).__name__, "version": FORMAT_VERSION, **_encode_fields(self)}

    @classmethod
    def from_json(cls, document: Any, source: str = "document") -> Self:
        """The value that `to_json` gave; `ArtifactError` on another kind, version, field or type."""
        if not isinstance(document, dict) or document.get("kind") != cls.__name__:
            found = document.get("kind") if isinstance(document, dict) else type(document).__name__
            raise ArtifactError(f"{source} holds {found!r}, expected a {cls.__name__}")
        if document.get("version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{source} has format version {document.get('version')!r}, this tracequant reads version"
                f" {FORMAT_VERSION}; make the file anew with this version"
            )
        fields = {key: value for key, value in document.items() if key not in ("kind", "version")}
        return typing.cast(Self, _decode(cls, fields, source))

    def save(self, path: str | Path) -> None:
        """Write the value to `path` as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; `ArtifactError` names what is wrong with the file."""
        return cls.from_json(read_json(path), str(path))


def _encode_fields(value: Any) -> dict[str, Any]:
    return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _encode_fields(value)
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "inf", "nan": JSON has no numbers for them
    return value


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in (argument for argument in arguments if argument is not type(None)):
            with suppress(ArtifactError):
                return _decode(option, value, where)
        raise ArtifactError(f"{where}: {value!r} is not {kind}")
    if origin is typing.Literal:
        if value not in arguments:
            raise ArtifactError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: expected an object, found {type(value).__name__}")
        key_kind, item_kind = arguments
        try:
            return {key_kind(key): _decode(item_kind, item, f"{where}.{key}") for key, item in value.items()}
        except ValueError as error:
            raise ArtifactError(f"{where}: {error}") from None
    if origin is tuple:
        if not isinstance(value, list):
            raise ArtifactError(f"{where}: expected a list, found {type(value).__name__}")
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ArtifactError(f"{where}: {value!r} is not a number") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ArtifactError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: expected an object, found {type(value).__name__}")
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    required = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if unknown := value.keys() - names:
        raise ArtifactError(f"{where}: unknown field {', '.join(sorted(unknown))}")
    if missing := required - value.keys():
        raise ArtifactError(f"{where}: missing field {', '.join(sorted(missing))}")
    decoded = {name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**decoded)
    except SettingsError as error:
        raise ArtifactError(f"{where}: {error}") from None
