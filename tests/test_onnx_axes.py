"""Names and open axes of exported files, and language models in ONNX Runtime at other sizes than the example's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracequant as tq
from language_models import WORDS, token_batches, transformer
from models import EnergyTask, UNet
from tracequant import SettingsError
from tracequant.deploy.onnx_axes import output_paths, prepare

ort = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")

pytestmark = pytest.mark.filterwarnings("ignore:.*of kinds that cannot be quantized")


def quantized(model: nn.Module, batch: Any, task: tq.Task) -> nn.Module:
    """`model` with 4 bits in every weight and 8 in every input."""
    points = tq.discover(model, [batch], task)
    weight_bits = {layer.name: 4 for layer in points.layers}
    activation_bits = {point.name: 8 for point in points.activations}
    plan = tq.BitPlan(weight_bits, activation_bits, 0, 0, 1, 0.0, 0.0, tq.WeightGrid(), "", "by hand", "none")
    return tq.quantize(model, [batch], task, plan).eval()


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def inputs(runtime: Any) -> dict[str, list[Any]]:
    return {given.name: given.shape for given in runtime.get_inputs()}


def outputs(runtime: Any) -> dict[str, list[Any]]:
    return {given.name: given.shape for given in runtime.get_outputs()}


def run(runtime: Any, *tensors: Tensor) -> list[Tensor]:
    feeds = {given.name: tensor.numpy() for given, tensor in zip(runtime.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(array) for array in runtime.run(None, feeds)]


# Language models

CAUSAL = {"GPT2LMHeadModel": [3, 11], "LlamaForCausalLM": [3, 11]}


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForSequenceClassification"])
def test_batch_and_length_stay_open_and_the_cache_stays_out(name: str, tmp_path: Path) -> None:
    (batch,) = token_batches(4)
    task = tq.HuggingFaceTask("causal") if name in CAUSAL else tq.HuggingFaceTask("sequence")
    labelled = batch if name in CAUSAL else {**batch, "labels": torch.zeros(4, dtype=torch.long)}
    model = quantized(transformer(name), labelled, task)
    switch = getattr(model.config, "use_cache", None)
    tq.export_onnx(model, tmp_path / "model.onnx", batch)
    assert getattr(model.config, "use_cache", None) is switch
    runtime = session(tmp_path / "model.onnx")
    assert inputs(runtime) == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert outputs(runtime) == {"logits": ["batch", "sequence", WORDS] if name in CAUSAL else ["batch", 3]}
    for size, length in ((4, 8), (3, 11), (1, 5)):
        (other,) = token_batches(size, length=length, seed=1)
        with torch.no_grad():
            want = model(**other).logits
        (got,) = run(runtime, *other.values())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


class Words(nn.Module):
    """Words [N, T] and a table of numbers [N, 3] to two outputs in a dictionary, with an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(WORDS, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, table: Tensor, scale: float = 1.0) -> dict[str, Any]:
        hidden = self.fc(self.embedding(words))
        return {"scores": hidden * scale, "heads": (hidden.mean(1), hidden.mean(1) + table), "none": None}


def words() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, WORDS, (4, 6), generator=generator), torch.randn(4, 3, generator=generator)


def words_task() -> tq.Task:
    return tq.CallableTask(lambda outputs, batch: outputs["scores"].square().mean(), forward=lambda m, b: m(*b))


@pytest.fixture
def words_net() -> nn.Module:
    torch.manual_seed(0)
    return quantized(Words().eval(), words(), words_task())


def test_names_come_from_the_arguments_and_the_keys(words_net: nn.Module, tmp_path: Path) -> None:
    tq.export_onnx(words_net, tmp_path / "model.onnx", words())
    runtime = session(tmp_path / "model.onnx")
    assert inputs(runtime) == {"words": ["batch", "sequence"], "table": ["batch", 3]}
    assert outputs(runtime) == {"scores": ["batch", "sequence", 3], "heads_0": ["batch", 3], "heads_1": ["batch", 3]}


