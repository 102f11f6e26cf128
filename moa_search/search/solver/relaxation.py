"""Prices of the budgets and a lower bound, by Dantzig-Wolfe decomposition over layers.

The linear relaxation with every (head, rule) as a column is out of reach for large models, and it knows nothing
of a limit of rules per layer. Here a column is one layer's whole assignment: a small master program mixes the
assignments known so far, its duals price the budgets, and at those prices each layer's best assignment is found
exactly. Every pricing proves a lower bound, whatever the prices; they are smoothed towards the best ones so far
(Wentges 1997), which is what makes twenty or thirty of them enough.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt

from moa_search.search.solver.highs import INFINITY, new_solver
from moa_search.search.solver.problem import Problem
from moa_search.search.solver.rule_sets import best_assignment

TOLERANCE = 1e-5
"""Relative distance of the master program's value from the bound at which prices count as optimal."""

SMOOTHING = 0.5
MOST_ROUNDS = 200
START_SCALES = np.geomspace(1e-4, 3, 12)
CHEAP_SCALE = 1000.0

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Column:
    """One layer's assignment.

    Attributes:
        layer: Index.
        choice: Rule per head of the layer, ``[head]``.
        share: Its part in the master program's solution, 0 to 1.
    """

    layer: int
    choice: Integers
    share: float


@dataclass(frozen=True)
class Relaxation:
    """What the decomposition found.

    Attributes:
        prices: Of each budget, ``[budget]``, non-negative.
        bound: Lower bound of the total loss that these prices prove.
        columns: Every assignment met.
    """

    prices: Doubles
    bound: float
    columns: list[Column]


def relax(problem: Problem, losses: Doubles, deadline: float, start: Doubles | None = None) -> Relaxation:
    """Solve the relaxation of ``problem`` with other losses.

    Args:
        problem: Costs, limits and the limit of rules per layer.
        losses: ``[head, rule]``; inf for what isn't to be chosen.
        deadline: ``time.monotonic()`` at which to stop; the bound holds at any time.
        start: Prices to begin with, such as those of a similar problem.
    """
    return _Decomposition(problem, losses).run(deadline, start)


