"""Metrics, the self-check and solving by accuracy from the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tracequant as tq
from cli_runs import TASK, invoke, modified
from tracequant.measure import accuracy, check
from tracequant.run.directory import RunDirectory


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An analysis in the paper's way, by the trace with rounding to the nearest, with eigenvalues."""
    path = tmp_path_factory.mktemp("runs") / "analysed"
    options = ("--num-probes", "2", "--activation-bits", "4", "--rounding", "nearest")
    assert invoke("analyze", "--task", TASK, *options, "--out", path, "-q") == 0
    return path


@pytest.fixture(scope="module")
def checked(analysed: Path) -> Path:
    """The same with its self-check."""
    path = Path(shutil.copytree(analysed, analysed.parent / "checked"))
    assert invoke("check", path, "--samples", "20", "--plans", "4", "--plan-bits", "2,3", "-q") == 0
    return path


@pytest.fixture
def copy(checked: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(checked, tmp_path / "run"))


def test_check_leaves_its_result_and_its_figure(checked: Path, analysed: Path) -> None:
    found = RunDirectory(checked).check_result()
    assert found is not None
    assert found.samples == 20
    assert len(found.layers) == 18
    assert [plan.offered for plan in found.plans] == [(2, 3)] * 4
    # The loss is that of the first samples of the evaluation data.
    setup = RunDirectory(checked).setup()
    x, y = setup.evaluation[0]
    assert found.float_loss == pytest.approx(setup.task.evaluate(setup.model, [(x[:20], y[:20])]).loss)
    assert {"trace", "l2", "eigenvalue", "quadratic", "first+quadratic", "measured"} <= found.correlations.keys()
    assert (checked / "figures" / "check.png").is_file()
    # The expansion is that of all the calibration data, whatever the check looked at.
    assert tq.Perturbation.load(checked / "perturbation.json").samples == 32
    assert not (analysed / "perturbation.json").exists()


def test_check_again_measures_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = RunDirectory(copy).check_result()

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(check, "replaced_weights", never)
    assert invoke("check", copy, "--samples", "20", "--plans", "4", "--plan-bits", "2,3", "-q") == 0
    assert RunDirectory(copy).check_result() == before


