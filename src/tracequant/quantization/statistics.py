"""Means and variances of a quantized model brought back to the float model's, where held-out inputs gain by it.

Rounding weights moves the mean and the variance of every channel. With m, v a channel's mean and variance in the
quantized model and m', v' those in the float model on the same inputs, the channel x is corrected to

    a · x + (m' − a · m),   a = √((v' + ε) / (v + ε)).

At the input of a BatchNorm this is the same as other running statistics, μ → (μ − b) / a and σ² + ε → (σ² + ε) / a², b
being the shift above. At the output of a layer with a bias and without BatchNorm's scale, a = 1 and the bias takes the
shift (bias correction). So no parameters are added. In contrast to re-estimation, which takes the statistics of the
calibration inputs themselves, a model that rounding did not change keeps its statistics exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tracequant.core.errors import ModelError, TaskError
from tracequant.core.progress import track
from tracequant.model.batches import Batch, Batches, reusable
from tracequant.model.device import measuring, model_device
from tracequant.model.hooks import replace_inputs
from tracequant.model.kinds import CONVOLUTIONS, TRANSPOSED
from tracequant.model.memory import Microbatches
from tracequant.model.task import Task, check_arguments, checked

# Samples that must be there to fit a correction, and as many to judge it.
MINIMUM_SAMPLES = 8
# Shares of the way from the quantized model's statistics to the float model's that are tried.
SHARES = (1.0, 0.5)
# A correction must lower the distance to the float model's outputs by this share of it.
MINIMUM_GAIN = 0.02
# Differences between distances that may be float32's rounding.
NOISE = 1e-8
_BIASED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class StatisticsCorrection:
    """What `correct_statistics` did to a model, and why.

    `share` is how much of the way to the float model's statistics was taken, 0 where nothing was changed; `norms` and
    `biases` count the BatchNorms and the layers with a bias that were corrected. `distance_before` and `distance_after`
    are distances to the float model's outputs on `judged` samples that the correction was not fitted to; both are None
    where nothing could be judged, and `reason` then says why.
    """

    share: float = 0.0
    norms: int = 0
    biases: int = 0
    fitted: int = 0
    judged: int = 0
    distance_before: float | None = None
    distance_after: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.distance_before is None or self.distance_after is None:
            return f"statistics left as they are: {self.reason}"
        of = f"on {self.judged} samples apart from the {self.fitted} that it was fitted to"
        if not self.share:
            return (
                f"statistics left as they are: a correction takes the distance to the float model's outputs from"
                f" {self.distance_before:.4g} to {self.distance_after:.4g} {of}"
            )
        counts = [(self.norms, "BatchNorm"), (self.biases, "bias")]
        places = " and ".join(
            f"{count} {name}{'' if count == 1 else 'es' if name == 'bias' else 's'}" for count, name in counts if count
        )
        way = "all" if self.share == 1 else f"{self.share:g}"
        return (
            f"statistics of {places} moved {way} of the way to the float model's: the distance to its outputs fell from"
            f" {self.distance_before:.4g} to {self.distance_after:.4g} {of}"
        )


def correct_statistics(
    quantized: nn.Module, model: nn.Module, batches: Batches, task: Task, *, progress: bool = False
) -> StatisticsCorrection:
    """What was applied to `quantized`, a copy of `model` with rounded weights, whose statistics change in place.

    Running statistics of BatchNorms, and biases of convolutions and linear layers, are fitted to one part of `batches`,
    which need no labels beyond those that the task's distillation loss asks for, and judged on the other part by
    `task.distillation_loss`. Only what gains there is applied, fitted anew to all of them. A single batch is cut in
    two. With fewer than `MINIMUM_SAMPLES` in a part nothing is changed. BatchNorms without running statistics,
    torchvision's frozen ones, other norms, and layers that the forward pass does not call stay as they are. Layers are
    fitted in the order of the forward pass, each with those before it corrected. It costs about five forward passes
    over `batches`, and gives the same values each time it is called on the same model and batches. Modes and random
    states stay as they were; `model` is untouched.

    Raises `ModelError` where `quantized` is not a copy of `model`, or a layer's values are NaN or infinite.
    """
    check_arguments(model, batches, task)
    check_arguments(quantized, batches, task)
    places = _places(quantized, model)
    if not places:
        return StatisticsCorrection(reason="the model has neither BatchNorms with running statistics nor biases")
    batches = reusable(batches)
    with measuring(model), measuring(quantized):
        fit = _Fit(quantized, model, task, places)
        fitted = fit.run(track(_half(batches, task, model, 0), "Statistics, fitting", progress))
        candidates = [fit.changes(share) for share in SHARES]
        try:
            judging = track(_half(batches, task, model, 1), "Statistics, judging", progress)
            (before, *after), judged = _distances(quantized, model, task, judging, [{}, *candidates])
        except TaskError as error:
            return StatisticsCorrection(fitted=fitted, reason=f"its outputs cannot be compared ({error})")
        if min(fitted, judged) < MINIMUM_SAMPLES:
            reason = f"fewer than {MINIMUM_SAMPLES} calibration samples to fit a correction to, or to judge it by"
            return StatisticsCorrection(fitted=fitted, judged=judged, reason=reason)
        best = min(range(len(after)), key=lambda number: after[number])
        result = StatisticsCorrection(fitted=fitted, judged=judged, distance_before=before, distance_after=after[best])
        if not after[best] < (1 - MINIMUM_GAIN) * before - NOISE:
            return result
        fit = _Fit(quantized, model, task, places)
        fit.run(track(_half(batches, task, model, None), "Statistics, all inputs", progress))
        changes = fit.changes(SHARES[best])
    with torch.no_grad():
        for tensor, values in _targets(quantized, changes):
            tensor.copy_(values)
    norms = sum(isinstance(quantized.get_submodule(name), _BatchNorm) for name in changes)
    return replace(result, share=SHARES[best], norms=norms, biases=len(changes) - norms)


@dataclass(frozen=True)
class _Moments:
    """Mean and variance `[C]` of the channels of `count` positions, in float64."""

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, values: Tensor, axis: int) -> _Moments:
        dims = [dim for dim in range(values.ndim) if dim != axis % values.ndim]
        wide = values.detach() if values.dtype == torch.float64 else values.detach().float()
        if not dims:
            return cls(1, wide.double(), torch.zeros_like(wide, dtype=torch.float64))
        variance, mean = torch.var_mean(wide, dims, correction=0)
        return cls(values.numel() // values.shape[axis], mean.double(), variance.double())

    def __add__(self, other: _Moments) -> _Moments:
        count = self.count + other.count
        share = other.count / count
        step = other.mean - self.mean
        variance = torch.lerp(self.variance, other.variance, share) + share * (1 - share) * step.square()
        return _Moments(count, self.mean + share * step, variance)


# Place → moments of the quantized and of the float model.
_Pairs = dict[str, tuple[_Moments, _Moments]]
# Place → new values: running mean and variance, or the bias.
_Changes = Mapping[str, tuple[Tensor, ...]]


def _places(quantized: nn.Module, model: nn.Module) -> dict[str, int]:
    """Modules whose statistics can be corrected, and the axis of their channels."""
    if quantized is model or model_device(quantized) != model_device(model):
        raise ModelError(
            "expected a quantized copy of the float model on the same device, got the model itself or one on another"
            " device; pass the copy that tracequant.quantize makes"
        )
    modules = dict(model.named_modules())
    holders: dict[int, int] = {}
    for module in quantized.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    places = {}
    for name, module in quantized.named_modules():
        axis = _channel_axis(module)
        bias = _bias(module)
        if axis is None or (bias is not None and holders[id(bias)] > 1):
            continue
        original = modules.get(name)
        if original is None or [t.shape for t in _statistics(original)] != [t.shape for t in _statistics(module)]:
            raise ModelError(
                f"layer {name} of the quantized model is not in the float model with the same channels; pass the float"
                " model that the quantized one was made from"
            )
        places[name] = axis
    return places


def _channel_axis(module: nn.Module) -> int | None:
    """The axis of channels at a BatchNorm's input or a layer's output; None for what cannot be corrected."""
    if isinstance(module, _BatchNorm):
        return None if module.running_mean is None or module.running_var is None else 1
    if _bias(module) is None:
        return None
    return -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)  # type: ignore[arg-type]


def _bias(module: nn.Module) -> Tensor | None:
    """The bias of a convolution or a linear layer, where it is a plain parameter."""
    return module._parameters.get("bias") if isinstance(module, _BIASED) else None


def _statistics(module: nn.Module) -> tuple[Tensor, ...]:
    """The tensors of a place that a correction changes."""
    if isinstance(module, _BatchNorm):
        return tuple(t for t in (module.running_mean, module.running_var) if t is not None)
    bias = _bias(module)
    return () if bias is None else (bias,)


class _Fit:
    """Moments of all places in both models, over inputs that are run through the two one batch after another."""

    def __init__(self, quantized: nn.Module, model: nn.Module, task: Task, places: Mapping[str, int]) -> None:
        self._quantized, self._model, self._task, self._places = quantized, model, task, places
        self._pairs: _Pairs = {}

    def run(self, batches: Iterable[Batch]) -> int:
        """Add batches; returns the number of their samples."""
        microbatches = Microbatches(self._task)
        samples = 0
        for batch in batches:
            for pairs in microbatches.run(batch, self._measured):
                for name, pair in pairs.items():
                    self._pairs[name] = self._joined(name, pair)
            samples += self._task.batch_size(batch)
        for name, pair in self._pairs.items():
            if not all(bool(moments.variance.isfinite().all()) for moments in pair):
                raise ModelError(f"the values of layer {name} are NaN or infinite on some batch")
        return samples

    def changes(self, share: float) -> _Changes:
        """New statistics of all places that were reached, this share of the way from what they are."""
        changes = {}
        for name, pair in self._pairs.items():
            module = self._quantized.get_submodule(name)
            scale, shift = _correction(module, pair, share)
            if isinstance(module, _BatchNorm):
                mean, variance = (t.double() for t in _statistics(module))
                values: tuple[Tensor, ...] = (
                    (mean - shift) / scale,
                    ((variance + module.eps) / scale.square() - module.eps).clamp(min=0),
                )
            else:
                values = (_statistics(module)[0].detach().double() + shift,)
            changes[name] = tuple(value.to(t.dtype) for value, t in zip(values, _statistics(module), strict=True))
        return changes

    def _joined(self, name: str, pair: tuple[_Moments, _Moments]) -> tuple[_Moments, _Moments]:
        if name not in self._pairs:
            return pair
        quantized, original = self._pairs[name]
        return quantized + pair[0], original + pair[1]

    def _measured(self, batch: Batch) -> _Pairs:
        """The moments of one batch. In the quantized model every place is corrected by all that is known by then."""
        calls: dict[str, list[_Moments]] = {}
        pairs: _Pairs = {}

        def note(name: str, values: Tensor) -> None:
            if not values.numel():
                return
            calls.setdefault(name, []).append(_Moments.of(values, self._places[name]))

        def correct(name: str, values: Tensor) -> Tensor | None:
            # A module may be called several times; its calls come in the same order in both models.
            if not values.numel() or not calls.get(name):
                return None
            axis = self._places[name]
            pair = (_Moments.of(values, axis), calls[name].pop(0))
            if name in pairs:
                pair = (pairs[name][0] + pair[0], pairs[name][1] + pair[1])
            pairs[name] = pair
            scale, shift = _correction(self._quantized.get_submodule(name), self._joined(name, pair), 1.0)
            shape = [1] * values.ndim
            shape[axis] = -1
            return values * scale.to(values.dtype).view(shape) + shift.to(values.dtype).view(shape)

        with torch.no_grad():
            with _watched(self._model, self._places, note):
                self._task.outputs(self._model, batch)
            with _watched(self._quantized, self._places, correct):
                self._task.outputs(self._quantized, batch)
        return pairs


def _correction(module: nn.Module, pair: tuple[_Moments, _Moments], share: float) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C]` that bring a channel this share of the way to the float model's mean and variance."""
    quantized, original = pair
    scale = torch.ones_like(quantized.mean)
    if isinstance(module, _BatchNorm):
        # Channels that hardly vary are left alone: BatchNorm's own ε divides them.
        eps = max(module.eps, 1e-12)
        scale = ((original.variance + eps) / (quantized.variance + eps)).pow(share / 2)
    mean = torch.lerp(quantized.mean, original.mean, share)
    return scale, mean - scale * quantized.mean


