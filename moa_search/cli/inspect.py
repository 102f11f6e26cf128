"""``moa-inspect``: show a plan, ours or another tool's, and convert it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import inspect_plan
from moa_search.cli.command import open_console, run

__all__ = ["main", "show"]

if TYPE_CHECKING:
    from moa_search.formats import Plan


def show(plan: Plan, /, *, lengths: Sequence[int], output: str | None, save: str | None, **options: Any) -> None:
    """Print origin, densities, rules and spans."""
    from moa_search.inspection import density_table, origin_lines, rule_table, span_table

    shown = list(lengths) or plan.lengths
    console = open_console()
    for line in origin_lines(plan):
        console.print(line, highlight=False)
    console.print(density_table(plan, shown))
    console.print(rule_table(plan))
    console.print(span_table(plan, max(shown)))
    if output is not None:
        print(f"heat map written to {output}")
    if save is not None:
        print(f"plan written to {save}")


def main() -> NoReturn:
    """Entry point."""
    run("moa-inspect", inspect_plan, show, first="plan")
