"""Fixtures for all tests: every device that this machine has, one thread on the CPU for each process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Libraries read these when they are loaded, and processes that a test starts inherit them: several processes of one
# thread each share the machine better than several with a thread for every core.
os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")})

import pytest
import torch
from matplotlib.figure import Figure

from cli_runs import STAGED, invoke

torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def blank_figures() -> Iterator[Callable[..., None]]:
    """Figures are made, but an empty picture is written: for modules that run whole flows and look at no picture.

    Drawing takes most of the time of a run on a small network. The value is `Figure.savefig` as it was.
    """

    def save(figure: Figure, target: Any, **options: Any) -> None:
        if hasattr(target, "write"):
            target.write(b"<svg/>")
        else:
            Path(target).write_bytes(b"<svg/>")

    drawn = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield drawn


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all stages done; tests that change it work on a copy."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    assert invoke(*STAGED, "--out", path) == 0
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
