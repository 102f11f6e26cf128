"""``moa-profile``: measure what shortening each attention head's view would cost; ``moa-profile merge`` pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import merge_profiles, profile_model
from moa_search.cli.command import Command, open_console
from moa_search.cli.subcommands import run_any

if TYPE_CHECKING:
    from moa_search.formats import Profile


def show(profile: Profile, *, output: str, **options: Any) -> None:
    """Print what was measured, how well, and where it is."""
    from moa_search.inspection.frames.profiles import profile_facts, profile_tables
    from moa_search.inspection.printing import fact_lines, to_rich
    from moa_search.inspection.quality import sample_advice

    console = open_console()
    for line in fact_lines(profile_facts(profile)):
        console.print(line, highlight=False)
    for table in profile_tables(profile):
        console.print(to_rich(table))
    advice = sample_advice(profile)
    if advice is not None:
        console.print(f"[yellow]more samples?[/yellow] {advice}", highlight=False)
    print(f"profile written to {output}")
    budget = "--density 0.25" if profile.tiers is None else "--kv-share 0.25"
    print(f"next: moa-search {output} {budget} --output plans")


def show_merged(profile: Profile, /, *, output: str, **options: Any) -> None:
    """Print the pooled profile as `show` does."""
    show(profile, output=output)


MAIN = Command(
    "measures what shortening each attention head's view would cost",
    profile_model,
    show,
    examples=(
        "moa-profile demo --output profile.safetensors",
        "moa-profile meta-llama/Llama-3.1-8B-Instruct --lengths 2048 4096 --samples 32 --output profile.safetensors",
    ),
    required=("output",),
    interrupted="the same command resumes",
)

COMMANDS = {
    "merge": Command(
        "pools profiles of one model",
        merge_profiles,
        show_merged,
        examples=("moa-profile merge first.safetensors second.safetensors --output pooled.safetensors",),
        required=("output",),
    )
}


def main() -> NoReturn:
    """Entry point."""
    run_any("moa-profile", MAIN, COMMANDS, otherwise="a model")
