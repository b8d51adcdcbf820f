"""Ranges of activations, chosen on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tracequant.core.errors import ModelError
from tracequant.core.points import OUTPUT_BITS, OutputPoint, QuantizationPoints
from tracequant.core.progress import track
from tracequant.core.sensitivity import MODEL_INPUT_BITS
from tracequant.model.batches import Batch, Batches
from tracequant.model.device import measuring, model_device
from tracequant.model.hooks import reading
from tracequant.model.memory import Microbatches
from tracequant.model.task import Task, checked
from tracequant.quantization.grid import Grid, choose_grid

# Values kept of each call to choose an activation's range from; the error at that range is measured on all values.
RANGE_SAMPLE = 1 << 16
# Values kept of all calls on all batches: those of 16 calls, with their extremes.
POOL = 16 * (RANGE_SAMPLE + 2)


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
    names = [*bits, *(point.name for point in outputs)]
    samples = {name: _RangeSample(name) for name in names}
    # Of their own random numbers: the ranges of inputs do not depend on the outputs asked for.
    generators = [torch.Generator(device).manual_seed(0) for _ in range(2)]
    microbatches = Microbatches(task)

    def measure(batch: Batch) -> dict[str, _RangeSample]:
        """The samples of one batch, which become part of the others when all of it has fitted into memory."""
        found = {name: _RangeSample(name) for name in names}

        def read(name: str, tensor: Tensor) -> None:
            if name in bits:
                found[name].add(tensor, generators[0])

        with ExitStack() as stack:
            for point in outputs:
                hook = _returned(found[point.name], point, generators[1])
                stack.callback(model.get_submodule(point.module).register_forward_hook(hook).remove)
            stack.enter_context(reading(model, points, read))
            task.outputs(model, batch)
        return found

    with measuring(model), torch.no_grad():
        for batch in track(checked(batches, task, model), "Activation ranges", progress):
            for found in microbatches.run(batch, measure):
                for name, sample in found.items():
                    samples[name].take(sample)
    return {name: sample.grids(bits.get(name, [OUTPUT_BITS])) for name, sample in samples.items()}


def _returned(sample: _RangeSample, point: OutputPoint, generator: torch.Generator) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        sample.add(output.clamp(point.low, point.high), generator)

    return hook


class _RangeSample:
    """Values of a tensor to choose its range from: `RANGE_SAMPLE` of each call, `POOL` at most, and the extremes.

    Once there are more than `POOL` values, a random half of them stays, and of those that come later as large a share:
    all values have the same chance to be in the sample, from whatever call they are.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._parts: list[Tensor] = []
        self._size = 0
        # 2 to the power of this is how many values one in the sample stands for.
        self._halvings = 0
        self._extremes: list[Tensor] = []
        self._generator: torch.Generator | None = None

    def add(self, tensor: Tensor, generator: torch.Generator) -> None:
        """Take values of one call; `generator` chooses them where there are many."""
        if tensor.numel() == 0:
            return
        flat = tensor.detach().flatten()
        values = flat
        if flat.numel() > RANGE_SAMPLE:
            # At random: a fixed stride would meet the same few channels again and again.
            chosen = torch.randint(flat.numel(), (RANGE_SAMPLE,), generator=generator, device=flat.device)
            values = flat[chosen]
        ends = [flat.amin()[None], flat.amax()[None]]
        self._take([torch.cat([values, *ends])], 0, ends)

    def take(self, other: _RangeSample) -> None:
        """Take what another sample of the same tensor holds."""
        self._take(other._parts, other._halvings, other._extremes)

    def grids(self, bits: Sequence[int]) -> dict[int, Grid]:
        """The grids of least squared error on the sample; `ModelError` where there is none."""
        if not self._parts:
            raise ModelError(
                f"activation of layer {self._name} was never seen: the layer is not called on these batches; exclude it"
            )
        # Until values are left out, the extremes are among them.
        values = torch.cat([*self._parts, *(self._extremes if self._halvings else [])])
        if not torch.isfinite(values).all():
            raise ModelError(f"the input of layer {self._name} is NaN or infinite on some batch")
        return {num_bits: choose_grid(values, num_bits, symmetric=False) for num_bits in bits}

    def _take(self, parts: list[Tensor], halvings: int, extremes: list[Tensor]) -> None:
        if not parts:
            return
        self._halve(halvings - self._halvings)
        if self._halvings > halvings:
            parts = [self._share(torch.cat(parts), self._halvings - halvings)]
        self._parts.extend(parts)
        self._size += sum(len(part) for part in parts)
        both = [*self._extremes, *extremes]
        self._extremes = [torch.cat(both).amin()[None], torch.cat(both).amax()[None]]
        while self._size > POOL:
            self._halve(1)

    def _halve(self, times: int) -> None:
        """Keep a random half of the values so many times."""
        if times > 0:
            self._parts = [self._share(torch.cat(self._parts), times)] if self._parts else []
            self._size = sum(len(part) for part in self._parts)
            self._halvings += times

    def _share(self, values: Tensor, halvings: int) -> Tensor:
        """A random share of the values, one in 2^halvings."""
        if self._generator is None:
            self._generator = torch.Generator(values.device).manual_seed(0)
        return values[torch.rand(len(values), generator=self._generator, device=values.device) < 0.5**halvings]
