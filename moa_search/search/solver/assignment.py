"""The exact choice where layers may use any number of rules: a small integer program around the relaxation."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moa_search.search.solver.highs import INFINITY, Entries, solve_integer_program
from moa_search.search.solver.incumbent import feasible_choice
from moa_search.search.solver.problem import Problem
from moa_search.search.solver.relaxation import Relaxation, relax


@dataclass(frozen=True)
class Cores:
    """The integer programs that are tried one after the other.

    Attributes:
        pairs: (head, rule) pairs beyond one for each head in each of them.
        gap_share: Part of the gap that their own may use up; what they leave out may use the rest.
    """

    pairs: tuple[int, ...]
    gap_share: float


CORES = Cores((1_000, 4_000, 20_000), 0.5)
MANY_CORES = Cores((300, 1_000, 4_000, 20_000), 0.9)
"""Where near ties abound: in more of them a search tree finds no end, and what is left out is worth little more."""

WHOLE = 100_000
"""Pairs up to which the last core may be the whole problem."""

GOOD_ENOUGH = 1e-4
"""Relative gap beyond which only the first core tries to go."""

MOST_NODES = 4_000
"""Nodes of one core's search tree: what isn't proven by then hardly ever is."""

MARGIN = 2e-6
"""HiGHS keeps a row within 1e-6 of its scale; where that broke a budget, it is solved with a limit this much lower."""

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """A choice, or none, and what is proven.

    Attributes:
        choice: Rule per head; None if no feasible choice is known.
        objective: Its loss; inf without one.
        bound: Lower bound of any choice's loss.
        prices: Of the budgets, to start a similar problem with.
    """

    choice: Integers | None
    objective: float
    bound: float
    prices: Doubles

    def good(self, gap: float) -> bool:
        """Whether the choice is proven to be within ``gap`` of the best."""
        return self.choice is not None and self.objective - self.bound <= gap * abs(self.objective)


def assign(
    problem: Problem,
    losses: Doubles,
    *,
    gap: float,
    deadline: float,
    start: Doubles | None = None,
    cores: Cores = CORES,
) -> Found:
    """The best choice, without a limit of rules per layer.

    The relaxation's prices give every pair of head and rule a reduced cost t, and a bound L. A choice with such a
    pair loses at least L + t, so what is best among the pairs below a threshold is best of all, or at least no
    worse than L plus the smallest reduced cost left out. The pairs of the relaxation's own solution are always in.

    Args:
        problem: Costs and limits.
        losses: ``[head, rule]``, scaled to a sum of thousands; inf for what isn't to be chosen.
        gap: Relative gap to stop at.
        deadline: ``time.monotonic()`` at which to stop with what is known.
        start: Prices to begin with.
        cores: How much is tried.
    """
    # A bound and prices, a first choice at those prices, and how much dearer each pair is than its head's best
    relaxation = relax(problem, losses, deadline, start)
    found = _better(problem, losses, None, feasible_choice(problem, losses, relaxation.prices), relaxation)
    reduced = reduced_costs(problem, losses, relaxation.prices)
    possible = np.isfinite(losses)
    count = int(possible.sum())
    mixed = _mixed(problem, relaxation)
    # Cores of growing size, until one proves enough
    for core_number, extra in enumerate((*cores.pairs, count)):
        # What one core's search tree can't prove beyond this, larger ones hardly do.
        enough = max(gap, GOOD_ENOUGH) if core_number else gap
        if found.good(enough) or time.monotonic() > deadline:
            break
        whole = extra == count
        if whole and count > WHOLE:
            break
        threshold = _threshold(reduced, possible, extra)
        core = possible & ((reduced <= threshold) | mixed)
        choice, bound = _solve_core(
            problem, losses, core, cores.gap_share * gap * max(abs(found.bound), 1e-9), deadline
        )
        # A choice with a pair from outside loses at least this much.
        left_out = reduced[possible & ~core]
        if left_out.size:
            bound = min(bound, relaxation.bound + float(left_out.min()))
        found = _better(problem, losses, found, choice, relaxation, bound)
        if not left_out.size:
            break
    return found


def reduced_costs(problem: Problem, losses: Doubles, prices: Doubles) -> Doubles:
    """``[head, rule]``: how much more than its head's best each rule costs at ``prices``."""
    priced = problem.priced(losses, prices)
    return np.asarray(priced - priced.min(1, keepdims=True))


