"""Tables that come without a model: the format, its errors, latencies, and a published table solved to the optimum."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tracequant as tq
from cli_runs import invoke
from tracequant.core import cost
from tracequant.core.errors import ArtifactError, BudgetError
from tracequant.core.plan import MIB

DATA = Path(os.environ.get("TRACEQUANT_DATA") or Path(__file__).parents[2] / "shared" / "data")
PUBLISHED = DATA.parent / "reference" / "hawqv3_resnet18.json"

TABLE: dict[str, Any] = {
    "format": "tracequant-table",
    "layers": [
        {
            "name": "stem",
            "parameters": 1001,
            "macs": 5000,
            "average_trace": 2.0,
            "squared_perturbation": {"8": 0.01, "4": 3.0},
            "latency_ms": {"4": 1.0, "8": 2.0},
        },
        {
            "name": "head",
            "parameters": 4000,
            "macs": 4000,
            "average_trace": 0.5,
            "omega": {"4": 0.5, "8": 0.25},
            "input": {"elements": 64, "omega": {"4": 0.125, "8": 0.0}},
            "latency_ms": {"4": {"4": 1.0, "8": 1.5}, "8": {"4": 2.0, "8": 2.5}},
        },
    ],
}


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(document))
    return path


def test_a_table_is_a_sensitivity(tmp_path: Path) -> None:
    sensitivity = tq.read_sensitivity(written(tmp_path, TABLE))

    assert sensitivity.weight_omega == {"stem": {4: 6.0, 8: 0.02}, "head": {4: 0.5, 8: 0.25}}
    assert sensitivity.activation_omega == {"head": {4: 0.125, 8: 0.0}}
    assert sensitivity.latency["stem"] == {4: {32: 1.0}, 8: {32: 2.0}}
    plan = tq.solve(sensitivity, max_bops_g=(5000 * 8 * 32 + 4000 * 4 * 8) / 1e9)
    assert plan.weight_bits == {"stem": 8, "head": 8}  # 8 x 4 bits are as many operations as 4 x 8, and Ω is lower
    assert plan.activation_bits == {"head": 4}
    assert plan.size_bytes == 1001 + 4000
    assert plan.total_omega == 0.02 + 0.25 + 0.125
    assert tq.solve(sensitivity, max_latency_ms=3.0).weight_bits == {"stem": 8, "head": 4}
    assert tq.solve(sensitivity, average_bits=7, average_activation_bits=4).activation_bits == {"head": 4}
    assert cost.size_bytes(sensitivity.points, {"stem": 4, "head": 4}, {}, sensitivity.weight_grid) == 501 + 2000
    assert tq.frontier(sensitivity).size_bytes.tolist() == [501 + 2000, 1001 + 2000, 1001 + 4000]


def test_a_saved_sensitivity_is_read_too(tmp_path: Path) -> None:
    sensitivity = tq.read_sensitivity(written(tmp_path, TABLE))
    sensitivity.save(tmp_path / "saved.json")
    assert tq.read_sensitivity(tmp_path / "saved.json") == sensitivity


def test_ties_of_a_table_hold(tmp_path: Path) -> None:
    sensitivity = tq.read_sensitivity(written(tmp_path, TABLE | {"ties": [["head", "stem"]]}))
    assert sensitivity.points.ties == (("stem", "head"),)
    assert {plan.weight_bits["stem"] - plan.weight_bits["head"] for plan in tq.frontier(sensitivity)} == {0}


def with_layer(**fields: Any) -> dict[str, Any]:
    table = copy.deepcopy(TABLE)
    table["layers"][1] |= fields
    return {**table, "layers": [{k: v for k, v in layer.items() if v is not None} for layer in table["layers"]]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "is no table of sensitivities"),
        ({"format": "other", "layers": []}, "is no table of sensitivities"),
        ({**TABLE, "layers": []}, "layers is a list of at least one layer"),
        ({**TABLE, "same_bits": "yes"}, "same_bits is true or false"),
        (with_layer(name="stem"), r"layers\[1\] needs a name of its own, found 'stem'"),
        (with_layer(macs=None), "layer head: no macs"),
        (with_layer(parameters=1.5), "layer head.parameters: expected a whole number, found 1.5"),
        (with_layer(average_trace="high"), "layer head.average_trace: expected a finite number, found 'high'"),
        (with_layer(omega=None), "either squared_perturbation or omega"),
        (with_layer(omega={}), "layer head.omega: no bit width"),
        (with_layer(omega={"4.5": 1.0}), "'4.5' is no bit width"),
        (with_layer(color="red"), "layer head: unknown field color; known are average_trace, input"),
        (with_layer(latency_ms={"4": -1}), r"layer head.latency_ms.4: expected milliseconds, found -1"),
        ({**TABLE, "ties": [["stem", "tail"]]}, "ties name 'tail', which is no layer"),
        ({**TABLE, "ties": [["stem", "head"], ["head", "stem"]]}, "stem is in two ties"),
        ({**TABLE, "ties": "stem"}, "ties is a list of lists"),
        ({"delta_sq": {"4": [1.0]}, "parameters": [5, 6], "macs": [1, 2], "average_trace": [1.0, 1.0]}, "IndexError"),
    ],
)
def test_a_wrong_table_is_refused_by_the_field(document: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        tq.read_sensitivity(written(tmp_path, document))


def test_limits_that_a_table_cannot_answer(tmp_path: Path) -> None:
    sensitivity = tq.read_sensitivity(written(tmp_path, with_layer(input={"omega": {"4": 1.0, "8": 0.0}})))
    with pytest.raises(BudgetError, match="number of elements"):
        tq.solve(sensitivity, average_activation_bits=5)


# Latencies


def test_latency_as_csv_and_json(tmp_path: Path) -> None:
    expected = {"stem": {4: {32: 1.0}, 8: {32: 2.0}}, "head": {4: {4: 1.0, 8: 1.5}}}
    (tmp_path / "table.csv").write_text(
        "layer, weight_bits, activation_bits, ms\nstem, 4, 32, 1\nstem, 8, 32, 2.0\nhead, 4, 4, 1e0\nhead, 4, 8, 1.5\n"
    )
    (tmp_path / "table.json").write_text(json.dumps(expected))
    assert tq.read_latency(tmp_path / "table.csv") == expected
    assert tq.read_latency(tmp_path / "table.json") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "layer,weight_bits,ms\n", "no column activation_bits"),
        ("a.csv", "layer,weight_bits,activation_bits,ms\na,4,4,fast\n", "line 2: expected milliseconds, found 'fast'"),
        ("a.csv", "layer,weight_bits,activation_bits,ms\na,4,4,1\na,4,4,2\n", "line 3: a second entry for layer a"),
        ("a.csv", "layer,weight_bits,activation_bits,ms\na,4,0,1\n", "line 2: '0' is no bit width"),
        ("a.csv", "layer,weight_bits,activation_bits,ms\na,4\n", "line 2: None is no bit width"),
        ("a.json", '{"a": {"4": 1.0}}', "a.4: expected an object, found 1.0"),
        ("a.json", '{"a": {"4": {"4": null}}}', "a.4.4: expected milliseconds, found None"),
        ("missing.csv", None, "cannot be read"),
    ],
)
def test_a_wrong_latency_table_is_refused(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        tq.read_latency(tmp_path / name)


# The published table


def brute_force() -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """The published table, and size, BOPs, latency and Ω of all 2^16 assignments that its ties leave."""
    table = json.loads(PUBLISHED.read_text())
    units = [list(group) for group in table["ties"]]
    units += [[i] for i in range(table["layers"]) if not any(i in group for group in table["ties"])]
    assert len(units) == 16
    eight = np.array(list(itertools.product((0, 1), repeat=len(units))), dtype=bool)
    by_layer = np.zeros((len(eight), table["layers"]), dtype=bool)
    for column, group in enumerate(units):
        by_layer[:, group] = eight[:, [column]]

    def total(four: list[float], many: list[float]) -> np.ndarray[Any, Any]:
        return np.where(by_layer, many, four).sum(axis=1)

    trace, numel, macs = (np.array(table[key]) for key in ("average_trace", "parameters", "macs"))
    figures = {
        "max_size_mib": total(numel * 4 / 8 / MIB, numel * 8 / 8 / MIB),
        "max_bops_g": total(macs * 16 / 1e9, macs * 64 / 1e9),
        "max_latency_ms": total(table["latency_ms"]["4"], table["latency_ms"]["8"]),
        "omega": total(trace * table["delta_sq"]["4"], trace * table["delta_sq"]["8"]),
        "bits": np.where(by_layer, 8, 4),
    }
    return table, figures


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} is not there; set TRACEQUANT_DATA")
@pytest.mark.parametrize(
    "names",
    [
        ("max_size_mib",),
        ("max_bops_g",),
        ("max_latency_ms",),
        ("max_size_mib", "max_bops_g", "max_latency_ms"),
    ],
    ids="+".join,
)
def test_published_resnet18_is_solved_to_the_optimum(names: tuple[str, ...], tmp_path: Path) -> None:
    """Half way between all layers at 4 and all at 8 bits, by the library and by the command line."""
    table, figures = brute_force()
    limits = {name: float(figures[name].min() + figures[name].max()) / 2 for name in names}
    feasible = np.logical_and.reduce([figures[name] <= limits[name] * (1 + 1e-12) for name in names])
    best = int(np.flatnonzero(feasible)[figures["omega"][feasible].argmin()])

    plan = tq.solve(tq.read_sensitivity(PUBLISHED), **limits)  # type: ignore[arg-type]

    assert list(plan.weight_bits.values()) == figures["bits"][best].tolist()
    assert plan.omega == pytest.approx(figures["omega"][best], rel=1e-12)
    assert plan.gap == 0.0
    assert plan.size_mib == pytest.approx(figures["max_size_mib"][best], rel=1e-12)
    bits = list(plan.weight_bits.values())
    assert all(len({bits[i] for i in group}) == 1 for group in table["ties"])
    options = [text for name in names for text in (f"--{name.replace('_', '-')}", repr(limits[name]))]
    out = tmp_path / "plan.json"
    assert invoke("plan", "--sensitivity", PUBLISHED, "--weight-bits", "4,8", *options, "--out", out, "-q") == 0
    assert tq.BitPlan.load(out).weight_bits == plan.weight_bits


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} is not there; set TRACEQUANT_DATA")
def test_published_frontier_is_that_of_brute_force() -> None:
    _, figures = brute_force()
    sizes = np.round(figures["max_size_mib"] * MIB).astype(int)
    best, expected = math.inf, []
    for i in np.lexsort((figures["omega"], sizes)):
        if figures["omega"][i] < best * (1 - 1e-12):
            best = float(figures["omega"][i])
            expected.append((int(sizes[i]), best))
    front = tq.frontier(tq.read_sensitivity(PUBLISHED))
    assert front.size_bytes.tolist() == [size for size, _ in expected]
    assert front.omega == pytest.approx([omega for _, omega in expected], rel=1e-9)


# The command line


def test_plan_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, TABLE)
    assert invoke("plan", "--sensitivity", path, "--max-latency-ms", "3.5", "--average-bits", "7") == 0
    printed = capsys.readouterr().out
    assert "Asked for: at most 7 bits on average, at most 3.5 ms. Uses" in printed
    assert "Proven: no plan within the budget has a lower Ω" in printed

    assert invoke("plan", "--sensitivity", path, "--average-bits", "7", "--json") == 0
    plan = tq.BitPlan.from_json(json.loads(capsys.readouterr().out))
    assert plan.gap == 0.0
    assert invoke("plan", "--sensitivity", path, "--average-bits", "7", "--solver", "pareto") == 0
    assert "nothing is proven" in capsys.readouterr().out


def test_rules_from_the_command_line(tmp_path: Path) -> None:
    path, out = written(tmp_path, TABLE), tmp_path / "plan.json"

    def bits(*options: str) -> dict[str, int]:
        assert invoke("plan", "--sensitivity", path, *options, "--out", out, "-q") == 0
        return tq.BitPlan.load(out).weight_bits

    assert bits("--average-bits", "8") == {"stem": 8, "head": 8}
    assert bits("--average-bits", "7.9") == {"stem": 8, "head": 4}
    assert bits("--average-bits", "7.9", "--fixed-bits", "head=8") == {"stem": 4, "head": 8}
    assert bits("--average-bits", "7.9", "--min-bits", "he*=5") == {"stem": 4, "head": 8}
    assert bits("--average-bits", "7.2", "--allowed-bits", "stem=4") == {"stem": 4, "head": 8}
    assert bits("--average-bits", "4", "--weight-bits", "4") == {"stem": 4, "head": 4}
    limits = ("--average-bits", "8", "--average-activation-bits", "8")
    assert bits(*limits, "--activation-bits", "4", "--allowed-activation-bits", "head=4,8") == {"stem": 8, "head": 8}
    assert tq.BitPlan.load(out).activation_bits == {"head": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--average-bits", "6", "RUN"), "give a run directory or --sensitivity FILE"),
        (("--average-bits", "6", "--apply"), "--apply and --stability need a run directory"),
        (("--average-bits", "6", "--fixed-bits", "head"), "--fixed-bits takes PATTERN=BITS"),
        (("--average-bits", "6", "--fixed-bits", "head=4,8"), "--fixed-bits takes one bit width for 'head'"),
        (("--average-bits", "6", "--latency", "nowhere.csv"), "nowhere.csv cannot be read"),
        (("--max-size-mib", "0.001"), "the nearest is 0.002386 MiB"),
        (("--max-size-mib", "0.001", "--max-latency-ms", "0.1"), "at most 0.001 MiB on disk, at most 0.1 ms"),
    ],
)
def test_mistakes_on_the_command_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("plan", "--sensitivity", written(tmp_path, TABLE), *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_planning_from_a_table_needs_no_torch_and_prints_nothing_but_json(tmp_path: Path) -> None:
    path = written(tmp_path, TABLE)
    script = (
        "import sys; from tracequant.cli import app as cli;"
        f"code = cli.run_guarded(lambda: cli.app(['plan', '--sensitivity', {str(path)!r}, '--average-bits', '7',"
        " '--json']));"
        "sys.exit(code or (3 if 'torch' in sys.modules else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "BitPlan"


def test_the_example_of_the_docs_runs_as_printed(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "tables.md").read_text()
    (tmp_path / "table.json").write_text(page.partition("```json\n")[2].partition("```")[0])
    sensitivity = tq.read_sensitivity(tmp_path / "table.json")
    plan = tq.solve(sensitivity, average_bits=6, max_latency_ms=0.7)
    assert plan.weight_bits["layer2.0.conv1"] == plan.weight_bits["layer2.0.downsample.0"]
