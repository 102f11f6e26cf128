"""``moa-profile``: measure what shortening each attention head's view would cost; ``moa-profile merge`` pools."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import merge_profiles, profile_model
from moa_search.cli.command import open_console, run

__all__ = ["main", "show", "show_merged"]

if TYPE_CHECKING:
    from moa_search.formats import Profile


def show(profile: Profile, *, output: str, **options: Any) -> None:
    """Print what was measured, how well, and where it is."""
    from moa_search.inspection.frames.profiles import profile_facts, profile_frame, tier_frame
    from moa_search.inspection.printing import fact_lines, to_rich
    from moa_search.inspection.quality import sample_advice

    console = open_console()
    for line in fact_lines(profile_facts(profile)):
        console.print(line, highlight=False)
    console.print(to_rich(profile_frame(profile)))
    if profile.tiers is not None:
        console.print(to_rich(tier_frame(profile)))
    advice = sample_advice(profile)
    if advice is not None:
        console.print(f"[yellow]more samples?[/yellow] {advice}", highlight=False)
    print(f"profile written to {output}")
    print(f"next: moa-search {output} --density 0.25 --output plans")


def show_merged(profile: Profile, /, *, output: str, **options: Any) -> None:
    """Print the pooled profile as `show` does."""
    show(profile, output=output)


def main() -> NoReturn:
    """Entry point."""
    if sys.argv[1:2] == ["merge"]:
        run(
            "moa-profile merge",
            merge_profiles,
            show_merged,
            first="profiles",
            required=("output",),
            arguments=sys.argv[2:],
        )
    run(
        "moa-profile",
        profile_model,
        show,
        first="model",
        required=("output",),
        interrupted="the same command goes on from here",
    )
