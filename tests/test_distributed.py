"""Several processes, gloo on the CPU: the result of one process, and an end for all when one fails."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tiny_task
import tracequant as tq
from models import gelu_mlp, labelled
from tracequant import ClassificationTask, Curvature
from tracequant.cli import app as cli
from tracequant.core.errors import SecondDerivativeError
from tracequant.model import distributed

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

# A task whose calibration has `BATCHES` batches.
TASK = """
import os, time

import torch

import tiny_task
import tracequant as tq


class Task(tq.ClassificationTask):
    def outputs(self, model, batch):
        if torch.is_grad_enabled():
            time.sleep(float(os.environ.get("SLOW", "0")))
        return super().outputs(model, batch)


def build(samples=None, seed=0):
    setup = tiny_task.build()
    count = int(os.environ["BATCHES"])
    x, y = tiny_task.images(16 * count, 5)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 16 * count, 16)]
    return tq.TaskSetup(setup.model, Task(), batches, setup.train, setup.evaluation)
"""


def started(folder: Path, out: str, batches: int, *options: str, **environment: str) -> subprocess.Popen[str]:
    """Two processes that analyze into `folder / out`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    program += ["-m", "tracequant", *arguments(folder, out), *options]
    path = str(Path(tiny_task.__file__).parent)
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "BATCHES": str(batches), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(program, env=os.environ | own | environment, stderr=subprocess.PIPE, text=True)


def arguments(folder: Path, out: str) -> list[str]:
    (folder / "task.py").write_text(TASK)
    task = f"{folder / 'task.py'}:build"
    return ["analyze", "--task", task, "--out", str(folder / out), "--no-eigenvalues", "-q"]


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was written to standard error."""
    try:
        _, text = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        end(process)
        pytest.fail("the processes did not end")
    return process.returncode, text


def end(process: subprocess.Popen[str]) -> None:
    for child in children(process):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()


def children(process: subprocess.Popen[str]) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(pid) for file in tasks for pid in file.read_text().split()]


def alone(folder: Path, batches: int, *options: str) -> Curvature:
    """The result of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHES", str(batches))
        assert cli.run_guarded(lambda: cli.app([*arguments(folder, "alone"), *options])) == 0
    return Curvature.load(folder / "alone" / "curvature.json")


def assert_same(found: Curvature, expected: Curvature) -> None:
    assert found.reason == expected.reason
    assert found.samples == expected.samples
    for family in ("weights", "activations"):
        ours, theirs = getattr(found, family), getattr(expected, family)
        assert list(ours) == list(theirs)
        for name, estimate in theirs.items():
            assert ours[name].trace == pytest.approx(estimate.trace, rel=1e-5)
            assert ours[name].standard_error == pytest.approx(estimate.standard_error, rel=1e-5)
            assert ours[name].sampling_error == pytest.approx(estimate.sampling_error, rel=1e-5)
            assert ours[name].num_probes == estimate.num_probes


@pytest.mark.slow
def test_two_processes_killed_once_give_the_result_of_one(tmp_path: Path) -> None:
    """Batches shared out, five for two; the second process is killed, and the same command run again."""
    process = started(tmp_path, "both", 5, "--num-probes", "2", SLOW="0.4")
    try:
        until = time.monotonic() + 60
        while not list((tmp_path / "both").glob("batches/*/batch-000001-*.safetensors")) and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.02)
        by_rank = {rank_of(child): child for child in children(process)}
        os.kill(by_rank[1], signal.SIGKILL)
        code, text = finished(process)
    finally:
        end(process)
    assert code != 0
    assert "run the same command again" in text or "SIGTERM" in text or "Signal 9" in text
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "both").glob("batches/*/batch-*.safetensors")}
    assert 1 <= len(kept) < 5
    assert not (tmp_path / "both" / "curvature.json").exists()
    code, text = finished(started(tmp_path, "both", 5, "--num-probes", "2"))
    assert code == 0, text
    assert_same(Curvature.load(tmp_path / "both" / "curvature.json"), alone(tmp_path, 5, "--num-probes", "2"))
    assert not (tmp_path / "both" / "batches").exists()


