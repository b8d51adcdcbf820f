"""Layers that are found by what reads their weight: functional calls, transformers' Conv1D, LSTM and GRU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import tracequant as tq
from models import CLASSES, EnergyTask, snapshot
from tracequant.quantization.quantizer import weight_quantizers

TASK = tq.ClassificationTask()
SAMPLES, STEPS, WIDTH = 6, 7, 5


class Holder(nn.Module):
    """Parameters `w`, drawn at random, and a function that reads them."""

    def __init__(self, compute: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = compute
        self.w = nn.ParameterList([torch.randn(shape) * 0.4 for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, *self.w)


class Affine(nn.Module):
    """A linear layer of its own, with the weight `[in, out]`."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width_in, width_out) * 0.4)
        self.shift = nn.Parameter(torch.zeros(1, width_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.matrix) + self.shift


class Attention(nn.Module):
    """Projections to heads and back by einsum; the second sums over axes that do not lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(6, 2, 3) * 0.4)
        self.out = nn.Parameter(torch.randn(2, 6, 3) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("btd,dhk->bhtk", x, self.query)
        return torch.einsum("bhtk,hok->bto", heads.relu(), self.out)


class Functional(nn.Module):
    """All weights but the last are read by functions; two positions are only added, a scale only multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(STEPS, WIDTH) * 0.1)
        self.mix = nn.Parameter(torch.randn(3, STEPS) * 0.4)
        self.affine = Affine(WIDTH, 6)
        self.attention = Attention()
        self.scale = nn.Parameter(torch.ones(STEPS, 6))
        self.kernel = nn.Parameter(torch.randn(4, 6, 3) * 0.3)
        self.borrowed = nn.Linear(4, 4)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.affine(x + self.position).relu()) * self.scale
        x = F.conv1d(F.pad(x.transpose(1, 2), (1, 1)), self.kernel).transpose(1, 2).relu()
        x = F.linear(x, self.borrowed.weight).relu()
        return torch.as_tensor(self.fc(torch.matmul(self.mix, x).mean(1)))


