"""The searchers side by side at the same budgets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from moa_search.errors import BudgetInfeasibleError
from moa_search.formats.plan import Plan
from moa_search.formats.profile import Profile
from moa_search.options import SearchOptions
from moa_search.progress import progress
from moa_search.search.losses import plan_losses
from moa_search.search.searchers import BIT_SEARCHERS, SEARCHERS, find_searcher
from moa_search.search.searching import candidate_tiers, search_profile


@dataclass(frozen=True)
class Candidate:
    """What one searcher chose.

    Attributes:
        searcher: Its name.
        plan: Its chosen plan; None where it can't keep the budgets.
        losses: Predicted loss and its standard error by length, by the criterion of the comparison.
        seconds: CPU time of the search.
        note: Why there is no plan.
    """

    searcher: str
    plan: Plan | None
    losses: dict[int, tuple[float, float]]
    seconds: float
    note: str = ""


def default_searchers(profile: Profile, options: SearchOptions) -> list[str]:
    """All that the budget leaves room for: those that choose bits only where there are any to choose.

    Raises:
        ConfigError: The profile doesn't know the bits that are asked for.
    """
    return [*SEARCHERS, *(BIT_SEARCHERS if len(candidate_tiers(profile, options)) > 1 else ())]


def compare_searchers(
    profile: Profile,
    options: SearchOptions,
    searchers: Sequence[str],
) -> list[Candidate]:
    """The chosen plan of every searcher, judged by one criterion, ``options.criterion``.

    Args:
        profile: Influence statistics.
        options: Budgets and all else; ``searcher`` doesn't count.
        searchers: Names of searchers. One that can't keep the budgets stays without a plan, unless none can.

    Raises:
        MoAError: As `search_profile`.
    """
    for name in searchers:
        find_searcher(name)
    candidates: list[Candidate] = []
    refused: list[BudgetInfeasibleError] = []
    for name in progress(searchers, what="Searching", unit="searcher"):
        began = time.process_time()
        try:
            plan = search_profile(profile, options.replace(searcher=name)).chosen
        except BudgetInfeasibleError as error:
            refused.append(error)
            candidates.append(Candidate(name, None, {}, time.process_time() - began, str(error)))
            continue
        seconds = time.process_time() - began
        losses = predicted_losses(profile, plan, options.criterion)
        candidates.append(Candidate(name, plan, losses, seconds))
    if len(refused) == len(candidates):
        raise refused[0]
    return candidates


def predicted_losses(profile: Profile, plan: Plan, criterion: str) -> dict[int, tuple[float, float]]:
    """Loss and standard error that ``profile`` predicts for any plan of its model, by profiled length.

    Args:
        profile: Influence statistics; its sink and block are the plan's.
        plan: A plan.
        criterion: One of `moa_search.formats.criteria.CRITERIA`.
    """
    by_length, choice = plan_losses(profile, plan, criterion)
    return {losses.length: losses.of_choice(choice) for losses in by_length}
