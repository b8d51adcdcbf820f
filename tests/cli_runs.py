"""The program called in this process as the installed one calls it, and the run that several test files share."""

from __future__ import annotations

from pathlib import Path

import tiny_task
from tracequant.cli import app as cli

TASK = f"{Path(tiny_task.__file__)}:build"
ANALYZE = ("--task", TASK, "--num-probes", "2", "--no-eigenvalues", "--activation-bits", "4")
STAGED = ("run", *ANALYZE, "--average-bits", "3", "--finetune-steps", "60", "-q")


def invoke(*arguments: object) -> int:
    """Exit code of `tracequant` with these arguments."""
    return cli.run_guarded(lambda: cli.app([str(argument) for argument in arguments]))


def modified(path: Path) -> dict[str, int]:
    """Time of last change of every file of a run, but those that every call rewrites."""
    skipped = ("settings.json", "stages.json", "report.html")
    return {
        str(file.relative_to(path)): file.stat().st_mtime_ns
        for file in path.rglob("*")
        if file.is_file() and file.name not in skipped and file.parent.name != "figures"
    }
