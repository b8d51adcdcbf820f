"""The imagenet task: classes and images of a folder, networks and their weights, and the accuracies of real ones."""

import math
import sys
import urllib.error
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tracequant as tq
from image_tree import make_tree
from tracequant.core.settings import TaskOptions
from tracequant.tasks import imagenet
from tracequant.tasks.networks.squeezenext import SqueezeNext
from tracequant.tasks.registry import load_task

torchvision = pytest.importorskip("torchvision", reason="the imagenet task needs the extra 'vision'")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from data import data_folder  # noqa: E402


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, one of them without training images, of which `val` has two."""
    root = tmp_path_factory.mktemp("images")
    return make_tree(root, {"n01": 6, "n02": 0, "n03": 5}, {"n01": 2, "n03": 3})


NETWORK = "torchvision:shufflenet_v2_x0_5"  # the one of fewest weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A state dict of the network with three classes, as a training script leaves it."""
    torch.manual_seed(1)
    state = torchvision.models.shufflenet_v2_x0_5(num_classes=3).state_dict()
    path = tmp_path_factory.mktemp("weights") / "three.pth"
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "args": Namespace(lr=0.1), "state_dict": wrapped}, path)
    return str(path)


def options(tree: Path, model: str | None, **more: Any) -> TaskOptions:
    return TaskOptions(data_dir=str(tree), model=model, **({"workers": 0} | more))


def test_classes_are_numbered_as_in_train(tree: Path, weights: str) -> None:
    setup = load_task("imagenet", options(tree, NETWORK, weights=weights, batch_size=2))
    labels = torch.cat([targets for _, targets in setup.evaluation])
    assert labels.tolist() == [0, 0, 2, 2, 2]
    images, _ = next(iter(setup.evaluation))
    assert images.shape == (2, 3, 224, 224)
    assert len(setup.train) == 5  # the odd image would be a batch of one
    assert not setup.model.training


def test_a_list_of_classes_takes_the_place_of_the_folders(tmp_path: Path, weights: str) -> None:
    tree = make_tree(tmp_path, {"tabby cat": 2}, {"dog": 1, "tabby cat": 1})
    (tree / "classes.txt").write_text("dog\nemu\n\ntabby cat\n")
    setup = load_task("imagenet", options(tree, NETWORK, weights=weights))
    by_folder = {Path(path).parent.name: label for path, label in setup.evaluation.dataset.images}
    assert by_folder == {"dog": 0, "tabby cat": 2}


def test_hidden_folders_are_no_classes(tmp_path: Path, weights: str) -> None:
    tree = make_tree(tmp_path, {".checkpoints": 1, "a": 1, "b": 1, "c": 1}, {".checkpoints": 1, "a": 1})
    setup = load_task("imagenet", options(tree, NETWORK, weights=weights))
    assert [label for _, label in setup.evaluation.dataset.images] == [0]


def test_calibration_images_are_drawn_by_the_seed(tree: Path, weights: str) -> None:
    def drawn(seed: int, samples: int | None = 4) -> list[int]:
        given = options(tree, NETWORK, weights=weights, seed=seed, samples=samples)
        return list(load_task("imagenet", given).calibration.dataset.indices)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(drawn(0)) == 4
    assert sorted(drawn(0, None)) == list(range(11))  # all there are, where there are fewer than 512


def test_loading_a_task_leaves_the_generator_alone(tree: Path, weights: str) -> None:
    before = torch.get_rng_state()
    load_task("imagenet", options(tree, NETWORK, weights=weights))
    assert torch.equal(before, torch.get_rng_state())


def test_parallel_loading_gives_the_same_images(tree: Path, weights: str) -> None:
    alone, shared = (
        torch.cat(
            [
                images
                for images, _ in load_task(
                    "imagenet",
                    options(tree, NETWORK, weights=weights, workers=workers, image_size=32),
                ).evaluation
            ]
        )
        for workers in (0, 2)
    )
    assert torch.equal(alone, shared)


