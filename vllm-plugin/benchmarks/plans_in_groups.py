"""Plans that hold equally much in vLLM in three ways, as files, for `moa-eval report`.

    python vllm-plugin/benchmarks/plans_in_groups.py --held 0.5 0.25 0.125 --output FOLDER

``envelope-50`` is a free plan whose groups hold at most 50 % at each length; ``filled-50`` lets its heads attend all
that their group holds at the longest length; ``searched-50`` chooses the rules along with the groups (``--groups``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moa_search import Plan, Profile, SpanRule, search_plan
from moa_search.formats.paged import grouped
from moa_search.head_groups import GROUPS, HeadGroups
from moa_search.spans import span

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "profiles" / "smollm2-135m-instruct" / "profile.safetensors"
STEPS = 7
"""Halvings of what a free plan's density may be."""


def main() -> None:
    """Search and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="shares of a dense cache")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="tokens at which they hold")
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--profile", type=Path, default=PROFILE)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    profile = Profile.load(options.profile)
    for share in options.held:
        envelope, groups = widest(profile, share, options.lengths, options.groups)
        searched = search_plan(profile, density=share, groups=options.groups)
        plans = {"envelope": envelope, "filled": filled(envelope, groups), "searched": searched}
        for way, plan in plans.items():
            plan.save(options.output / f"{way}-{share * 100:g}.json")
            kept = [
                f"{plan.density(n):.3f} kept, {grouped(plan, n, options.groups).held(n):.3f} held at {n}"
                for n in options.lengths
            ]
            print(f"{way}-{share * 100:g}: {'; '.join(kept)}", flush=True)


def widest(profile: Profile, share: float, lengths: list[int], count: int) -> tuple[Plan, HeadGroups]:
    """The free plan of the largest density, of those tried, whose groups hold at most so much; and its groups."""
    low, high = 0.4 * share, share
    best = search_plan(profile, density=low)
    assert fits(best, share, lengths, count), "its groups hold too much at two fifths of the density"
    for _ in range(STEPS):
        middle = (low + high) / 2
        plan = search_plan(profile, density=middle)
        if fits(plan, share, lengths, count):
            low, best = middle, plan
        else:
            high = middle
    return best, grouped(best, max(lengths), count)


def fits(plan: Plan, share: float, lengths: list[int], count: int) -> bool:
    """Whether its groups hold at most so much."""
    groups = grouped(plan, max(lengths), count)
    return all(groups.held(n) <= share for n in lengths)


def filled(plan: Plan, groups: HeadGroups) -> Plan:
    """Every head attends as its group's longest rule does, the longest at the longest context."""

    def longest(rules: tuple[SpanRule, ...]) -> SpanRule:
        return max(rules, key=lambda rule: int(span(groups.longest, rule, groups.min_span)))

    rules = [[longest(groups.envelopes[group]) for group in layer] for layer in groups.group_of]
    return Plan.from_rules(rules, plan.model, sink=plan.sink, block=plan.block)


if __name__ == "__main__":
    main()
