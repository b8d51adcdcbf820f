"""Lanczos' eigenvalues and densities against full decompositions of exact Hessian blocks."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_task
import tracequant as tq
from cli_runs import invoke
from tracequant.curvature import spectrum
from tracequant.curvature.products import exact_block
from tracequant.curvature.spectrum import BASIS, WORK_VECTORS, _Search
from tracequant.model import memory
from tracequant.run import examine
from tracequant.run.directory import RunDirectory

TASK = tq.ClassificationTask()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def data(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(size, 5, dtype=torch.float64), torch.arange(size) % 4) for size in sizes]


def exact(model: nn.Module, batches: list[tuple[Tensor, Tensor]], points: tq.QuantizationPoints, name: str) -> Tensor:
    """Eigenvalues of the block of the mean loss over all samples."""
    whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    return torch.linalg.eigvalsh(exact_block(model, whole, TASK, points, name))


@pytest.mark.parametrize("sizes", [(12,), (7, 5)])
def test_the_largest_eigenvalues_of_every_layer(sizes: tuple[int, ...]) -> None:
    model, batches = network(), data(*sizes)
    points = tq.discover(model, batches, TASK)
    found = tq.top_eigenvalues(model, batches, TASK, points, k=5, tolerance=1e-9)
    for name in ("0", "2"):
        values = exact(model, batches, points, name)
        expected = values[values.abs().argsort(descending=True)][:5]
        assert found[name] == pytest.approx(expected.tolist(), rel=1e-8)


def test_eigenvalues_that_are_not_known_well_enough_are_reported() -> None:
    """They are still given, all of them, and the best that so few products tell."""
    model, batches = network(), data(12)
    points = tq.discover(model, batches, TASK)
    with pytest.warns(UserWarning, match=r"eigenvalues of 2 layers \(0, 2\).*after about 5 products"):
        found = tq.top_eigenvalues(model, batches, TASK, points, k=3, tolerance=1e-9, steps=5)
    for name in ("0", "2"):
        largest = float(exact(model, batches, points, name).abs().max())
        assert len(found[name]) == 3
        assert 0.5 * largest < abs(found[name][0]) <= largest * (1 + 1e-9)


def symmetric(numel: int, *spread: float) -> Tensor:
    """A symmetric matrix that has the eigenvalues `spread`, and others between -1 and 1."""
    random = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(numel, numel, generator=random, dtype=torch.float64))
    values = torch.rand(numel, generator=random, dtype=torch.float64) * 2 - 1
    values[: len(spread)] = torch.tensor(spread, dtype=torch.float64)
    return basis * values @ basis.T


@pytest.mark.parametrize("numel", [12, 300])
def test_pairs_of_a_known_matrix(numel: int) -> None:
    matrix = symmetric(numel, 9.0, -7.0, 5.0)
    search = _Search(k=3, tolerance=1e-10, steps=200)
    start = torch.randn(numel, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, vectors = search.run("layer", lambda v: matrix @ v, start)
    assert values == pytest.approx([9, -7, 5])
    columns = torch.from_numpy(vectors)
    assert torch.allclose(matrix @ columns, columns * torch.tensor(values, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(columns.T @ columns, torch.eye(3, dtype=torch.float64), atol=1e-10)


def test_pairs_that_converged_are_kept_with_the_best_guesses() -> None:
    """One eigenvalue stands out and two do not, which so few products cannot separate from the others."""
    matrix = symmetric(2000, 50.0)
    search = _Search(k=3, tolerance=1e-8, steps=30)
    start = torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, vectors = search.run("layer", lambda v: matrix @ v, start)
    with pytest.warns(UserWarning, match="eigenvalues of 1 layers"):
        search.warn()
    assert values[0] == pytest.approx(50, rel=1e-8)
    assert all(0.8 < abs(value) < 1 for value in values[1:])
    columns = torch.from_numpy(vectors)
    assert torch.allclose(columns.T @ columns, torch.eye(3, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("numel", [6, 60])
@pytest.mark.parametrize("factor", [3.0, 0.0])
def test_a_multiple_of_the_identity_has_its_eigenvalue_many_times(numel: int, factor: float) -> None:
    start = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    values, vectors = _Search(k=2, tolerance=1e-3, steps=100).run("layer", lambda v: factor * v, start)
    assert values == pytest.approx([factor, factor])
    assert torch.allclose(torch.from_numpy(vectors.T @ vectors).double(), torch.eye(2).double(), atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that one tensor had."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def test_a_large_layer_keeps_few_vectors_of_its_size() -> None:
    """Not one for each product: a layer of 100 million weights would take 40 GB."""
    torch.manual_seed(0)
    model, numel = nn.Sequential(nn.Linear(1000, 1000)), 1_000_000
    batches = [(torch.randn(2, 1000), torch.tensor([1, 2]))]
    points = tq.discover(model, batches, TASK)
    tracemalloc.start()
    with LargestTensor() as seen:
        found = tq.top_eigenvalues(model, batches, TASK, points, tolerance=1e-4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen.numel <= 2 * numel
    assert peak < (2 * BASIS + 2 + WORK_VECTORS) * numel * 4  # scipy reserves a basis for the result, and uses little
    # Both samples' blocks are xxᵀ ⊗ (diag(p) − ppᵀ) / 2, and their inputs nearly orthogonal.
    x = batches[0][0]
    p = model(x).detach().softmax(1)
    largest = torch.linalg.eigvalsh(torch.diag_embed(p) - p[:, :, None] * p[:, None])[:, -1]
    assert found["0"][0] == pytest.approx(float((largest * x.square().sum(1) / 2).max()), rel=0.05)


def test_vectors_that_do_not_fit_are_an_error_that_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = network(), data(12)
    points = tq.discover(model, batches, TASK)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda: 4000)
        with pytest.raises(tq.ResourceError, match="eigenvalues of layer 0 need 29 vectors of its size"):
            tq.top_eigenvalues(model, batches, TASK, points)

    def full(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(spectrum, "eigsh", full)
    with pytest.raises(tq.ResourceError, match="eigenvalues of layer 0 need 29 vectors of its size"):
        tq.top_eigenvalues(model, batches, TASK, points)


def test_a_density_from_all_steps_is_that_of_the_matrix() -> None:
    """With as many steps as weights the quadrature is exact for its start; averaged, its trace is the block's."""
    model, batches = network(), data(12)
    points = tq.discover(model, batches, TASK)
    density = tq.spectral_density(model, batches, TASK, points, layer="2", num_probes=400, steps=24, seed=1)
    values = exact(model, batches, points, "2")
    assert density.numel == 24
    assert density.trace == pytest.approx(float(values.sum()), rel=0.1)
    assert max(n for nodes in density.nodes for n in nodes) == pytest.approx(float(values.max()), rel=1e-6)
    width = float(values.max()) / 20
    at = torch.linspace(float(values.min()) - 4 * width, float(values.max()) + 4 * width, 60).tolist()
    kernel = torch.exp(-0.5 * ((torch.tensor(at)[:, None] - values[None]) / width) ** 2)
    expected = (kernel / (width * math.sqrt(2 * math.pi))).mean(1)
    assert torch.tensor(density.smoothed(at, width)) == pytest.approx(expected, abs=0.1 * float(expected.max()))


