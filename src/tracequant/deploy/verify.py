"""Does an exported ONNX file compute what the fake-quantized model does, how fast, and with which kernels?"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracequant.core.errors import ArtifactError, DataError, ResourceError
from tracequant.core.files import Saveable
from tracequant.deploy.onnx import trace_float
from tracequant.model.batches import Batch, Batches
from tracequant.model.state import frozen_evaluation
from tracequant.model.task import Exported, Task

_INT8_KERNELS = ("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulNBits")
_PASSED_THROUGH = ("Relu", "Reshape", "Flatten", "Transpose")

# Arrays by position in the model's inputs → arrays by position in its outputs.
Session = Callable[[list[NDArray[Any]]], list[NDArray[Any]]]
# Positional and keyword arguments.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class RuntimeResult:
    """One runtime at its default settings: accuracy, share of predictions equal to the fake-quantized model's, speed.

    Milliseconds of processor time, medians of interleaved runs on one sample and one thread, of this file and of the
    float32 model.
    A prediction is the class with the largest score, at every position along `Task.class_axis`. `equal_predictions` is
    None where the task's outputs have no such axis.
    """

    runtime: str
    metric: float
    equal_predictions: float | None
    milliseconds: float
    float_milliseconds: float


@dataclass(frozen=True)
class LayerKernel:
    """What a layer runs as in ONNX Runtime; `reason` says why it is not an integer kernel, empty where it is one."""

    layer: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Verification(Saveable):
    """An exported file against the model that it was made of, on the evaluation data.

    `difference` is the largest between ONNX Runtime, without optimisations, and the fake-quantized model, relative to
    the model's largest output. Sums in another order can round a value that lies between two codes the other way, so
    that it need not be tiny; `samples_within` is the share of samples that differ by 1e-5 at most.
    """

    file_bytes: int
    promised_bytes: int
    metric_name: str
    metric: float
    samples: int
    difference: float
    samples_within: float
    runtimes: tuple[RuntimeResult, ...]
    kernels: tuple[LayerKernel, ...]


def verify(
    quantized: nn.Module,
    batches: Batches,
    task: Task,
    path: str | Path,
    *,
    float_model: nn.Module,
    promised_bytes: int,
    repeats: int = 30,
) -> Verification:
    """Run the ONNX file at `path` in ONNX Runtime, and OpenVINO if it is installed, on all of `batches`.

    `quantized` is the fake-quantized model on the CPU, `float_model` the model before it, which the speed is compared
    with. Raises `ArtifactError` for a file that ONNX Runtime refuses, `ResourceError` without the extra "onnx".
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ResourceError(f"verifying needs more packages ({error}): pip install 'tracequant[onnx]'") from None
    path, part = Path(path), task.exported(quantized)
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        try:
            exact = _onnx_runtime(onnxruntime, path, optimise=False)
            fused = _onnx_runtime(onnxruntime, path, optimise=True, threads=1, optimised=optimised)
        except Exception as error:
            raise ArtifactError(f"{path} cannot be loaded by ONNX Runtime: {error}; export it again") from None
        kernels = _kernels(onnx.load(path).graph, onnx.load(optimised).graph)
        sample = _one_sample(part, task, batches)
        reference = Path(folder) / "float32.onnx"
        trace_float(task.exported(float_model).module, *sample, reference)
        runtimes = {"ONNX Runtime": (fused, _onnx_runtime(onnxruntime, reference, optimise=True, threads=1))}
        try:
            import openvino
        except ImportError:
            pass
        else:
            runtimes["OpenVINO"] = (_openvino(openvino, path), _openvino(openvino, reference))
        arrays = _arrays(sample)
        found = [(name, mine, *_interleaved(mine, other, arrays, repeats)) for name, (mine, other) in runtimes.items()]
    fake = task.evaluate(quantized, batches)
    largest, count = 0.0, 0
    equal = dict.fromkeys(runtimes, 0.0)
    predictions = 0
    differences = []
    for batch in (own for whole in batches for own in task.parts(whole)):
        args, kwargs = part.arguments(batch)
        with frozen_evaluation(part.module), torch.no_grad():
            outputs = part.module(*args, **kwargs)
        given, want = _arrays((args, kwargs)), _arrays(outputs)
        got = exact(given)
        rows = np.max([_by_sample(a - b) for a, b in zip(got, want, strict=True)], axis=0)
        differences.append(rows)
        largest = max(largest, max(float(np.abs(a).max()) for a in want))
        count += len(rows)
        scores = _task_outputs(task, part, want, outputs, batch)
        axis = task.class_axis(scores, batch)
        if axis is not None:
            chosen = scores.argmax(axis)
            predictions += chosen.numel()
            for name, session, *_ in found:
                others = _task_outputs(task, part, session(given), outputs, batch)
                equal[name] += float((others.argmax(axis) == chosen).sum())
    if not count:
        raise DataError("there is no evaluation data; the task's `evaluation` must yield at least one batch")
    every = np.concatenate(differences) / max(largest, 1e-30)
    worst, within = float(every.max()), float((every <= 1e-5).mean())
    results = tuple(
        RuntimeResult(
            name,
            task.evaluate(part.replaced(_RuntimeModel(session, outputs)), batches).metric,
            equal[name] / predictions if predictions else None,
            mine,
            other,
        )
        for name, session, mine, other in found
    )
    size = path.stat().st_size
    return Verification(
        size, promised_bytes, fake.metric_name, fake.metric, fake.samples, worst, within, results, kernels
    )