class Recurrent(nn.Module):
    """A recurrent layer over sequences `[N, T, 5]`, and a classifier of its mean."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, 6, **options)
        width = options.get("proj_size", 6) * (1 + bool(options.get("bidirectional")))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.rnn.batch_first:
            return torch.as_tensor(self.fc(self.rnn(x)[0].mean(1)))
        return torch.as_tensor(self.fc(self.rnn(x.transpose(0, 1))[0].mean(0)))


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM, batch_first=True),
    "lstm of 2 layers, bidirectional": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU, batch_first=True),
    "gru of 2 layers, bidirectional": lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
    "rnn": lambda: Recurrent(nn.RNN, batch_first=True),
}
MODELS: dict[str, Callable[[], nn.Module]] = {"functional": Functional, **RECURRENT}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(SAMPLES, STEPS, WIDTH, generator=generator), torch.arange(SAMPLES) % CLASSES)]


def energy_points(model: nn.Module, *arguments: Tensor) -> tq.QuantizationPoints:
    return tq.discover(model, [arguments], EnergyTask())


def by_hand(points: tq.QuantizationPoints, weight_bits: int, activation_bits: int | None = None) -> tq.BitPlan:
    """A plan of these widths everywhere, with its size."""
    weights = {layer.name: weight_bits for layer in points.layers}
    activations = {} if activation_bits is None else {point.name: activation_bits for point in points.activations}
    from tracequant.core.cost import size_bytes

    size = size_bytes(points, weights, activations, tq.WeightGrid())
    return tq.BitPlan(weights, activations, size, 0, 1, 0.0, 0.0, tq.WeightGrid(), "", "by hand", "none")


def quantized(model: nn.Module, weight_bits: int = 4, activation_bits: int | None = None) -> nn.Module:
    plan = by_hand(tq.discover(model, batches(), TASK), weight_bits, activation_bits)
    return tq.quantize(model, batches(), TASK, plan)


# What is a layer


def test_layers_are_what_matrix_operations_read() -> None:
    points = tq.discover(build("functional"), batches(), TASK)
    found = {layer.name: (layer.kind, layer.channel_axis, layer.macs, layer.activation) for layer in points.layers}
    assert found == {
        "mix": ("Functional", 0, 3 * 4 * STEPS, None),
        "kernel": ("Functional", 0, STEPS * 4 * 6 * 3, None),
        "affine.matrix": ("Affine", 1, STEPS * 5 * 6, "affine"),
        "attention.query": ("Attention", 2, STEPS * 6 * 6, "attention"),
        "attention.out": ("Attention", 1, STEPS * 6 * 6, None),
        "borrowed": ("Linear", 0, STEPS * 4 * 4, None),  # a functional call with another module's weight
        "fc": ("Linear", 0, 4 * CLASSES, "fc"),
    }
    assert {tensor.name for tensor in points.float_tensors} == {
        "position", "scale", "affine.shift", "borrowed.bias", "fc.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("compute", "shape", "axis", "macs"),
    [
        (lambda x, w: F.linear(x, w), (4, 5), 0, 20),
        (lambda x, w: F.linear(x, w, torch.ones(4)), (4, 5), 0, 20),
        (lambda x, w: x @ w, (5, 4), 1, 20),
        (lambda x, w: torch.addmm(torch.ones(4), x, w), (5, 4), 1, 20),
        (lambda x, w: (w @ x.T).T, (4, 5), 0, 20),
        (lambda x, w: torch.einsum("ni,oi->no", x, w), (4, 5), 0, 20),
        (lambda x, w: torch.einsum("ni,hio->nho", x, w).flatten(1), (2, 5, 4), 2, 40),
        (lambda x, w: torch.einsum("ni,oih->nho", x, w).flatten(1), (4, 5, 2), 0, 40),
        (lambda x, w: torch.bmm(x.expand(2, *x.shape), w).sum(0), (2, 5, 4), 2, 40),
        (lambda x, w: torch.cat([x @ part for part in w.chunk(2, 1)], 1), (5, 4), 1, 20),
        (lambda x, w: F.linear(x, w.reshape(4, 5)), (2, 2, 5), 0, 20),
        (lambda x, w: F.linear(x, w.t().contiguous()), (5, 4), 1, 20),
        (lambda x, w: F.conv2d(x.view(-1, 1, 1, 5), w).flatten(1), (3, 1, 1, 2), 0, 3 * 4 * 2),
        (lambda x, w: F.conv_transpose1d(x.view(-1, 1, 5), w).flatten(1), (1, 3, 2), 1, 5 * 3 * 2),
        (lambda x, w: F.bilinear(x, x, w), (4, 5, 5), 0, 100),
        (lambda x, w: F.embedding((x > 0).long(), w).flatten(1), (2, 3), 0, 0),
        (lambda x, w: F.embedding_bag((x > 0).long(), w), (2, 3), 0, 0),
    ],
)  # fmt: skip
def test_axis_and_multiplications_of_every_operation(compute, shape, axis, macs) -> None:
    """Multiplications of one sample, output channels by the layout."""
    torch.manual_seed(0)
    (layer,) = energy_points(Holder(compute, shape), torch.randn(3, 5)).layers
    assert (layer.name, layer.shape, layer.channel_axis, layer.macs) == ("w.0", shape, axis, macs)
    assert layer.kind == "ParameterList"


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w: x + w,
        lambda x, w: x * w[:1],
        lambda x, w: torch.cat([x, w]),
        lambda x, w: x + F.interpolate(w[None], size=5)[0],
        lambda x, w: x + w[torch.arange(3) % 2],
        lambda x, w: x + (w @ w.T)[:, :1],  # of learned times learned nothing is the weight
    ],
)
def test_a_parameter_that_is_only_added_or_multiplied_is_no_layer(compute) -> None:
    model = nn.Sequential(nn.Linear(5, 5), Holder(compute, (3, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [layer.name for layer in energy_points(model, torch.randn(3, 5)).layers] == ["0"]


def test_a_weight_that_stays_in_float_is_named_with_its_share() -> None:
    """A masked matrix, one that nothing reads, and a gain for each channel, which is no matrix."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5, bias=False)
            self.masked = nn.Parameter(torch.randn(5, 5))
            self.spare = nn.Parameter(torch.randn(5, 10))
            self.gain = nn.Parameter(torch.randn(5, 1))
            self.register_buffer("mask", torch.ones(5, 5).tril())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.masked * self.mask * self.gain)

    with pytest.warns(UserWarning, match="stay in float") as caught:
        points = energy_points(Masked(), torch.randn(2, 5))
    assert [layer.name for layer in points.layers] == ["fc"]
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith(
        "2 weight matrices stay in float, 71.4% of the model's parameters: spare (47.6%), masked (23.8%);"
    )


