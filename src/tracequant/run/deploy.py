"""Files of a run for other programs: the ONNX file, its verification, and the table of latencies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tracequant.core.errors import ArtifactError, ModelError
from tracequant.core.settings import Latency
from tracequant.run.directory import RunDirectory

if TYPE_CHECKING:
    from tracequant.deploy.onnx import OnnxFile, Profile
    from tracequant.deploy.verify import Verification


def export(
    run: RunDirectory, profile: Profile = "qdq", dynamic_batch: bool = True, dynamic_sizes: bool | None = None
) -> OnnxFile:
    """Write the packed model to `model.onnx`; whether sizes stay open is the task's choice where it is None."""
    run.need("pack")
    from tracequant.deploy.onnx import export_onnx
    from tracequant.deploy.pack import load

    setup = run.setup()
    exported = setup.task.exported(load(run.path / "model.safetensors", setup.model))
    args, kwargs = exported.arguments(next(iter(setup.calibration)))
    if args and kwargs:
        raise ModelError(
            "the task calls the model with positional and keyword arguments, ONNX export needs one kind; pass all by"
            " keyword in the task's `outputs`"
        )
    (run.path / "verify.json").unlink(missing_ok=True)  # of an earlier export
    sizes = exported.dynamic_sizes if dynamic_sizes is None else dynamic_sizes
    return export_onnx(
        exported.module,
        run.path / "model.onnx",
        kwargs or args,
        profile=profile,
        dynamic_batch=dynamic_batch,
        dynamic_sizes=sizes,
    )


def verify(run: RunDirectory) -> Verification:
    """Compare `model.onnx` with the packed model on the evaluation data."""
    run.need("pack")
    from tracequant.deploy.pack import load
    from tracequant.deploy.verify import verify as verify_file

    path = run.path / "model.onnx"
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; `tracequant export {run.path}` makes it")
    setup = run.setup()
    result = verify_file(
        load(run.path / "model.safetensors", setup.model).cpu(),
        setup.evaluation,
        setup.task,
        path,
        float_model=setup.model,
        promised_bytes=run.pack_result().promised_bytes,
    )
    result.save(run.path / "verify.json")
    return result


def measure_run_latency(run: RunDirectory, out: Path, threads: int = 1, repeats: int = 30) -> Latency:
    """Measure every layer at every choice of bits that the analysis offers, and write the table to `out` (CSV).

    Measurements are kept in `latency.json`, from which an interrupted call resumes.
    """
    run.need("analyze")
    from tracequant.core.tables import write_latency
    from tracequant.measure.latency import measure_latency

    setup, offered = run.setup(), run.settings().analysis.sensitivity
    table = measure_latency(
        setup.model,
        setup.calibration,
        setup.task,
        run.sensitivity_by(None).points,
        weight_bits=offered.weight_bits,
        activation_bits=offered.activation_bits,
        threads=threads,
        repeats=repeats,
        checkpoint=run.path / "latency.json",
        progress=run.progress,
    )
    write_latency(table, out)
    return table