@pytest.mark.parametrize(("name", "size"), [("resnet50", 224), ("inception_v3", 299), ("efficientnet_b1", 240)])
def test_images_are_prepared_as_the_weights_expect(
    name: str, size: int, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "_load", lambda *args, **more: None)
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **more: torch.nn.Identity())
    setup = load_task("imagenet", options(tree, f"torchvision:{name}", weights="some.pth"))
    preset = next(iter(torchvision.models.get_model_weights(name))).transforms()
    from PIL import Image

    path, _ = setup.evaluation.dataset.images[0]
    image, _ = setup.evaluation.dataset[0]
    assert torch.equal(image, preset(Image.open(path)))
    assert image.shape == (3, size, size)
    assert setup.train.dataset[0][0].shape == (3, size, size)


def test_timm_images_are_prepared_as_its_config_says(tree: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from PIL import Image

    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    weights = str(tmp_path / "weights.safetensors")
    setup = load_task("imagenet", options(tree, "timm:mobilenetv3_small_050", weights=weights))
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    image, _ = setup.evaluation.dataset[0]
    assert torch.equal(image, expected(Image.open(setup.evaluation.dataset.images[0][0])))
    assert torch.equal(setup.model.classifier.weight, model.classifier.weight)
    small = load_task("imagenet", options(tree, "timm:mobilenetv3_small_050", weights=weights, image_size=48))
    assert small.evaluation.dataset[0][0].shape == small.train.dataset[0][0].shape == (3, 48, 48)


@pytest.mark.parametrize("crop_share", [None, 1.0, 0.5])
def test_the_crop_keeps_a_share_of_the_image(crop_share: float | None, tree: Path, weights: str) -> None:
    given = options(tree, NETWORK, weights=weights, image_size=56, crop_share=crop_share)
    image, _ = load_task("imagenet", given).evaluation.dataset[0]
    expected = imagenet.standard_transforms(56, crop_share or 224 / 256).evaluation
    from PIL import Image

    path = tree / "val" / "n01" / "0.jpg"
    assert image.shape == (3, 56, 56)
    assert torch.equal(image, expected(Image.open(path)))


def serve(monkeypatch: pytest.MonkeyPatch, state: Any) -> list[str]:
    """Let torchvision's downloads give `state`, and list what was asked for."""
    asked = []

    def load(url: str, *args: Any, **more: Any) -> Any:
        asked.append(url)
        if isinstance(state, Exception):
            raise state
        return state

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", load)
    return asked


def thousand(tmp_path: Path) -> Path:
    tree = make_tree(tmp_path / "thousand", {"n0000": 1}, {"n0000": 1})
    (tree / "classes.txt").write_text("\n".join(f"n{i:04d}" for i in range(1000)))
    return tree


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, "mobilenet_v2-7ebf99e0"), ("IMAGENET1K_V1", "mobilenet_v2-b0353104")]
)
def test_weights_come_from_the_zoo(
    weights: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    state = torchvision.models.mobilenet_v2().state_dict()
    asked = serve(monkeypatch, state)
    setup = load_task("imagenet", options(thousand(tmp_path), "torchvision:mobilenet_v2", weights=weights))
    assert torch.equal(setup.model.classifier[1].weight, state["classifier.1.weight"])
    assert expected in asked[0]


def test_heads_for_training_are_taken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.googlenet(init_weights=False).state_dict()
    state = {name: torch.rand(value.shape).to(value.dtype) / 50 for name, value in shapes.items()}
    serve(monkeypatch, state)
    fetched = load_task("imagenet", options(thousand(tmp_path), "torchvision:googlenet"))
    torch.save(state, tmp_path / "googlenet.pth")
    given = options(tmp_path / "thousand", "torchvision:googlenet", weights=str(tmp_path / "googlenet.pth"))
    from_file = load_task("imagenet", given)
    image = torch.randn(2, 3, 64, 64)
    for setup in (fetched, from_file):
        assert not any(name.startswith("aux") for name in setup.model.state_dict())
        assert setup.model.transform_input
        assert setup.model.train()(image).shape == (2, 1000)
        setup.model.eval()
    assert torch.equal(fetched.model(image), from_file.model(image))


def test_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, urllib.error.URLError("no route"))
    with pytest.raises(tq.TaskError, match=r"cannot be fetched .*no route.* give weights=FILE"):
        load_task("imagenet", options(thousand(tmp_path), NETWORK))


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (None, {}, "needs model=NAME: torchvision:NAME, timm:NAME"),
        ("resnet50", {}, "unknown model 'resnet50'; choose torchvision:NAME"),
        ("torchvision:resnet5", {}, "no model 'resnet5'; did you mean .*resnet50"),
        ("timm:resnet50d_", {}, "no model 'resnet50d_'; did you mean .*resnet50d"),
        ("torchvision:qqqqqqqqqqq", {}, "no model 'qqqqqqqqqqq'$"),
        (NETWORK, {"weights": "IMAGENET1K_V7"}, "neither a file nor published .* IMAGENET1K_V1"),
        ("timm:resnet18", {"weights": "IMAGENET1K_V1"}, "does not exist; timm's own are chosen by name"),
        (NETWORK, {"weights": "nothing.pth"}, "weights file nothing.pth does not exist"),
        (NETWORK, {"weights": "text.pth"}, "cannot be read as a state dict"),
        (NETWORK, {"weights": "number.pth"}, "holds no state dict"),
        ("torchvision:squeezenet1_1", {"weights": "three.pth"}, r"missing \['features.0.weight'"),
        (NETWORK, {"weights": "four.pth"}, r"fc.weight has shape \[4, 1024\], expected \[3, 1024\].*3 cl"),
        (
            NETWORK,
            {"weights": "model.pth"},
            r"more than tensors, a pathlib\S+ for one\); save model.state_dict",
        ),
        ("timm:vit_tiny_patch16_224", {"weights": "vit.pth", "image_size": 96}, "cannot take images of 96x96 pixels"),
        ("squeezenext:2.5", {"weights": "four.pth"}, "unknown width '2.5' of squeezenext; choose 1.0, 1.5 or 2.0"),
        ("squeezenext", {}, "no weights that can be fetched"),
    ],
)
def test_errors_say_what_is_wrong(
    model: str | None,
    more: dict[str, Any],
    message: str,
    tree: Path,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.pth").write_text("not weights")
    torch.save(3, "number.pth")
    torch.save({"state_dict": {}, "from": Path("here")}, "model.pth")
    if model is not None and "vit" in model:
        timm = pytest.importorskip("timm")
        torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), "vit.pth")
    Path("three.pth").write_bytes(Path(weights).read_bytes())
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=4).state_dict(), "four.pth")
    with pytest.raises(tq.TaskError, match=message):
        load_task("imagenet", options(tree, model, **more))


