"""The packed file: its bits, its size, what comes back out of it, and what happens to damaged ones."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import random
import re
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tracequant as tq
from tracequant.core import cost
from tracequant.core.errors import ArtifactError, ModelError, TracequantError
from tracequant.core.packed_layout import PackedWeight
from tracequant.core.points import QuantizationPoints
from tracequant.deploy.packed import pack_codes, read_packed, unpack_codes
from tracequant.quantization.convert import dequantized_state
from tracequant.quantization.quantizer import input_quantizers, output_quantizers, weight_quantizers

torch.set_num_threads(1)

TASK = tq.ClassificationTask()


class ConvNet(nn.Module):
    """Convolutions with and without bias, BatchNorm, groups, a residual branch and odd channel counts."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.skip = nn.Conv2d(width, width, 1, bias=False)
        self.up = nn.ConvTranspose2d(width, 3, 2, stride=2)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.deep(x) + self.skip(x)).relu()
        x = self.up(x).relu()
        return torch.as_tensor(self.head(x.mean((2, 3))))


class TiedText(nn.Module):
    """Embedding and output layer share one tensor; the output bias stays in float."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Conv1d(5, 5, 3, padding=1)
        self.out = nn.Linear(5, 7)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.embed(x).transpose(1, 2)).relu()
        return torch.as_tensor(self.out(x.mean(2)))


class Attention(nn.Module):
    """Self-attention with packed projections, then attention to a memory of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(3, 6)
        self.own = nn.MultiheadAttention(6, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(6, 2, kdim=3, vdim=5, batch_first=True)
        self.value = nn.Linear(3, 5)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x)
        y = y + self.own(y, y, y, need_weights=False)[0]
        y = y + self.cross(y, x, self.value(x), need_weights=False)[0]
        return torch.as_tensor(self.head(y.mean(1)))


class TwoNames(nn.Module):
    """Modules that are attributes and also parts of a sequence, as some libraries register them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.features = nn.Sequential(self.conv, self.norm, nn.ReLU())
        self.head = nn.Linear(4, 4)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.again(self.features(x).mean((2, 3))))


@dataclass(frozen=True)
class Case:
    """A model with batches that fit it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    exclude: tuple[str, ...] = ()


CASES = {
    "convolutions": Case(ConvNet, lambda g: torch.randn(6, 1, 6, 6, generator=g)),
    "excluded": Case(ConvNet, lambda g: torch.randn(6, 1, 6, 6, generator=g), ("stem", "head")),
    "tied": Case(TiedText, lambda g: torch.randint(0, 7, (6, 4), generator=g)),
    "untied": Case(lambda: TiedText(tied=False), lambda g: torch.randint(0, 7, (6, 4), generator=g)),
    "attention": Case(Attention, lambda g: torch.randn(6, 5, 3, generator=g)),
    "strange names": Case(
        lambda: nn.Sequential(OrderedDict({'größe "1"': nn.Linear(3, 5), "层\\": nn.Linear(5, 4)})),
        lambda g: torch.randn(6, 3, generator=g),
    ),
    "two names": Case(TwoNames, lambda g: torch.randn(6, 1, 6, 6, generator=g)),
    "single layer": Case(lambda: nn.Linear(3, 4), lambda g: torch.randn(6, 3, generator=g)),
}
GRIDS = {
    "default": tq.WeightGrid(),
    "per tensor": tq.WeightGrid(per_channel=False),
    "asymmetric": tq.WeightGrid(symmetric=False, range="minmax"),
    "asymmetric per tensor": tq.WeightGrid(per_channel=False, symmetric=False),
}


@cache
def prepared(name: str) -> tuple[nn.Module, list[Any], QuantizationPoints]:
    """Float model in evaluation mode, one batch and the points; read only."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = CASES[name].build().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            if isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_bias)
    batches = [(CASES[name].inputs(generator), torch.randint(0, 4, (6,), generator=generator))]
    return model, batches, tq.discover(model, batches, TASK, exclude=CASES[name].exclude)


def make_plan(
    points: QuantizationPoints,
    weight_bits: dict[str, int],
    activation_bits: dict[str, int],
    grid: tq.WeightGrid | None = None,
) -> tq.BitPlan:
    grid = grid or tq.WeightGrid()
    return tq.BitPlan(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        size_bytes=cost.size_bytes(points, weight_bits, activation_bits, grid),
        weight_code_bits=cost.weight_bits_total(points, weight_bits),
        weight_count=cost.weight_count(points),
        omega=0.0,
        activation_omega=0.0,
        weight_grid=grid,
        fingerprint=points.fingerprint,
        solver="by hand",
        budget="none",
    )


def random_plan(points: QuantizationPoints, seed: int, grid: tq.WeightGrid, activations: bool = True) -> tq.BitPlan:
    rng = random.Random(seed)
    return make_plan(
        points,
        {layer.name: rng.randint(1, 8) for layer in points.layers},
        {point.name: rng.randint(1, 8) for point in points.activations if activations},
        grid,
    )


def quantized_case(
    name: str, seed: int = 0, grid: tq.WeightGrid | None = None, activations: bool = True
) -> tuple[nn.Module, tq.BitPlan]:
    model, batches, points = prepared(name)
    plan = random_plan(points, seed, grid or tq.WeightGrid(), activations)
    return tq.quantize(model, batches, TASK, plan).eval(), plan


def other_weights(model: nn.Module) -> nn.Module:
    """The architecture of `model` with different values in every parameter and buffer."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 3))
    return twin


