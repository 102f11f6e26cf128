"""From a setting of the outer loop's knobs to a plan: the profile's losses, weighed anew and solved exactly."""

from __future__ import annotations

import dataclasses

import numpy as np

from moa_search.formats.plan import Plan
from moa_search.formats.profile import Profile
from moa_search.options import SearchOptions
from moa_search.search.searchers import SEARCHERS
from moa_search.search.searching import make_space, plan_of
from moa_search.search.solver.exact import solve_exact
from moa_search.search.space import SearchSpace
from moa_search.search.trade_off import FrontPoint
from moa_search.search.tuning.knobs import Knobs, weigh


class Decoder:
    """Decodes `Knobs` under fixed budgets; with a density among the knobs, under that density.

    Args:
        profile: Influence statistics.
        options: Budgets and all else; the criterion and the lengths' weights come from the knobs.
    """

    def __init__(self, profile: Profile, options: SearchOptions) -> None:
        self._profile = profile
        self._options = options.replace(length_weights={}, front_steps=0, robust=0.0)
        self._spaces: dict[tuple[str, float | None], SearchSpace] = {}

    def __call__(self, knobs: Knobs) -> Plan:
        """The plan of a setting.

        Raises:
            BudgetInfeasibleError: No plan keeps the budgets.
            SolverError: None was found in time.
        """
        space = self._space(knobs.criterion, knobs.density)
        losses = [loss.robust(knobs.robust) for loss in space.losses]
        problem = dataclasses.replace(space.problem, losses=weigh(losses, space.heads_per_layer, knobs))
        solution = solve_exact(problem, time_limit_s=self._options.time_limit_s)
        weights = np.exp([*knobs.length_log_weights, 0.0])
        point = FrontPoint(tuple((weights / weights.sum()).tolist()), (), solution)
        plan = plan_of(space, SEARCHERS["exact"], point)
        assert plan.provenance is not None
        origin = plan.provenance.model_copy(update={"searcher": "tune", "knobs": _named(knobs)})
        return plan.model_copy(update={"provenance": origin})

    def _space(self, criterion: str, density: float | None) -> SearchSpace:
        key = (criterion, density)
        if key not in self._spaces:
            if density is not None:
                self._spaces.clear()  # each trial has a density of its own
            asked = self._options.density if density is None else [density]
            options = self._options.replace(criterion=criterion, density=asked)
            self._spaces[key] = make_space(self._profile, options, SEARCHERS["exact"])
        return self._spaces[key]


def _named(knobs: Knobs) -> dict[str, float | str]:
    """The knobs as a plan keeps them, by name."""
    named: dict[str, float | str] = {f"depth_{index}": value for index, value in enumerate(knobs.depth)}
    named |= {f"length_log_weight_{index}": value for index, value in enumerate(knobs.length_log_weights)}
    others = ("exponent", "layer_exponent", "robust")
    return named | {name: getattr(knobs, name) for name in others}
