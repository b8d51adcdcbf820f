"""Going through batches: in microbatches, from checkpoints, up to a stopping rule, at a lower precision."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import tiny_task
import tracequant as tq
from models import (
    CLASSES,
    ConvNet,
    attention_net,
    build,
    conv_net,
    gelu_mlp,
    images,
    labelled,
    shared_head_net,
    snapshot,
    tied_net,
    token_batch,
)
from tracequant import ClassificationTask, Curvature, DataError, ModelError, ResourceError, SettingsError, Task
from tracequant.cli import app as cli
from tracequant.curvature.batch_loop import MEMORY_SHARE
from tracequant.curvature.gauss_newton import LEAST_SAMPLES, _GaussNewton
from tracequant.curvature.hutchinson import LEAST_PROBES, _Hutchinson
from tracequant.model import device, memory
from tracequant.model.batches import join
from tracequant.model.digest import digest

TASK = ClassificationTask()
ESTIMATORS = {"gauss_newton": _GaussNewton, "hutchinson": _Hutchinson}
both = pytest.mark.parametrize("method", ESTIMATORS)
Batches = list[tuple[Tensor, Tensor]]


def relu_mlp() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, CLASSES)))


def cut_into(count: int, size: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that so little memory is free that a batch of `size` is cut into `count` microbatches."""
    needed = 1000 * size * ESTIMATORS[method].memory
    monkeypatch.setattr(memory, "saved_bytes", lambda run: 2000)  # of two samples
    monkeypatch.setattr(memory, "available_bytes", lambda: int(needed / MEMORY_SHARE / (count - 0.5)))


def assert_close(found: Curvature, expected: Curvature, tolerance: float = 1e-10) -> None:
    """Traces and errors of all layers and activations."""
    for family in ("weights", "activations"):
        ours, theirs = getattr(found, family), getattr(expected, family)
        assert list(ours) == list(theirs)
        for name, estimate in theirs.items():
            assert estimate.trace != 0
            for field in (
                "trace",
                "average_trace",
                "standard_error",
                "sampling_error",
                "numel",
                "num_probes",
                "samples",
            ):
                assert getattr(ours[name], field) == pytest.approx(getattr(estimate, field), rel=tolerance), (
                    name,
                    field,
                )
    assert found.samples == expected.samples


# Pieces


class AnyTask(Task):
    """A task made of two functions."""

    def __init__(self, outputs: Callable[[nn.Module, Any], Any], loss: Callable[[Any, Any], Tensor]) -> None:
        self._outputs, self._loss = outputs, loss

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        return self._outputs(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return self._loss(outputs, batch)

    def metric(self, outputs: Any, batch: Any) -> float:
        return 0.0

    def batch_size(self, batch: Any) -> int:
        return len(batch[1])


def one_hot(targets: Tensor) -> Tensor:
    return F.one_hot(targets, CLASSES).double()


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1], dtype=torch.float64)
LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS),
    "label smoothing": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS, label_smoothing=0.2),
    "ignore_index": lambda z, y: F.cross_entropy(z, y, ignore_index=2),
    "squared": lambda z, y: F.mse_loss(z, one_hot(y)),
    "both signs": lambda z, y: (torch.sin(2 * z) + 0.1 * z**3).sum(1).mean(),
    "coupled outputs": lambda z, y: ((z[:, :-1] * z[:, 1:]).sum(1) + z.square().sum(1).sqrt()).mean(),
}


