"""From the words of a command line to what a search takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa_search.formats import Profile
    from moa_search.search import SearchOptions

__all__ = ["DEFAULT_DENSITY", "load_profile", "search_options"]

DEFAULT_DENSITY = 0.25


def load_profile(profile: str | Profile) -> Profile:
    """A profile, or what its file holds."""
    from moa_search.formats import Profile

    return Profile.load(profile) if isinstance(profile, str | os.PathLike) else profile


def search_options(
    profile: Profile,
    *,
    density: Sequence[float] | None = None,
    budget: Sequence[str] = (),
    budget_lengths: Sequence[int] | None = None,
    hardware: str | None = None,
    length_weights: Sequence[str] = (),
    layer_floor: Sequence[str] = (),
    **others: Any,
) -> SearchOptions:
    """Options of a search, parsed and checked; a quarter of the KV cache if no budget is named.

    Args:
        profile: What will be searched.
        density: As for `search_front`, like all that follow.
        budget: As the user wrote them.
        budget_lengths: Lengths of the densities.
        hardware: Name or file.
        length_weights: As the user wrote them.
        layer_floor: As the user wrote them.
        others: Further attributes of `SearchOptions`, by their names there.

    Raises:
        ConfigError: One of them can't be used.
    """
    from moa_search.api.common import require_positive
    from moa_search.search import SearchOptions
    from moa_search.search.budgets import Hardware
    from moa_search.search.space import parse_floors, parse_weights

    if budget_lengths is not None:
        require_positive(budget_lengths=min(budget_lengths, default=0))
    for name in ("min_span", "weights_bytes"):
        if others.get(name) is not None:
            require_positive(**{name: others[name]})
    return SearchOptions(
        density=list(density or ([] if budget else [DEFAULT_DENSITY])),
        budgets=tuple(budget),
        budget_lengths=budget_lengths,
        hardware=None if hardware is None else Hardware.find(hardware),
        length_weights=parse_weights(length_weights),
        layer_floors=parse_floors(layer_floor, profile.header.model.num_hidden_layers, profile.header.native_layers),
        **others,
    )
