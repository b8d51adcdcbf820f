"""The public face of the package: what it names, and that importing it costs nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tracequant


def test_all_is_sorted_and_without_repeats() -> None:
    assert sorted(set(tracequant.__all__)) == tracequant.__all__


@pytest.mark.parametrize("name", tracequant.__all__)
def test_every_name_is_there_and_is_the_one_from_its_module(name: str) -> None:
    value = getattr(tracequant, name)
    assert value is getattr(importlib.import_module(tracequant._HOMES[name]), name)
    if hasattr(value, "__module__"):
        assert value.__module__.startswith("tracequant")
        assert value.__name__ == name


def test_all_and_the_lazy_table_agree() -> None:
    assert set(tracequant._HOMES) == set(tracequant.__all__)
    assert sum(len(names) for names in tracequant._MODULES.values()) == len(tracequant.__all__)
    assert dir(tracequant) == tracequant.__all__


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING against the lazy table."""
    tree = ast.parse(Path(str(tracequant.__file__)).read_text())
    seen = {
        alias.name: str(node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == tracequant._HOMES


def test_the_names_that_the_design_promises() -> None:
    promised = {
        "ClassificationTask", "Task", "estimate_curvature", "measure_sensitivity", "solve", "frontier", "quantize",
        "finetune", "pack", "load",
    }  # fmt: skip
    assert promised <= set(tracequant.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tracequant' has no attribute 'quantise'"):
        tracequant.quantise  # type: ignore[attr-defined] # noqa: B018
    with pytest.raises(ImportError, match="quantise"):
        from tracequant import quantise  # type: ignore[attr-defined] # noqa: F401


def test_every_error_is_a_tracequant_error() -> None:
    errors = [name for name in tracequant.__all__ if name.endswith("Error")]
    assert len(errors) >= 7
    for name in errors:
        assert issubclass(getattr(tracequant, name), tracequant.TracequantError)
    assert tracequant.TracequantError.__bases__ == (Exception,)


def test_a_star_import_brings_everything() -> None:
    namespace: dict[str, object] = {}
    exec("from tracequant import *", namespace)
    assert set(tracequant.__all__) <= set(namespace)


def test_names_do_not_depend_on_what_was_imported_first() -> None:
    """Importing a submodule sets an attribute of the package, which must not hide a function of the same name."""
    script = """
import importlib, sys
import tracequant
for module in set(tracequant._MODULES):
    importlib.import_module(module)
wrong = [name for name in tracequant.__all__ if type(getattr(tracequant, name)) is type(sys)]
assert not wrong, f"{wrong} is a module"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    script = (
        "import sys, tracequant; dir(tracequant); tracequant.__version__; "
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
