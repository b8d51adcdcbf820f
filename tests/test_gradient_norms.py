"""Squared norms of each sample's weight gradient against `torch.func`'s per-sample gradients, in float64."""

import dataclasses
import math
from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tracequant.curvature import convolution_norms, gradient_norms
from tracequant.curvature.gradient_norms import Call, inner_products, squared_norms
from tracequant.curvature.operations import Convolution
from tracequant.curvature.sweep import Rows, Sweep

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
SAMPLES = 3
Calls = list[tuple[Tensor, Tensor]]
# What makes each form the cheapest one, whatever the geometry; the last two are not offered for every geometry.
COSTS = {
    "_unfolded_norms": {"UNFOLD": 0, "WRITE": 1e18, "ADD": 1e18, "SHIFT": 1e18},
    "_grouped_norms": {"UNFOLD": 1e18, "WRITE": 0, "ADD": 1e18, "SHIFT": 1e18},
    "_pixel_norms": {"UNFOLD": 1e18, "WRITE": 1e18, "ADD": -1e6, "SHIFT": 1e18},
    "_shifted_norms": {"UNFOLD": 1e18, "WRITE": 1e18, "ADD": 1e18, "SHIFT": -1e6},
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calls_of(module: nn.Module, shapes: list[tuple[int, ...]], seed: int = 0) -> Calls:
    """A call for each input shape (without samples), the gradients of its outputs random."""
    calls = []
    for number, shape in enumerate(shapes):
        x = random(*shape, seed=seed + number)
        calls.append((x, random(*module(x).shape, seed=100 + seed + number)))
    return calls


def by_func(module: nn.Module, calls: Calls, samples: int = SAMPLES) -> Tensor:
    """G_n `[samples, ...]`: the gradient of Σ ⟨module(x_n), d_n⟩, one sample at a time."""
    rows = [(a.unflatten(0, (samples, -1)), d.unflatten(0, (samples, -1))) for a, d in calls]
    others = {name: p.detach() for name, p in module.named_parameters() if name != "weight"}

    def value(weight: Tensor, own: Calls) -> Tensor:
        return sum((functional_call(module, {"weight": weight, **others}, (a,)) * d).sum() for a, d in own)

    return vmap(grad(value), (None, 0))(module.weight.detach(), rows)


def recorded(module: nn.Module, calls: Calls, samples: int = SAMPLES) -> list[Call]:
    """The calls as a pass over the graph hands them on."""
    weight = module.weight.requires_grad_()
    outputs = [module(a) for a, _ in calls]
    sweep = Sweep(outputs, Rows(samples, 0, samples), {"layer": weight}, {})
    assert not sweep.axes.slow
    arrived: list[Call] = []

    def on_layer(name: str, parts: list[list[Call]]) -> None:
        (part,) = parts
        arrived.extend(part)

    sweep.run([d for _, d in calls], keep=False, on_layer=on_layer, on_activation=lambda *_: None)
    return arrived


def agree(module: nn.Module, calls: Calls, samples: int = SAMPLES) -> None:
    """Norms, and products with two directions, are those of `torch.func`'s gradients."""
    module = module.double()
    expected = by_func(module, calls, samples)
    assert expected.flatten(1).square().sum(1).min() > 0
    found = recorded(module, calls, samples)
    norms = squared_norms(found, torch.float64)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, expected.flatten(1).square().sum(1), rtol=1e-10, atol=0)
    directions = [random(*module.weight.shape, seed=s) for s in (7, 8)]
    products = torch.stack([(expected * v).flatten(1).sum(1) for v in directions], 1)
    torch.testing.assert_close(inner_products(found, torch.stack(directions)), products, rtol=1e-9, atol=1e-11)


