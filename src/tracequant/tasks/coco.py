"""Data sets in COCO's format: images, their boxes, batches of images of one size, and COCO's metrics."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tracequant.core.errors import DataError, TaskError
from tracequant.model.batches import Batch

# Names of COCO's summary, in the order of `COCOeval.stats`.
METRICS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
# Share of boxes mostly outside their image from which on the file must mean something else by its numbers.
OUTSIDE_LIMIT = 0.1

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Record:
    """An image of the annotation file and its boxes `[n, 4]` as x1, y1, x2, y2 in its pixels."""

    image_id: int
    file_name: str
    width: int
    height: int
    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowds: Tensor


class CocoImages(Dataset[tuple[Tensor, Target]]):
    """Images `[3, H, W]` from 0 to 1 and targets, of one annotation file.

    A target holds `boxes` `[n, 4]` (x1, y1, x2, y2 in pixels of the image), `labels` `[n]`, `iscrowd` `[n]`, `area`
    `[n]` and `image_id`. `images` is a folder or a zip file. `labels` maps category ids to labels, or is a function
    that makes such a mapping of the sorted ids; by default the categories are numbered from 0 in the order of their
    ids. Images without boxes are kept: they are background.

    Boxes without area are left out with a warning, boxes that stick out are cut at the margin. Raises `DataError` for
    files that are missing or not in COCO's format, for references to images and categories that do not exist, and for
    boxes that are corners instead of [x, y, width, height].
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        labels: dict[int, int] | Callable[[Sequence[int]], dict[int, int]] | None = None,
    ) -> None:
        self._annotations, self._images = Path(annotations), Path(images)
        content = _read_json(self._annotations)
        self.categories = {int(c["id"]): str(c.get("name", c["id"])) for c in content["categories"]}
        ids = sorted(self.categories)
        if labels is None:
            labels = {category: i for i, category in enumerate(ids)}
        self.labels = labels(ids) if callable(labels) else labels
        if without := [category for category in ids if category not in self.labels]:
            raise DataError(f"{self._annotations}: categories {without[:5]} have no label")
        self.records = self._records(content)
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._paths = self._locate()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        from PIL import Image, UnidentifiedImageError

        record = self.records[index]
        try:
            with self._open(record.file_name) as file, Image.open(file) as picture:
                pixels = np.array(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"image {record.file_name} of {self._images} cannot be read: {error}") from None
        if pixels.shape[:2] != (record.height, record.width):
            raise DataError(
                f"image {record.file_name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, {self._annotations} says"
                f" {record.width}x{record.height}: its boxes would be in the wrong places"
            )
        target = {
            "boxes": record.boxes,
            "labels": record.labels,
            "iscrowd": record.crowds,
            "area": record.areas,
            "image_id": torch.tensor(record.image_id),
        }
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, target

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of every image, without reading any."""
        return [(record.width, record.height) for record in self.records]

    def _records(self, content: dict[str, Any]) -> list[Record]:
        by_image: dict[int, list[dict[str, Any]]] = {int(image["id"]): [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["image_id"] not in by_image:
                raise DataError(
                    f"{self._annotations}: annotation {annotation.get('id')} is of image {annotation['image_id']},"
                    " which 'images' does not list"
                )
            by_image[annotation["image_id"]].append(annotation)
        records = [self._record(image, by_image[int(image["id"])]) for image in content["images"]]
        records = _within_margins(records, self._annotations)
        return _without_empty_boxes(records, self._annotations)

    def _record(self, image: dict[str, Any], annotations: list[dict[str, Any]]) -> Record:
        boxes = torch.tensor([self._box(a) for a in annotations], dtype=torch.float32).reshape(-1, 4)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        for annotation in annotations:
            if annotation["category_id"] not in self.categories:
                raise DataError(
                    f"{self._annotations}: annotation {annotation.get('id')} is of category"
                    f" {annotation['category_id']}, which 'categories' does not list"
                )
        areas = [float(a["bbox"][2] * a["bbox"][3] if a.get("area") is None else a["area"]) for a in annotations]
        return Record(
            image_id=int(image["id"]),
            file_name=str(image["file_name"]),
            width=int(image["width"]),
            height=int(image["height"]),
            boxes=corners,
            labels=torch.tensor([self.labels[a["category_id"]] for a in annotations], dtype=torch.int64),
            areas=torch.tensor(areas, dtype=torch.float32),
            crowds=torch.tensor([int(a.get("iscrowd", 0)) for a in annotations], dtype=torch.int64),
        )

    def _box(self, annotation: dict[str, Any]) -> list[float]:
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(math.isfinite(x) for x in box):
            raise DataError(
                f"{self._annotations}: annotation {annotation.get('id')} has bbox {box}, expected four numbers"
                " [x, y, width, height]"
            )
        return box

    def _locate(self) -> dict[str, str]:
        """The path of every image inside the folder or zip file, which may repeat its own name or leave it out."""
        if self._images.is_dir():
            present = {path.relative_to(self._images).as_posix() for path in self._images.rglob("*") if path.is_file()}
        elif zipfile.is_zipfile(self._images):
            with zipfile.ZipFile(self._images) as archive:
                present = set(archive.namelist())
        else:
            raise DataError(f"{self._images} is neither a folder of images nor a zip file")
        folder = f"{self._images.stem}/"
        paths, missing = {}, []
        for name in (record.file_name for record in self.records):
            path = next((path for path in (name, folder + name, name.removeprefix(folder)) if path in present), None)
            if path is None:
                missing.append(name)
            else:
                paths[name] = path
        if missing:
            raise DataError(
                f"{self._annotations} names {len(missing)} images that {self._images} does not hold, {missing[0]} for"
                " one"
            )
        return paths

    def _open(self, name: str) -> Any:
        name = self._paths[name]
        if self._images.is_dir():
            return (self._images / name).open("rb")
        # A loader's worker must not share the file's position with its parent.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self._images)
        return self._archive[1].open(name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}


class SameSizeBatches:
    """Indices of images in batches of one size each, for `DataLoader(batch_sampler=...)`.

    A batch of one size is one tensor, so that nothing about an image depends on what it was batched with. With
    `shuffle` another order in every pass, by torch's global generator.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, shuffle: bool = False) -> None:
        self._sizes, self._batch_size, self._shuffle = list(sizes), batch_size, shuffle

    def __len__(self) -> int:
        return sum(-(-count // self._batch_size) for count in Counter(self._sizes).values())

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self._sizes)
        order = torch.randperm(count).tolist() if self._shuffle else range(count)
        waiting: dict[tuple[int, int], list[int]] = {}
        for index in order:
            batch = waiting.setdefault(self._sizes[index], [])
            batch.append(index)
            if len(batch) == self._batch_size:
                yield waiting.pop(self._sizes[index])
        yield from waiting.values()


def loader(
    dataset: Dataset[tuple[Tensor, Target]],
    sizes: Sequence[tuple[int, int]],
    batch_size: int,
    shuffle: bool = False,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Target]]:
    """Batches `(images, targets)`, both lists, of images of one size each; `sizes` are all images' (width, height)."""
    batches = SameSizeBatches(sizes, batch_size, shuffle)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """A batch `(images, targets)` of two lists, as torchvision's detectors take them; sizes may differ."""
    return [image for image, _ in samples], [target for _, target in samples]


