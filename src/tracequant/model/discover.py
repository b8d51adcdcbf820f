"""Discovery of a model's quantization points: every weight and every tensor that can be given a bit width."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from tracequant.core.errors import DataError, ModelError
from tracequant.core.match import match_names, some_names
from tracequant.core.options import resolve, takes
from tracequant.core.points import Layer, QuantizationPoints, StoredTensor
from tracequant.core.settings import DiscoverSettings
from tracequant.model.batches import Batches
from tracequant.model.calls import group_activations, output_points, record_calls
from tracequant.model.hooks import weight_parameter
from tracequant.model.kinds import DTYPE_NAMES
from tracequant.model.mean_loss import check_mean_loss
from tracequant.model.memory import on_first_batch
from tracequant.model.sites import check_plain, example, first_look, matrix_names
from tracequant.model.state import fingerprint
from tracequant.model.task import Task, check_arguments


@takes(DiscoverSettings)
def discover(
    model: nn.Module, batches: Batches, task: Task, settings: DiscoverSettings | None = None, **fields: object
) -> QuantizationPoints:
    """The quantization points of `model`, found in one forward pass over the first of `batches`.

    A layer is a parameter of two or more axes that a convolution, a matrix product, an embedding, an attention or a
    recurrent operation reads: those of torch's own modules of these kinds, and every other parameter that such an
    operation reads in the example pass, whatever module holds it. Parameters that are only added or multiplied
    elementwise are no layers. A weight matrix that stays in float is named in a warning with its share of the
    parameters.

    `include` and `exclude` are shell patterns that must match a whole layer name ("layer1.*" does not match
    "layer10.conv"). Each pattern of `ties` makes one group of layers that share their bit width, of those that are
    left.

    Raises `ModelError` for a pattern that matches no layer of the model, or if no layer is left, `DataError` for
    batches that cannot be used, and `TaskError` for arguments in another order and for a loss that is a sum over the
    batch (`check_mean_loss`). Where the first batch does not fit into memory, fewer of its samples are taken.
    """
    request = resolve(DiscoverSettings, settings, fields)
    check_arguments(model, batches, task)
    if isinstance(batches, Iterator):
        raise DataError(
            "batches is an iterator, which can be read only once, and discover would take its first batch away from the"
            " next step; pass a list or a DataLoader"
        )
    check_plain(model)
    # A few samples show what the whole batch does.
    batch, matrices = first_look(model, batches, task)
    _warn_of_others(model, matrices.others)
    names = list(matrices.layers)
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no quantizable layer: expected at least one weight that a convolution, a"
            " linear layer, an embedding, an attention, a recurrent layer or a matrix product reads"
        )
    kept = set(match_names(request.include, names, "include")) - set(match_names(request.exclude, names, "exclude"))
    if not kept:
        raise ModelError(
            f"no layer is left: include {list(request.include)}, exclude {list(request.exclude)},"
            f" layers {some_names(names)}"
        )
    candidates = {name: matrix for name, matrix in matrices.layers.items() if name in kept}

    calls, _ = on_first_batch(
        task, [batch], lambda few: record_calls(model, example(model, few, task), task, candidates)
    )
    check_mean_loss(model, batches, task, calls.outputs, calls.batch)
    points = group_activations(calls)
    point_of = {consumer: point.name for point in points for consumer in point.consumers}
    modules = dict(model.named_modules())
    layers = []
    for name, matrix in candidates.items():
        module, parameter = modules[matrix.sites[0][0]], matrix.sites[0][1]
        weight = getattr(module, parameter)
        layers.append(
            Layer(
                name=name,
                kind=type(module).__name__,
                sites=matrix.sites,
                shape=tuple(weight.shape),
                channel_axis=matrix.channel_axis,
                macs=round(calls.macs.get(name, 0.0)),
                activation=next(
                    (point_of[s[0]] for s in matrix.sites if s in matrix.of_input and s[0] in point_of), None
                ),
            )
        )
    return QuantizationPoints(
        layers=tuple(layers),
        activations=tuple(points),
        ties=_tie_groups(request.ties, names, kept),
        float_tensors=tuple(_float_tensors(model, layers)),
        fingerprint=fingerprint(model),
        outputs=tuple(output_points(modules, layers, calls.flow)),
    )


def quantizable_names(model: nn.Module) -> list[str]:
    """Names of the layers that the classes of the model's modules tell, in the order of registration."""
    return matrix_names(model)


def _warn_of_others(model: nn.Module, others: dict[str, nn.Parameter]) -> None:
    """Warn of weight matrices that stay in float, with their share of the parameters."""
    if not others:
        return
    total = sum(parameter.numel() for parameter in model.parameters())
    shares = {name: parameter.numel() / total for name, parameter in others.items()}
    largest = sorted(shares, key=lambda name: -shares[name])
    matrices = "matrix stays" if len(others) == 1 else "matrices stay"
    warnings.warn(
        f"{len(others)} weight {matrices} in float, {sum(shares.values()):.1%} of the model's parameters:"
        f" {some_names([f'{name} ({shares[name]:.1%})' for name in largest])}; the model multiplies with something"
        " computed from them, or does not use them in the first batch",
        stacklevel=4,
    )


def _tie_groups(patterns: Sequence[str], names: list[str], kept: set[str]) -> tuple[tuple[str, ...], ...]:
    groups = []
    taken: dict[str, str] = {}
    for pattern in patterns:
        # Of all layers: those of a block may have been left out.
        group = tuple(name for name in match_names([pattern], names, "ties") if name in kept)
        for name in group:
            if name in taken:
                raise ModelError(f"layer {name} is in two ties, {taken[name]!r} and {pattern!r}; make them one pattern")
            taken[name] = pattern
        if len(group) > 1:
            groups.append(group)
    return tuple(groups)


def _float_tensors(model: nn.Module, layers: Sequence[Layer]) -> Iterator[StoredTensor]:
    """All entries of the state dict but the quantized weights, tied ones once."""
    # By identity: a module registered under two names has its weight in the state dict twice.
    quantized = {id(weight_parameter(model, layer)) for layer in layers}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in quantized:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPE_NAMES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ModelError(f"state {name} is of type {kind}, which cannot be stored; convert it to float32")
        key = (id(tensor), tuple(tensor.shape))
        if key in seen:
            continue
        seen.add(key)
        yield StoredTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
