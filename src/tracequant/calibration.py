"""Ranges of activations, chosen on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracequant.batches import Batches
from tracequant.device import model_device
from tracequant.errors import ModelError
from tracequant.hooks import reading
from tracequant.model_state import frozen_evaluation
from tracequant.points import OUTPUT_BITS, OutputPoint, QuantizationPoints
from tracequant.progress import track
from tracequant.quantizer import Grid, choose_grid
from tracequant.sensitivity_result import MODEL_INPUT_BITS
from tracequant.task import Task, checked

# Values kept of each batch to choose an activation's range from; the error at that range is measured on all values.
RANGE_SAMPLE = 1 << 16


def activation_options(points: QuantizationPoints, activation_bits: Sequence[int]) -> dict[str, list[int]]:
    """The bit widths on offer by activation: these, in increasing order, and for the model's input 8 alone."""
    return {
        point.name: [MODEL_INPUT_BITS] if point.is_model_input else sorted(set(activation_bits))
        for point in points.activations
    }


def calibrate(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    bits: dict[str, list[int]],
    outputs: Sequence[OutputPoint] = (),
    progress: bool = False,
) -> dict[str, dict[int, Grid]]:
    """Grids for activation points and outputs, name → bits → grid, from one pass over `batches`.

    Ranges are those of least squared error on a sample of the values that contains the extremes. A tensor that is never
    negative gets the full grid above 0; outputs are clipped to their point's limits first.
    """
    device = model_device(model)
    samples = {name: _RangeSample(name) for name in bits}
    # Of their own random numbers: the ranges of inputs do not depend on the outputs asked for.
    results = [(point, _RangeSample(point.name)) for point in outputs]
    generators = [torch.Generator(device).manual_seed(0) for _ in range(2)]

    def read(name: str, tensor: Tensor) -> None:
        if name in samples:
            samples[name].add(tensor, generators[0])

    def returned(sample: _RangeSample, point: OutputPoint) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            sample.add(output.clamp(point.low, point.high), generators[1])

        return hook

    handles = []
    try:
        for point, sample in results:
            handles.append(model.get_submodule(point.module).register_forward_hook(returned(sample, point)))
        with frozen_evaluation(model), torch.no_grad():
            for batch in track(checked(batches, task, model), "Activation ranges", progress):
                with reading(model, points, read):
                    task.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    grids = {name: sample.grids(bits[name]) for name, sample in samples.items()}
    return grids | {point.name: sample.grids([OUTPUT_BITS]) for point, sample in results}


class _RangeSample:
    """Values of a tensor, at most `RANGE_SAMPLE` of each batch and its extremes, to choose a range from."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._parts: list[Tensor] = []

    def add(self, tensor: Tensor, generator: torch.Generator) -> None:
        if tensor.numel() == 0:
            return
        flat = tensor.detach().flatten()
        values = flat
        if flat.numel() > RANGE_SAMPLE:
            # At random: a fixed stride would meet the same few channels again and again.
            chosen = torch.randint(flat.numel(), (RANGE_SAMPLE,), generator=generator, device=flat.device)
            values = flat[chosen]
        self._parts.append(torch.cat([values, flat.amin()[None], flat.amax()[None]]))

    def grids(self, bits: Sequence[int]) -> dict[int, Grid]:
        if not self._parts:
            raise ModelError(
                f"activation of layer {self._name} was never seen: the layer is not called on these batches; exclude it"
            )
        values = torch.cat(self._parts)
        if not torch.isfinite(values).all():
            raise ModelError(f"the input of layer {self._name} is NaN or infinite on some batch")
        return {num_bits: choose_grid(values, num_bits, symmetric=False) for num_bits in bits}
