"""A good feasible choice in no time: rules at prices that are just high enough, then every bit of slack spent."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moa_search.search.solver.problem import Problem

STEPS = 20
PASSES = 3

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def feasible_choice(problem: Problem, losses: Doubles, prices: Doubles) -> Integers | None:
    """A feasible choice near what is best at ``prices``, or None if raising them doesn't lead to one.

    Args:
        problem: Costs and limits; its limit of rules per layer isn't looked at.
        losses: ``[head, rule]``; inf for what isn't to be chosen.
        prices: ``[budget]``.
    """

    def at(scale: float) -> Integers:
        return np.asarray(problem.priced(losses, prices * scale).argmin(1), dtype=np.int64)

    def fits(choice: Integers) -> bool:
        return bool((problem.used(choice) <= problem.all_limits).all())

    low, high = 0.0, 1.0
    found = at(high)
    for _ in range(STEPS):
        if fits(found):
            break
        low, high = high, 4 * high
        found = at(high)
    else:
        cheapest = _cheapest(problem, losses)
        return spend_slack(problem, losses, cheapest) if fits(cheapest) else None
    for _ in range(STEPS):
        middle = (low + high) / 2
        choice = at(middle)
        if fits(choice):
            high, found = middle, choice
        else:
            low = middle
    return spend_slack(problem, losses, found)


def spend_slack(problem: Problem, losses: Doubles, choice: Integers) -> Integers:
    """``choice`` after giving heads, one by one, the best rule that still fits; most to gain first."""
    choice = choice.copy()
    heads = np.arange(len(choice))
    slack = problem.all_limits - problem.used(choice)
    for _ in range(PASSES):
        gain = losses[heads, choice] - losses.min(1)
        changed = False
        for head in np.argsort(-gain, kind="stable")[: int((gain > 0).sum())]:
            better = np.nonzero(losses[head] < losses[head, choice[head]])[0]
            now = problem.cost(np.array([head]), choice[[head]])
            extra = problem.cost(np.full(len(better), head), better) - now
            fitting = (extra <= slack).all(1)
            if fitting.any():
                best = int(np.where(fitting, losses[head, better], np.inf).argmin())
                slack = slack - extra[best]
                choice[head], changed = better[best], True
        if not changed:
            break
    return choice


def _cheapest(problem: Problem, losses: Doubles) -> Integers:
    """Per head the allowed rule that takes the smallest part of the budgets."""
    parts = problem.priced(np.zeros_like(losses), 1 / np.maximum(problem.all_limits, 1))
    return np.asarray(np.where(np.isfinite(losses), parts, np.inf).argmin(1), dtype=np.int64)