def test_a_model_whose_weights_are_all_computed_has_no_layer() -> None:
    with pytest.warns(UserWarning, match="w.0"), pytest.raises(tq.ModelError, match="has no quantizable layer"):
        energy_points(Holder(lambda x, w: x @ w.tanh(), (5, 5)), torch.randn(2, 5))


def test_a_module_whose_input_others_read_too_rounds_nothing() -> None:
    """A residual sum inside the module would read the rounded input as well."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x + x @ self.matrix

    points = energy_points(nn.Sequential(Residual(), Affine(5, 5), nn.Linear(5, 3)), torch.randn(2, 5))
    assert [layer.activation for layer in points.layers] == [None, "1", "2"]


def test_tied_functional_weights_are_one_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 4)
            self.head = self.words.weight  # before the embedding's in no list: the class gives the name

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.words(tokens).tanh(), self.head).transpose(1, 2)

    tokens = torch.arange(10).view(2, 5) % 7
    (layer,) = energy_points(Tied(), tokens).layers
    assert (layer.name, layer.sites) == ("words", (("words", "weight"), ("", "head")))
    assert layer.macs == 5 * 4 * 7
    model = Tied()
    plan = by_hand(energy_points(model, tokens), 4)
    rounded = tq.quantize(model, [(tokens,)], EnergyTask(), plan)
    assert rounded.head is not rounded.words.weight
    assert torch.equal(rounded.head, rounded.words.weight)
    assert len(set(weight_quantizers(rounded).values())) == 1


def test_autocast_does_not_hide_a_weight() -> None:
    class Narrow(EnergyTask):
        def outputs(self, model, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return model(*batch)

    torch.manual_seed(0)
    (layer,) = tq.discover(Affine(5, 4), [(torch.randn(2, 5),)], Narrow()).layers
    assert (layer.name, layer.channel_axis, layer.macs) == ("matrix", 1, 20)


def test_conv1d_of_transformers() -> None:
    """GPT-2: weights [in, out], and an output layer that is tied to the embedding of the words."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16, use_cache=False, bos_token_id=0, eos_token_id=0
    )

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = transformers.GPT2LMHeadModel(config)

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.as_tensor(self.net(tokens).logits.transpose(1, 2))

    torch.manual_seed(0)
    model = Language().eval()
    tokens = torch.randint(0, 20, (3, 6))
    data = [(tokens[:, :-1], tokens[:, 1:])]
    points = tq.discover(model, data, TASK)
    assert [layer.name.removeprefix("net.transformer.") for layer in points.layers] == [
        "wte", "wpe", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj",
    ]  # fmt: skip
    assert len(points.by_name["net.transformer.wte"].sites) == 2
    layer = points.by_name["net.transformer.h.0.mlp.c_fc"]
    assert (layer.kind, layer.shape, layer.channel_axis) == ("Conv1D", (8, 32), 1)
    assert (layer.macs, layer.activation) == (5 * 8 * 32, layer.name)
    assert sum(tensor.name.endswith("weight") for tensor in points.float_tensors) == 3  # LayerNorm's alone
    curvature = tq.estimate_curvature(model, data, TASK, estimator="gauss_newton", points=points, num_probes=1)
    assert all(estimate.trace > 0 for estimate in curvature.weights.values())
    plan = by_hand(points, 3, 8)
    rounded = tq.quantize(model, data, TASK, plan)
    weight = rounded.net.transformer.h[0].mlp.c_fc.weight
    assert all(len(weight[:, column].unique()) <= 8 for column in range(32))


