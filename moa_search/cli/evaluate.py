"""``moa-eval``: score a model on held-out items; its other commands report, run lm-eval and measure speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import evaluate_model, measure_throughput, report_model, run_harness
from moa_search.cli.command import Command, open_console
from moa_search.cli.subcommands import run_any

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.evaluation.throughput import Throughput


def show(items: pd.DataFrame, *, output: str | None, **options: Any) -> None:
    """Print the tables of means, effective contexts and where the items' scores are."""
    from rich.markup import escape

    from moa_search.inspection.frames.scores import effective_lines, score_frames
    from moa_search.inspection.printing import to_rich

    console = open_console()
    console.print(*map(to_rich, score_frames(items)))
    for line in effective_lines(items):
        console.print(escape(line), highlight=False)
    if output is not None:
        print(f"scores of every item written to {output}")


def show_report(effective: pd.DataFrame, *, output: str, **options: Any) -> None:
    """Print how far each variant carries, and where the page is."""
    from moa_search.inspection.frames.scores import effective_frame
    from moa_search.inspection.printing import to_rich

    if len(effective):
        open_console().print(to_rich(effective_frame(effective)))
    print(
        f"{output}/report.html is the page; its tables are report.md and, with the scores of every item, CSVs beside it"
    )


def show_harness(summary: pd.DataFrame, *, output: str | None, **options: Any) -> None:
    """Print what lm-evaluation-harness found, and where its logs are."""
    from moa_search.inspection.frames.scores import harness_frame
    from moa_search.inspection.printing import to_rich

    open_console().print(to_rich(harness_frame(summary)))
    if output is not None:
        print(f"results.csv, items.csv and the log of every sample are in {output}")


def show_throughput(found: Throughput, *, output: str | None, **options: Any) -> None:
    """Print times, memory, and where a gain comes from."""
    from rich.markup import escape

    from moa_search.evaluation.throughput import split_gains, summarise_throughput
    from moa_search.inspection.frames.speed import gain_frame, gate_lines, throughput_frame
    from moa_search.inspection.printing import to_rich

    console = open_console()
    for line in gate_lines(found.facts, found.gates):
        console.print(escape(line), highlight=False)
    summary = summarise_throughput(found.runs)
    console.print(to_rich(throughput_frame(summary)))
    gains = split_gains(summary)
    if len(gains):
        console.print(to_rich(gain_frame(gains)))
    if output is not None:
        print(f"every run, the tables and a plot are in {output}")


MAIN = Command(
    "scores a model dense, under plans and under uniform spans",
    evaluate_model,
    show,
    examples=("moa-eval demo --plan plans/plan.json --tasks passkey copy --lengths 1024 2048",),
)

COMMANDS = {
    "lm-eval": Command(
        "runs tasks of lm-evaluation-harness",
        run_harness,
        show_harness,
        examples=("moa-eval lm-eval demo --tasks tasks/mine.yaml --plan plans/plan.json",),
    ),
    "report": Command(
        "runs dense, plans and baselines over tasks and lengths and writes a page",
        report_model,
        show_report,
        examples=("moa-eval report --model demo --plan plans/plan.json --output report",),
        first="config",
        interrupted="what was measured is kept; the same command resumes",
    ),
    "throughput": Command(
        "measures speed and memory, dense and under plans",
        measure_throughput,
        show_throughput,
        examples=("moa-eval throughput demo --plan plans/plan.json --lengths 4096 --batch 1 8",),
    ),
}


def main() -> NoReturn:
    """Entry point."""
    run_any("moa-eval", MAIN, COMMANDS, otherwise="a model")
