"""The loss around the trained weights of single layers, along the two sharpest directions (the paper's Figure 2)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tracequant.core.curvature import Landscape, Landscapes
from tracequant.core.errors import ArtifactError, ModelError
from tracequant.core.files import replace_file
from tracequant.core.points import QuantizationPoints
from tracequant.core.progress import track
from tracequant.curvature.spectrum import top_eigenvectors
from tracequant.model.batches import Batches, reusable
from tracequant.model.device import measuring
from tracequant.model.digest import digest
from tracequant.model.hooks import replaced_weights, weight_parameter
from tracequant.model.memory import Microbatches
from tracequant.model.state import fingerprint
from tracequant.model.task import Task, checked, total_loss

DEFAULT_SIZE = 15


def loss_landscapes(
    model: nn.Module,
    batches: Batches,
    task: Task,
    points: QuantizationPoints,
    *,
    layers: Sequence[str],
    size: int = DEFAULT_SIZE,
    radius: float | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Landscapes:
    """The mean loss over `batches` on a grid of `size` × `size` points around each layer's weights.

    A layer's weights move along the two eigenvectors of largest eigenvalue (in magnitude) of its Hessian block, by up
    to `radius` (‖ΔW‖, in units of the weights) to either side, while all other layers stay. All layers have the same
    grid, so that their pictures can be compared. By default the grid ends where the quadratic term ½ λ r² of the
    sharpest layer equals the loss, or at the norm of that layer's weights where that is smaller.

    `checkpoint` is a JSON file that is written after every row of the grid, and an interrupted call resumes from it. A
    second file next to it keeps the directions until the last row is there. The model is left as it was.

    Raises `ModelError` for an even or too small `size`, a radius that is not positive, and unknown layers.
    """
    if size < 3 or size % 2 == 0:
        raise ModelError(f"a landscape needs an odd number of points to a side, 3 or more, got {size}")
    if radius is not None and not (radius > 0 and math.isfinite(radius)):
        raise ModelError(f"the radius of a landscape must be positive, got {radius}")
    if not layers:
        raise ModelError("a landscape needs a layer, got none")
    data = list(reusable(batches))
    moved = list(checked(data, task, model))
    samples = sum(task.batch_size(batch) for batch in moved)
    microbatches = Microbatches(task)

    def mean_loss() -> float:
        # Not `forward`, which refuses a loss that is not finite: far out it may well overflow.
        sums = [task.batch_size(b) * total_loss(task, microbatches.outputs(model, b), b).item() for b in moved]
        return sum(sums) / samples

    path = None if checkpoint is None else Path(checkpoint)
    with measuring(model), torch.no_grad():
        centre = mean_loss()
    context = _context(model, data, centre, layers, size, radius, seed)
    found, directions = _resumed(path, context) or (None, {})
    if found is None:
        values: dict[str, tuple[float, ...]] = {}
        for layer in track(layers, "Sharpest directions", progress):
            values[layer], directions[layer] = top_eigenvectors(model, data, task, points, layer=layer, k=2, seed=seed)
        if radius is None:
            radius = _default_radius(model, points, values, centre)
        steps = tuple(radius * i / (size // 2) for i in range(-(size // 2), size // 2 + 1))
        found = Landscapes(steps, samples, context, tuple(Landscape(name, values[name], ()) for name in layers))
        _keep(path, found, directions)
    left = [(i, row) for i, own in enumerate(found.layers) for row in range(len(own.losses), size)]
    with measuring(model), torch.no_grad():
        for i, row in track(left, "Loss landscape, rows", progress, size * len(layers) - len(left)):
            own = found.layers[i]
            weight = weight_parameter(model, points.by_name[own.layer]).clone()
            u, v = directions[own.layer].to(weight)
            losses = []
            for step in found.steps:
                with replaced_weights(model, {own.layer: weight + found.steps[row] * u + step * v}, points):
                    losses.append(mean_loss())
            layers_so_far = list(found.layers)
            layers_so_far[i] = replace(own, losses=(*own.losses, tuple(losses)))
            found = replace(found, layers=tuple(layers_so_far))
            if path is not None:
                found.save(path)
    if path is not None:
        _directions_file(path).unlink(missing_ok=True)
    return found


def _default_radius(
    model: nn.Module, points: QuantizationPoints, eigenvalues: dict[str, tuple[float, ...]], loss: float
) -> float:
    """√(2 loss / λ) of the layer of largest λ, at most the norm of its weights."""
    sharpest = max(eigenvalues, key=lambda name: abs(eigenvalues[name][0]))
    curvature = abs(eigenvalues[sharpest][0])
    norm = float(weight_parameter(model, points.by_name[sharpest]).detach().norm()) or 1.0
    reach = math.sqrt(2 * abs(loss) / curvature) if curvature and math.isfinite(loss) else norm
    return min(reach, norm) or norm


def _context(
    model: nn.Module,
    data: Sequence[object],
    loss: float,
    layers: Sequence[str],
    size: int,
    radius: float | None,
    seed: int,
) -> str:
    """A hash of all that decides the landscapes. The task's loss cannot be compared, but its value can."""
    parts = [fingerprint(model), *map(digest, data), f"{loss:.5g}", *layers, str(size), str(radius), str(seed)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _directions_file(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _keep(path: Path | None, found: Landscapes, directions: dict[str, Tensor]) -> None:
    if path is not None:
        with replace_file(_directions_file(path)) as temporary:
            safetensors.torch.save_file({name: d.cpu().contiguous() for name, d in directions.items()}, temporary)
        found.save(path)


def _resumed(path: Path | None, context: str) -> tuple[Landscapes, dict[str, Tensor]] | None:
    """What an interrupted call of the same request has saved; None where there is nothing or a file is damaged."""
    if path is None:
        return None
    with suppress(ArtifactError, OSError, safetensors.SafetensorError):
        found = Landscapes.load(path)
        if found.context == context:
            return found, {} if found.complete else safetensors.torch.load_file(_directions_file(path))
    return None