def test_a_density_of_the_whole_model_takes_in_the_blocks_between_layers() -> None:
    model, batches = network(), data(12)
    points = tq.discover(model, batches, TASK)
    density = tq.spectral_density(model, batches, TASK, points, num_probes=2, steps=54)
    parameters = {name: p.detach() for name, p in model.named_parameters() if name.endswith("weight")}
    shapes = [p.shape for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(parameters, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (batches[0][0],)), batches[0][1])

    flat = torch.cat([p.flatten() for p in parameters.values()])
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    assert density.layer is None
    assert density.numel == 54
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        assert max(nodes) == pytest.approx(float(values.max()), rel=1e-6)
        assert min(nodes) == pytest.approx(float(values.min()), rel=1e-6)
        assert math.fsum(weights) == pytest.approx(1)


def test_a_density_survives_a_file(tmp_path: Path) -> None:
    model, batches = network(), data(6)
    points = tq.discover(model, batches, TASK)
    density = tq.spectral_density(model, batches, TASK, points, layer="0", num_probes=2, steps=3)
    spectrum = tq.Spectrum({"0": (2.0, -1.0)}, (density,))
    spectrum.save(tmp_path / "spectrum.json")
    assert tq.Spectrum.load(tmp_path / "spectrum.json") == spectrum
    with pytest.raises(tq.ModelError, match="no layer 'nowhere'"):
        tq.spectral_density(model, batches, TASK, points, layer="nowhere")


