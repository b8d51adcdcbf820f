"""Data sets in COCO's format: what is read, what is refused, and batches of one size."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cli_runs import invoke
from tracequant.core.errors import DataError, TaskError
from tracequant.core.match import match_names
from tracequant.core.settings import TaskOptions
from tracequant.run.directory import RunDirectory

pytest.importorskip("torchvision", reason="the detection task's networks are torchvision's")

from safetensors.torch import save_file

from tracequant.tasks.coco import CocoImages, SameSizeBatches, collate, loader
from tracequant.tasks.detection import build
from tracequant.tasks.networks.retinanet import retinanet

MOBILE = "retinanet_mobilenet_v2_fpn"
SIZES = {1: (20, 10), 2: (12, 16), 5: (20, 10)}


def content() -> dict[str, Any]:
    """Three images, the last without boxes; categories 3 and 7."""
    boxes = [(1, 3, [2, 1, 5, 4]), (1, 7, [0, 0, 20, 10]), (2, 7, [3, 2.5, 6, 7])]
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": width, "height": height} for i, (width, height) in SIZES.items()
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": None}
            for i, (image, category, box) in enumerate(boxes)
        ],
    }


def write(folder: Path, data: dict[str, Any], name: str = "instances_train.json") -> Path:
    """The annotation file, and a picture of one grey level for each image."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, size in SIZES.items():
        Image.new("RGB", size, (51 * i, 0, 255)).save(folder / "images" / f"{i}.png")
    (folder / name).write_text(json.dumps(data))
    return folder / name


@pytest.mark.parametrize("inside", [None, "", "images/"])
@pytest.mark.parametrize("named", ["", "images/"])
def test_images_and_targets(tmp_path: Path, inside: str | None, named: str) -> None:
    """In a folder or a zip file; both the zip file and the annotations may repeat its name or leave it out."""
    write(tmp_path, content())
    images, given = tmp_path / "images", content()
    for image in given["images"]:
        image["file_name"] = named + image["file_name"]
    annotations = tmp_path / "instances_train.json"
    annotations.write_text(json.dumps(given))
    if inside is not None:
        images = tmp_path / "images.zip"
        with zipfile.ZipFile(images, "w") as archive:
            for path in (tmp_path / "images").iterdir():
                archive.write(path, inside + path.name)
    dataset = CocoImages(annotations, images)
    assert dataset.categories == {7: "dog", 3: "cat"}
    assert dataset.labels == {3: 0, 7: 1}
    assert dataset.sizes == [(20, 10), (12, 16), (20, 10)]
    image, target = dataset[0]
    assert image.shape == (3, 10, 20)
    assert image[:, 0, 0].tolist() == pytest.approx([0.2, 0, 1])
    assert target["boxes"].tolist() == [[2, 1, 7, 5], [0, 0, 20, 10]]
    assert target["labels"].tolist() == [0, 1]
    assert target["area"].tolist() == [20, 200]
    assert target["iscrowd"].tolist() == [0, 0]
    assert int(target["image_id"]) == 1
    _, empty = dataset[2]
    assert (empty["boxes"].shape, empty["labels"].shape) == ((0, 4), (0,))
    again, _ = pickle.loads(pickle.dumps(dataset))[0]
    assert torch.equal(again, image)


def test_a_box_that_sticks_out_is_cut(tmp_path: Path) -> None:
    dataset = CocoImages(write(tmp_path, broken("annotations", bbox=[12, 1, 12, 4])), tmp_path / "images")
    assert dataset[0][1]["boxes"][0].tolist() == [12, 1, 20, 5]


def test_given_labels(tmp_path: Path) -> None:
    annotations = write(tmp_path, content())
    assert CocoImages(annotations, tmp_path / "images", {3: 3, 7: 7})[1][1]["labels"].tolist() == [7]
    with pytest.raises(DataError, match=r"categories \[7\] have no label"):
        CocoImages(annotations, tmp_path / "images", {3: 0})


def test_boxes_without_area_are_left_out_and_others_cut_at_the_margin(tmp_path: Path) -> None:
    data = content()
    for n in range(20):  # most boxes lie inside
        data["annotations"].append({"id": 10 + n, "image_id": 2, "category_id": 3, "bbox": [1, 1, 2, 2]})
    data["annotations"][0]["bbox"] = [2, 1, 0, 4]
    data["annotations"][1]["bbox"] = [15, -3, 10, 10]
    annotations = write(tmp_path, data)
    with pytest.warns(UserWarning, match="1 boxes without area are left out"):
        dataset = CocoImages(annotations, tmp_path / "images")
    assert dataset[0][1]["boxes"].tolist() == [[15, 0, 20, 7]]
    assert dataset[0][1]["labels"].tolist() == [1]


