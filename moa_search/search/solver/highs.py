"""HiGHS as this package uses it: one quiet thread, no tolerance that isn't asked for."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt

INFINITY = highspy.kHighsInf

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entries:
    """A sparse matrix: ``value[i]`` stands at ``row[i]``, ``column[i]``."""

    row: Integers
    column: Integers
    value: Doubles

    def __add__(self, other: Entries) -> Entries:
        """The entries of both."""
        return Entries(
            np.concatenate([self.row, other.row]),
            np.concatenate([self.column, other.column]),
            np.concatenate([self.value, other.value]),
        )


@dataclass(frozen=True)
class Outcome:
    """What the solver found.

    Attributes:
        values: ``[column]``, or None if it found nothing.
        bound: Lower bound of the objective; -inf if nothing is proven.
    """

    values: Doubles | None
    bound: float


def new_solver(**options: float | int | str) -> highspy.Highs:
    """A solver without the banner that its constructor writes to the process's standard output."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            solver = highspy.Highs()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    for name, value in {"output_flag": False, "threads": 1, "random_seed": 0, **options}.items():
        solver.setOptionValue(name, value)
    return solver


def solve_integer_program(
    cost: Doubles,
    entries: Entries,
    lower: Doubles,
    upper: Doubles,
    *,
    relative_gap: float,
    absolute_gap: float,
    time_limit_s: float,
    max_nodes: int,
    start: Doubles | None = None,
) -> Outcome:
    """Minimise ``cost @ x`` over binary x with ``lower <= A x <= upper``.

    Args:
        cost: ``[column]``.
        entries: A.
        lower: ``[row]``.
        upper: ``[row]``.
        relative_gap: Gap at which to stop.
        absolute_gap: The same, in units of the objective.
        time_limit_s: Seconds of wall time.
        max_nodes: Most nodes of the search tree; unlike time it stops at the same point on every machine.
        start: A feasible x to begin with.
    """
    columns = len(cost)
    order = np.lexsort((entries.row, entries.column))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, len(lower)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(columns), np.ones(columns)
    lp.row_lower_, lp.row_upper_ = lower, upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    counts = np.bincount(entries.column, minlength=columns)
    lp.a_matrix_.start_ = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    lp.a_matrix_.index_ = entries.row[order].astype(np.int32)
    lp.a_matrix_.value_ = entries.value[order]
    lp.integrality_ = [highspy.HighsVarType.kInteger] * columns
    solver = new_solver(
        time_limit=float(time_limit_s),
        mip_rel_gap=relative_gap,
        mip_abs_gap=absolute_gap,
        mip_max_nodes=max_nodes,
    )
    solver.passModel(lp)
    if start is not None:
        known = highspy.HighsSolution()
        known.col_value = list(start)
        solver.setSolution(known)
    solver.run()
    info = solver.getInfo()
    bound = float(info.mip_dual_bound)
    if info.primal_solution_status != highspy.kSolutionStatusFeasible:
        return Outcome(None, -np.inf)
    return Outcome(np.asarray(solver.getSolution().col_value, dtype=np.float64), bound)