def coco_metrics(targets: Sequence[Target], detections: Sequence[Target], classes: int) -> dict[str, float]:
    """COCO's AP, AP50, AP75 and AP of small, medium and large boxes, in percent, by pycocotools.

    `targets[i]` and `detections[i]` are of one image, boxes `[n, 4]` as x1, y1, x2, y2 in the same pixels; detections
    also have `scores`. Labels run from 0 to `classes` - 1. NaN where there is no box of that size.

    Raises `DataError` if there is no box at all, `TaskError` without pycocotools.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise TaskError(f"COCO's metrics need pycocotools ({error}); pip install 'tracequant[detection]'") from None
    if not any(int((~_crowds(target).bool()).sum()) for target in targets):
        raise DataError("the evaluation data have no box: there is no mAP; check the annotations")
    truth, detected = COCO(), COCO()
    # Numbers from 1 on: COCOeval takes an annotation 0 for none.
    ids = range(1, len(targets) + 1)
    common = {"images": [{"id": i} for i in ids], "categories": [{"id": c} for c in range(classes)]}
    truth.dataset = common | {"annotations": _annotations(targets)}
    detected.dataset = common | {"annotations": _annotations(detections)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        detected.createIndex()
        evaluation = COCOeval(truth, detected, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: 100 * float(value) if value >= 0 else math.nan
        for name, value in zip(METRICS, evaluation.stats, strict=False)
    }


def _annotations(images: Sequence[Target]) -> list[dict[str, Any]]:
    """COCO's annotations of targets or detections."""
    result: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        boxes = image["boxes"].detach().cpu().double()
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = image["area"].cpu().double() if "area" in image else sides.prod(1)
        scores = image["scores"].tolist() if "scores" in image else [1.0] * len(boxes)
        rows = zip(
            torch.cat([boxes[:, :2], sides], 1).tolist(), image["labels"].tolist(), areas.tolist(),
            _crowds(image).tolist(), scores, strict=True,
        )  # fmt: skip
        for box, label, area, crowd, score in rows:
            result.append(
                {
                    "id": len(result) + 1, "image_id": image_id, "category_id": label, "bbox": box, "area": area,
                    "iscrowd": crowd, "score": score,
                }
            )  # fmt: skip
    return result