def broken(where: str, **change: Any) -> dict[str, Any]:
    data = content()
    data[where][0] |= change
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken("annotations", image_id=9), "annotation 0 is of image 9, which 'images' does not list"),
        (broken("annotations", category_id=4), "annotation 0 is of category 4, which 'categories' does not list"),
        (broken("annotations", bbox=[1, 2, 3]), r"annotation 0 has bbox \[1, 2, 3\], expected four numbers"),
        (broken("annotations", bbox=[5, 5, 19, 9]), "1 of 3 boxes lie mostly outside their image.*corners"),
        (broken("images", file_name="no.png"), "names 1 images that .* does not hold, no.png for one"),
        (content() | {"images": []}, "lists no images"),
        ({"images": []}, "must hold the lists images, annotations, categories"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CocoImages(write(tmp_path, data), tmp_path / "images")


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    annotations = write(tmp_path, content())
    with pytest.raises(DataError, match="does not exist"):
        CocoImages(tmp_path / "no.json", tmp_path / "images")
    with pytest.raises(DataError, match="neither a folder of images nor a zip file"):
        CocoImages(annotations, annotations)
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"image 1\.png of .* cannot be read"):
        CocoImages(annotations, tmp_path / "images")[0]
    Image.new("RGB", (20, 11)).save(tmp_path / "images" / "1.png")
    with pytest.raises(DataError, match=r"has 20x11 pixels, .* says 20x10"):
        CocoImages(annotations, tmp_path / "images")[0]
    annotations.write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        CocoImages(annotations, tmp_path / "images")


def test_batches_of_one_size_hold_every_image_once() -> None:
    sizes = [(4, 3), (3, 4), (4, 3), (4, 3), (3, 4), (4, 3), (4, 3)]
    batches = SameSizeBatches(sizes, 2)
    assert list(batches) == [[0, 2], [1, 4], [3, 5], [6]]
    assert len(batches) == 4
    shuffled = SameSizeBatches(sizes, 2, shuffle=True)
    torch.manual_seed(0)
    first, second = list(shuffled), list(shuffled)
    assert first != second
    for found in (first, second):
        assert sorted(i for batch in found for i in batch) == list(range(7))
        assert all(len({sizes[i] for i in batch}) == 1 for batch in found)
    torch.manual_seed(0)
    assert list(shuffled) == first


