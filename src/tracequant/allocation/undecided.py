"""Which decisions of a plan rest on a difference in Ω that is smaller than its error.

A plan of least Ω gives bits to one layer and not to another because that lowers Ω by more. Every such comparison is an
exchange: one decision takes fewer bits, another takes more, and the limits still hold. The change of Ω is a sum of
average traces times differences of squared perturbations, so that its error follows from the covariance of the traces.
Samples that move the traces of both layers alike leave little of it.

`plan_stability` answers the question whether the plan as a whole would come out again with other samples; this says
which single exchanges the data leave open, and needs nothing but the sensitivities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tracequant.allocation.problem import Problem
from tracequant.core.reasons import in_bits
from tracequant.core.sensitivity import Sensitivity

# Exchanges that are looked at for a layer until one is found that keeps to the order of bits as well as to the limits.
TRIES = 20


def undecided(sensitivity: Sensitivity, problem: Problem, choice: Sequence[int], total_omega: float) -> dict[str, str]:
    """Layer name → the exchange with another layer whose change of Ω is smallest for its error, if it is smaller.

    Empty where the errors of traces are not known (`Sensitivity.trace_covariance`).
    """
    if not sensitivity.trace_covariance:
        return {}
    moves = [
        (d, j)
        for d, decision in enumerate(problem.decisions)
        if decision.weights
        for j in range(len(decision.bits))
        if j != choice[d]
    ]
    omega = np.array([problem.objective.single[d][j] - problem.objective.single[d][choice[d]] for d, j in moves])
    fewer = [i for i, (d, j) in enumerate(moves) if problem.decisions[d].bits[j] < problem.decisions[d].bits[choice[d]]]
    more = sorted(set(range(len(moves))) - set(fewer))
    if not fewer or not more:
        return {}
    steps = _steps(sensitivity, problem, choice, moves)
    spread = steps @ _full(sensitivity.trace_covariance)
    own = np.einsum("ml,ml->m", spread, steps)
    variance = own[fewer][:, None] + own[more][None, :] + 2 * spread[fewer] @ steps[more].T
    errors = np.sqrt(np.maximum(variance, 0.0))
    changes = omega[fewer][:, None] + omega[more][None, :]
    possible = (changes < errors) & _allowed(problem, choice, moves, fewer, more)
    possible &= np.array([moves[i][0] for i in fewer])[:, None] != np.array([moves[i][0] for i in more])[None, :]
    ratio = np.where(possible, changes / np.where(errors > 0, errors, 1.0), np.inf)
    found: dict[str, str] = {}
    fewer_of, more_of = (np.array([moves[i][0] for i in side]) for side in (fewer, more))
    rows, columns = np.nonzero(np.isfinite(ratio))
    order = np.argsort(ratio[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    for d, decision in enumerate(problem.decisions):
        if not decision.weights:
            continue
        concerned = np.flatnonzero((fewer_of[rows] == d) | (more_of[columns] == d))[:TRIES]
        for row, column in zip(rows[concerned], columns[concerned], strict=True):
            exchange = dict((moves[fewer[row]], moves[more[column]]))
            if problem.allows([exchange.get(e, chosen) for e, chosen in enumerate(choice)]):
                text = _text(problem, d, exchange, changes[row, column], errors[row, column], total_omega)
                found |= dict.fromkeys(decision.weights, text)
                break
    return found


def _steps(
    sensitivity: Sensitivity, problem: Problem, choice: Sequence[int], moves: Sequence[tuple[int, int]]
) -> NDArray[np.float64]:
    """`[moves, layers]`: by how much each move changes ‖ΔW‖² of each layer, in the order of the points."""
    place = {layer.name: i for i, layer in enumerate(sensitivity.points.layers)}
    steps = np.zeros((len(moves), len(place)))
    for i, (d, j) in enumerate(moves):
        decision = problem.decisions[d]
        for name in decision.weights:
            errors = sensitivity.weight_errors[name]
            steps[i, place[name]] = errors[decision.bits[j]] - errors[decision.bits[choice[d]]]
    return steps


def _full(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The symmetric matrix from its rows up to the diagonal."""
    matrix = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        matrix[i, : i + 1] = matrix[: i + 1, i] = row
    return matrix


def _allowed(
    problem: Problem,
    choice: Sequence[int],
    moves: Sequence[tuple[int, int]],
    fewer: Sequence[int],
    more: Sequence[int],
) -> NDArray[np.bool_]:
    """`[fewer, more]`: whether the limits hold after both moves; weights of two layers never meet in a pair."""
    allowed = np.ones((len(fewer), len(more)), dtype=bool)
    for limit in problem.limits:
        used = np.array([_used(problem, limit.amounts.single, limit.amounts.pairs, choice, move) for move in moves])
        room = limit.bound - limit.amounts.total(choice, problem.pairs)
        allowed &= used[fewer][:, None] + used[more][None, :] <= room + 1e-9 * abs(limit.bound)
    return allowed


def _used(
    problem: Problem,
    single: Sequence[NDArray[np.float64]],
    pairs: Sequence[NDArray[np.float64]],
    choice: Sequence[int],
    move: tuple[int, int],
) -> float:
    """How much more of a resource a move takes."""
    d, j = move
    change = float(single[d][j] - single[d][choice[d]])
    for table, (first, second) in zip(pairs, problem.pairs, strict=True):
        if first == d:
            change += float(table[j, choice[second]] - table[choice[d], choice[second]])
        elif second == d:
            change += float(table[choice[first], j] - table[choice[first], choice[d]])
    return change


def _text(
    problem: Problem, d: int, exchange: Mapping[int, int], change: float, error: float, total_omega: float
) -> str:
    """The exchange in words, from the side of decision `d`."""
    (other,) = exchange.keys() - {d}
    here = in_bits(problem.decisions[d].bits[exchange[d]])
    there = problem.decisions[other].bits[exchange[other]]
    name = problem.decisions[other].weights[0]
    total = abs(total_omega) or 1.0
    return (
        f"not decided by the data: {here} here and {there} for {name} change the total Ω by {change / total:.2g} of it,"
        f" known to {error / total:.2g}"
    )
