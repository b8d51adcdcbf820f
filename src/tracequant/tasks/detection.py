"""Object detection: torchvision's RetinaNet with focal and box losses, and any data set in COCO's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Subset

from tracequant.core.errors import TaskError
from tracequant.core.settings import TaskOptions
from tracequant.model.task import TaskSetup
from tracequant.tasks.coco import CocoImages, loader
from tracequant.tasks.networks.retinanet import (
    ANCHORS,
    MODELS,
    load_weights,
    require_torchvision,
    retinanet,
    retinanet_blocks,
)
from tracequant.tasks.registry import refuse
from tracequant.tasks.retinanet import RetinaNetTask
from tracequant.tasks.weights import read_state

DEFAULT_SAMPLES, DEFAULT_BATCH_SIZE = 128, 4


def build(options: TaskOptions) -> TaskSetup:
    """The RetinaNet `options.model` with the weights `options.weights`, and the COCO-format data of `options.data_dir`.

    Raises `TaskError` where one is missing or they do not fit one another, `DataError` for damaged data.
    """
    require_torchvision()
    if options.data_dir is None:
        raise TaskError(
            "the detection task needs data_dir=DIR: a folder with instances_train*.json and instances_val*.json (there"
            " or in annotations/), and the images in folders or zip files"
        )
    if options.model is None:
        raise TaskError(f"the detection task needs model=NAME: {MODELS}")
    if options.weights is None:
        raise TaskError("the detection task needs weights=FILE: a file with the trained network's state dict")
    refuse(options, "detection", ("crop_share",))
    state = {n: t for n, t in read_state(options.weights).items() if not n.endswith("num_batches_tracked")}
    head = state.get("head.classification_head.cls_logits.weight")
    if head is None:
        raise TaskError(f"weights file {options.weights} is not of a torchvision RetinaNet: it has no cls_logits")
    with torch.random.fork_rng(devices=[]):
        model = retinanet(options.model, len(head) // ANCHORS)
    load_weights(model, state, options.weights)
    if options.image_size is not None:  # by torchvision's ratio of 800 pixels for the shorter side to 1333
        longest = round(options.image_size * model.transform.max_size / model.transform.min_size[-1])
        model.transform.min_size, model.transform.max_size = (options.image_size,), longest
    folder = Path(options.data_dir)
    train = CocoImages(*_split_of(folder, ("train",)), lambda ids: _labels(ids, len(head) // ANCHORS))
    evaluation = CocoImages(*_split_of(folder, ("test", "val")), train.labels)
    count = min(options.samples or DEFAULT_SAMPLES, len(train))
    batch_size, workers = options.batch_size or DEFAULT_BATCH_SIZE, options.workers or 0
    sizes = train.sizes
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))[:count].tolist()
    return TaskSetup(
        model=model.eval(),
        task=RetinaNetTask(),
        calibration=loader(Subset(train, chosen), [sizes[i] for i in chosen], batch_size, workers=workers),
        train=loader(train, sizes, batch_size, shuffle=True, workers=workers),
        evaluation=loader(evaluation, evaluation.sizes, batch_size, workers=workers),
        blocks=retinanet_blocks(model),
    )


def _labels(ids: Sequence[int], classes: int) -> dict[int, int]:
    """Category id → label: by order where the model has as many classes, else the id itself, as in torchvision."""
    if classes == len(ids):
        return {category: i for i, category in enumerate(ids)}
    if classes > ids[-1]:
        return {category: category for category in ids}
    raise TaskError(
        f"the weights are for {classes} classes, the annotations have {len(ids)} categories with ids up to {ids[-1]};"
        " expected as many classes as categories (labels in the order of the ids), or more than the largest id (labels"
        " are the ids)"
    )


def _split_of(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    """The annotation file of the first of `names` that is there, and the folder or zip file of its images."""
    for name in (*(f"instances_{name}*.json" for name in names), "instances.json"):
        for place in (folder, folder / "annotations"):
            for path in sorted(place.glob(name)):
                split = path.stem.removeprefix("instances_")
                places = [folder / split, folder / "images" / split, folder / f"{split}.zip"]
                places += [folder / "images", folder / "images.zip"]
                return path, next((p for p in places if p.is_dir() or p.is_file()), folder)
    raise TaskError(
        f"{folder} holds no annotations of {' or '.join(names)}: expected"
        f" {' or '.join(f'instances_{name}*.json' for name in names)} or instances.json, there or in annotations/"
    )