def outputs(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(prepared(name)[1][0][0]))


# Bits in bytes


def weight_of(rows: int, length: int, num_bits: int) -> PackedWeight:
    """A weight of `rows` channels of `length` codes."""
    return PackedWeight("layer", (("layer", "weight"),), (rows, length), num_bits, 0, True)


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 64, 100])
def test_codes_round_trip(num_bits: int, rows: int, length: int) -> None:
    codes = np.random.default_rng(length).integers(0, 2**num_bits, (rows, length)).astype(np.uint8)
    codes[-1] = 2**num_bits - 1

    packed = pack_codes(codes, num_bits)
    row_bytes = 4 * -(-length * num_bits // 32)

    assert packed.dtype == np.uint8
    assert packed.shape == (rows * row_bytes,)
    assert np.array_equal(unpack_codes(packed.reshape(rows, row_bytes), weight_of(rows, length, num_bits)), codes)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_bits=st.integers(1, 8), rows=st.integers(1, 5), length=st.integers(1, 40))
def test_any_codes_round_trip(data: st.DataObject, num_bits: int, rows: int, length: int) -> None:
    flat = data.draw(st.lists(st.integers(0, 2**num_bits - 1), min_size=rows * length, max_size=rows * length))
    codes = np.array(flat, dtype=np.uint8).reshape(rows, length)
    packed = pack_codes(codes, num_bits).reshape(rows, -1)
    assert np.array_equal(unpack_codes(packed, weight_of(rows, length, num_bits)), codes)


def test_least_significant_bit_comes_first() -> None:
    """Three codes of three bits, 5 = 101, 3 = 011, 6 = 110: the 32-bit word is 5 + 3 * 8 + 6 * 64."""
    packed = pack_codes(np.array([[5, 3, 6]], dtype=np.uint8), 3)
    assert int.from_bytes(packed.tobytes(), "little") == 5 + 3 * 8 + 6 * 64
    assert packed.tolist() == [0b10_011_101, 0b1, 0, 0]


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_a_row_is_one_little_endian_number(num_bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**num_bits, (2, 11)).astype(np.uint8)
    for row, packed in zip(codes, pack_codes(codes, num_bits).reshape(2, -1), strict=True):
        word = sum(int(code) << (i * num_bits) for i, code in enumerate(row))
        assert packed.tobytes() == word.to_bytes(len(packed), "little")


def test_every_row_starts_on_a_word() -> None:
    packed = pack_codes(np.array([[1], [2]], dtype=np.uint8), 2)
    assert packed.tolist() == [1, 0, 0, 0, 2, 0, 0, 0]


# The promised size


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("name", list(CASES))
def test_file_size_is_the_plan_s_to_the_byte(name: str, grid: str, tmp_path: Path) -> None:
    for seed in range(3):
        quantized, plan = quantized_case(name, seed, GRIDS[grid], activations=seed < 2)
        path = tmp_path / f"{seed}.safetensors"

        written = tq.pack(quantized, path)

        assert written == path.stat().st_size == plan.size_bytes


def test_size_of_a_linear_layer_worked_out_by_hand(tmp_path: Path) -> None:
    """Linear(3, 4): 4 rows of 3 codes, 4 scales, 4 biases; with the input's scale and zero point where quantized."""
    _, _, points = prepared("single layer")
    model, batches, _ = prepared("single layer")
    for num_bits, row in ((1, 4), (8, 4)):
        plan = make_plan(points, {"weight": num_bits}, {})
        path = tmp_path / "model.safetensors"
        tq.pack(tq.quantize(model, batches, TASK, plan), path)
        header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
        assert path.stat().st_size == header + 4 * row + 4 * 4 + 4 * 4
    plan = make_plan(points, {"weight": 4}, {points.activations[0].name: 8})
    tq.pack(tq.quantize(model, batches, TASK, plan), path)
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert path.stat().st_size == header + 4 * 4 + 4 * 4 + 4 * 4 + 4 + 1


