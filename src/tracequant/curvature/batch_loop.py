"""Going through the batches for an estimator: shared out to processes, saved when done, cut where memory is short.

An estimator measures one batch at a time, and summarizes all batches at the end. Everything that concerns the run as a
whole is here. Random vectors depend only on the seed and on the numbers of batch and draw. So a result is the same
however the work was divided, and an interrupted measurement continues to the same numbers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from tracequant.core import errors
from tracequant.core.curvature import Curvature
from tracequant.core.errors import DataError, ResourceError, RunError, TaskError, TracequantError
from tracequant.core.progress import track
from tracequant.curvature import microbatch
from tracequant.curvature.microbatch import Microbatch
from tracequant.curvature.output_hessian import check_curved
from tracequant.curvature.parts import Part, all_notes, idle_in_all
from tracequant.curvature.store import Store
from tracequant.model import distributed, memory
from tracequant.model.batches import Batch, Batches, reusable
from tracequant.model.device import Precision, check_parameters, measuring, model_device
from tracequant.model.digest import digest
from tracequant.model.hooks import idle_layers
from tracequant.model.task import Task, checked

# Share of the free main memory that a batch may be expected to take before it is cut.
MEMORY_SHARE = 0.7

Stop = Callable[[Curvature], bool]
Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)


class Estimator(Protocol[ResultOut]):
    """One way to measure every layer; a file in this package has one, and a function that hands it to `collect`."""

    label: str
    """What the progress bar says."""
    num_probes: int
    """Number of random vectors for each batch; 1 where they are not independent of one another."""
    memory: float
    """Peak memory as a multiple of what a forward pass keeps for its backward pass."""

    def settings(self) -> dict[str, Any]:
        """All that decides the values, for telling whether saved parts are its own."""

    def prepare(self) -> None:
        """Set `requires_grad` of the parameters; called once, in evaluation mode."""

    def measure(self, microbatch: Microbatch, probes: Sequence[int]) -> Part:
        """Values of the microbatch's samples for the given probes."""

    def add(self, parts: Sequence[Part]) -> Part:
        """The parts of a batch's microbatches as one."""

    def summarize(self, parts: Sequence[Part]) -> ResultOut:
        """The result, from the parts in the order of batches."""


