"""Mixed-precision quantization of PyTorch models, every bit width chosen from the curvature of the loss.

    curvature = tq.estimate_curvature(model, batches, task)
    sensitivity = tq.measure_sensitivity(model, curvature, batches, task)
    plan = tq.solve(sensitivity, max_size_mib=8.0)
    quantized = tq.quantize(model, plan, batches, task)
    tq.finetune(quantized, loader, task, steps=1000, teacher=model)
    tq.pack(quantized, "model.safetensors")

Names are loaded on first use: allocation works without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracequant.allocation.explain import Explanation, explain
    from tracequant.allocation.frontier import Frontier, frontier
    from tracequant.allocation.solve import solve
    from tracequant.allocation.space import full_space, monotone_space
    from tracequant.core.curvature import Curvature, Density, Perturbation, Spectrum, TraceEstimate
    from tracequant.core.errors import (
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
    from tracequant.core.evaluations import AccuracySearch, Check, EvaluatedPlan, Evaluations
    from tracequant.core.plan import BitPlan
    from tracequant.core.points import ActivationPoint, Layer, OutputPoint, QuantizationPoints
    from tracequant.core.sensitivity import Sensitivity
    from tracequant.core.settings import FinetuneSettings, WeightGrid
    from tracequant.core.tables import read_latency, read_sensitivity, write_latency
    from tracequant.curvature.estimate import estimate_curvature
    from tracequant.curvature.spectrum import spectral_density, top_eigenvalues
    from tracequant.deploy.onnx import OnnxFile, export_onnx
    from tracequant.deploy.pack import load, pack
    from tracequant.measure.accuracy import solve_by_accuracy
    from tracequant.measure.check import check_criteria
    from tracequant.measure.latency import measure_latency
    from tracequant.measure.perturbation import measure_perturbation
    from tracequant.measure.sensitivity import measure_sensitivity
    from tracequant.model.classification import ClassificationTask
    from tracequant.model.discover import discover
    from tracequant.model.task import Evaluation, Exported, Task, TaskSetup
    from tracequant.quantization.convert import quantize, to_float
    from tracequant.quantization.finetune import finetune
    from tracequant.tasks.retinanet import RetinaNetTask

__version__ = "0.1.0"

_MODULES = {
    "tracequant.measure.accuracy": ("solve_by_accuracy",),
    "tracequant.measure.check": ("check_criteria",),
    "tracequant.measure.perturbation": ("measure_perturbation",),
    "tracequant.core.evaluations": ("AccuracySearch", "Check", "EvaluatedPlan", "Evaluations"),
    "tracequant.model.classification": ("ClassificationTask",),
    "tracequant.allocation.frontier": ("Frontier", "frontier"),
    "tracequant.allocation.uniform": ("uniform_plan",),
    "tracequant.allocation.solve": ("solve",),
    "tracequant.allocation.space": ("full_space", "monotone_space"),
    "tracequant.quantization.convert": ("quantize", "to_float"),
    "tracequant.curvature.estimate": ("estimate_curvature",),
    "tracequant.core.curvature": ("Curvature", "Density", "Perturbation", "Spectrum", "TraceEstimate"),
    "tracequant.curvature.spectrum": ("spectral_density", "top_eigenvalues"),
    "tracequant.model.discover": ("discover",),
    "tracequant.core.errors": (
        "ArtifactError", "BudgetError", "DataError", "ModelError", "ResourceError", "RunError", "SettingsError",
        "TaskError", "TracequantError",
    ),
    "tracequant.deploy.onnx": ("OnnxFile", "export_onnx"),
    "tracequant.deploy.pack": ("load", "pack"),
    "tracequant.measure.latency": ("measure_latency",),
    "tracequant.core.plan": ("BitPlan",),
    "tracequant.core.points": ("ActivationPoint", "Layer", "OutputPoint", "QuantizationPoints"),
    "tracequant.quantization.finetune": ("finetune",),
    "tracequant.measure.sensitivity": ("measure_sensitivity",),
    "tracequant.core.sensitivity": ("Sensitivity",),
    "tracequant.core.settings": ("FinetuneSettings", "WeightGrid"),
    "tracequant.core.tables": ("read_latency", "read_sensitivity", "write_latency"),
    "tracequant.model.task": ("Evaluation", "Exported", "Task", "TaskSetup"),
    "tracequant.tasks.registry.detection": ("RetinaNetTask",),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AccuracySearch", "ActivationPoint", "ArtifactError", "BitPlan", "BudgetError", "Check", "ClassificationTask",
    "Curvature", "DataError", "Density", "EvaluatedPlan", "Evaluation", "Evaluations", "Exported", "FinetuneSettings",
    "Frontier", "Layer", "ModelError", "OnnxFile", "OutputPoint", "Perturbation", "QuantizationPoints", "ResourceError",
    "RetinaNetTask", "RunError", "Sensitivity", "SettingsError", "Spectrum", "Task", "TaskError", "TaskSetup",
    "TraceEstimate", "TracequantError", "WeightGrid", "check_criteria", "discover", "estimate_curvature", "export_onnx",
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
