"""Options that are made from the settings, how help shows them, and how errors spell them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer

import tiny_task
import tracequant as tq
from cli_runs import ANALYZE, STAGED, TASK, invoke, modified
from tracequant.cli import app as cli
from tracequant.cli import commands
from tracequant.cli.help import PANELS
from tracequant.cli.options import Without, field_options, with_settings
from tracequant.cli.reference import options_page
from tracequant.cli.spelling import in_shell_words
from tracequant.core import settings as declared
from tracequant.core.options import decisive, option, validate
from tracequant.core.settings import AnalysisSettings, FinetuneSettings, PlanSettings, RunSettings
from tracequant.run.directory import STAGES, RunDirectory

pytestmark = pytest.mark.usefixtures("blank_figures")

ROOT = Path(__file__).parents[1]


def parameters(command: str) -> list[Any]:
    """The parameters of a command of the program."""
    group: Any = typer.main.get_command(cli.app)
    return list(group.commands[command].params)


def spellings(parameter: Any) -> set[str]:
    """All flags of one option."""
    return {*parameter.opts, *parameter.secondary_opts}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[RunSettings]:
    """What `run` was asked for; nothing is run."""
    recorded: list[RunSettings] = []

    def record(run: RunDirectory, *settings: Any, **_: bool) -> None:
        recorded.append(RunSettings(*settings))

    monkeypatch.setattr(commands, "_run_stages", record)
    return recorded


# One field is one option


def test_an_empty_command_line_has_the_defaults_of_the_classes(requests: list[RunSettings], tmp_path: Path) -> None:
    assert invoke("run", "--task", "digits", "--out", tmp_path / "run") == 0
    assert requests == [RunSettings(AnalysisSettings("digits"), PlanSettings(), FinetuneSettings())]


def test_every_field_is_one_option_of_run() -> None:
    flags = [flag for parameter in parameters("run") for flag in spellings(parameter)]
    assert len(flags) == len(set(flags))
    fields = [entry for kind in (AnalysisSettings, PlanSettings, FinetuneSettings) for entry in field_options(kind)]
    # `run` plans by the criterion of its analysis.
    assert [entry.name for entry in fields].count("criterion") == 2
    wanted = {flag for entry in fields for flag in entry.flag.split("/")}
    ours = {"--out", "--preset", "--quiet", "-q", "--json", "--help-all"}
    assert set(flags) == wanted | ours


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (("--weight-bits", "4,2"), {"analysis": {"sensitivity": {"weight_bits": (2, 4)}}}),
        (("--activation-bits", "none"), {"analysis": {"sensitivity": {"activation_bits": ()}}}),
        (("--num-probes", "exact"), {"analysis": {"curvature": {"num_probes": "exact"}}}),
        (("--num-probes", "3"), {"analysis": {"curvature": {"num_probes": 3}}}),
        (("--asymmetric", "--weight-range", "minmax"), {
            "analysis": {"sensitivity": {"weight_grid": {"symmetric": False, "range": "minmax"}}}
        }),
        (("--no-eigenvalues", "--exclude", "a.*", "--exclude", "b"), {
            "analysis": {"eigenvalues": False, "discover": {"exclude": ("a.*", "b")}}
        }),
        (("--fixed-bits", "fc=8", "--allowed-bits", "a=4,8"), {
            "plan": {"fixed_bits": {"fc": 8}, "allowed_bits": {"a": (4, 8)}}
        }),
        (("--finetune-steps", "7", "--compile"), {"finetune": {"steps": 7, "compile": True}}),
    ],
)  # fmt: skip
def test_values_of_every_kind_arrive(
    arguments: tuple[str, ...], changed: dict[str, Any], requests: list[RunSettings], tmp_path: Path
) -> None:
    assert invoke("run", "--task", "digits", "--out", tmp_path / "run", *arguments) == 0
    (asked,) = requests
    given = {name: decisive(getattr(asked, name)) for name in ("analysis", "plan", "finetune")}
    assert given.pop("analysis") == {"task": "digits"} | changed.pop("analysis", {})
    assert given == {"plan": {}, "finetune": {}} | changed


@dataclass(frozen=True)
class Inner:
    """Settings inside of others."""

    ratio: float = option(0.5, "a share", minimum=0, below=1, panel="Rules")
    mode: Literal["fast", "exact"] = option("fast", "a choice", panel="Rules")

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Outer:
    """Settings with a field that no other code of tracequant knows."""

    brand_new: int = option(3, "a field that was added today", minimum=1, panel="Training")
    careful: bool = option(False, "a switch", panel="Training")
    widths: tuple[int, ...] | None = option(None, "widths", metavar="LIST", panel="Rules", expert=True)
    left_out: int = option(9, "no option of this command")
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        validate(self)


def test_a_new_field_is_an_option_without_another_edit(capsys: pytest.CaptureFixture[str]) -> None:
    received: list[tuple[Outer, bool]] = []

    def command(settings: Annotated[Outer, Without(("left_out",))], loud: bool = False) -> None:
        received.append((settings, loud))

    program = typer.Typer(rich_markup_mode=None)
    program.command("go", cls=cli.SettingsCommand)(with_settings(command))

    def run(*arguments: str) -> int:
        return cli.run_guarded(lambda: program(list(arguments)))

    assert run() == 0
    assert run("--brand-new", "5", "--careful", "--widths", "4,2", "--ratio", "0.25", "--mode", "exact", "--loud") == 0
    assert received == [
        (Outer(), False),
        (Outer(brand_new=5, careful=True, widths=(2, 4), inner=Inner(0.25, "exact")), True),
    ]
    assert run("--left-out", "1") == 2
    assert run("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--brand-new <int> a field that was added today [>= 1] [default: 3]" in text
    assert "--widths" not in text
    assert run("--brand-new", "0") == 2


# Help


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert invoke(*arguments) == 0
    return capsys.readouterr().out


def test_help_of_run_has_examples_first_and_options_in_panels(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "run", "--help")
    assert text.count("    tracequant run ") == 3
    headings = [line[:-1] for line in text.splitlines() if line.removesuffix(":") in (*PANELS, "Options")]
    assert headings == [
        "Model and data",
        "Budget",
        "Rules",
        "Analysis",
        "Quantization",
        "Training",
        "Output",
        "Options",
    ]
    assert text.index("Examples:") < text.index("tracequant run --task") < text.index("Model and data:")


def test_help_hides_what_experts_need_and_help_all_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = (AnalysisSettings, PlanSettings, FinetuneSettings)
    experts = {entry.flag.split("/")[0] for kind in kinds for entry in field_options(kind) if entry.option.expert}
    assert {"--precision", "--probe-scope", "--weight-range", "--ema"} <= experts
    short, everything = help_of(capsys, "run", "--help"), help_of(capsys, "run", "--help-all")
    shown = {word.rstrip(",") for word in short.split() if word.startswith("--")}
    assert not experts & shown
    assert f"{len(experts)} more options for experts: --help-all shows them." in short
    assert experts <= {word for word in everything.split() if word.startswith("--")}
    assert "more options for experts" not in everything
    # The program is as it was for the next call.
    assert help_of(capsys, "run", "--help") == short


def test_every_option_of_run_is_in_a_panel() -> None:
    for parameter in parameters("run"):
        assert parameter.rich_help_panel in PANELS, parameter.name


def test_descriptions_of_commands_fit_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(capsys, "--help").splitlines()
    listed = lines[lines.index("Commands:") + 1 :]
    group: Any = typer.main.get_command(cli.app)
    assert len(listed) == len(group.commands)
    for line in lines:
        assert len(line) <= 80
    assert not any(line.endswith("...") for line in listed)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help-all"], ["presets"]])
def test_help_needs_neither_torch_nor_matplotlib(arguments: list[str]) -> None:
    code = (
        "import sys; from tracequant.cli import app as cli;"
        f"code = cli.run_guarded(lambda: cli.app({arguments!r}));"
        "heavy = {'torch', 'matplotlib', 'safetensors'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_of_options_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == options_page(), "run `make docs`"


def test_the_page_has_every_field() -> None:
    page = options_page()
    kinds = [k for k in vars(declared).values() if isinstance(k, type) and dataclasses.is_dataclass(k)]
    entries = {(k, f.name) for k in kinds for f in dataclasses.fields(k) if "option" in f.metadata}
    assert len(entries) > 50
    for kind, name in entries:
        assert f"| `{name}` |" in page, f"{kind.__name__}.{name}"


# Errors in the words of the shell


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (lambda: tq.CurvatureSettings(estimator="magic"), "--estimator must be 'auto', 'gauss_newton' or"),
        (lambda: FinetuneSettings(steps=-5), "--finetune-steps must be an integer >= 0, got -5"),
        (lambda: FinetuneSettings(ema=1.0), "--ema must be a number >= 0 and < 1, got 1.0"),
        (lambda: declared.WeightGrid(range="max"), "--weight-range must be 'mse', 'percentile' or 'minmax'"),
        (lambda: declared.WeightGrid(symmetric=3), "--symmetric must be True or False, got 3"),
        (lambda: PlanSettings(average_bits=-1), "--average-bits must be a number > 0, got -1"),
        (lambda: PlanSettings(max_accuracy_drop=-1), "--max-accuracy-drop must be a number >= 0, got -1"),
    ],
)
def test_wrong_settings_name_the_option(raised: Callable[[], object], expected: str) -> None:
    with pytest.raises(tq.SettingsError) as caught:
        raised()
    assert expected in in_shell_words(str(caught.value), caught.value.argument)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("precision='bfloat16' needs a GPU", "--precision bfloat16 needs a GPU"),
        ("give average_bits, or max_size_mib.", "give --average-bits, or --max-size-mib."),
        ("use symmetric=False", "use --asymmetric"),
        ("use symmetric=True, per_channel=False", "use --symmetric, --per-tensor"),
        ("eigenvalues=False leaves them out", "--no-eigenvalues leaves them out"),
        ("without a teacher (distillation=0)", "without a teacher (--distillation 0)"),
        ("give weights=FILE, or another model=NAME", "give --weights FILE, or another --model NAME"),
        ("has no parameter for data_dir='x y'", "has no parameter for --data-dir x y"),
        ("max_size_mib, compression, average_bits", "--max-size-mib, --compression, --average-bits"),
        (
            "one of max_size_mib, compression and average_bits",
            "one of --max-size-mib, --compression and --average-bits",
        ),
        ("layers pattern 'x' matches no layer", "--layer pattern 'x' matches no layer"),
        ("a latency limit needs a table; give latency=TABLE", "a latency limit needs a table; give --latency TABLE"),
        ("target_sampling_error is for gauss_newton", "--target-sampling-error is for gauss_newton"),
    ],
)
def test_arguments_become_options(text: str, expected: str) -> None:
    assert in_shell_words(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "the model has no weights in this range; its device is cpu, its optimizer sgd",
        "/data/batch_size/run does not exist; neither does image_size/x.png",
        "call task.batch_size(batch), or write Task.batch_size",
        "file average_bits.json, my_average_bits and average_bits_too",
        "layer 'image_size' and layer \"crop_share\"",
        "--exclude 'max_size_mib' matches no layer",
        "steps must be 3",
        "the curvature holds no trace of fc; estimate it with weights=True",
        "/runs/seed=1 is not a run directory",
    ],
)
def test_other_words_stay_as_they_are(text: str) -> None:
    assert in_shell_words(text) == text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--finetune-steps", "-5"), "--finetune-steps must be an integer >= 0, got -5"),
        (("--ema", "1.5"), "--ema must be a number >= 0 and < 1, got 1.5"),
        (("--num-probes", "many"), "--num-probes must be an integer >= 1 or 'exact', got 'many'"),
        (("--precision", "tf32", "--device", "cpu"), "--precision tf32 is for CUDA devices"),
        (("--workers", "2"), "has no parameter for --workers 2"),
    ],
)
def test_errors_of_the_program_name_options(
    arguments: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("run", *ANALYZE, "--average-bits", "3", *arguments, "--out", tmp_path / "run", "-q") == 2
    assert expected in " ".join(capsys.readouterr().err.split())


# A finished run stays finished


OWN_TASK = """
import tiny_task


