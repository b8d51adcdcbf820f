"""The paper's figures from a run directory, each as a picture with a file of its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tracequant.allocation.frontier import Frontier
from tracequant.core.curvature import Curvature
from tracequant.core.errors import RunError, TracequantError
from tracequant.core.files import replace_file, write_json
from tracequant.core.match import match_names, matching
from tracequant.core.plan import MIB, BitPlan
from tracequant.core.points import QuantizationPoints
from tracequant.report import figures, paper_figures
from tracequant.report.blocks import Block, activation_blocks, block_names, weight_blocks
from tracequant.report.frontiers import evaluated_plans, frontiers, markers
from tracequant.run import examine
from tracequant.run.directory import RunDirectory

# What the paper took: Figure 6 shows 20 eigenvalues, Section 3.1 finds 50 iterations sufficient.
EIGENVALUES, PROBES = 20, 50
# A frontier may have hundreds of thousands of plans, of which so many are written next to its picture.
_FRONTIER_ROWS = 2000


@dataclass(frozen=True)
class FigureOptions:
    """What the figures show, where the defaults are not wanted.

    `layers` are shell patterns: of the landscapes (Figure 2; by default the layers of largest and of smallest average
    trace), and of Figures 5 and 6 (by default these and the one in the middle). `blocks` are shell patterns of layer
    names that are drawn as one bar; tied layers always are. `size` and `radius` are those of the landscapes' grid
    (`loss_landscapes`).
    """

    layers: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    size: int | None = None
    radius: float | None = None


@dataclass(frozen=True)
class PaperFigures:
    """The pictures that were written, by number, and why others were not."""

    files: dict[int, Path]
    left_out: dict[int, str]


# A figure and its data, plain JSON.
_Drawn = tuple[Figure, dict[str, Any]]


def draw_figures(
    run: RunDirectory,
    numbers: Sequence[int] | None = None,
    out: Path | None = None,
    options: FigureOptions | None = None,
) -> PaperFigures:
    """Write `figure-N.png` and `figure-N.json` for the given numbers, by default into RUN/paper.

    What the run lacks is measured on the first calibration batch and kept in the run. Without numbers, every figure
    that can be drawn is drawn, and the result says why the others are not. With numbers the error
    that stands in the way is raised; a number that is no such figure is a `RunError` always.
    """
    if unknown := [number for number in numbers or () if number not in FIGURES]:
        raise RunError(
            f"there is no figure {', '.join(map(str, unknown))} to draw; choose from {', '.join(map(str, FIGURES))}"
            " (Figures 1 and 3 are illustrations, which show nothing that is measured)"
        )
    run.need("analyze")
    options = options or FigureOptions()
    points = run.curvature().points
    # The task names all blocks of its model, the analysis may have left some out.
    blocks = run.blocks(options.blocks)
    analysed = tuple(name for name in blocks if name in options.blocks or matching(name, points.by_name))
    options = replace(options, blocks=analysed)
    block_names(points, options.blocks)  # a wrong pattern fails here, and not after an hour
    _matching(run.curvature().points, options.layers)
    folder = out if out is not None else run.path / "paper"
    files, left_out = {}, {}
    for number in FIGURES if numbers is None else dict.fromkeys(numbers):
        try:
            picture, data = FIGURES[number](run, options)
        except TracequantError as error:
            if numbers is not None:
                raise
            left_out[number] = str(error)
            continue
        files[number] = folder / f"figure-{number}.png"
        with replace_file(files[number]) as temporary:
            picture.savefig(temporary, dpi=150)
        write_json(files[number].with_suffix(".json"), _plain({"figure": number, **data}))
    return PaperFigures(files, left_out)


def _figure_2(run: RunDirectory, options: FigureOptions) -> _Drawn:
    curvature = run.curvature()
    layers = _matching(curvature.points, options.layers) or _extremes(curvature, middle=False)
    landscapes = examine.landscapes(run, layers, options.size, options.radius)
    blocks = weight_blocks(curvature, options.blocks, {})
    return paper_figures.figure_2(blocks, landscapes), {
        "blocks": _block_rows(blocks), "samples": curvature.samples, "landscapes": landscapes.to_json(),
    }  # fmt: skip


def _figure_4(run: RunDirectory, options: FigureOptions) -> _Drawn:
    plan = _planned(run, 4)
    settings, sensitivity = run.settings().plan, run.sensitivity()
    fronts = frontiers(sensitivity, plan, settings)
    points = markers(run, sensitivity, plan)
    evaluations = run.evaluations()
    evaluated = evaluated_plans(sensitivity, evaluations)
    picture = figures.frontier_figure(
        fronts,
        points,
        [(row.size_bytes, omega, row.metric) for row, omega in evaluated],
        metric_name=evaluations.metric_name if evaluations is not None else "",
    )
    return picture, {
        "criterion": sensitivity.criterion,
        "frontiers": {solver: _frontier_rows(front) for solver, front in fronts.items()},
        "plans": [
            {"plan": marker.label or marker.note, "note": marker.note, "size_mib": marker.plan.size_mib,
             "omega": marker.plan.omega, "weight_bits": marker.plan.weight_bits}
            for marker in points
        ],
        "evaluated": [
            {"size_mib": row.size_bytes / MIB, "omega": omega, "metric": row.metric} for row, omega in evaluated
        ],
    }  # fmt: skip


def _figure_5(run: RunDirectory, options: FigureOptions) -> _Drawn:
    curvature = run.curvature()
    layers = _matching(curvature.points, options.layers)
    drawn = curvature
    if curvature.estimator != "hutchinson" or not _enough(curvature.weight_probes):
        layers = layers or _extremes(curvature, middle=True)
        drawn = examine.hutchinson_probes(run, layers, PROBES)
    assert drawn.weight_probes is not None
    shown = {name: drawn.weight_probes[name] for name in layers or _extremes(curvature, middle=True)}
    return paper_figures.figure_5(curvature, shown, drawn.samples), {
        "by_sample": curvature.weight_values, "estimator": curvature.estimator, "samples": curvature.samples,
        "by_iteration": shown, "iterations_on_samples": drawn.samples,
    }  # fmt: skip


def _figure_6(run: RunDirectory, options: FigureOptions) -> _Drawn:
    curvature = run.curvature()
    layers = _matching(curvature.points, options.layers) or _extremes(curvature, middle=True)
    spectrum = examine.eigenvalues(run, layers, EIGENVALUES)
    values = {name: spectrum.eigenvalues[name][:EIGENVALUES] for name in layers}
    numel = {name: curvature.points.by_name[name].numel for name in layers}
    averages = {name: _first_trace(curvature, name, spectrum.samples) / numel[name] for name in layers}
    return paper_figures.figure_6(values, averages, numel, spectrum.samples), {
        "samples": spectrum.samples,
        "layers": {
            name: {
                "eigenvalues": values[name], "average_trace": averages[name],
                "average_trace_of_all_samples": curvature.weights[name].average_trace, "weights": numel[name],
            }
            for name in layers
        },
    }  # fmt: skip


def _figure_7(run: RunDirectory, options: FigureOptions) -> _Drawn:
    curvature = run.curvature()
    blocks = weight_blocks(curvature, options.blocks, _planned(run, 7).weight_bits)
    return paper_figures.figure_7(blocks), {"samples": curvature.samples, "blocks": _block_rows(blocks)}


def _figure_8(run: RunDirectory, options: FigureOptions) -> _Drawn:
    curvature, plan = run.curvature(), _planned(run, 8)
    if not (curvature.activations and plan.activation_bits):
        raise RunError(
            f"Figure 8 shows activations, which stay in float in {run.path}; analyze with --activation-bits, such as"
            " 4,8, into another directory"
        )
    blocks = activation_blocks(curvature, options.blocks, plan.activation_bits)
    return paper_figures.figure_8(blocks, curvature), {
        "samples": curvature.samples, "estimator": curvature.estimator, "blocks": _block_rows(blocks),
        "by_sample": curvature.activation_values,
    }  # fmt: skip


FIGURES: Mapping[int, Callable[[RunDirectory, FigureOptions], _Drawn]] = {
    2: _figure_2, 4: _figure_4, 5: _figure_5, 6: _figure_6, 7: _figure_7, 8: _figure_8,
}  # fmt: skip


def _planned(run: RunDirectory, number: int) -> BitPlan:
    if not run.done("plan"):
        raise RunError(
            f"Figure {number} shows the plan, and {run.path} has none; run"
            f" `tracequant plan {run.path} --max-size-mib X` first"
        )
    return run.plan()


def _matching(points: QuantizationPoints, patterns: Sequence[str]) -> list[str]:
    """Layers that match, in the model's order; `RunError` for a pattern without one."""
    return match_names(patterns, list(points.by_name), "layers", error=RunError)


