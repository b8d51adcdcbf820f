"""Presets: what they stand for, that options win over them, and that they run from start to finish."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_task
from cli_runs import TASK, invoke
from image_tree import make_tree
from tracequant.cli import app as cli
from tracequant.cli import commands
from tracequant.cli.presets import PRESETS, Preset
from tracequant.core.settings import RunSettings
from tracequant.run.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset for the small task of the command-line tests."""
    preset = Preset(
        "for tests",
        {"task": TASK, "weight_bits": "2,4", "activation_bits": "4,8"},
        {"compression": 10.0, "activation_compression": 5.0},
        {"finetune_steps": 5, "distillation": 0.25},
    )
    monkeypatch.setitem(PRESETS, "tiny", preset)


QUICK = ("--num-probes", "1", "--no-eigenvalues", "-q")


def settings(path: Path) -> RunSettings:
    return RunDirectory(path).settings()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunSettings]:
    """What `run` was asked for, which it does not do."""
    requests: list[RunSettings] = []

    def record(run: RunDirectory, *settings: Any, **_: bool) -> None:
        requests.append(RunSettings(*settings))

    monkeypatch.setattr(commands, "_run_stages", record)
    return requests


def test_a_preset_is_what_was_not_given(tiny: None, asked: list[RunSettings], tmp_path: Path) -> None:
    assert invoke("run", "--preset", "tiny", "--out", tmp_path / "run", "--finetune-steps", 3) == 0
    (found,) = asked
    assert (found.analysis.task, found.analysis.sensitivity.weight_bits) == (TASK, (2, 4))
    assert (found.plan.compression, found.plan.activation_compression) == (10.0, 5.0)
    assert (found.finetune.steps, found.finetune.distillation) == (3, 0.25)


@pytest.mark.parametrize(
    ("given", "weights", "activations"),
    [
        (("--compression", 9), (9.0, None), (5.0, None)),
        (("--average-bits", 3), (None, 3.0), (5.0, None)),
        (("--average-activation-bits", 7), (10.0, None), (None, 7.0)),
        (("--activation-bits", 8), (10.0, None), (None, None)),
    ],
)
def test_a_budget_that_is_given_takes_the_place_of_the_presets(
    given: tuple[object, ...],
    weights: tuple[float | None, float | None],
    activations: tuple[float | None, float | None],
    tiny: None,
    asked: list[RunSettings],
    tmp_path: Path,
) -> None:
    assert invoke("run", "--preset", "tiny", "--out", tmp_path / "run", *given) == 0
    plan = asked[0].plan
    assert (plan.compression, plan.average_bits) == weights
    assert (plan.activation_compression, plan.average_activation_bits) == activations


