"""Plans to compare, by name: those that are given, and those that are searched."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.api.common import load_profile
from moa_search.errors import ConfigError
from moa_search.options import ReportOptions

if TYPE_CHECKING:
    from moa_search.formats import Plan, PlanLike

DENSITIES = (0.5, 0.25, 0.125)
"""Of a report's plans where no budget is given."""


def named_plans(plan: Sequence[str | PlanLike], taken: Collection[str] = ()) -> dict[str, Plan]:
    """Plans, loaded where a file is given, by the shortest names that tell them apart.

    Args:
        plan: Files, plans or their contents.
        taken: Names that others have.
    """
    from moa_search.formats import Plan

    plans: dict[str, Plan] = {}
    for index, entry in enumerate(plan):
        loaded = Plan.of(entry)
        plans[plan_name(entry, loaded, index, [*taken, *plans])] = loaded
    return plans


def plan_name(entry: Any, plan: Plan, index: int, taken: Collection[str]) -> str:
    """The shortest name that tells a plan from those before: its file's, its folder's, else a number.

    A name that a baseline has gets ``plan`` before it.
    """
    from moa_search.evaluation.compare import is_baseline_name

    candidates = [f"plan {index + 1}"]
    if isinstance(entry, str | os.PathLike):
        path = Path(entry)
        candidates = [path.stem, f"{path.parent.name}/{path.stem}", str(path)]
        if path.stem == "plan":  # moa-search names every chosen plan so; its folder says which
            candidates.insert(0, path.absolute().parent.name)
    elif plan.provenance is not None and plan.provenance.criterion:
        candidates.insert(0, plan.provenance.criterion)
    shown = [f"plan {name}" if is_baseline_name(name) else name for name in candidates]
    return next((name for name in shown if name not in taken), f"plan {index + 1}")


def given_plans(plan: Sequence[str | PlanLike], taken: Collection[str] = ()) -> list[dict[str, Plan]]:
    """The user's plans by name, each in a group of its own; ``taken`` as for `named_plans`."""
    return [{name: loaded} for name, loaded in named_plans(plan, taken).items()]


def searched_plans(options: ReportOptions) -> list[dict[str, Plan]]:
    """Plans of every searcher by name, grouped by budget, kept in a folder: MoA's search can take minutes.

    Each is kept as ``plans/HASH/NAME.json``, where the hash holds what the search depends on: a plan that is there
    needn't be searched again, and whoever evaluates the file finds it under the same name.
    """
    from moa_search.api.searching import search_plan
    from moa_search.formats import Plan
    from moa_search.formats.files import canonical_json, sha256_of
    from moa_search.version import __version__

    densities = options.densities
    if densities is None:
        densities = () if options.kv_shares else DENSITIES
    budgets = [("density", density, "") for density in dict.fromkeys(densities)]
    budgets += [("kv_share", share, " of bytes") for share in dict.fromkeys(options.kv_shares)]
    if not options.searchers or not budgets:
        raise ConfigError("profile: nothing to search for; give --searchers, and --densities or --kv-shares")
    statistics = load_profile(options.profile)
    lengths = options.budget_lengths and list(options.budget_lengths)
    asked = canonical_json([statistics.checksum, lengths, __version__])
    kept = Path(options.output) / "plans" / sha256_of(asked).removeprefix("sha256:")[:8]
    groups = []
    for budget, share, unit in budgets:
        group: dict[str, Plan] = {}
        for searcher in dict.fromkeys(options.searchers):
            name = f"{searcher} @ {share:.15g}{unit}"
            path = kept / f"{name}.json"
            if path.exists():
                group[name] = Plan.load(path)
            else:
                group[name] = search_plan(statistics, **{budget: [share]}, searcher=searcher, budget_lengths=lengths)
                group[name].save(path)
        groups.append(group)
    return groups