def build(samples=32, seed=0, workers=None):
    return tiny_task.build(samples, seed)
"""


def test_where_values_are_computed_makes_no_stage_stale(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(OWN_TASK)
    out = tmp_path / "run"
    arguments = [argument if argument != TASK else f"{tmp_path}/task.py:build" for argument in STAGED]
    assert invoke(*arguments, "--out", out) == 0
    before, keys = modified(out), (out / "stages.json").read_text()
    for others in (("--device", "cpu"), ("--workers", "3"), ("--device", "cpu", "--workers", "1")):
        assert invoke(*arguments, *others, "--out", out) == 0
        assert modified(out) == before
        assert json.loads((out / "stages.json").read_text()) == json.loads(keys)


def test_a_new_option_with_its_default_changes_no_key(copy: Path) -> None:
    run = RunDirectory(copy)
    settings = run.settings()
    keys = {stage: run.key(stage, settings) for stage in STAGES}
    assert settings.finetune is not None
    of_today = {field.name: getattr(settings.finetune, field.name) for field in dataclasses.fields(FinetuneSettings)}

    @dataclass(frozen=True)
    class Tomorrow(FinetuneSettings):
        """The recipe with one more field."""

        warmup: int = option(0, "steps in which the learning rate rises", minimum=0)

    assert decisive(Tomorrow(**of_today)) == decisive(settings.finetune)
    later = dataclasses.replace(settings, finetune=Tomorrow(**of_today))
    assert {stage: run.key(stage, later) for stage in STAGES} == keys
    other = dataclasses.replace(settings, finetune=Tomorrow(**of_today, warmup=5))
    differing = [stage for stage in STAGES if run.key(stage, other) != keys[stage]]
    assert differing == ["finetune", "pack", "report"]


def test_a_run_of_another_version_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps(document | {"version": 1}))
    before = modified(copy)
    for command in (["plan", copy, "--average-bits", "3"], ["report", copy], [*STAGED, "--out", copy]):
        assert invoke(*command) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert message == (
            f"error: {copy} was made by another version of tracequant, whose files this version does not read: choose"
            " another --out, or work on it with the version that made it"
        )
    assert modified(copy) == before


# Whose error it is


def test_an_os_error_of_the_users_task_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("def build(seed=0):\n    open('images/nowhere.bin')\n")
    program = [sys.executable, "-m", "tracequant", "analyze", "--task", f"{tmp_path}/task.py:build"]
    done = subprocess.run([*program, "--out", tmp_path / "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "open('images/nowhere.bin')" in done.stderr


def test_an_os_error_of_the_users_data_keeps_its_traceback(tmp_path: Path) -> None:
    """Also where a library stands between, or a worker of a DataLoader opens the file."""
    source = """