def _crowds(target: Target) -> Tensor:
    """Which boxes are of a crowd, in which detections count neither way."""
    return target["iscrowd"] if "iscrowd" in target else torch.zeros_like(target["labels"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"annotation file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"annotation file {path} cannot be read as JSON: {error}") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise DataError(f"{path} is not in COCO's detection format: it must hold the lists {', '.join(keys)}")
    if not content["images"] or not content["categories"]:
        raise DataError(f"{path} lists no images or no categories")
    return content


def _within_margins(records: list[Record], path: Path) -> list[Record]:
    """The records with boxes cut at the margin of their image; `DataError` if too many lie outside."""
    outside, total = 0, 0
    cut = []
    for record in records:
        limits = torch.tensor([record.width, record.height] * 2, dtype=torch.float32)
        boxes = torch.minimum(record.boxes.clamp_min(0), limits)
        inside, whole = ((corners[:, 2:] - corners[:, :2]).clamp_min(0).prod(1) for corners in (boxes, record.boxes))
        outside += int((inside < whole / 2).sum())
        total += len(boxes)
        cut.append(replace(record, boxes=boxes))
    if outside > OUTSIDE_LIMIT * total:
        raise DataError(
            f"{path}: {outside} of {total} boxes lie mostly outside their image; COCO's bbox is [x, y, width, height]"
            " in pixels: are these corners [x1, y1, x2, y2], or boxes of images of another size?"
        )
    return cut


def _without_empty_boxes(records: list[Record], path: Path) -> list[Record]:
    keep = [(record.boxes[:, 2:] > record.boxes[:, :2]).all(1) for record in records]
    empty = sum(int((~mask).sum()) for mask in keep)
    if empty:
        warnings.warn(f"{path}: {empty} boxes without area are left out", stacklevel=4)
    return [
        replace(r, boxes=r.boxes[mask], labels=r.labels[mask], areas=r.areas[mask], crowds=r.crowds[mask])
        for r, mask in zip(records, keep, strict=True)
    ]