def test_header_does_not_depend_on_the_bits() -> None:
    _, _, points = prepared("convolutions")
    grid = tq.WeightGrid()

    def without_codes(num_bits: int) -> int:
        bits = {layer.name: num_bits for layer in points.layers}
        return cost.size_bytes(points, bits, {}, grid) - sum(cost.code_bytes(x, num_bits, grid) for x in points.layers)

    assert len({without_codes(num_bits) for num_bits in range(1, 9)}) == 1


def test_a_packed_file_is_plain_safetensors(tmp_path: Path) -> None:
    """Any safetensors reader sees the sections, among them the float tensors bit by bit."""
    quantized, _ = quantized_case("convolutions")
    tq.pack(quantized, tmp_path / "model.safetensors")
    sections = safetensors.torch.load_file(tmp_path / "model.safetensors")

    assert set(sections) == {"codes", "scales", "zero_points", "tensors.F32", "tensors.I64"}
    model, _, points = prepared("convolutions")
    quantized_names = {f"{layer.name}.weight" for layer in points.layers}
    floats = [
        tensor.flatten()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and name not in quantized_names
    ]
    assert torch.equal(sections["tensors.F32"], torch.cat(floats))


def test_codes_in_the_file_are_the_weights(tmp_path: Path) -> None:
    """First layer's codes decoded by hand from the file: scale * (code - 8) at 4 bits."""
    model, batches, points = prepared("convolutions")
    plan = make_plan(points, {layer.name: 4 for layer in points.layers}, {})
    quantized = tq.quantize(model, batches, TASK, plan)
    tq.pack(quantized, tmp_path / "model.safetensors")
    sections = safetensors.torch.load_file(tmp_path / "model.safetensors")

    # stem: 5 rows of 9 codes, 36 bits, padded to 8 bytes.
    rows = sections["codes"][: 5 * 8].reshape(5, 8)
    codes = torch.stack([rows & 15, rows >> 4], dim=2).reshape(5, 16)[:, :9].float()
    weight = (codes - 8) * sections["scales"][:5, None]
    assert torch.equal(weight.reshape(5, 1, 3, 3), quantized.stem.weight)


