"""The door to all estimators: what it holds, refuses, warns of, leaves as it was, and how its result prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import tracequant as tq
from models import CLASSES, build, gelu_mlp, labelled
from tracequant.core.errors import GaussNewtonError
from tracequant.curvature import estimate

TASK = tq.ClassificationTask()


def relu_mlp() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)))


# Batches that can be read only once


def once(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches


@pytest.mark.parametrize("method", ["auto", "gauss_newton", "hutchinson"])
def test_a_generator_keeps_its_first_batch(method: str) -> None:
    model, batches = relu_mlp(), labelled(6, sizes=(3, 2, 4))
    found = tq.estimate_curvature(model, once(batches), TASK, estimator=method, num_probes=2)
    assert found.samples == 9
    assert found == tq.estimate_curvature(model, batches, TASK, estimator=method, num_probes=2)


def test_a_setup_holds_the_batches_of_generators() -> None:
    """Discovery, the curvature and the ranges of an analysis all read the calibration batches."""
    batches = labelled(6, sizes=(3, 2))
    setup = tq.TaskSetup(relu_mlp(), TASK, once(batches), once(batches), once(batches))
    for held in (setup.calibration, setup.train, setup.evaluation):
        assert list(held) == list(held) == batches
    loader = DataLoader(batches, batch_size=None)
    assert tq.TaskSetup(relu_mlp(), TASK, loader, loader, loader).calibration is loader


def test_discover_refuses_an_iterator() -> None:
    with pytest.raises(tq.DataError, match=r"batches is an iterator.*pass a list or a DataLoader"):
        tq.discover(relu_mlp(), once(labelled(6)), TASK)


# Options


@pytest.mark.parametrize("method", ["auto", "gauss_newton", "hutchinson"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"probe_scope": "pre_layer"},
            tq.SettingsError,
            "probe_scope must be 'per_layer' or 'shared', got 'pre_layer'",
        ),
        ({"distribution": "foo"}, tq.SettingsError, "distribution must be 'rademacher' or 'gaussian', got 'foo'"),
        ({"precision": "float8"}, tq.SettingsError, "precision must be .*, got 'float8'"),
        (
            {"target_sampling_error": 0},
            tq.SettingsError,
            "target_sampling_error must be a number > 0 or None, got 0",
        ),
        (
            {"target_standard_error": float("nan")},
            tq.SettingsError,
            "target_standard_error must be a finite number .*, got nan",
        ),
        ({"num_probes": True}, tq.SettingsError, "num_probes must be an integer >= 1"),
        ({"weights": False, "activations": False}, tq.ModelError, "leave nothing to measure"),
    ],
)
def test_values_are_checked_whichever_estimator_would_read_them(
    method: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tq.estimate_curvature(relu_mlp(), [], TASK, estimator=method, **options)


@pytest.mark.parametrize("method", ["auto", "gauss_newton"])
def test_options_of_hutchinson_are_refused_elsewhere(method: str) -> None:
    for options in ({"probe_scope": "shared"}, {"distribution": "gaussian"}, {"target_standard_error": 0.1}):
        with pytest.raises(tq.SettingsError, match=f"{next(iter(options))} is an option of estimator='hutchinson'"):
            tq.estimate_curvature(relu_mlp(), labelled(6), TASK, estimator=method, **options)


# What Gauss-Newton cannot take


def between_samples(logits: Tensor, targets: Tensor) -> Tensor:
    """A loss in which every sample depends on all others."""
    return F.cross_entropy(logits - logits.mean(0), targets) + logits.mean(0).square().sum() * logits.square().mean()


@pytest.mark.parametrize("method", ["auto", "gauss_newton"])
def test_a_loss_that_gauss_newton_cannot_take_is_an_error_that_names_the_cure(method: str) -> None:
    """Hutchinson, which takes far longer, is never chosen without being asked for."""
    task = tq.ClassificationTask(between_samples)
    with pytest.raises(GaussNewtonError, match=r"samples of a batch interact in the loss.*estimator='hutchinson'"):
        tq.estimate_curvature(relu_mlp(), labelled(6), task, num_probes=1, estimator=method)
    assert tq.estimate_curvature(relu_mlp(), labelled(6), task, num_probes=1, estimator="hutchinson").samples == 4


class MixesSamples(nn.Module):
    """The logits of a sample depend on the others in the batch, linearly, which a few samples' products do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.second(x + 0.5 * x.flip(0))


def test_samples_that_interact_in_the_model_are_an_error_too() -> None:
    with pytest.raises(GaussNewtonError, match=r"samples of a batch interact.*estimator='hutchinson'"):
        tq.estimate_curvature(build(MixesSamples), labelled(6), TASK, num_probes=1)


class Loop(nn.Module):
    """Calls its layers on one sample after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(F.relu(self.first(sample))) for sample in x])


class ReadsConstant(nn.Module):
    """Adds a layer of a constant to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.of_constant, self.last = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, CLASSES)
        self.register_buffer("constant", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x) + self.of_constant(self.constant)))


@pytest.mark.filterwarnings("ignore:layers .* are read by operations")
@pytest.mark.parametrize("make", [Loop, ReadsConstant])
def test_activations_without_an_axis_of_samples_are_an_error_whose_cures_work(make: type[nn.Module]) -> None:
    model, batches = build(make), labelled(6)
    with pytest.raises(
        GaussNewtonError, match=r"a constant, or one sample at a time in a loop.*one sample, activations=F"
    ):
        tq.estimate_curvature(model, batches, TASK)
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    alone = tq.estimate_curvature(model, single, TASK, num_probes="exact")
    together = tq.estimate_curvature(model, batches, TASK, num_probes="exact", activations=False)
    assert alone.activations
    for name, whole in together.weights.items():
        assert alone.weights[name].trace == pytest.approx(whole.trace, rel=1e-8)
    assert tq.estimate_curvature(model, batches, TASK, num_probes=1, estimator="hutchinson").activations