class _Decomposition:
    def __init__(self, problem: Problem, losses: Doubles) -> None:
        self._problem, self._losses = problem, losses
        self._limits = problem.all_limits.astype(float)
        self._unit = np.maximum(self._limits, 1.0)  # budgets in shares of their limits: prices of one size
        self._known: dict[tuple[int, bytes], int] = {}
        self._layer: list[int] = []
        self._choice: list[Integers] = []
        self._best_bound, self._best_prices = -np.inf, np.zeros(len(self._limits))
        finite = np.where(np.isfinite(losses), losses, 0)
        self._spread = float((finite.max(1) - losses.min(1)).sum()) or 1.0
        self._master = new_solver(presolve="off")
        self._open_master()

    def run(self, deadline: float, start: Doubles | None) -> Relaxation:
        self._first_prices(start)
        done = 0
        for _ in range(MOST_ROUNDS):
            # Mix the known assignments; the budgets' duals are the next prices.
            self._master.run()
            value = self._master.getInfo().objective_function_value
            duals = np.asarray(self._master.getSolution().row_dual, dtype=np.float64)
            prices = np.maximum(-duals[: len(self._limits)], 0) / self._unit
            if value - self._best_bound <= TOLERANCE * abs(value) or time.monotonic() > deadline:
                break
            # Smoothed prices first, then the duals themselves; where neither gives a new column, this is the optimum.
            done = len(self._layer)
            self._price(SMOOTHING * self._best_prices + (1 - SMOOTHING) * prices)
            if len(self._layer) == done:
                self._price(prices)
            if len(self._layer) == done:
                break
        # Columns that the last pricing added are in no solution yet.
        shares = np.asarray(self._master.getSolution().col_value)[len(self._limits) :]
        shares = np.append(shares, np.zeros(len(self._layer) - len(shares)))
        columns = [Column(*column) for column in zip(self._layer, self._choice, shares.tolist(), strict=True)]
        return Relaxation(self._best_prices, self._best_bound, columns)

    def _open_master(self) -> None:
        """Rows: budgets, in shares of their limits, then one per layer; one slack per budget at a high price."""
        budgets, layers = len(self._limits), self._problem.layers
        # The slacks, one column each, keep the master feasible until its columns are.
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = budgets, budgets + layers
        lp.col_cost_ = np.full(budgets, 100 * self._spread)
        lp.col_lower_, lp.col_upper_ = np.zeros(budgets), np.full(budgets, INFINITY)
        lp.row_lower_ = np.concatenate([np.full(budgets, -INFINITY), np.ones(layers)])
        lp.row_upper_ = np.concatenate([self._limits / self._unit, np.ones(layers)])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.arange(budgets + 1, dtype=np.int32)
        lp.a_matrix_.index_ = np.arange(budgets, dtype=np.int32)
        lp.a_matrix_.value_ = np.full(budgets, -1.0)
        self._master.passModel(lp)

    def _first_prices(self, start: Doubles | None) -> None:
        """Columns around ``start``, or around one price for equal shares of all budgets."""
        if start is None:
            even = self._spread / self._unit / max(len(self._limits), 1)
            for scale in START_SCALES:
                self._price(even * scale)
            self._price(even * CHEAP_SCALE)
        else:
            for scale in (1.0, 0.5, 2.0, 20.0):
                self._price(start * scale)

    def _price(self, prices: Doubles) -> None:
        """The best assignments at ``prices`` become columns; their value proves a bound."""
        problem = self._problem
        # [layer, head, rule]: losses plus what the rules take of the budgets at these prices
        priced = problem.priced(self._losses, prices).reshape(problem.layers, problem.heads_per_layer, -1)
        choice = best_assignment(priced, problem.rule_limit)  # [layer, head]
        value = float(np.take_along_axis(priced, choice[:, :, None], axis=2).sum())
        # Lagrange: no choice within the limits loses less, whatever the prices.
        bound = value - float(prices @ self._limits)
        if bound > self._best_bound:
            self._best_bound, self._best_prices = bound, prices
        self._add(choice)

    def _add(self, choice: Integers) -> None:
        """Make columns of the master from each layer's assignment in ``[layer, head]`` that it doesn't have yet."""
        problem, budgets = self._problem, len(self._limits)
        new = [layer for layer in range(problem.layers) if self._is_new(layer, choice[layer])]
        if not new:
            return
        # Of the new layers: budgets taken, in shares of their limits, [new, budget], and losses, [new]
        heads, rules = np.arange(choice.size), choice.ravel()
        by_layer = (problem.layers, problem.heads_per_layer)
        used = problem.cost(heads, rules).reshape(*by_layer, budgets).sum(1)[new] / self._unit
        lost = self._losses[heads, rules].reshape(by_layer).sum(1)[new]
        # A column has an entry in every budget's row, and a 1 in the row of its layer.
        index = np.empty((len(new), budgets + 1), dtype=np.int32)
        index[:, :budgets], index[:, budgets] = np.arange(budgets), budgets + np.array(new)
        value = np.hstack([used, np.ones((len(new), 1))])
        start = np.arange(0, index.size, budgets + 1, dtype=np.int32)
        nothing, unlimited = np.zeros(len(new)), np.full(len(new), INFINITY)
        self._master.addCols(
            len(new), lost, nothing, unlimited, index.size, start, index.ravel(), np.ascontiguousarray(value).ravel()
        )

    def _is_new(self, layer: int, choice: Integers) -> bool:
        key = (layer, choice.tobytes())
        if key in self._known:
            return False
        self._known[key] = len(self._layer)
        self._layer.append(layer)
        self._choice.append(choice)
        return True
