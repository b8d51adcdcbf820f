"""Going through the batches for an estimator: shared out to processes, saved when done, cut where memory is short.

An estimator measures one batch at a time and says at the end what all of it means; whatever concerns the run as a whole
is here. Random vectors depend on the seed and the number of batch and draw alone, so that a result is the same however
the work was divided, and one that was interrupted goes on to the same numbers.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tracequant import distributed, errors, memory
from tracequant.artifact import replace_file
from tracequant.batches import Batch, Batches, reusable
from tracequant.curvature import microbatch
from tracequant.curvature.microbatch import Microbatch as Piece
from tracequant.curvature.result import Curvature
from tracequant.device import Precision, measuring, model_device
from tracequant.errors import DataError, ModelError, ResourceError, RunError, TaskError, TracequantError
from tracequant.progress import track
from tracequant.task import Task, checked, forward

# Share of the free main memory that a batch may be expected to take before it is cut.
MEMORY_SHARE = 0.7

Stop = Callable[[Curvature], bool]
Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)


@dataclass(frozen=True)
class Part:
    """What was measured on one batch, or with some of the draws on it.

    `values` are float64 `[draws, columns]` by "weights:LAYER" or "activations:POINT", with a column for each sample, or
    one for the batch. `elements` counts the elements of each activation over the samples. `notes` are remarks for the
    result's `reason`.
    """

    samples: int
    values: dict[str, Tensor]
    elements: dict[str, int]
    notes: tuple[str, ...] = ()


def together(parts: Sequence[Part], values: dict[str, Tensor]) -> Part:
    """Parts of different samples as one, with these `values`."""
    elements = {name: sum(part.elements[name] for part in parts) for name in parts[0].elements}
    return Part(sum(part.samples for part in parts), values, elements, all_notes(parts))


def all_notes(parts: Sequence[Part]) -> tuple[str, ...]:
    """The parts' notes, each once."""
    return tuple(dict.fromkeys(note for part in parts for note in part.notes))


class Estimator(Protocol[ResultOut]):
    """One way to measure every layer; a file in this package has one, and a function that hands it to `collect`."""

    label: str
    """What the progress bar says."""
    draws: int
    """Number of random vectors for each batch; 1 where they are not independent of one another."""
    memory: float
    """Peak memory as a multiple of what a forward pass keeps for its backward pass."""

    def settings(self) -> dict[str, Any]:
        """All that decides the values, for telling whether saved parts are its own."""

    def prepare(self) -> None:
        """Set `requires_grad` of the parameters; called once, in evaluation mode."""

    def measure(self, piece: Piece, draws: Sequence[int]) -> Part:
        """Values of the piece's samples for the given draws."""

    def add(self, parts: Sequence[Part]) -> Part:
        """The parts of a batch's pieces as one."""

    def summarize(self, parts: Sequence[Part]) -> ResultOut:
        """The result, from the parts in the order of batches."""