# Module, and the shape of its input without samples.
GEOMETRIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "2d": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 4, 5)),
    "3d": (lambda: nn.Conv3d(2, 2, 2, padding=(1, 0, 1)), (2, 3, 2, 3)),
    "pointwise, strided, padded": (lambda: nn.Conv2d(3, 4, 1, 2, padding=1), (3, 4, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), (3, 4, 4)),
    "depthwise, two outputs": (lambda: nn.Conv1d(3, 6, 2, groups=3), (3, 5)),
    "dilation": (lambda: nn.Conv2d(2, 3, (2, 3), dilation=(3, 2), padding=(2, 1)), (2, 5, 6)),
    "stride that leaves a rest": (lambda: nn.Conv2d(2, 3, 3, stride=(3, 2)), (2, 8, 6)),
    "stride beyond the kernel": (lambda: nn.Conv1d(2, 3, 2, stride=4), (2, 9)),
    "asymmetric": (lambda: nn.Conv2d(2, 3, (1, 4), padding=(0, 2)), (2, 3, 4)),
    "same, even kernel": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 5, 5)),
    "valid": (lambda: nn.Conv1d(2, 3, 3, padding="valid"), (2, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular", stride=2), (2, 4, 5)),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 5)),
    "replicate, same": (lambda: nn.Conv3d(1, 2, 2, padding="same", padding_mode="replicate"), (1, 3, 3, 2)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (3, 2), 1, (2, 1), groups=2), (4, 3, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 1, 2, stride=2, padding=1), (2, 2, 3, 2)),
    "transposed, dilation": (lambda: nn.ConvTranspose2d(2, 3, 2, dilation=(1, 3), stride=(1, 2)), (2, 3, 2)),
    "transposed pointwise": (lambda: nn.ConvTranspose2d(2, 3, 1, stride=2, output_padding=1), (2, 3, 2)),
}


