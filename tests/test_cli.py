"""The command line, called in this process as the installed program calls it."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import tiny_task
import tracequant as tq
from cli_runs import ANALYZE, STAGED, TASK, invoke, modified
from tracequant.core import cost
from tracequant.core.errors import TaskError
from tracequant.core.settings import AnalysisSettings, FinetuneSettings, TaskOptions
from tracequant.curvature import spectrum
from tracequant.run import stages
from tracequant.run.directory import STAGES, RunDirectory

pytestmark = pytest.mark.usefixtures("blank_figures")


def test_run_leaves_every_artifact(finished: Path) -> None:
    names = {file.name for file in finished.iterdir()}
    assert {
        "settings.json", "stages.json", "curvature.json", "sensitivity.json", "plan.json", "quantize.json",
        "quantized.safetensors", "finetune.json", "finetuned.safetensors", "model.safetensors", "pack.json",
        "report.html", "figures",
    } <= names  # fmt: skip
    assert not any(name.startswith((".", "checkpoint")) for name in names)


def test_run_again_does_nothing_twice(copy: Path) -> None:
    before = modified(copy)
    assert invoke(*STAGED, "--out", copy) == 0
    assert modified(copy) == before


def test_a_finished_run_does_not_load_the_task_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_FAULT", "other weights")  # which loading would notice
    assert invoke(*STAGED, "--out", copy) == 0


def test_another_budget_keeps_the_analysis(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = modified(copy)
    arguments = [a if a != "3" else "2.5" for a in STAGED if a != "-q"]
    assert invoke(*arguments, "--out", copy) == 0
    assert "is older than" not in capsys.readouterr().err
    after = modified(copy)
    assert {name for name in before if before[name] == after[name]} >= {"curvature.json", "sensitivity.json"}
    assert after["model.safetensors"] != before["model.safetensors"]
    assert RunDirectory(copy).plan().average_bits <= 2.5


def test_stages_one_by_one_equal_run(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "staged"
    assert invoke("analyze", *ANALYZE, "--out", path, "-q") == 0
    assert invoke("plan", path, "--average-bits", "3", "-q") == 0
    assert invoke("quantize", path, "-q") == 0
    assert invoke("finetune", path, "--finetune-steps", "60", "-q") == 0
    assert invoke("pack", path, "-q") == 0
    assert invoke("report", path, "-q") == 0
    assert (path / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (path / "plan.json").read_text() == (finished / "plan.json").read_text()


def test_evaluate_in_a_fresh_process_gives_the_reported_accuracy(finished: Path) -> None:
    program = [sys.executable, "-m", "tracequant", "evaluate", str(finished), "--json"]
    # The task trains its network anew in every process; the same number of threads gives the same weights.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
    row = json.loads(done.stdout)
    packed = RunDirectory(finished).pack_result()
    assert (row["metric"], row["loss"]) == (packed.evaluation.metric, packed.evaluation.loss)
    assert row["metric"] == RunDirectory(finished).finetune_outcome().mixed.metric
    assert row["size_bytes"] == packed.promised_bytes == packed.file_bytes


def test_plan_answers_without_torch_and_leaves_a_quantized_run_alone(finished: Path) -> None:
    before = modified(finished)
    code = (
        "import sys; from tracequant.cli import app as cli;"
        f"code = cli.run_guarded(lambda: cli.app(['plan', {str(finished)!r}, '--compression', '12', '--json']));"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    plan = tq.BitPlan.from_json(json.loads(done.stdout))
    assert plan.compression >= 12
    assert modified(finished) == before


def test_apply_replaces_the_plan_and_makes_later_stages_stale(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("plan", copy, "--compression", "12", "--apply", "-q") == 0
    assert RunDirectory(copy).plan().compression >= 12
    assert not RunDirectory(copy).done("quantize")
    assert invoke("pack", copy, "-q") == 2
    assert "tracequant quantize" in capsys.readouterr().err


def test_a_plan_that_was_applied_is_replaced_by_apply_alone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("plan", copy, "--compression", "12", "--apply") == 0
    printed = capsys.readouterr()
    assert "replaces the one for at most 3 bits on average" in printed.err.replace("\n", " ")
    assert f"Next: tracequant quantize {copy}" in printed.out.replace("\n", "")
    applied = (copy / "plan.json").read_bytes()
    assert invoke("plan", copy, "--average-bits", "4") == 0
    assert "has another plan and keeps it" in capsys.readouterr().err.replace("\n", " ")
    assert (copy / "plan.json").read_bytes() == applied
    assert RunDirectory(copy).done("plan")


def test_before_the_run_is_quantized_a_plan_that_replaces_another_says_so(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "quantize.json").unlink()
    assert invoke("plan", copy, "--average-bits", "2.2") == 0
    assert "replaces the one for at most 3 bits on average" in capsys.readouterr().err.replace("\n", " ")
    assert RunDirectory(copy).plan().average_bits <= 2.2


def test_latency_table_of_a_run(copy: Path) -> None:
    """Measured, kept, and taken by a plan."""
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    assert invoke("latency", copy, "--repeats", "2", "-q") == 0
    table, layers = tq.read_latency(copy / "latency.csv"), RunDirectory(copy).sensitivity().points.by_name
    assert set(table) == set(layers)
    before = (copy / "latency.json").read_bytes()
    assert invoke("latency", copy, "--repeats", "2", "--out", copy / "again.csv", "-q") == 0
    assert (copy / "latency.json").read_bytes() == before
    assert (copy / "again.csv").read_bytes() == (copy / "latency.csv").read_bytes()
    limit = math.fsum(
        ms for row in table.values() for ms in row[8].values()
    )  # every width takes as long: any plan fits
    assert invoke("plan", copy, "--max-latency-ms", repr(limit), "--latency", copy / "latency.csv", "-q") == 0
    assert invoke("latency", copy, "--repeats", "3", "-q") == 2  # other measurements than those that are kept


def test_latency_and_rules_are_kept_with_the_plan(copy: Path, tmp_path: Path) -> None:
    """The table's numbers become part of the run, so that its file may go."""
    sensitivity = RunDirectory(copy).sensitivity()
    table = tmp_path / "latency.csv"
    rows = [
        f"{layer.name},{w},{a},{layer.macs * w * a / 1e9}"
        for layer in sensitivity.points.layers
        for w in sensitivity.weight_omega[layer.name]
        for a in sensitivity.activation_omega.get(layer.activation or "", {32: 0.0})
    ]
    table.write_text("\n".join(["layer,weight_bits,activation_bits,ms", *rows]))
    name = sensitivity.points.layers[0].name
    bops = [
        cost.bit_operations(sensitivity.points, uniform.weight_bits, uniform.activation_bits) / 1e9
        for uniform in (tq.uniform_plan(sensitivity, b) for b in (3, 8))
    ]
    limit = str(sum(bops) / 2)
    options = ("--max-latency-ms", limit, "--latency", table, "--max-bops-g", limit, "--fixed-bits", f"{name}=8")
    assert invoke("plan", copy, *options, "--apply", "-q") == 0
    table.unlink()
    run = RunDirectory(copy)
    assert run.done("plan")
    plan, settings = run.plan(), run.settings().plan
    assert settings is not None
    assert settings.latency is not None
    assert plan.weight_bits[name] == 8
    assert cost.latency_ms(sensitivity.points, plan.weight_bits, plan.activation_bits, settings.latency) <= float(limit)
    assert plan.gap == 0.0
    assert invoke("report", copy, "-q") == 0
    page = (copy / "report.html").read_text()
    assert "Proven: no plan within the budget has a lower Ω total" in page
    assert "G BOPs more would take about" in page or " ms more would take about" in page


