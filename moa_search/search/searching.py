"""From a profile and budgets to plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Literal

from moa_search.errors import ConfigError
from moa_search.formats.criteria import require_criterion
from moa_search.formats.plan import Plan
from moa_search.formats.profile import Profile
from moa_search.formats.provenance import Provenance
from moa_search.formats.tiers import PLAIN, PLAIN_BITS, Tier
from moa_search.options import BudgetOptions, SearchOptions
from moa_search.progress import progress
from moa_search.search.budgets import BudgetSpec, used
from moa_search.search.budgets.specs import BYTE_KINDS
from moa_search.search.front import BudgetUse, Front
from moa_search.search.searchers import Searcher, find_searcher
from moa_search.search.space import SearchSpace, density_specs
from moa_search.search.trade_off import FrontPoint, knee
from moa_search.spans import DENSE
from moa_search.version import __version__

AHEAD = 2
"""Furthest length that counts by default, in multiples of the longest profiled one."""


def search_profile(profile: Profile, options: SearchOptions) -> Front:
    """Search the front of plans that keep the budgets.

    Args:
        profile: Influence statistics.
        options: Budgets, criterion, searcher and all else.

    Raises:
        ConfigError: An unknown criterion or searcher, or an option out of range.
        BudgetInfeasibleError: A budget that no plan keeps.
        SolverError: No plan found in time.
    """
    searcher = find_searcher(options.searcher)
    space = make_space(profile, options, searcher)
    points = searcher.choose(space)
    chosen = points[0].solution.choice
    plans = [plan_of(space, searcher, point) for point in points]
    return Front(plans, usage=[BudgetUse(row.spec, used(row, chosen)) for row in space.rows])


def search_several(
    profile: Profile,
    options: SearchOptions,
    shares: Sequence[float],
    budget: Literal["density", "kv_share"] = "density",
) -> Front:
    """The best plan for each of several budgets, and the one where keeping more stops paying.

    Args:
        profile: Influence statistics.
        options: All else; what ``budget`` names and ``front_steps`` don't count.
        shares: Each holds at every budget length.
        budget: The option that they are values of: shares of tokens, or of bytes.

    Raises:
        MoAError: As `search_profile`.
    """
    asked = sorted(set(shares))
    fronts = [
        search_profile(profile, options.replace(**{budget: [share]}, front_steps=0))
        for share in progress(asked, what="Searching", unit="budget")
    ]
    plans = [front.chosen for front in fronts]
    found = knee(asked, [_weighted_loss(plan, options.length_weights) for plan in plans])
    chosen = asked.index(shares[0]) if found is None else found
    return Front(plans, chosen, fronts[chosen].usage, tuple(asked), found is not None)


def _weighted_loss(plan: Plan, weights: Mapping[int, float]) -> float:
    """The plan's predicted losses, each length weighing as asked, by default the same."""
    return sum(
        weights.get(metrics.length, 0.0 if weights else 1.0) * (metrics.loss or 0.0) for metrics in plan.predicted
    )


def make_space(profile: Profile, options: SearchOptions, searcher: Searcher) -> SearchSpace:
    """What ``searcher`` chooses from.

    Raises:
        ConfigError: An option can't be used.
        BudgetInfeasibleError: A budget that no plan keeps.
    """
    require_criterion(options.criterion)
    _require_groups_alone(options, searcher)
    header = profile.header
    if options.predict_lengths is None:
        options = options.replace(predict_lengths=_ahead(profile, options) if searcher.looks_ahead else ())
    density_specs(profile, options)  # rules are fitted to its lengths, so an absurd one has to be refused before
    lengths = [*profile.lengths, *(options.budget_lengths or ()), *(options.predict_lengths or ())]
    rules = searcher.rules(lengths, sink=header.sink, block=header.block)
    tiers = candidate_tiers(profile, options) if searcher.takes_tiers else [PLAIN]
    return SearchSpace.build(profile, options, rules, tiers, searcher.criterion or options.criterion)


def _require_groups_alone(options: SearchOptions, searcher: Searcher) -> None:
    if options.groups is None:
        return
    if not searcher.takes_groups:
        raise ConfigError(f"groups: searcher {searcher.name} doesn't choose rules for groups; leave groups out")
    for name, value in (("rules_per_layer", options.rules_per_layer), ("front_steps", options.front_steps)):
        if value:
            raise ConfigError(f"groups and {name} exclude each other; leave one out")


