"""The commands about files for other programs: export, verify, inspect, latency."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from tracequant.cli.options import AsJson, Quiet, RunPath
from tracequant.cli.printing import open_run, print_json
from tracequant.core.evaluations import with_unit
from tracequant.run import deploy


def export(
    run_path: RunPath,
    format: Annotated[Literal["onnx"], typer.Option(help="file format")] = "onnx",
    profile: Annotated[
        Literal["qdq", "weights-only"],
        typer.Option(help="qdq: integers throughout; weights-only: float activations, for transformers"),
    ] = "qdq",
    dynamic_batch: Annotated[bool, typer.Option(help="leave the batch size open")] = True,
    dynamic_sizes: Annotated[
        bool | None, typer.Option(help="leave heights, widths and lengths open [as the task does]", show_default=False)
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the packed model to RUN/model.onnx.

    ONNX Runtime and OpenVINO run it (extra: onnx).
    """
    run = open_run(run_path, quiet)
    written = deploy.export(run, profile, dynamic_batch, dynamic_sizes)
    if as_json:
        print_json(asdict(written))
    elif not quiet:
        print(
            f"{written.path}: {written.file_bytes:,} bytes, {written.code_bytes:,} of them codes. Next: tracequant"
            f" verify {run.path}"
        )


def verify(run_path: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Run RUN/model.onnx and compare it with the packed model.

    It prints differences, accuracy, size, speed, and which kernels are integer.
    """
    result = deploy.verify(open_run(run_path, quiet))
    if as_json:
        print_json(result.to_json())
        return
    if quiet:
        return
    ratio = result.file_bytes / result.promised_bytes
    print(f"Size: {result.file_bytes:,} bytes, {ratio:.3f} times the {result.promised_bytes:,} of the packed file.")
    print(
        f"Exact arithmetic: largest difference {result.difference:.1e} of the largest output;"
        f" {result.samples_within:.2%} of {result.samples:,} samples within 1e-5."
    )
    table = Table(title=f"Fake-quantized model: {with_unit(result.metric_name, result.metric)}", title_justify="left")
    for column in ("runtime", result.metric_name, "equal predictions", "ms", "float32 ms", "speedup"):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    for row in result.runtimes:
        equal = "–" if row.equal_predictions is None else f"{row.equal_predictions:.2%}"
        times = (row.milliseconds, row.float_milliseconds, row.float_milliseconds / row.milliseconds)
        table.add_row(row.runtime, f"{row.metric:.2f}", equal, *(f"{value:.3g}" for value in times))
    Console().print(table)
    in_float = [kernel for kernel in result.kernels if kernel.reason]
    computed = len(result.kernels) - len(in_float)
    print(f"ONNX Runtime computes {computed} of {len(result.kernels)} layers in integers.")
    for kernel in in_float:
        print(f"  {kernel.layer}: {kernel.kernel}, {kernel.reason}")


def inspect(
    file: Annotated[Path, typer.Argument(help="a packed file", metavar="FILE")], as_json: AsJson = False
) -> None:
    """Check a packed file and show its layers, bits and bytes.

    Neither the model nor torch is needed.
    """
    from tracequant.deploy.packed import read_packed

    contents = read_packed(file)
    layout = contents.layout
    layers = [
        {"name": w.name, "shape": list(w.shape), "bits": w.num_bits, "scales": w.rows, "code_bytes": w.code_bytes}
        for w in layout.weights
    ]
    inputs = {name: point.num_bits for point in layout.activations for name in point.consumers}
    float_bytes = sum(raw.size for *_, raw in contents.raw_tensors())
    if as_json:
        print_json({
            "file": str(file), "file_bytes": contents.file_bytes, "header_bytes": layout.header_bytes(),
            "layers": layers, "input_bits": inputs, "rounded_outputs": layout.outputs, "float_bytes": float_bytes,
            "tensors": [{"name": n, "dtype": d, "shape": list(shape)} for n, d, shape in layout.tensors],
        })  # fmt: skip
        return
    table = Table(title="Quantized weights", title_justify="left")
    for column in ("layer", "shape", "bits", "input bits", "bytes of codes", "scales"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for weight in layout.weights:
        shape = " x ".join(map(str, weight.shape))
        read = str(inputs.get(weight.sites[0][0], "float"))
        table.add_row(weight.name, shape, str(weight.num_bits), read, f"{weight.code_bytes:,}", f"{weight.rows:,}")
    Console().print(table)
    if layout.outputs:
        print(f"Rounded to 8 bits where they arise: the outputs of {', '.join(layout.outputs)}.")
    print(
        f"{file}: {contents.file_bytes:,} bytes, checksum right; codes {sum(w.code_bytes for w in layout.weights):,},"
        f" {len(layout.tensors)} tensors that are not quantized {float_bytes:,}, header {layout.header_bytes():,}."
    )


def latency(
    run_path: RunPath,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="the table [RUN/latency.csv]", metavar="FILE", show_default=False, rich_help_panel="Output"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads of ONNX Runtime")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each layer and choice, of which the median counts")] = 30,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure every layer at all bits in ONNX Runtime, here.

    The result is the table for plan --max-latency-ms. An interrupted measurement resumes with the layers that are
    missing.
    """
    run = open_run(run_path, quiet)
    path = out or run.path / "latency.csv"
    table = deploy.measure_run_latency(run, path, threads, repeats)
    if as_json:
        print_json(table)
    elif not quiet:
        # Choices that all layers have: the model's input, for one, is offered 8 bits only.
        offered = [{(w, a) for w, row in layer.items() for a in row} for layer in table.values()]
        for weight_bits, input_bits in sorted(set.intersection(*offered)):
            total = sum(layer[weight_bits][input_bits] for layer in table.values())
            kind = "float32" if weight_bits == 32 else f"weights at {weight_bits} bits, inputs at {input_bits}"
            print(f"{kind}: {total:.3f} ms, the sum over {len(table)} layers")
        print(f"Table: {path}; use it with tracequant plan {run_path} --max-latency-ms X --latency {path}")
