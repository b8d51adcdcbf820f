"""Object detection: torchvision's RetinaNet with focal and box losses, and any data set in COCO's format."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from tracequant.batches import Batch, Batches
from tracequant.device import measuring, model_device
from tracequant.errors import DataError, TaskError
from tracequant.match import matching
from tracequant.memory import Microbatches
from tracequant.model.discover import quantizable_names
from tracequant.model_state import frozen_evaluation
from tracequant.progress import track
from tracequant.settings import TaskOptions
from tracequant.task import Evaluation, Exported, Task, TaskSetup, checked, checked_loss
from tracequant.tasks import refuse
from tracequant.tasks.coco import CocoImages, Target, coco_metrics, loader
from tracequant.tasks.weights import load_state, read_state

try:
    import torchvision.models
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection._utils import BoxCoder, Matcher, overwrite_eps
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
except ImportError as error:
    _missing = str(error)
else:
    _missing = ""

BoxLoss = Literal["smooth_l1", "l1"]
DEFAULT_SAMPLES, DEFAULT_BATCH_SIZE = 128, 4
# At each cell of torchvision's pyramid: three sizes of three shapes.
_ANCHORS = 9
_MODELS = "torchvision:retinanet_resnet50_fpn, ..._fpn_v2, or another backbone: retinanet_resnet18_fpn, ..."
# torchvision's published weights of retinanet_resnet50_fpn were trained with BatchNorm that adds nothing to variances.
_WITHOUT_EPSILON = "eeacb38b"


class RetinaNetTask(Task):
    """What torchvision's `RetinaNet` is asked to do, on batches `(images, targets)` as torchvision's detectors take.

    `images` is a list of tensors `[3, H, W]` from 0 to 1, of any sizes; `targets` a list of dictionaries with `boxes`
    `[n, 4]` (x1, y1, x2, y2 in pixels of the image) and `labels` `[n]` from 0 to the model's `num_classes` - 1, and
    optionally `iscrowd` `[n]` and `area` `[n]`, which only the metric looks at. Images without boxes are background.

    The outputs are the heads' own, for all anchors of all pyramid levels: `cls_logits` `[N, A, classes]` and
    `bbox_regression` `[N, A, 4]`, and with them, as constants, the `anchors` `[N, A, 4]` in pixels of the image and
    their pyramid `level` `[N, A]`. Images of one size go through the model as one tensor, others after one another:
    an image's outputs are the same whatever it is batched with. Where a batch has images of different sizes, the
    shorter rows of anchors are filled up at level -1.

    The loss of an image is the sum of its focal losses (α = 0.25, γ = 2) over all anchors but those that overlap a box
    by more than `background_iou` and less than `foreground_iou`, and of its box losses over the matched anchors, both
    divided by the number of matched anchors (at least 1); that of a batch is the mean over its images. So one image's
    loss does not depend on another, and its Hessian is that of its own sums at its own, constant, number of matches.

    `box_loss` "smooth_l1", quadratic up to `beta`, is the default, because torchvision's "l1" has no curvature: by it
    every trace of the box branch is zero, and any rounding of that branch would count as free.
    """

    metric_name = "mAP %"

    def __init__(
        self,
        box_loss: BoxLoss = "smooth_l1",
        beta: float = 1 / 9,
        foreground_iou: float = 0.5,
        background_iou: float = 0.4,
    ) -> None:
        _require_torchvision()
        if box_loss not in get_args(BoxLoss) or beta <= 0 or not 0 <= background_iou <= foreground_iou <= 1:
            raise TaskError(
                f"expected box_loss in {get_args(BoxLoss)}, beta > 0, 0 <= background_iou <= foreground_iou <= 1; got"
                f" {box_loss!r}, {beta}, {background_iou}, {foreground_iou}"
            )
        self._beta = beta if box_loss == "smooth_l1" else 0.0  # at which PyTorch's smooth L1 is L1
        self._matcher = Matcher(foreground_iou, background_iou, allow_low_quality_matches=True)
        self._coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Logits and box regressions of all anchors, the anchors and their levels."""
        images, _ = _split(batch)
        found: list[dict[str, Tensor]] = [{}] * len(images)
        for group in _by_size(images):
            outputs = self._outputs(_retinanet(model), [images[i] for i in group])
            for row, i in enumerate(group):
                found[i] = {name: value[row : row + 1] for name, value in outputs.items()}
            if len(group) == len(images):
                return outputs
        anchors = max(own["level"].shape[1] for own in found)
        return {name: torch.cat([_filled(own[name], anchors, name) for own in found]) for name in found[0]}

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """`classification` and `bbox_regression`, each the mean over the images."""
        _, targets = _split(batch)
        focal, regression = outputs["cls_logits"].new_zeros(()), outputs["cls_logits"].new_zeros(())
        for n, target in enumerate(targets):
            anchors, boxes, labels = outputs["anchors"][n], *_objects(target)
            matched = self._match(boxes, anchors)
            matched = torch.where(outputs["level"][n] >= 0, matched, Matcher.BETWEEN_THRESHOLDS)
            foreground = torch.nonzero(matched >= 0).flatten()
            logits = outputs["cls_logits"][n]
            classes = torch.zeros_like(logits)
            classes[foreground, labels[matched[foreground]]] = 1
            counted = matched != Matcher.BETWEEN_THRESHOLDS
            matches = max(1, len(foreground))
            focal = focal + (sigmoid_focal_loss(logits, classes) * counted[:, None]).sum() / matches
            wanted = self._coder.encode_single(boxes[matched[foreground]], anchors[foreground])
            regression = regression + (
                F.smooth_l1_loss(outputs["bbox_regression"][n][foreground], wanted, reduction="sum", beta=self._beta)
                / matches
            )
        return {"classification": focal / len(targets), "bbox_regression": regression / len(targets)}

    def metric(self, outputs: Any, batch: Batch) -> float:
        """mAP in percent of these images alone; that of a data set is not the mean of its batches' (`evaluate`)."""
        images, targets = _split(batch)
        classes = outputs["cls_logits"].shape[-1]
        return coco_metrics(targets, self._decoded(outputs, images), classes)["AP"]

    def evaluate(self, model: nn.Module, batches: Batches, progress: bool = False) -> Evaluation:
        """COCO's metrics over all of `batches`; `details` holds those beside mAP."""
        truths: list[Target] = []
        found: list[Target] = []
        total, classes = 0.0, 0
        microbatches = Microbatches(self)
        with measuring(model), torch.no_grad():
            for batch in track(checked(batches, self, model), "Evaluating", progress):
                images, targets = _split(batch)
                outputs = microbatches.outputs(model, batch)
                loss = checked_loss(self, outputs, batch)
                found.extend(self._decoded(outputs, images, _retinanet(model)))
                truths.extend(targets)
                total += len(images) * loss.item()
                classes = outputs["cls_logits"].shape[-1]
        metrics = coco_metrics(truths, found, classes)
        details = {name: value for name, value in metrics.items() if not math.isnan(value)}
        return Evaluation(self.metric_name, metrics["AP"], total / len(truths), len(truths), details)

    def detect(self, model: nn.Module, images: Sequence[Tensor]) -> list[Target]:
        """`boxes` `[n, 4]`, `scores` `[n]` and `labels` `[n]` found in each image, as the model's own call gives."""
        batch: Batch = (list(images), [{} for _ in images])
        with frozen_evaluation(model), torch.no_grad():
            return self._decoded(self.outputs(model, batch), images, _retinanet(model))

    def batch_size(self, batch: Batch) -> int:
        """Number of images."""
        return len(_split(batch)[0])

    def select(self, batch: Batch, start: int, stop: int) -> Batch:
        """Images `start` to `stop`."""
        images, targets = _split(batch)
        return images[start:stop], targets[start:stop]

    def parts(self, batch: Batch) -> list[Batch]:
        """Batches of images of one size each."""
        images, targets = _split(batch)
        groups = _by_size(images)
        if len(groups) == 1:
            return [batch]
        return [([images[i] for i in group], [targets[i] for i in group]) for group in groups]

    def check(self, outputs: Any, batch: Batch) -> None:
        """Every box must have an area and a label that the model has."""
        _, targets = _split(batch)
        classes = outputs["cls_logits"].shape[-1]
        for n, target in enumerate(targets):
            if missing := {"boxes", "labels"} - target.keys():
                raise DataError(f"the target of image {n} has no {' and no '.join(sorted(missing))}")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.ndim != 2 or boxes.shape[1] != 4 or len(labels) != len(boxes):
                raise DataError(
                    f"image {n} has boxes of shape {list(boxes.shape)} and labels of shape {list(labels.shape)},"
                    " expected [n, 4] and [n]"
                )
            if (wrong := labels[(labels < 0) | (labels >= classes)]).numel():
                raise DataError(
                    f"image {n} has label {int(wrong[0])}; the model has {classes} classes, numbered 0 to"
                    f" {classes - 1}: number the categories without gaps, or give the model more classes"
                )
            if (flat := ~(boxes[:, 2:] > boxes[:, :2]).all(1)).any():
                raise DataError(
                    f"image {n} has box {boxes[flat][0].tolist()} without area; boxes are [x1, y1, x2, y2] with x2 > x1"
                    " and y2 > y1, not [x, y, width, height]"
                )

    def distillation_loss(self, outputs: Any, teacher_outputs: Any) -> Tensor:
        """Distance of scores and boxes to the teacher's, both weighted by where the teacher sees something.

        Classes: binary cross-entropy to the teacher's probability, weighted by the squared distance to it (the quality
        focal loss), so that it is zero where both agree. Boxes: smooth L1, weighted by the teacher's highest
        probability at the anchor. Both are divided by the sum of those probabilities (at least 1), then averaged.
        """
        wanted = teacher_outputs["cls_logits"].sigmoid()
        real = (outputs["level"] >= 0).to(wanted.dtype)
        confidence = wanted.amax(2) * real
        logits = outputs["cls_logits"]
        distance = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        focal = ((logits.sigmoid() - wanted).square() * distance).sum(2) * real
        boxes = F.smooth_l1_loss(
            outputs["bbox_regression"], teacher_outputs["bbox_regression"], reduction="none", beta=1 / 9
        ).sum(2)
        distances: Tensor = (focal + confidence * boxes).sum(1) / confidence.sum(1).clamp_min(1)
        return distances.mean()

    def exported(self, model: nn.Module) -> Exported:
        """Backbone and heads: `RetinaNetHeads`, for images of any size that are scaled, normalised and padded."""
        return _ExportedHeads(_retinanet(model), self)

    def _outputs(self, model: RetinaNet, images: list[Tensor]) -> dict[str, Tensor]:
        prepared = _prepared(model, images)
        features = model.backbone(prepared.tensors)
        levels = _levels(features)
        heads = model.head(levels)
        # Of the levels nothing but shapes is needed; they may be bfloat16, too coarse for an anchor's pixels.
        shapes = [level.new_empty(level.shape, dtype=prepared.tensors.dtype) for level in levels]
        anchors = torch.stack(model.anchor_generator(prepared, shapes))
        height, width = prepared.image_sizes[0]
        scale = anchors.new_tensor([images[0].shape[2] / width, images[0].shape[1] / height]).repeat(2)
        cells = [level.shape[2] * level.shape[3] for level in levels]
        each = anchors.shape[1] // sum(cells)
        level = torch.cat([torch.full((each * n,), i, device=anchors.device) for i, n in enumerate(cells)])
        return {
            "cls_logits": heads["cls_logits"],
            "bbox_regression": heads["bbox_regression"],
            "anchors": anchors * scale,
            "level": level.expand(len(images), -1),
        }

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """For every anchor the box that it shall find, -1 for none, -2 for neither (torchvision's `Matcher`)."""
        if not len(boxes):
            return torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        matched: Tensor = self._matcher(box_iou(boxes, anchors))
        return matched

    def _decoded(self, outputs: Any, images: Sequence[Tensor], model: RetinaNet | None = None) -> list[Target]:
        """Detections in each image's pixels, by the model's thresholds (torchvision's defaults without a model)."""
        score = 0.05 if model is None else model.score_thresh
        overlap = 0.5 if model is None else model.nms_thresh
        most = 300 if model is None else model.detections_per_img
        candidates = 1000 if model is None else model.topk_candidates
        result = []
        for n, image in enumerate(images):
            scores, level = outputs["cls_logits"][n].sigmoid(), outputs["level"][n]
            chosen: list[Tensor] = []
            for number in range(int(level.max()) + 1):
                own = torch.nonzero((scores > score) & (level == number)[:, None])
                best = scores[own[:, 0], own[:, 1]].topk(min(candidates, len(own))).indices
                chosen.append(own[best])
            anchor, label = torch.cat(chosen).unbind(1)
            boxes = self._coder.decode_single(outputs["bbox_regression"][n][anchor], outputs["anchors"][n][anchor])
            boxes = clip_boxes_to_image(boxes, (image.shape[1], image.shape[2]))
            kept = batched_nms(boxes, scores[anchor, label], label, overlap)[:most]
            result.append({"boxes": boxes[kept], "scores": scores[anchor, label][kept], "labels": label[kept]})
        return result


