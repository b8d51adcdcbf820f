"""The house keeps its order: short files, packages that hold nothing themselves, public names that are documented."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import tracequant as tq

SOURCE = Path(tq.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST = 400


def named(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def test_every_file_says_what_it_is_for() -> None:
    assert [named(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name == "__init__.py" and path.parent != SOURCE], ids=named
)
def test_a_package_holds_a_docstring_and_exports_alone(path: Path) -> None:
    assert [ast.unparse(node) for node in ast.parse(path.read_text()).body if not is_export(node)] == []


def is_export(node: ast.stmt) -> bool:
    """A docstring, an import, or the list `__all__`."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets] == ["__all__"]
    return isinstance(node, (ast.Import, ast.ImportFrom))


@pytest.mark.parametrize("name", tq.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    value = getattr(tq, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        # A dataclass without a docstring gets its signature for one.
        assert not (value.__doc__ or value.__name__).startswith(value.__name__), f"{name} has no docstring"
