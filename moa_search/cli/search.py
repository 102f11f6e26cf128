"""``moa-search``: find the best spans for a memory budget; its other commands try, compare and tune plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import compare_searchers, measure_hardware, push_plans, search_front, tune_plan, validate_front
from moa_search.cli.command import Command, open_console
from moa_search.cli.subcommands import run_any

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.search import Front
    from moa_search.search.budgets import Hardware
    from moa_search.search.tuning import Summary


def show(front: Front, *, output: str, validate: str | None, **options: Any) -> None:
    """Print the front and where the plans are."""
    from rich.markup import escape

    from moa_search.inspection.frames.searches import budget_lines, explanation, front_frame
    from moa_search.inspection.printing import to_rich

    console = open_console()
    console.print(to_rich(front_frame(front)))
    for line in [explanation(front), *budget_lines(front)]:
        console.print(escape(line), highlight=False, soft_wrap=True)
    why = "all lengths weigh the same"
    if validate is not None:
        why = "the best on held-out samples"
    elif front.asked:
        why = "the knee of the losses" if front.has_knee else "the first budget asked for"
    elif options.get("searcher") == "uniform":
        why = "what uses most of the budgets"
    elif options.get("length_weights"):
        why = "the lengths weigh as asked"
    print(f"{output}/plan.json is the plan to use ({why}); all {len(front.plans)} in {output}/front")
    print(f"next: moa-inspect {output}/plan.json, or moa-search validate {output} --model MODEL")


def show_validation(table: pd.DataFrame, *, folder: str, **options: Any) -> None:
    """Print what the plans lose and which one was kept."""
    from moa_search.inspection.frames.searches import validation_frame
    from moa_search.inspection.printing import to_rich

    open_console().print(to_rich(validation_frame(table)))
    best = table[table["chosen"]]["plan"].iloc[0]
    print(f"{folder}/plan.json is now {best}; every plan's file says what it lost, and so does {folder}/validation.csv")


def show_comparison(table: pd.DataFrame, *, output: str | None, criterion: str, **options: Any) -> None:
    """Print the searchers side by side."""
    from rich.markup import escape

    from moa_search.inspection.frames.searches import comparison_frame, comparison_lines
    from moa_search.inspection.printing import to_rich

    console = open_console()
    console.print(to_rich(comparison_frame(table, criterion)))
    for line in comparison_lines(table):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if output is not None:
        print(f"a plan of each and compare.csv are in {output}")


def show_hardware(speeds: Hardware, *, output: str, **options: Any) -> None:
    """Print what was measured."""
    gigabytes, teraflops = speeds.bandwidth_bytes_per_s / 1e9, speeds.flops_per_s / 1e12
    print(f"{speeds.name}: {gigabytes:.4g} GB/s, {teraflops:.4g} TFLOP/s; written to {output}")
    print(f"next: moa-search PROFILE --budget decode=12ms@32768x8 --hardware {output} --output plans")


def show_pushed(address: str, *, repo: str, **options: Any) -> None:
    """Print where the plans are now."""
    print(f"{address}\nnext: moa-inspect plans {repo}")


def show_study(summary: Summary, *, output: str, **options: Any) -> None:
    """Print where a study stands."""
    from rich.markup import escape

    from moa_search.inspection.frames.searches import study_frame, study_lines
    from moa_search.inspection.printing import to_rich

    console = open_console()
    console.print(to_rich(study_frame(summary)))
    for line in study_lines(summary):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if summary.best:
        print(f"{output}/plan.json is the best plan; all of the last front in {output}/front")


MAIN = Command(
    "finds the best spans for a memory budget",
    search_front,
    show,
    examples=(
        "moa-search profile.safetensors --kv-share 0.125 --output plans",
        "moa-search profile.safetensors --budget kv=2GiB@32768x8 --output plans",
    ),
    required=("output",),
)

COMMANDS = {
    "validate": Command(
        "runs every plan of a front on held-out samples and keeps the best",
        validate_front,
        show_validation,
        examples=("moa-search validate plans --model demo",),
        interrupted="what was measured is kept; the same command resumes",
    ),
    "compare": Command(
        "sets the baselines beside our search",
        compare_searchers,
        show_comparison,
        examples=("moa-search compare profile.safetensors --kv-share 0.125 --validate demo",),
    ),
    "tune": Command(
        "searches settings of the search by true loss",
        tune_plan,
        show_study,
        examples=("moa-search tune profile.safetensors --model demo --kv-share 0.125 --output tuned",),
        interrupted="the study is kept; the same command resumes it",
    ),
    "push": Command(
        "puts plans into a repository of the Hugging Face hub",
        push_plans,
        show_pushed,
        examples=("moa-search push plans/front --repo org/plans --base-model org/model --license apache-2.0",),
    ),
    "hardware": Command(
        "measures the device at hand, for budgets on times",
        measure_hardware,
        show_hardware,
        examples=("moa-search hardware --output hardware.yaml",),
        required=("output",),
    ),
}


def main() -> NoReturn:
    """Entry point."""
    run_any("moa-search", MAIN, COMMANDS, otherwise="a profile")
