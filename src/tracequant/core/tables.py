"""Tables that come without a model: published sensitivities, measured latencies. Plain data, no torch.

A table of sensitivities is JSON:

    {"format": "tracequant-table",
     "same_bits": false,
     "layers": [
       {"name": "layer1.0.conv1", "parameters": 36864, "macs": 115605504,
        "average_trace": 0.0686, "squared_perturbation": {"4": 6.743, "8": 0.0235},
        "input": {"elements": 200704, "omega": {"4": 0.01, "8": 0.0001}},
        "latency_ms": {"4": {"4": 0.21, "8": 0.30}, "8": {"4": 0.33, "8": 0.36}}},
       ...],
     "ties": [["layer2.0.conv1", "layer2.0.downsample.0"]]}

Ω by bits is `average_trace` times `squared_perturbation` (Eq. 10), or is given as `omega` in place of the latter.
`input` is the tensor that the layer reads and may be left out, which leaves it in float; with `same_bits` it has the
bits of the layer's weight, and Ω is that of both together unless `input` gives one of its own. `latency_ms` may be left
out, and a number in place of the inner object holds for every width of the input. `ties` may be left out. A size is
parameters times bits / 8: no file layout is known.

The arrays in which HAWQ-V3's tables circulate (`average_trace`, `delta_sq`, `parameters`, `macs`, `latency_ms`, `ties`
by position) are read as well, with `same_bits`, which is how that work counts BOPs and latency.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracequant.core.errors import ArtifactError
from tracequant.core.files import read_json, write_text
from tracequant.core.points import ActivationPoint, Layer, QuantizationPoints
from tracequant.core.sensitivity import Sensitivity
from tracequant.core.settings import Latency
from tracequant.core.weight_grid import WeightGrid

FORMAT_NAME = "tracequant-table"


def read_sensitivity(path: str | Path) -> Sensitivity:
    """Sensitivities from a file: what `Sensitivity.save` wrote, or a table (see `tracequant.core.tables`).

    Raises `ArtifactError` that names the layer and the field where the table is wrong.
    """
    document = read_json(path)
    if isinstance(document, dict) and document.get("kind") == "Sensitivity":
        return Sensitivity.from_json(document, str(path))
    if isinstance(document, dict) and "delta_sq" in document:
        document = _from_arrays(document, str(path))
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        raise ArtifactError(
            f'{path} is no table of sensitivities: expected {{"format": "{FORMAT_NAME}", "layers": [...]}}, or what'
            " Sensitivity.save wrote"
        )
    return _from_table(document, str(path))


def read_latency(path: str | Path) -> Latency:
    """Milliseconds by layer, weight bits and input bits, for `solve(latency=)`.

    JSON {layer: {weight bits: {input bits: ms}}}, or CSV with the columns layer, weight_bits, activation_bits, ms.
    Input bits are 32 for an input that stays in float. Raises `ArtifactError` that names the line or the entry.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        document = _object(read_json(path), str(path))
        return {
            layer: {
                _bits(w, f"{path}: {layer}"): {
                    _bits(a, f"{path}: {layer}.{w}"): _milliseconds(ms, f"{path}: {layer}.{w}.{a}")
                    for a, ms in _object(by_input, f"{path}: {layer}.{w}").items()
                }
                for w, by_input in _object(by_weight, f"{path}: {layer}").items()
            }
            for layer, by_weight in document.items()
        }
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})") from None
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    columns = {"layer", "weight_bits", "activation_bits", "ms"}
    if missing := columns - set(rows.fieldnames or ()):
        raise ArtifactError(
            f"{path}: no column {', '.join(sorted(missing))}; a latency table is CSV with the columns layer,"
            " weight_bits, activation_bits, ms, or a .json file {layer: {weight bits: {input bits: ms}}}"
        )
    table: Latency = {}
    for row in rows:
        where = f"{path} line {rows.line_num}"
        by_input = table.setdefault(row["layer"], {}).setdefault(_bits(row["weight_bits"], where), {})
        input_bits = _bits(row["activation_bits"], where)
        if input_bits in by_input:
            raise ArtifactError(f"{where}: a second entry for layer {row['layer']} at these bits")
        by_input[input_bits] = _milliseconds(row["ms"], where)
    return table


