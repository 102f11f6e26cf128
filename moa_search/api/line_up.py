"""What is measured side by side: baselines, plans that are given, and plans that are searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moa_search.api.common import Searcher
from moa_search.api.evaluating import named_plans
from moa_search.errors import ConfigError

if TYPE_CHECKING:
    from moa_search.evaluation.compare import Variant
    from moa_search.formats import Plan, Profile

__all__ = ["LineUp", "given_plans", "make_line_up", "searched_plans"]


@dataclass(frozen=True)
class LineUp:
    """What is measured.

    Attributes:
        variants: Baselines and plans, in the order of the tables.
        plans: Plans by the name of their variant.
        uniform: For a plan's variant, the uniform one that keeps as much.
        rivals: Pairs of variants that differ in nothing but the search.
    """

    variants: list[Variant]
    plans: dict[str, Plan]
    uniform: dict[str, str]
    rivals: list[tuple[str, str]]


def given_plans(plan: Sequence[str | Plan], baselines: Sequence[str]) -> dict[str, dict[str, Plan]]:
    """The user's plans by name, each in a group of its own."""
    groups: dict[str, dict[str, Plan]] = {}
    for name, loaded in named_plans(plan).items():
        shown = f"plan {name}" if name in baselines else name
        groups[f"like {shown}"] = {shown: loaded}
    return groups


def searched_plans(
    profile: str | Profile,
    searchers: Sequence[Searcher],
    densities: Sequence[float],
    budget_lengths: Sequence[int] | None,
    folder: Path,
) -> dict[str, dict[str, Plan]]:
    """Plans of every searcher by name, grouped by density, kept in a folder: MoA's search can take minutes.

    A file's name holds a hash of what the search depends on, so that a plan that is there needn't be searched again.
    """
    from moa_search.api.options import load_profile
    from moa_search.api.searching import search_plan
    from moa_search.formats import Plan
    from moa_search.formats.files import canonical_json, sha256_of
    from moa_search.version import __version__

    if not searchers or not densities:
        raise ConfigError("profile: nothing to search for; give --searchers and --densities")
    statistics = load_profile(profile)
    groups: dict[str, dict[str, Plan]] = {}
    for density in dict.fromkeys(densities):
        for searcher in dict.fromkeys(searchers):
            lengths = None if budget_lengths is None else list(budget_lengths)
            asked = canonical_json([statistics.checksum, searcher, density, lengths, __version__])
            path = folder / f"{searcher}-{density:g}-{sha256_of(asked).removeprefix('sha256:')[:8]}.json"
            if path.exists():
                made = Plan.load(path)
            else:
                made = search_plan(statistics, density=density, searcher=searcher, budget_lengths=lengths)
                made.save(path)
            groups.setdefault(f"@ {density:g}", {})[f"{searcher} @ {density:g}"] = made
    return groups


def make_line_up(groups: Mapping[str, Mapping[str, Plan]], baselines: Sequence[str]) -> LineUp:
    """Dense attention, then of each group its uniform spans and its plans; the first is set beside the rest."""
    from moa_search.evaluation.compare import Variant, as_it_runs, require_baselines, uniform_like

    require_baselines(baselines, any_plan=bool(groups))
    variants = [Variant("dense", lambda length: None)] if "dense" in baselines else []
    line_up = LineUp(variants, {}, {}, [])
    for label, plans in groups.items():
        first = next(iter(plans))
        if "uniform" in baselines:
            variants.append(Variant(f"uniform {label}", partial(uniform_like, plans[first])))
            line_up.uniform.update(dict.fromkeys(plans, f"uniform {label}"))
            line_up.rivals.append((first, f"uniform {label}"))
        line_up.rivals.extend((first, other) for other in plans if other != first)
        for name, made in plans.items():
            variants.append(Variant(name, partial(as_it_runs, made)))
            line_up.plans[name] = made
    if not variants:
        raise ConfigError("nothing to evaluate: give --plan, --profile, or --baselines dense")
    return line_up
