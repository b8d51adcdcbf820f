"""What stands for a trace that noise, and not the data, has decided. Plain data, no torch.

A plan of least expected Ω weighs every layer by the expectation of its average trace t. A trace that is known well is
that expectation. One that is not significantly above zero says little by itself, and zero or less would give its layer
the fewest bits for no reason; the other layers say more. Average traces of a network's layers range over powers of ten,
so log t is taken as normal over the layers of a kind, with the mean and the variance of those that are known well
(empirical Bayes), and the expectation of t given the measured value and its error stands for the measured value.

Gauss-Newton values of a convex loss are never negative, and the few samples that dominate one layer's trace dominate
the others' too. The error that counts for them is that of the layer's trace relative to the other layers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracequant.core.curvature import Curvature, TraceEstimate

# A trace of no more than this many errors is not significantly positive.
ERRORS = 2.0
# So many layers of a kind, known well, say what is usual for the kind; below that all kinds do together.
FEWEST_OF_A_KIND = 3
# The standard deviation of log t: where too few layers are known well to tell it, and the least that is assumed.
USUAL_SPREAD, LEAST_SPREAD = 1.5, 0.5
GRID = 4001


@dataclass(frozen=True)
class Replacement:
    """An average trace `measured` that was not significantly positive, and the expectation `used` in its place.

    `error` is the standard deviation of what the average trace may be, given all that was measured.
    """

    measured: float
    used: float
    error: float


@dataclass(frozen=True)
class _Measured:
    """A value and its error; a `positive` value is a mean of values none of which is negative."""

    value: float
    error: float
    positive: bool
    kind: str
    samples: int

    @property
    def significant(self) -> bool:
        """Whether the value is above zero for certain enough; errors that are not known do not count."""
        return self.value > 0 and not (math.isfinite(self.error) and self.value <= ERRORS * self.error)


def replacements(curvature: Curvature) -> tuple[dict[str, Replacement], dict[str, Replacement]]:
    """What stands for the average traces of weights, and of activations, that are not significantly positive.

    Empty where all are. Where nothing at all was measured above zero and no error is known, nothing is replaced.
    """
    kinds = {layer.name: layer.kind for layer in curvature.points.layers}
    gauss_newton = curvature.estimator == "gauss_newton"
    return (
        _replaced(_measured(curvature.weights, curvature.weight_values if gauss_newton else None, kinds)),
        _replaced(_measured(curvature.activations, curvature.activation_values if gauss_newton else None, {})),
    )


def replaced_values(values: Mapping[str, float], kinds: Mapping[str, str], samples: int) -> dict[str, Replacement]:
    """The same for values without errors, such as eigenvalues: those of zero or less are replaced."""
    return _replaced({n: _Measured(v, math.inf, False, kinds.get(n, ""), samples) for n, v in values.items()})


def trace_covariance(curvature: Curvature, replaced: Mapping[str, Replacement]) -> tuple[tuple[float, ...], ...]:
    """Covariances of the layers' average traces, in the order of the points, each row up to the diagonal.

    From the values by sample (Hutchinson: by batch), probe error included. Where there is one value only, layers are
    taken as independent with their standard errors. Empty if an error is not known.
    """
    names = [layer.name for layer in curvature.points.layers]
    estimates = [curvature.weights[name] for name in names]
    values = curvature.weight_values
    if values is not None and all(len(values.get(name, ())) > 1 for name in names):
        table = np.array([np.array(values[n]) / e.numel for n, e in zip(names, estimates, strict=True)])
        table -= table.mean(axis=1, keepdims=True)
        count = table.shape[1]
        matrix = table @ table.T / (count * (count - 1))
    else:
        matrix = np.diag([(_error(e) / e.numel) ** 2 for e in estimates])
    for i, name in enumerate(names):
        if name in replaced:
            matrix[i, :] = matrix[:, i] = 0.0
            matrix[i, i] = replaced[name].error ** 2
    if not np.isfinite(matrix).all():
        return ()
    return tuple(tuple(row[: i + 1].tolist()) for i, row in enumerate(matrix))


def _error(estimate: TraceEstimate) -> float:
    """The larger of the errors that are known; infinite if none is."""
    return max((e for e in (estimate.standard_error, estimate.sampling_error) if math.isfinite(e)), default=math.inf)


def _measured(
    estimates: Mapping[str, TraceEstimate],
    values: Mapping[str, tuple[float, ...]] | None,
    kinds: Mapping[str, str],
) -> dict[str, _Measured]:
    relative = _relative_errors(values or {})
    found = {}
    for name, estimate in estimates.items():
        average = estimate.average_trace
        positive = name in relative
        error = relative[name] * average if positive else _error(estimate) / estimate.numel
        found[name] = _Measured(average, error, positive, kinds.get(name, ""), estimate.samples)
    return found


def _relative_errors(values: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Relative error of each layer's mean against what all layers have in common; for layers without negative values.

    u_n = value / mean by sample; the median of u_n over the layers is what they have in common.
    """
    tables = {name: np.array(row) for name, row in values.items() if len(row) and min(row) >= 0 and max(row) > 0}
    if not tables:
        return {}
    shares = np.array([table / table.mean() for table in tables.values()])
    count = shares.shape[1]
    if count < 2:
        return dict.fromkeys(tables, 0.0)
    apart = shares - np.median(shares, axis=0)
    errors = np.sqrt(((apart - apart.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) / (count * (count - 1)))
    return dict(zip(tables, errors.tolist(), strict=True))


def _replaced(measured: Mapping[str, _Measured]) -> dict[str, Replacement]:
    doubtful = {name: m for name, m in measured.items() if not m.significant}
    known = [m for m in measured.values() if m.significant] or [m for m in doubtful.values() if m.positive]
    found = {}
    for name, m in doubtful.items():
        if known:
            of_kind = [k for k in known if k.kind == m.kind]
            found[name] = _expected(m, _usual(of_kind if len(of_kind) >= FEWEST_OF_A_KIND else known))
        elif used := _pooled(measured):
            # Nothing tells the layers apart: one value for all leaves the decision to ‖ΔW‖².
            found[name] = Replacement(m.value, used, used)
    return found


def _usual(known: list[_Measured]) -> tuple[float, float]:
    """Mean and standard deviation of log t over layers; the spread that errors explain is taken off."""
    logs = [math.log(m.value) for m in known]
    mean = math.fsum(logs) / len(logs)
    if len(known) < FEWEST_OF_A_KIND:
        return mean, USUAL_SPREAD
    variance = math.fsum((log - mean) ** 2 for log in logs) / (len(logs) - 1)
    noise = math.fsum((m.error / m.value) ** 2 for m in known if math.isfinite(m.error)) / len(known)
    return mean, max(math.sqrt(max(variance - noise, 0.0)), LEAST_SPREAD)


def _pooled(measured: Mapping[str, _Measured]) -> float:
    """The size that the values and their errors allow, on average over layers."""
    sizes = [max(abs(m.value), m.error if math.isfinite(m.error) else 0.0) for m in measured.values()]
    return math.fsum(sizes) / len(sizes)


def _expected(m: _Measured, usual: tuple[float, float]) -> Replacement:
    """The expectation of t given the measured value, and its standard deviation; `usual` are those of log t before."""
    mean, spread = usual
    if m.positive:
        # The error of a mean of positive values is a factor: log t is normal before and after.
        noise = math.log1p((m.error / m.value) ** 2)
        center = (spread**2 * math.log(m.value) + noise * mean) / (spread**2 + noise)
        left = spread**2 * noise / (spread**2 + noise)
        used = math.exp(center + left / 2)
        return Replacement(m.value, used, used * math.sqrt(math.expm1(left)))
    # A negative value tells by its size how far noise, or curvature that is negative, takes values from the truth.
    error = max(m.error if math.isfinite(m.error) else 0.0, -m.value)
    if error == 0:
        # Every sample's value is zero. By the rule of succession one of samples + 2 would be as usual.
        used = math.exp(mean + spread**2 / 2) / (m.samples + 2)
        return Replacement(m.value, used, used)
    low, high = min(mean - 6 * spread, math.log(error) - 6), mean + 6 * spread
    logs = np.linspace(low, high, GRID)
    t: NDArray[np.float64] = np.exp(logs)
    exponent = -0.5 * ((logs - mean) / spread) ** 2 - 0.5 * ((m.value - t) / error) ** 2
    weights = np.exp(exponent - exponent.max())
    weights /= weights.sum()
    used = float(weights @ t)
    return Replacement(m.value, used, math.sqrt(float(weights @ (t - used) ** 2)))
