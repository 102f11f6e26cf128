"""From a profile to plans."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import Criterion, Progress, require_positive

if TYPE_CHECKING:
    from moa_search.formats import Plan, Profile
    from moa_search.search import Front

__all__ = ["search_front", "search_plan"]


def search_front(
    profile: str | Profile,
    *,
    density: Sequence[float] = (0.25,),
    budget_lengths: Sequence[int] | None = None,
    criterion: Criterion = "signed",
    searcher: Literal["exact", "uniform"] = "exact",
    time_limit_s: float = 60.0,
    front_steps: int = 6,
    output: str | None = None,
    progress: Progress | None = None,
) -> Front:
    """Find the best spans for a memory budget.

    Args:
        profile: Profile file; in Python also a Profile.
        density: Largest share of the KV cache to keep: one for all lengths, or one for each.
        budget_lengths: Lengths in tokens that the densities hold at, profiled or not; by default the profiled ones
            and, with the last density, the model's full context.
        criterion: How effects on the loss are summed up; signed did best on held-out data (docs/results.md),
            elementwise is MoA's own, recall needs no gradient.
        searcher: exact chooses a rule per KV head; uniform gives every head the same one, as StreamingLLM does.
        time_limit_s: Seconds for each solve; when they run out, the best plan found is kept with its gap.
        front_steps: Steps of the lattice of weights over the profiled lengths.
        output: Folder to write plan.json and front/ to.
        progress: Told the solves done and in all.

    Returns:
        The front; its first plan is the chosen one.

    Raises:
        MoAError: The profile, a budget or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.formats import Profile
    from moa_search.search import search_profile
    from moa_search.search.output import write_front

    require_positive(time_limit_s=time_limit_s, front_steps=front_steps)
    if budget_lengths is not None:
        require_positive(budget_lengths=min(budget_lengths, default=0))
    statistics = Profile.load(profile) if isinstance(profile, str | os.PathLike) else profile
    front = search_profile(
        statistics,
        list(density),
        budget_lengths=budget_lengths,
        criterion=criterion,
        searcher=searcher,
        time_limit_s=time_limit_s,
        front_steps=front_steps,
        progress=progress,
    )
    if output is not None:
        write_front(front, output)
    return front


def search_plan(profile: str | Profile, *, density: float = 0.25, **options: Any) -> Plan:
    """The chosen plan of `search_front` for one density at every profiled length.

    Args:
        profile: Profile or its file.
        density: Largest share of the KV cache to keep.
        options: Further arguments of `search_front`.

    Raises:
        MoAError: As `search_front`.
    """
    return search_front(profile, density=[density], **options).chosen