def _extremes(curvature: Curvature, middle: bool) -> list[str]:
    """The layers of largest and of smallest positive average trace, and the one in the middle, each once."""
    ranked = sorted(curvature.weights, key=lambda name: -curvature.weights[name].average_trace)
    # A dead layer, or one whose trace is lost in noise, would show nothing.
    ranked = [name for name in ranked if curvature.weights[name].average_trace > 0] or ranked
    chosen = [ranked[0], *([ranked[len(ranked) // 2]] if middle else []), ranked[-1]]
    return list(dict.fromkeys(chosen))


def _first_trace(curvature: Curvature, name: str, samples: int | None) -> float:
    """A layer's trace on the first `samples` of the calibration data, as a spectrum is measured.

    A few inputs make up most of a trace, so that it may be another one on all of the data.
    """
    if curvature.weight_values is None or samples is None:
        return curvature.weights[name].trace
    values = curvature.weight_values[name]
    count = samples if curvature.estimator == "gauss_newton" else 1  # hutchinson has a value for each batch
    return math.fsum(values[:count]) / len(values[:count])


def _enough(by_probe: Mapping[str, Sequence[float]] | None) -> bool:
    """Whether there are enough values by probe to see them converge."""
    return bool(by_probe) and min(len(row) for row in (by_probe or {}).values()) > 2


def _block_rows(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    return [asdict(block) for block in blocks]


def _frontier_rows(front: Frontier) -> dict[str, list[float]]:
    chosen = np.unique(np.linspace(0, len(front) - 1, _FRONTIER_ROWS).round().astype(int))
    return {"size_mib": (front.size_bytes[chosen] / MIB).tolist(), "omega": front.omega[chosen].tolist()}


def _plain(value: Any) -> Any:
    """JSON has no infinities: what is not known becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
