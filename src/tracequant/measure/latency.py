"""Milliseconds of every layer at every choice of bits, measured in ONNX Runtime on this machine.

Each distinct layer, by what it computes and the shape that it reads, becomes a graph of its own: integers in and
integers out where its input is quantized, as it lies between two others in a whole network. All choices of one layer
run in turn, so that all see the same machine. Weights of 1 to 8 bits are one choice: ONNX Runtime unpacks them when it
loads the file and then runs the same program, so that differences between them would be noise, which a plan would
follow.
"""

from __future__ import annotations

import copy
import itertools
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracequant.core.cost import FLOAT_BITS
from tracequant.core.errors import ArtifactError, DataError, ModelError, ResourceError
from tracequant.core.files import Saveable
from tracequant.core.points import OUTPUT_BITS, Layer, QuantizationPoints
from tracequant.core.progress import track
from tracequant.core.sensitivity import MODEL_INPUT_BITS
from tracequant.core.settings import Latency, SensitivitySettings
from tracequant.core.weight_grid import WeightGrid
from tracequant.deploy.onnx import export_onnx, trace_float
from tracequant.model.batches import Batches
from tracequant.model.hooks import replace_inputs
from tracequant.model.kinds import CONVOLUTIONS, RECURRENT, TRANSPOSED
from tracequant.model.sites import known_parameters
from tracequant.model.state import frozen_evaluation
from tracequant.model.task import Task, checked
from tracequant.quantization.convert import quantize_activation, quantize_output, quantize_weight
from tracequant.quantization.grid import Grid, check_bits, choose_weight_grid

WARM_UP = 3
# Stands for all widths of weights.
STORED_BITS = 8
# Weight bits and input bits, `FLOAT_BITS` for float.
Choice = tuple[int, int]


@dataclass(frozen=True)
class LatencyMeasurements(Saveable):
    """Milliseconds by layer signature and input bits ("float32" in all), and the machine that they were measured on."""

    machine: str
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)


