"""Mixed-precision quantization of PyTorch models: the curvature of the loss chooses every bit width.

    curvature = tq.estimate_curvature(model, batches, task)
    sensitivity = tq.measure_sensitivity(model, batches, task, curvature)
    plan = tq.solve(sensitivity, max_size_mib=8.0)
    quantized = tq.quantize(model, batches, task, plan)
    tq.finetune(quantized, loader, task, steps=1000, teacher=model)
    tq.pack(quantized, "model.safetensors")

Names are loaded on first use: allocation and the packed reader work without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tracequant.core.version import VERSION

if TYPE_CHECKING:
    from tracequant.allocation.explain import Explanation, explain
    from tracequant.allocation.frontier import Frontier, frontier
    from tracequant.allocation.solve import solve
    from tracequant.allocation.stability import plan_stability
    from tracequant.allocation.uniform import uniform_plan
    from tracequant.core.curvature import Curvature, Density, Landscapes, Perturbation, Spectrum, TraceEstimate
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
    from tracequant.core.settings import (
        CurvatureSettings,
        DiscoverSettings,
        FinetuneSettings,
        PlanSettings,
        SensitivitySettings,
    )
    from tracequant.core.tables import read_latency, read_sensitivity, write_latency
    from tracequant.core.weight_grid import WeightGrid
    from tracequant.curvature.estimate import estimate_curvature
    from tracequant.curvature.spectrum import spectral_density, top_eigenvalues
    from tracequant.deploy.onnx import OnnxFile, export_onnx
    from tracequant.deploy.pack import load, pack
    from tracequant.deploy.packed import PackedFile, read_packed
    from tracequant.deploy.verify import Verification, verify
    from tracequant.measure.accuracy import solve_by_accuracy
    from tracequant.measure.check import check_criteria
    from tracequant.measure.landscape import loss_landscapes
    from tracequant.measure.latency import measure_latency
    from tracequant.measure.perturbation import measure_perturbation
    from tracequant.measure.sensitivity import measure_sensitivity
    from tracequant.model.callable_task import CallableTask
    from tracequant.model.classification import ClassificationTask
    from tracequant.model.discover import discover
    from tracequant.model.fuse import fuse_weight_norm
    from tracequant.model.huggingface import HuggingFaceTask
    from tracequant.model.task import Evaluation, Exported, Task, TaskSetup, evaluate
    from tracequant.quantization.convert import quantize, to_float
    from tracequant.quantization.finetune import finetune
    from tracequant.quantization.rounding import RoundedWeights, round_weights
    from tracequant.report.html import write_report
    from tracequant.tasks.retinanet import RetinaNetTask

__version__ = VERSION

# Where each public name lives; inner modules may move.
_MODULES = {
    "tracequant.allocation.explain": (
        "Explanation",
        "explain",
    ),
    "tracequant.allocation.frontier": (
        "Frontier",
        "frontier",
    ),
    "tracequant.allocation.solve": ("solve",),
    "tracequant.allocation.stability": ("plan_stability",),
    "tracequant.allocation.uniform": ("uniform_plan",),
    "tracequant.core.curvature": (
        "Curvature",
        "Density",
        "Landscapes",
        "Perturbation",
        "Spectrum",
        "TraceEstimate",
    ),
    "tracequant.core.errors": (
        "ArtifactError",
        "BudgetError",
        "DataError",
        "ModelError",
        "ResourceError",
        "RunError",
        "SettingsError",
        "TaskError",
        "TracequantError",
    ),
    "tracequant.core.evaluations": (
        "AccuracySearch",
        "Check",
        "EvaluatedPlan",
        "Evaluations",
    ),
    "tracequant.core.plan": ("BitPlan",),
    "tracequant.core.points": (
        "ActivationPoint",
        "Layer",
        "OutputPoint",
        "QuantizationPoints",
    ),
    "tracequant.core.sensitivity": ("Sensitivity",),
    "tracequant.core.settings": (
        "CurvatureSettings",
        "DiscoverSettings",
        "FinetuneSettings",
        "PlanSettings",
        "SensitivitySettings",
    ),
    "tracequant.core.tables": (
        "read_latency",
        "read_sensitivity",
        "write_latency",
    ),
    "tracequant.core.weight_grid": ("WeightGrid",),
    "tracequant.curvature.estimate": ("estimate_curvature",),
    "tracequant.curvature.spectrum": (
        "spectral_density",
        "top_eigenvalues",
    ),
    "tracequant.deploy.onnx": (
        "OnnxFile",
        "export_onnx",
    ),
    "tracequant.deploy.pack": (
        "load",
        "pack",
    ),
    "tracequant.deploy.packed": (
        "PackedFile",
        "read_packed",
    ),
    "tracequant.deploy.verify": (
        "Verification",
        "verify",
    ),
    "tracequant.measure.accuracy": ("solve_by_accuracy",),
    "tracequant.measure.check": ("check_criteria",),
    "tracequant.measure.landscape": ("loss_landscapes",),
    "tracequant.measure.latency": ("measure_latency",),
    "tracequant.measure.perturbation": ("measure_perturbation",),
    "tracequant.measure.sensitivity": ("measure_sensitivity",),
    "tracequant.model.callable_task": ("CallableTask",),
    "tracequant.model.classification": ("ClassificationTask",),
    "tracequant.model.discover": ("discover",),
    "tracequant.model.fuse": ("fuse_weight_norm",),
    "tracequant.model.huggingface": ("HuggingFaceTask",),
    "tracequant.model.task": (
        "Evaluation",
        "Exported",
        "Task",
        "TaskSetup",
        "evaluate",
    ),
    "tracequant.quantization.convert": (
        "quantize",
        "to_float",
    ),
    "tracequant.quantization.finetune": ("finetune",),
    "tracequant.quantization.rounding": (
        "RoundedWeights",
        "round_weights",
    ),
    "tracequant.report.html": ("write_report",),
    "tracequant.tasks.retinanet": ("RetinaNetTask",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AccuracySearch", "ActivationPoint", "ArtifactError", "BitPlan", "BudgetError", "CallableTask", "Check",
    "ClassificationTask", "Curvature", "CurvatureSettings", "DataError", "Density", "DiscoverSettings",
    "EvaluatedPlan", "Evaluation", "Evaluations", "Explanation", "Exported", "FinetuneSettings", "Frontier",
    "HuggingFaceTask", "Landscapes", "Layer", "ModelError", "OnnxFile", "OutputPoint", "PackedFile", "Perturbation",
    "PlanSettings", "QuantizationPoints", "ResourceError", "RetinaNetTask", "RoundedWeights", "RunError", "Sensitivity",
    "SensitivitySettings", "SettingsError", "Spectrum", "Task", "TaskError", "TaskSetup", "TraceEstimate",
    "TracequantError", "Verification", "WeightGrid", "check_criteria", "discover", "estimate_curvature", "evaluate",
    "explain", "export_onnx", "finetune", "frontier", "fuse_weight_norm", "load", "loss_landscapes",
    "measure_latency", "measure_perturbation", "measure_sensitivity", "pack", "plan_stability", "quantize",
    "read_latency", "read_packed", "read_sensitivity", "round_weights", "solve", "solve_by_accuracy",
    "spectral_density", "to_float", "top_eigenvalues", "uniform_plan", "verify", "write_latency", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tracequant' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
