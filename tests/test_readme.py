"""The README's Python runs as written, on a torchvision model with the user's own loader and loss."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

torchvision = pytest.importorskip("torchvision", reason="needs the extra 'vision'")

ROOT = Path(__file__).parents[1]


def code_block() -> str:
    """The README's Python example."""
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)


def test_flow_takes_at_most_ten_lines() -> None:
    assert sum(bool(line.strip()) for line in code_block().splitlines()) <= 10


def test_readme_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_resnet(weights: str) -> torch.nn.Module:
        # Stands for the download of trained weights; a real torchvision network with fewer weights.
        assert weights == "DEFAULT"
        torch.manual_seed(0)
        model: torch.nn.Module = torchvision.models.squeezenet1_1(num_classes=5)
        return model

    calls = []

    def my_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        return F.cross_entropy(logits, targets, label_smoothing=0.1)

    monkeypatch.setattr(torchvision.models, "resnet18", small_resnet)
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(4, 3, 64, 64), torch.randint(0, 5, (4,))) for _ in range(2)]
    names = {"my_loss": my_loss, "calibration": batches, "train_loader": batches}
    code = code_block().replace("steps=1000", "steps=3")
    assert code != code_block()
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "model.safetensors").stat().st_size == names["plan"].size_bytes
    assert names["plan"].average_bits <= 3
    assert len(calls) >= 5


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
