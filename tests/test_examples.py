"""The examples run as they are, on local data where they need some."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tracequant as tq

pytest.importorskip("torchvision", reason="FastestDet decodes with torchvision")

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TRACEQUANT_DATA") or ROOT.parent / "shared" / "data") / "coco_val_mini"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there (set TRACEQUANT_DATA)")


@pytest.fixture(scope="module")
def fastestdet() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("fastestdet_example", ROOT / "examples" / "fastestdet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_data
def test_fastestdet_reproduces_its_published_weights_precision(fastestdet: ModuleType) -> None:
    """AP 17.3, AP50 31.8 and AP75 16.9 were measured with these weights on these images by another program."""
    setup = fastestdet.build(str(DATA), samples=1)
    found = setup.task.evaluate(setup.model, fastestdet.Images(DATA))
    assert found.samples == 177
    assert round(found.metric, 1) == 17.3
    assert round(found.details["AP50"], 1) == 31.8
    assert round(found.details["AP75"], 1) == 16.9


@needs_data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:by metric='first.quadratic' fewer bits lower the loss:UserWarning")
def test_fastestdet_is_quantized_by_every_method(
    fastestdet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--data-dir", str(DATA), "--images", "16", "--calibration", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["fastestdet.py", *arguments])
    fastestdet.main()
    assert "gauss_newton: these Gauss-Newton traces equal the Hessian's" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 1 + 4 + 2 + 4 * (3 + 2)
    assert rows["uniform 8-bit weights"]["AP"] > 0.8 * rows["float32"]["AP"]
    for bits in (4, 5, 6):
        mixed = rows[f"mixed weights, trace, {bits} bits on average"]
        assert mixed["weight_bits"] <= bits
    assert rows["uniform 4-bit weights"]["AP"] < 0.5 * rows["uniform 8-bit weights"]["AP"]


def test_fastestdet_says_what_data_it_needs(fastestdet: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACEQUANT_DATA", raising=False)
    with pytest.raises(tq.TaskError, match="set TRACEQUANT_DATA"):
        fastestdet.build()