def test_the_loader_yields_images_and_targets(tmp_path: Path) -> None:
    dataset = CocoImages(write(tmp_path, content()), tmp_path / "images")
    batches = list(loader(dataset, dataset.sizes, 2))
    assert [[tuple(image.shape) for image in images] for images, _ in batches] == [[(3, 10, 20)] * 2, [(3, 16, 12)]]
    assert [[int(t["image_id"]) for t in targets] for _, targets in batches] == [[1, 5], [2]]
    again = list(loader(dataset, dataset.sizes, 2, workers=1))
    assert all(
        torch.equal(a, b) for (x, _), (y, _) in zip(again, batches, strict=True) for a, b in zip(x, y, strict=True)
    )
    images, targets = collate([dataset[0], dataset[1]])
    assert (len(images), len(targets)) == (2, 2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Files of random weights for so many classes."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for classes in (2, 5, 8):
        paths[classes] = folder / f"{classes}.safetensors"
        save_file(retinanet("retinanet_resnet18_fpn", classes).state_dict(), paths[classes])
    return paths


def options(folder: Path, path: Path, model: str = "torchvision:retinanet_resnet18_fpn") -> TaskOptions:
    return TaskOptions(data_dir=str(folder), weights=str(path), model=model, samples=2, batch_size=2)


def test_the_task_reads_splits_and_finds_the_labels(
    tmp_path: Path, weights: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, content())
    tested = content()
    tested["images"] = tested["images"][:1]
    tested["annotations"] = tested["annotations"][:2]
    write(tmp_path, tested, "instances_val2017.json")
    setup = build(options(tmp_path, weights[2]))
    assert sum(len(images) for images, _ in setup.calibration) == 2
    assert sum(len(images) for images, _ in setup.train) == 3
    ((images, (target,)),) = setup.evaluation
    assert len(images) == 1
    assert target["labels"].tolist() == [0, 1]
    run = RunDirectory(tmp_path / "run")
    monkeypatch.setattr(run, "setup", lambda: setup)
    assert run.blocks(("fpn.*", "blocks")) == ("fpn.*", *setup.blocks)
    assert setup.blocks[-2:] == ("head.classification_head.*", "head.regression_head.*")
    setup.blocks = ()
    with pytest.raises(TaskError, match="does not say what its model's blocks are"):
        run.blocks(("blocks",))
    assert not setup.model.training
    # More classes than the largest id: the labels are the ids, as in torchvision's networks for COCO.
    ((_, (target,)),) = build(options(tmp_path, weights[8])).evaluation
    assert target["labels"].tolist() == [3, 7]
    with pytest.raises(TaskError, match="for 5 classes, the annotations have 2 categories with ids up to 7"):
        build(options(tmp_path, weights[5]))


def test_what_the_task_needs(tmp_path: Path, weights: dict[int, Path]) -> None:
    with pytest.raises(TaskError, match="needs data_dir"):
        build(TaskOptions())
    with pytest.raises(TaskError, match="needs model=NAME: torchvision:retinanet_resnet50_fpn"):
        build(TaskOptions(data_dir=str(tmp_path)))
    with pytest.raises(TaskError, match="needs weights=FILE"):
        build(TaskOptions(data_dir=str(tmp_path), model="retinanet_resnet18_fpn"))
    with pytest.raises(TaskError, match="holds no annotations of train"):
        build(options(tmp_path, weights[2]))
    with pytest.raises(TaskError, match="does not fit this network"):
        build(options(tmp_path, weights[2], "retinanet_resnet34_fpn"))
    with pytest.raises(TaskError, match="no use for crop_share="):
        build(replace(options(tmp_path, weights[2]), crop_share=0.9))
    other = tmp_path / "other.safetensors"
    save_file({"fc.weight": torch.zeros(2, 2)}, other)
    with pytest.raises(TaskError, match="is not of a torchvision RetinaNet"):
        build(options(tmp_path, other))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not significantly above zero:UserWarning")
def test_from_the_command_line_to_a_detector_in_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All stages with tied blocks and mixed activations, the paper's figures by blocks, and the file in a runtime."""
    pytest.importorskip("onnxruntime", reason="ONNX files are run by the extra 'onnx'")
    write(tmp_path / "data", content())
    write(tmp_path / "data", content(), "instances_val.json")
    torch.manual_seed(0)
    save_file(retinanet(MOBILE, 2).state_dict(), tmp_path / "weights.safetensors")
    run = tmp_path / "run"
    asked = ["--task", "detection", "--model", MOBILE, "--data-dir", tmp_path / "data", "--weights"]
    asked += [tmp_path / "weights.safetensors", "--samples", 2, "--batch-size", 2, "--image-size", 32, "--workers", 0]
    limits = [
        "--weight-bits",
        "2,4,8",
        "--activation-bits",
        "4,6,8",
        "--compression",
        7,
        "--average-activation-bits",
        6,
    ]
    recipe = ["--ties", "blocks", "--num-probes", 1, "--no-eigenvalues", "--finetune-steps", 2, "--batchnorm", "freeze"]
    assert invoke("run", *asked, *limits, *recipe, "--out", run, "-q") == 0
    made = RunDirectory(run)
    plan, setup = made.plan(), made.setup()
    assert plan.compression >= 7
    assert made.pack_result().file_bytes == plan.size_bytes
    assert setup.model.transform.min_size == (32,)
    assert setup.model.transform.max_size == 53
    for block in setup.blocks:
        assert len({plan.weight_bits[name] for name in match_names([block], list(plan.weight_bits), "block")}) == 1
    assert invoke("figures", run, "--block", "blocks", "--figure", 7, "--figure", 8, "-q") == 0
    drawn = json.loads((run / "paper" / "figure-7.json").read_text())["blocks"]
    assert len(drawn) == len(setup.blocks) < len(plan.weight_bits)
    assert invoke("export", run, "-q") == 0
    capsys.readouterr()
    assert invoke("verify", run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 3
    assert found["runtimes"][0]["metric"] == pytest.approx(found["metric"], abs=1)
    heads = {kernel["layer"].partition(":")[0] for kernel in found["kernels"] if kernel["kernel"] != "QLinearConv"}
    assert heads == {name for name in plan.weight_bits if name.endswith(("cls_logits", "bbox_reg"))}, (
        "a convolution inside the network runs in float"
    )
