"""``moa-search``: find the best spans for a memory budget; its other commands try, compare and tune plans."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import compare_searchers, search_front, serve_study, tune_plan, validate_front
from moa_search.cli.command import EXIT_BAD_INPUT, open_console, run
from moa_search.formats.files import nearest

__all__ = ["COMMANDS", "main", "show", "show_comparison", "show_study", "show_validation"]

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.search import Front
    from moa_search.search.tuning import Summary

COMMANDS = {
    "validate": "runs every plan of a front on held-out samples and keeps the best",
    "compare": "sets the baselines beside our search",
    "tune": "searches settings of the search by true loss",
    "serve": "shares a study's database with many machines",
}


def show(front: Front, *, output: str, validate: str | None, **options: Any) -> None:
    """Print the front and where the plans are."""
    from moa_search.inspection import budget_lines, front_table

    console = open_console()
    console.print(front_table(front))
    for line in budget_lines(front):
        console.print(line, highlight=False)
    why = "all lengths weigh the same"
    if validate is not None:
        why = "the best on held-out samples"
    elif front.densities:
        why = "the knee of the losses" if front.has_knee else "the first density asked for"
    elif options.get("searcher") == "uniform":
        why = "what uses most of the budgets"
    elif options.get("length_weights"):
        why = "the lengths weigh as asked"
    print(f"{output}/plan.json is the plan to use ({why}); all {len(front.plans)} in {output}/front")
    print(f"next: moa-inspect {output}/plan.json, or moa-search validate {output} --model MODEL")


def show_validation(table: pd.DataFrame, *, folder: str, **options: Any) -> None:
    """Print what the plans lose and which one was kept."""
    from moa_search.inspection import validation_table

    open_console().print(validation_table(table))
    best = table[table["chosen"]]["plan"].iloc[0]
    print(f"{folder}/plan.json is now {best}; every plan's file says what it lost, and so does {folder}/validation.csv")


def show_comparison(table: pd.DataFrame, *, output: str | None, criterion: str, **options: Any) -> None:
    """Print the searchers side by side."""
    from moa_search.inspection import comparison_table

    open_console().print(comparison_table(table, criterion))
    if output is not None:
        print(f"a plan of each and compare.csv are in {output}")


def show_study(summary: Summary, *, output: str, **options: Any) -> None:
    """Print where a study stands."""
    from moa_search.inspection import study_lines, study_table

    console = open_console()
    console.print(study_table(summary))
    for line in study_lines(summary):
        console.print(line, highlight=False)
    if summary.best:
        print(f"{output}/plan.json is the best plan; all of the last front in {output}/front")


def main() -> NoReturn:
    """Entry point."""
    runners: dict[str, Callable[[str, list[str]], NoReturn]] = {
        "validate": partial(
            _run,
            validate_front,
            show_validation,
            first="folder",
            task="validating",
            required=("model",),
            interrupted="what was measured is kept; the same command goes on from here",
        ),
        "compare": partial(_run, compare_searchers, show_comparison, first="profile", task="comparing"),
        "tune": partial(
            _run,
            tune_plan,
            show_study,
            first="profile",
            task="tuning",
            required=("model", "output"),
            interrupted="the study is kept; the same command goes on from here",
        ),
        "serve": partial(_run, serve_study, lambda *_, **__: None, first="storage"),
    }
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in runners:
        runners[command](f"moa-search {command}", sys.argv[2:])
    hint = nearest(command, COMMANDS)
    if hint and not os.path.exists(command):
        print(f"moa-search: error: {command!r} is neither a profile nor a command{hint}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    run(
        "moa-search",
        search_front,
        show,
        first="profile",
        task="searching",
        required=("output",),
        also=COMMANDS,
    )


def _run(function: Any, show: Any, program: str, arguments: list[str], **options: Any) -> NoReturn:
    run(program, function, show, arguments=arguments, **options)
