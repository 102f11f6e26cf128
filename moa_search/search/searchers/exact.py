"""The exact search, and the two baselines that only restrict it."""

from __future__ import annotations

import dataclasses

from moa_search.search.grouping import solve_in_groups
from moa_search.search.searchers.base import Searcher
from moa_search.search.solver import Problem, Solution, solve_exact
from moa_search.search.space import SearchSpace
from moa_search.search.trade_off import FrontPoint, trade_off


class ExactSearcher(Searcher):
    """The best rule and bits for every KV head, proven, with the front over the profiled lengths."""

    name = "exact"
    proves = True
    looks_ahead = True
    takes_tiers = True
    takes_groups = True
    rules_per_layer: int | None = None

    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """See `Searcher.choose`."""
        problem = space.problem
        if self.rules_per_layer is not None:
            problem = dataclasses.replace(problem, rules_per_layer=self.rules_per_layer)
        options, groups = space.options, space.options.groups

        def solve(asked: Problem) -> Solution:
            return solve_exact(asked, time_limit_s=options.time_limit_s)

        return trade_off(
            space.objectives,
            problem,
            solve if groups is None else lambda asked: solve_in_groups(asked, groups, solve),
            steps=options.front_steps if groups is None else 0,
            weights=tuple(space.weights.values()),
        )


class PerLayerSearcher(ExactSearcher):
    """The best rule for every layer, the same for all its heads (as in PyramidKV's budgets per layer)."""

    name = "per-layer"
    looks_ahead = False
    takes_groups = False
    rules_per_layer = 1


class RecallSearcher(ExactSearcher):
    """The exact search by the attention mass that is lost: needs no gradient, knows no loss."""

    name = "recall"
    looks_ahead = False
    takes_tiers = False
    takes_groups = False
    criterion = "recall"