def test_plan_by_another_metric_takes_no_torch(checked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for metric in ("l2", "first+quadratic"):
        code = (
            "import sys; from tracequant.cli import app as cli;"
            f"code = cli.run_guarded(lambda: cli.app(['plan', {str(checked)!r}, '--average-bits', '3', '--criterion',"
            f" {metric!r}, '--json', '--out', {str(checked / 'other.json')!r}]));"
            "assert 'torch' not in sys.modules; sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        plan = tq.BitPlan.from_json(json.loads(done.stdout))
        table = RunDirectory(checked).sensitivity_by(metric)
        assert plan.omega == tq.solve(table, average_bits=3).omega
    (checked / "plan.json").unlink()


def test_a_kept_plan_is_in_its_own_metric_everywhere(copy: Path) -> None:
    assert invoke("plan", copy, "--average-bits", "3", "--criterion", "first+quadratic", "--apply", "-q") == 0
    run = RunDirectory(copy)
    assert run.done("plan")
    assert run.sensitivity().criterion == "first+quadratic"
    assert run.plan().solver == "exact, full space"  # repriced by the same metric, or it would count as edited
    assert run.sensitivity_by(None).criterion == "trace"
    assert invoke("plan", copy, "--average-bits", "3", "--apply", "-q") == 0
    assert RunDirectory(copy).sensitivity().criterion == "trace"


def test_a_metric_that_was_not_measured_says_how_to(analysed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("plan", analysed, "--average-bits", "3", "--criterion", "quadratic", "-q") == 2
    assert "tracequant check" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.filterwarnings("ignore:.*fewer bits lower the loss:UserWarning")
def test_analyze_by_an_expansion(tmp_path: Path) -> None:
    path = tmp_path / "run"
    arguments = ("--task", TASK, "--no-eigenvalues", "--activation-bits", "none", "--criterion", "first+quadratic")
    assert invoke("analyze", *arguments, "--out", path, "-q") == 0
    run = RunDirectory(path)
    assert run.sensitivity().criterion == "first+quadratic"
    assert run.sensitivity().weight_omega == tq.Perturbation.load(path / "perturbation.json").omega(True)
    assert run.criteria() == ["trace", "l2", "quadratic", "first+quadratic"]


def test_smallest_plan_by_accuracy_is_kept_reported_and_cached(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("plan", copy, "--max-accuracy-drop", "1", "--apply", "-q")
    assert invoke(*arguments) == 0
    run = RunDirectory(copy)
    plan, evaluations = run.plan(), run.evaluations()
    assert evaluations is not None
    assert "by evaluation" in plan.solver
    found = next(row for row in evaluations.plans if row.weight_bits == plan.weight_bits)
    assert found.metric >= evaluations.float_metric - 1
    assert any(row.metric < evaluations.float_metric - 1 for row in evaluations.plans)
    before = modified(copy)
    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "quantize", None)  # a second search evaluates nothing
        assert invoke(*arguments) == 0
    assert modified(copy)["evaluations.json"] == before["evaluations.json"]
    assert invoke("quantize", copy, "-q") == 0
    assert RunDirectory(copy).quantize_result().mixed.metric == found.metric
    assert invoke("report", copy, "-q") == 0
    page = (copy / "report.html").read_text()
    assert "All plans that were evaluated" in page
    for row in evaluations.plans:
        assert " ".join(map(str, row.weight_bits.values())) in page
    assert "Which criterion to trust here" in page
    assert (copy / "figures" / "check.svg").is_file()


def test_compare_solves_and_evaluates_by_each_metric(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("compare", copy, "--average-bits", "2.5", "--criteria", "trace,l2,quadratic", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == ["trace", "l2", "quadratic"]
    run = RunDirectory(copy)
    for metric, row in rows.items():
        plan = tq.solve(run.sensitivity_by(metric), average_bits=2.5)
        assert row["plan"]["weight_bits"] == row["evaluation"]["weight_bits"] == plan.weight_bits
        assert plan.average_bits <= 2.5
    evaluations = run.evaluations()
    assert evaluations is not None
    assert len(evaluations.plans) == len({str(row["evaluation"]["weight_bits"]) for row in rows.values()})
    # The table compares whole files, the float one's included, next to W-Comp.
    assert invoke("compare", copy, "--average-bits", "2.5", "--criteria", "trace") == 0
    printed = " ".join(capsys.readouterr().out.split())
    plan = tq.solve(run.sensitivity_by("trace"), average_bits=2.5)
    assert plan.file_compression is not None
    assert f"{plan.file_compression:.2f}x" in printed
    assert f"{plan.compression:.2f}x" in printed
    assert f"{plan.size_mib * plan.file_compression:.4f}" in printed
    assert invoke("compare", copy, "--average-bits", "2.5", "--criteria", "trace,hessian") == 2


def test_compare_says_which_criteria_it_leaves_out(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "perturbation.json").unlink(missing_ok=True)
    capsys.readouterr()
    assert invoke("compare", copy, "--average-bits", "2.5", "-q") == 0
    assert capsys.readouterr().err == ""
    assert invoke("compare", copy, "--average-bits", "2.5") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert (
        f"Left out: quadratic and first+quadratic, for which nothing is measured yet; `tracequant check {copy}`" in err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-accuracy-drop", "1", "--max-size-mib", "1"), "and --max-size-mib too"),
        (("--max-accuracy-drop", "-1"), "--max-accuracy-drop must be a number >= 0"),
    ],
)
def test_bad_limits_on_accuracy(checked: Path, capsys: pytest.CaptureFixture[str], options, message) -> None:
    assert invoke("plan", checked, *options) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_accuracy_needs_a_run(checked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("plan", "--sensitivity", checked / "sensitivity.json", "--max-accuracy-drop", "1") == 2
    assert "need a run directory" in capsys.readouterr().err.replace("\n", " ")


def test_run_by_accuracy_goes_through_all_stages(tmp_path: Path) -> None:
    path = tmp_path / "run"
    arguments = (
        "run",
        "--task",
        TASK,
        "--num-probes",
        "1",
        "--no-eigenvalues",
        "--activation-bits",
        "4",
        "--out",
        path,
    )
    options = ("--max-accuracy-drop", "2", "--finetune-steps", "0", "-q")
    assert invoke(*arguments, *options) == 0
    run = RunDirectory(path)
    assert run.done("pack")
    settings = run.settings().plan
    assert settings is not None
    assert settings.max_accuracy_drop == 2
    assert run.pack_result().promised_bytes == run.plan().size_bytes