def test_single_stages_take_their_part(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("analyze", "--preset", "tiny", "--out", out, *QUICK) == 0
    assert invoke("plan", out, "--preset", "tiny", "-q") == 0
    assert settings(out).plan.compression == 10.0
    assert settings(out).plan.allowed_bits is None
    assert invoke("quantize", out, "-q") == 0
    assert invoke("finetune", out, "--preset", "tiny", "-q") == 0
    assert (settings(out).finetune.steps, settings(out).finetune.distillation) == (5, 0.25)


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("presets") == 0
    listed = capsys.readouterr().out
    for name, size in {"resnet50": "7.99 MB", "inceptionv3": "7.57 MB", "squeezenext": "1.07 MB"}.items():
        assert f"paper-{name}: HAWQ-V2" in listed
        assert size in listed
    for line in listed.splitlines():
        if line.startswith("  "):  # what is listed is what `run` takes
            words = line.split()
            assert {word for word in words if word.startswith("--")} <= options_of_run()
    assert invoke("presets", "--json") == 0
    assert json.loads(capsys.readouterr().out)["paper-resnet50"]["plan"]["compression"] == 12.24


def options_of_run() -> set[str]:
    import typer

    run = typer.main.get_command(cli.app).commands["run"]
    return {option for parameter in run.params for option in parameter.opts}


def test_an_unknown_preset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("run", "--preset", "paper-resnet", "--out", tmp_path / "run") == 2
    assert "unknown preset 'paper-resnet'; choose paper-resnet50" in capsys.readouterr().err


# Preset → (what makes its network with three classes, pixels of a side).
NETWORKS = {
    "paper-resnet50": ("torchvision.models.resnet50(num_classes=3)", 64),
    "paper-inceptionv3": ("torchvision.models.inception_v3(num_classes=3, init_weights=False)", 75),
    "paper-squeezenext": ("tracequant.tasks.networks.squeezenext.SqueezeNext(2.0, num_classes=3)", 64),
}


# In place of them where time is short: 16 layers.
SMALL = ("timm.create_model('test_resnet', num_classes=3)", 64)


def command(preset: str, folder: Path, out: Path, small: bool = False) -> list[str]:
    """The whole flow of a preset on six small images."""
    pytest.importorskip("torchvision", reason="the imagenet task needs the extra 'vision'")
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    make, size = SMALL if small else NETWORKS[preset]
    weights = folder / f"{preset}.pth"
    if not weights.exists():
        make_tree(folder / "tree", {"a": 3, "b": 2, "c": 3}, {"a": 1, "c": 2})
        torch.manual_seed(0)
        model = eval(make)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        # Statistics as training would have left them. Inception's second head needs more pixels than the run has.
        pixels = 299 if hasattr(model, "AuxLogits") else size
        with torch.no_grad():
            model.train()(torch.randn(4, 3, pixels, pixels))
        torch.save(model.state_dict(), weights)
    others = []
    if small:
        # In a small network the images, which keep 8 bits, are a larger share of the activations.
        room = () if preset == "paper-squeezenext" else ("--activation-compression", "6")
        others = ["--model", "timm:test_resnet", *room]
    return [
        "run", "--preset", preset, "--data-dir", str(folder / "tree"), "--weights", str(weights), "--image-size",
        str(size), "--samples", "4", "--batch-size", "2", "--workers", "0", "--finetune-steps", "2", "--out", str(out),
        *QUICK, *others,
    ]  # fmt: skip


def check_run(out: Path, preset: str) -> None:
    run = RunDirectory(out)
    assert all(run.done(stage) for stage in ("analyze", "plan", "quantize", "finetune", "pack", "report"))
    plan, outcome, packed = run.plan(), run.finetune_outcome(), run.pack_result()
    assert plan.compression >= PRESETS[preset].plan["compression"]
    assert len(outcome.losses) == 2
    assert packed.fine_tuned
    assert packed.file_bytes == packed.promised_bytes == plan.size_bytes
    assert packed.evaluation.loss == outcome.mixed.loss
    assert not list(out.glob("checkpoint-*"))


@pytest.mark.filterwarnings("ignore:.*not significantly above zero:UserWarning")
@pytest.mark.parametrize("preset", NETWORKS)
def test_the_papers_presets_on_a_small_network(preset: str, tmp_path: Path) -> None:
    assert invoke(*command(preset, tmp_path, tmp_path / "run", small=True)) == 0
    check_run(tmp_path / "run", preset)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not significantly above zero:UserWarning")
@pytest.mark.parametrize("preset", NETWORKS)
def test_the_papers_presets_on_their_networks(preset: str, tmp_path: Path) -> None:
    assert invoke(*command(preset, tmp_path, tmp_path / "run")) == 0
    check_run(tmp_path / "run", preset)


@pytest.mark.parametrize(
    "preset", ["paper-resnet50", *(pytest.param(name, marks=pytest.mark.slow) for name in list(NETWORKS)[1:])]
)
def test_the_papers_presets_in_two_processes(preset: str, tmp_path: Path) -> None:
    torchrun(command(preset, tmp_path, tmp_path / "run", small=True))
    check_run(tmp_path / "run", preset)


@pytest.mark.slow
def test_a_small_run_in_two_processes(tmp_path: Path) -> None:
    """`run`, once more, then `finetune` with another recipe, each by both; a recipe that fails ends both."""
    out = tmp_path / "run"
    arguments = ["run", "--task", TASK, "--average-bits", "3", "--finetune-steps", "4", "--out", str(out), *QUICK]
    torchrun(arguments)
    run = RunDirectory(out)
    assert len(run.finetune_outcome().losses) == 4
    assert run.pack_result().file_bytes == run.plan().size_bytes
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    torchrun(arguments)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    torchrun(["finetune", str(out), "--finetune-steps", "3", "-q"])
    assert len(run.finetune_outcome().losses) == 3
    failed = torchrun(["finetune", str(out), "--finetune-steps", "3", "--learning-rate", "1e30", "-q"], expected=1)
    assert "error: the loss" in failed


def torchrun(arguments: list[str], expected: int = 0) -> str:
    """Run `tracequant` in two processes; what they wrote to standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    path = os.pathsep.join([str(Path(tiny_task.__file__).parent), *sys.path])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*program, "-m", "tracequant", *arguments], env=os.environ | own, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == expected, done.stderr
    return done.stderr