def _threshold(reduced: Doubles, possible: Booleans, extra: int) -> float:
    """The reduced cost that ``extra`` pairs reach besides those that cost nothing."""
    values = reduced[possible]
    wanted = min(int((values <= 1e-12).sum()) + extra, len(values))
    return float(np.partition(values, wanted - 1)[wanted - 1])


def _mixed(problem: Problem, relaxation: Relaxation) -> Booleans:
    """The pairs of the relaxation's own solution: a core that has them is feasible as far as it is."""
    pairs = np.zeros(problem.losses.shape, dtype=bool)
    for column in relaxation.columns:
        if column.share > 1e-9:
            first = column.layer * problem.heads_per_layer
            pairs[np.arange(first, first + problem.heads_per_layer), column.choice] = True
    return pairs


def _better(
    problem: Problem,
    losses: Doubles,
    found: Found | None,
    choice: Integers | None,
    relaxation: Relaxation,
    bound: float = -np.inf,
) -> Found:
    """The better one of two choices, with the better bound."""
    bound = max(bound, relaxation.bound if found is None else found.bound)
    objective = np.inf if choice is None else float(losses[np.arange(len(choice)), choice].sum())
    if found is not None and found.objective <= objective:
        choice, objective = found.choice, found.objective
    return Found(choice, objective, min(bound, objective), relaxation.prices)


def _solve_core(
    problem: Problem, losses: Doubles, core: Booleans, absolute_gap: float, deadline: float
) -> tuple[Integers | None, float]:
    """The best choice among the pairs of ``core``, and a bound for those."""
    # The second try only where HiGHS's tolerance broke a budget; what it proves is of another problem.
    bound = -np.inf
    for margin in (0.0, MARGIN):
        choice, proven = _solve_pairs(problem, losses, core, absolute_gap, deadline, margin)
        bound = max(bound, proven)
        if choice is None or problem.is_feasible(choice):
            break
        choice = None
    return choice, bound


def _solve_pairs(
    problem: Problem, losses: Doubles, core: Booleans, absolute_gap: float, deadline: float, margin: float
) -> tuple[Integers | None, float]:
    """One integer program over the pairs of ``core``, with limits lowered by ``margin``."""
    # Heads with one pair left need no variable: their costs come off the limits.
    fixed = core.sum(1) == 1
    choice = core.argmax(1)
    lost = float(losses[fixed, choice[fixed]].sum())
    used = problem.cost(np.nonzero(fixed)[0], choice[fixed]).sum(0)
    head, rule = np.nonzero(core & ~fixed[:, None])  # [pair] each
    if not head.size:
        return choice, lost
    # One binary per pair. Rows: budgets, in shares of their largest cost, then "exactly one" per open head.
    budgets, pairs = len(used), len(head)
    costs = problem.cost(head, rule)  # [pair, budget]
    unit = np.maximum(np.abs(costs).max(0), 1)
    limits = (problem.all_limits - used) / unit
    slot = (~fixed).cumsum() - 1  # row of a head that isn't fixed
    entries = Entries(
        np.tile(np.arange(budgets), pairs), np.repeat(np.arange(pairs), budgets), (costs / unit).ravel()
    ) + Entries(budgets + slot[head], np.arange(pairs), np.ones(pairs))
    open_heads = int((~fixed).sum())
    outcome = solve_integer_program(
        losses[head, rule],
        entries,
        np.concatenate([np.full(budgets, -INFINITY), np.ones(open_heads)]),
        np.concatenate([limits - margin * np.maximum(1, np.abs(limits)), np.ones(open_heads)]),
        relative_gap=0.0,
        absolute_gap=absolute_gap,
        time_limit_s=max(deadline - time.monotonic(), 0.0),
        max_nodes=MOST_NODES,
    )
    if outcome.values is None:
        return None, -np.inf
    order = np.argsort(outcome.values, kind="stable")
    choice[head[order]] = rule[order]  # per head the pair with the largest value
    return choice, outcome.bound + lost if margin == 0 else -np.inf
