"""The tasks that come with the package, on local data."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import tracequant as tq
from tracequant.core.settings import TaskOptions
from tracequant.tasks import cifar10
from tracequant.tasks.networks.residual import SmallResNet
from tracequant.tasks.registry import load_task

pytest.importorskip("torchvision", reason="the cifar10 task needs the extra 'vision'")

DATA = Path(os.environ.get("TRACEQUANT_DATA") or Path(__file__).parents[2] / "shared" / "data")


def test_digits_network_is_trained_once_and_accurate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEQUANT_CACHE", str(tmp_path))
    rng = torch.get_rng_state()
    setup = load_task("digits", TaskOptions())
    assert torch.equal(rng, torch.get_rng_state())
    evaluation = setup.task.evaluate(setup.model, setup.evaluation)
    assert evaluation.samples == 797
    assert evaluation.metric > 97.5
    (cached,) = (tmp_path / "tracequant").iterdir()
    written = cached.stat().st_mtime_ns
    again = load_task("digits", TaskOptions())
    assert cached.stat().st_mtime_ns == written
    assert again.task.evaluate(again.model, again.evaluation) == evaluation


def test_mosaics_are_cut_row_by_row(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((3200, 3200, 3), np.uint8)
    pixels[32:64, 64:96] = (10, 20, 30)  # second row, third tile: image 102, class 2
    image.fromarray(pixels).save(tmp_path / "test.webp", lossless=True)
    images, labels = cifar10.load_images(tmp_path, train=False)
    assert images.shape == (10000, 3, 32, 32)
    assert images[102, :, 5, 7].tolist() == [10, 20, 30]
    assert images.sum() == 32 * 32 * 60
    assert labels[102] == 2


def test_random_crop_moves_and_mirrors_whole_images() -> None:
    torch.manual_seed(0)
    images = torch.arange(64 * 3 * 8 * 8).reshape(64, 3, 8, 8) + 1
    padded = torch.nn.functional.pad(images, (2,) * 4)
    seen = set()
    for original, crop in zip(padded, cifar10.random_crop(images, padding=2), strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(
                crop,
                original[:, top : top + 8, left : left + 8].flip(2)
                if flip
                else original[:, top : top + 8, left : left + 8],
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 20
    assert {flip for _, _, flip in seen} == {False, True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TaskOptions(), "needs data_dir"),
        (TaskOptions(data_dir="missing"), "data_dir missing does not exist"),
        (TaskOptions(data_dir="x"), "needs weights"),
        (TaskOptions(data_dir="x", weights="nothing.safetensors"), "does not exist"),
        (TaskOptions(data_dir="x", weights="resnet20-x.safetensors", model="resnet21"), "unknown model 'resnet21'"),
        (TaskOptions(data_dir="x", weights="resnet20-x.safetensors", model="resnet32"), "does not fit"),
        (TaskOptions(data_dir="x", weights="resnet20-x.safetensors"), "neither cifar-10-batches-py nor"),
        (TaskOptions(data_dir="x", weights="text.txt"), "cannot be read"),
    ],
)
def test_cifar10_says_what_is_missing(
    options: TaskOptions, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file(SmallResNet(3).state_dict(), "resnet20-x.safetensors")
    Path("text.txt").write_text("not weights")
    Path("x").mkdir()
    with pytest.raises(tq.TaskError, match=message):
        load_task("cifar10", options)


@pytest.mark.slow
def test_resnet20_reproduces_its_published_accuracy() -> None:
    weights = DATA / "cifar10_weights" / "resnet20.safetensors"
    if not weights.exists():
        pytest.skip(f"TRACEQUANT_DATA ({DATA}) does not hold cifar10_weights")
    setup = load_task("cifar10", TaskOptions(data_dir=str(DATA / "cifar10"), weights=str(weights)))
    evaluation = setup.task.evaluate(setup.model, setup.evaluation)
    assert evaluation.samples == 10_000
    assert evaluation.metric == pytest.approx(91.73, abs=0.005)
    assert evaluation.loss == pytest.approx(0.3727, abs=5e-5)