def test_folders_are_checked(tmp_path: Path, weights: str) -> None:
    def load(name: str) -> tq.TaskSetup:
        return load_task("imagenet", options(tmp_path / name, NETWORK, weights=weights))

    with pytest.raises(tq.TaskError, match="needs data_dir"):
        load_task("imagenet", TaskOptions(model=NETWORK))
    with pytest.raises(tq.TaskError, match=r"has no folder 'train'; expected train/<class>"):
        load("nothing")
    make_tree(tmp_path / "no val", {"a": 1}, {})
    with pytest.raises(tq.TaskError, match="has no folder 'val'"):
        load("no val")
    make_tree(tmp_path / "more", {"a": 1, "b": 1, "c": 1}, {"a": 1, "zebra": 1})
    with pytest.raises(tq.TaskError, match="1 folders that are none of the 3 classes: zebra"):
        load("more")
    make_tree(tmp_path / "empty", {"a": 0, "b": 0, "c": 0}, {"a": 1})
    with pytest.raises(tq.TaskError, match="train holds no images"):
        load("empty")
    make_tree(tmp_path / "two", {"a": 1, "b": 1}, {"a": 1})
    with pytest.raises(tq.TaskError, match=r"torchvision:shufflenet_v2_x0_5 has 1000 outputs and .* 2 classes"):
        load_task("imagenet", options(tmp_path / "two", NETWORK))


