"""Mixed-precision quantization of PyTorch models, every bit width chosen from the curvature of the loss.

    curvature = tq.estimate_curvature(model, batches, task)
    sensitivity = tq.measure_sensitivity(model, curvature, batches, task)
    plan = tq.solve(sensitivity, max_size_mb=8.0)
    quantized = tq.quantize(model, plan, batches, task)
    tq.finetune(quantized, loader, task, steps=1000, teacher=model)
    tq.pack(quantized, "model.safetensors")

Names are loaded on first use: allocation works without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracequant.accuracy import solve_by_accuracy
    from tracequant.allocation.explain import Explanation, explain
    from tracequant.allocation.frontier import Frontier, frontier
    from tracequant.allocation.solve import solve
    from tracequant.allocation.space import full_space, monotone_space
    from tracequant.allocation.stability import plan_stability
    from tracequant.allocation.uniform import uniform_plan
    from tracequant.check import check_metrics
    from tracequant.convert import quantize, to_float
    from tracequant.curvature.estimate import estimate_curvature
    from tracequant.curvature.perturbation import measure_perturbation
    from tracequant.curvature.result import Curvature, Density, Perturbation, Spectrum, TraceEstimate
    from tracequant.curvature.spectrum import spectral_density, top_eigenvalues
    from tracequant.errors import (
        ArtifactError,
        BudgetError,
        DataError,
        ModelError,
        ResourceError,
        RunError,
        TaskError,
        TracequantError,
    )
    from tracequant.evaluated import AccuracySearch, Check, EvaluatedPlan, Evaluations
    from tracequant.export.onnx import OnnxFile, export_onnx
    from tracequant.export.packed import load, pack
    from tracequant.finetuning import finetune
    from tracequant.latency import measure_latency
    from tracequant.layers import discover
    from tracequant.plan import BitPlan
    from tracequant.points import ActivationPoint, Layer, OutputPoint, QuantizationPoints
    from tracequant.sensitivity import measure_sensitivity
    from tracequant.sensitivity_result import Sensitivity
    from tracequant.settings import WeightGrid
    from tracequant.tables import read_latency, read_sensitivity, write_latency
    from tracequant.task import ClassificationTask, Evaluation, Exported, Task, TaskSetup
    from tracequant.tasks.detection import RetinaNetTask

__version__ = "0.1.0"

_MODULES = {
    "tracequant.accuracy": ("solve_by_accuracy",),
    "tracequant.check": ("check_metrics",),
    "tracequant.curvature.perturbation": ("measure_perturbation",),
    "tracequant.evaluated": ("AccuracySearch", "Check", "EvaluatedPlan", "Evaluations"),
    "tracequant.allocation.explain": ("Explanation", "explain"),
    "tracequant.allocation.frontier": ("Frontier", "frontier"),
    "tracequant.allocation.uniform": ("uniform_plan",),
    "tracequant.allocation.solve": ("solve",),
    "tracequant.allocation.space": ("full_space", "monotone_space"),
    "tracequant.allocation.stability": ("plan_stability",),
    "tracequant.convert": ("quantize", "to_float"),
    "tracequant.curvature.estimate": ("estimate_curvature",),
    "tracequant.curvature.result": ("Curvature", "Density", "Perturbation", "Spectrum", "TraceEstimate"),
    "tracequant.curvature.spectrum": ("spectral_density", "top_eigenvalues"),
    "tracequant.errors": (
        "ArtifactError", "BudgetError", "DataError", "ModelError", "ResourceError", "RunError", "TaskError",
        "TracequantError",
    ),
    "tracequant.export.onnx": ("OnnxFile", "export_onnx"),
    "tracequant.export.packed": ("load", "pack"),
    "tracequant.finetuning": ("finetune",),
    "tracequant.latency": ("measure_latency",),
    "tracequant.layers": ("discover",),
    "tracequant.plan": ("BitPlan",),
    "tracequant.points": ("ActivationPoint", "Layer", "OutputPoint", "QuantizationPoints"),
    "tracequant.sensitivity": ("measure_sensitivity",),
    "tracequant.sensitivity_result": ("Sensitivity",),
    "tracequant.settings": ("WeightGrid",),
    "tracequant.tables": ("read_latency", "read_sensitivity", "write_latency"),
    "tracequant.task": ("ClassificationTask", "Evaluation", "Exported", "Task", "TaskSetup"),
    "tracequant.tasks.detection": ("RetinaNetTask",),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AccuracySearch", "ActivationPoint", "ArtifactError", "BitPlan", "BudgetError", "Check", "ClassificationTask",
    "Curvature", "DataError", "Density", "EvaluatedPlan", "Evaluation", "Evaluations", "Explanation", "Exported",
    "Frontier", "Layer", "ModelError", "OnnxFile", "OutputPoint", "Perturbation", "QuantizationPoints", "ResourceError",
    "RetinaNetTask", "RunError", "Sensitivity", "Spectrum", "Task", "TaskError", "TaskSetup", "TraceEstimate",
    "TracequantError", "WeightGrid", "check_metrics", "discover", "estimate_curvature", "explain", "export_onnx",
    "finetune", "frontier", "full_space", "load", "measure_latency", "measure_perturbation", "measure_sensitivity",
    "monotone_space", "pack", "plan_stability", "quantize", "read_latency", "read_sensitivity", "solve",
    "solve_by_accuracy", "spectral_density", "to_float", "top_eigenvalues", "uniform_plan", "write_latency",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tracequant' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
