"""Full attention for some heads, sink and recent tokens for the rest, by a score (after DuoAttention)."""

from __future__ import annotations

import numpy as np

from moa_search.errors import BudgetInfeasibleError
from moa_search.search.searchers.base import Searcher
from moa_search.search.space import SearchSpace
from moa_search.search.trade_off import FrontPoint, unweighted


class DuoSearcher(Searcher):
    """As many dense heads as the budgets allow, those with most to lose; the others share one constant span.

    DuoAttention (arXiv 2410.10819) learns its scores by gradient descent on gates; here a head's score is what it
    loses under the short span by the criterion. In its favour, the short span is the best one for the budgets.
    """

    name = "duo"

    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """See `Searcher.choose`."""
        problem = space.problem
        total = sum(w * loss for w, loss in zip(space.weights.values(), space.objectives, strict=True))
        losses = np.asarray(total)
        dense = next(index for index, rule in enumerate(space.rules) if rule.is_dense)
        heads = np.arange(len(losses))
        best, best_loss = None, np.inf
        for short, rule in enumerate(space.rules):
            if rule.beta_256:
                continue
            choice = np.full(len(losses), short, dtype=np.int64)
            choice[~problem.choices[:, short]] = dense
            for head in np.argsort(losses[:, dense] - losses[:, short], kind="stable"):
                longer = choice.copy()
                longer[head] = dense
                if not (problem.used(longer) <= problem.limits).all():
                    break
                choice = longer
            loss = float(losses[heads, choice].sum())
            if loss < best_loss and problem.is_feasible(choice):
                best, best_loss = choice, loss
        if best is None:
            raise BudgetInfeasibleError("no mix of dense heads and one short span keeps the budgets and floors")
        return [unweighted(space.objectives, best)]
