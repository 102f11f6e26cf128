"""Plans that trade the losses at several lengths against each other, under one set of budgets."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError, SolverError
from moa_search.progress import progress
from moa_search.search.solver import Problem, Solution

Doubles = npt.NDArray[np.float64]

EXTREME = 1e-3
"""Share that an extreme plan leaves to the other lengths, so that it isn't needlessly bad there."""

MOST_WEIGHTINGS = 10_000
"""Of a lattice; every one is a solve."""

MOST_STEPS, ENOUGH_WEIGHTINGS = 6, 15
"""Of a lattice by default, over two to five lengths 7, 15, 10 and 15 weightings: every plan may be validated."""

LOSS_STEPS = 10**6
"""Whole steps that a bound on a length's loss is counted in."""


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
    """Distinct weight vectors over ``lengths`` losses in ``steps`` steps; equal weights first, extremes always in.

    Raises:
        ConfigError: There are too many of them to be solved for.
    """
    if _count(lengths, steps) > MOST_WEIGHTINGS:
        raise ConfigError(
            f"front_steps: {steps} steps over {lengths} lengths are over {MOST_WEIGHTINGS} solves; take fewer steps"
        )
    points = []
    for bars in itertools.combinations(range(steps + lengths - 1), lengths - 1):  # between the parts of a sum
        ends = (-1, *bars, steps + lengths - 1)
        points.append(tuple((end - start - 1) / steps for start, end in itertools.pairwise(ends)))
    return list(dict.fromkeys([tuple([1 / lengths] * lengths), *points]))


def default_steps(lengths: int) -> int:
    """Steps of a lattice over ``lengths`` losses that are fine enough to choose from and soon solved for."""
    return max(steps for steps in range(1, MOST_STEPS + 1) if steps == 1 or _count(lengths, steps) <= ENOUGH_WEIGHTINGS)


def _count(lengths: int, steps: int) -> int:
    """Weight vectors of a lattice."""
    return math.comb(steps + lengths - 1, lengths - 1)


def trade_off(
    losses: Sequence[Doubles],
    problem: Problem,
    solve: Callable[[Problem], Solution],
    *,
    steps: int | None = None,
    weights: Sequence[float] | None = None,
) -> list[FrontPoint]:
    """The front over lengths by weighted sums; the first point has the weights asked for.

    The weights apply to losses in units of what the worst choice loses at their length, so that they mean the
    same at every length. A plan found for one weighting serves another where it does better there (solutions
    have a tolerance, and a time limit). Plans found twice and plans that another beats are dropped.

    Args:
        losses: One ``[head, rule]`` per length.
        problem: Costs and limits; its losses are replaced by weighted sums.
        solve: Exact solver.
        steps: Steps of the weight lattice; 0 for the first point alone, None for `default_steps`.
        weights: Of the first point, one per length; equal ones if None.
    """
    worst = _worst(losses, problem)
    solved: list[FrontPoint] = []
    first = _normal([1.0] * len(losses) if weights is None else weights)
    steps = default_steps(len(losses)) if steps is None else steps
    vectors = list(dict.fromkeys([first, *(lattice(len(losses), steps) if steps else ())]))
    for vector in progress(vectors, what="Searching", unit="plan"):
        point_weights = _weights(vector, worst)
        weighted = sum(w * loss for w, loss in zip(point_weights, losses, strict=True))
        solution = solve(dataclasses.replace(problem, losses=np.asarray(weighted)))
        solved.append(FrontPoint(point_weights, _values(losses, solution.choice), solution))
    best = [_best_for(point, solved) for point in solved]
    return [best[0], *(point for point in _undominated(best) if point.losses != best[0].losses)]


