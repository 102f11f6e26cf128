"""Exact solution of a `Problem` as a mixed-integer program on HiGHS."""

from __future__ import annotations

import os
import sys
import time

import highspy
import numpy as np
import numpy.typing as npt

from moa_search.errors import SolverError
from moa_search.search.problem import Problem, Solution

__all__ = ["RELATIVE_GAP", "solve_exact"]

RELATIVE_GAP = 1e-6
"""Relative gap at which a solution counts as optimal."""

CORE_RULES = (12, 48)
"""Rules per head, on average, in the cores that are tried before all rules."""

OBJECTIVE_SCALE = 1000.0
"""The sum of the heads' largest losses after scaling."""

ABSOLUTE_TOLERANCE = 1e-6
"""HiGHS takes scaled objectives this close for equal, whatever gap it is told: with losses of 1e-9 it would
accept any plan as optimal."""

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def solve_exact(problem: Problem, *, time_limit_s: float = 60.0) -> Solution:
    """The best choice of one rule per head, with its dual bound.

    Rules that another beats in loss and in every cost are left out first, and then all but a core of rules
    with small reduced cost, as long as that provably costs nothing; the result is checked in exact integers.
    Where losses differ so much that the optimum is lost in HiGHS's tolerances, it solves again without the
    rules that alone lose more than the plan found. When time runs out, the best choice found is returned with
    its gap.

    Args:
        problem: A feasible problem.
        time_limit_s: Seconds for HiGHS.

    Raises:
        SolverError: HiGHS found no choice in time, or returned one that fails the check.
    """
    floor = float(problem.losses.min(1).sum())
    best_first = _cheapest_among_best(problem)
    if problem.is_feasible(best_first):
        return Solution(best_first, problem.loss(best_first), floor)
    deadline = time.monotonic() + time_limit_s
    excess = problem.losses - problem.losses.min(1, keepdims=True)
    kept = _undominated(problem)
    best: Solution | None = None
    while True:
        worst = float(np.where(kept, excess, 0).max(1).sum())
        scale = OBJECTIVE_SCALE / worst if worst > 0 else 1.0
        found = _solve(problem, excess * scale, kept, deadline)
        if found is None:
            break
        choice, bound = found
        objective = problem.loss(choice)
        bound = floor + max(bound - ABSOLUTE_TOLERANCE, 0.0) / scale
        if best is None or objective <= best.objective:
            best = Solution(choice, objective, min(objective, bound))
        # A better plan has no rule that loses more than this one in all.
        lost = float(excess[np.arange(len(choice)), best.choice].sum())
        promising = kept & (excess <= lost)
        if lost * scale * RELATIVE_GAP >= 2 * ABSOLUTE_TOLERANCE or (promising == kept).all():
            break
        kept = promising
    if best is None:
        raise SolverError(f"HiGHS found no plan within {time_limit_s:g} s; give it more time")
    return best


def _cheapest_among_best(problem: Problem) -> Integers:
    """Per head, of its rules with the smallest loss the one with the smallest total cost."""
    ties = problem.losses <= problem.losses.min(1, keepdims=True)
    cost = np.where(ties, problem.costs.sum(0)[None, :], np.iinfo(np.int64).max)
    return np.asarray(cost.argmin(1), dtype=np.int64)


def _undominated(problem: Problem) -> npt.NDArray[np.bool_]:
    """``[head, rule]``: no other rule is as good in loss and every cost and better (or earlier) in one."""
    costs = problem.costs
    order = np.arange(costs.shape[1])
    cheaper = (costs[:, :, None] <= costs[:, None, :]).all(0)  # [a, b]: a costs no more than b anywhere
    same_cost = (costs[:, :, None] == costs[:, None, :]).all(0)
    earlier = order[:, None] < order[None, :]
    kept = np.empty(problem.losses.shape, dtype=bool)
    for head, loss in enumerate(problem.losses):
        no_worse = cheaper & (loss[:, None] <= loss[None, :])
        equal = same_cost & (loss[:, None] == loss[None, :])
        kept[head] = ~(no_worse & (~equal | earlier)).any(0)
    return kept