def write_latency(table: Latency, path: str | Path) -> None:
    """Write what `read_latency` reads, as CSV, whole or not at all."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("layer", "weight_bits", "activation_bits", "ms"))
    for layer, by_weight in table.items():
        for weight_bits, by_input in by_weight.items():
            writer.writerows((layer, weight_bits, input_bits, f"{ms:.6g}") for input_bits, ms in by_input.items())
    write_text(path, rows.getvalue())


def _from_table(document: dict[str, Any], source: str) -> Sensitivity:
    same_bits = document.get("same_bits", False)
    if not isinstance(same_bits, bool):
        raise ArtifactError(f"{source}: same_bits is true or false, found {same_bits!r}")
    entries = document.get("layers")
    if not isinstance(entries, list) or not entries:
        raise ArtifactError(f"{source}: layers is a list of at least one layer, found {entries!r}")
    layers, activations = [], []
    weight_omega: dict[str, dict[int, float]] = {}
    activation_omega: dict[str, dict[int, float]] = {}
    weight_errors: dict[str, dict[int, float]] = {}
    traces: dict[str, float] = {}
    latency: Latency = {}
    for position, entry in enumerate(entries):
        fields = _object(entry, f"{source}: layers[{position}]")
        name = fields.get("name")
        if not isinstance(name, str) or not name or name in traces:
            raise ArtifactError(f"{source}: layers[{position}] needs a name of its own, found {name!r}")
        where = f"{source}: layer {name}"
        known = {
            "name", "parameters", "macs", "average_trace", "squared_perturbation", "omega", "input", "latency_ms",
        }  # fmt: skip
        if unknown := fields.keys() - known:
            raise ArtifactError(
                f"{where}: unknown field {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
            )
        traces[name] = _number(fields, "average_trace", where)
        if ("omega" in fields) == ("squared_perturbation" in fields):
            raise ArtifactError(f"{where}: give either squared_perturbation or omega, by bits")
        if "omega" in fields:
            weight_errors[name], weight_omega[name] = {}, _by_bits(fields["omega"], f"{where}.omega")
        else:
            weight_errors[name] = _by_bits(fields["squared_perturbation"], f"{where}.squared_perturbation")
            weight_omega[name] = {b: max(traces[name], 0.0) * e for b, e in weight_errors[name].items()}
        entry_input = _object(fields.get("input", {}), f"{where}.input")
        if entry_input or same_bits:
            activation_omega[name] = (
                _by_bits(entry_input["omega"], f"{where}.input.omega")
                if "omega" in entry_input
                else dict.fromkeys(weight_omega[name], 0.0)
            )
            elements = _finite(entry_input.get("elements", 0), f"{where}.input.elements")
            activations.append(ActivationPoint(name, (name,), elements, is_model_input=False))
        layers.append(
            Layer(
                name=name,
                kind="table",
                sites=(),
                shape=(_whole(fields, "parameters", where),),
                channel_axis=0,
                macs=_whole(fields, "macs", where),
                activation=name if name in activation_omega else None,
            )
        )
        if "latency_ms" in fields:
            latency[name] = _latency(
                fields["latency_ms"], None if same_bits else tuple(activation_omega.get(name, {32: 0.0})), where
            )
    ties = _ties(document.get("ties", []), traces, source)
    return Sensitivity(
        points=QuantizationPoints(
            layers=tuple(layers),
            activations=tuple(activations),
            ties=ties,
            float_tensors=(),
            fingerprint=hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16],
        ),
        weight_omega=weight_omega,
        activation_omega=activation_omega,
        weight_errors=weight_errors,
        activation_errors={},
        average_traces=traces,
        weight_grid=WeightGrid(),
        criterion="table",
        latency=latency,
        same_bits=same_bits,
    )


def _from_arrays(document: dict[str, Any], source: str) -> dict[str, Any]:
    """HAWQ-V3's arrays as a table of ours; layers are named layer0, layer1, ... by their position."""
    try:
        names = [f"layer{i}" for i in range(len(document["parameters"]))]
        layers = []
        for i, name in enumerate(names):
            layer = {"name": name, **{key: document[key][i] for key in ("parameters", "macs", "average_trace")}}
            layer["squared_perturbation"] = {bits: values[i] for bits, values in document["delta_sq"].items()}
            if "latency_ms" in document:
                layer["latency_ms"] = {bits: values[i] for bits, values in document["latency_ms"].items()}
            layers.append(layer)
        ties = [[names[i] for i in group] for group in document.get("ties", [])]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{source}: a table of arrays has parameters, macs and average_trace by layer, delta_sq and latency_ms by"
            f" bits and layer, all of one length, and ties by position; {type(error).__name__}: {error}"
        ) from None
    return {"format": FORMAT_NAME, "same_bits": True, "layers": layers, "ties": ties}