def collect(
    estimator: Estimator[Result],
    model: nn.Module,
    batches: Batches,
    task: Task,
    *,
    checkpoint: str | Path | None = None,
    stop: Callable[[Result], bool] | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> Result:
    """The estimator's result over all batches, or over those up to the one after which `stop` is content.

    `checkpoint` is a folder in which every finished batch is saved, and from which a later call goes on. With several
    processes each measures a share of the batches, of the probes where there are fewer batches than processes, and all
    get the whole result; `stop` is then asked after every round of them. A batch that does not fit into memory is
    measured in microbatches. The model is left as it was.

    Raises `ModelError` naming layers that no batch reached.
    """
    check_parameters(model, "model.float(), and precision='bfloat16' if it must be fast")
    rank, processes = distributed.rank(), distributed.world_size()
    batches = reusable(batches)
    shares = _shares(estimator, batches, processes)
    store = Store(checkpoint, estimator.settings() | {"precision": precision})
    collector = _Collector(estimator, model, task, precision)
    done: dict[tuple[int, int], Part] = {}
    fresh: dict[tuple[int, int], Part] = {}
    digests: list[str] = []
    failure: Exception | None = None

    def exchange() -> None:
        """Hand out what is new and take what the others have; all fail where one has failed."""
        for found in _agree(distributed.gather((fresh, digests, _described(failure))), rank, failure):
            done.update(found)
        fresh.clear()

    def satisfied() -> bool:
        assert stop is not None
        parts = _merged(done)
        # Of a layer that no batch has reached yet nothing is known, however certain its zero looks.
        return not idle_in_all(parts) and stop(estimator.summarize(parts))

    with measuring(model, precision):
        try:
            estimator.prepare()
        except TracequantError as error:
            failure = error
        unit, content = 0, False
        for index, batch in enumerate(track(checked(batches, task, model), estimator.label, progress and rank == 0)):
            own = digest(batch)
            digests.append(own)
            if index == 0 and failure is None:
                store.open(model, task, batch)
            for share in range(shares):
                if failure is None and unit % processes == rank:
                    try:
                        key = (index, share)
                        part = store.load(key, shares, own)
                        if part is None:
                            part = collector.measure(batch, index, share, shares)
                            store.save(key, shares, own, part)
                        fresh[key] = part
                    except Exception as error:
                        # The others must hear of it, or they would wait for ever.
                        if processes == 1:
                            raise
                        failure = error
                unit += 1
                if stop is not None and unit % processes == 0:
                    exchange()
                    content = satisfied()
            if content or (failure is not None and (processes == 1 or stop is None)):
                break
        exchange()
    parts = _merged(done)
    check_curved([part.notes for part in parts])
    if idle := idle_in_all(parts):
        raise idle_layers(idle)
    return estimator.summarize(parts)


class _Collector:
    """Measures batches, in as many microbatches as memory asks for."""

    def __init__(self, estimator: Estimator[Any], model: nn.Module, task: Task, precision: Precision) -> None:
        self._estimator, self._model, self._task, self._precision = estimator, model, task, precision
        self._count: int | None = None

    def measure(self, batch: Batch, index: int, share: int, shares: int) -> Part:
        size = self._task.batch_size(batch)
        whole = Microbatch(batch, index, 0, size, size, self._precision)
        probes = range(share, self._estimator.num_probes, shares)
        if self._count is None:
            self._count = self._expected_count(whole)
        while True:
            count = min(self._count, size)
            try:
                return self._attempt(whole, count, probes)
            except Exception as error:
                if not memory.out_of_memory(error):
                    raise
                if count == size:
                    raise ResourceError(
                        f"memory does not suffice for one sample of batch {index} at a time ({error}); use smaller"
                        " inputs, another device or a machine with more memory"
                    ) from None
            # Here the failed attempt's tensors are gone, which the exception had kept.
            self._count = 2 * count
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(self, whole: Microbatch, count: int, probes: Sequence[int]) -> Part:
        if count == 1:
            return self._estimator.measure(whole, probes)
        try:
            divided = microbatch.divide(self._model, self._task, whole, count)
            parts = [self._estimator.measure(microbatch, probes) for microbatch in divided]
        except TaskError as error:
            raise ResourceError(f"a batch of {whole.size} samples does not fit into memory, and {error}") from error
        part = self._estimator.add(parts)
        note = f"batches cut to {-(-whole.size // count)} samples for lack of memory"
        return replace(part, notes=(*part.notes, note))

    def _expected_count(self, whole: Microbatch) -> int:
        """Pieces that the first batch should take in main memory; a GPU says by an error that it is full.

        The system may end a process that takes too much instead of refusing, so that this cannot be left to errors.
        """
        free = memory.available_bytes()
        if free is None or whole.size == 1 or model_device(self._model).type != "cpu":
            return 1
        few = min(2, whole.size)
        try:
            part = self._task.select(whole.batch, 0, few)
            kept = memory.saved_bytes(lambda: self._task.outputs(self._model, part))
        except Exception:  # a batch or a model that knows one size only; it will be tried whole
            return 1
        needed = kept / few * whole.size * self._estimator.memory
        return min(whole.size, max(1, -int(-needed // (MEMORY_SHARE * free))))


def _shares(estimator: Estimator[Any], batches: Batches, processes: int) -> int:
    """Into how many parts the probes of a batch are divided: 1 where there are batches for all processes."""
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        return 1
    return max(1, min(estimator.num_probes, processes // max(1, count)))


def _merged(done: dict[tuple[int, int], Part]) -> list[Part]:
    """A part for each batch, in order, with all its probes."""
    by_batch: dict[int, list[Part]] = {}
    for index, share in sorted(done):
        by_batch.setdefault(index, []).append(done[index, share])
    merged = []
    for own in by_batch.values():
        values = {name: torch.cat([part.values[name] for part in own]) for name in own[0].values}
        merged.append(replace(own[0], values=values, notes=all_notes(own), idle=idle_in_all(own)))
    return merged


def _described(failure: Exception | None) -> tuple[str, str] | None:
    """An exception as class name and text, to be sent to the other processes."""
    return None if failure is None else (type(failure).__name__, str(failure))


def _agree(
    gathered: Iterator[Any] | list[Any], rank: int, failure: Exception | None
) -> Iterator[dict[tuple[int, int], Part]]:
    """The parts of all processes; an error if any has failed, or if they have read different data."""
    everyone = list(gathered)
    if failure is not None:
        raise failure
    for other, (_, _, described) in enumerate(everyone):
        if described is not None:
            name, text = described
            kind = getattr(errors, name, None)
            if isinstance(kind, type) and issubclass(kind, TracequantError):
                raise kind(text)
            raise RunError(
                f"process {other} failed ({name}: {text}); finished batches are kept where a checkpoint was asked for:"
                " run the same command again"
            )
    own = everyone[rank][1]
    for other, (_, digests, _) in enumerate(everyone):
        if digests != own:
            raise DataError(
                f"processes {rank} and {other} have read different batches: the loader shuffles; use shuffle=False, or"
                " a generator with a fixed seed"
            )
    for parts, _, _ in everyone:
        yield parts