def test_names_of_the_users(words_net: nn.Module, tmp_path: Path) -> None:
    """In the order of the tensors; names that something in the graph had make no clash."""
    tq.export_onnx(words_net, tmp_path / "plain.onnx", words())
    import onnx

    inner = next(
        name
        for node in onnx.load(tmp_path / "plain.onnx").graph.node
        for name in node.output
        if name not in ("scores", "heads_0", "heads_1")
    )
    keywords = dict(zip(("words", "table"), words(), strict=True))
    tq.export_onnx(
        words_net, tmp_path / "model.onnx", keywords, input_names=["ids", inner], output_names=["a", "b", "c"]
    )
    runtime = session(tmp_path / "model.onnx")
    assert list(inputs(runtime)) == ["ids", inner]
    assert list(outputs(runtime)) == ["a", "b", "c"]
    want = words_net(*words())
    for got, expected in zip(run(runtime, *words()), (want["scores"], *want["heads"]), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"input_names": ["ids"]},
            r"input_names is \['ids'\], expected 2 different names, one for each of words, table",
        ),
        ({"output_names": ["a", "a", "b"]}, "output_names is .* expected 3 different names, one for each of"),
        ({"output_names": "abc"}, "output_names is 'abc', expected 3 different names"),
        ({"input_names": ["ids", "embedding.weight.scale"]}, "'embedding.weight.scale' is the name of a weight"),
    ],
)
def test_wrong_names_are_refused(names: dict[str, Any], message: str, words_net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        tq.export_onnx(words_net, tmp_path / "model.onnx", words(), **names)
    assert not (tmp_path / "model.onnx").exists()


def test_sizes_of_images_have_names_of_their_own(tmp_path: Path) -> None:
    """Fixed unless asked for; what the model computes of them is written with these names."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    model = quantized(UNet().eval(), (images,), EnergyTask())
    for sizes, shape in ((None, [16, 16]), (True, ["height", "width"])):
        tq.export_onnx(model, tmp_path / "model.onnx", images, dynamic_sizes=sizes)
        runtime = session(tmp_path / "model.onnx")
        assert inputs(runtime) == {"images": ["batch", 3, *shape]}
        (name, found), *others = outputs(runtime).items()
        assert (name, found[:2], others) == ("output", ["batch", 3], [])
        assert not any(str(size).startswith("s") for size in found)
    wide = torch.randn(3, 3, 24, 16)
    (got,) = run(runtime, wide)
    with torch.no_grad():
        want = model(wide)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_a_length_can_be_fixed(words_net: nn.Module, tmp_path: Path) -> None:
    tq.export_onnx(words_net, tmp_path / "model.onnx", words(), dynamic_batch=False, dynamic_sizes=False)
    assert inputs(session(tmp_path / "model.onnx")) == {"words": [4, 6], "table": [4, 3]}


def test_one_sample_of_one_word_leaves_both_open(words_net: nn.Module, tmp_path: Path) -> None:
    """Tracing would take a size of 1 for a constant."""
    tq.export_onnx(
        words_net, tmp_path / "model.onnx", tuple(x[:1] if x.is_floating_point() else x[:1, :1] for x in words())
    )
    assert inputs(session(tmp_path / "model.onnx"))["words"] == ["batch", "sequence"]


# Without a runtime


def test_which_axes_are_open() -> None:
    example = {
        "ids": torch.zeros(2, 5, dtype=torch.long), "mask": torch.zeros(2, 5, dtype=torch.bool),
        "vector": torch.zeros(2, 5), "signal": torch.zeros(2, 3, 7), "image": torch.zeros(2, 3, 7, 7),
        "volume": torch.zeros(2, 1, 4, 4, 4), "many": torch.zeros(2, 1, 4, 4, 4, 4), "scale": torch.tensor(1.0),
        "flag": True,
    }  # fmt: skip
    sizes: list[dict[int, str]] = [
        {1: "sequence"}, {1: "sequence"}, {}, {2: "length"}, {2: "height", 3: "width"},
        {2: "depth", 3: "height", 4: "width"}, {axis: f"size_{axis}" for axis in range(2, 6)},
    ]  # fmt: skip
    batch = [{0: "batch"}] * 7
    assert prepare(example, True, False).axes == (*batch, {})
    assert prepare(example, True, True).axes == (*(b | s for b, s in zip(batch, sizes, strict=True)), {})
    assert prepare(example, False, None).axes == (*(s if 1 in s else {} for s in sizes), {})
    assert prepare(example, False, False).dynamic_shapes is None
    assert prepare({"ids": example["ids"], "use_cache": True}, True, None).kwargs["use_cache"] is False


def test_names_of_outputs() -> None:
    x = torch.zeros(1)
    assert output_paths(x) == ["output"]
    assert output_paths((x, x)) == ["output_0", "output_1"]
    assert output_paths({"class logits": x, "box": [x, None, (x,)]}) == ["class_logits", "box_0", "box_2_0"]
    assert output_paths({"a_b": x, "a": {"b": x}}) == ["output_0", "output_1"]
