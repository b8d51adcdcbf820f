"""What a step of fine-tuning moves: parameters, momenta, moving averages, the position in the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracequant.core.errors import DataError, ModelError
from tracequant.core.settings import FinetuneSettings
from tracequant.model import distributed
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import model_device
from tracequant.quantization.batch_stream import BatchStream
from tracequant.quantization.quantizer import Quantizer, activation_quantizers, weight_quantizers

# Scales learn down to this share of what they were calibrated to.
SCALE_FLOOR = 0.01


class Training:
    """The state of a fine-tuning, all of which a checkpoint keeps."""

    def __init__(self, model: nn.Module, batches: Batches, settings: FinetuneSettings, seed: int) -> None:
        self.model = model
        quantizers = quantizers_of(model)
        self._settings = settings
        self._scales: list[Tensor] = [quantizer.scale for quantizer in quantizers]
        # A step of plain SGD may carry a small scale across zero, from where nothing brings it back.
        self.floors = [SCALE_FLOOR * scale.detach() for scale in self._scales]
        self.bits = [quantizer.num_bits for quantizer in quantizers]
        self.optimizer = _make_optimizer(model, self._scales, settings)
        self.average = MovingAverage(model, settings.ema) if settings.ema > 0 else None
        self.stream = BatchStream(reusable(batches), seed)
        self.losses = Losses(_losses_at_a_time(model_device(model)))

    def step(self, loss: Tensor, number: int) -> None:
        """Take step `number` down the gradient of `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(number)
        self.losses.append(loss)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        distributed.average_gradients(self.model.parameters())
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_maximum_(self._scales, self.floors)
        if self.average is not None:
            self.average.update()

    def _learning_rate(self, number: int) -> float:
        settings = self._settings
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * number / settings.steps))


class Losses:
    """Losses of all steps, read from the device `at_a_time`: each reading makes the host wait for a GPU."""

    def __init__(self, at_a_time: int) -> None:
        self._read: list[float] = []
        self._pending: list[Tensor] = []
        self._at_a_time = at_a_time

    def append(self, loss: Tensor) -> None:
        """Note a loss, as the mean over the processes."""
        mean = loss.detach().clone()
        distributed.average([mean])
        self._pending.append(mean)
        if len(self._pending) >= self._at_a_time:
            self.read()

    def read(self) -> list[float]:
        """All losses; `DataError` if one of them is not finite."""
        if self._pending:
            values = torch.stack(self._pending).tolist()
            self._pending.clear()
            for value in values:
                if not math.isfinite(value):
                    raise DataError(
                        f"the loss became {value} in fine-tuning, at step {len(self._read)}; try a smaller"
                        " learning_rate or more bits"
                    )
                self._read.append(value)
        return list(self._read)

    def restore(self, losses: Sequence[float]) -> None:
        """Begin with the losses of an earlier run."""
        self._read = list(losses)


class MovingAverage:
    """Exponential moving averages of all parameters, scales included."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present parameters."""
        torch._foreach_lerp_(self.values, self._parameters, 1 - self._decay)

    @torch.no_grad()
    def replace(self) -> None:
        """Put the averages in the model."""
        torch._foreach_copy_(self._parameters, self.values)

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Begin with the averages of an earlier run."""
        for own, value in zip(self.values, values, strict=True):
            own.copy_(value)


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """All quantizers of a model, each once; `ModelError` if there are none."""
    quantizers: list[Quantizer] = [*weight_quantizers(model).values(), *activation_quantizers(model).values()]
    if not quantizers:
        raise ModelError("the model is not quantized: call tracequant.quantize first")
    return list(dict.fromkeys(quantizers))


def _losses_at_a_time(device: torch.device) -> int:
    return 1 if device.type == "cpu" else 50


def _make_optimizer(model: nn.Module, scales: Sequence[Tensor], settings: FinetuneSettings) -> torch.optim.Optimizer:
    """The optimizer, with weights that decay, the other parameters, and the scales if they learn."""
    learned = settings.scales == "lsq"
    for scale in scales:
        scale.requires_grad_(learned)
    scale_ids = {id(scale) for scale in scales}
    others = [parameter for parameter in model.parameters() if id(parameter) not in scale_ids]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if learned:
        own = [parameter for parameter in model.parameters() if id(parameter) in scale_ids]
        groups.append({"params": own, "weight_decay": 0.0})
    # One call for all parameters: on a CPU the default is a loop in Python, which takes longer than the arithmetic.
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, foreach=True)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, foreach=True)