def test_a_damaged_image_is_named(tmp_path: Path, weights: str) -> None:
    tree = make_tree(tmp_path, {"a": 1, "b": 1, "c": 1}, {"a": 1})
    (tree / "val" / "a" / "bad.jpg").write_bytes(b"not a picture")
    setup = load_task("imagenet", options(tree, NETWORK, weights=weights))
    with pytest.raises(tq.DataError, match=r"bad.jpg cannot be read"):
        list(setup.evaluation)


PARAMETERS = {(1.0, "23"): 724_056, (2.0, "23"): 2_583_752, (1.0, "23v5"): 921_816, (2.0, "23v5"): 3_366_344}


@pytest.mark.parametrize(("width", "version"), PARAMETERS)
def test_squeezenext_has_the_published_parameters(width: float, version: Any) -> None:
    model = SqueezeNext(width, version).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[width, version]
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == 2 + 5 * 21 + 4
    with torch.no_grad():
        assert model.features[:2](torch.zeros(1, 3, 224, 224)).shape[2:] == (55, 55)
        assert model.features(torch.zeros(1, 3, 224, 224)).shape == (1, int(128 * width), 7, 7)


def test_the_papers_squeezenext_is_a_checkpoint_of_10_1_mb(tmp_path: Path) -> None:
    """Its table's sizes of float networks are those of checkpoints in 2^20 bytes: 97.8 is torchvision's ResNet50."""
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["_file_size"] == pytest.approx(97.8, abs=0.05)
    path = tmp_path / "squeezenext.pth"
    torch.save(SqueezeNext(2.0, "23").state_dict(), path, _use_new_zipfile_serialization=False)
    assert path.stat().st_size / 2**20 == pytest.approx(10.1, abs=0.05)
    torch.save(SqueezeNext(2.0, "23v5").state_dict(), path, _use_new_zipfile_serialization=False)
    assert path.stat().st_size / 2**20 > 13


def test_squeezenext_loads_a_file(tree: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SqueezeNext(1.0, "23v5", num_classes=3).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    given = options(tree, "squeezenext-23v5:1.0", weights=str(tmp_path / "weights.safetensors"))
    setup = load_task("imagenet", given)
    image = torch.randn(1, 3, 96, 96)
    assert torch.equal(setup.model(image), model(image))
    with pytest.raises(tq.TaskError, match="does not fit this network"):
        load_task("imagenet", options(tree, "squeezenext:1.0", weights=given.weights))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model", "file", "accuracy"),
    [
        ("imagenet", "torchvision:squeezenet1_1", "squeezenet1_1", 53.0),
        (f"{ROOT / 'examples' / 'mobilenet_v1.py'}:build", None, "mobilenet_v1_025_tf", 52.0),
    ],
)
def test_published_accuracies_are_reproduced(
    task: str, model: str | None, file: str, accuracy: float, tmp_path: Path
) -> None:
    from imagenet_tree import DATA, lay_out

    data = data_folder(*DATA, "imagenet_weights")
    if data is None:
        pytest.skip("TRACEQUANT_DATA does not hold imagenet_train1000, imagenet_val500 and imagenet_weights")
    tree = lay_out(data, tmp_path)
    weights = str(data / "imagenet_weights" / f"{file}.safetensors")
    setup = load_task(task, TaskOptions(data_dir=str(tree), weights=weights, model=model, workers=0, crop_share=1.0))
    evaluation = setup.task.evaluate(setup.model, setup.evaluation)
    assert evaluation.samples == 500
    assert math.isclose(evaluation.metric, accuracy, abs_tol=1e-6)