def _one_sample(part: Exported, task: Task, batches: Batches) -> _Call:
    """The arguments for the first sample alone."""
    for batch in batches:
        return part.arguments(task.select(batch, 0, 1))
    raise DataError("there is no evaluation data; the task's `evaluation` must yield at least one batch")


def _task_outputs(task: Task, part: Exported, arrays: list[NDArray[Any]], example: Any, batch: Batch) -> Any:
    """What the task makes of a batch where the exported part returns these arrays, nested as `example` is."""
    with torch.no_grad():
        return task.outputs(part.replaced(_RuntimeModel(lambda _: arrays, example)), batch)


class _RuntimeModel(nn.Module):
    """A runtime's session in the place of a module, so that the task evaluates both alike."""

    def __init__(self, session: Session, example: Any) -> None:
        super().__init__()
        self._session, self._example = session, example

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arrays = iter(self._session(_arrays((args, kwargs))))
        # None, which a model may return beside tensors, is not in the file.
        return pytree.tree_map(
            lambda leaf: torch.from_numpy(next(arrays)) if isinstance(leaf, Tensor) else leaf, self._example
        )


def _arrays(tree: Any) -> list[NDArray[Any]]:
    return [leaf.detach().cpu().numpy() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _by_sample(difference: NDArray[Any]) -> NDArray[Any]:
    """Largest absolute difference of each sample."""
    largest: NDArray[Any] = np.abs(difference).reshape(len(difference), -1).max(1)
    return largest


def _onnx_runtime(
    onnxruntime: Any, path: Path, optimise: bool, threads: int | None = None, optimised: Path | None = None
) -> Session:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda arrays: list(session.run(None, dict(zip(names, arrays, strict=True))))


def _openvino(openvino: Any, path: Path) -> Session:
    core = openvino.Core()
    # What is float is to be computed in float32: on some processors the default is bfloat16.
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)

    def run(arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        found = compiled(arrays)
        return [np.array(found[output]) for output in compiled.outputs]

    return run


def _interleaved(mine: Session, other: Session, arrays: list[NDArray[Any]], repeats: int) -> tuple[float, float]:
    """Median milliseconds of both, run in turn, so that both see the same machine.

    Of processor time: on one thread that is the time an idle machine takes, whatever else runs on this one.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 2):
        for function, own in zip((mine, other), times, strict=True):
            start = time.process_time()
            function(arrays)
            if turn >= 2:  # the first runs allocate memory
                own.append(1e3 * (time.process_time() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _kernels(exported: Any, optimised: Any) -> tuple[LayerKernel, ...]:
    """What each named layer of the exported graph became in the optimised one."""
    readers: dict[str, list[Any]] = {}
    producer = {name: node for node in exported.node for name in node.output}
    for node in exported.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in exported.node:
        if not node.name:
            continue
        pattern = re.compile(re.escape(node.name) + r"(_.*)?")
        kinds = [other.op_type for other in optimised.node if pattern.fullmatch(other.name)]
        kernel = next((kind for kind in kinds if kind in _INT8_KERNELS), None)
        kernel = kernel or next((kind for kind in kinds if node.op_type in kind), kinds[0] if kinds else "unknown")
        reason = "" if kernel in _INT8_KERNELS else _why_float(node, producer, readers)
        found.append(LayerKernel(node.name, kernel, reason))
    return tuple(found)


def _why_float(node: Any, producer: dict[str, Any], readers: dict[str, list[Any]]) -> str:
    """Why ONNX Runtime has no integer kernel for a layer, as far as the graph shows."""
    source = producer.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return "its input is in float"
    out = node.output[0]
    while True:
        following = readers.get(out, [])
        if not following:
            return "its output is an output of the model, in float"
        others = sorted({reader.op_type for reader in following if reader.op_type != "QuantizeLinear"})
        if len(following) == 1 and others and others[0] in _PASSED_THROUGH:
            out = following[0].output[0]
            continue
        if others:
            return f"{' and '.join(others)} reads its output before it is quantized"
        return f"ONNX Runtime has no integer kernel for this {node.op_type}"