def collect(
    estimator: Estimator[Result],
    model: nn.Module,
    batches: Batches,
    task: Task,
    checkpoint: str | Path | None = None,
    stop: Callable[[Result], bool] | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> Result:
    """The estimator's result over all batches, or over those up to the one after which `stop` is content.

    `checkpoint` is a folder in which every finished batch is saved, and from which a later call goes on. With several
    processes each measures a share of the batches, of the draws where there are fewer batches than processes, and all
    get the whole result; `stop` is then asked after every round of them. A batch that does not fit into memory is
    measured in pieces. The model is left as it was.
    """
    reduced = {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if reduced:
        raise ModelError(
            f"the model has {', '.join(sorted(str(d) for d in reduced))} parameters, too coarse for curvature; use"
            " model.float(), and precision='bfloat16' if it must be fast"
        )
    rank, processes = distributed.rank(), distributed.world_size()
    batches = reusable(batches)
    shares = _shares(estimator, batches, processes)
    store = _Store(checkpoint, estimator.settings() | {"precision": precision})
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

    def summary() -> Result:
        return estimator.summarize(_merged(done))

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
                    content = stop(summary())
            if content or (failure is not None and (processes == 1 or stop is None)):
                break
        exchange()
    return summary()


def generator(seed: int, *key: int, device: torch.device) -> torch.Generator:
    """Random numbers of their own for a batch, a draw, ...: independent of what was drawn before."""
    state = np.random.SeedSequence((seed % 2**64, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) % 2**63)


class _Collector:
    """Measures batches, in as many pieces as memory asks for."""

    def __init__(self, estimator: Estimator[Any], model: nn.Module, task: Task, precision: Precision) -> None:
        self._estimator, self._model, self._task, self._precision = estimator, model, task, precision
        self._count: int | None = None

    def measure(self, batch: Batch, index: int, share: int, shares: int) -> Part:
        size = self._task.batch_size(batch)
        whole = Piece(batch, index, 0, size, size, self._precision)
        draws = range(share, self._estimator.draws, shares)
        if self._count is None:
            self._count = self._expected_count(whole)
        while True:
            count = min(self._count, size)
            try:
                return self._attempt(whole, count, draws)
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

    def _attempt(self, whole: Piece, count: int, draws: Sequence[int]) -> Part:
        if count == 1:
            return self._estimator.measure(whole, draws)
        try:
            divided = microbatch.divide(self._model, self._task, whole, count)
            parts = [self._estimator.measure(piece, draws) for piece in divided]
        except TaskError as error:
            raise ResourceError(f"a batch of {whole.size} samples does not fit into memory, and {error}") from error
        part = self._estimator.add(parts)
        note = f"batches cut to {-(-whole.size // count)} samples for lack of memory"
        return replace(part, notes=(*part.notes, note))

    def _expected_count(self, whole: Piece) -> int:
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


class _Store:
    """Finished parts in a folder, one file each, under a name that tells their settings."""

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self._parent = None if folder is None else Path(folder)
        self._settings = settings
        self._folder: Path | None = None

    def open(self, model: nn.Module, task: Task, batch: Batch) -> None:
        """Find the folder for these settings. The loss cannot be compared, but its value on a few samples can."""
        if self._parent is None:
            return
        with torch.no_grad():
            try:
                _, loss = forward(task, model, task.select(batch, 0, min(4, task.batch_size(batch))))
            except Exception:  # a batch or a model that knows one size only
                _, loss = forward(task, model, batch)
        text = json.dumps(self._settings | {"loss": f"{loss.item():.5g}"}, sort_keys=True)
        self._folder = self._parent / hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self, key: tuple[int, int], shares: int, digest: str) -> Part | None:
        """The saved part, None if there is none; `DataError` if it is of other data."""
        path = self._path(key, shares)
        if path is None or not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                head = json.loads(file.metadata()["part"])
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None  # damaged: measured anew
        if head.pop("digest") != digest:
            raise DataError(
                f"batch {key[0]} is not the one that {path.parent} was made with: the loader shuffles, or the data have"
                " changed; use shuffle=False, or delete that folder"
            )
        return Part(values=values, **head | {"notes": tuple(head["notes"])})

    def save(self, key: tuple[int, int], shares: int, digest: str, part: Part) -> None:
        """Write the part, whole or not at all."""
        path = self._path(key, shares)
        if path is None:
            return
        head = {"samples": part.samples, "elements": part.elements, "notes": part.notes, "digest": digest}
        values = {name: tensor.contiguous() for name, tensor in part.values.items()}
        with replace_file(path) as temporary:
            save_file(values, temporary, {"part": json.dumps(head)})

    def _path(self, key: tuple[int, int], shares: int) -> Path | None:
        return self._folder and self._folder / f"batch-{key[0]:06d}-{key[1]}-of-{shares}.safetensors"


def _shares(estimator: Estimator[Any], batches: Batches, processes: int) -> int:
    """Into how many parts the draws of a batch are divided: 1 where there are batches for all processes."""
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        return 1
    return max(1, min(estimator.draws, processes // max(1, count)))


def _merged(done: dict[tuple[int, int], Part]) -> list[Part]:
    """A part for each batch, in order, with all its draws."""
    by_batch: dict[int, list[Part]] = {}
    for index, share in sorted(done):
        by_batch.setdefault(index, []).append(done[index, share])
    merged = []
    for own in by_batch.values():
        values = {name: torch.cat([part.values[name] for part in own]) for name in own[0].values}
        merged.append(replace(own[0], values=values, notes=all_notes(own)))
    return merged


# Bytes of a number → integers of as many.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(batch: Batch) -> str:
    """A hash of a batch's sums and of some of its values, which tells batches apart."""
    found = hashlib.sha256()
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().flatten()
            # At random places: a fixed stride might see nothing but the margin of every picture.
            places = np.random.default_rng(0).integers(0, max(1, flat.numel()), min(flat.numel(), 2048))
            some = flat[torch.from_numpy(places).to(flat.device)]
            # A sum of integers has no order: of floats it would depend on the number of threads.
            total = (flat.view(_BITS[leaf.itemsize]) if leaf.is_floating_point() else flat).to(torch.int64).sum()
            found.update(f"{tuple(leaf.shape)}{leaf.dtype}{total.item()}".encode())
            found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, (str, bytes, int, float)):
            found.update(repr(leaf).encode())
    return found.hexdigest()[:16]


def _leaves(value: Any) -> Iterator[Any]:
    """Everything in a batch that is not a collection, whatever the collection's class."""
    if isinstance(value, Mapping):
        for key in value:
            yield str(key)
            yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield torch.from_numpy(np.ascontiguousarray(value))
    else:
        yield value


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


def exceeded(
    curvature: Curvature, error: Literal["standard_error", "sampling_error"], target: float
) -> dict[str, float]:
    """Layers and activations whose error is more than `target` times their trace, with the relative error."""
    return {
        name: getattr(estimate, error) / abs(estimate.trace) if estimate.trace else math.inf
        for estimates in (curvature.weights, curvature.activations)
        for name, estimate in estimates.items()
        if getattr(estimate, error) > target * abs(estimate.trace)
    }


def warn_of_error(
    curvature: Curvature, error: Literal["standard_error", "sampling_error"], target: float, advice: str
) -> None:
    """Warn if some trace is less certain than was asked for."""
    large = exceeded(curvature, error, target)
    if large:
        name = max(large, key=lambda layer: large[layer])
        warnings.warn(
            f"the relative error of {len(large)} traces is above the {target:.2g} asked for; the largest is"
            f" {large[name]:.2g}, of {name}; {advice}",
            stacklevel=3,
        )
