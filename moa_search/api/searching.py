"""From a profile to plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moa_search.api.common import (
    load_profile,
    model_and_tokenizer,
    note_missing_bits,
    require_profile_fits,
    require_replaceable,
    require_writable_folder,
    with_a_budget,
)
from moa_search.api.validating import try_front
from moa_search.errors import ConfigError
from moa_search.options import FrontOptions, ValidationOptions, takes

if TYPE_CHECKING:
    from moa_search.formats import Plan, Profile
    from moa_search.search import Front


@takes(FrontOptions)
def search_front(profile: str | Profile, options: FrontOptions) -> Front:
    """Find the best spans for a memory budget.

    Args:
        profile: Profile file.
        options: As keywords, each described in `FrontOptions`.

    Returns:
        The front with its chosen plan.

    Raises:
        MoAError: The profile, a budget or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.search import search_profile, search_several

    several = _several(options)
    require_writable_folder(options.output)
    if not options.overwrite and options.validate is None:
        require_replaceable(options.output)
    statistics = load_profile(profile)
    network = None
    if options.validate is not None:  # before the search: a wrong model is told at once, and nothing is written
        network = model_and_tokenizer(options.validate, trust_remote_code=options.trust_remote_code)
        require_profile_fits(statistics, network[0])
    if several is not None:
        shares, budget = several
        options = options.replace(**{budget: shares[:1]})
    options = with_a_budget(options)
    note_missing_bits(statistics, options)
    front = search_profile(statistics, options) if several is None else search_several(statistics, options, *several)
    folder = None if options.output is None else Path(options.output)
    if folder is not None:
        front.save(folder)
        if several is not None:
            from moa_search.inspection.plots import save_budgets_plot

            save_budgets_plot(front, folder / "front" / "budgets.png")
    if network is not None:
        front, _ = try_front(front, network, ValidationOptions(), folder=folder)
    return front


def _several(options: FrontOptions) -> tuple[list[float], Literal["density", "kv_share"]] | None:
    """Budgets that a plan is asked for each, and the option that they are values of.

    Raises:
        ConfigError: One plan is asked for too, or both kinds are.
    """
    if options.densities and options.kv_shares:
        raise ConfigError("densities and kv_shares ask for one plan each: give one of them")
    if options.densities and options.density:
        raise ConfigError("density asks for one plan, densities for one each: give one of them")
    if options.kv_shares and options.kv_share:
        raise ConfigError("kv_share asks for one plan, kv_shares for one each: give one of them")
    if options.densities:
        return list(options.densities), "density"
    return (list(options.kv_shares), "kv_share") if options.kv_shares else None


@takes(FrontOptions)
def search_plan(profile: str | Profile, options: FrontOptions) -> Plan:
    """The chosen plan of `search_front`, alone unless ``front_steps`` asks for more.

    Args:
        profile: Profile file.
        options: As keywords, each described in `FrontOptions`.

    Raises:
        MoAError: As `search_front`.
    """
    if options.front_steps is None:
        options = options.replace(front_steps=0)
    found: Front = search_front.__wrapped__(profile, options)  # type: ignore[attr-defined]
    return found.chosen
