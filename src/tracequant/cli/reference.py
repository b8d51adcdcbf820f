"""The page docs/options.md, printed from the declarations of the options: `python -m tracequant.cli.reference`."""

from __future__ import annotations

import typing
from typing import Literal

from tracequant.cli.options import FieldOption, field_options
from tracequant.cli.requests import reader
from tracequant.core.options import options
from tracequant.core.settings import (
    AnalysisSettings,
    CurvatureSettings,
    DiscoverSettings,
    FinetuneSettings,
    PlanSettings,
    SensitivitySettings,
    TaskOptions,
)
from tracequant.core.weight_grid import WeightGrid

# Settings class → the Python function that takes its fields by keyword, and the commands that have its options.
_PAGES: tuple[tuple[type, str, str], ...] = (
    (TaskOptions, "a task's `build(...)` receives these", "`analyze`, `run`"),
    (DiscoverSettings, "`tq.discover(model, batches, task, ...)`", "`analyze`, `run`"),
    (CurvatureSettings, "`tq.estimate_curvature(model, batches, task, ...)`", "`analyze`, `run`"),
    (SensitivitySettings, "`tq.measure_sensitivity(model, batches, task, curvature, ...)`", "`analyze`, `run`"),
    (WeightGrid, "`weight_grid=tq.WeightGrid(...)` of `tq.measure_sensitivity`", "`analyze`, `run`"),
    (AnalysisSettings, "settings of a run alone", "`analyze`, `run`"),
    (PlanSettings, "`tq.solve(sensitivity, ...)`", "`plan`, `run`"),
    (FinetuneSettings, "`tq.finetune(model, batches, task, ...)`", "`finetune`, `run`"),
)


def options_page() -> str:
    """The page as Markdown."""
    lines = [
        "# Options",
        "",
        "Every option of Python and of the command line, with its default and its range. `make docs` prints this page",
        "from the declarations in the code. An option of a Python function is a keyword argument. An object of the",
        "class that names the section may be passed instead: `tq.solve(sensitivity, tq.PlanSettings(average_bits=3))`.",
    ]
    for kind, function, commands in _PAGES:
        lines += ["", f"## {kind.__name__}", "", f"Python: {function}. Commands: {commands}.", ""]
        lines += ["| Python | command line | default | range | meaning |", "|---|---|---|---|---|"]
        # Nested settings have sections of their own.
        lines += [_row(entry) for entry in field_options(kind) if entry.name in options(kind)]
    return "\n".join(lines) + "\n"


def _row(entry: FieldOption) -> str:
    value = None if entry.required else reader(entry.annotation).shown(entry.default)
    default = "" if value is None or value == [] else f"`{' '.join(value) if isinstance(value, list) else value}`"
    flag = f"{entry.flag} {entry.option.metavar}" if entry.option.metavar is not None else entry.flag
    allowed = " or ".join(filter(None, (entry.option.range, _choices(entry))))
    meaning = entry.option.help.replace("|", "\\|")
    return f"| `{entry.name}` | `{flag}` | {default} | {allowed} | {meaning} |"


def _choices(entry: FieldOption) -> str:
    kinds = (entry.annotation, *typing.get_args(entry.annotation))
    words = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    print(options_page(), end="")
