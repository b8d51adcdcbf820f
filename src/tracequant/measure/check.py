"""The self-check: round single layers and random whole plans, measure the loss, and see which criterion ranks best."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tracequant.core.curvature import Curvature, Perturbation
from tracequant.core.errors import ModelError
from tracequant.core.evaluations import Check, LayerCheck, PlanCheck, plan_group, spearman
from tracequant.core.files import replace_file
from tracequant.core.points import QuantizationPoints
from tracequant.core.progress import track
from tracequant.core.sensitivity import Sensitivity, combine
from tracequant.core.settings import EXPANSIONS, Criterion, SensitivitySettings
from tracequant.core.weight_grid import WeightGrid
from tracequant.model.batches import Batch, Batches, reusable
from tracequant.model.device import measuring, model_device
from tracequant.model.digest import digest
from tracequant.model.hooks import replaced_weights
from tracequant.model.memory import Microbatches
from tracequant.model.task import Task, checked, checked_loss, total_loss
from tracequant.quantization.rounding import RoundedWeights, round_weights

# Elements of all layers' changes of the outputs together, above which they are not kept and "response" is left out.
RESPONSE_ELEMENTS = 1 << 25

# A model's measured values on all batches: the loss of each, and its outputs where they are one tensor and few.
_Measured = tuple[list[float], list[Tensor]]


def check_criteria(
    model: nn.Module,
    batches: Batches,
    task: Task,
    curvature: Curvature,
    *,
    weight_bits: Sequence[int] = SensitivitySettings.weight_bits,
    weight_grid: WeightGrid | None = None,
    perturbation: Perturbation | None = None,
    rounded: RoundedWeights | None = None,
    plans: int = 80,
    offered: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = False,
    extra_scores: Mapping[str, Callable[[dict[str, int]], float]] | None = None,
) -> Check:
    """Rank correlations of every criterion with the measured change of the loss on `batches`, labelled samples.

    Every layer of `curvature` is rounded alone at each of `weight_bits`, and `plans` random plans with bits from each
    of `offered` (all of `weight_bits` if None), ties kept; activations stay in float. That is a pass over the batches
    for each. Metrics: "trace", "l2", the eigenvalues' where `curvature` has them, and the expansions where
    `perturbation`, measured at the same bits, is given. `extra_scores` ranks the random plans by other forms too: each
    maps a plan's bits by layer to a number. No plan can be solved for these, so none of them is `trusted`.

    `cache` is a folder in which every measurement is saved, so that an interrupted check resumes where it stopped, and
    a check with more plans measures only those. The model is left as it was.

    Raises `ModelError` for bits that are not among those measured, and `DataError` for batches that cannot be used.
    """
    batches, points, grid = reusable(batches), curvature.points, weight_grid or WeightGrid()
    widths = sorted(set(weight_bits))
    groups = [tuple(sorted(set(bits))) for bits in (offered or [widths])] if plans else []
    for bits in groups:
        if not bits or not set(bits) <= set(widths):
            raise ModelError(f"plans of {list(bits)} bits were asked for, layers are measured at {widths}")
    bits_of_layers = {layer.name: widths for layer in points.layers}
    if rounded is None or not rounded.covers(points.fingerprint, bits_of_layers, grid):
        rounded = round_weights(
            model, batches, task, points, bits_of_layers, weight_grid=grid, cache=cache, progress=progress
        )
    tables = _tables(curvature, rounded.errors, grid, perturbation)
    with measuring(model), torch.no_grad():
        bench = _Bench(model, batches, task, rounded, cache)
        plain = bench.measure({})
        float_loss = bench.mean(plain[0])
        options = [(layer.name, b) for layer in points.layers for b in widths]
        keep = 0 < sum(z.numel() for z in plain[1]) * len(options) <= RESPONSE_ELEMENTS
        alone: dict[tuple[str, int], float] = {}
        moved: dict[tuple[str, int], list[Tensor]] = {}
        for option in track(options, "Rounding one layer", progress):
            losses, outputs = bench.measure(dict([option]), outputs=keep)
            alone[option] = bench.mean(losses) - float_loss
            if keep:
                moved[option] = [after - before for after, before in zip(outputs, plain[1], strict=True)]
        drawn = _random_plans(points, groups, plans, seed)
        plan_checks = []
        for bits, plan in track(drawn, "Random plans", progress):
            losses, _ = bench.measure(plan, outputs=False)
            scores = {
                name: math.fsum(table.weight_omega[layer][b] for layer, b in plan.items())
                for name, table in tables.items()
            }
            scores |= {name: score(plan) for name, score in (extra_scores or {}).items()}
            scores["measured"] = math.fsum(alone[option] for option in plan.items())
            if keep:
                added = [sum(parts) for parts in zip(*(moved[option] for option in plan.items()), strict=True)]
                scores["response"] = bench.loss_at([z + dz for z, dz in zip(plain[1], added, strict=True)]) - float_loss
            plan_checks.append(PlanCheck(bits, plan, bench.mean(losses) - float_loss, scores))
    layer_checks = tuple(
        LayerCheck(
            name,
            num_bits,
            alone[name, num_bits],
            {criterion: table.weight_omega[name][num_bits] for criterion, table in tables.items()},
        )
        for name, num_bits in options
    )
    correlations = _correlations(layer_checks, tuple(plan_checks), widths, groups)
    return Check(
        fingerprint=points.fingerprint,
        samples=bench.samples,
        float_loss=float_loss,
        layers=layer_checks,
        plans=tuple(plan_checks),
        correlations=correlations,
        trusted=_trusted(correlations, [plan_group(bits) for bits in groups] or ["all bits"], list(tables)),
    )


class _Bench:
    """Measures the model with some of its weights rounded, and keeps what it needs to do so again."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        task: Task,
        rounded: RoundedWeights,
        cache: str | Path | None,
    ) -> None:
        self._model, self._batches, self._task = model, batches, task
        self._rounded = rounded
        self._microbatches = Microbatches(task)
        self._sizes: list[int] = []
        seen = hashlib.sha256(f"{rounded.points.fingerprint} {rounded.weight_grid}".encode())
        for batch in self._moved():
            self._sizes.append(task.batch_size(batch))
            seen.update(digest(batch).encode())
        self._folder: Path | None = None
        if cache is not None:
            # The task's loss cannot be compared, but its value can.
            seen.update(f"{self.mean(self._run()[0]):.5g}".encode())
            self._folder = Path(cache) / seen.hexdigest()[:16]

    @property
    def samples(self) -> int:
        """Number of samples in the batches."""
        return sum(self._sizes)

    def mean(self, losses: Sequence[float]) -> float:
        """The mean over samples from the means of batches."""
        return math.fsum(x * n for x, n in zip(losses, self._sizes, strict=True)) / self.samples

    def loss_at(self, outputs: Sequence[Tensor]) -> float:
        """The mean loss if these were the model's outputs."""
        batches = zip(outputs, self._moved(), strict=True)
        return self.mean([total_loss(self._task, z, batch).item() for z, batch in batches])

    def measure(self, bits: dict[str, int], outputs: bool = True) -> _Measured:
        """Losses, and outputs where they are wanted and are one tensor, with the named layers rounded."""
        path = None
        if self._folder is not None:
            name = hashlib.sha256(json.dumps(sorted(bits.items())).encode()).hexdigest()[:16]
            path = self._folder / f"{name}-{'outputs' if outputs else 'loss'}.safetensors"
            if (found := _load(path, model_device(self._model))) is not None:
                return found
        values = {name: self._rounded.layers[name][b].values for name, b in bits.items()}
        with replaced_weights(self._model, values, self._rounded.points):
            measured = self._run()
        losses, found_outputs = measured[0], measured[1] if outputs else []
        if path is not None:
            tensors = {f"{i:06d}": z.contiguous() for i, z in enumerate(found_outputs)}
            with replace_file(path) as temporary:
                safetensors.torch.save_file(tensors, temporary, {"losses": json.dumps(losses)})
        return losses, found_outputs

    def _run(self) -> _Measured:
        losses: list[float] = []
        outputs: list[Tensor] = []
        for batch in self._moved():
            z = self._microbatches.outputs(self._model, batch)
            losses.append(checked_loss(self._task, z, batch).item())
            if isinstance(z, Tensor):
                outputs.append(z.detach())
        return losses, outputs

    def _moved(self) -> Iterator[Batch]:
        return iter(checked(self._batches, self._task, self._model))


