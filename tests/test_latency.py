"""Latency tables measured in ONNX Runtime: complete, sensible, resumable, and read by the allocation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracequant as tq
from models import AttentionNet, EnergyTask, SharedHeadNet, TiedNet, build, images, labelled
from tracequant.core.errors import ArtifactError, DataError, ModelError
from tracequant.measure.latency import LatencyMeasurements

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
latency = pytest.importorskip("tracequant.measure.latency")

TASK = EnergyTask()


class Chain(nn.Module):
    """A stem, two convolutions that are alike, a much larger one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.large = nn.Conv2d(8, 512, 5, padding=2)
        self.fc = nn.Linear(512, 5)
        self.idle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.stem(x).relu()).relu()).relu()
        return torch.as_tensor(self.fc(self.large(x).relu().mean((2, 3))))


BATCHES = [(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)]


def chain() -> tuple[nn.Module, tq.QuantizationPoints]:
    model = Chain().eval()
    return model, tq.discover(model, BATCHES, TASK)


@pytest.fixture(scope="module")
def table() -> tq.Latency:
    """Measurements of the chain at two widths of weights and two of activations."""
    model, points = chain()
    return tq.measure_latency(model, BATCHES, TASK, points, weight_bits=(2, 8), activation_bits=(4, 8), repeats=15)


def test_every_layer_has_every_choice(table: tq.Latency, tmp_path: Path) -> None:
    choices = {name: {(w, a) for w, row in rows.items() for a in row} for name, rows in table.items()}
    inner = {(2, 4), (2, 8), (8, 4), (8, 8), (32, 32)}
    assert choices == {
        "stem": {(2, 8), (8, 8), (32, 32)}, "one": inner, "two": inner, "large": inner, "fc": inner,
        "idle": {(2, 32), (8, 32), (32, 32)},
    }  # fmt: skip
    times = {name: [ms for row in rows.values() for ms in row.values()] for name, rows in table.items()}
    assert set(times.pop("idle")) == {0.0}  # never called
    assert all(ms > 0 for row in times.values() for ms in row)
    # Layers that are alike are measured once, and so are widths of weights, which are unpacked to one program.
    assert table["one"] == table["two"]
    assert table["large"][2] == table["large"][8]
    assert table["large"][8][8] > 2 * table["one"][8][8]

    tq.write_latency(table, tmp_path / "table.csv")
    read = tq.read_latency(tmp_path / "table.csv")
    assert read == {n: {w: {a: pytest.approx(ms, rel=1e-5) for a, ms in row.items()} for w, row in rows.items()}
                    for n, rows in table.items()}  # fmt: skip


