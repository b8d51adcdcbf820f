"""The integer programme of a problem in matrices, and HiGHS, which solves it."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray

from tracequant.allocation.problem import Amounts, Problem

_STRAY = b"HighsMipSolverData::transformNewIntegerFeasibleSolution"
_stdout_lock = threading.Lock()


class Programme:
    """The integer programme of a problem in matrices: one variable per option, one per pair of options."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        sizes = [len(decision.bits) for decision in problem.decisions]
        sizes += [sizes[d] * sizes[e] for d, e in problem.pairs]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.variables = int(self.starts[-1])
        self.options = int(self.starts[len(problem.decisions)])
        self.groups = len(sizes)
        self.group = np.repeat(np.arange(self.groups), sizes)
        self.objective = self._vector(problem.objective).astype(float)
        self.links = self._links()
        self.limits, self.bounds, self.units = self._limit_rows()
        self.chain = self._chain_rows()
        self.one_of_each = scipy.sparse.csr_array(
            (np.ones(self.options), (self.group[: self.options], np.arange(self.options))),
            shape=(len(problem.decisions), self.variables),
        )

    def _vector(self, amounts: Amounts) -> NDArray[np.float64]:
        return np.concatenate([*amounts.single, *(table.ravel() for table in amounts.pairs)])

    def _limit_rows(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """A row and a bound for every limit, measured from the least of each group, and the unit that they are in.

        Whole numbers are divided by what they have in common, and the bound lies half a unit above what is allowed:
        neither rounding nor the solver's tolerance can then cut off a choice that is allowed.
        """
        rows, bounds, units = [], [], []
        for limit in self.problem.limits:
            amounts = self._vector(limit.amounts)
            least = np.minimum.reduceat(amounts, self.starts[:-1])
            row, left = amounts - least[self.group], limit.bound - least.sum().item()
            if np.issubdtype(amounts.dtype, np.integer):
                unit = float(np.gcd.reduce(row)) or 1.0
                bound = math.floor(left / unit) + 0.5
            else:
                unit = float(row.max()) or 1.0
                bound = left / unit + 1e-9 * max(abs(limit.bound) / unit, 1.0)
            rows.append(row / unit)
            bounds.append(bound)
            units.append(unit)
        return np.array(rows, dtype=float).reshape(len(rows), self.variables), np.array(bounds), np.array(units)

    def _chain_rows(self) -> scipy.sparse.csr_array:
        """At most zero where of two consecutive decisions the later has some width or more only if the earlier has."""
        decisions = self.problem.decisions
        entries: list[tuple[int, int, float]] = []
        count = 0
        for d, e in itertools.pairwise(self.problem.chain):
            for width in decisions[e].bits:
                for member, sign in ((d, -1.0), (e, 1.0)):
                    entries += [
                        (count, int(self.starts[member]) + j, sign)
                        for j, bits in enumerate(decisions[member].bits)
                        if bits >= width
                    ]
                count += 1
        return _sparse(entries, (count, self.variables))

    def _links(self) -> scipy.sparse.csr_array:
        """Zero where the variables of every pair sum to those of its two decisions."""
        entries: list[tuple[int, int, float]] = []
        count = 0
        for i, (d, e) in enumerate(self.problem.pairs):
            start = int(self.starts[len(self.problem.decisions) + i])
            shape = (len(self.problem.decisions[d].bits), len(self.problem.decisions[e].bits))
            table = (start + np.arange(math.prod(shape))).reshape(shape)
            for member, lines in ((d, table), (e, table.T)):
                for j, line in enumerate(lines):
                    entries += [(count, column, 1.0) for column in line.tolist()]
                    entries.append((count, int(self.starts[member]) + j, -1.0))
                    count += 1
        return _sparse(entries, (count, self.variables))

    def relax(self) -> tuple[float, NDArray[np.float64], tuple[float, ...]] | None:
        """A lower bound on every choice, each variable's penalty above it, and the limits' prices; None if infeasible.

        Whatever multipliers HiGHS returns, the bound worked out from them is valid, its tolerances notwithstanding.
        """
        equalities = scipy.sparse.vstack([self.one_of_each, self.links], format="csr")
        sides = np.concatenate([np.ones(self.one_of_each.shape[0]), np.zeros(self.links.shape[0])])
        # Rows of about the same size suit the solver.
        sizes = _largest(self.limits)
        rows = scipy.sparse.vstack([scipy.sparse.csr_array(self.limits / sizes[:, None]), self.chain], format="csr")
        bounds = np.concatenate([self.bounds / sizes, np.zeros(self.chain.shape[0])])
        least = np.minimum.reduceat(self.objective, self.starts[:-1])
        above = self.objective - least[self.group]
        scale = float(above.max()) or 1.0
        # Ω ranges over many orders of magnitude, HiGHS's tolerances do not: scale by what the solution amounts to.
        for _ in range(5):
            result = scipy.optimize.linprog(
                np.minimum(above / scale, 1e6),
                A_ub=rows,
                b_ub=bounds,
                A_eq=equalities,
                b_eq=sides,
                bounds=(0, 1),
                method="highs",
            )
            if result.status == 2:
                return None
            if result.status != 0 or result.fun > 1e-2 or result.fun <= 0:
                break
            scale *= max(float(result.fun), 1e-12)
        solved = result.status == 0  # should HiGHS give up, a weak bound is left
        multipliers = np.maximum(-result.ineqlin.marginals, 0.0) * scale if solved else np.zeros(len(bounds))
        reduced = self.objective + rows.T @ multipliers
        if solved:
            reduced -= self.links.T @ (result.eqlin.marginals[self.one_of_each.shape[0] :] * scale)
        least = np.minimum.reduceat(reduced, self.starts[:-1])
        bound = math.fsum(least) - math.fsum(multipliers * bounds)
        prices = multipliers[: len(sizes)] / sizes / self.units
        return bound, reduced - least[self.group], tuple(prices.tolist())

    def solve_core(
        self, core: NDArray[np.bool_], reach: float, deadline: float
    ) -> tuple[tuple[int, ...] | None, float, bool]:
        """The best choice among the variables in `core`, a bound on those, and whether HiGHS came to an end."""
        columns = np.flatnonzero(core)
        kept_groups = np.unique(self.group[columns])
        if len(kept_groups) < self.groups:
            return None, math.inf, True
        group = self.group[columns]
        starts = np.searchsorted(group, np.arange(self.groups))
        cost = self.objective[columns]
        least = np.minimum.reduceat(cost, starts)
        cost = cost - least[group]
        scale = max(reach * 1e-4, float(cost.max()) * 1e-9) or 1.0
        # Measured from the least in the core, and in proportion to 1, rounding to whole numbers changes no row by more
        # than HiGHS tolerates.
        rows = self.limits[:, columns]
        taken = np.minimum.reduceat(rows, starts, axis=1)
        rows = rows - taken[:, group]
        widest = _largest(rows)
        bounds = (self.bounds[: len(rows)] - taken.sum(axis=1)) / widest
        constraints = [
            scipy.optimize.LinearConstraint(self.one_of_each[:, columns], 1, 1),
            scipy.optimize.LinearConstraint(self.links[:, columns], 0, 0),
            scipy.optimize.LinearConstraint(rows / widest[:, None], -np.inf, bounds),
            scipy.optimize.LinearConstraint(self.chain[:, columns], -np.inf, 0),
        ]
        constraints = [constraint for constraint in constraints if constraint.A.shape[0]]
        while True:
            with without_stray_lines():
                result = scipy.optimize.milp(
                    cost / scale,
                    integrality=(columns < self.options).astype(int),
                    bounds=scipy.optimize.Bounds(0, 1),
                    constraints=constraints,
                    options={"mip_rel_gap": 0.0, "time_limit": max(deadline - time.monotonic(), 0.1)},
                )
            if result.x is None:
                return None, math.inf, result.status == 2
            full = np.zeros(self.variables)
            full[columns] = result.x
            choice = tuple(
                int(np.argmax(full[self.starts[d] : self.starts[d + 1]])) for d in range(len(self.problem.decisions))
            )
            if self.problem.allows(choice):
                bound = math.fsum(least) + float(result.mip_dual_bound) * scale
                return choice, bound, result.status == 0
            # Beyond a limit by no more than the solver's tolerance: this choice is out, everything else stays.
            chosen = np.isin(columns, self.starts[: len(choice)] + np.array(choice)).astype(float)
            constraints.append(scipy.optimize.LinearConstraint(chosen[None, :], -np.inf, len(choice) - 1))


def _largest(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest entry of each row, 1 for a row of zeros."""
    largest: NDArray[np.float64] = rows.max(axis=1, initial=0.0)
    return np.where(largest > 0, largest, 1.0)


def _sparse(entries: list[tuple[int, int, float]], shape: tuple[int, int]) -> scipy.sparse.csr_array:
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return scipy.sparse.csr_array((values, (rows, columns)), shape=shape)


@contextmanager
def without_stray_lines() -> Iterator[None]:
    """Keep a line off standard output that HiGHS 1.12 prints whatever it is told (HiGHS issue 2783, fixed later).

    It would spoil output meant for programs. Whatever else is printed meanwhile is passed on.
    """
    with _stdout_lock, ExitStack() as stack:
        try:
            captured = stack.enter_context(tempfile.TemporaryFile())
            saved = os.dup(1)
        except OSError:  # no standard output, or nowhere to keep it meanwhile
            yield
            return
        stack.callback(os.close, saved)
        os.dup2(captured.fileno(), 1)
        try:
            yield
        finally:
            with suppress(OSError, TypeError, AttributeError):  # not on every platform
                ctypes.CDLL(None).fflush(None)
            os.dup2(saved, 1)
            captured.seek(0)
            if passed_on := b"".join(line for line in captured if not line.startswith(_STRAY)):
                os.write(1, passed_on)