def _load(path: Path, device: torch.device) -> _Measured | None:
    """The saved measurement, on a device; None where there is none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            losses = [float(x) for x in json.loads(file.metadata()["losses"])]
            return losses, [file.get_tensor(name).to(device) for name in sorted(file.keys())]
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _tables(
    curvature: Curvature,
    errors: dict[str, dict[int, float]],
    grid: WeightGrid,
    perturbation: Perturbation | None,
) -> dict[str, Sensitivity]:
    criteria: list[Criterion] = ["trace", "l2"]
    if curvature.top_eigenvalues is not None:
        criteria += ["eigenvalue", "eigenvalue_alone"]
    if perturbation is not None:
        criteria += EXPANSIONS
    return {
        criterion: combine(curvature, errors, {}, grid, criterion=criterion, perturbation=perturbation)
        for criterion in criteria
    }


def _random_plans(
    points: QuantizationPoints, groups: Sequence[tuple[int, ...]], count: int, seed: int
) -> list[tuple[tuple[int, ...], dict[str, int]]]:
    """`count` plans of each group with bits drawn at random, tied layers together, in the order of layers."""
    drawn = []
    for bits in groups:
        order = random.Random(f"{seed} {bits}")
        for _ in range(count):
            chosen = {name: b for unit in points.weight_units for b in [order.choice(bits)] for name in unit}
            drawn.append((bits, {layer.name: chosen[layer.name] for layer in points.layers}))
    return drawn


def _correlations(
    layers: Sequence[LayerCheck],
    plans: Sequence[PlanCheck],
    widths: Sequence[int],
    groups: Sequence[tuple[int, ...]],
) -> dict[str, dict[str, float]]:
    """Criterion → group → Spearman's correlation of its scores with the measured changes."""
    rows: dict[str, Sequence[LayerCheck] | Sequence[PlanCheck]] = {
        f"{b} bits": [row for row in layers if row.num_bits == b] for b in widths
    }
    rows["all bits"] = layers
    rows |= {plan_group(bits): [row for row in plans if row.offered == bits] for bits in groups}
    names = list(dict.fromkeys(name for own in rows.values() for name in (own[0].scores if own else ())))
    return {
        name: {
            group: spearman([row.scores[name] for row in own], [row.loss_change for row in own])
            for group, own in rows.items()
            if own and name in own[0].scores
        }
        for name in names
    }


def _trusted(correlations: dict[str, dict[str, float]], groups: Sequence[str], criteria: Sequence[str]) -> str:
    """The criterion of highest correlation over these groups, on average; the first of equal ones."""

    def worth(criterion: str) -> float:
        values = [correlations[criterion].get(group, math.nan) for group in groups]
        return -1.0 if any(map(math.isnan, values)) else math.fsum(values) / len(values)

    return max(criteria, key=worth)
