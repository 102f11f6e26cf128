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
        weights: Weight of each length's normalised loss.
        losses: Loss at each length.
        solution: The choice with its bound, in the weighted objective.
    """

    weights: tuple[float, ...]
    losses: tuple[float, ...]
    solution: Solution


def lattice(lengths: int, steps: int) -> list[tuple[float, ...]]:
    """Weight vectors over ``lengths`` losses in ``steps`` equal steps; equal weights first, extremes always in."""
    if lengths == 1:
        return [(1.0,)]
    points = [
        tuple(part / steps for part in parts)
        for parts in itertools.product(range(steps + 1), repeat=lengths)
        if sum(parts) == steps
    ]
    return [tuple([1 / lengths] * lengths), *points]


def trade_off(
    losses: Sequence[npt.NDArray[np.float64]],
    problem: Problem,
    solve: Callable[[Problem], Solution],
    *,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[FrontPoint]:
    """The front over lengths by weighted sums; the first point has equal weights.

    Losses are normalised by what the cheapest choice loses, so that weights mean the same at every length.
    Plans found twice and plans that another beats at every length are dropped.

    Args:
        losses: One ``[head, rule]`` per length.
        problem: Costs and limits; its losses are replaced by weighted sums.
        solve: Exact solver.
        steps: Steps of the weight lattice.
        progress: Told the solves done and in all.
    """
    scales = [max(float(loss.max(1).sum()), np.finfo(float).tiny) for loss in losses]
    heads = np.arange(len(problem.losses))
    points: list[FrontPoint] = []
    vectors = lattice(len(losses), steps)
    for done, weights in enumerate(vectors, 1):
        soft = [w * (1 - EXTREME) + EXTREME / len(losses) for w in weights]
        weighted = sum(w / s * loss for w, s, loss in zip(soft, scales, losses, strict=True))
        solution = solve(Problem(np.asarray(weighted), problem.costs, problem.limits))
        values = tuple(float(loss[heads, solution.choice].sum()) for loss in losses)
        points.append(FrontPoint(weights, values, solution))
        if progress is not None:
            progress(done, len(vectors))
    return _undominated(points)


def _undominated(points: list[FrontPoint]) -> list[FrontPoint]:
    kept: list[FrontPoint] = []
    for index, point in enumerate(points):
        twin = any(np.array_equal(point.solution.choice, other.solution.choice) for other in points[:index])
        beaten = any(_dominates(other.losses, point.losses) for other in points)
        if not twin and not beaten:
            kept.append(point)
    return kept


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b