def programs(module: nn.Module, given: Tensor, input_bits: int, folder: Path) -> set[str]:
    """What ONNX Runtime makes of a layer at several weight bits: operators, and types and shapes of constants."""
    found = set()
    for weight_bits in (2, 3, 4, 8):
        latency._write_layer(module, given, (weight_bits, input_bits), folder / "layer.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        onnxruntime.InferenceSession(folder / "layer.onnx", options, providers=["CPUExecutionProvider"])
        graph = onnx.load(folder / "optimised.onnx").graph
        constants = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
        found.add(str(sorted((node.op_type, str([constants.get(name) for name in node.input])) for node in graph.node)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "input_bits"), [("convolution", 8), ("convolution", 4), ("convolution", 32), ("linear", 8), ("tokens", 8)]
)
def test_all_widths_of_weights_are_one_program(kind: str, input_bits: int, tmp_path: Path) -> None:
    """That is why they are measured once."""
    module, given = {
        "convolution": (nn.Conv2d(4, 8, 3), torch.zeros(1, 4, 9, 9)),
        "linear": (nn.Linear(16, 8), torch.zeros(1, 16)),
        "tokens": (nn.Linear(16, 8), torch.zeros(1, 5, 16)),
    }[kind]
    (program,) = programs(module, given, input_bits, tmp_path)
    if kind == "convolution" and input_bits == 8:
        assert "QLinearConv" in program
        assert "QuantizeLinear" not in program


def test_integers_are_faster_than_float(table: tq.Latency) -> None:
    """The large convolution is 3.3 M multiply-accumulates times 8: enough to see the kernels."""
    assert table["large"][8][8] < table["large"][32][32]


def test_activations_may_stay_in_float() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    points = tq.discover(model, BATCHES, TASK)
    table = tq.measure_latency(model, BATCHES, TASK, points, weight_bits=(2, 8), activation_bits=(), repeats=3)
    assert set(table) == {"0", "2"}
    for rows in table.values():
        assert {bits: list(row) for bits, row in rows.items()} == {2: [32], 8: [32], 32: [32]}


def test_calls_add_up() -> None:
    """A head on two levels counts both; so do the two places of a tied weight."""
    model = build(SharedHeadNet, dtype=torch.float32).eval()
    batches = [(images()[0][0].float(),)]
    points = tq.discover(model, batches, TASK)
    calls = latency._layer_calls(model, batches, TASK, points)
    assert [tuple(example.shape) for _, _, example in calls["head"]] == [(1, 4, 8, 8), (1, 4, 4, 4)]

    tied, tokens = build(TiedNet, dtype=torch.float32).eval(), [(torch.randint(0, 7, (3, 5)),)]
    points = tq.discover(tied, tokens, TASK)
    table = tq.measure_latency(tied, tokens, TASK, points, weight_bits=(4,), activation_bits=(8,), repeats=2)
    calls = latency._layer_calls(tied, tokens, TASK, points)
    assert [type(module).__name__ for _, module, _ in calls["embedding"]] == ["Embedding", "Linear"]
    assert set(table) == {"embedding", "hidden"}


def test_projections_of_an_attention_are_linear_layers() -> None:
    model = build(AttentionNet, dtype=torch.float32).eval()
    batches = [(labelled(6, 3)[0][0].float(),)]
    points = tq.discover(model, batches, TASK)
    calls = latency._layer_calls(model, batches, TASK, points)
    shapes = {
        name: [(type(m).__name__, m.weight.shape, tuple(x.shape)) for _, m, x in own] for name, own in calls.items()
    }
    assert shapes["attention.in_proj_weight"] == [("Linear", (12, 4), (1, 6, 4))]
    ((_, weight, given),) = shapes["attention.out_proj"]
    assert (weight, given) == ((4, 4), (1, 6, 4))
    table = tq.measure_latency(model, batches, TASK, points, weight_bits=(4,), activation_bits=(8,), repeats=2)
    assert list(table["attention.out_proj"][4]) == [32]  # the inside of the attention is in float


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, points = chain()
    path, done = tmp_path / "latency.json", []

    def measure(runtime: object, module: object, example: object, choices: list[tuple[int, int]], *how: int) -> object:
        done.append(module)
        return {choice: len(done) + sum(choice) / 100 for choice in choices}

    def until_third(*arguments: Any) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(latency, "_measure", until_third)
    with pytest.raises(KeyboardInterrupt):
        tq.measure_latency(
            model, BATCHES, TASK, points, weight_bits=(8,), activation_bits=(8,), repeats=2, checkpoint=path
        )
    kept = LatencyMeasurements.load(path).milliseconds
    assert len(kept) == 2

    done.clear()
    monkeypatch.setattr(latency, "_measure", measure)
    table = tq.measure_latency(
        model, BATCHES, TASK, points, weight_bits=(8,), activation_bits=(8,), repeats=2, checkpoint=path
    )
    assert len(done) == 2
    assert table["stem"][8][8] in {ms for row in kept.values() for ms in row.values()}
    # More bits later: only they are measured.
    done.clear()
    tq.measure_latency(model, BATCHES, TASK, points, weight_bits=(8,), activation_bits=(8,), repeats=2, checkpoint=path)
    assert done == []


def test_a_checkpoint_of_another_machine_is_refused(tmp_path: Path) -> None:
    model, points = chain()
    LatencyMeasurements("a toaster").save(tmp_path / "latency.json")
    with pytest.raises(ArtifactError, match="measured on a toaster"):
        tq.measure_latency(model, BATCHES, TASK, points, checkpoint=tmp_path / "latency.json")


def test_senseless_requests_are_refused() -> None:
    model, points = chain()
    with pytest.raises(ModelError, match="from 1 to 8"):
        tq.measure_latency(model, BATCHES, TASK, points, weight_bits=(9,))
    with pytest.raises(DataError, match="repeats"):
        tq.measure_latency(model, BATCHES, TASK, points, repeats=0)