class Checkpointed(nn.Module):
    """Computes its hidden layer again in the backward pass, by the older or the newer way of torch."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.hidden, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(checkpoint(lambda h: F.relu(self.hidden(h)), x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("method", ["auto", "gauss_newton", "hutchinson"])
def test_a_reentrant_checkpoint_is_an_error_that_names_the_cure(method: str, activations: bool) -> None:
    options = {"estimator": method, "num_probes": 1, "activations": activations}
    with pytest.raises(tq.ModelError, match=r"^the model checkpoints.*use_reentrant=False"):
        tq.estimate_curvature(build(lambda: Checkpointed(True)), labelled(6), TASK, **options)
    assert tq.estimate_curvature(build(lambda: Checkpointed(False)), labelled(6), TASK, **options).weights


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_is_named_by_other_measurements_too() -> None:
    model = build(lambda: Checkpointed(True))
    points = tq.discover(model, labelled(6), TASK)
    for measure in (tq.measure_perturbation, tq.top_eigenvalues):
        with pytest.raises(tq.ModelError, match="use_reentrant=False"):
            measure(model, labelled(6), TASK, points)


class Idle(nn.Module):
    """Has a layer that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.second(x) + 0 * self.idle(x).detach().sum()


@pytest.mark.parametrize("stage", ["check", "measurement"])
@pytest.mark.parametrize(
    "error", [tq.ModelError("an idle layer"), tq.DataError("bad data"), tq.ResourceError("full"), RuntimeError("own")]
)
def test_other_errors_are_raised(stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    if stage == "check":
        monkeypatch.setattr("tracequant.curvature.choose_estimator.find_bends", fail)
    else:
        monkeypatch.setattr(estimate, "gauss_newton", fail)
    with pytest.raises(type(error), match=str(error)):
        tq.estimate_curvature(relu_mlp(), labelled(6), TASK)


def test_an_idle_layer_is_named_under_auto() -> None:
    with pytest.raises(tq.ModelError, match="does not depend on layer idle"):
        tq.estimate_curvature(build(Idle), labelled(6), TASK)


# What is left as it was


class Augmented(Dataset[tuple[Tensor, int]]):
    """Samples with noise from torch's global generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(6, dtype=torch.float64), index % CLASSES


@pytest.mark.parametrize("make", [relu_mlp, gelu_mlp])
@pytest.mark.parametrize("method", ["auto", "gauss_newton", "hutchinson"])
def test_the_global_random_state_is_left_alone(make: Any, method: str) -> None:
    model, loader = make(), DataLoader(Augmented(), batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    tq.estimate_curvature(model, loader, TASK, estimator=method, num_probes=1)
    assert torch.equal(torch.get_rng_state(), before)


# What is printed


def many(layers: int, activations: int) -> tq.Curvature:
    """A curvature of so many layers with average traces 1, 2, 3, ..."""
    found = tq.estimate_curvature(relu_mlp(), labelled(6, sizes=(3, 3)), TASK, num_probes=2)
    (estimate, *_) = found.weights.values()

    def family(count: int) -> dict[str, tq.TraceEstimate]:
        return {
            f"a.very.long.name.of.a.block.in.an.encoder.layer{i:03d}": dataclasses.replace(
                estimate, trace=10.0 * (i + 1), average_trace=i + 1.0, standard_error=1.0, numel=10.0
            )
            for i in range(count)
        }

    return dataclasses.replace(found, weights=family(layers), activations=family(activations), reason="why " * 300)


def test_a_curvature_of_many_layers_prints_on_one_screen() -> None:
    lines = str(many(200, 150)).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    assert lines[0] == "Curvature by gauss_newton: 6 samples, 2 probes, seed 0"
    rows = [line.split() for line in lines if "layer" in line and "Activations" not in line]
    assert [float(row[2]) for row in rows] == [*range(200, 190, -1), *range(10, 0, -1)]
    assert rows[0][0].endswith("encoder.layer199")
    assert rows[0][3] == "0.1%"
    assert "  ... 180 more ..." in lines
    assert lines[-1].startswith("Activations: 150 average traces from 1 (")
    assert len(repr(many(200, 150))) < 100


def test_a_curvature_of_few_layers_prints_all_of_them() -> None:
    for count in (20, 21):
        text = str(many(count, 0))
        assert "more" not in text
        assert "Activations" not in text
        assert text.count("layer0") == count
    assert "  ... 2 more ..." in str(many(22, 0))
    assert "layer003" in str(many(0, 4))


def test_what_is_exact_and_what_is_unknown_is_printed() -> None:
    model = relu_mlp()
    exact = tq.estimate_curvature(model, labelled(6), TASK, num_probes="exact")
    assert str(exact).startswith(f"Curvature by gauss_newton: {exact.samples} samples, exact on these samples, seed 0")
    row = next(line.split() for line in str(exact).splitlines() if line.startswith("  0 "))
    assert row[1:2] + row[3:4] == ["48", "0"]
    single = str(
        tq.estimate_curvature(gelu_mlp(), labelled(6), TASK, num_probes=1, estimator="hutchinson", activations=False)
    )
    assert "1 probe, seed 0" in single
    assert "unknown" in single