def _solve(
    problem: Problem, losses: Doubles, kept: npt.NDArray[np.bool_], deadline: float
) -> tuple[Integers, float] | None:
    """The best choice among the rules ``kept``, ``[head, rule]``, and its bound; None if time runs out before any.

    The duals of the linear relaxation give every rule a reduced cost, and a bound L. A choice with a rule of
    reduced cost t loses at least L + t, so what is best among the rules under a threshold t is best of all, or
    at least no worse than L + t.

    Raises:
        SolverError: HiGHS returned a choice that breaks a budget.
    """
    reduced, relaxed_bound = _reduced_costs(problem, losses, kept)
    found: tuple[Integers, float] | None = None
    for per_head in (*CORE_RULES, len(kept[0])):
        wanted = min(per_head * len(kept), int(kept.sum()))
        threshold = float(np.partition(reduced[kept], wanted - 1)[wanted - 1])
        core = kept & (reduced <= threshold)
        whole = bool((core == kept).all())
        result = _run(problem, losses, core, max(deadline - time.monotonic(), 0.0))
        if result is None:
            continue
        choice, bound = result
        bound = bound if whole else min(bound, relaxed_bound + threshold)
        found = (choice, max(bound, relaxed_bound))
        loss = float(losses[np.arange(len(choice)), choice].sum())
        if whole or loss <= relaxed_bound + threshold:
            break
    return found


def _reduced_costs(problem: Problem, losses: Doubles, kept: npt.NDArray[np.bool_]) -> tuple[Doubles, float]:
    """Reduced costs ``[head, rule]`` at the budgets' optimal prices, and the Lagrangian bound that they prove.

    The bound holds for any non-negative prices, so the solver's tolerances can only weaken it.
    """
    head, rule = np.nonzero(kept)
    solver = _model(problem, losses, head, rule, highspy.kHighsInf)
    solver.setOptionValue("solve_relaxation", True)
    solver.run()
    duals = np.asarray(solver.getSolution().row_dual, dtype=np.float64)[: len(problem.limits)]
    prices = np.maximum(-duals, 0) if len(duals) else np.zeros(len(problem.limits))
    priced = losses + (prices[:, None] * problem.costs).sum(0)[None, :]
    lowest = np.where(kept, priced, np.inf).min(1, keepdims=True)
    return priced - lowest, float(lowest.sum() - prices @ problem.limits)


def _run(
    problem: Problem, losses: Doubles, core: npt.NDArray[np.bool_], time_limit_s: float
) -> tuple[Integers, float] | None:
    """The best choice among the rules ``core`` and its bound there; None if HiGHS finds none in time."""
    head, rule = np.nonzero(core)
    solver = _model(problem, losses, head, rule, time_limit_s)
    solver.run()
    info = solver.getInfo()
    if info.primal_solution_status != highspy.kSolutionStatusFeasible:
        return None
    choice = _rounded(np.asarray(solver.getSolution().col_value), head, rule, len(losses))
    if not problem.is_feasible(choice):
        raise SolverError("HiGHS returned a plan that breaks a budget when checked in integers")
    return choice, float(info.mip_dual_bound)


def _model(
    problem: Problem,
    losses: Doubles,
    head: Integers,
    rule: Integers,
    time_limit_s: float,
) -> highspy.Highs:
    """Binary columns (head, rule); one row per budget, one per head that asks for exactly one rule."""
    budgets, heads, columns = len(problem.limits), len(losses), len(head)
    index = np.empty((columns, budgets + 1), dtype=np.int32)
    index[:, :budgets], index[:, budgets] = np.arange(budgets), budgets + head
    value = np.ones((columns, budgets + 1))
    value[:, :budgets] = problem.costs[:, rule].T
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, budgets + heads
    lp.col_cost_ = losses[head, rule]
    lp.col_lower_, lp.col_upper_ = np.zeros(columns), np.ones(columns)
    lp.row_lower_ = np.concatenate([np.full(budgets, -highspy.kHighsInf), np.ones(heads)])
    lp.row_upper_ = np.concatenate([problem.limits.astype(float), np.ones(heads)])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, columns * (budgets + 1) + 1, budgets + 1, dtype=np.int32)
    lp.a_matrix_.index_, lp.a_matrix_.value_ = index.ravel(), value.ravel()
    lp.integrality_ = [highspy.HighsVarType.kInteger] * columns
    solver = _quiet_solver()
    options = {
        "output_flag": False,
        "threads": 1,
        "random_seed": 0,
        "time_limit": float(time_limit_s),
        "mip_rel_gap": RELATIVE_GAP / 2,
        "mip_abs_gap": 0.0,
    }
    for name, setting in options.items():
        solver.setOptionValue(name, setting)
    solver.passModel(lp)
    return solver


def _quiet_solver() -> highspy.Highs:
    """A solver without the banner that its constructor writes to the process's standard output."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            return highspy.Highs()
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _rounded(values: npt.NDArray[np.float64], head: Integers, rule: Integers, heads: int) -> Integers:
    """Per head the rule with the largest value."""
    choice = np.zeros(heads, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    choice[head[order]] = rule[order]
    return choice
