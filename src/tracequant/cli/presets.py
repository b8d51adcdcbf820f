"""Named bundles of options for the command line: `--preset NAME`. Options on the command line win over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The recipe of fine-tuning is ours: the paper says only that it is quantization-aware. With four processes (`torchrun`)
# of 64 images it is ten passes over ImageNet.
_FINETUNE = {"finetune_steps": 50_000, "learning_rate": 0.01, "optimizer": "sgd", "distillation": 0.0}
_ANALYZE = {"task": "imagenet", "samples": 512, "batch_size": 64, "criterion": "trace"}
# The paper states the lowest width of mixed activations, 4 bits. It states their average for RetinaNet alone (Table 2).
_MIXED_ACTIVATIONS = {"activation_compression": 7.62}


@dataclass(frozen=True)
class Preset:
    """Values of options by the stage that they belong to, under the names of the commands' parameters."""

    about: str
    analyze: dict[str, Any]
    plan: dict[str, Any]
    finetune: dict[str, Any]

    def defaults(self, command: str) -> dict[str, Any]:
        """The values that a command has options for."""
        stages = {"analyze": self.analyze, "plan": self.plan, "finetune": self.finetune}
        return stages[command] if command in stages else self.analyze | self.plan | self.finetune


# Sizes in the paper are W-Comp times smaller than the float checkpoint, and do not count scales, biases and BatchNorm.
# W-Comp is therefore the budget here. The paper states the lowest of the widths on offer.
PRESETS = {
    "paper-resnet50": Preset(
        "HAWQ-V2, Table 1a: 75.92 % at 7.99 MB, W-Comp 12.24x (float 77.39 % at 97.8 MB)",
        # The published weights whose accuracy, 76.13 %, is nearest to the paper's.
        _ANALYZE
        | {
            "model": "torchvision:resnet50",
            "weights": "IMAGENET1K_V1",
            "weight_bits": "2,3,4,8",
            "activation_bits": "4,8",
        },
        {"compression": 12.24} | _MIXED_ACTIVATIONS,
        _FINETUNE,
    ),
    "paper-inceptionv3": Preset(
        "HAWQ-V2, Table 1b: 75.98 % at 7.57 MB, W-Comp 12.04x (float 77.45 % at 91.2 MB)",
        _ANALYZE | {"model": "torchvision:inception_v3", "weight_bits": "2,3,4,8", "activation_bits": "4,8"},
        {"compression": 12.04} | _MIXED_ACTIVATIONS,
        _FINETUNE,
    ),
    "paper-squeezenext": Preset(
        "HAWQ-V2, Table 1c: 68.68 % at 1.07 MB, W-Comp 9.40x (float 69.38 % at 10.1 MB)",
        _ANALYZE | {"model": "squeezenext:2.0", "weight_bits": "3,4,8", "activation_bits": "8"},
        {"compression": 9.40},
        _FINETUNE,
    ),
}
