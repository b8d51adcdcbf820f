"""torchvision's RetinaNet as a task: focal and box losses, mAP, the heads as an ONNX file, and untrained networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracequant.core.errors import DataError, TaskError
from tracequant.core.progress import track
from tracequant.model.batches import Batch, Batches
from tracequant.model.device import measuring, model_device
from tracequant.model.memory import Microbatches
from tracequant.model.state import frozen_evaluation
from tracequant.model.task import Evaluation, Exported, Task, checked, checked_loss
from tracequant.tasks.coco import Target, coco_metrics
from tracequant.tasks.networks.retinanet import as_retinanet, require_torchvision

try:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection._utils import BoxCoder, Matcher
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss
except ImportError:
    pass  # the task says so when it is made


BoxLoss = Literal["smooth_l1", "l1"]


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
        require_torchvision()
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
        rows: list[dict[str, Tensor]] = [{}] * len(images)
        for group in _by_size(images):
            outputs = self._outputs(as_retinanet(model), [images[i] for i in group])
            for row, i in enumerate(group):
                rows[i] = {name: value[row : row + 1] for name, value in outputs.items()}
            if len(group) == len(images):
                return outputs
        anchors = max(row["level"].shape[1] for row in rows)
        return {name: torch.cat([_filled(row[name], anchors, name) for row in rows]) for name in rows[0]}

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
        """COCO's metrics over all of `batches`; `details` holds the others than mAP."""
        truths: list[Target] = []
        detections: list[Target] = []
        total, classes = 0.0, 0
        microbatches = Microbatches(self)
        with measuring(model), torch.no_grad():
            for batch in track(checked(batches, self, model), "Evaluating", progress):
                images, targets = _split(batch)
                outputs = microbatches.outputs(model, batch)
                loss = checked_loss(self, outputs, batch)
                detections.extend(self._decoded(outputs, images, as_retinanet(model)))
                truths.extend(targets)
                total += len(images) * loss.item()
                classes = outputs["cls_logits"].shape[-1]
        metrics = coco_metrics(truths, detections, classes)
        details = {name: value for name, value in metrics.items() if not math.isnan(value)}
        return Evaluation(self.metric_name, metrics["AP"], total / len(truths), len(truths), details=details)

    def detect(self, model: nn.Module, images: Sequence[Tensor]) -> list[Target]:
        """`boxes` `[n, 4]`, `scores` `[n]` and `labels` `[n]` found in each image, as the model's own call gives."""
        batch: Batch = (list(images), [{} for _ in images])
        with frozen_evaluation(model), torch.no_grad():
            return self._decoded(self.outputs(model, batch), images, as_retinanet(model))

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

    def distillation_loss(self, outputs: Any, teacher_outputs: Any, batch: Batch) -> Tensor:
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
        return _ExportedHeads(as_retinanet(model), self)

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
                above = torch.nonzero((scores > score) & (level == number)[:, None])
                best = scores[above[:, 0], above[:, 1]].topk(min(candidates, len(above))).indices
                chosen.append(above[best])
            anchor, label = torch.cat(chosen).unbind(1)
            boxes = self._coder.decode_single(outputs["bbox_regression"][n][anchor], outputs["anchors"][n][anchor])
            boxes = clip_boxes_to_image(boxes, (image.shape[1], image.shape[2]))
            survivors = batched_nms(boxes, scores[anchor, label], label, overlap)[:most]
            result.append(
                {"boxes": boxes[survivors], "scores": scores[anchor, label][survivors], "labels": label[survivors]}
            )
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
        """The model with the runtime's heads; its own backbone still computes the sizes of the features."""
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
    # In evaluation mode: in training mode the size is random, and a student and its teacher would get different ones.
    training = model.transform.training
    prepared, _ = model.transform.eval()(list(images))
    model.transform.train(training)
    return prepared


def _split(batch: Batch) -> tuple[list[Tensor], list[Target]]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or len(batch[0]) != len(batch[1]):
        raise TaskError(
            "RetinaNetTask expects batches (images, targets): a list of tensors [3, H, W] and a list of as many"
            " dictionaries with boxes and labels; write a Task of your own for other batches"
        )
    images, targets = batch
    return list(images), list(targets)


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