class RetinaNetHeads(nn.Module):
    """What a runtime computes of a RetinaNet, whose backbone and heads these are, not copies.

    From images `[N, 3, H, W]` as `model.transform` leaves them the raw `cls_logits` `[N, A, classes]` and
    `bbox_regression` `[N, A, 4]` of all anchors, in the order of `model.anchor_generator`.
    """

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`cls_logits` and `bbox_regression`."""
        features = self.backbone(images)
        heads = self.head(_levels(features))
        return heads["cls_logits"], heads["bbox_regression"]


class _ExportedHeads(Exported):
    dynamic_sizes = True

    def __init__(self, model: RetinaNet, task: Task) -> None:
        super().__init__(RetinaNetHeads(model), task)
        self._model = model

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The images of the batch, prepared."""
        images, _ = _split(self._task.to_device(batch, model_device(self._model)))
        return (_prepared(self._model, images).tensors,), {}

    def replaced(self, runtime: nn.Module) -> nn.Module:
        """The model with the runtime's heads; its own backbone still tells the sizes of the features."""
        backbone = _Remembering(self._model.backbone)
        model: nn.Module = copy.copy(self._model)
        model._modules = self._model._modules | {"backbone": backbone, "head": _HeadsOfImages(runtime, backbone)}
        return model


