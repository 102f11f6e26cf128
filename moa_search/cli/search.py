"""``moa-search``: find the best spans for a memory budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import search_front
from moa_search.cli.command import run

__all__ = ["main", "show"]

if TYPE_CHECKING:
    from moa_search.search import Front


def show(front: Front, *, output: str, **options: Any) -> None:
    """Print the front and where the plans are."""
    from rich.console import Console

    from moa_search.inspection import front_table

    Console().print(front_table(front))
    print(
        f"{output}/plan.json is the plan to use (all lengths weigh the same); all {len(front.plans)} in {output}/front"
    )
    print(f"next: moa-inspect {output}/plan.json, or moa-eval --model MODEL --plan {output}/plan.json")


def main() -> NoReturn:
    """Entry point."""
    run("moa-search", search_front, show, first="profile", required=("output",))
