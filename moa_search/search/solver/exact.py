"""Exact solution of a `Problem`, with its proof."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import numpy.typing as npt

from moa_search.errors import SolverError
from moa_search.search.solver.assignment import CORES, MANY_CORES, Found, assign
from moa_search.search.solver.dominance import undominated
from moa_search.search.solver.limited import assign_limited
from moa_search.search.solver.problem import Problem, Solution

RELATIVE_GAP = 1e-6
"""Relative gap at which a solution counts as optimal."""

LARGE_GAP = 1e-4
"""The same for problems of so many (head, rule) pairs that a last millionth would take minutes."""

LARGE_PAIRS = 25_000

MANY_RULES, MANY_GAP = 1_000, 5e-4
"""The same for such problems where heads choose from so many rules (under bits, say) that near ties abound."""

LIMITED_GAP = 5e-4
"""The same under a limit of rules per layer, which is much harder to prove."""

OBJECTIVE_SCALE = 1000.0
"""The sum of the heads' largest losses after scaling."""

QUANTUM = 2.0**-36
"""Scaled losses are multiples of it, so that rounding in the last bit of the losses changes no plan."""

ABSOLUTE_TOLERANCE = 1e-6
"""HiGHS takes scaled objectives this close for equal, whatever gap it is told: with losses of 1e-9 it would
accept any plan as optimal."""

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


def solve_exact(problem: Problem, *, time_limit_s: float = 60.0, gap: float | None = None) -> Solution:
    """The best choice of one rule per head, with its dual bound.

    Where losses differ so much that the optimum is lost in HiGHS's tolerances, it solves again without the
    rules that alone lose more than the plan found. When time runs out, the best choice found is returned with
    its gap.

    Args:
        problem: A feasible problem.
        time_limit_s: Seconds of wall time.
        gap: Relative gap at which to stop; by default `RELATIVE_GAP`, `LARGE_GAP`, `MANY_GAP` or `LIMITED_GAP`.
            Limits on the search trees can end it earlier, at the same point on every machine.

    Raises:
        SolverError: No feasible choice was found.
    """
    best_losses = np.where(problem.choices, problem.losses, np.inf).min(1)
    floor = float(best_losses.sum())
    best_first = _cheapest_among_best(problem, best_losses)
    if problem.is_feasible(best_first):
        return Solution(best_first, problem.loss(best_first), floor)
    deadline = time.monotonic() + time_limit_s
    gap = _default_gap(problem) if gap is None else gap
    excess = np.where(problem.choices, problem.losses - best_losses[:, None], np.inf)
    reduced = _without_common_costs(problem)
    kept = problem.choices & _affordable(reduced)
    if problem.rule_limit is None:
        kept &= undominated(problem)
    best: Solution | None = None
    while kept.any(1).all():
        worst = float(np.where(kept, excess, 0).max(1).sum())
        scale = OBJECTIVE_SCALE / worst if worst > 0 else 1.0
        scaled = np.where(kept, np.round(excess * scale / QUANTUM) * QUANTUM, np.inf)
        found = _solve(reduced, scaled, gap, deadline)
        if found.choice is None:
            break
        tolerance = ABSOLUTE_TOLERANCE + QUANTUM * len(excess)
        objective = problem.loss(found.choice)
        bound = floor + max(found.bound - tolerance, 0.0) / scale
        if best is None or objective <= best.objective:
            best = Solution(found.choice, objective, min(objective, max(bound, best.bound if best else floor)))
        # A better plan has no rule that loses more than this one in all.
        lost = float(excess[np.arange(len(best.choice)), best.choice].sum())
        promising = kept & (excess <= lost)
        if lost * scale * RELATIVE_GAP >= 2 * tolerance or (promising == kept).all() or time.monotonic() > deadline:
            break
        kept = promising
    if best is None:
        raise SolverError(
            f"no plan that keeps all budgets was found within {time_limit_s:g} s; give it more time, or loosen one"
        )
    return best


def _default_gap(problem: Problem) -> float:
    if problem.rule_limit is not None:
        return LIMITED_GAP
    if problem.losses.size <= LARGE_PAIRS:
        return RELATIVE_GAP
    return LARGE_GAP if problem.losses.shape[1] <= MANY_RULES else MANY_GAP


def _solve(problem: Problem, losses: Doubles, gap: float, deadline: float) -> Found:
    if problem.rule_limit is None:
        cores = CORES if problem.losses.shape[1] <= MANY_RULES else MANY_CORES
        return assign(problem, losses, gap=gap, deadline=deadline, cores=cores)
    return assign_limited(problem, losses, gap=gap, deadline=deadline)


def _without_common_costs(problem: Problem) -> Problem:
    """The same choices under budgets without what every rule takes of them: all that HiGHS has to tell apart."""
    common = problem.costs.min(1)
    costs, limits = problem.costs - common[:, None], problem.limits - len(problem.losses) * common
    reduced = dataclasses.replace(problem, costs=costs, limits=limits)
    if problem.head_costs is None or problem.head_limits is None:
        return reduced
    own = problem.head_costs.min(2)
    return dataclasses.replace(
        reduced, head_costs=problem.head_costs - own[:, :, None], head_limits=problem.head_limits - own.sum(1)
    )


def _affordable(reduced: Problem) -> Booleans:
    """``[head, rule]``: no budget is broken by this rule alone, where other heads may cost nothing.

    Such a rule would also make its budget's other costs too small, beside its own, for HiGHS's tolerance.
    """
    fits = np.broadcast_to((reduced.costs <= reduced.limits[:, None]).all(0), reduced.losses.shape)
    if reduced.head_costs is None or reduced.head_limits is None:
        return fits
    return np.asarray(fits & (reduced.head_costs <= reduced.head_limits[:, None, None]).all(0))


def _cheapest_among_best(problem: Problem, best: Doubles) -> Integers:
    """Per head, of its rules with the smallest loss the one with the smallest total cost."""
    ties = problem.choices & (problem.losses <= best[:, None])
    cost = np.where(ties, problem.costs.astype(float).sum(0)[None, :], np.inf)
    return np.asarray(cost.argmin(1), dtype=np.int64)