@contextmanager
def _watched(
    model: nn.Module, places: Mapping[str, int], read: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `read(place, values)` on the input of every BatchNorm and the output of every other place.

    What `read` returns replaces the values; None leaves them.
    """
    with ExitStack() as stack:
        for name in places:
            module = model.get_submodule(name)

            def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
                return replace_inputs(module, args, kwargs, lambda values: read(name, values))

            def after(module: nn.Module, args: Any, output: Any, name: str = name) -> Any:
                return read(name, output) if isinstance(output, Tensor) else None

            if isinstance(module, _BatchNorm):
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = module.register_forward_hook(after)
            stack.callback(handle.remove)
        yield


def _targets(model: nn.Module, changes: _Changes) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of the model and what they become."""
    for name, values in changes.items():
        yield from zip(_statistics(model.get_submodule(name)), values, strict=True)


@contextmanager
def _changed(model: nn.Module, changes: _Changes) -> Iterator[None]:
    """The model with these statistics inside the block, and with those of before afterwards, bit for bit."""
    before = [(tensor, tensor.detach().clone()) for tensor, _ in _targets(model, changes)]
    try:
        with torch.no_grad():
            for tensor, values in _targets(model, changes):
                tensor.copy_(values)
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)


def _distances(
    quantized: nn.Module, model: nn.Module, task: Task, batches: Iterable[Batch], candidates: list[_Changes]
) -> tuple[list[float], int]:
    """The mean distance between the two models' outputs under each of the candidates, and the number of samples."""
    microbatches = Microbatches(task)
    sums = [0.0] * len(candidates)
    total = samples = 0
    for batch in batches:
        weight = task.counted(batch)
        total += weight
        samples += task.batch_size(batch)
        with torch.no_grad():
            wanted = microbatches.outputs(model, batch)
            for number, changes in enumerate(candidates):
                with _changed(quantized, changes):
                    outputs = microbatches.outputs(quantized, batch)
                sums[number] += weight * float(task.distillation_loss(outputs, wanted, batch))
    # What is not a number is no gain.
    return [math.inf if math.isnan(value) else value / max(total, 1) for value in sums], samples


def _half(batches: Batches, task: Task, model: nn.Module, half: int | None) -> Iterator[Batch]:
    """Every second batch, 0 to fit and 1 to judge, or the two halves of a single batch; None for all."""
    # A loader that shuffles or augments by torch's generator gives the same batches each time.
    torch.manual_seed(0)
    stream = iter(checked(batches, task, model))
    first, second = next(stream), next(stream, None)
    if second is None and half is not None:
        size = task.batch_size(first)
        cut = (size + 1) // 2
        if size - cut < MINIMUM_SAMPLES:
            return
        parts = []
        # A batch that cannot be divided, or a model that knows one size of batch only.
        with suppress(Exception), torch.no_grad():
            part = task.select(first, 0, cut) if half == 0 else task.select(first, cut, size)
            task.outputs(model, part)
            parts.append(part)
        yield from parts
        return
    others = () if second is None else (second,)
    for number, batch in enumerate(itertools.chain((first,), others, stream)):
        # 0, 1, 1, 0, ...: both halves see both parts of batches that are cut in two (`Task.parts`).
        if half is None or (number + 1) // 2 % 2 == half:
            yield batch