# Recurrent layers


@pytest.mark.parametrize("name", RECURRENT)
def test_every_matrix_of_a_recurrent_layer_is_a_layer(name: str) -> None:
    model = build(name)
    points = tq.discover(model, batches(), TASK)
    matrices = [f"rnn.{key}" for key, value in model.rnn.named_parameters() if value.ndim > 1]
    assert [layer.name for layer in points.layers] == [*matrices, "fc"]
    for layer in points.layers[:-1]:
        assert layer.kind == type(model.rnn).__name__
        assert (layer.channel_axis, layer.macs) == (0, STEPS * layer.numel)
        first = model.rnn.batch_first and "weight_ih_l0" in layer.name
        assert layer.activation == ("rnn" if first else None)


def test_cells_and_projections() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru = nn.LSTMCell(5, 4), nn.GRUCell(5, 3)
            self.narrow = nn.LSTM(4, 6, proj_size=2)

        def forward(self, x: Tensor) -> Tensor:
            state, hidden, steps = None, None, []
            for step in x.unbind(1):
                state = self.lstm(step, state)
                hidden = self.gru(step, hidden)
                steps.append(state[0])
            return torch.cat([self.narrow(torch.stack(steps))[0].mean(0), hidden], 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its library has no projections
        points = energy_points(Cells(), batches()[0][0])
    assert {layer.name: layer.macs for layer in points.layers} == {
        "lstm.weight_ih": STEPS * 16 * 5, "lstm.weight_hh": STEPS * 16 * 4,
        "gru.weight_ih": STEPS * 9 * 5, "gru.weight_hh": STEPS * 9 * 3,
        "narrow.weight_ih_l0": STEPS * 24 * 4, "narrow.weight_hh_l0": STEPS * 24 * 2,
        "narrow.weight_hr_l0": STEPS * 2 * 6,
    }  # fmt: skip


def test_packed_sequences_count_the_steps_that_they_have() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.LSTM(WIDTH, 6, batch_first=True), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, torch.tensor([7, 7, 4, 4, 1, 1]), batch_first=True)
            return torch.as_tensor(self.fc(self.rnn(packed)[1][0][-1]))

    torch.manual_seed(0)
    model = Packed()
    points = tq.discover(model, batches(), TASK)
    assert points.by_name["rnn.weight_hh_l0"].macs == 4 * 24 * 6  # 24 steps of 6 samples
    assert points.by_name["rnn.weight_ih_l0"].activation is None
    rounded = tq.quantize(model, batches(), TASK, by_hand(points, 3, 8)).eval()
    assert torch.equal(rounded(batches()[0][0]), copy.deepcopy(rounded)(batches()[0][0]))


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("training", [False, True])
def test_a_recurrent_layer_computes_with_its_rounded_weights(name: str, training: bool) -> None:
    """The same outputs and gradients as the float module that has the rounded values; copies alike."""
    model = build(name)
    x = batches()[0][0]
    rounded = quantized(model, 8).train(training)
    plain = tq.to_float(rounded)
    assert not torch.equal(plain.rnn.weight_hh_l0, model.rnn.weight_hh_l0)
    outputs, want = rounded(x), plain(x)
    assert torch.equal(outputs, want)
    assert torch.equal(copy.deepcopy(rounded)(x), outputs)
    outputs.square().sum().backward()
    want.square().sum().backward()
    for key, parameter in plain.rnn.named_parameters():
        chain = rounded.rnn.parametrizations[key].original if "weight" in key else getattr(rounded.rnn, key)
        torch.testing.assert_close(chain.grad, parameter.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        for chain in rounded.rnn.parametrizations.values():
            chain.original.zero_()
    assert not torch.equal(rounded(x), outputs)  # nothing is remembered from the last call
    assert torch.equal(rounded.to("cpu", torch.float32)(x), rounded(x))


# The whole way


@pytest.mark.filterwarnings("ignore:.*not significantly above zero")
@pytest.mark.parametrize("name", MODELS)
def test_from_curvature_to_a_packed_file(name: str, tmp_path: Path) -> None:
    model = build(name)
    before = snapshot(model)
    points = tq.discover(model, batches(), TASK)
    curvature = tq.estimate_curvature(model, batches(), TASK, estimator="gauss_newton", points=points, num_probes=2)
    sensitivity = tq.measure_sensitivity(model, batches(), TASK, curvature, weight_bits=(3, 4, 8), activation_bits=(8,))
    plan = tq.solve(sensitivity, average_bits=5.0)
    rounded = tq.quantize(model, batches(), TASK, plan)
    assert {key: quantizer.num_bits for key, quantizer in weight_quantizers(rounded).items()} == {
        site: plan.weight_bits[layer.name] for layer in points.layers for site in layer.sites
    }
    originals = {
        key: rounded.get_submodule(key[0]).parametrizations[key[1]].original.clone()
        for key in weight_quantizers(rounded)
    }
    tq.finetune(rounded, batches(), TASK, steps=2, teacher=model, learning_rate=1e-2)
    for key, original in originals.items():
        assert not torch.equal(rounded.get_submodule(key[0]).parametrizations[key[1]].original, original), key
    path = tmp_path / "model.safetensors"
    assert tq.pack(rounded, path) == plan.size_bytes == path.stat().st_size
    loaded = tq.load(path, model)
    x = batches()[0][0]
    assert torch.equal(loaded(x), rounded.eval()(x))
    plain = tq.to_float(loaded)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
    for stored in tq.read_packed(path).weights():
        module, parameter = stored.entry.sites[0]
        values = getattr(plain.get_submodule(module), parameter).detach().numpy()
        assert np.array_equal(stored.dequantize(), values), stored.entry.name
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("name", "weight_bits"),
    [("functional", 3), ("functional", 8), ("lstm", 8), ("lstm of 2 layers, bidirectional", 3), ("gru", 3), ("rnn", 4)],
)
def test_onnx_runtime_computes_the_same(name: str, weight_bits: int, tmp_path: Path) -> None:
    """The codes are in the file, and the outputs agree to rounding."""
    pytest.importorskip("onnxruntime")
    from test_onnx import difference, run

    rounded = quantized(build(name), weight_bits, 8).eval()
    x = batches()[0][0]
    file = tq.export_onnx(rounded, tmp_path / "model.onnx", x)
    assert difference(run(tmp_path / "model.onnx", x), rounded(x)) < 1e-5
    codes = sum(q.num_bits * rounded.get_submodule(m).parametrizations[p].original.numel()
                for (m, p), q in weight_quantizers(rounded).items())  # fmt: skip
    assert codes / 8 <= file.code_bytes < 1.1 * codes / 8 + 16