class Graphless(nn.Linear):
    """Has no memory for the graph of more than 8 samples."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_a_graph_that_does_not_fit_is_one_error() -> None:
    model, batches = nn.Sequential(Graphless(5, 4)).double(), data(16)
    points = tq.discover(model, batches, TASK)
    message = "memory does not suffice for the graph of a batch.*smaller batches"
    with pytest.raises(tq.ResourceError, match=message):
        tq.top_eigenvalues(model, batches, TASK, points)
    with pytest.raises(tq.ResourceError, match=message):
        tq.spectral_density(model, batches, TASK, points)
    with pytest.raises(tq.ResourceError, match=message):
        tq.loss_landscapes(model, batches, TASK, points, layers=["0"], size=3)
    x, y = batches[0]
    assert tq.top_eigenvalues(model, [(x[:8], y[:8]), (x[8:], y[8:])], TASK, points)["0"]


def test_a_run_measures_on_as_many_samples_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues, densities and landscapes alike, and a warning says how many samples there were."""
    path = tmp_path / "run"
    task = f"{Path(tiny_task.__file__)}:build"
    assert invoke("analyze", "--task", task, "--out", path, "--activation-bits", "none", "--no-eigenvalues", "-q") == 0
    run = RunDirectory(path)
    setup = run.setup()
    size = len(setup.calibration[0][1])
    setup.model[-1].__class__ = Graphless
    with pytest.warns(UserWarning, match="the spectrum is of the first 8 samples, because the graph of more does not"):
        found = examine.measure_spectrum(run, ["0"], 1, ["*"])
    assert size > found.samples == 8
    assert found.densities
    with pytest.warns(UserWarning, match="the eigenvalues are of the first 8 samples"):
        assert examine.eigenvalues(run, ["3"], 1).eigenvalues.keys() == {"0", "3"}
    with pytest.warns(UserWarning, match="the landscapes are of the first 8 samples"):
        assert examine.landscapes(run, ["0"], 3).samples == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_few_digits_is_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 4)).to(dtype)
    batches = [(x.to(dtype), y) for x, y in data(4)]
    points = tq.discover(model, batches, TASK)
    with pytest.raises(tq.ModelError, match=r"float16 parameters, too coarse for curvature; use model.float\(\)"):
        tq.top_eigenvalues(model, batches, TASK, points)


def test_the_command_writes_eigenvalues_and_figure_which_the_report_takes_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, task = tmp_path / "run", f"{Path(tiny_task.__file__)}:build"
    assert invoke("analyze", "--task", task, "--out", run, "--activation-bits", "none", "-q") == 0
    assert invoke("plan", run, "--average-bits", 3, "--stability") == 0
    assert "Stable: the share of 100 resamples" in capsys.readouterr().out
    assert invoke("report", run, "-q") == 0
    without = (run / "report.html").read_text()
    first = next(iter(tq.Curvature.load(run / "curvature.json").weights))
    assert invoke("spectrum", run, "--layer", first, "--top", 3, "--density", "*", "--density", first) == 0
    assert first in capsys.readouterr().out
    found = tq.Spectrum.load(run / "spectrum.json")
    assert {name: len(values) for name, values in found.eigenvalues.items()} == {first: 3}
    assert [density.layer for density in found.densities] == [None, first]
    known = tq.Curvature.load(run / "curvature.json").top_eigenvalues
    assert known is not None
    assert found.eigenvalues[first][0] == pytest.approx(known[first], rel=0.02)
    assert (run / "figures" / "spectrum.png").stat().st_size > 1000
    assert invoke("report", run, "-q") == 0
    assert "<h2>Eigenvalues</h2>" in (run / "report.html").read_text()
    assert "<h2>Eigenvalues</h2>" not in without
    # Eigenvalues of other samples are not those of the new analysis.
    assert invoke("analyze", "--task", task, "--out", run, "--activation-bits", "none", "--seed", 5, "-q") == 0
    assert not (run / "spectrum.json").exists()
    assert invoke("spectrum", run, "--top", 0, "-q") == 2  # nothing to measure
