"""``moa-eval``: score a model dense, under plans and under uniform spans, on held-out items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import evaluate_model, report_model
from moa_search.cli.command import open_console, run
from moa_search.cli.subcommands import Subcommand, descriptions, run_subcommand

__all__ = ["COMMANDS", "main", "show", "show_report"]

if TYPE_CHECKING:
    import pandas as pd


def show(items: pd.DataFrame, *, output: str | None, **options: Any) -> None:
    """Print the tables of means, effective contexts and where the items' scores are."""
    from moa_search.inspection import effective_lines, score_tables

    console = open_console()
    console.print(*score_tables(items))
    for line in effective_lines(items):
        console.print(line, highlight=False)
    if output is not None:
        print(f"scores of every item written to {output}")


def show_report(effective: pd.DataFrame, *, output: str, **options: Any) -> None:
    """Print how far each variant carries, and where the page is."""
    from moa_search.inspection import effective_context_table

    if len(effective):
        open_console().print(effective_context_table(effective))
    print(f"{output}/report.html is the page; items, summary, differences and effective contexts are CSVs beside it")


COMMANDS: dict[str, Subcommand] = {
    "report": Subcommand(
        "runs dense, plans and baselines over tasks and lengths and writes a page",
        report_model,
        show_report,
        first="config",
        task="measuring",
        required=("model", "output"),
        interrupted="what was measured is kept; the same command goes on from here",
    ),
}


def main() -> NoReturn:
    """Entry point."""
    run_subcommand("moa-eval", COMMANDS, otherwise="a model")
    run("moa-eval", evaluate_model, show, first="model", task="evaluating", also=descriptions(COMMANDS))