def epsilon_cells(
    losses: Sequence[Doubles],
    problem: Problem,
    solve: Callable[[Problem], Solution],
    *,
    cells: int,
    weights: Sequence[float] | None = None,
) -> list[FrontPoint]:
    """The front by ε-constraints, as MoA makes it: one length's loss is minimised, the others' are bounded.

    Each length in turn is minimised while every other may lose at most one of ``cells`` - 1 values between its
    best and what it loses where the first is best. The first point is the one with the smallest weighted sum of
    losses in units of the worst. Every point's bound is that of its own subproblem.

    Args:
        losses: One ``[head, rule]`` per length.
        problem: Costs and limits.
        solve: Exact solver; a cell that it raises SolverError for, since it has no choice, is left out.
        cells: Parts that a length's range of losses is cut into.
        weights: That the first point is chosen by, one per length; equal ones if None.

    Raises:
        SolverError: No choice was found even without a bound on the other lengths.
    """
    lengths = range(len(losses))
    worst = _worst(losses, problem)
    scaled = [loss / unit for loss, unit in zip(losses, worst, strict=True)]
    shares = list(itertools.product(range(1, cells), repeat=len(losses) - 1)) if len(losses) > 1 else []
    solved: list[FrontPoint] = []

    def add(primary: int, bounded: Problem) -> tuple[float, ...]:
        solution = solve(dataclasses.replace(bounded, losses=losses[primary]))
        alone_counts = tuple(float(length == primary) for length in lengths)
        solved.append(FrontPoint(alone_counts, _values(losses, solution.choice), solution))
        return _values(scaled, solution.choice)

    with progress(what="Searching", unit="plan", total=len(losses) * (1 + len(shares))) as bar:
        alone = []
        for primary in lengths:
            alone.append(add(primary, problem))
            bar.update()
        for primary, share in itertools.product(lengths, shares):
            others = [length for length in lengths if length != primary]
            limits = []
            for other, part in zip(others, share, strict=True):
                best, here = alone[other][other], alone[primary][other]
                limits.append(best + (here - best) * part / cells)
            with contextlib.suppress(SolverError):
                add(primary, _bounded(problem, [scaled[other] for other in others], limits))
            bar.update()

    asked = [1.0] * len(losses) if weights is None else weights

    def total_loss(point: FrontPoint) -> float:
        return sum(w * value / unit for w, value, unit in zip(asked, point.losses, worst, strict=True))

    solved.sort(key=total_loss)
    return _undominated(solved)


def weigh(losses: Sequence[Doubles], problem: Problem, weights: Sequence[float]) -> tuple[tuple[float, ...], Doubles]:
    """The weights of losses that ``weights`` in units of the worst mean, as in `trade_off`, and the weighted losses."""
    found = _weights(_normal(weights), _worst(losses, problem))
    return found, np.asarray(sum(w * loss for w, loss in zip(found, losses, strict=True)))


def point_of(losses: Sequence[Doubles], weights: tuple[float, ...], solution: Solution) -> FrontPoint:
    """The point of a solution for losses weighted so."""
    return FrontPoint(weights, _values(losses, solution.choice), solution)


def unweighted(losses: Sequence[Doubles], choice: npt.NDArray[np.int64]) -> FrontPoint:
    """The point of a choice that no weighted sum led to, without a proof."""
    return FrontPoint(tuple([1 / len(losses)] * len(losses)), _values(losses, choice), Solution(choice, 0.0, 0.0))


def knee(costs: Sequence[float], losses: Sequence[float]) -> int | None:
    """Where spending more stops paying: the point farthest below the line between the ends (Satopaa et al. 2011).

    Args:
        costs: Increasing.
        losses: One for each.

    Returns:
        The index of an inner point, or None if none lies below the line.
    """
    if len(costs) < 3 or losses[0] <= losses[-1]:
        return None
    x = (np.asarray(costs) - costs[0]) / (costs[-1] - costs[0])
    y = (np.asarray(losses) - losses[-1]) / (losses[0] - losses[-1])
    below = 1 - x - y
    best = int(below.argmax())
    return best if below[best] > 1e-9 else None


def _bounded(problem: Problem, losses: Sequence[Doubles], limits: Sequence[float]) -> Problem:
    """``problem`` with bounds on further losses, rounded so that a choice within them is within them exactly."""
    units = [max(limit, 1e-300) / LOSS_STEPS for limit in limits]
    costs = [np.ceil(np.minimum(loss / unit, 2.0**40)) for loss, unit in zip(losses, units, strict=True)]
    return dataclasses.replace(
        problem,
        head_costs=np.stack(costs).astype(np.int64),
        head_limits=np.full(len(limits), LOSS_STEPS, dtype=np.int64),
    )


def _worst(losses: Sequence[Doubles], problem: Problem) -> list[float]:
    """What the worst choice loses at each length; a length where nothing is lost has no unit of its own."""
    totals = [float(np.where(problem.choices, loss, 0).max(1).sum()) for loss in losses]
    return [total or max(totals) or 1.0 for total in totals]


def _normal(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)


def _values(losses: Sequence[Doubles], choice: npt.NDArray[np.int64]) -> tuple[float, ...]:
    return tuple(float(loss[np.arange(len(choice)), choice].sum()) for loss in losses)


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
