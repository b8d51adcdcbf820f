"""`tracequant figures` on a run of the digits task, and the paper's tables."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tracequant as tq
from cli_runs import TASK, invoke
from tracequant.core.curvature import Landscape, Landscapes
from tracequant.report import paper_figures
from tracequant.report.blocks import activation_blocks, block_names, weight_blocks
from tracequant.report.drawing import NAME_LENGTH, name_axis, shortened
from tracequant.report.paper import draw_figures
from tracequant.run import examine
from tracequant.run.directory import RunDirectory

SAMPLES, BATCH = 64, 32
DIGITS = ("--task", "digits", "--samples", SAMPLES, "--batch-size", BATCH, "--no-eigenvalues")
GRID = ("--grid", 3)


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An analysis without a plan."""
    path = tmp_path_factory.mktemp("runs") / "analysed"
    assert invoke("analyze", *DIGITS, "--out", path, "-q") == 0
    return path


@pytest.fixture(scope="module")
def drawn(analysed: Path) -> Path:
    """The same with a plan and all figures."""
    path = Path(shutil.copytree(analysed, analysed.parent / "drawn"))
    assert invoke("plan", path, "--average-bits", 3, "--average-activation-bits", 5, "-q") == 0
    assert invoke("figures", path, *GRID, "-q") == 0
    return path


@pytest.fixture
def copy(drawn: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(drawn, tmp_path / "run"))


def data(path: Path, number: int) -> dict[str, Any]:
    """What stands beside a figure of a run."""
    found = dict(json.loads((path / "paper" / f"figure-{number}.json").read_text()))
    assert found["figure"] == number
    return found


def forbid_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads the task's model fails."""

    def never(_: RunDirectory) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(RunDirectory, "setup", never)


