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
    from tracequant.allocation.frontier import Frontier, frontier
    from tracequant.allocation.pricing import uniform_plan
    from tracequant.allocation.solve import solve
    from tracequant.allocation.space import full_space, monotone_space
    from tracequant.check import check_metrics
    from tracequant.classification import ClassificationTask
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
        SettingsError,
        TaskError,
        TracequantError,
    )
    from tracequant.evaluated import AccuracySearch, Check, EvaluatedPlan, Evaluations
    from tracequant.export.onnx import OnnxFile, export_onnx
    from tracequant.export.packed import load, pack
    from tracequant.latency import measure_latency
    from tracequant.model.discover import discover
    from tracequant.plan import BitPlan
    from tracequant.points import ActivationPoint, Layer, OutputPoint, QuantizationPoints
    from tracequant.quantization.finetune import finetune
    from tracequant.sensitivity import measure_sensitivity
    from tracequant.sensitivity_result import Sensitivity
    from tracequant.settings import FinetuneSettings, WeightGrid
    from tracequant.tables import read_latency, read_sensitivity, write_latency
    from tracequant.task import Evaluation, Exported, Task, TaskSetup
    from tracequant.tasks.detection import RetinaNetTask

__version__ = "0.1.0"

_MODULES = {
    "tracequant.accuracy": ("solve_by_accuracy",),
    "tracequant.check": ("check_metrics",),
    "tracequant.curvature.perturbation": ("measure_perturbation",),
    "tracequant.evaluated": ("AccuracySearch", "Check", "EvaluatedPlan", "Evaluations"),
    "tracequant.classification": ("ClassificationTask",),
    "tracequant.allocation.frontier": ("Frontier", "frontier"),
    "tracequant.allocation.pricing": ("uniform_plan",),
    "tracequant.allocation.solve": ("solve",),
    "tracequant.allocation.space": ("full_space", "monotone_space"),
    "tracequant.convert": ("quantize", "to_float"),
    "tracequant.curvature.estimate": ("estimate_curvature",),
    "tracequant.curvature.result": ("Curvature", "Density", "Perturbation", "Spectrum", "TraceEstimate"),
    "tracequant.curvature.spectrum": ("spectral_density", "top_eigenvalues"),
    "tracequant.model.discover": ("discover",),
    "tracequant.errors": (
        "ArtifactError", "BudgetError", "DataError", "ModelError", "ResourceError", "RunError", "SettingsError",
        "TaskError", "TracequantError",
    ),
    "tracequant.export.onnx": ("OnnxFile", "export_onnx"),
    "tracequant.export.packed": ("load", "pack"),
    "tracequant.latency": ("measure_latency",),
    "tracequant.plan": ("BitPlan",),
    "tracequant.points": ("ActivationPoint", "Layer", "OutputPoint", "QuantizationPoints"),
    "tracequant.quantization.finetune": ("finetune",),
    "tracequant.sensitivity": ("measure_sensitivity",),
    "tracequant.sensitivity_result": ("Sensitivity",),
    "tracequant.settings": ("FinetuneSettings", "WeightGrid"),
    "tracequant.tables": ("read_latency", "read_sensitivity", "write_latency"),
    "tracequant.task": ("Evaluation", "Exported", "Task", "TaskSetup"),
    "tracequant.tasks.detection": ("RetinaNetTask",),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AccuracySearch", "ActivationPoint", "ArtifactError", "BitPlan", "BudgetError", "Check", "ClassificationTask",
    "Curvature", "DataError", "Density", "EvaluatedPlan", "Evaluation", "Evaluations", "Exported", "FinetuneSettings",
    "Frontier", "Layer", "ModelError", "OnnxFile", "OutputPoint", "Perturbation", "QuantizationPoints", "ResourceError",
    "RetinaNetTask", "RunError", "Sensitivity", "SettingsError", "Spectrum", "Task", "TaskError", "TaskSetup",
    "TraceEstimate", "TracequantError", "WeightGrid", "check_metrics", "discover", "estimate_curvature", "export_onnx",
    "finetune", "frontier", "full_space", "load", "measure_latency", "measure_perturbation", "measure_sensitivity",
    "monotone_space", "pack", "quantize", "read_latency", "read_sensitivity", "solve", "solve_by_accuracy",
    "spectral_density", "to_float", "top_eigenvalues", "uniform_plan", "write_latency",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tracequant' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
