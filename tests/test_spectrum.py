"""Lanczos' eigenvalues and densities against full decompositions of exact Hessian blocks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny_task
import tracequant as tq
from tracequant import cli
from tracequant.curvature.products import exact_block
from tracequant.curvature.spectrum import _outermost

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
    model, batches = network(), data(12)
    points = tq.discover(model, batches, TASK)
    with pytest.warns(UserWarning, match=r"eigenvalues of 2 layers \(0, 2\).*after 3 products"):
        tq.top_eigenvalues(model, batches, TASK, points, k=3, tolerance=1e-9, steps=3)


def test_residuals_bound_the_error() -> None:
    """Every value lies within its residual of a true eigenvalue, however early Lanczos stops."""
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    matrix = square + square.T
    true = torch.linalg.eigvalsh(matrix)
    start = torch.randn(40, generator=generator, dtype=torch.float64)
    for steps in (4, 8, 16):
        values, residuals, _ = _outermost(lambda v: matrix @ v, start, 3, 0.0, steps)
        for value, residual in zip(values, residuals, strict=True):
            assert float((true - value).abs().min()) <= residual + 1e-10


def test_a_repeated_eigenvalue_ends_the_recurrence() -> None:
    values, residuals, _ = _outermost(lambda v: 3 * v, torch.ones(6), 2, 1e-3, 6)
    assert values == [pytest.approx(3)]
    assert residuals == [0]


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


def invoke(*arguments: object) -> int:
    """Exit code of `tracequant` with these arguments."""
    return cli.run_guarded(lambda: cli.app([str(argument) for argument in arguments]))


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
    spectrum = tq.Spectrum.load(run / "spectrum.json")
    assert {name: len(values) for name, values in spectrum.eigenvalues.items()} == {first: 3}
    assert [density.layer for density in spectrum.densities] == [None, first]
    known = tq.Curvature.load(run / "curvature.json").top_eigenvalues
    assert known is not None
    assert spectrum.eigenvalues[first][0] == pytest.approx(known[first], rel=0.02)
    assert (run / "figures" / "spectrum.png").stat().st_size > 1000
    assert invoke("report", run, "-q") == 0
    assert "<h2>Eigenvalues</h2>" in (run / "report.html").read_text()
    assert "<h2>Eigenvalues</h2>" not in without
    # Eigenvalues of other samples are not those of the new analysis.
    assert invoke("analyze", "--task", task, "--out", run, "--activation-bits", "none", "--seed", 5, "-q") == 0
    assert not (run / "spectrum.json").exists()
    assert invoke("spectrum", run, "--top", 0, "-q") == 2  # nothing to measure
