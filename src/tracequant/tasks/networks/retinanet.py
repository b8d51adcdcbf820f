"""Untrained RetinaNets by name, the blocks of one, and their published weights."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from tracequant.core.errors import TaskError
from tracequant.model.discover import quantizable_names

try:
    import torchvision.models
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection._utils import overwrite_eps
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
except ImportError as error:
    _missing = str(error)
else:
    _missing = ""
from pathlib import Path

from tracequant.core.match import matching
from tracequant.tasks.weights import load_state

# At each cell of torchvision's pyramid: three sizes of three shapes.
ANCHORS = 9
# torchvision's published weights of retinanet_resnet50_fpn were trained with BatchNorm that adds nothing to variances.
_WITHOUT_EPSILON = "eeacb38b"
MODELS = "torchvision:retinanet_resnet50_fpn, ..._fpn_v2, or another backbone: retinanet_resnet18_fpn, ..."


def retinanet(name: str, classes: int) -> RetinaNet:
    """An untrained RetinaNet by a name such as retinanet_resnet18_fpn; BatchNorm is frozen but in `_fpn_v2`.

    torchvision's own two, and the first of them on its other residual networks and MobileNets. `torchvision:` in front
    is allowed. Raises `TaskError` for other names.
    """
    name_match = re.fullmatch(r"(?:torchvision:)?retinanet_(\w+?)_fpn(_v2)?", name)
    if not name_match or (name_match[2] and name_match[1] != "resnet50"):
        raise TaskError(f"unknown model {name!r}; choose {MODELS}")
    if name_match[2]:
        model: RetinaNet = torchvision.models.get_model(
            "retinanet_resnet50_fpn_v2", weights=None, weights_backbone=None, num_classes=classes
        )
        return model
    extra = LastLevelP6P7(256, 256)
    try:
        if name_match[1].startswith("mobilenet"):
            backbone = mobilenet_backbone(backbone_name=name_match[1], weights=None, fpn=True, extra_blocks=extra)
        else:
            backbone = resnet_fpn_backbone(
                backbone_name=name_match[1], weights=None, returned_layers=[2, 3, 4], extra_blocks=extra
            )
    except (KeyError, ValueError) as error:
        raise TaskError(f"unknown model {name!r} ({error}); choose {MODELS}") from None
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
    backbone: Any = as_retinanet(model).backbone
    patterns: list[str] = []
    for name, child in backbone.body.named_children():
        inner = [f"{name}.{number}" for number, _ in child.named_children()] if _is_stage(child) else [name]
        patterns.extend(f"backbone.body.{block}" for block in inner)
    patterns.extend(f"backbone.fpn.*_blocks.{i}" for i in range(len(backbone.fpn.inner_blocks)))
    patterns.extend(["backbone.fpn.extra_blocks", "head.classification_head", "head.regression_head"])
    names = quantizable_names(model)
    present = [next((p for p in (pattern, f"{pattern}.*") if matching(p, names)), None) for pattern in patterns]
    return tuple(pattern for pattern in present if pattern is not None)


def _is_stage(module: nn.Module) -> bool:
    """Whether a child of a backbone is a sequence of blocks, and not one."""
    return type(module) is nn.Sequential


def load_weights(model: RetinaNet, state: dict[str, Tensor], path: str) -> None:
    """Put a state dict from the file `path` into the model; `TaskError` where the two do not fit."""
    load_state(model, state, path, f"choose another model=NAME: {MODELS}")
    if _WITHOUT_EPSILON in Path(path).name:
        overwrite_eps(model, 0.0)


def as_retinanet(model: nn.Module) -> RetinaNet:
    """The model itself; `TaskError` if it is not torchvision's RetinaNet."""
    if not isinstance(model, RetinaNet):
        raise TaskError(
            f"RetinaNetTask is for torchvision's RetinaNet, got a {type(model).__name__}; write a Task of your own"
            " (examples/fastestdet.py shows one)"
        )
    return model


def require_torchvision() -> None:
    """Raise `TaskError` that says what to install where torchvision is missing."""
    if _missing:
        raise TaskError(f"detection needs torchvision ({_missing}); pip install 'tracequant[detection]'")
