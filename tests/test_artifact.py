"""Saving and loading of results, and files that are whole or not there."""

import dataclasses
import json
import math
import os
import stat

import pytest

from tracequant import BitPlan, Curvature, Evaluation, QuantizationPoints, Sensitivity, TraceEstimate, WeightGrid
from tracequant.core.errors import ArtifactError
from tracequant.core.files import FORMAT_VERSION, Saveable, read_json, replace_file, write_json
from tracequant.core.points import ActivationPoint, Layer, StoredTensor

POINTS = QuantizationPoints(
    layers=(
        Layer("conv", "Conv2d", (("conv", "weight"),), (4, 3, 3, 3), 0, 6912, "conv"),
        Layer("embedding", "Embedding", (("embedding", "weight"), ("out", "weight")), (7, 4), 0, 0, None),
    ),
    activations=(ActivationPoint("conv", ("conv", "side"), 192.5, True),),
    ties=(("conv", "embedding"),),
    float_tensors=(StoredTensor("conv.bias", "F32", (4,)), StoredTensor("bn.num_batches_tracked", "I64", ())),
    fingerprint="0123456789abcdef",
)
ESTIMATE = TraceEstimate(-0.1, -1 / 3, math.inf, -math.inf, 108.0, 1, 7)
CURVATURE = Curvature(
    points=POINTS,
    weights={"conv": ESTIMATE, "embedding": dataclasses.replace(ESTIMATE, standard_error=5e-324)},
    activations={"conv": ESTIMATE},
    estimator="hutchinson",
    reason="Ω, “quoted” \n and over two lines",
    seed=2**40,
    samples=7,
    top_eigenvalues={"conv": 0.1 + 0.2},
)
SENSITIVITY = Sensitivity(
    points=POINTS,
    weight_omega={"conv": {2: 1e300, 8: 0.0}, "embedding": {4: math.inf}},
    activation_omega={"conv": {8: 0.25}},
    weight_errors={"conv": {2: 1.5, 8: 0.01}, "embedding": {4: 2.0}},
    activation_errors={"conv": {8: 0.125}},
    average_traces={"conv": 0.7, "embedding": -0.7},
    weight_grid=WeightGrid(per_channel=False, symmetric=False, range="percentile"),
    criterion="l2",
)
PLAN = BitPlan(
    weight_bits={"conv": 2, "embedding": 8},
    activation_bits={},
    size_bytes=1234,
    weight_code_bits=440,
    weight_count=136,
    omega=0.1,
    activation_omega=0.0,
    weight_grid=WeightGrid(),
    fingerprint=POINTS.fingerprint,
    solver="exact",
    budget="max_size_mib=0.01",
)
EVALUATION = Evaluation("accuracy %", 200 / 3, math.inf, 3)
VALUES = [POINTS, CURVATURE, dataclasses.replace(CURVATURE, top_eigenvalues=None), SENSITIVITY, PLAN, EVALUATION]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_round_trip_through_a_file(value: Saveable, tmp_path):
    """What is loaded equals what was saved, infinities, integer keys and nested tuples included, and is plain JSON."""
    path = tmp_path / "new" / "folder" / "value.json"
    value.save(path)
    json.loads(path.read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    loaded = type(value).load(path)
    assert loaded == value
    assert repr(loaded) == repr(value)  # 1 == 1.0 and True == 1, so that equality alone would let types slip


def test_nan_survives():
    document = json.loads(json.dumps(dataclasses.replace(EVALUATION, loss=math.nan).to_json(), allow_nan=False))
    assert math.isnan(Evaluation.from_json(document).loss)


def change(document: dict, path: str, value: object) -> dict:
    """A deep copy with the entry at a dotted path set, or taken out if the value is `...`."""
    document = json.loads(json.dumps(document))
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return document


@pytest.mark.parametrize(
    ("value", "path", "new", "message"),
    [
        (EVALUATION, "kind", "Curvature", "'Curvature', expected a Evaluation"),
        (EVALUATION, "kind", ..., "None, expected a Evaluation"),
        (EVALUATION, "version", FORMAT_VERSION + 1, f"format version {FORMAT_VERSION + 1}"),
        (EVALUATION, "version", ..., "format version None"),
        (EVALUATION, "extra", 1, "unknown field extra"),
        (EVALUATION, "loss", ..., "missing field loss"),
        (EVALUATION, "samples", "3", "samples: expected int"),
        (EVALUATION, "samples", True, "samples: expected int"),
        (EVALUATION, "loss", True, "loss: expected float"),
        (EVALUATION, "loss", "much", "'much' is not a number"),
        (EVALUATION, "loss", None, "loss: expected float"),
        (CURVATURE, "points.layers.0.colour", "red", "unknown field colour"),
        (CURVATURE, "points.layers.1.shape", ..., r"layers\[1\]: missing field shape"),
        (CURVATURE, "points.layers", {}, "layers: expected a list"),
        (CURVATURE, "weights", [], "weights: expected an object"),
        (CURVATURE, "weights.conv", 3.0, "weights.conv: expected an object"),
        (CURVATURE, "top_eigenvalues", [1.0], "top_eigenvalues"),
        (SENSITIVITY, "weight_omega.conv", {"two": 1.0}, "weight_omega.conv"),
        (SENSITIVITY, "weight_grid.range", "median", "'median' is not one of"),
    ],
)
def test_a_document_that_does_not_fit_is_refused(value, path, new, message):
    """Every departure is an `ArtifactError` that names the place, at the top and deep inside."""
    document = change(value.to_json(), path, new)
    with pytest.raises(ArtifactError, match=message):
        type(value).from_json(document, "file.json")


@pytest.mark.parametrize("document", [[], None, 3, "text"])
def test_a_document_that_is_no_object_is_refused(document):
    with pytest.raises(ArtifactError, match="expected a BitPlan"):
        BitPlan.from_json(document)


def test_damaged_files_are_refused(tmp_path):
    """A truncated, an empty, a binary and a missing file, each named in the message."""
    path = tmp_path / "plan.json"
    PLAN.save(path)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"\xff\xfe\x00"):
        path.write_bytes(part)
        with pytest.raises(ArtifactError, match=r"plan\.json cannot be read as JSON"):
            BitPlan.load(path)
    with pytest.raises(ArtifactError, match=r"missing\.json does not exist"):
        BitPlan.load(tmp_path / "missing.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        BitPlan.load(tmp_path)


def test_replace_file_keeps_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "value.txt"
    path.write_text("old")
    with replace_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename is atomic only within one file system
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["value.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_replace_file_leaves_nothing_of_a_failure(tmp_path, error):
    path = tmp_path / "value.txt"
    path.write_text("old")

    def fail() -> None:
        with replace_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["value.txt"]


def test_replace_file_cleans_up_when_the_rename_fails(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError), replace_file(tmp_path / "folder") as temporary:
        temporary.write_text("text")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_files_have_the_usual_permissions(tmp_path):
    """Others may read what is saved, as far as the umask lets them."""
    (tmp_path / "plain").touch()
    EVALUATION.save(tmp_path / "saved")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "saved")]
    assert modes[0] == modes[1]