def measure_latency(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    *,
    weight_bits: Sequence[int] = SensitivitySettings.weight_bits,
    activation_bits: Sequence[int] = (4, 8),
    threads: int = 1,
    repeats: int = 30,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Latency:
    """Layer → weight bits → input bits → median milliseconds of `repeats` runs on one sample, for `solve(latency=)`.

    Input bits are 32 for an input in float, always 8 for the tensor that the caller hands to the model, and there is an
    entry of 32 and 32 bits for the layer in float32. `model` is the float model that `points` were found on; a layer
    that it calls several times counts as often. A layer that no module of torch's own computes alone (a parameter of
    the model's own modules, a matrix of an LSTM) is measured as matrix products of the same sizes. What is between
    layers (additions, pooling) and fused attention itself is not counted. Given a `checkpoint` path, every layer is
    saved there as soon as it is measured, and a later call on the same machine goes on from it.

    Raises `ModelError` for bits outside 1 to 8, `ArtifactError` for a checkpoint of another machine, `ResourceError`
    without the extra "onnx".
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ResourceError(
            f"measuring latency needs more packages ({error}): pip install 'tracequant[onnx]'"
        ) from None
    for num_bits in (*weight_bits, *activation_bits):
        check_bits(num_bits)
    if threads < 1 or repeats < 1:
        raise DataError(f"expected threads >= 1 and repeats >= 1; got {threads}, {repeats}")
    machine = f"{processor()}, {threads} threads, onnxruntime {onnxruntime.__version__}, {repeats} repeats"
    measured = _resume(checkpoint, machine).milliseconds
    work = _layer_calls(model, batches, task, points)
    inputs = {point.name: point for point in points.activations}
    offered: dict[str, list[Choice]] = {}
    choices: dict[str, set[Choice]] = {}
    signatures: dict[str, tuple[nn.Module, Tensor]] = {}
    for layer in points.layers:
        point = inputs.get(layer.activation or "")
        if point is None or not activation_bits:
            read: tuple[int, ...] = (FLOAT_BITS,)
        else:
            read = (MODEL_INPUT_BITS,) if point.is_model_input else tuple(activation_bits)
        offered[layer.name] = [
            *itertools.product(sorted(set(weight_bits)), sorted(set(read))),
            (FLOAT_BITS, FLOAT_BITS),
        ]
        for signature, module, example in work[layer.name]:
            choices.setdefault(signature, set()).update(_program_of(choice) for choice in offered[layer.name])
            signatures[signature] = module, example
    for signature in track(list(choices), "Layers", progress):
        missing = sorted(c for c in choices[signature] if _key(c) not in measured.get(signature, {}))
        if missing:
            found = _measure(onnxruntime, *signatures[signature], missing, threads, repeats)
            measured.setdefault(signature, {}).update({_key(choice): ms for choice, ms in found.items()})
            if checkpoint is not None:
                LatencyMeasurements(machine, measured).save(checkpoint)
    table: Latency = {}
    for name, own in offered.items():
        for choice in own:
            total = math.fsum(measured[signature][_key(_program_of(choice))] for signature, _, _ in work[name])
            table.setdefault(name, {}).setdefault(choice[0], {})[choice[1]] = total
    return table


def _program_of(choice: Choice) -> Choice:
    """The choice whose program a choice runs as."""
    return choice if choice[0] == FLOAT_BITS else (STORED_BITS, choice[1])


def _key(choice: Choice) -> str:
    return "float32" if choice[0] == FLOAT_BITS else str(choice[1])


def _resume(path: str | Path | None, machine: str) -> LatencyMeasurements:
    if path is None or not Path(path).exists():
        return LatencyMeasurements(machine)
    found = LatencyMeasurements.load(path)
    if found.machine != machine:
        raise ArtifactError(
            f"{path} was measured on {found.machine}, this is {machine}; delete it to measure anew, or use its table"
        )
    return found


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _layer_calls(
    model: nn.Module, batches: Batches, task: Task, points: QuantizationPoints
) -> dict[str, list[tuple[str, nn.Module, Tensor]]]:
    """For every layer, each call on the first sample: a signature, a float module that computes it, and an input."""
    owners: dict[str, list[Layer]] = {}
    modules = dict(model.named_modules())
    for layer in points.layers:
        for name, parameter in layer.sites:
            if parameter in known_parameters(modules[name]) and not isinstance(modules[name], RECURRENT):
                owners.setdefault(name, []).append(layer)
    calls: dict[str, list[tuple[str, nn.Module, Tensor]]] = {layer.name: [] for layer in points.layers}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            read: list[Tensor] = []
            replace_inputs(module, args, kwargs, read.append)
            if isinstance(module, nn.Embedding):
                read = [args[0] if args else kwargs["input"]]
            for layer in owners[name]:
                alone, example = _alone(module, layer, read)
                calls[layer.name].append((_signature(alone, example), alone, example))

        return hook

    try:
        for name in owners:
            handles.append(modules[name].register_forward_pre_hook(watch(name), with_kwargs=True))
            # The attention function reads its output projection's weight itself and never calls the module.
            parent, _, child = name.rpartition(".")
            if child == "out_proj" and isinstance(modules.get(parent), nn.MultiheadAttention):
                handles.append(modules[parent].register_forward_hook(_out_proj(calls, name, modules[name])))
        with frozen_evaluation(model), torch.no_grad():
            for batch in checked(batches, task, model):
                task.outputs(model, task.select(batch, 0, 1))
                break
    finally:
        for handle in handles:
            handle.remove()
    return {layer.name: calls[layer.name] or _products(layer) for layer in points.layers}


def _products(layer: Layer) -> list[tuple[str, nn.Module, Tensor]]:
    """Matrix products of as many multiplications, for a layer that no module of a known class computes.

    What a recurrent layer reads of its own past comes step by step, in a product of one row for each.
    """
    width = layer.numel // layer.channels
    rows = round(layer.macs / layer.numel)
    if not rows:  # a lookup, or never called
        return []
    steps = rows if layer.sites[0][1].startswith(("weight_hh", "weight_hr")) else 1
    module, example = nn.Linear(width, layer.channels), torch.zeros(rows // steps, width)
    return [(_signature(module, example), module, example)] * steps


def _out_proj(calls: dict[str, Any], name: str, module: nn.Module) -> Callable[..., None]:
    def hook(attention: nn.Module, args: Any, output: Any) -> None:
        example = torch.zeros(output[0].shape)
        calls[name].append((_signature(module, example), module, example))

    return hook


def _alone(module: nn.Module, layer: Layer, read: list[Tensor]) -> tuple[nn.Module, Tensor]:
    """A module that does a layer's work alone, and an example of what it reads; an attention's projection is linear."""
    if not isinstance(module, nn.MultiheadAttention):
        return module, read[0].detach().cpu()
    position = {"k_proj_weight": 1, "v_proj_weight": 2}.get(layer.sites[0][1], 0)
    width_out, width_in = layer.shape
    return nn.Linear(width_in, width_out), read[min(position, len(read) - 1)].detach().cpu()


def _signature(module: nn.Module, example: Tensor) -> str:
    """What a layer's time depends on: kind, sizes, and the shape that it reads."""
    return f"{type(module).__name__}({module.extra_repr()}) on {'x'.join(map(str, example.shape))}"


def _measure(
    onnxruntime: Any, module: nn.Module, example: Tensor, choices: Sequence[Choice], threads: int, repeats: int
) -> dict[Choice, float]:
    """Median milliseconds of each choice."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for choice in choices:
            path = Path(folder) / f"{_key(choice)}.onnx"
            _write_layer(module, example, choice, path)
            sessions[choice] = _session(onnxruntime, path, threads)
    times: dict[Choice, list[float]] = {choice: [] for choice in choices}
    # On one thread, processor time is what an idle machine takes, whatever else runs on this one.
    clock = time.process_time if threads == 1 else time.perf_counter
    for turn in range(repeats + WARM_UP):
        for choice, run in sessions.items():
            start = clock()
            run()
            if turn >= WARM_UP:
                times[choice].append(1e3 * (clock() - start))
    return {choice: statistics.median(own) for choice, own in times.items()}


def _write_layer(module: nn.Module, example: Tensor, choice: Choice, path: Path) -> None:
    """The layer as ONNX, with integers at its ends where they are integers in a whole network."""
    alone = nn.Sequential(copy.deepcopy(module).cpu().float()).eval()
    example = example.float() if example.is_floating_point() else example
    weight_bits, input_bits = choice
    if weight_bits == FLOAT_BITS:
        trace_float(alone, (example,), {}, path)
        return
    layer = alone[0]
    axis = 1 if isinstance(layer, TRANSPOSED) else 0
    assert isinstance(layer.weight, Tensor)
    grid = choose_weight_grid(layer.weight.detach(), weight_bits, axis, WeightGrid(range="minmax"))
    quantize_weight(alone, [("0", "weight")], grid, axis, symmetric=True)
    if input_bits != FLOAT_BITS:
        quantize_activation([layer], "0", Grid(torch.tensor([0.1]), torch.tensor([0.0]), input_bits))
        if isinstance(layer, CONVOLUTIONS):
            quantize_output(alone, "0", Grid(torch.tensor([0.1]), torch.tensor([128.0]), OUTPUT_BITS))
    export_onnx(alone, path, example, dynamic_batch=False, dynamic_sizes=False)
    _strip_ends(path)


def _strip_ends(path: Path) -> None:
    """Leave out the rounding of the graph's input and the way back to float of its output."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    (given,), (result,) = graph.input, graph.output
    for node in list(graph.node):
        if node.op_type == "QuantizeLinear" and node.input[0] == given.name:
            given.name, given.type.tensor_type.elem_type = node.output[0], onnx.TensorProto.UINT8
            graph.node.remove(node)
        elif node.op_type == "DequantizeLinear" and node.output[0] == result.name:
            result.name, result.type.tensor_type.elem_type = node.input[0], onnx.TensorProto.UINT8
            graph.node.remove(node)
    onnx.save(model, path)


def _session(onnxruntime: Any, path: Path, threads: int) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"a layer cannot be loaded by ONNX Runtime: {error}") from None
    kinds = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int64)": "int64", "tensor(int32)": "int32"}
    # Zeros: any word number must exist.
    given = {value.name: np.zeros(value.shape, kinds[value.type]) for value in session.get_inputs()}
    return lambda: session.run(None, given)