def rank_of(pid: int) -> int | None:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")), None)


PLAIN = ClassificationTask()
Work = Callable[[], Any]


def together(work: Work, processes: int = 2) -> list[Any]:
    """What `work` returns in each of several processes, or the exception that it raises."""
    context = multiprocessing.get_context("fork")  # spawned ones would spend their time on importing torch
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    members = [context.Process(target=member, args=(rank, processes, port, work, queue)) for rank in range(processes)]
    for process in members:
        process.start()
    try:
        found = dict(queue.get(timeout=60) for _ in members)
    finally:
        for process in members:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(processes)]


def member(rank: int, processes: int, port: int, work: Work, queue: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with distributed.process_group():
            assert (distributed.rank(), distributed.world_size()) == (rank, processes)
            result = work()
    except Exception as error:
        traceback.print_exc()
        result = error
    queue.put((rank, result))


FIVE = labelled(6, sizes=(4, 4, 3, 4, 2))


def measured(batches: Any = FIVE, task: Any = PLAIN, **options: Any) -> Curvature:
    return tq.estimate_curvature(gelu_mlp(), batches, task, **options)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("method", ["gauss_newton", "hutchinson"])
def test_batches_are_shared_out(method: str, processes: int) -> None:
    options = {"estimator": method, "num_probes": 3}
    expected = measured(**options)
    found = together(lambda: measured(**options), processes)
    assert found == [expected] * processes


def test_auto_comes_to_the_same_choice() -> None:
    expected = measured(num_probes=2)
    assert together(lambda: measured(num_probes=2)) == [expected] * 2
    assert "not the Hessian's: GELU bends" in expected.reason


@pytest.mark.parametrize(("method", "num_probes"), [("gauss_newton", 5), ("gauss_newton", "exact"), ("hutchinson", 5)])
def test_draws_are_shared_out_where_there_are_fewer_batches_than_processes(method: str, num_probes: Any) -> None:
    """Three processes for one batch; of the exact sum nothing can be shared out."""
    options = {"batches": FIVE[:1], "estimator": method, "num_probes": num_probes}
    first, *others = together(lambda: measured(**options), 3)
    assert_same(first, measured(**options))
    assert others == [first] * 2


def test_each_process_measures_its_share_alone() -> None:
    def work() -> list[int]:
        seen = []

        def forward(model: Any, x: Any) -> Any:
            if torch.is_grad_enabled():
                seen.append(next((i for i, (own, _) in enumerate(FIVE) if x.shape == own.shape and x.equal(own)), -1))
            return model(x)

        points = tq.discover(gelu_mlp(), FIVE, PLAIN)
        task = ClassificationTask(forward=forward)
        measured(task=task, estimator="hutchinson", num_probes=1, points=points)
        return sorted({index for index in seen if index >= 0})

    assert together(work) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("stop", [None, lambda curvature: False], ids=["", "with a rule when to stop"])
def test_an_error_in_one_process_ends_all_and_loses_nothing(stop: Any, tmp_path: Path) -> None:
    def work() -> Curvature:
        def forward(model: Any, x: Any) -> Any:
            if torch.is_grad_enabled() and x.shape == FIVE[3][0].shape and x.equal(FIVE[3][0]):
                raise ArithmeticError("the fan has stopped")
            return model(x)

        task = ClassificationTask(forward=forward)
        return measured(task=task, estimator="hutchinson", num_probes=1, checkpoint=tmp_path, stop=stop)

    first, second = together(work)
    assert isinstance(first, tq.RunError)
    assert "process 1 failed (ArithmeticError: the fan has stopped)" in str(first)
    assert "run the same command again" in str(first)
    assert isinstance(second, ArithmeticError)
    kept = {int(path.name[6:12]) for path in tmp_path.rglob("batch-*.safetensors")}
    assert kept >= {0, 1, 2} if stop else kept == {0, 1, 2, 4}
    options = {"estimator": "hutchinson", "num_probes": 1}
    assert together(lambda: measured(checkpoint=tmp_path, **options)) == [measured(**options)] * 2


def test_an_error_that_all_can_understand_is_the_same_for_all() -> None:
    """One batch has no second derivative, which the process that has it tells the other."""

    def forward(model: Any, x: Any) -> Any:
        return torch.nn.functional.hardsigmoid(model(x)) if x.equal(FIVE[0][0]) else model(x)

    task = ClassificationTask(forward=forward)
    found = together(lambda: measured(task=task, estimator="hutchinson", num_probes=1))
    assert [type(error) for error in found] == [SecondDerivativeError] * 2
    assert all("cannot differentiate this loss twice" in str(error) for error in found)


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    def work() -> Curvature:
        def batches() -> Iterator[Any]:
            yield from FIVE[:3]
            if distributed.rank() == 1:
                raise OSError("the disk is gone")
            yield from FIVE[3:]

        class Loader:
            def __iter__(self) -> Iterator[Any]:
                return batches()

        points = tq.discover(gelu_mlp(), FIVE, PLAIN)
        return measured(Loader(), estimator="hutchinson", num_probes=1, checkpoint=tmp_path, points=points)

    first, second = together(work)
    assert isinstance(first, tq.RunError)
    assert "waited for another of the 2 processes, which has ended" in str(first)
    assert isinstance(second, OSError)
    assert {int(path.name[6:12]) for path in tmp_path.rglob("batch-*.safetensors")} >= {0, 1, 2}


def test_loaders_that_differ_between_processes_are_refused() -> None:
    def work() -> Curvature:
        return measured(FIVE if distributed.rank() == 0 else FIVE[::-1], estimator="hutchinson", num_probes=1)

    found = together(work)
    assert all(isinstance(error, tq.DataError) and "the loader shuffles" in str(error) for error in found)


def test_loaders_of_different_length_are_refused() -> None:
    """With a rule when to stop too, where processes tell each other of every batch."""

    def work() -> list[Any]:
        found = []
        for stop in (None, lambda curvature: False):
            try:
                measured(FIVE[: 4 - distributed.rank()], estimator="hutchinson", num_probes=1, stop=stop)
            except Exception as error:
                found.append(type(error).__name__)
        return found

    assert together(work) == [["DataError"] * 2] * 2


def test_all_processes_stop_at_the_same_batch() -> None:
    """The rule is asked after a batch of each process, so that one process may stop a batch earlier."""
    options = {"estimator": "hutchinson", "num_probes": 1, "stop": lambda curvature: curvature.samples >= 10}
    assert measured(**options).samples == 11
    assert [curvature.samples for curvature in together(lambda: measured(**options))] == [15, 15]


def test_waiting_for_a_slow_process_has_no_end() -> None:
    """A batch of a large network may take hours; torch's own limit is 30 minutes."""

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(dist, "init_process_group", lambda *args, **options: seen.append(options.get("timeout")))
        patch.setattr(dist, "destroy_process_group", lambda: None)
        with distributed.process_group():
            pass
    assert seen[0] is not None
    assert seen[0].total_seconds() >= 24 * 3600


@pytest.mark.parametrize(
    ("device", "backend"), [("auto", "cpu:gloo,cuda:nccl"), ("cuda", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")]
)
def test_processes_meet_where_they_are_told_to_work(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, chosen = [], []
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: seen.extend(arguments))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distributed.process_group(device):
        assert seen == [backend]
    assert chosen == ([] if device == "cpu" else [1])
    with (
        pytest.raises(tq.RunError, match="device='cuda:0' would put all processes on one GPU"),
        distributed.process_group("cuda:0"),
    ):
        pass