@pytest.mark.parametrize("form", [*COSTS, "as it chooses"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions(geometry: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = GEOMETRIES[geometry]
    torch.manual_seed(0)
    module = make().double()
    taken = force(form, monkeypatch)
    agree(module, calls_of(module, [(SAMPLES, *shape)]))
    offered = {"_pixel_norms": module.groups == 1, "_shifted_norms": module.weight.shape[1] == 1}.get(form, True)
    if taken is not None and math.prod(module.kernel_size) > 1 and offered:
        assert taken == [form]


def test_output_padding_beyond_the_stride() -> None:
    """Which torch allows where the dilation is larger still."""
    module = nn.ConvTranspose1d(2, 3, 2, stride=1, dilation=3, output_padding=2).double()
    agree(module, calls_of(module, [(SAMPLES, 2, 4)]))


def force(form: str, monkeypatch: pytest.MonkeyPatch) -> list[str] | None:
    """Make `form` the cheapest; returns a list that fills with the forms that are taken."""
    if form not in COSTS:
        return None
    taken: list[str] = []
    for name, value in COSTS[form].items():
        monkeypatch.setattr(convolution_norms, name, value)
    for name in COSTS:
        norms = getattr(convolution_norms, name)
        monkeypatch.setattr(
            convolution_norms, name, lambda c, norms=norms, name=name: (taken.append(name), norms(c))[1]
        )
    return taken


@pytest.mark.parametrize("form", COSTS)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_gradients_of_several_calls_add_up_before_squaring(
    kind: type[nn.Module], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls on maps of different sizes, one of them on two rows for each sample."""
    module = kind(2, 4, 3, stride=2, padding=1, groups=2).double()
    force(form, monkeypatch)
    agree(module, calls_of(module, [(SAMPLES, 2, 5, 4), (2 * SAMPLES, 2, 3, 3), (SAMPLES, 2, 4, 4)]))


@pytest.mark.parametrize("chunk", [1, 1 << 23])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((5,), 4), ((2, 3, 5), 4), ((9, 40), 50), ((60, 3), 4)],
    ids=["rows", "positions", "", "long"],
)
def test_linear(shape: tuple[int, ...], outputs: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Gram form where the gradient is large beside the positions, by the gradient itself where it is not."""
    monkeypatch.setattr(gradient_norms, "CHUNK_ELEMENTS", chunk)
    module = nn.Linear(shape[-1], outputs).double()
    agree(module, calls_of(module, [(SAMPLES, *shape)]))
    # Windows as rows of the batch, and a second call with other positions.
    agree(module, calls_of(module, [(4 * SAMPLES, *shape), (SAMPLES, 7, shape[-1])]))


@pytest.mark.parametrize("padding", [None, 2, -1])
def test_embedding(padding: int | None) -> None:
    """Repeated indices, the padding index (which has no gradient), several calls, several rows for each sample."""
    module = nn.Embedding(6, 3, padding_idx=padding).double()
    indices = [torch.tensor([[0, 2, 2, 5], [1, 1, 1, 1], [2, 3, 5, 3]]), torch.tensor([2, 0, 1, 3, 4, 4])]
    calls = [(index, random(*index.shape, 3, seed=i)) for i, index in enumerate(indices)]
    expected = torch.zeros(SAMPLES, 6, 3, dtype=torch.float64)
    for index, d in calls:
        for n, (entries, rows) in enumerate(zip(index.view(SAMPLES, -1), d.view(SAMPLES, -1, 3), strict=True)):
            for i, row in zip(entries.tolist(), rows, strict=True):
                if i != (padding if padding != -1 else 5):
                    expected[n, i] += row
    found = recorded(module, calls)
    norms = expected.flatten(1).square().sum(1)
    torch.testing.assert_close(squared_norms(found, torch.float64), norms, rtol=1e-10, atol=0)
    direction = random(6, 3, seed=9)
    torch.testing.assert_close(inner_products(found, direction[None])[:, 0], (expected * direction).sum((1, 2)))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_random_geometry(data: st.DataObject) -> None:
    def pick(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    dimensions, groups = pick(1, 3), pick(1, 3)
    transposed = data.draw(st.booleans())
    kernel, stride, dilation = (tuple(pick(1, 3) for _ in range(dimensions)) for _ in range(3))
    padding = tuple(pick(0, k) for k in kernel)
    inputs, outputs = groups * pick(1, 3), groups * pick(1, 3)
    form = data.draw(st.sampled_from([*COSTS, "as it chooses"]))
    shapes = []
    for _ in range(pick(1, 2)):
        # Just large enough for the kernel, or up to 3 larger.
        least = [1 + (k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        least = [1 + p for p in padding] if transposed else least
        shapes.append((pick(1, 2) * SAMPLES, inputs, *(size + pick(0, 3) for size in least)))
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        options["output_padding"] = tuple(pick(0, s - 1) for s in stride)
    module = kinds[dimensions - 1](inputs, outputs, kernel, **options).double()
    try:
        calls = calls_of(module, shapes, seed=pick(0, 99))
    except RuntimeError:
        hypothesis.reject()  # an output of no size
    hypothesis.assume(all(d.numel() for _, d in calls))
    expected = by_func(module, calls)
    found = recorded(module, calls)
    with pytest.MonkeyPatch.context() as patch:
        force(form, patch)
        norms = expected.flatten(1).square().sum(1)
        torch.testing.assert_close(squared_norms(found, torch.float64), norms, rtol=1e-10, atol=1e-20)
    direction = random(*module.weight.shape, seed=9)
    products = (expected * direction).flatten(1).sum(1)
    torch.testing.assert_close(inner_products(found, direction[None])[:, 0], products, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", COSTS)
def test_samples_taken_one_at_a_time_give_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(2, 4, 3, padding=1, groups=2 if form == "_shifted_norms" else 1).double()
    monkeypatch.setattr(gradient_norms, "CHUNK_ELEMENTS", 1)
    taken = force(form, monkeypatch)
    agree(module, calls_of(module, [(SAMPLES, 2, 4, 5)]))
    assert taken == [form] * SAMPLES


def test_the_form_follows_the_cost() -> None:
    """Many pixels and few weights: a gradient; few pixels and many channels: the Gram form over pixels."""

    def cheapest(module: nn.Conv2d, size: int) -> str:
        x = torch.empty(1, module.in_channels, size, size)
        geometry = Convolution(
            tuple(module.weight.shape), module.stride, module.padding, module.dilation, (0, 0), module.groups, False
        )
        return convolution_norms._cheapest([convolution_norms.pair(geometry, x, module(x))])[0].__name__

    assert cheapest(nn.Conv2d(8, 8, 3, padding=1), 32) == "_grouped_norms"
    assert cheapest(nn.Conv2d(256, 256, 3, padding=1), 4) == "_pixel_norms"
    assert cheapest(nn.Conv2d(64, 64, 1), 8) == "_unfolded_norms"
    assert cheapest(nn.Conv2d(64, 64, 3, padding=1, groups=64), 56) == "_shifted_norms"
    assert cheapest(nn.Conv2d(64, 64, 3, padding=1, groups=64), 7) == "_grouped_norms"


def test_half_precision_calls_are_taken_in_the_weights() -> None:
    """As autocast leaves them: inputs and gradients in bfloat16, the norms of the gradient in float32 and not above."""
    module = nn.Conv2d(2, 3, 3).double()
    calls = [(a.bfloat16().double(), d.bfloat16().double()) for a, d in calls_of(module, [(SAMPLES, 2, 5, 5)])]
    expected = by_func(module, calls).flatten(1).square().sum(1)
    halves = [
        dataclasses.replace(call, read=call.read.bfloat16(), gradient=call.gradient.bfloat16())
        for call in recorded(module, calls)
    ]
    torch.testing.assert_close(squared_norms(halves, torch.float32), expected, rtol=1e-5, atol=0)