def test_every_figure_is_written_with_its_data(drawn: Path) -> None:
    for number in (2, 4, 5, 6, 7, 8):
        png = (drawn / "paper" / f"figure-{number}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 10_000
        assert data(drawn, number)
    assert len(list((drawn / "paper").iterdir())) == 12


def test_figure_2_has_all_traces_and_two_landscapes(drawn: Path) -> None:
    found, curvature = data(drawn, 2), RunDirectory(drawn).curvature()
    traces = {name: estimate.average_trace for name, estimate in curvature.weights.items()}
    assert {block["name"]: block["estimate"]["average_trace"] for block in found["blocks"]} == traces
    landscapes = found["landscapes"]["layers"]
    assert [own["layer"] for own in landscapes] == [max(traces, key=traces.get), min(traces, key=traces.get)]  # type: ignore[arg-type]
    run = RunDirectory(drawn)
    setup = run.setup()
    first = list(itertools.islice(setup.calibration, 1))
    centre = setup.task.evaluate(setup.model, first).loss
    assert found["landscapes"]["samples"] == BATCH
    for own in landscapes:
        assert own["losses"][1][1] == pytest.approx(centre, rel=1e-6)
    # The directions of largest curvature go up on average, by about the quadratic term near the middle.
    assert statistics.fmean(itertools.chain(*landscapes[0]["losses"])) > centre


def test_figure_4_marks_the_plan_on_the_frontier(drawn: Path) -> None:
    found, plan = data(drawn, 4), RunDirectory(drawn).plan()
    marked = next(row for row in found["plans"] if row["plan"] == "this plan")
    assert (marked["size_mib"], marked["omega"]) == (plan.size_mib, plan.omega)
    front = found["frontiers"]["exact"]
    at = max(i for i, size in enumerate(front["size_mib"]) if size <= plan.size_mib)
    assert front["omega"][at] <= plan.omega * (1 + 1e-9)


def test_figure_5_shows_samples_and_fifty_iterations(drawn: Path) -> None:
    found, curvature = data(drawn, 5), RunDirectory(drawn).curvature()
    assert all(len(row) == SAMPLES for row in found["by_sample"].values())
    assert len(found["by_iteration"]) == 3
    assert all(len(row) == 50 for row in found["by_iteration"].values())
    assert found["iterations_on_samples"] == BATCH
    assert curvature.weight_values is not None
    for name, row in found["by_iteration"].items():
        # Both estimators on the same images; 50 draws leave a few percent.
        same = statistics.fmean(curvature.weight_values[name][:BATCH])
        error = statistics.stdev(row) / len(row) ** 0.5
        assert statistics.fmean(row) == pytest.approx(same, abs=4 * error + 0.05 * same)


def test_figure_6_agrees_with_top_eigenvalues(drawn: Path) -> None:
    run = RunDirectory(drawn)
    found, curvature, setup = data(drawn, 6), run.curvature(), run.setup()
    assert found["samples"] == BATCH
    name = next(iter(found["layers"]))
    points = replace(curvature.points, layers=(curvature.points.by_name[name],))
    first = list(itertools.islice(setup.calibration, 1))
    true = tq.top_eigenvalues(setup.model, first, setup.task, points, k=20, seed=1)[name]
    assert found["layers"][name]["eigenvalues"] == pytest.approx(true, rel=0.05)
    assert len(true) == 20
    assert curvature.weight_values is not None
    same = statistics.fmean(curvature.weight_values[name][:BATCH]) / curvature.weights[name].numel
    assert found["layers"][name]["average_trace"] == pytest.approx(same)


def test_figures_7_and_8_have_the_plans_bits(drawn: Path) -> None:
    plan = RunDirectory(drawn).plan()
    assert {block["name"]: block["num_bits"] for block in data(drawn, 7)["blocks"]} == plan.weight_bits
    inputs = data(drawn, 8)["blocks"]
    assert {name: block["num_bits"] for block in inputs for name in block["members"]} == plan.activation_bits


def test_drawn_again_nothing_is_measured(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: data(copy, number) for number in (2, 5, 6)}
    forbid_the_model(monkeypatch)
    shutil.rmtree(copy / "paper")
    assert invoke("figures", copy, *GRID, "-q") == 0
    assert {number: data(copy, number) for number in (2, 5, 6)} == before


def test_a_chosen_figure_goes_where_it_is_told(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid_the_model(monkeypatch)
    out = tmp_path / "elsewhere"
    assert invoke("figures", copy, "--figure", 7, "--figure", 4, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {n: str(out / f"figure-{n}.png") for n in ("7", "4")}
    assert len(list(out.iterdir())) == 4


def test_eigenvalues_join_those_that_are_there(copy: Path) -> None:
    run = RunDirectory(copy)
    before = run.spectrum()
    assert before is not None
    name = next(name for name in run.curvature().weights if name not in before.eigenvalues)
    found = examine.eigenvalues(run, [name], 2)
    assert found == run.spectrum()
    assert found.eigenvalues.keys() == before.eigenvalues.keys() | {name}
    assert len(found.eigenvalues[name]) == 2


def test_without_a_plan_the_others_are_drawn(
    analysed: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(analysed, tmp_path / "run"))
    for measured in ("landscapes", "spectrum.json", "hutchinson.json"):
        copier: Callable[[Path, Path], Any] = shutil.copytree if (drawn / measured).is_dir() else shutil.copy
        copier(drawn / measured, run / measured)
    forbid_the_model(monkeypatch)
    assert invoke("figures", run, *GRID) == 0
    captured = capsys.readouterr()
    assert [line.partition(":")[0] for line in captured.out.splitlines()] == ["Figure 2", "Figure 5", "Figure 6"]
    assert f"tracequant plan {run} --max-size-mib X" in captured.err
    assert captured.err.count("is left out") == 3
    assert invoke("figures", run, "--figure", 4, "-q") == 2


def test_a_figure_for_which_memory_does_not_suffice_leaves_the_others(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise tq.ResourceError("memory does not suffice")

    monkeypatch.setattr(examine, "landscapes", no_memory)
    drawn = draw_figures(RunDirectory(copy))
    assert drawn.left_out == {2: "memory does not suffice"}
    assert list(drawn.files) == [4, 5, 6, 7, 8]
    with pytest.raises(tq.ResourceError):
        draw_figures(RunDirectory(copy), [2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--figure", 3), "no figure 3 to draw; choose from 2, 4, 5, 6, 7, 8"),
        (("--layer", "nowhere*"), "--layer pattern 'nowhere*' matches no layer; there are conv1"),
        (("--block", "layer9.*"), "--block pattern 'layer9.*' matches no layer"),
        (("--block", "blocks"), "the task does not say what its model's blocks are"),
        (("--figure", 2, "--grid", 4), "an odd number of points to a side"),
    ],
)
def test_bad_requests(
    drawn: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    assert invoke("figures", drawn, *options, "-q") == 2
    assert message in capsys.readouterr().err


def test_blocks_that_the_task_names_need_not_all_be_analysed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = ("conv1", "layer1.*", "excluded.*")
    monkeypatch.setattr(RunDirectory, "setup", lambda run: SimpleNamespace(blocks=blocks))
    assert invoke("figures", copy, "--figure", 7, "--block", "blocks", "-q") == 0
    names = [block["name"] for block in data(copy, 7)["blocks"]]
    assert names[:2] == ["conv1", "layer1"]
    assert "excluded" not in names


def test_a_run_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("figures", tmp_path, "-q") == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_float_activations_have_no_figure_8_and_hutchinsons_draws_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = ("--estimator", "hutchinson", "--num-probes", 4, "--no-eigenvalues", "--activation-bits", "none")
    assert invoke("analyze", "--task", TASK, *options, "--ties", "*", "--out", run, "-q") == 0
    assert invoke("plan", run, "--average-bits", 3, "-q") == 0
    forbid_the_model(monkeypatch)
    assert invoke("figures", run, "--figure", 5, "--figure", 7, "-q") == 0
    curvature = RunDirectory(run).curvature()
    assert curvature.weight_probes is not None
    assert data(run, 5)["by_iteration"] == {k: list(v) for k, v in curvature.weight_probes.items()}
    (block,) = data(run, 7)["blocks"]  # all layers are tied, and one bar
    total = sum(e.trace for e in curvature.weights.values())
    assert block["estimate"]["average_trace"] == pytest.approx(total / sum(e.numel for e in curvature.weights.values()))
    assert invoke("figures", run, "--figure", 8, "-q") == 2
    assert "activations, which stay in float" in capsys.readouterr().err


def test_blocks_add_traces_and_average_bits(drawn: Path) -> None:
    run = RunDirectory(drawn)
    curvature, plan = run.curvature(), run.plan()
    blocks = {block.name: block for block in weight_blocks(curvature, ["layer1.*"], plan.weight_bits)}
    block = blocks["layer1"]
    names = [name for name in curvature.weights if name.startswith("layer1.")]
    assert block.members == tuple(names)
    assert len(names) > 1
    numel = {name: curvature.weights[name].numel for name in names}
    assert block.estimate.trace == pytest.approx(sum(curvature.weights[name].trace for name in names))
    assert block.estimate.average_trace == pytest.approx(block.estimate.trace / sum(numel.values()))
    mean_bits = sum(plan.weight_bits[name] * numel[name] for name in names) / sum(numel.values())
    assert block.num_bits == pytest.approx(mean_bits)
    # Samples are common to the layers: errors of their traces do not add as if they were independent.
    assert curvature.weight_values is not None
    sums = [sum(curvature.weight_values[name][i] for name in names) for i in range(SAMPLES)]
    assert block.estimate.sampling_error == pytest.approx(statistics.stdev(sums) / SAMPLES**0.5)
    assert blocks["conv1"].estimate == curvature.weights["conv1"]
    inputs = {block.name: block for block in activation_blocks(curvature, ["layer1.*"], {})}
    assert len(inputs["layer1"].members) > 1
    assert inputs["layer1"].num_bits is None


def test_tied_layers_are_a_block_with_what_their_names_share(drawn: Path) -> None:
    points = RunDirectory(drawn).curvature().points
    names = list(points.by_name)
    tied = replace(points, ties=(tuple(n for n in names if n.startswith("layer1.0.")), (names[0], names[-1])))
    found = block_names(tied, [])
    assert found["layer1.0.conv1"] == found["layer1.0.conv2"] == "layer1.0"
    assert found[names[0]] == found[names[-1]] == f"{names[0]} and 1 more"
    assert found["layer2.0.conv1"] == "layer2.0.conv1"


def test_long_names_keep_their_numbers_and_many_are_not_all_written() -> None:
    names = [f"backbone.body.stage{i}.block{i}.separable.pointwise.convolution" for i in range(100)]
    assert all(len(shortened(name)) <= NAME_LENGTH for name in names)
    assert len({shortened(name) for name in names}) == 100
    assert shortened("fc") == "fc"
    assert len(shortened("x1" * 40)) == NAME_LENGTH
    axes: Axes = Figure().subplots()
    name_axis(axes, names, most=30)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [shortened(name) for name in names[::4]]


def test_a_landscape_with_holes_and_without_heights_is_drawn(drawn: Path) -> None:
    infinite, blocks = float("inf"), weight_blocks(RunDirectory(drawn).curvature(), [], {})
    steps = (-1.0, 0.0, 1.0)
    for losses in (((infinite, 1.0, infinite), (1.0, 0.5, 1.0), (1.0, 1.0, 2.0)), ((1.0, 1.0, 1.0),) * 3):
        landscapes = Landscapes(steps, 4, "", (Landscape("conv1", (2.0, -1.0), losses),))
        figure = paper_figures.figure_2(blocks, landscapes)
        figure.canvas.draw()
        assert len(figure.axes) == 2


# The paper's tables


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """benchmarks/paper/tables.py"""
    path = Path(__file__).parents[1] / "benchmarks" / "paper" / "tables.py"
    spec = importlib.util.spec_from_file_location("paper_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def lines_of(text: str, table: str) -> list[list[str]]:
    """Cells of the rows of one printed table, its head first."""
    part = text.split(f"**Table {table}: ")[1].split("\n**")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (rows[0], *rows[2:])]


def test_all_of_the_papers_rows_are_printed_and_nothing_is_invented(tables: ModuleType, tmp_path: Path) -> None:
    text = tables.document(tmp_path)
    found = tables.paper_tables()
    assert [table.number for table in found] == ["1a", "1b", "1c", "2", "3a", "3b", "4", "5"]
    assert sum(len(table.rows) for table in found) == 46
    for table in found:
        head, *rows = lines_of(text, table.number)
        width = len(table.columns)
        assert head[:width] == list(table.columns)
        assert [row[:width] for row in rows] == [list(row) for row in table.rows]
        assert not any(cell for row in rows for cell in row[width:])
    assert lines_of(text, "1a")[10][:6] == ["HAWQ-V2", "2 MP", "4 MP", "75.92", "12.24×", "7.99"]
    assert "Not in the paper" not in text


def test_results_stand_beside_the_rows_they_are_of(tables: ModuleType, tmp_path: Path) -> None:
    def cifar(row: str, seed: int, after: float, steps: int = 600) -> dict[str, Any]:
        return {
            "row": row, "recipe": "ours", "seed": seed, "steps": steps, "compression": 13.1, "file_bytes": 1 << 19,
            "weight_bits": {"conv1": 8, "fc": 2}, "activation_bits": {"conv1": 8, "fc": 4}, "after": after,
        }  # fmt: skip

    documents: dict[str, Any] = {
        "cifar10_resnet20.json": {
            "float_accuracy": 91.5, "float_bytes": 1 << 20,
            "rows": [
                cifar("HAWQ-V2, 13.1x", 0, 90.0), cifar("HAWQ-V2, 13.1x", 1, 91.0), cifar("l2, 13.1x", 0, 88.0),
                cifar("HAWQ-V2, 13.1x", 0, 92.0, steps=20),
                cifar("HAWQ-V2, 13.1x", 0, 12.0) | {"recipe": "another"},
            ],
        },
        "bccd_retinanet.json": {
            "rows": {
                "direct": {"w_bits": "4", "a_bits": "4", "W-Comp": 8.0, "A-Comp": 8.0, "size_mib": 0.4, "mAP": 20.0},
                "mixed weights, 6-bit activations": {"seeds": {"0": {"AP": 33.25}}},
            }
        },
        "curvature_resnet50.json": {"rows": [{"method": "gauss_newton, 2 draws", "time": 2.25}]},
    }  # fmt: skip
    for name, document in documents.items():
        (tmp_path / name).write_text(json.dumps(document))

    text = tables.document(tmp_path)

    head, _, l2, trace = lines_of(text, "3b")
    at = {name: i for i, name in enumerate(head)}
    assert [trace[at[name]] for name in ("A: w-bits", "A: a-bits", "A: Top-1", "A: W-Comp", "A: Size(MB)")] == [
        "2 MP", "4", "90.50 ± 0.71 (2)", "13.10×", "0.5",
    ]  # fmt: skip
    assert l2[at["A: Top-1"]] == "88.00"
    assert "B: Top-1" not in at  # of 20 steps there is nothing to compare
    head, *rows = lines_of(text, "2")
    measured = [row[head.index("A: mAP")] for row in rows]
    assert measured == ["", "20.00", "", "", "", "", "33.25"]
    assert [row[-1] for row in lines_of(text, "4")[1:4]] == ["", "", "2.25"]
    assert "ResNet20 on CIFAR-10, 600 fine-tuning steps" in text
    assert "12.00" not in text


def test_a_run_of_ones_own_fills_a_row(tables: ModuleType, copy: Path, tmp_path: Path) -> None:
    assert invoke("quantize", copy, "-q") == 0
    run = RunDirectory(copy)
    text = tables.document(tmp_path, [f"1a:HAWQ-V2={copy}", f"2:1={copy}"])
    cells = dict(zip(*[lines_of(text, "1a")[i] for i in (0, 10)], strict=True))
    assert cells["here: Top-1"] == f"{run.quantize_result().mixed.metric:.2f}"
    assert cells["here: W-Comp"] == f"{run.plan().compression:.2f}×"
    baseline = dict(zip(*[lines_of(text, "2")[i] for i in (0, 1)], strict=True))
    assert baseline["here: mAP"] == f"{run.quantize_result().float_model.metric:.2f}"
    for wrong, message in ((f"2:HAWQ-V2={copy}", "3 rows 'HAWQ-V2'"), ("4:1=x", "takes TABLE:ROW=RUN")):
        with pytest.raises(SystemExit, match=message):
            tables.document(tmp_path, [wrong])


@pytest.mark.parametrize(("name", "last"), [("accuracy %", 100), ("perplexity", 120)])
def test_a_scale_of_percent_ends_at_a_hundred(name: str, last: float) -> None:
    from tracequant.report.figures import accuracy_figure

    (axes,) = accuracy_figure([("float32", 99.0, 1.0), ("mixed", 98.0, 0.1)], name).axes
    low, high = axes.get_xlim()
    assert max(tick for tick in axes.get_xticks() if low <= tick <= high) == last
