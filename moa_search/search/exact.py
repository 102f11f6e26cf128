"""Exact solution of a `Problem` as a mixed-integer program on HiGHS."""

from __future__ import annotations

import os
import sys

import highspy
import numpy as np
import numpy.typing as npt

from moa_search.errors import SolverError
from moa_search.search.problem import Problem, Solution

__all__ = ["RELATIVE_GAP", "solve_exact"]

RELATIVE_GAP = 1e-6
"""Relative gap at which a solution counts as optimal."""

OBJECTIVE_SCALE = 1000.0
"""The sum of the heads' largest losses after scaling: with losses of 1e-9 HiGHS's absolute gap of 1e-6 would
accept any plan as optimal."""


def solve_exact(problem: Problem, *, time_limit_s: float = 60.0) -> Solution:
    """The best choice of one rule per head, with its dual bound.

    Rules that another beats in loss and in every cost are left out first; HiGHS solves the rest; the result
    is checked in exact integers. When time runs out, the best choice found is returned with its gap.

    Args:
        problem: A feasible problem.
        time_limit_s: Seconds for HiGHS.

    Raises:
        SolverError: HiGHS found no feasible choice in time, or returned one that fails the check.
    """
    lossless = problem.losses.argmin(1)
    best_first = _cheapest_among_best(problem)
    if problem.is_feasible(best_first):
        return Solution(best_first, problem.loss(best_first), problem.loss(lossless))
    head, rule = np.nonzero(_undominated(problem))
    scale = OBJECTIVE_SCALE / problem.losses.max(1).sum()
    solver = _model(problem, head, rule, scale, time_limit_s)
    solver.run()
    info, status = solver.getInfo(), solver.getModelStatus()
    if info.primal_solution_status != highspy.kSolutionStatusFeasible:
        raise SolverError(f"HiGHS found no plan within {time_limit_s:g} s ({solver.modelStatusToString(status)})")
    choice = _rounded(np.asarray(solver.getSolution().col_value), head, rule, len(problem.losses))
    if not problem.is_feasible(choice):
        raise SolverError("HiGHS returned a plan that breaks a budget when checked in integers")
    objective = problem.loss(choice)
    return Solution(choice, objective, min(objective, info.mip_dual_bound / scale))


def _cheapest_among_best(problem: Problem) -> npt.NDArray[np.int64]:
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


def _model(
    problem: Problem,
    head: npt.NDArray[np.int64],
    rule: npt.NDArray[np.int64],
    scale: float,
    time_limit_s: float,
) -> highspy.Highs:
    """Binary columns (head, rule); one row per budget, one per head that asks for exactly one rule."""
    budgets, heads, columns = len(problem.limits), len(problem.losses), len(head)
    index = np.empty((columns, budgets + 1), dtype=np.int32)
    index[:, :budgets], index[:, budgets] = np.arange(budgets), budgets + head
    value = np.ones((columns, budgets + 1))
    value[:, :budgets] = problem.costs[:, rule].T
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, budgets + heads
    lp.col_cost_ = problem.losses[head, rule] * scale
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
        "mip_rel_gap": RELATIVE_GAP,
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


def _rounded(
    values: npt.NDArray[np.float64], head: npt.NDArray[np.int64], rule: npt.NDArray[np.int64], heads: int
) -> npt.NDArray[np.int64]:
    """Per head the rule with the largest value."""
    choice = np.zeros(heads, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    choice[head[order]] = rule[order]
    return choice