def candidate_tiers(profile: Profile, options: SearchOptions) -> list[Tier]:
    """Every pair of bits of keys and of values that a search chooses from, the most precise first.

    Raises:
        ConfigError: The profile doesn't know what the options ask for.
    """
    known = (PLAIN_BITS, *(() if profile.header.tiers is None else profile.header.tiers.bits))
    if options.tiers is None:
        bits = known if counts_bytes(options) else (PLAIN_BITS,)
    else:
        bits = tuple(sorted(set(options.tiers), reverse=True))
        if not bits:
            raise ConfigError("tiers names no bits; give some of 16, 8, 4, 3 and 2, or leave it out")
        unknown = [str(one) for one in bits if one not in known]
        if unknown:
            raise ConfigError(
                f"tiers: the profile knows {', '.join(map(str, known))} bits, not {', '.join(unknown)}; "
                f"measure them with moa-profile --tiers {' '.join(map(str, bits))}"
            )
    return [(key, value) for key in bits for value in bits]


def counts_bytes(options: BudgetOptions) -> bool:
    """Whether a budget is in bytes, where fewer bits save something."""
    return bool(options.kv_share) or any(BudgetSpec.parse(text).kind in BYTE_KINDS for text in options.budget)


def _ahead(profile: Profile, options: SearchOptions) -> tuple[int, ...]:
    """Twice the longest profiled length, where the model goes so far and a budget holds beyond the profiled ones.

    Rules that are best at the profiled lengths alone use up freedom that these don't punish (docs/results-searchers.md,
    "Beyond the profiled lengths"). Without a budget there, looking ahead would only grow spans where nothing limits
    them.
    """
    ahead, context = AHEAD * profile.lengths[-1], profile.header.model.context_length
    asked = density_specs(profile, options) if options.budget_lengths else []
    asked += map(BudgetSpec.parse, options.budget)
    by_default = bool(options.density or options.kv_share) and not options.budget_lengths
    budgeted = by_default or ahead <= max((spec.length for spec in asked), default=0)
    return (ahead,) if budgeted and (context is None or ahead <= context) else ()


def plan_of(space: SearchSpace, searcher: Searcher, point: FrontPoint) -> Plan:
    """The plan of a choice, with how it came about and what it is predicted to lose."""
    model, header, choice = space.profile.header.model, space.profile.header, point.solution.choice
    by_layer = [[(DENSE, PLAIN)] * space.heads_per_layer for _ in range(model.num_hidden_layers)]
    for layer, chosen in zip(header.searchable_layers, choice.reshape(-1, space.heads_per_layer), strict=True):
        by_layer[layer] = [space.option(int(index)) for index in chosen]
    known = space.profile.tiers
    plan = Plan.from_rules(
        [[rule for rule, _ in layer] for layer in by_layer],
        model,
        native_layers=header.native_layers,
        tiers=[[tier for _, tier in layer] for layer in by_layer],
        transforms=None if known is None else known.transforms,
        sink=header.sink,
        block=header.block,
        anchor=space.options.anchor,
    )
    metrics = []
    for loss in space.losses:
        value, error = loss.of_choice(choice)
        told = {"loss": value, "loss_error": error, "extrapolated": loss.length not in space.profile.lengths}
        metrics.append(plan.metrics(loss.length).model_copy(update=told))
    proves = searcher.proves
    weights = {str(length): w for length, w in zip(space.weights, point.weights, strict=True)}
    provenance = Provenance(
        searcher=searcher.name,
        profile=space.profile.checksum,
        criterion=(searcher.criterion or space.options.criterion) if searcher.uses_losses else None,
        budgets=tuple(row.budget for row in space.rows),
        length_weights=weights if proves else {},
        objective=point.solution.objective if proves else None,
        dual_bound=point.solution.bound if proves else None,
        gap=point.solution.gap if proves else None,
        versions={"moa-search": __version__, "highspy": version("highspy")} if proves else {"moa-search": __version__},
    )
    return plan.model_copy(update={"provenance": provenance, "predicted": tuple(metrics)})
