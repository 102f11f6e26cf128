"""Ways to spend a budget in bytes that the exact search over spans and bits has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from moa_search.errors import BudgetInfeasibleError, SolverError
from moa_search.search.searchers.base import Searcher
from moa_search.search.searchers.exact import ExactSearcher
from moa_search.search.solver import Problem, Solution, solve_exact
from moa_search.search.space import SearchSpace
from moa_search.search.trade_off import FrontPoint, point_of, unweighted, weigh

Integers = npt.NDArray[np.int64]


class SpansSearcher(ExactSearcher):
    """The exact search over spans alone: 16 bits everywhere."""

    name = "spans"
    takes_tiers = False


class DenseBitsSearcher(Searcher):
    """No token dropped, one precision for all: of those that fit the largest, of equals the one that loses least."""

    name = "dense-bits"
    takes_tiers = True

    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """See `Searcher.choose`."""
        problem, dense = space.problem, _dense(space)
        fits = [option for option in dense if problem.is_feasible(_everywhere(problem, option))]
        if not fits:
            _refuse(space, dense, "dense attention in the fewest bits")
        _, losses = weigh(space.objectives, problem, list(space.weights.values()))
        size = problem.costs.sum(0)
        return [
            unweighted(space.objectives, _everywhere(problem, max(fits, key=lambda x: (size[x], -losses[:, x].sum()))))
        ]


class UniformBitsSearcher(Searcher):
    """One rule and one precision for all heads: of those that fit the pair that loses least."""

    name = "uniform-bits"
    takes_tiers = True

    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """See `Searcher.choose`."""
        problem = space.problem
        options = range(problem.losses.shape[1])
        fits = [option for option in options if problem.is_feasible(_everywhere(problem, option))]
        if not fits:
            _refuse(space, options, "the smallest span in the fewest bits, with the floors,")
        _, losses = weigh(space.objectives, problem, list(space.weights.values()))
        return [
            unweighted(space.objectives, _everywhere(problem, min(fits, key=lambda option: losses[:, option].sum())))
        ]


class OneBitsSearcher(Searcher):
    """The best rule per head under one precision for all: of all precisions the one that loses least, proven."""

    name = "one-bits"
    takes_tiers = True
    proves = True
    looks_ahead = True

    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """See `Searcher.choose`."""
        problem = space.problem
        weights, losses = weigh(space.objectives, problem, list(space.weights.values()))
        rules = len(space.rules)
        found: list[Solution] = []
        for tier in range(len(space.tiers)):
            # The rules under this precision as a problem of their own
            here = slice(tier * rules, (tier + 1) * rules)
            allowed = None if problem.allowed is None else problem.allowed[:, here]
            alone = Problem(
                losses[:, here],
                problem.costs[:, here],
                problem.limits,
                heads_per_layer=problem.heads_per_layer,
                rules_per_layer=problem.rules_per_layer,
                allowed=allowed,
            )
            if (alone.costs.min(1) * len(losses) > alone.limits).any():
                continue
            try:
                solution = solve_exact(alone, time_limit_s=space.options.time_limit_s)
            except SolverError:
                continue
            found.append(dataclasses.replace(solution, choice=solution.choice + tier * rules))
        if not found:
            _refuse(space, range(problem.losses.shape[1]), "the smallest spans in the fewest bits, with the floors,")
        best = min(found, key=lambda solution: solution.objective)
        bound = min(solution.bound for solution in found)
        return [point_of(space.objectives, weights, dataclasses.replace(best, bound=min(bound, best.objective)))]


class LayerBitsSearcher(Searcher):
    """No token dropped, the best bits of keys and of values for every layer, proven, by the influence measured.

    KVTuner (arXiv 2502.04420) searches the same choices by an evolutionary search over calibrated accuracy.
    """

    name = "layer-bits"
    takes_tiers = True
    proves = True

    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """See `Searcher.choose`."""
        problem, dense = space.problem, _dense(space)
        if (problem.costs[:, dense].min(1) * len(problem.losses) > problem.limits).any():
            _refuse(space, dense, "dense attention in the fewest bits")
        weights, losses = weigh(space.objectives, problem, list(space.weights.values()))
        alone = Problem(
            losses[:, dense],
            problem.costs[:, dense],
            problem.limits,
            heads_per_layer=problem.heads_per_layer,
            rules_per_layer=1,
        )
        solution = solve_exact(alone, time_limit_s=space.options.time_limit_s)
        chosen = dataclasses.replace(solution, choice=np.asarray(dense)[solution.choice])
        return [point_of(space.objectives, weights, chosen)]


def _dense(space: SearchSpace) -> list[int]:
    """The options that drop no token, one for each tier."""
    rule = next(index for index, rule in enumerate(space.rules) if rule.is_dense)
    return [tier * len(space.rules) + rule for tier in range(len(space.tiers))]


def _everywhere(problem: Problem, option: int) -> Integers:
    return np.full(len(problem.losses), option, dtype=np.int64)


def _refuse(space: SearchSpace, options: Iterable[int], what: str) -> NoReturn:
    """Name the first budget that even the cheapest of ``options`` breaks, and the least that would do.

    Raises:
        BudgetInfeasibleError: Always.
    """
    cheapest, heads = list(options), len(space.problem.losses)
    for row in space.rows:
        least = heads * int(row.costs[cheapest].min())
        if least > row.limit:
            shown = row.spec.show(row.fixed + row.step * least, up=True)
            raise BudgetInfeasibleError(f"{row.spec.text} can't be met: {what} already takes {shown}")
    raise BudgetInfeasibleError(f"the budgets can't be met together by {what}")
