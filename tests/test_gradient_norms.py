"""Squared norms of each sample's weight gradient against `torch.func`'s per-sample gradients, in float64."""

import math
from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tracequant.curvature import gradient_norms
from tracequant.curvature.gradient_norms import squared_norms, supported, total_gradient

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
SAMPLES = 3
Calls = list[tuple[Tensor, Tensor]]
# What makes each form the cheapest one, whatever the geometry; `_pixel_norms` is not offered for every geometry.
COSTS = {
    "_unfolded_norms": {"UNFOLD": 0, "WRITE": 1e18, "ADD": 1e18},
    "_grouped_norms": {"UNFOLD": 1e18, "WRITE": 0, "ADD": 1e18},
    "_pixel_norms": {"UNFOLD": 1e18, "WRITE": 1e18, "ADD": -1e6},
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


def by_func(module: nn.Module, calls: Calls, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """‖G_n‖² and Σ_n G_n from the gradient of Σ ⟨module(x_n), d_n⟩, one sample at a time."""
    rows = [(a.unflatten(0, (samples, -1)), d.unflatten(0, (samples, -1))) for a, d in calls]
    others = {name: p.detach() for name, p in module.named_parameters() if name != "weight"}

    def value(weight: Tensor, own: Calls) -> Tensor:
        return sum((functional_call(module, {"weight": weight, **others}, (a,)) * d).sum() for a, d in own)

    found = vmap(grad(value), (None, 0))(module.weight.detach(), rows)
    return found.flatten(1).square().sum(1), found.sum(0)


def agree(module: nn.Module, calls: Calls, samples: int = SAMPLES) -> None:
    module = module.double()
    assert supported(module)
    expected, total = by_func(module, calls, samples)
    assert expected.min() > 0
    found = squared_norms(module, calls, samples)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(total_gradient(module, calls, samples), total, rtol=1e-10, atol=1e-12)


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
    if taken is not None and math.prod(module.kernel_size) > 1 and (form != "_pixel_norms" or module.groups == 1):
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
        monkeypatch.setattr(gradient_norms, name, value)
    for name in COSTS:
        own = getattr(gradient_norms, name)
        monkeypatch.setattr(gradient_norms, name, lambda c, own=own, name=name: (taken.append(name), own(c))[1])
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
        for n, (own, rows) in enumerate(zip(index.view(SAMPLES, -1), d.view(SAMPLES, -1, 3), strict=True)):
            for i, row in zip(own.tolist(), rows, strict=True):
                if i != (padding if padding != -1 else 5):
                    expected[n, i] += row
    found = squared_norms(module, calls, SAMPLES)
    torch.testing.assert_close(found, expected.flatten(1).square().sum(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(total_gradient(module, calls, SAMPLES), expected.sum(0), rtol=1e-10, atol=1e-12)
    weight = module.weight.detach().requires_grad_()
    value = sum((nn.functional.embedding(i, weight, module.padding_idx) * d).sum() for i, d in calls)
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], expected.sum(0))


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
    expected, total = by_func(module, calls)
    with pytest.MonkeyPatch.context() as patch:
        force(form, patch)
        torch.testing.assert_close(squared_norms(module, calls, SAMPLES), expected, rtol=1e-10, atol=1e-20)
    torch.testing.assert_close(total_gradient(module, calls, SAMPLES), total, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", COSTS)
def test_samples_taken_one_at_a_time_give_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(2, 3, 3, padding=1).double()
    monkeypatch.setattr(gradient_norms, "CHUNK_ELEMENTS", 1)
    taken = force(form, monkeypatch)
    agree(module, calls_of(module, [(SAMPLES, 2, 4, 5)]))
    assert taken == [form] * SAMPLES


def test_the_form_follows_the_cost() -> None:
    """Many pixels and few weights: a gradient; few pixels and many channels: the Gram form over pixels."""

    def cheapest(module: nn.Module, size: int) -> str:
        x = torch.empty(1, module.in_channels, size, size)
        call = gradient_norms._as_convolution(module, x, module(x))
        return gradient_norms._cheapest([call])[0].__name__

    assert cheapest(nn.Conv2d(8, 8, 3, padding=1), 32) == "_grouped_norms"
    assert cheapest(nn.Conv2d(256, 256, 3, padding=1), 4) == "_pixel_norms"
    assert cheapest(nn.Conv2d(64, 64, 1), 8) == "_unfolded_norms"


def test_half_precision_calls_are_taken_in_the_weights() -> None:
    """As autocast leaves them: inputs and gradients in bfloat16, the norms of the gradient in float32 and not above."""
    module = nn.Conv2d(2, 3, 3)
    calls = [(a.bfloat16(), d.bfloat16()) for a, d in calls_of(module.double(), [(SAMPLES, 2, 5, 5)])]
    expected, total = by_func(module, [(a.double(), d.double()) for a, d in calls])
    module.float()
    torch.testing.assert_close(squared_norms(module, calls, SAMPLES), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(total_gradient(module, calls, SAMPLES), total.float(), rtol=1e-4, atol=1e-4)


class Doubling(nn.Conv2d):
    """A convolution whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_is_not_supported() -> None:
    """A forward of one's own, and embeddings that scale or renormalise; a subclass that changes nothing is."""
    assert not supported(Doubling(1, 1, 1))
    assert supported(type("Renamed", (nn.Conv2d,), {})(1, 1, 1))
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        assert not supported(nn.Embedding(3, 2, **option))
    assert not supported(nn.LSTM(2, 2))
    assert not supported(nn.Bilinear(2, 2, 2))