class _Remembering(nn.Module):
    """A backbone that keeps the images it has seen last."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.images: Tensor | None = None

    def forward(self, images: Tensor) -> Any:
        self.images = images
        return self.backbone(images)


class _HeadsOfImages(nn.Module):
    """Heads that are computed from the images, not from their features."""

    def __init__(self, runtime: nn.Module, backbone: _Remembering) -> None:
        super().__init__()
        self.runtime, self.backbone = runtime, backbone

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        logits, boxes = self.runtime(self.backbone.images)
        return {"cls_logits": logits, "bbox_regression": boxes}


def _levels(features: Any) -> list[Tensor]:
    """What a backbone returns, one tensor or several by name, as torchvision's heads take it."""
    return list(features.values()) if isinstance(features, Mapping) else [features]


def _prepared(model: RetinaNet, images: Sequence[Tensor]) -> ImageList:
    """Images scaled, normalised and padded to one tensor."""
    # In evaluation mode, lest the size be drawn at random, another one for a student than for its teacher.
    training = model.transform.training
    prepared, _ = model.transform.eval()(list(images))
    model.transform.train(training)
    return prepared


def build(options: TaskOptions) -> TaskSetup:
    """The RetinaNet that `--model` names with the weights of `--weights`, and the COCO-format data of `--data-dir`.

    Raises `TaskError` where one is missing or they do not fit one another, `DataError` for damaged data.
    """
    _require_torchvision()
    if options.data_dir is None:
        raise TaskError(
            "the detection task needs --data-dir: a folder with instances_train*.json and instances_val*.json (there or"
            " in annotations/), and the images in folders or zip files"
        )
    if options.model is None:
        raise TaskError(f"the detection task needs --model: {_MODELS}")
    if options.weights is None:
        raise TaskError("the detection task needs --weights: a file with the trained network's state dict")
    refuse(options, "detection", "crop_share")
    state = {n: t for n, t in read_state(options.weights).items() if not n.endswith("num_batches_tracked")}
    head = state.get("head.classification_head.cls_logits.weight")
    if head is None:
        raise TaskError(f"weights file {options.weights} is not of a torchvision RetinaNet: it has no cls_logits")
    with torch.random.fork_rng(devices=[]):
        model = retinanet(options.model, len(head) // _ANCHORS)
    _load(model, state, options.weights)
    if options.image_size is not None:  # by torchvision's ratio of 800 pixels for the shorter side to 1333
        longest = round(options.image_size * model.transform.max_size / model.transform.min_size[-1])
        model.transform.min_size, model.transform.max_size = (options.image_size,), longest
    folder = Path(options.data_dir)
    train = CocoImages(*_split_of(folder, ("train",)), lambda ids: _labels(ids, len(head) // _ANCHORS))
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


def retinanet(name: str, classes: int) -> RetinaNet:
    """An untrained RetinaNet by a name such as retinanet_resnet18_fpn; BatchNorm is frozen but in `_fpn_v2`.

    torchvision's own two, and the first of them on its other residual networks and MobileNets. `torchvision:` in front
    is allowed. Raises `TaskError` for other names.
    """
    found = re.fullmatch(r"(?:torchvision:)?retinanet_(\w+?)_fpn(_v2)?", name)
    if not found or (found[2] and found[1] != "resnet50"):
        raise TaskError(f"unknown model {name!r}; choose {_MODELS}")
    if found[2]:
        model: RetinaNet = torchvision.models.get_model(
            "retinanet_resnet50_fpn_v2", weights=None, weights_backbone=None, num_classes=classes
        )
        return model
    extra = LastLevelP6P7(256, 256)
    try:
        if found[1].startswith("mobilenet"):
            backbone = mobilenet_backbone(backbone_name=found[1], weights=None, fpn=True, extra_blocks=extra)
        else:
            backbone = resnet_fpn_backbone(
                backbone_name=found[1], weights=None, returned_layers=[2, 3, 4], extra_blocks=extra
            )
    except (KeyError, ValueError) as error:
        raise TaskError(f"unknown model {name!r} ({error}); choose {_MODELS}") from None
    backbone.requires_grad_(True)  # torchvision freezes the lower stages, which must adapt to their rounding too
    # The highest level is the same for all; MobileNets have one less at the lower end.
    levels = len(backbone.fpn.inner_blocks) + 2
    sides = [32 * 2**i for i in range(5)][-levels:]
    sizes = tuple(tuple(int(side * 2 ** (i / 3)) for i in range(3)) for side in sides)
    return RetinaNet(backbone, classes, anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * levels))


def retinanet_blocks(model: nn.Module) -> tuple[str, ...]:
    """Patterns of layer names, one for each block, as the paper's Figure 7 counts them.

    The stem, every block of the backbone's stages, every level of the pyramid (its two highest, which have no input of
    the backbone's, as one more) and the two heads. As `ties` they give each block one bit width.
    """
    backbone: Any = _retinanet(model).backbone
    patterns: list[str] = []
    for name, child in backbone.body.named_children():
        inner = [f"{name}.{number}" for number, _ in child.named_children()] if _is_stage(child) else [name]
        patterns.extend(f"backbone.body.{block}" for block in inner)
    patterns.extend(f"backbone.fpn.*_blocks.{i}" for i in range(len(backbone.fpn.inner_blocks)))
    patterns.extend(["backbone.fpn.extra_blocks", "head.classification_head", "head.regression_head"])
    names = quantizable_names(model)
    found = [next((p for p in (pattern, f"{pattern}.*") if matching(p, names)), None) for pattern in patterns]
    return tuple(pattern for pattern in found if pattern is not None)


def _require_torchvision() -> None:
    if _missing:
        raise TaskError(f"detection needs torchvision ({_missing}); pip install 'tracequant[detection]'")


def _split(batch: Batch) -> tuple[list[Tensor], list[Target]]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or len(batch[0]) != len(batch[1]):
        raise TaskError(
            "RetinaNetTask expects batches (images, targets): a list of tensors [3, H, W] and a list of as many"
            " dictionaries with boxes and labels; write a Task of your own for other batches"
        )
    images, targets = batch
    return list(images), list(targets)


def _retinanet(model: nn.Module) -> RetinaNet:
    if not isinstance(model, RetinaNet):
        raise TaskError(
            f"RetinaNetTask is for torchvision's RetinaNet, got a {type(model).__name__}; write a Task of your own"
            " (examples/fastestdet.py shows one)"
        )
    return model


def _by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the images of each size."""
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return list(groups.values())


def _objects(target: Target) -> tuple[Tensor, Tensor]:
    """Boxes and labels of the single objects; crowds are nothing that an anchor could match."""
    single = target["iscrowd"] == 0 if "iscrowd" in target else slice(None)
    return target["boxes"][single], target["labels"][single]


def _filled(value: Tensor, anchors: int, name: str) -> Tensor:
    """An output `[1, a, ...]` with as many anchors as asked for."""
    missing = anchors - value.shape[1]
    padding = (0, 0) * (value.ndim - 2) + (0, missing)
    return F.pad(value, padding, value=-1 if name == "level" else 0)


def _is_stage(module: nn.Module) -> bool:
    """Whether a child of a backbone is a sequence of blocks, and not one."""
    return type(module) is nn.Sequential


def _load(model: RetinaNet, state: dict[str, Tensor], path: str) -> None:
    load_state(model, state, path, f"choose another --model: {_MODELS}")
    if _WITHOUT_EPSILON in Path(path).name:
        overwrite_eps(model, 0.0)


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
