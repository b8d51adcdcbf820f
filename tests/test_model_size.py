"""What a plan says of the whole file: its size before and after, the share that is quantized, what stays in float."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import nn

import tracequant as tq
from models import TiedNet, build, conv_net, images, token_batch
from test_allocation import make_sensitivity
from test_sensitivity import TASK, made_up
from tracequant.core import cost
from tracequant.core.plan import MIB
from tracequant.core.points import QuantizationPoints, StoredTensor


def mostly_float() -> tq.Sensitivity:
    """Layers of odd sizes behind an embedding that stays in float, 20 times as large as all of them."""
    sensitivity = make_sensitivity()
    weights = cost.weight_count(sensitivity.points)
    others = (
        StoredTensor("wte.weight", "F32", (15 * weights,)),
        StoredTensor("wpe.weight", "F32", (5, weights)),
        StoredTensor("steps", "I64", (1000,)),
    )
    points = dataclasses.replace(sensitivity.points, float_tensors=(*sensitivity.points.float_tensors, *others))
    return dataclasses.replace(sensitivity, points=points)


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of a model's state, tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_a_plan_that_leaves_most_in_float_says_so_first() -> None:
    sensitivity = mostly_float()
    plan = tq.solve(sensitivity, average_bits=3)
    size, weights = plan.model_size, plan.weight_count
    assert size is not None
    biases = sum(math.prod(t.shape) for t in make_sensitivity().points.float_tensors)
    assert (size.quantized, size.parameters) == (weights, 21 * weights + biases)
    assert size.float_bytes == 4 * size.parameters + 8 * 1000
    assert plan.file_compression == size.float_bytes / plan.size_bytes
    shrinks = 1 - plan.size_bytes / size.float_bytes
    assert 0 < shrinks < 0.05
    first, second = str(plan).splitlines()[:2]
    assert first.startswith(f"BitPlan: {size.float_bytes / MIB:.4g} MiB in float32, {plan.size_mib:.4g} MiB packed")
    assert f"({shrinks:.1%} smaller); {weights / size.parameters:.1%} of the parameters quantized" in first
    # W-Comp comes later and is named.
    assert first.index("smaller") < first.index(f"W-Comp {plan.compression:.2f}x, these weights alone")
    assert second.startswith(f"In float: {1 - weights / size.parameters:.1%} of the parameters (wte.weight ")
    assert second.index("wte.weight") < second.index("wpe.weight")
    assert second.endswith(f", 5 more tensors {biases / size.parameters:.1%})")


def test_little_in_float_is_not_named() -> None:
    """Up to a twentieth of the parameters: biases, norms."""
    points = make_sensitivity(layers=12).points
    weights = cost.weight_count(points)
    for count, named in ((weights // 20, False), (weights // 10, True)):
        changed = dataclasses.replace(points, float_tensors=(StoredTensor("bias", "F32", (count,)),))
        size = cost.model_size(changed)
        assert size is not None
        assert bool(size.in_float) is named
    assert (
        size.in_float
        == f"In float: {1 - size.quantized_share:.1%} of the parameters (bias {count / size.parameters:.1%})"
    )


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    """Of a real model: the state in float32, and the file that `pack` writes; in float what `exclude` leaves there."""
    model = conv_net().float()
    batches = [(inputs.float(), targets) for inputs, targets in images()]
    points = tq.discover(model, batches, TASK, exclude=("conv1",))
    sensitivity = tq.measure_sensitivity(model, batches, TASK, made_up(points))
    plan = tq.solve(sensitivity, average_bits=4)
    size = plan.model_size
    assert size is not None
    assert size.float_bytes == saved_bytes(model)
    assert size.parameters == sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    assert next(iter(size.largest_float)) == "conv1.weight"
    assert "conv1.weight" in str(plan)
    path = tmp_path / "model.safetensors"
    tq.pack(tq.quantize(model, batches, TASK, plan), path)
    assert plan.file_compression == saved_bytes(model) / path.stat().st_size
    assert tq.BitPlan.from_json(plan.to_json()) == plan
    edited = plan.with_bits({"fc": 8}, sensitivity)
    assert edited.model_size == size
    assert edited.file_compression is not None
    assert edited.file_compression < plan.file_compression


def test_tied_weights_count_once() -> None:
    model = build(TiedNet, dtype=torch.float32)
    points = tq.discover(model, [token_batch()], TASK)
    size = cost.model_size(points)
    assert size is not None
    assert size.float_bytes == saved_bytes(model)
    assert size.quantized == sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_a_table_without_a_model_has_no_file() -> None:
    sensitivity = make_sensitivity()
    layers = tuple(dataclasses.replace(layer, sites=()) for layer in sensitivity.points.layers)
    points: QuantizationPoints = dataclasses.replace(sensitivity.points, layers=layers)
    plan = tq.solve(dataclasses.replace(sensitivity, points=points), average_bits=4)
    assert plan.model_size is None
    assert plan.file_compression is None
    assert "MiB of weights, at" in plan.summary
    assert "parameters" not in str(plan)


def test_a_file_that_grows_says_so() -> None:
    """The header of a tiny network is larger than what its weights save."""
    sensitivity = make_sensitivity(layers=1)
    layer = dataclasses.replace(sensitivity.points.layers[0], shape=(2, 3))
    points = dataclasses.replace(sensitivity.points, layers=(layer,))
    plan = tq.uniform_plan(dataclasses.replace(sensitivity, points=points), 8)
    assert plan.file_compression is not None
    assert plan.file_compression < 1
    assert "% larger)" in plan.summary
