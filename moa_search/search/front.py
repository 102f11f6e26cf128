"""Plans that trade the losses at several lengths against each other, under one set of budgets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moa_search.search.problem import Problem, Solution

__all__ = ["FrontPoint", "lattice", "trade_off"]

EXTREME = 1e-3
"""Share that an extreme plan leaves to the other lengths, so that it isn't needlessly bad there."""


@dataclass(frozen=True)
class FrontPoint:
    """One plan of a front.

    Attributes:
        weights: Weight of each length's loss in the objective; they add up to 1.
        losses: Loss at each length.
        solution: The choice with its bound; the objective is the weighted sum of ``losses``.
    """

    weights: tuple[float, ...]
    losses: tuple[float, ...]
    solution: Solution


def lattice(lengths: int, steps: int) -> list[tuple[float, ...]]:
    """Distinct weight vectors over ``lengths`` losses in ``steps`` steps; equal weights first, extremes always in."""
    points = [
        tuple(part / steps for part in parts)
        for parts in itertools.product(range(steps + 1), repeat=lengths)
        if sum(parts) == steps
    ]
    return list(dict.fromkeys([tuple([1 / lengths] * lengths), *points]))


def trade_off(
    losses: Sequence[npt.NDArray[np.float64]],
    problem: Problem,
    solve: Callable[[Problem], Solution],
    *,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[FrontPoint]:
    """The front over lengths by weighted sums; the first point weighs all lengths equally.

    The weights apply to losses in units of what the worst choice loses at their length, so that they mean the
    same at every length. A plan found for one weighting serves another where it does better there (solutions
    have a tolerance, and a time limit). Plans found twice and plans that another beats are dropped.

    Args:
        losses: One ``[head, rule]`` per length.
        problem: Costs and limits; its losses are replaced by weighted sums.
        solve: Exact solver.
        steps: Steps of the weight lattice.
        progress: Told the solves done and in all.
    """
    worst = [float(loss.max(1).sum()) for loss in losses]
    worst = [total or max(worst) or 1.0 for total in worst]  # a length where nothing is lost has no unit
    heads = np.arange(len(problem.losses))
    solved: list[FrontPoint] = []
    vectors = lattice(len(losses), steps)
    for done, vector in enumerate(vectors, 1):
        weights = _weights(vector, worst)
        weighted = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        solution = solve(Problem(np.asarray(weighted), problem.costs, problem.limits))
        values = tuple(float(loss[heads, solution.choice].sum()) for loss in losses)
        solved.append(FrontPoint(weights, values, solution))
        if progress is not None:
            progress(done, len(vectors))
    return _undominated([_best_for(point, solved) for point in solved])


def _weights(vector: tuple[float, ...], worst: list[float]) -> tuple[float, ...]:
    """Weights of losses, from weights of losses in units of the worst; every length keeps a little."""
    smallest = min(worst)
    weights = [(w * (1 - EXTREME) + EXTREME / len(vector)) * (smallest / x) for w, x in zip(vector, worst, strict=True)]
    return tuple(w / sum(weights) for w in weights)


def _best_for(point: FrontPoint, solved: list[FrontPoint]) -> FrontPoint:
    """The point with the best choice found for its weights."""

    def objective(other: FrontPoint) -> float:
        return sum(w * loss for w, loss in zip(point.weights, other.losses, strict=True))

    best = min([point, *solved], key=lambda other: (objective(other), other.losses))
    value = objective(best)
    solution = Solution(best.solution.choice, value, min(point.solution.bound, value))
    return FrontPoint(point.weights, best.losses, solution)


def _undominated(points: list[FrontPoint]) -> list[FrontPoint]:
    kept: list[FrontPoint] = []
    for index, point in enumerate(points):
        twin = any(other.losses == point.losses for other in points[:index])
        beaten = any(_dominates(other.losses, point.losses) for other in points)
        if not twin and not beaten:
            kept.append(point)
    return kept


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b