def _latency(value: Any, input_bits: tuple[int, ...] | None, where: str) -> dict[int, dict[int, float]]:
    """A layer's milliseconds; `input_bits` None where the input has the weight's bits."""
    found: dict[int, dict[int, float]] = {}
    for key, item in _object(value, f"{where}.latency_ms").items():
        bits = _bits(key, f"{where}.latency_ms")
        if isinstance(item, Mapping):
            found[bits] = {
                _bits(a, f"{where}.latency_ms.{key}"): _milliseconds(ms, f"{where}.latency_ms.{key}.{a}")
                for a, ms in item.items()
            }
        else:
            number = _milliseconds(item, f"{where}.latency_ms.{key}")
            found[bits] = dict.fromkeys((bits,) if input_bits is None else input_bits, number)
    return found


def _ties(value: Any, names: Mapping[str, float], source: str) -> tuple[tuple[str, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(group, list) for group in value):
        raise ArtifactError(f"{source}: ties is a list of lists of layer names, found {value!r}")
    tied = [name for group in value for name in group]
    for name in tied:
        if name not in names:
            raise ArtifactError(f"{source}: ties name {name!r}, which is no layer")
        if tied.count(name) > 1:
            raise ArtifactError(f"{source}: {name} is in two ties; make them one")
    order = list(names)
    return tuple(tuple(sorted(group, key=order.index)) for group in value if len(group) > 1)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: expected an object, found {value!r}")
    return value


def _bits(text: Any, where: str) -> int:
    try:
        bits = int(text)
    except (TypeError, ValueError):
        bits = 0
    if not 1 <= bits <= 32:
        raise ArtifactError(f"{where}: {text!r} is no bit width from 1 to 32")
    return bits


def _by_bits(value: Any, where: str) -> dict[int, float]:
    """Numbers by bits, in increasing order of bits."""
    found = {_bits(key, where): _finite(item, f"{where}.{key}") for key, item in _object(value, where).items()}
    if not found:
        raise ArtifactError(f"{where}: no bit width")
    return dict(sorted(found.items()))


def _finite(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArtifactError(f"{where}: expected a finite number, found {value!r}")
    return float(value)


def _milliseconds(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ArtifactError(f"{where}: expected milliseconds, found {value!r}")
    return number


def _number(fields: Mapping[str, Any], key: str, where: str) -> float:
    if key not in fields:
        raise ArtifactError(f"{where}: no {key}")
    return _finite(fields[key], f"{where}.{key}")


def _whole(fields: Mapping[str, Any], key: str, where: str) -> int:
    number = _number(fields, key, where)
    if number < 0 or number != int(number):
        raise ArtifactError(f"{where}.{key}: expected a whole number, found {number!r}")
    return int(number)