# What comes back


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("name", list(CASES))
def test_loaded_outputs_are_equal_bit_for_bit(name: str, grid: str, tmp_path: Path) -> None:
    model = prepared(name)[0]
    for seed in range(2):
        quantized, plan = quantized_case(name, seed, GRIDS[grid], activations=seed == 0)
        tq.pack(quantized, tmp_path / "model.safetensors")

        loaded = tq.load(tmp_path / "model.safetensors", other_weights(model))

        assert not loaded.training
        assert torch.equal(outputs(loaded, name), outputs(quantized, name))
        assert not torch.equal(outputs(loaded, name), outputs(model, name))
        bits = {site: quantizer.num_bits for site, quantizer in weight_quantizers(loaded).items()}
        assert bits == {site: quantizer.num_bits for site, quantizer in weight_quantizers(quantized).items()}
        assert [q.num_bits for q in input_quantizers(loaded).values()] == list(plan.activation_bits.values())
        assert list(output_quantizers(loaded)) == list(output_quantizers(quantized))
        # Packed once more it is the same file: nothing was lost on the way, and nothing in it is random.
        tq.pack(loaded, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_load_leaves_its_argument_untouched(tmp_path: Path) -> None:
    quantized, _ = quantized_case("convolutions")
    tq.pack(quantized, tmp_path / "model.safetensors")
    model = other_weights(prepared("convolutions")[0]).train()
    before = copy.deepcopy(model.state_dict())

    loaded = tq.load(tmp_path / "model.safetensors", model)

    assert not any(module.training for module in loaded.modules())
    assert model.training
    assert weight_quantizers(model) == {}
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    quantized, _ = quantized_case("tied")
    tq.pack(quantized, tmp_path / "model.safetensors")
    loaded = tq.load(tmp_path / "model.safetensors", TiedText())
    found = weight_quantizers(loaded)

    assert found["embed", "weight"] is found["out", "weight"]
    chains = [loaded.get_submodule(name).parametrizations.weight for name in ("embed", "out")]  # type: ignore[union-attr]
    assert chains[0].original is chains[1].original  # type: ignore[union-attr]


def test_loading_in_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    quantized, _ = quantized_case("convolutions", seed=4)
    tq.pack(quantized, tmp_path / "model.safetensors")
    inputs = prepared("convolutions")[1][0][0]
    torch.save(inputs, tmp_path / "inputs.pt")
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import tracequant as tq
from {Path(__file__).stem} import ConvNet
torch.manual_seed(12345)
loaded = tq.load({str(tmp_path / "model.safetensors")!r}, ConvNet())
with torch.no_grad():
    torch.save(loaded(torch.load({str(tmp_path / "inputs.pt")!r})), {str(tmp_path / "outputs.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

    assert torch.equal(torch.load(tmp_path / "outputs.pt"), outputs(quantized, "convolutions"))


@pytest.mark.parametrize("name", ["convolutions", "tied", "attention"])
@pytest.mark.parametrize("grid", ["default", "asymmetric per tensor"])
def test_fine_tuned_models_come_back_too(name: str, grid: str, tmp_path: Path) -> None:
    """Weights, scales and BatchNorm statistics have all moved; the size has not."""
    model, batches, _ = prepared(name)
    quantized, plan = quantized_case(name, 1, GRIDS[grid])
    before = outputs(quantized, name)
    tq.finetune(quantized, batches, TASK, steps=5, learning_rate=0.05)
    assert not torch.equal(outputs(quantized, name), before)

    assert tq.pack(quantized, tmp_path / "model.safetensors") == plan.size_bytes
    loaded = tq.load(tmp_path / "model.safetensors", model)

    assert torch.equal(outputs(loaded, name), outputs(quantized.eval(), name))


def test_a_loaded_model_can_be_fine_tuned_further(tmp_path: Path) -> None:
    model, batches, _ = prepared("convolutions")
    quantized, plan = quantized_case("convolutions", 1)
    tq.pack(quantized, tmp_path / "model.safetensors")
    loaded = tq.load(tmp_path / "model.safetensors", model)

    tq.finetune(loaded, batches, TASK, steps=3, learning_rate=0.05)

    assert not torch.equal(outputs(loaded, "convolutions"), outputs(quantized, "convolutions"))
    assert tq.pack(loaded, tmp_path / "more.safetensors") == plan.size_bytes


def test_buffers_of_other_types_come_back(tmp_path: Path) -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.register_buffer("mask", torch.tensor([True, False, True]))
            self.register_buffer("steps", torch.tensor(7, dtype=torch.int32))
            self.register_buffer("small", torch.tensor([0.5, 1e-7], dtype=torch.float16))
            self.register_buffer("brain", torch.tensor([[1.5]], dtype=torch.bfloat16))
            self.register_buffer("third", torch.tensor([1 / 3], dtype=torch.float64))
            self.register_buffer("empty", torch.zeros(0, 4))
            self.register_buffer("temporary", torch.ones(2), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.layer(x * self.mask))

    torch.manual_seed(0)
    model = Buffers()
    batches = [(torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))]
    points = tq.discover(model, batches, TASK)
    plan = make_plan(points, {"layer": 3}, {"layer": 5})
    quantized = tq.quantize(model, batches, TASK, plan)
    assert tq.pack(quantized, tmp_path / "model.safetensors") == plan.size_bytes

    loaded = tq.load(tmp_path / "model.safetensors", other_weights(model))

    for name, buffer in model.named_buffers():
        found = loaded.get_buffer(name)
        assert found.dtype == buffer.dtype
        assert torch.equal(found, buffer), name


# Another architecture


def conv_with(change: Callable[[ConvNet], object]) -> nn.Module:
    model = ConvNet()
    change(model)
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "wider": lambda: ConvNet(width=6),
    "another kind": lambda: nn.Linear(3, 4),
    "without a layer": lambda: conv_with(lambda m: delattr(m, "skip")),
    "one layer more": lambda: conv_with(lambda m: m.add_module("extra", nn.Linear(2, 2))),
    "one buffer more": lambda: conv_with(lambda m: m.register_buffer("extra", torch.zeros(3))),
    "a bias more": lambda: conv_with(lambda m: setattr(m, "skip", nn.Conv2d(5, 5, 1))),
    "a bias less": lambda: conv_with(lambda m: setattr(m, "head", nn.Linear(3, 4, bias=False))),
    "no BatchNorm": lambda: conv_with(lambda m: setattr(m, "norm", nn.Identity())),
    "another kernel": lambda: conv_with(lambda m: setattr(m, "stem", nn.Conv2d(1, 5, 5, bias=False))),
    "more classes": lambda: conv_with(lambda m: setattr(m, "head", nn.Linear(3, 9))),
}


@pytest.mark.parametrize("other", list(OTHERS))
def test_another_architecture_is_refused(other: str, tmp_path: Path) -> None:
    quantized, _ = quantized_case("convolutions")
    tq.pack(quantized, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"pass the model that was packed|does not have"):
        tq.load(tmp_path / "model.safetensors", OTHERS[other]())


def test_weights_tied_on_one_side_only_are_another_architecture(tmp_path: Path) -> None:
    """Two layers of the file cannot both be written into one shared tensor of the model."""
    quantized, _ = quantized_case("untied")
    tq.pack(quantized, tmp_path / "model.safetensors")
    with pytest.raises(ModelError):
        tq.load(tmp_path / "model.safetensors", TiedText(tied=True))


def test_loading_onto_a_quantized_model_is_refused(tmp_path: Path) -> None:
    quantized, _ = quantized_case("convolutions")
    tq.pack(quantized, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="expects the float model"):
        tq.load(tmp_path / "model.safetensors", quantized)


# Models that cannot be packed


def test_packing_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not quantized"):
        tq.pack(ConvNet(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_packing_needs_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    quantized, _ = quantized_case("convolutions")
    with pytest.raises(ModelError, match=r"layer stem is of type torch.float\d+; packing needs float32"):
        tq.pack(quantized.to(dtype), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_pack_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    quantized, _ = quantized_case("convolutions")
    tq.pack(quantized, path)
    before = path.read_bytes()
    for bad in (ConvNet(), copy.deepcopy(quantized).half()):
        with pytest.raises(ModelError):
            tq.pack(bad, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    tq.pack(quantized_case("convolutions")[0], path)
    before = path.read_bytes()
    write = Path.write_bytes

    def half_of_it(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_of_it)
    with pytest.raises(OSError, match="No space left"):
        tq.pack(quantized_case("convolutions", seed=1)[0], path)

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_packing_replaces_an_older_file_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "model.safetensors"
    for seed in range(2):
        quantized, plan = quantized_case("convolutions", seed)
        tq.pack(quantized, path)
        assert path.stat().st_size == plan.size_bytes
    assert list(path.parent.iterdir()) == [path]


def test_packing_leaves_the_model_alone(tmp_path: Path) -> None:
    quantized, _ = quantized_case("convolutions")
    before = copy.deepcopy(quantized.state_dict())
    tq.pack(quantized.train(), tmp_path / "model.safetensors")
    assert quantized.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())


# Damage

OUTPUTS = ("deep", "skip")  # what `packed_bytes` rounds where it arises


@cache
def packed_bytes() -> bytes:
    """A small file with everything in it: asymmetric weights, activations, two dtypes of floats."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tq.pack(quantized_case("convolutions", 2, GRIDS["asymmetric"])[0], Path(folder) / "model")
        return (Path(folder) / "model").read_bytes()


def header_length(blob: bytes) -> int:
    return 8 + int(struct.unpack("<Q", blob[:8])[0])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that hypothesis may overwrite again and again."""
    return tmp_path_factory.mktemp("damage") / "model.safetensors"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_files_are_refused(scratch: Path, data: st.DataObject) -> None:
    blob = packed_bytes()
    scratch.write_bytes(blob[: data.draw(st.integers(0, len(blob) - 1), "length")])
    with pytest.raises(ArtifactError, match="damaged"):
        tq.load(scratch, prepared("convolutions")[0])


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_nearly_nothing_is_refused(scratch: Path, length: int) -> None:
    scratch.write_bytes(packed_bytes()[:length])
    with pytest.raises(ArtifactError, match="damaged"):
        tq.load(scratch, prepared("convolutions")[0])


@settings(max_examples=30, deadline=None)
@given(tail=st.binary(min_size=1, max_size=20))
def test_a_longer_file_is_refused(scratch: Path, tail: bytes) -> None:
    scratch.write_bytes(packed_bytes() + tail)
    with pytest.raises(ArtifactError, match="damaged"):
        tq.load(scratch, prepared("convolutions")[0])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_header_never_raises_anything_else(scratch: Path, data: st.DataObject) -> None:
    """A letter of a name may turn into another name, which `load` can only call another architecture."""
    blob = bytearray(packed_bytes())
    for _ in range(data.draw(st.integers(1, 3), "flips")):
        position = data.draw(st.integers(0, header_length(packed_bytes()) - 1), "position")
        blob[position] = data.draw(st.integers(0, 255), "byte")
    scratch.write_bytes(resealed(bytes(blob)))

    try:
        read_packed(scratch)
    except ArtifactError:
        with pytest.raises(ArtifactError):
            tq.load(scratch, prepared("convolutions")[0])
    else:
        with suppress(TracequantError):
            tq.load(scratch, prepared("convolutions")[0])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_header_of_printable_damage_never_raises_anything_else(scratch: Path, data: st.DataObject) -> None:
    """As above, with bytes that keep the JSON more often valid: digits, quotes, brackets, letters."""
    blob = bytearray(packed_bytes())
    for _ in range(data.draw(st.integers(1, 2), "flips")):
        position = data.draw(st.integers(8, header_length(packed_bytes()) - 1), "position")
        blob[position] = ord(data.draw(st.sampled_from('0123456789-.,:"[]{}\\ eanltrufs'), "byte"))
    scratch.write_bytes(resealed(bytes(blob)))
    try:
        read_packed(scratch)
    except ArtifactError:
        return
    with suppress(TracequantError):
        tq.load(scratch, prepared("convolutions")[0])


def resealed(blob: bytes) -> bytes:
    """The file with a checksum that is right again, so that nothing but its contents can give it away."""
    found = re.search(rb'sha256[\\\\]+":[\\\\]+"([0-9a-f]{64})', blob)
    if found is None:
        return blob
    start, end = found.span(1)
    digest = hashlib.sha256(blob[:start] + b"0" * 64 + blob[end:]).hexdigest()
    return blob[:start] + digest.encode() + blob[end:]


def with_manifest(edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """The packed file with another manifest and a right checksum, its header as long as before if there is room."""
    blob = packed_bytes()
    end = header_length(blob)
    header = json.loads(blob[8:end])
    manifest = json.loads(header["__metadata__"]["tracequant"])
    edited = edit(manifest)
    text = edited if isinstance(edited, str) else json.dumps(edited, separators=(",", ":"))
    header["__metadata__"]["tracequant"] = text
    text = json.dumps(header, separators=(",", ":")).rstrip()
    # Spaces after the header's last brace belong to the format.
    text = text.ljust(max(end - 8, 8 * -(-len(text) // 8)))
    return resealed(struct.pack("<Q", len(text)) + text.encode() + blob[end:])


def changed(*path: Any, to: Any) -> Callable[[dict[str, Any]], Any]:
    """An edit that replaces one entry of the manifest."""

    def edit(manifest: dict[str, Any]) -> Any:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        return manifest

    return edit


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: {name: value for name, value in manifest.items() if name != key}


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not JSON": lambda m: "what?",
    "null": lambda m: None,
    "a list": lambda m: [1, 2],
    "a number": lambda m: 7,
    "empty": lambda m: {},
    **{f"without {key}": without(key) for key in ("format", "version", "weights", "activations", "outputs", "tensors")},
    "without checksum": lambda m: {key: value for key, value in m.items() if key != "sha256"},
    "checksum a number": changed("sha256", to=7),
    "checksum short": changed("sha256", to="0" * 63),
    "checksum of other letters": changed("sha256", to="é" * 64),
    "another format": changed("format", to="somebody-else"),
    "a later version": changed("version", to=99),
    "the version before checksums": changed("version", to=1),
    "the version before rounded outputs": changed("version", to=2),
    "weights a number": changed("weights", to=3),
    "weights null": changed("weights", to=None),
    "weights an object": changed("weights", to={"stem": 4}),
    "no weights": changed("weights", to=[]),
    "a weight too short": changed("weights", 0, to=["stem", []]),
    "a weight null": changed("weights", 0, to=None),
    "name a number": changed("weights", 0, 0, to=3),
    "name a list": changed("weights", 0, 0, to=["stem"]),
    "name null": changed("weights", 0, 0, to=None),
    "sites a number": changed("weights", 0, 1, to=3),
    "sites of three": changed("weights", 0, 1, to=[["stem", "weight", "x"]]),
    "shape a number": changed("weights", 0, 2, to=45),
    "shape of text": changed("weights", 0, 2, to=["5", 1, 3, 3]),
    "shape empty": changed("weights", 0, 2, to=[]),
    "shape of floats": changed("weights", 0, 2, to=[5.0, 1, 3, 3]),
    "shape negative": changed("weights", 0, 2, to=[-5, -1, 3, 3]),
    "shape of nothing": changed("weights", 0, 2, to=[0, 1, 3, 3]),
    "shape enormous": changed("weights", 0, 2, to=[10**30, 1, 3, 3]),
    "0 bits": changed("weights", 0, 3, to=0),
    "9 bits": changed("weights", 0, 3, to=9),
    "bits of text": changed("weights", 0, 3, to="4"),
    "bits null": changed("weights", 0, 3, to=None),
    "axis too large": changed("weights", 0, 4, to=4),
    "axis negative": changed("weights", 0, 4, to=-1),
    "axis of text": changed("weights", 0, 4, to="0"),
    "axis a float": changed("weights", 0, 4, to=0.0),
    "symmetric of text": changed("weights", 0, 5, to="no"),
    "symmetric true": changed("weights", 0, 5, to=True),
    "a layer twice": changed("weights", 1, 0, to="stem"),
    "a weight at two layers' places": changed("weights", 1, 1, to=[["stem", "weight"]]),
    "a weight that is a tensor too": changed("weights", 0, 1, to=[["norm", "bias"]]),
    "a tensor twice": changed("tensors", "F32", 1, 0, to="norm.weight"),
    "too many dimensions": changed("tensors", "F32", 0, to=["norm.weight", 5, *[1] * 70]),
    "nothing of enormous size": changed("tensors", "F32", 0, to=["norm.weight", 0, 10**30]),
    "activations a number": changed("activations", to=3),
    "a reader of two activations": changed("activations", 1, to=["stem", 4]),
    "activation without consumers": changed("activations", 0, to=[4]),
    "activation empty": changed("activations", 0, to=[]),
    "activation with 0 bits": changed("activations", 0, -1, to=0),
    "activation with text bits": changed("activations", 0, -1, to="4"),
    "outputs a number": changed("outputs", to=3),
    "outputs an object": changed("outputs", to={"deep": 8}),
    "an output a number": changed("outputs", 0, to=3),
    "an output twice": changed("outputs", 1, to="deep"),
    "an output more": changed("outputs", to=["deep", "skip", "stem"]),
    "an output less": changed("outputs", to=["deep"]),
    "tensors a list": changed("tensors", to=[]),
    "tensors null": changed("tensors", to=None),
    "tensors of an unknown type": changed("tensors", to={"F12": [["norm.weight", 5]]}),
    "tensors a number": changed("tensors", "F32", to=3),
    "a tensor a number": changed("tensors", "F32", 0, to=3),
    "a tensor empty": changed("tensors", "F32", 0, to=[]),
    "a tensor of negative size": changed("tensors", "F32", 0, 1, to=-5),
    "a tensor of text size": changed("tensors", "F32", 0, 1, to="5"),
    "a tensor too long": changed("tensors", "F32", 0, 1, to=6),
    "a tensor with a number for a name": changed("tensors", "F32", 0, 0, to=6),
    "a tensor with a list for a name": changed("tensors", "F32", 0, 0, to=["x"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(MANIFESTS))
def test_a_wrong_manifest_is_refused(scratch: Path, kind: str) -> None:
    scratch.write_bytes(with_manifest(MANIFESTS[kind]))
    with pytest.raises(ArtifactError):
        tq.load(scratch, prepared("convolutions")[0])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_bits_that_are_not_whole_are_refused(scratch: Path, count: int) -> None:
    """JSON has 4 and 4.0; where the padding makes the lengths agree, only the type tells."""

    def edit(manifest: dict[str, Any]) -> Any:
        for weight in manifest["weights"][:count]:
            weight[3] = float(weight[3])
        return manifest

    scratch.write_bytes(with_manifest(edit))
    with pytest.raises(ArtifactError):
        tq.load(scratch, prepared("convolutions")[0])


def test_editing_nothing_is_accepted(scratch: Path) -> None:
    """The helper that the tests above use makes good files."""
    scratch.write_bytes(with_manifest(lambda manifest: manifest))
    loaded = tq.load(scratch, prepared("convolutions")[0])
    quantized, _ = quantized_case("convolutions", 2, GRIDS["asymmetric"])
    assert torch.equal(outputs(loaded, "convolutions"), outputs(quantized, "convolutions"))
    assert read_packed(scratch).layout.outputs == OUTPUTS


def test_a_plain_safetensors_file_is_refused(scratch: Path) -> None:
    safetensors.torch.save_file(ConvNet().state_dict(), scratch)
    with pytest.raises(ArtifactError, match="not one of tracequant's packed models"):
        tq.load(scratch, prepared("convolutions")[0])


def test_other_files_are_refused(tmp_path: Path) -> None:
    model = prepared("convolutions")[0]
    for name, content in (("text", b"hello, world\n" * 9), ("zeros", bytes(400)), ("ones", b"\xff" * 400)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="damaged or not a safetensors file"):
            tq.load(tmp_path / name, model)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    with pytest.raises(ArtifactError):
        tq.load(tmp_path / "checkpoint.pt", model)
    with pytest.raises(ArtifactError):
        tq.load(tmp_path, model)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere\.safetensors does not exist"):
        tq.load(tmp_path / "nowhere.safetensors", prepared("convolutions")[0])


def test_sections_that_do_not_fit_the_manifest_are_refused(scratch: Path) -> None:
    """A whole, readable safetensors file under a true manifest, one section longer and another shorter by as much."""
    blob = packed_bytes()
    header = json.loads(blob[8 : header_length(blob)])
    sections = safetensors.torch.load(blob)
    for first, second in itertools.permutations(("codes", "zero_points"), 2):
        moved = dict(sections)
        moved[first] = torch.cat([moved[first], torch.zeros(1, dtype=torch.uint8)])
        moved[second] = moved[second][:-1]
        scratch.write_bytes(resealed(safetensors.torch.save(moved, header["__metadata__"])))
        with pytest.raises(ArtifactError, match="lengths"):
            tq.load(scratch, prepared("convolutions")[0])


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("scales", float("nan"), "a scale"), ("scales", -1.0, "a scale"), ("scales", 0.0, "a scale"),
        ("zero_points", 255, "a zero point"), ("codes", 255, "padding"),
    ],
)  # fmt: skip
def test_values_that_no_packer_writes_are_refused(scratch: Path, section: str, value: float, message: str) -> None:
    sections = safetensors.torch.load(packed_bytes())
    # The last row's last byte is padding; activations of fewer than 8 bits have the last zero points before outputs.
    sections[section][-1 - (len(OUTPUTS) if section == "zero_points" else 0)] = value
    scratch.write_bytes(rebuilt(sections))
    with pytest.raises(ArtifactError, match=message):
        read_packed(scratch)


def rebuilt(sections: dict[str, Tensor]) -> bytes:
    """The packed file with other contents and a right checksum."""
    blob = packed_bytes()
    raw = safetensors.torch.load(blob)
    assert {name: len(t) for name, t in sections.items()} == {name: len(t) for name, t in raw.items()}
    offsets = json.loads(blob[8 : header_length(blob)])
    body = bytearray(blob)
    for name, tensor in sections.items():
        start, end = (header_length(blob) + offset for offset in offsets[name]["data_offsets"])
        body[start:end] = tensor.numpy().tobytes()
    return resealed(bytes(body))


def test_the_checksum_is_what_the_specification_says() -> None:
    """SHA-256 over the whole file, its own digits as zeros."""
    assert resealed(packed_bytes()) == packed_bytes()


def test_the_version_before_is_named(scratch: Path) -> None:
    scratch.write_bytes(with_manifest(changed("version", to=2)))
    with pytest.raises(ArtifactError, match=r"version 2, this tracequant reads .* version 3; pack the model again"):
        read_packed(scratch)


def test_a_diverged_model_is_not_packed(tmp_path: Path) -> None:
    quantized, _ = quantized_case("convolutions")
    with torch.no_grad():
        weight_quantizers(quantized)["deep", "weight"].scale[0] = float("nan")
    with pytest.raises(ModelError, match="diverged"):
        tq.pack(quantized, tmp_path / "model.safetensors")


# A thousand corrupted files


@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_a_corrupted_file_is_refused(scratch: Path, data: st.DataObject) -> None:
    """Flipped bits anywhere, truncation, bytes cut out or put in, edited headers: refused, unless nothing changed."""
    whole = packed_bytes()
    blob = bytearray(whole)
    end = header_length(whole)
    kind = data.draw(st.sampled_from(["bits", "cut", "remove", "insert", "header"]))
    place = data.draw(st.integers(0, len(blob) - 1), "place")
    if kind == "bits":
        for bit in data.draw(st.lists(st.integers(0, 8 * len(blob) - 1), min_size=1, max_size=4), "bits"):
            blob[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        del blob[place:]
    elif kind == "remove":
        del blob[place : place + data.draw(st.integers(1, 16), "count")]
    elif kind == "insert":
        blob[place:place] = data.draw(st.binary(min_size=1, max_size=16), "bytes")
    else:
        text = '0123456789-.,:"[]{}\\ eanltrufs'
        blob[8 + place % (end - 8)] = ord(data.draw(st.sampled_from(text), "character"))
    scratch.write_bytes(blob)

    if bytes(blob) == whole:
        read_packed(scratch)
    else:
        with pytest.raises(ArtifactError):
            read_packed(scratch)


# Without torch


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("name", list(CASES))
def test_the_reader_without_torch_gives_the_same_values(name: str, grid: str, tmp_path: Path) -> None:
    quantized, plan = quantized_case(name, 3, GRIDS[grid])
    tq.pack(quantized, tmp_path / "model.safetensors")

    file = read_packed(tmp_path / "model.safetensors")

    assert {w.entry.name: w.entry.num_bits for w in file.weights()} == plan.weight_bits
    state = dequantized_state(quantized)
    for weight in file.weights():
        assert weight.codes.max() < 2**weight.entry.num_bits
        for site in weight.entry.sites:
            assert np.array_equal(weight.dequantize(), state[".".join(filter(None, site))].numpy())
    for activation, quantizer in zip(file.activations(), input_quantizers(quantized).values(), strict=True):
        expected = (quantizer.num_bits, quantizer.scale.item(), quantizer.zero_point.item())
        assert (activation.entry.num_bits, activation.scale, activation.zero_point) == expected
    for output, (module, quantizer) in zip(file.outputs(), output_quantizers(quantized).items(), strict=True):
        expected = (quantizer.scale.item(), quantizer.zero_point.item())
        assert (output.module, output.scale, output.zero_point) == (module, *expected)
    for key, tensor in file.tensors().items():
        assert np.array_equal(tensor, state[key].numpy())


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    layer = nn.Linear(3, 4)
    layer.register_buffer("table", torch.tensor([1.5, -0.0078125], dtype=torch.bfloat16))
    batches = [(torch.randn(6, 3), torch.zeros(6, dtype=torch.long))]
    points = tq.discover(layer, batches, TASK)
    tq.pack(tq.quantize(layer, batches, TASK, random_plan(points, 0, tq.WeightGrid())), tmp_path / "model")
    table = read_packed(tmp_path / "model").tensors()["table"]
    assert table.dtype == np.float32
    assert table.tolist() == [1.5, -0.0078125]


def test_reading_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(packed_bytes())
    script = (
        "import sys; from tracequant.deploy.packed import read_packed;"
        f"file = read_packed({str(tmp_path / 'model.safetensors')!r});"
        "[w.dequantize() for w in file.weights()]; file.tensors(); list(file.activations());"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