def test_plan_edited_by_hand_is_followed(copy: Path) -> None:
    plan = RunDirectory(copy).plan()
    bits = {name: 8 if name == "0" else 2 for name in plan.weight_bits}
    dataclasses.replace(plan, weight_bits=bits).save(copy / "plan.json")
    assert not RunDirectory(copy).done("quantize")
    assert invoke("quantize", copy, "-q") == 0
    edited = RunDirectory(copy).plan()
    assert edited.weight_bits == bits
    assert edited.solver == "edited by hand"
    assert edited.size_bytes == RunDirectory(copy).quantize_result().mixed.size_bytes != plan.size_bytes
    dataclasses.replace(plan, weight_bits=dict.fromkeys(bits, 7)).save(copy / "plan.json")
    assert invoke("quantize", copy, "-q") == 2


def test_plan_knows_the_plan_that_the_run_is_quantized_by(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(copy)
    assert run.done("quantize")
    assert invoke("plan", copy, "--average-bits", "3") == 0
    out, own = capsys.readouterr()
    printed = " ".join(out.split())
    assert printed.startswith("BitPlan: ")
    assert " ".join(run.plan().whole_size.split()) in printed
    assert "by this very plan" in own
    assert "another plan" not in own
    assert invoke("plan", copy, "--average-bits", "2.2") == 0
    assert "by another plan and keeps it" in capsys.readouterr().err.replace("\n", " ")


def test_apply_replaces_an_edited_plan(copy: Path) -> None:
    plan = RunDirectory(copy).plan()
    dataclasses.replace(plan, weight_bits=dict.fromkeys(plan.weight_bits, 8)).save(copy / "plan.json")
    assert invoke("plan", copy, "--average-bits", "3", "--apply", "-q") == 0
    assert RunDirectory(copy).plan() == plan


def test_to_apply_the_run_s_own_plan_changes_nothing(copy: Path) -> None:
    before = modified(copy)
    assert invoke("plan", copy, "--average-bits", "3", "--apply", "-q") == 0
    assert modified(copy) == before
    assert all(RunDirectory(copy).done(stage) for stage in STAGES)
    (copy / "plan.json").write_text("{")
    assert invoke("plan", copy, "--average-bits", "3", "--apply", "-q") == 0
    assert RunDirectory(copy).plan().average_bits <= 3


def test_a_stage_that_was_cut_off_is_not_finished(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the settings go back to those under which it once was."""
    product = (copy / "model.safetensors").read_bytes()
    other = [{"3": "2.2", "60": "0"}.get(argument, argument) for argument in STAGED]

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate_file", power_cut)
        assert invoke(*other, "--out", copy) == 130
    assert (copy / "model.safetensors").read_bytes() != product
    assert not RunDirectory(copy).done("pack")
    assert invoke(*STAGED, "--out", copy) == 0
    assert (copy / "model.safetensors").read_bytes() == product
    assert RunDirectory(copy).pack_result().file_bytes == len(product)


@pytest.mark.parametrize(
    "name", ["sensitivity.json", "quantized.safetensors", "finetuned.safetensors", "model.safetensors"]
)
def test_a_file_that_is_gone_is_made_again(name: str, copy: Path, finished: Path) -> None:
    (copy / name).unlink()
    assert invoke(*STAGED, "--out", copy) == 0
    if name != "finetuned.safetensors":  # whose metadata may come in any order
        assert (copy / name).read_bytes() == (finished / name).read_bytes()


def test_a_budget_that_cannot_be_met_leaves_the_run_as_it_was(copy: Path) -> None:
    before = modified(copy)
    assert invoke(*[a if a != "3" else "1" for a in STAGED], "--out", copy) == 2
    assert modified(copy) == before
    assert all(RunDirectory(copy).done(stage) for stage in ("plan", "quantize", "finetune", "pack", "report"))


@pytest.mark.parametrize("option", [("--weights", "x.safetensors"), ("--device", "nonsense"), ("--batch-size", "5")])
def test_a_refused_option_leaves_the_run_as_it_was(option: tuple[str, str], copy: Path) -> None:
    settings = (copy / "settings.json").read_text()
    assert invoke(*STAGED, *option, "--out", copy) == 2
    assert (copy / "settings.json").read_text() == settings
    assert invoke("plan", copy, "--average-bits", "2.5", "-q") == 0
    assert RunDirectory(copy).done("pack")


def test_a_path_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert invoke("analyze", *ANALYZE, "--out", tmp_path / "file") == 2
    assert "error:" in capsys.readouterr().err


def test_pack_refuses_while_fine_tuning_is_unfinished(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    product = (copy / "model.safetensors").read_bytes()
    RunDirectory(copy).ask(dataclasses.replace(RunDirectory(copy).settings(), finetune=FinetuneSettings(steps=7)))
    assert invoke("pack", copy, "-q") == 2
    assert "is not finished" in capsys.readouterr().err
    assert (copy / "model.safetensors").read_bytes() == product


def test_without_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert invoke("run", *ANALYZE, "--average-bits", "3", "--finetune-steps", "0", "--out", path) == 0
    assert "not fine-tuned" in capsys.readouterr().out
    assert not (path / "finetune.json").exists()


@pytest.mark.filterwarnings("ignore:.*not significantly above zero")
@pytest.mark.parametrize("estimator", ["auto", "gauss_newton", "hutchinson"])
def test_every_estimator(estimator: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert invoke("analyze", *ANALYZE, "--estimator", estimator, "--out", path, "-q") == 0
    assert RunDirectory(path).curvature().estimator == ("gauss_newton" if estimator == "auto" else estimator)


def test_a_run_can_be_gone_on_with_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(tiny_task.__file__, tmp_path / "mine.py")
    (tmp_path / "helper.py").write_text("SAMPLES = 32")
    with (tmp_path / "mine.py").open("a") as file:
        file.write("\nimport helper\n")
    monkeypatch.chdir(tmp_path)
    options = [a if a != TASK else "mine.py:build" for a in ANALYZE]
    assert invoke("analyze", *options, "--out", "run", "-q") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert invoke("plan", "../run", "--average-bits", "3", "-q") == 0
    assert invoke("quantize", "../run", "-q") == 0


def test_interrupted_fine_tuning_goes_on_and_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    arguments = [a if a != "60" else "80" for a in STAGED]
    monkeypatch.setenv("TINY_FAULT", "stop in training")
    assert invoke(*arguments, "--out", path) == 130
    assert list(path.glob("checkpoint-*.pt"))
    monkeypatch.delenv("TINY_FAULT")
    assert invoke(*arguments, "--out", path) == 0
    undisturbed = tmp_path / "undisturbed"
    assert invoke(*arguments, "--out", undisturbed) == 0
    assert (path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert not list(path.glob("checkpoint-*.pt"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("empty loader", "no batches"),
        ("nan", "NaN or infinite"),
        ("targets", "out of range: the model has 4 classes"),
        ("no layers", "no quantizable layer"),
        ("unused layer", "--exclude 'spare.idle'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    fault: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINY_FAULT", fault)
    path = tmp_path / "run"
    assert invoke("analyze", *ANALYZE, "--out", path) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    # What is measured before the fault is found serves the next attempt.
    assert {file.name for file in path.iterdir()} <= {"settings.json", "batches", "rounded"}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (("--average-bits", "1"), "nearest is 2.000 bits"),
        (("--max-size-mib", "0.0000001"), "no plan fits"),
        ((), "at least one budget"),
        (("--average-bits", "3", "--compression", "9", "--solver", "pareto"), "exactly one of"),
    ],
)
def test_impossible_budgets(
    budget: tuple[str, ...], message: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = modified(copy)
    assert invoke("plan", copy, *budget) == 2
    assert message in capsys.readouterr().err
    assert modified(copy) == before


@pytest.mark.parametrize("budget", [("--average-bits", "9"), ("--max-size-mib", "5")])
def test_a_budget_above_the_largest_plan_gives_it_with_a_warning(
    budget: tuple[str, ...], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # not an error, as in all other tests
        assert invoke("plan", finished, *budget, "--json") == 0
    printed = capsys.readouterr()
    assert printed.err.count("above the largest plan") == 1
    assert set(json.loads(printed.out)["weight_bits"].values()) == {8}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("digit", "unknown task 'digit'"),
        ("nowhere.py:build", "does not exist"),
        (TASK.replace(":build", ":buidl"), "no function 'buidl'; it has"),
        (TASK.replace(":build", ":not_a_setup"), "returned a int, expected a tracequant.TaskSetup"),
    ],
)
def test_unknown_tasks(task: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("analyze", "--task", task, "--out", tmp_path / "new" / "run", "-q") == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "new").exists()


def test_option_that_the_task_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("analyze", *ANALYZE, "--weights", "x.safetensors", "--out", tmp_path / "run") == 2
    assert "no parameter for --weights" in capsys.readouterr().err


def test_run_directory_of_another_task(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("run", "--task", "digits", "--average-bits", "3", "--out", copy) == 2
    assert "belongs to another model" in capsys.readouterr().err


def test_run_directory_of_other_weights(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINY_FAULT", "other weights")
    assert invoke("evaluate", copy) == 2
    assert "other weights of this model" in capsys.readouterr().err


def test_directory_that_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("do not overwrite")
    assert invoke("analyze", *ANALYZE, "--out", tmp_path) == 2
    assert "not empty and not a run directory" in capsys.readouterr().err
    assert invoke("quantize", tmp_path) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_a_run_with_the_name_of_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("plan", "seed=1", "--average-bits", "3") == 2
    assert f"{tmp_path / 'seed=1'} is not a run directory" in capsys.readouterr().err


def test_a_latency_limit_without_a_table(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("plan", copy, "--max-latency-ms", "3") == 2
    assert "give --latency TABLE, or" in capsys.readouterr().err


def test_a_plan_cannot_take_the_activations_out(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is a choice of the analysis."""
    assert invoke("plan", copy, "--average-bits", "3", "--activation-bits", "none") == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "analyze with --activation-bits none" in err
    assert "--allowed-activation-bits" not in err


def test_truncated_packed_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert invoke("evaluate", copy) == 2
    assert "damaged" in capsys.readouterr().err


def test_damaged_artifact(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "sensitivity.json").write_text('{"kind": "Sensitivity", "ver')
    assert invoke("plan", copy, "--average-bits", "3") == 2
    assert "cannot be read as JSON" in capsys.readouterr().err


def test_a_damaged_plan_is_named_and_another_plan_replaces_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "plan.json").write_text('{"kind": "BitPlan", "ver')
    assert invoke("report", copy) == 2
    advice = f"delete it, and `tracequant plan {copy} --max-size-mib X` makes it anew"
    assert advice in capsys.readouterr().err
    assert invoke("evaluate", copy) == 0
    err = capsys.readouterr().err.replace("\n", " ")
    assert "older than" not in err
    assert "cannot be read as JSON" in err
    assert invoke("plan", copy, "--average-bits", "3", "-q") == 0
    assert RunDirectory(copy).done("plan")
    assert RunDirectory(copy).plan().average_bits <= 3


@pytest.mark.parametrize("bits", ["2,nine", "0,4", "9", ""])
def test_bad_bits(bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("analyze", "--task", TASK, "--weight-bits", bits, "--out", tmp_path / "run") == 2
    assert "--weight-bits takes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    assert invoke("analyze", *ANALYZE, "--device", missing, "--out", tmp_path / "run") == 2
    assert "cannot be used" in capsys.readouterr().err


def test_tables_and_json(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("plan", finished, "--average-bits", "3") == 0
    assert "share of Ω" in capsys.readouterr().out
    assert invoke("quantize", finished) == 0
    assert "mixed" in capsys.readouterr().out
    assert invoke("pack", finished, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "PackResult"
    assert invoke("pack", finished) == 0
    assert f"Size: {RunDirectory(finished).plan().whole_size}" in capsys.readouterr().out
    assert invoke("--version") == 0
    assert tq.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["analyze", "plan", "quantize", "finetune", "evaluate", "pack", "report", "run", "demo"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(command, "--help") == 0
    assert len(capsys.readouterr().out) > 200


def test_report_is_self_contained(
    copy: Path, blank_figures: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", blank_figures)
    assert invoke("report", copy, "-q") == 0
    page = (copy / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/svg+xml;base64,") == 6
    for name in ("layers", "frontier", "activations", "accuracy", "loss"):
        assert (copy / "figures" / f"{name}.png").stat().st_size > 5_000
        assert (copy / "figures" / f"{name}.svg").exists()
    packed = RunDirectory(copy).pack_result()
    for text in (
        f"{packed.promised_bytes:,}",
        f"{packed.evaluation.metric:.2f}",
        "would save",
        "at most 3 bits on average",
        RunDirectory(copy).plan().whole_size,
        "of the parameters quantized",
    ):
        assert text in page


def test_report_from_a_plan_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert invoke("analyze", "--task", TASK, "--num-probes", "2", "--activation-bits", "none", "--out", path, "-q") == 0
    assert invoke("plan", path, "--average-bits", "3", "-q") == 0
    assert invoke("report", path, "-q") == 0
    page = (path / "report.html").read_text()
    assert "Accuracy and size" not in page
    assert "float" in page


# When to stop measuring, and how precisely to compute


def analyzed(path: Path, *options: str) -> tq.Curvature:
    arguments = ("--task", f"{path}/task.py:build", "--no-eigenvalues", "--out", path / "run", "-q", *options)
    (path / "task.py").write_text(
        "import tiny_task\nimport tracequant as tq\n\n"
        "def build(samples=None, seed=0):\n"
        "    setup = tiny_task.build()\n"
        "    x, y = tiny_task.images(128, 5)\n"
        "    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 128, 16)]\n"
        "    return tq.TaskSetup(setup.model, setup.task, batches, setup.train, setup.evaluation)\n"
    )
    assert invoke("analyze", *arguments) == 0
    return RunDirectory(path / "run").curvature()


def test_relative_error_ends_the_analysis_early(tmp_path: Path) -> None:
    few = analyzed(tmp_path, "--target-sampling-error", "0.5")
    assert 32 <= few.samples < 128
    more = analyzed(tmp_path, "--target-sampling-error", "0.2")  # another setting, measured again
    assert more.samples > few.samples


def test_a_stable_plan_ends_the_analysis_early(tmp_path: Path) -> None:
    assert analyzed(tmp_path, "--target-stability", "0.1", "--weight-bits", "2,8").samples < 128
    assert analyzed(tmp_path).samples == 128


def test_run_stops_when_the_plan_that_is_asked_for_is_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one half way, which is what an analysis without a budget goes by."""
    asked = []
    monkeypatch.setattr("tracequant.run.stages.is_stable", lambda *_, **asked_for: (asked.append(asked_for), True)[1])
    arguments = (
        "--average-bits",
        "2.5",
        "--target-stability",
        "0.75",
        "--finetune-steps",
        "0",
        "-q",
        "--out",
        tmp_path / "run",
    )
    assert invoke("run", *ANALYZE, *arguments) == 0
    assert [(stop["settings"].average_bits, stop["share"]) for stop in asked] == [(2.5, 0.75)]
    assert RunDirectory(tmp_path / "run").curvature().samples == 16


@pytest.mark.filterwarnings("always:this analysis has no eigenvalues")
def test_an_analysis_goes_on_without_eigenvalues_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are for the report alone, unless the criterion is one of theirs."""
    monkeypatch.setattr(spectrum.memory, "available_bytes", lambda: 1000)
    options = [option for option in ANALYZE if option != "--no-eigenvalues"]
    path = tmp_path / "run"
    assert invoke("analyze", *options, "--out", path, "-q") == 0
    assert capsys.readouterr().err.count("this analysis has no eigenvalues") == 1
    run = RunDirectory(path)
    assert run.done("analyze")
    assert run.curvature().top_eigenvalues is None
    assert invoke("analyze", *options, "--criterion", "eigenvalue", "--out", tmp_path / "other", "-q") == 2
    assert "do not fit into memory" in " ".join(capsys.readouterr().err.split())


def test_other_settings_load_the_task_anew(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    settings = AnalysisSettings(TASK, eigenvalues=False)
    for samples in (32, 24):
        run.adopt(dataclasses.replace(settings, options=TaskOptions(samples=samples)))
        stages.analyze(run)
        assert run.curvature().samples == samples
    with pytest.raises(TaskError, match="image_size"):
        run.adopt(dataclasses.replace(settings, options=TaskOptions(samples=32, image_size=3)))
    assert [len(y) for _, y in run.setup().calibration] == [16, 8]


def test_precision_is_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = analyzed(tmp_path, "--num-probes", "4")
    rough = analyzed(tmp_path, "--num-probes", "4", "--precision", "bfloat16")
    for name, estimate in exact.weights.items():
        assert rough.weights[name].trace == pytest.approx(estimate.trace, rel=0.1)
        assert rough.weights[name].trace != estimate.trace
    arguments = ("--task", TASK, "--precision", "tf32", "--device", "cpu", "--out", tmp_path / "other", "-q")
    assert invoke("analyze", *arguments) == 2
    assert "--precision tf32 is for CUDA devices" in " ".join(capsys.readouterr().err.split())


def test_inspect_shows_what_is_in_the_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = RunDirectory(finished), finished / "model.safetensors"
    assert invoke("inspect", file, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert {layer["name"]: layer["bits"] for layer in shown["layers"]} == run.plan().weight_bits
    assert shown["input_bits"] == run.plan().activation_bits
    assert shown["layers"][0]["shape"] == [8, 1, 3, 3]
    assert shown["file_bytes"] == file.stat().st_size == run.plan().size_bytes
    assert invoke("inspect", file) == 0
    text = capsys.readouterr().out
    assert f"{file.stat().st_size:,} bytes, checksum right" in text
    assert all(name in text for name in run.plan().weight_bits)


def test_inspect_refuses_a_flipped_bit(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "model.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    assert invoke("inspect", file) == 2
    assert "checksum" in capsys.readouterr().err


def test_export_and_verify(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    assert invoke("verify", copy) == 2
    assert "tracequant export" in capsys.readouterr().err
    assert invoke("export", copy, "-q") == 0
    assert invoke("verify", copy, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file_bytes"] == (copy / "model.onnx").stat().st_size
    assert found["promised_bytes"] == RunDirectory(copy).plan().size_bytes
    assert found["difference"] <= 1e-5
    assert found["metric"] == RunDirectory(copy).pack_result().evaluation.metric
    assert found["runtimes"][0]["equal_predictions"] >= 0.97
    assert [kernel["layer"] for kernel in found["kernels"]] == ["0", "3", "6"]
    assert invoke("verify", copy) == 0
    assert "layers in integers" in capsys.readouterr().out


def test_a_new_packed_model_has_no_onnx_file_of_the_old_one(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.onnx", "verify.json"):
        (copy / name).write_text("of the old one")
    assert invoke("pack", copy, "-q") == 0
    assert (copy / "model.onnx").is_file()  # it is still that of the product
    for stage in ("plan", "quantize", "finetune", "pack"):
        options = {"plan": ("--average-bits", "2.2", "--apply"), "finetune": ("--finetune-steps", "1")}.get(stage, ())
        assert invoke(stage, copy, *options, "-q") == 0
    assert not (copy / "model.onnx").exists()
    assert not (copy / "verify.json").exists()
    assert invoke("verify", copy, "-q") == 2
    assert "tracequant export" in " ".join(capsys.readouterr().err.split())


def test_export_needs_a_packed_model(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").unlink()
    assert invoke("export", copy) == 2
    assert "tracequant pack" in capsys.readouterr().err
