"""One rule for all heads, as StreamingLLM has."""

from __future__ import annotations

import numpy as np

from moa_search.errors import BudgetInfeasibleError
from moa_search.search.searchers.base import Searcher
from moa_search.search.space import SearchSpace
from moa_search.search.trade_off import FrontPoint, unweighted
from moa_search.spans import attention_density


class UniformSearcher(Searcher):
    """The one rule for all heads that uses most of the budgets; of equals, the one that computes most."""

    name = "uniform"
    uses_losses = False

    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """See `Searcher.choose`."""
        problem, heads = space.problem, len(space.problem.losses)
        choices = [np.full(heads, rule, dtype=np.int64) for rule in range(len(space.rules))]
        feasible = [choice for choice in choices if problem.is_feasible(choice)]
        if not feasible:
            raise BudgetInfeasibleError("no single rule for all heads keeps the budgets and floors together")
        longest = max(row.spec.length for row in space.rows)
        min_span = space.profile.header.sink + space.profile.header.block
        best = max(
            feasible,
            key=lambda choice: (
                float((problem.used(choice) / np.maximum(problem.limits, 1)).sum()),
                attention_density([space.rules[choice[0]]], longest, min_span),
            ),
        )
        return [unweighted(space.objectives, best)]