@both
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_microbatches_give_what_the_whole_batch_gives(
    method: str, loss: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same draws; losses that weigh samples by the batch they are in count those of the whole batch."""
    model = relu_mlp() if method == "gauss_newton" else gelu_mlp()
    batches, task = labelled(6, sizes=(6, 4)), ClassificationTask(LOSSES[loss])
    whole = tq.estimate_curvature(model, batches, task, num_probes=3, estimator=method)
    cut_into(count, 6, method, monkeypatch)
    before = snapshot(model)
    found = tq.estimate_curvature(model, batches, task, num_probes=3, estimator=method)
    assert snapshot(model) == before
    assert f"batches cut to {6 // count} samples" in found.reason
    assert "cut" not in whole.reason
    assert_close(found, whole)
    assert found.weight_values is not None
    assert whole.weight_values is not None
    if method == "gauss_newton":
        exact = tq.estimate_curvature(model, batches, task, num_probes="exact", estimator=method)
        monkeypatch.undo()
        assert_close(exact, tq.estimate_curvature(model, batches, task, num_probes="exact", estimator=method))


@both
@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (conv_net, images((5,))[0]),
        (shared_head_net, images((5,))[0]),
        (attention_net, labelled(5, 3, sizes=(5,))[0]),
        (tied_net, token_batch()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_microbatches_of_other_networks(
    method: str, make: Callable[[], nn.Module], batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions, a layer called twice, layers that take a pass for each sample, tied weights and tokens."""
    model, size = make(), len(batch[1])
    whole = tq.estimate_curvature(model, [batch], TASK, num_probes=2, estimator=method)
    cut_into(2, size, method, monkeypatch)
    found = tq.estimate_curvature(model, [batch], TASK, num_probes=2, estimator=method)
    assert "batches cut to" in found.reason
    assert_close(found, whole)


@dataclasses.dataclass
class Levels:
    """The same logits at two temperatures, in the nesting that a test asks for."""

    nesting: Callable[[Tensor, Tensor], Any]
    flatten: Callable[[Any], list[Tensor]]

    def task(self) -> Task:
        def loss(outputs: Any, batch: Any) -> Tensor:
            return sum(F.mse_loss(level, one_hot(batch[1])) for level in self.flatten(outputs))

        return AnyTask(lambda model, batch: self.nesting(model(batch[0]), model(2 * batch[0])), loss)


NESTINGS = {
    "dictionary": Levels(lambda a, b: {"a": a, "b": {"c": b}}, lambda o: [o["a"], o["b"]["c"]]),
    "tuple": Levels(lambda a, b: (a, (b,)), lambda o: [o[0], o[1][0]]),
    "list": Levels(lambda a, b: [a, b], lambda o: o),
}


@both
@pytest.mark.parametrize("nesting", NESTINGS)
def test_microbatches_of_nested_outputs(method: str, nesting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, task = relu_mlp(), labelled(6, sizes=(6,)), NESTINGS[nesting].task()
    whole = tq.estimate_curvature(model, batches, task, num_probes=3, estimator=method)
    cut_into(3, 6, method, monkeypatch)
    assert_close(tq.estimate_curvature(model, batches, task, num_probes=3, estimator=method), whole)


@pytest.mark.parametrize("kind", [list, tuple])
def test_microbatches_of_outputs_with_an_entry_for_each_sample(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    task = AnyTask(
        lambda model, batch: kind(model(x[None])[0] for x in batch[0]),
        lambda outputs, batch: F.cross_entropy(torch.stack(list(outputs)), batch[1]),
    )
    model, batches = gelu_mlp(), labelled(6, sizes=(6,))
    options = {"estimator": "hutchinson", "num_probes": 2, "activations": False}
    whole = tq.estimate_curvature(model, batches, task, **options)
    cut_into(3, 6, "hutchinson", monkeypatch)
    assert_close(tq.estimate_curvature(model, batches, task, **options), whole)


def test_joined_outputs_keep_their_type() -> None:
    """Transformer libraries return dictionaries whose entries are attributes too."""

    class Output(dict):
        def __getattr__(self, name: str) -> Any:
            return self[name]

    joined = join([Output(logits=torch.zeros(2, 3)), Output(logits=torch.ones(1, 3))], [2, 1])
    assert type(joined) is Output
    assert joined.logits.tolist() == [[0] * 3, [0] * 3, [1] * 3]


def test_outputs_that_cannot_be_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number made of the whole batch is not to be had from microbatches."""

    def outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"z": model(batch[0]), "size": model[0](batch[0]).square().mean()}

    task = AnyTask(outputs, lambda o, batch: F.cross_entropy(o["z"], batch[1]) + o["size"])
    cut_into(2, 4, "hutchinson", monkeypatch)
    with pytest.raises(
        ResourceError, match=r"a batch of 4 samples does not fit.*an output of shape \[\] does not have"
    ):
        tq.estimate_curvature(gelu_mlp(), labelled(6), task, num_probes=2, estimator="hutchinson")


def test_a_loss_that_couples_samples_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As contrastive losses do: the microbatches' Hessians do not add up to the batch's."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(z)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    cut_into(2, 4, "hutchinson", monkeypatch)
    with pytest.raises(
        ResourceError, match=r"a batch of 4 samples does not fit.*the loss of one sample depends on others"
    ):
        tq.estimate_curvature(gelu_mlp(), labelled(6), ClassificationTask(loss), num_probes=2, estimator="hutchinson")


class Limited(nn.Module):
    """Fails with a given error for more than `limit` samples with a graph, and counts them."""

    def __init__(self, net: nn.Module, limit: int, error: Exception) -> None:
        super().__init__()
        self.net, self.limit, self.error = net, limit, error
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.sizes.append(len(x))
            if len(x) > self.limit:
                raise self.error
        return self.net(x)


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


@both
@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_cut_and_so_are_those_after_it(
    method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    net, batches = relu_mlp() if method == "gauss_newton" else gelu_mlp(), labelled(6, sizes=(8, 8))
    model = Limited(net, 2, error)
    before = snapshot(model)
    found = tq.estimate_curvature(model, batches, TASK, num_probes=2, estimator=method)
    assert snapshot(model) == before
    whole = tq.estimate_curvature(Limited(net, 8, error), batches, TASK, num_probes=2, estimator=method)
    assert "batches cut to 2 samples" in found.reason
    assert_close(found, whole)
    assert sum(size == 8 for size in model.sizes) <= 1  # tried once, or the check of a few samples told


@pytest.mark.parametrize("text", ["could not create a primitive", "could not create a memory object"])
def test_convolutions_have_words_of_their_own_for_a_lack_of_memory(text: str) -> None:
    assert memory.out_of_memory(RuntimeError(text))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model = Limited(relu_mlp(), 2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        tq.estimate_curvature(model, labelled(6), TASK, estimator="hutchinson")


@both
def test_one_sample_that_does_not_fit_is_an_error(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Limited(relu_mlp(), 0, MEMORY_ERRORS[1])
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    with pytest.raises(ResourceError, match=r"does not suffice for one sample of batch 0 .*can't allocate"):
        tq.estimate_curvature(model, labelled(6), TASK, estimator=method)


@both
def test_a_batch_that_cannot_be_divided_says_what_to_do(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a batch that holds its size as a number."""
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    task = AnyTask(lambda model, batch: model(batch["x"]), lambda z, batch: z.square().sum(1).mean())
    task.batch_size = lambda batch: batch["size"]
    model = Limited(relu_mlp(), 2, MEMORY_ERRORS[0])
    batch = {"x": labelled(6)[0][0], "size": 4}
    with pytest.raises(ResourceError, match=r"a batch of 4 samples does not fit into memory.*give AnyTask a select"):
        tq.estimate_curvature(model, [batch], task, estimator=method)


@both
def test_a_model_of_one_batch_size_is_measured(method: str) -> None:
    """An exported model, for instance; nothing needs to be cut here."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x.reshape(8, 6))))

    tq.estimate_curvature(build(Fixed), labelled(6, sizes=(8,)), TASK, num_probes=1, estimator=method)


def test_three_images_of_three_channels() -> None:
    """Of different sizes, as a list with labels."""
    task = ClassificationTask(forward=lambda model, images: torch.cat([model(image[None]) for image in images]))
    batch = ([torch.randn(3, 8 + i, 9, dtype=torch.float64) for i in range(3)], torch.arange(3))
    tq.estimate_curvature(conv_net(), [batch], task, num_probes=1, estimator="hutchinson")


def test_interacting_samples_are_noticed_behind_a_batch_of_one() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(F.relu(h - 0.5 * h.mean(0)))

    with pytest.raises(ModelError, match="samples of a batch interact"):
        tq.estimate_curvature(build(Centred), labelled(6, sizes=(1, 3)), TASK, estimator="gauss_newton")


LIMITED_PROCESS = """
import resource, sys
import torch
from torch import nn
import tracequant as tq
from tracequant.model import memory

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
batch = torch.randn(128, 1024, 8), torch.randint(0, 5, (128,))
task = tq.ClassificationTask(forward=lambda model, x: model(x).mean(1))

def measure():
    return tq.estimate_curvature(model, [batch], task, estimator="gauss_newton", num_probes=1, seed=1, points=points)

points = tq.discover(model, [batch], task)
whole = measure()
assert "cut" not in whole.reason, whole.reason
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "VmSize" in line)
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
failed = []
noticed = memory.out_of_memory
memory.out_of_memory = lambda error: noticed(error) and (failed.append(str(error)) or True)
foreseen = measure()
assert "cut" in foreseen.reason, foreseen.reason
failed.clear()
memory.available_bytes = lambda: None
suffered = measure()
assert failed and "cut" in suffered.reason, suffered.reason
for found in (foreseen, suffered):
    for name, estimate in whole.weights.items():
        assert abs(found.weights[name].trace / estimate.trace - 1) < 1e-5, name
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_a_process_short_of_memory_gets_through() -> None:
    """With 100 MB to spare, where the whole batch takes more: the system tells its limit, then only errors do."""
    done = subprocess.run([sys.executable, "-c", LIMITED_PROCESS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


# Checkpoints


class Watched(nn.Module):
    """Counts the full batches that are measured, by a value that tells them apart."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) == 5:
            self.seen.append(float(x[0, 0]))
        return self.net(x)


FIVE = labelled(6, sizes=(5,) * 4)
MARKS = [float(x[0, 0]) for x, _ in FIVE]


class Failing:
    """A loader that stops with an error after some batches."""

    def __init__(self, batches: Batches, after: int) -> None:
        self.batches, self.after = batches, after

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[: self.after]
        raise KeyboardInterrupt

    def __len__(self) -> int:
        return len(self.batches)


def measure(model: nn.Module, batches: Any, folder: Path | None, **options: Any) -> Curvature:
    points = tq.discover(model, FIVE, TASK)
    options = {"estimator": "hutchinson", "num_probes": 2, "task": TASK} | options
    return tq.estimate_curvature(model, batches, points=points, checkpoint=folder, **options)


@both
@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("cause", ["loader", "task"])
def test_an_interrupted_analysis_goes_on_to_the_same_result(
    method: str, after: int, cause: str, tmp_path: Path
) -> None:
    net = gelu_mlp()
    undisturbed = measure(Watched(net), FIVE, None, estimator=method)
    model = Watched(net)
    if cause == "loader":
        with pytest.raises(KeyboardInterrupt):
            measure(model, Failing(FIVE, after), tmp_path, estimator=method)
    else:

        def forward(model: nn.Module, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and len(x) == 5 and float(x[0, 0]) == MARKS[after]:
                raise ArithmeticError
            return model(x)

        with pytest.raises(ArithmeticError):
            measure(model, FIVE, tmp_path, estimator=method, task=ClassificationTask(forward=forward))
    assert set(model.seen) == set(MARKS[:after])
    model.seen.clear()
    assert measure(model, FIVE, tmp_path, estimator=method) == undisturbed
    assert set(model.seen) == set(MARKS[after:])
    model.seen.clear()
    assert measure(model, FIVE, tmp_path, estimator=method) == undisturbed
    assert not model.seen


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "number of probes": {"num_probes": 3},
    "families": {"activations": False},
    "precision": {"precision": "bfloat16"},
    "estimator": {"estimator": "gauss_newton"},
    "scope of probes": {"probe_scope": "shared"},
    "distribution": {"distribution": "gaussian"},
    "target": {"num_probes": 9, "target_standard_error": 100.0},
    "loss": {"task": ClassificationTask(lambda z, y: 2 * F.cross_entropy(z, y))},
}


@pytest.mark.parametrize("other", [*OTHERS, "model", "layers"])
def test_parts_made_under_other_settings_are_left_alone(other: str, tmp_path: Path) -> None:
    net, options = gelu_mlp(), OTHERS.get(other, {})
    first = measure(Watched(net), FIVE, tmp_path)
    changed = copy.deepcopy(net)
    if other == "model":
        with torch.no_grad():
            changed[2].bias[0] += 1
    model = Watched(changed)
    points = tq.discover(model, FIVE, TASK, exclude=["net.0"]) if other == "layers" else tq.discover(model, FIVE, TASK)
    options = {"estimator": "hutchinson", "num_probes": 2, "task": TASK} | options
    expected = tq.estimate_curvature(model, FIVE, points=points, **options)
    model.seen.clear()
    found = tq.estimate_curvature(model, FIVE, points=points, checkpoint=tmp_path, **options)
    assert found == expected
    assert other == "precision" or found != first  # float64 stays float64 under autocast
    assert set(model.seen) == set(MARKS)
    assert measure(Watched(net), FIVE, tmp_path) == first  # the first parts are still good


@both
@pytest.mark.parametrize("damage", [b"", b"no safetensors", None], ids=["empty", "garbage", "cut short"])
def test_a_damaged_part_is_measured_anew(method: str, damage: bytes | None, tmp_path: Path) -> None:
    model = Watched(gelu_mlp())
    first = measure(model, FIVE, tmp_path, estimator=method)
    parts = sorted(tmp_path.rglob("*.safetensors"))
    assert len(parts) == len(FIVE)
    whole = parts[2].read_bytes()
    parts[2].write_bytes(whole[: len(whole) - 8] if damage is None else damage)
    model.seen.clear()
    assert measure(model, FIVE, tmp_path, estimator=method) == first
    assert set(model.seen) == {MARKS[2]}
    model.seen.clear()
    assert measure(model, FIVE, tmp_path, estimator=method) == first
    assert not model.seen  # the damaged file has been replaced


def test_a_loader_that_shuffles_is_refused(tmp_path: Path) -> None:
    model = Watched(gelu_mlp())
    with pytest.raises(KeyboardInterrupt):
        measure(model, Failing(FIVE, 2), tmp_path)
    with pytest.raises(DataError, match=r"batch 1 is not the one .*shuffle=False, or delete that folder"):
        measure(model, [FIVE[i] for i in (0, 3, 2, 1)], tmp_path)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("difference", ["label", "inside", "class"])
def test_changed_data_are_noticed(difference: str, at: int, tmp_path: Path) -> None:
    """One label; pixels inside a black frame; tensors in a mapping that pytree does not know.

    Another first batch has another loss, and with it a folder of its own, as if the loss had changed.
    """
    if difference == "class":
        batches = [(UserDict(input=x), y) for x, y in labelled(6, sizes=(4, 4))]
        changed = [(UserDict(input=x["input"] + 1), y) for x, y in batches]
        task = ClassificationTask(forward=lambda model, inputs: model(inputs["input"]))
        model = gelu_mlp()
    elif difference == "label":
        model, task, batches = gelu_mlp(), TASK, labelled(6, sizes=(4, 4))
        changed = [(x, y.clone()) for x, y in batches]
        for _, y in changed:
            y[3] = (y[3] + 1) % CLASSES
    else:
        model, task = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, CLASSES))), TASK
        frame = torch.zeros(64, 1, 32, 32, dtype=torch.float64)
        batches, changed = [], []
        for made, value in ((batches, 1.0), (changed, 2.0)):
            x = frame.clone()
            x[:, :, 2:30, 2:30] = value
            made += [(x, torch.arange(64) % CLASSES)] * 2
    changed[1 - at] = batches[1 - at]
    options = {"estimator": "hutchinson", "num_probes": 1}
    first = tq.estimate_curvature(model, batches, task, checkpoint=tmp_path, **options)
    if at == 0:
        found = tq.estimate_curvature(model, changed, task, checkpoint=tmp_path, **options)
        assert found == tq.estimate_curvature(model, changed, task, **options) != first
        assert len(list(tmp_path.iterdir())) == 2
    else:
        with pytest.raises(DataError, match="batch 1 is not the one"):
            tq.estimate_curvature(model, changed, task, checkpoint=tmp_path, **options)
    assert tq.estimate_curvature(model, batches, task, checkpoint=tmp_path, **options) == first


def test_killed_and_run_again_an_analysis_gives_the_same_file(tmp_path: Path) -> None:
    """kill -9 in the middle of `tracequant analyze`."""
    file = tmp_path / "task.py"
    file.write_text(
        "import os, time\nimport tiny_task\nimport tracequant as tq\n\n"
        "class Slow(tq.ClassificationTask):\n"
        "    def loss(self, outputs, batch):\n"
        "        time.sleep(float(os.environ.get('SLOW', '0')))\n"
        "        return super().loss(outputs, batch)\n\n"
        "def build(samples=None, seed=0):\n"
        "    setup = tiny_task.build()\n"
        "    x, y = tiny_task.images(96, 5)\n"
        "    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 96, 8)]\n"
        "    return tq.TaskSetup(setup.model, Slow(), batches, setup.train, setup.evaluation)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(tiny_task.__file__).parent), "OMP_NUM_THREADS": "1"}
    killed, straight = tmp_path / "killed", tmp_path / "straight"

    def arguments(out: Path) -> list[str]:
        return ["analyze", "--task", f"{file}:build", "--out", str(out), "--num-probes", "2", "--no-eigenvalues", "-q"]

    program = [sys.executable, "-m", "tracequant", *arguments(killed)]
    process = subprocess.Popen(program, env=environment | {"SLOW": "0.1"})
    try:
        until = time.monotonic() + 60
        while len(list(killed.glob("batches/*/batch-*.safetensors"))) < 3 and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 3 <= len(list(killed.glob("batches/*/batch-*.safetensors"))) < 12
    assert not (killed / "curvature.json").exists()
    for path in (killed, straight):
        assert cli.run_guarded(lambda path=path: cli.app(arguments(path))) == 0
    for name in ("curvature.json", "sensitivity.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()


# Stopping


def test_gauss_newton_stops_once_the_samples_suffice() -> None:
    """Copies of one batch have a spread that shrinks as the samples grow, which tells where it must stop."""
    model, batches = relu_mlp(), labelled(6, sizes=(8,) * 16)
    options = {"estimator": "gauss_newton", "num_probes": "exact"}
    found = tq.estimate_curvature(model, batches, TASK, target_sampling_error=0.3, **options)
    assert LEAST_SAMPLES <= found.samples < 128
    worst = [max(e.sampling_error / e.trace for f in (c.weights, c.activations) for e in f.values()) for c in [found]]
    assert worst[0] <= 0.3
    assert found == tq.estimate_curvature(model, batches[: found.samples // 8], TASK, **options)
    if found.samples > LEAST_SAMPLES:
        shorter = tq.estimate_curvature(model, batches[: found.samples // 8 - 1], TASK, **options)
        assert max(e.sampling_error / e.trace for f in (shorter.weights, shorter.activations) for e in f.values()) > 0.3
    least = tq.estimate_curvature(model, batches, TASK, target_sampling_error=1e6, **options)
    assert least.samples == LEAST_SAMPLES


def test_gauss_newton_warns_of_what_it_did_not_reach() -> None:
    with pytest.warns(UserWarning, match=r"relative error of \d traces is above the 0.001 .*give more samples"):
        found = tq.estimate_curvature(
            relu_mlp(), labelled(6, sizes=(20, 20)), TASK, estimator="gauss_newton", target_sampling_error=1e-3
        )
    assert found.samples == 40


def test_hutchinson_draws_as_often_as_a_layer_needs() -> None:
    """The target is met, by fewer draws where a layer is easier; the first are those of a run of a fixed number."""
    model, batches, target = gelu_mlp(), labelled(6, sizes=(6,)), 0.1
    found = tq.estimate_curvature(model, batches, TASK, estimator="hutchinson", target_standard_error=target)
    estimates = [*found.weights.values(), *found.activations.values()]
    assert all(estimate.standard_error <= target * abs(estimate.trace) for estimate in estimates)
    counts = [estimate.num_probes for estimate in estimates]
    assert min(counts) == LEAST_PROBES
    assert 100 < max(counts) < 1000
    looser = tq.estimate_curvature(model, batches, TASK, estimator="hutchinson", target_standard_error=2 * target)
    assert max(counts) > 2 * max(e.num_probes for e in [*looser.weights.values(), *looser.activations.values()])
    fixed = tq.estimate_curvature(model, batches, TASK, num_probes=LEAST_PROBES, estimator="hutchinson")
    free = tq.estimate_curvature(model, batches, TASK, estimator="hutchinson", target_standard_error=1e6)
    assert free.weights == fixed.weights


def test_batches_of_different_traces_may_miss_the_target_and_say_so(tmp_path: Path) -> None:
    """Each batch meets its own, without coming near the most draws: to advise nothing but more would be wrong."""
    model = build(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)))
    batches = labelled(6, sizes=(6,) * 4)
    batches = [(x * factor, y) for (x, y), factor in zip(batches, (0.3, 0.3, 0.3, 3), strict=True)]
    options = {"estimator": "hutchinson", "activations": False}
    with pytest.warns(UserWarning, match=r"above the 0.06 .* or ask for a smaller error where batches differ much"):
        found = tq.estimate_curvature(model, batches, TASK, target_standard_error=0.06, checkpoint=tmp_path, **options)
    assert max(estimate.num_probes for estimate in found.weights.values()) < 1000
    assert max(e.standard_error / e.trace for e in found.weights.values()) > 0.06
    parts = [load_file(path) for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert len(parts) == len(batches)
    for values in (value for part in parts for value in part.values()):
        assert LEAST_PROBES <= len(values) < 1000
        assert float(values.std() / len(values) ** 0.5) <= 0.06 * len(batches) ** 0.5 * abs(float(values.mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        closer = tq.estimate_curvature(model, batches, TASK, target_standard_error=0.03, **options)
    assert max(e.standard_error / e.trace for e in closer.weights.values()) <= 0.06


def test_a_diagonal_hessian_takes_the_least_draws() -> None:
    task = AnyTask(lambda model, batch: model(batch[0]), lambda z, batch: z.pow(4).sum(1).mean())
    model = build(lambda: nn.Sequential(nn.Linear(1, 1, bias=False)))
    found = tq.estimate_curvature(model, labelled(1), task, estimator="hutchinson", target_standard_error=1e-6)
    assert found.weights["0"].num_probes == LEAST_PROBES
    assert found.weights["0"].standard_error == pytest.approx(0, abs=1e-9)


def test_hutchinson_warns_of_what_it_did_not_reach() -> None:
    with pytest.warns(UserWarning, match=r"above the 0.001 .*allow more probes"):
        found = tq.estimate_curvature(
            gelu_mlp(), labelled(6), TASK, num_probes=10, estimator="hutchinson", target_standard_error=1e-3
        )
    assert {estimate.num_probes for estimate in found.weights.values()} == {10}


def test_cut_batches_stop_drawing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole batches here take 8 draws."""
    cut_into(2, 6, "hutchinson", monkeypatch)
    found = tq.estimate_curvature(
        gelu_mlp(), labelled(6, sizes=(6,)), TASK, estimator="hutchinson", target_standard_error=1e6
    )
    assert "batches cut to 3 samples" in found.reason
    assert {e.num_probes for e in [*found.weights.values(), *found.activations.values()]} == {LEAST_PROBES}


def test_all_microbatches_of_a_batch_have_the_draws_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer as many as it took there, and the whole batch's values by those draws."""
    model, batches = gelu_mlp(), labelled(6, sizes=(6,))
    options = {"estimator": "hutchinson"}
    with monkeypatch.context() as patch:
        cut_into(3, 6, "hutchinson", patch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tq.estimate_curvature(model, batches, TASK, target_standard_error=0.2, **options)
        assert "batches cut to 2 samples" in found.reason
    counts = {e.num_probes for e in found.weights.values()}
    assert len(counts) > 1
    for count in counts:
        whole = tq.estimate_curvature(model, batches, TASK, num_probes=count, **options)
        for name, estimate in found.weights.items():
            if estimate.num_probes == count:
                assert estimate.trace == pytest.approx(whole.weights[name].trace, rel=1e-10)


def test_certain_layers_cost_nothing_more() -> None:
    """Not the drawing of vectors that nobody asks for either."""
    model, drawn = gelu_mlp(), []
    from tracequant.curvature import hutchinson as module

    with pytest.MonkeyPatch.context() as patch:
        own = module.draw_probe
        patch.setattr(module, "draw_probe", lambda *args: (drawn.append(1), own(*args))[1])
        found = tq.estimate_curvature(model, labelled(6), TASK, estimator="hutchinson", target_standard_error=1e6)
    assert len(drawn) == LEAST_PROBES * (len(found.weights) + len(found.activations))


@both
def test_the_rule_sees_more_samples_each_time(method: str, tmp_path: Path) -> None:
    model, batches, seen = relu_mlp(), labelled(6, sizes=(5, 3, 4, 6)), []

    def rule(curvature: Curvature) -> bool:
        seen.append(curvature)
        return curvature.samples >= 12

    found = tq.estimate_curvature(model, batches, TASK, num_probes=2, estimator=method, stop=rule, checkpoint=tmp_path)
    assert [curvature.samples for curvature in seen] == [5, 8, 12]
    assert found == seen[-1] == tq.estimate_curvature(model, batches[:3], TASK, num_probes=2, estimator=method)
    again = tq.estimate_curvature(model, batches, TASK, num_probes=2, estimator=method, stop=rule, checkpoint=tmp_path)
    assert again == found
    never = tq.estimate_curvature(model, batches, TASK, num_probes=2, estimator=method, stop=lambda c: False)
    assert never == tq.estimate_curvature(model, batches, TASK, num_probes=2, estimator=method)


def test_either_rule_may_stop_gauss_newton() -> None:
    batches = labelled(6, sizes=(16,) * 6)
    with pytest.warns(UserWarning, match="relative error"):
        found = tq.estimate_curvature(
            relu_mlp(),
            batches,
            TASK,
            estimator="gauss_newton",
            target_sampling_error=1e-3,
            stop=lambda c: c.samples >= 64,
        )
    assert found.samples == 64
    found = tq.estimate_curvature(
        relu_mlp(), batches, TASK, estimator="gauss_newton", target_sampling_error=1e6, stop=lambda c: c.samples >= 64
    )
    assert found.samples == LEAST_SAMPLES


# Precision


@both
def test_bfloat16_is_near_float32_and_its_loss_is_computed_in_float32(method: str) -> None:
    dtypes = []

    def loss(z: Tensor, y: Tensor) -> Tensor:
        dtypes.append(z.dtype)
        return F.cross_entropy(z, y)

    model = build(ConvNet, dtype=torch.float32)
    batches = [(x.float(), y) for x, y in images((16, 16))]
    inner = []
    model.conv2.register_forward_hook(lambda module, args, output: inner.append(output.dtype))
    task = ClassificationTask(loss)
    exact = tq.estimate_curvature(model, batches, task, num_probes=8, estimator=method)
    inner.clear()
    rough = tq.estimate_curvature(model, batches, task, num_probes=8, estimator=method, precision="bfloat16")
    assert torch.bfloat16 in inner
    assert set(dtypes) == {torch.float32}
    for family in ("weights", "activations"):
        for name, estimate in getattr(exact, family).items():
            other = getattr(rough, family)[name]
            assert other.trace != estimate.trace
            assert other.trace == pytest.approx(estimate.trace, rel=0.1, abs=4 * estimate.standard_error)
            if method == "gauss_newton":
                assert other.trace == pytest.approx(estimate.trace, rel=0.1)


@pytest.mark.parametrize("size", [8, 4])
def test_bfloat16_does_not_take_rounding_for_weights_used_elsewhere(size: int) -> None:
    model = build(ConvNet, dtype=torch.float32)
    batches = [(x.float(), y) for x, y in images((size,))]
    found = tq.estimate_curvature(model, batches, TASK, estimator="gauss_newton", precision="bfloat16")
    assert "a backward pass for each sample" not in found.reason


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_float32_is_float32(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself torch computes convolutions on a GPU in TF32, and recurrent networks without a backward pass."""
    switches = device._tf32_switches()

    def now() -> list[Any]:
        return [getattr(backend, name) for backend, name, _, _ in switches]

    monkeypatch.setattr(device, "model_device", lambda model: torch.device("cuda"))
    before = now()
    with device.arithmetic(precision, nn.Linear(1, 1)):
        assert now() == [on if precision == "tf32" else off for _, _, on, off in switches]
        assert torch.backends.cudnn.enabled
    assert now() == before
    with suppress(ZeroDivisionError), device.arithmetic(precision, nn.Sequential(nn.LSTM(2, 2))):
        assert not torch.backends.cudnn.enabled
        raise ZeroDivisionError
    assert now() == before
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)  # fmt: skip
def test_memory_errors_in_other_words(text: str) -> None:
    assert memory.out_of_memory(RuntimeError(text))
    assert not memory.out_of_memory(ValueError(text))


def test_digests_do_not_depend_on_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 30, (1_000_000,), generator=generator)
    batch = torch.randn(1_000_000, generator=generator) * 10.0**exponents  # a sum of floats would depend on its order
    found = digest(batch)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert digest(batch) == found
    finally:
        torch.set_num_threads(threads)
    assert digest(torch.cat([batch[:-1], batch[-1:] * 2])) != found
    for dtype in (torch.float64, torch.float16, torch.bool, torch.int64):
        assert digest(batch[:9].to(dtype)) != digest((batch[:9] > 0).to(dtype))


@both
def test_batches_made_without_gradients_in_mind(method: str) -> None:
    with torch.inference_mode():
        made = [tuple(part.clone() for part in batch) for batch in labelled(6)]
    assert made[0][0].is_inference()
    found = tq.estimate_curvature(gelu_mlp(), made, TASK, estimator=method)
    assert found.weights == tq.estimate_curvature(gelu_mlp(), labelled(6), TASK, estimator=method).weights


@both
def test_tf32_needs_a_gpu(method: str) -> None:
    with pytest.raises(ResourceError, match="precision='tf32' is for CUDA devices"):
        tq.estimate_curvature(gelu_mlp(), labelled(6), TASK, estimator=method, precision="tf32")


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_refused(method: str, dtype: torch.dtype) -> None:
    model = gelu_mlp()
    model[2].to(dtype)
    task = ClassificationTask(forward=lambda model, x: model[2](model[1](model[0](x)).to(dtype)).double())
    with pytest.raises(ModelError, match=rf"the model has {dtype} parameters.*model\.float\(\)"):
        tq.estimate_curvature(model, labelled(6), task, estimator=method)


@both
def test_an_unknown_precision_is_refused(method: str) -> None:
    with pytest.raises(SettingsError, match="precision must be 'float32', 'tf32' or 'bfloat16', got 'float16'"):
        tq.estimate_curvature(gelu_mlp(), labelled(6), TASK, num_probes=1, estimator=method, precision="float16")
