"""The self-check: round single layers and whole plans, measure the loss, and see which criterion ranks best."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tracequant.allocation.near_frontier import DrawnPlan, plans_near_frontiers
from tracequant.core.curvature import Curvature, Perturbation
from tracequant.core.errors import ModelError
from tracequant.core.evaluations import Check, LayerCheck, PlanCheck, plan_group, spearman
from tracequant.core.files import replace_file
from tracequant.core.progress import track
from tracequant.core.sensitivity import Sensitivity, combine
from tracequant.core.settings import EXPANSIONS, Criterion, SensitivitySettings
from tracequant.core.weight_grid import WeightGrid
from tracequant.measure.held_out import held_out_samples
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
    held_out: Batches,
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
    """Rank correlations of every criterion with the measured change of the loss on `held_out`, labelled samples.

    `batches` are the calibration data that `curvature`, `perturbation` and `rounded` come from. Weights are rounded on
    them where `rounded` is not given, and no loss is measured on them: on the samples that a criterion was measured
    on, or that weights were compensated for, it looks better than it is. Samples of `held_out` that `batches` hold too
    are left out with a warning.

    Every layer of `curvature` is rounded alone at each of `weight_bits`, and up to `plans` whole plans with bits from
    each of `offered` (all of `weight_bits` if None), ties kept; activations stay in float. That is a pass over
    `held_out` for each. Plans are drawn near the exact frontiers of all criteria (`plans_near_frontiers`), and ranked
    among those of one size. Criteria: "trace", "l2", the eigenvalues' where `curvature` has them, and the expansions
    where `perturbation`, measured at the same bits, is given. `extra_scores` ranks the plans by other forms too: each
    maps a plan's bits by layer to a number. No plan can be solved for these, so none of them is `trusted`.

    `cache` is a folder in which every measurement is saved, so that an interrupted check resumes where it stopped, and
    a check with more plans measures only what is new. The model is left as it was.

    Raises `ModelError` for bits that are not among those measured, and `DataError` for batches that cannot be used and
    where `batches` hold all samples of `held_out`.
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
    held_out = held_out_samples(held_out, batches, task)
    tables = _tables(curvature, rounded.errors, grid, perturbation)
    drawn = [plan for bits in groups for plan in plans_near_frontiers(tables, bits, plans, seed)]
    with measuring(model), torch.no_grad():
        bench = _Bench(model, held_out, task, rounded, cache)
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
        plan_checks = []
        for plan in track(drawn, "Whole plans", progress):
            losses, _ = bench.measure(plan.weight_bits, outputs=False)
            scores = {
                name: math.fsum(table.weight_omega[layer][b] for layer, b in plan.weight_bits.items())
                for name, table in tables.items()
            }
            scores |= {name: score(plan.weight_bits) for name, score in (extra_scores or {}).items()}
            choices = list(plan.weight_bits.items())
            scores["measured"] = math.fsum(alone[option] for option in choices)
            if keep:
                added = [sum(parts) for parts in zip(*(moved[option] for option in choices), strict=True)]
                scores["response"] = bench.loss_at([z + dz for z, dz in zip(plain[1], added, strict=True)]) - float_loss
            plan_checks.append(_plan_check(plan, bench.mean(losses) - float_loss, scores))
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
        trusted=_trusted(correlations, [plan_group(bits) for bits in groups], list(tables)),
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
        # Other calibration data round other weights.
        for name, widths in rounded.layers.items():
            for num_bits, weight in widths.items():
                seen.update(f"{name} {num_bits} {digest((weight.codes, weight.grid.scale))}".encode())
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


def _plan_check(plan: DrawnPlan, loss_change: float, scores: dict[str, float]) -> PlanCheck:
    return PlanCheck(
        plan.offered,
        plan.weight_bits,
        loss_change,
        scores,
        average_bits=plan.average_bits,
        criteria=plan.criteria,
        moved=plan.moved,
    )


def _correlations(
    layers: Sequence[LayerCheck],
    plans: Sequence[PlanCheck],
    widths: Sequence[int],
    groups: Sequence[tuple[int, ...]],
) -> dict[str, dict[str, float]]:
    """Criterion → group → Spearman's correlation of its scores with the measured changes.

    For a group of plans it is the mean over sizes of the correlation among the plans drawn at that size: that smaller
    plans lose more is known to every criterion.
    """
    rows: dict[str, list[Sequence[LayerCheck] | Sequence[PlanCheck]]] = {
        f"{b} bits": [[row for row in layers if row.num_bits == b]] for b in widths
    }
    rows["all bits"] = [layers]
    for bits in groups:
        of_group = [row for row in plans if row.offered == bits]
        sizes = sorted({row.average_bits for row in of_group})
        rows[plan_group(bits)] = [[row for row in of_group if row.average_bits == size] for size in sizes]
    result: dict[str, dict[str, float]] = {}
    for group, ranked in rows.items():
        for name in ranked[0][0].scores if ranked and ranked[0] else ():
            values = [spearman([row.scores[name] for row in r], [row.loss_change for row in r]) for r in ranked]
            values = [value for value in values if not math.isnan(value)]
            result.setdefault(name, {})[group] = math.fsum(values) / len(values) if values else math.nan
    return result


def _trusted(correlations: dict[str, dict[str, float]], groups: Sequence[str], criteria: Sequence[str]) -> str:
    """The criterion of highest correlation over these groups, on average; the first of equal ones.

    Where no group has anything to rank, over single layers.
    """
    if all(math.isnan(correlations[name].get(group, math.nan)) for name in criteria for group in groups):
        groups = ["all bits"]

    def worth(criterion: str) -> float:
        values = [correlations[criterion].get(group, math.nan) for group in groups]
        return -1.0 if any(map(math.isnan, values)) else math.fsum(values) / len(values)

    return max(criteria, key=worth)
