"""What users bring, in at most ten lines each, as docs/tasks.md prints them: every flow runs as it is written there.

`pytest -s tests/test_user_flows.py` prints the seconds of each stage.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracequant as tq
from language_models import token_batches, transformer
from models import CLASSES, LSTMClassifier, UNet

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
# The stages that are timed, by the names that the flows call them by.
STAGES = (
    "estimate_curvature", "measure_sensitivity", "solve", "quantize", "finetune", "pack", "load", "evaluate",
    "export_onnx",
)  # fmt: skip


class Timed:
    """`tracequant` with the seconds of every stage noted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(tq, name)
        return self._timed(name, value) if name in STAGES else value

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return call


def flows() -> Iterator[tuple[str, str]]:
    """Title and code of each flow on the page."""
    text = PAGE.read_text().split("## Flows\n")[1].split("\n## ")[0]
    yield from re.findall(r"\*\*(.+?)\*\*.*?```python\n(.*?)```", text, re.DOTALL)


FLOWS = dict(flows())


def images(*shape: int, sizes: tuple[int, ...] = (6, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *shape, generator=generator) for size in sizes]


def trained(model: nn.Module, loss: Callable[[Any], Tensor], batches: list[Any]) -> nn.Module:
    """The model after some steps of training, in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches * 15:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    return model.eval()


def bert() -> tuple[nn.Module, Any, Any]:
    batches = token_batches(6, 6, labels="sequence")
    model = transformer("BertForSequenceClassification")
    trained(model, lambda batch: model(**batch).loss, batches)
    return model, batches, {key: value for key, value in batches[0].items() if key != "labels"}


def gpt2() -> tuple[nn.Module, Any, Any]:
    batches = token_batches(6, 6)
    model = transformer("GPT2LMHeadModel")
    return trained(model, lambda batch: model(**batch, labels=batch["input_ids"]).loss, batches), batches, batches[0]


def vit() -> tuple[nn.Module, Any, Any]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=CLASSES
    )
    batches = [(x, torch.arange(len(x)) % CLASSES) for x in images(3, 16, 16)]
    return trained(model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), batches), batches, batches[0][0]


def unet() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    batches = [(x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()) for x in images(3, 16, 16)]
    model = UNet()
    return trained(model, lambda batch: dice_loss(model(batch[0]), batch[1]), batches), batches, batches[0][0]


def lstm() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    batches = [(batch["input_ids"], batch["input_ids"][:, -1] % CLASSES) for batch in token_batches(6, 6)]
    model = LSTMClassifier()
    return trained(model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), batches), batches, batches[0][0]


MODELS = {"BERT": bert, "GPT-2": gpt2, "ViT": vit, "UNet": unet, "LSTM": lstm}


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the Dice coefficient of each class and image, averaged."""
    p, y = logits.softmax(1), F.one_hot(targets, logits.shape[1]).movedim(-1, 1)
    return 1 - ((2 * (p * y).sum((2, 3)) + 1) / ((p + y).sum((2, 3)) + 1)).mean()


def mean_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """Intersection over union of each class that an image has, in percent, averaged."""
    p, y = (F.one_hot(x, logits.shape[1]).bool() for x in (logits.argmax(1), targets))
    intersection, union = (p & y).sum((1, 2)), (p | y).sum((1, 2))
    return 100 * (intersection / union)[union > 0].mean()


def test_every_model_has_a_flow_of_at_most_ten_lines() -> None:
    assert list(FLOWS) == list(MODELS)
    for title, code in FLOWS.items():
        assert sum(bool(line.strip()) for line in code.splitlines()) <= 10, title


@pytest.mark.filterwarnings(
    "ignore:.*not significantly above zero",  # a dozen samples leave some traces to chance
    "ignore:.*RNN module weights are not part",
)
@pytest.mark.parametrize("title", list(MODELS))
def test_flow(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    model, batches, example = MODELS[title]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timed = Timed()
    names: dict[str, Any] = {
        "tq": timed, "model": model, "calibration": batches, "train_loader": batches, "test_loader": batches,
        "example": example, "dice_loss": dice_loss, "mean_iou": mean_iou,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code = FLOWS[title].replace("steps=1000", "steps=3")
    assert code != FLOWS[title]

    exec(compile(code, title, "exec"), names)

    print(f"\n{title}: " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in timed.seconds.items()))
    assert set(timed.seconds) == set(STAGES)
    plan, loaded, task = names["plan"], names["loaded"], names["task"]
    assert plan.average_bits <= 4
    assert (tmp_path / "model.safetensors").stat().st_size == plan.size_bytes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    evaluation = tq.evaluate(names["quantized"].eval(), batches, task)
    assert names["evaluation"] == evaluation == tq.evaluate(loaded, batches, task)
    check_onnx(tmp_path / "model.onnx", loaded.eval(), example)


def check_onnx(path: Path, model: nn.Module, example: Any) -> None:
    """ONNX Runtime computes what the model does, for another batch size too."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for rows in (6, 2):
        call = {k: v[:rows] for k, v in example.items()} if isinstance(example, dict) else example[:rows]
        with torch.no_grad():
            want = model(**call).logits if isinstance(call, dict) else model(call)
        feeds = call if isinstance(call, dict) else {session.get_inputs()[0].name: call}
        (got,) = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
