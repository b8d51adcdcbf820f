"""A rounded weight, and a folder of them: every layer is saved as soon as it is rounded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tracequant.core.files import replace_file
from tracequant.core.points import QuantizationPoints
from tracequant.core.weight_grid import WeightGrid
from tracequant.model.batches import Batches
from tracequant.model.digest import digest
from tracequant.quantization.grid import Grid

# Raised when the arithmetic of compensation changes, so that results of an older one are not taken.
ARITHMETIC = 1


@dataclass(frozen=True)
class RoundedWeight:
    """A weight's codes, uint8 of its shape, and the grid that they belong to.

    `squared_error` is ‖Ŵ − W‖². `output_error` is the same with every element weighted by what it is multiplied with:
    the mean squared change of the layer's outputs over the mean square of its inputs. The two are equal for inputs that
    are uncorrelated and of one size, and where the inputs are not known.
    """

    codes: Tensor
    grid: Grid
    squared_error: float
    output_error: float

    @property
    def values(self) -> Tensor:
        """The weight that the codes stand for."""
        return self.grid.dequantize(self.codes.to(self.grid.scale.dtype))


class Store:
    """The rounded weights of one model, grid and calibration data in a folder; without one, nothing is kept."""

    def __init__(
        self, folder: str | Path | None, points: QuantizationPoints, settings: WeightGrid, batches: Batches
    ) -> None:
        self._folder: Path | None = None
        if folder is not None:
            seen = hashlib.sha256(f"{ARITHMETIC} {points.fingerprint} {settings}".encode())
            for batch in batches:
                seen.update(digest(batch).encode())
            self._folder = Path(folder) / seen.hexdigest()[:16]

    def load(self, layer: str, device: torch.device) -> dict[int, RoundedWeight]:
        """Bits → rounded weight of a layer; empty where there is none, or the file is damaged."""
        if self._folder is None:
            return {}
        try:
            with safetensors.safe_open(self._path(layer), "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if metadata["digest"] != digest((metadata["errors"], tensors)):
                return {}
            return {
                int(b): RoundedWeight(
                    tensors[f"{b}.codes"].to(device),
                    Grid(tensors[f"{b}.scale"].to(device), tensors[f"{b}.zero_point"].to(device), int(b)),
                    *map(float, values),
                )
                for b, values in json.loads(metadata["errors"]).items()
            }
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
            return {}

    def save(self, layer: str, widths: Mapping[int, RoundedWeight]) -> None:
        """Write all widths of a layer, whole or not at all."""
        if self._folder is None:
            return
        tensors = {}
        for num_bits, weight in widths.items():
            tensors[f"{num_bits}.codes"] = weight.codes.contiguous()
            tensors[f"{num_bits}.scale"] = weight.grid.scale.contiguous()
            tensors[f"{num_bits}.zero_point"] = weight.grid.zero_point.contiguous()
        errors = json.dumps({b: [weight.squared_error, weight.output_error] for b, weight in widths.items()})
        # safetensors has no checksum of its own.
        metadata = {"errors": errors, "digest": digest((errors, dict(sorted(tensors.items()))))}
        with replace_file(self._path(layer)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata)

    def _path(self, layer: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(layer.encode()).hexdigest()[:16]}.safetensors"
