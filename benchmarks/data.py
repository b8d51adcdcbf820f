"""Where benchmarks and tests find real data: TRACEQUANT_DATA, or ../shared/data beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data"


def data_folder(*names: str) -> Path | None:
    """The data folder if it holds all of `names`, else None."""
    folder = Path(os.environ.get("TRACEQUANT_DATA") or DEFAULT)
    return folder if all((folder / name).exists() for name in names) else None