import json
from pathlib import Path
from torch.utils.data import DataLoader, Dataset
import tiny_task
import tracequant as tq


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return json.loads(Path("nowhere.json").read_text())


def build(workers=0, seed=0):
    setup = tiny_task.build()
    loader = DataLoader(Images(), num_workers=workers)
    return tq.TaskSetup(setup.model, setup.task, loader, setup.train, setup.evaluation)
"""
    (tmp_path / "task.py").write_text(source)
    for workers in (0, 1):
        arguments = ("--task", f"{tmp_path}/task.py:build", "--workers", workers, "--out", tmp_path / f"run{workers}")
        with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
            invoke("analyze", *arguments, "-q")


def test_our_own_os_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert invoke("run", *ANALYZE, "--average-bits", "3", "--out", tmp_path / "file" / "run", "-q") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert invoke("run", *ANALYZE, "--average-bits", "3", "--out", tmp_path / "run", "-q") == 2
    assert "error: " in capsys.readouterr().err


# What commands print and leave


def test_quiet_silences_evaluate_and_verify(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("evaluate", copy) == 0
    assert "model.safetensors: " in capsys.readouterr().out
    assert invoke("evaluate", copy, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    assert invoke("export", copy, "--quiet") == 0
    assert invoke("verify", copy, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_report_leaves_files_of_others(copy: Path) -> None:
    figures = copy / "figures"
    (figures / "notes").mkdir()
    (figures / "notes" / "mine.txt").write_text("mine")
    (figures / "mine.png").write_bytes(b"mine")
    (figures / "check.png").mkdir()  # under the name of a figure that this run does not have
    (figures / "spectrum.svg").write_text("of an earlier analysis")
    assert invoke("report", copy, "-q") == 0
    assert (figures / "notes" / "mine.txt").read_text() == "mine"
    assert (figures / "mine.png").read_bytes() == b"mine"
    assert (figures / "check.png").is_dir()
    assert not (figures / "spectrum.svg").exists()


def test_stability_is_computed_once_for_a_plan(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = json.loads((copy / "stability.json").read_text())["shares"]
    assert shown.keys() == RunDirectory(copy).plan().weight_bits.keys()
    computed = []

    def plan_stability(*arguments: object) -> dict[str, float]:
        computed.append(arguments)
        return dict.fromkeys(shown, 1.0)

    monkeypatch.setattr("tracequant.run.stages.plan_stability", plan_stability)
    assert invoke("report", copy, "-q") == 0
    assert not computed
    assert invoke("plan", copy, "--average-bits", "2.5", "--apply", "-q") == 0
    assert invoke("report", copy, "-q") == 0
    assert len(computed) == 1


def test_a_generator_as_calibration_keeps_its_first_batch(tmp_path: Path) -> None:
    def batches(data: Iterable[Any]) -> Iterable[Any]:
        yield from data

    setup = tiny_task.build()
    lists = [list(setup.calibration), list(setup.train), list(setup.evaluation)]
    lent = tq.TaskSetup(setup.model, setup.task, *map(batches, lists))
    for name, expected in zip(("calibration", "train", "evaluation"), lists, strict=True):
        for _ in range(2):  # and it can be read again
            assert [id(x) for x, _ in getattr(lent, name)] == [id(x) for x, _ in expected]
    source = (
        "import tiny_task\nimport tracequant as tq\n\n\n"
        "def build(seed=0):\n"
        "    s = tiny_task.build()\n"
        "    return tq.TaskSetup(s.model, s.task, (b for b in s.calibration), s.train, s.evaluation)\n"
    )
    (tmp_path / "task.py").write_text(source)
    arguments = [argument if argument != TASK else f"{tmp_path}/task.py:build" for argument in ANALYZE]
    assert invoke("analyze", *arguments, "--out", tmp_path / "run", "-q") == 0
    assert RunDirectory(tmp_path / "run").curvature().samples == 32


def test_every_switch_can_be_turned_off(requests: list[RunSettings], tmp_path: Path) -> None:
    """A preset may turn a switch on that the user wants off."""
    kinds = (AnalysisSettings, PlanSettings, FinetuneSettings)
    switches = [entry.switches for kind in kinds for entry in field_options(kind) if entry.annotation is bool]
    assert ("--compile", "--no-compile") in switches
    assert ("--per-channel", "--per-tensor") in switches
    for side in (0, 1):
        assert invoke("run", "--task", "digits", "--out", tmp_path / "run", *(flags[side] for flags in switches)) == 0
    assert len(requests) == 2
    for asked, value in zip(requests, (True, False), strict=True):
        assert asked.analysis.eigenvalues is value
        assert asked.analysis.sensitivity.weight_grid.per_channel is value
        assert asked.finetune is not None
        assert asked.finetune.compile is value