def test_projections_have_no_onnx(tmp_path: Path) -> None:
    model = Recurrent(nn.LSTM, batch_first=True, proj_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rounded = quantized(model)
        with pytest.raises(tq.ModelError, match="without projections, rnn has proj_size=2"):
            tq.export_onnx(rounded, tmp_path / "model.onnx", batches()[0][0])


def test_latency_of_layers_without_a_module_of_their_own() -> None:
    pytest.importorskip("onnxruntime")
    model = build("lstm")
    points = tq.discover(model, batches(), TASK)
    table = tq.measure_latency(model, batches(), TASK, points, weight_bits=(4,), activation_bits=(8,), repeats=3)
    assert set(table) == {layer.name for layer in points.layers}
    assert all(ms > 0 for by_weight in table.values() for by_input in by_weight.values() for ms in by_input.values())


@pytest.mark.parametrize("name", MODELS)
def test_traces_are_those_of_the_gradients(name: str) -> None:
    """Tr(Jᵀ H J) of every layer in float64, with J by torch.func for each sample."""
    model = build(name).double()
    (x, y) = batches()[0]
    data = [(x.double(), y)]
    points = tq.discover(model, data, TASK)
    curvature = tq.estimate_curvature(
        model, data, TASK, estimator="gauss_newton", num_probes="exact", points=points, activations=False
    )
    weights = {".".join(filter(None, layer.sites[0])): layer.name for layer in points.layers}
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    total = dict.fromkeys(weights, 0.0)
    for sample in data[0][0]:

        def outputs(some: dict[str, Tensor], sample: Tensor = sample) -> Tensor:
            return torch.func.functional_call(model, parameters | some, (sample[None],))[0]

        some = {key: parameters[key] for key in weights}
        p = outputs(some).softmax(0)
        hessian = p.diag() - p[:, None] * p
        for key, jacobian in torch.func.jacrev(outputs)(some).items():
            j = jacobian.flatten(1)
            total[key] += float((hessian * (j @ j.T)).sum()) / SAMPLES
    for key, name_of_layer in weights.items():
        assert curvature.weights[name_of_layer].trace == pytest.approx(total[key], rel=1e-8, abs=1e-12)


# Weights that are computed


def weight_normed(style: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(STEPS, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES))
    apply = {
        "new": nn.utils.parametrizations.weight_norm,
        "old": nn.utils.weight_norm,
        "spectral": nn.utils.parametrizations.spectral_norm,
        "old spectral": nn.utils.spectral_norm,
        "pruned": lambda module: nn.utils.prune.l1_unstructured(module, "weight", amount=0.3),
    }[style]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module in (model[0], model[3]):
            apply(module)
    return model


@pytest.mark.parametrize("style", ["new", "old", "spectral", "old spectral", "pruned"])
def test_weight_norm_is_fused_in_a_copy(style: str, tmp_path: Path) -> None:
    """Equal outputs, plain parameters in their order; the model goes on to compute its weights, and can be trained."""
    model = weight_normed(style)
    model(batches()[0][0])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(tq.ModelError, match=r"module 0 computes its weight .*tracequant\.fuse_weight_norm\(model\)"):
        tq.discover(model, batches(), TASK)
    fused = tq.fuse_weight_norm(model)
    assert fused.training
    assert model.training
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(fused.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert all(parameter.requires_grad for parameter in fused.parameters())
    x = batches()[0][0]
    assert torch.equal(fused.eval()(x), model.eval()(x))
    plan = by_hand(tq.discover(fused, batches(), TASK), 4, 8)
    rounded = tq.quantize(fused, batches(), TASK, plan)
    tq.finetune(rounded, batches(), TASK, steps=1, teacher=model)
    assert tq.pack(rounded, tmp_path / "model.safetensors") == plan.size_bytes
    assert torch.equal(tq.load(tmp_path / "model.safetensors", fused)(x), rounded.eval()(x))
    model.train()(x).sum().backward()


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("style", ["new", "old"])
def test_weight_norm_of_a_recurrent_layer(style: str, called: bool) -> None:
    model = build("lstm")
    apply = nn.utils.parametrizations.weight_norm if style == "new" else nn.utils.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        apply(model.rnn, "weight_hh_l0")
    x = batches()[0][0]
    if called:
        model(x)  # from now on the layer holds a computed weight, which torch does not copy
    fused = tq.fuse_weight_norm(model)
    assert torch.equal(fused(x), model(x))
    assert list(fused.state_dict()) == list(build("lstm").state_dict())
    with torch.no_grad():
        fused.rnn.weight_hh_l0.zero_()
    assert not torch.equal(fused(x), model(x))


def test_a_quantized_model_is_not_fused() -> None:
    with pytest.raises(tq.ModelError, match=r"module .* is quantized already; tracequant\.to_float"):
        tq.fuse_weight_norm(quantized(build("functional")))


def test_a_plain_model_is_copied() -> None:
    model = build("functional")
    fused = tq.fuse_weight_norm(model)
    assert fused is not model
    assert all(torch.equal(value, fused.state_dict()[key]) for key, value in model.state_dict().items())
