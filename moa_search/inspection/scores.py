"""Scores as terminal tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["WAYS", "effective_context_table", "effective_lines", "harness_table", "score_tables", "signed_interval"]

WAYS = {"forced": "teacher-forced", "generated": "generated"}
"""How answers came about, in words."""


def score_tables(items: pd.DataFrame) -> list[Table]:
    """One table per task and length: means of every variant with 95 % bootstrap intervals, and less dense.

    Args:
        items: As `moa_search.evaluation.compare_variants` returns them.
    """
    from moa_search.evaluation import paired_differences, summarise

    summary, tables = summarise(items), []
    has_dense = "dense" in set(items["variant"])
    differences = paired_differences(items).set_index(["task", "length", "variant"]) if has_dense else None
    for (task, length), group in summary.groupby(["task", "length"], sort=False):
        rows = group.to_dict("records")
        way = WAYS[rows[0]["answers"]]
        title = f"{escape(task)} at {length} tokens, {way}: mean of {rows[0]['n']} items, 95 % interval"
        table = Table(title=title, title_justify="left")
        table.add_column("variant")
        columns = ["answer NLL", rows[0]["metric"]]
        for name in ("KV kept", *columns, *(f"{name} less dense" for name in columns if differences is not None)):
            table.add_column(name, justify="right")
        for row in rows:
            cells = [escape(row["variant"]), f"{row['density']:.1%}"]
            for name in ("nll", "score"):
                known = row[name] == row[name]
                cells.append(f"{row[name]:.2f}  {row[f'{name}_low']:.2f}-{row[f'{name}_high']:.2f}" if known else "")
            key = (task, length, row["variant"])
            if differences is not None and key in differences.index:
                difference = differences.loc[key]
                cells += [signed_interval(difference, f"{name}_difference") for name in ("nll", "score")]
            table.add_row(*cells)
        tables.append(table)
    return tables


def effective_context_table(effective: pd.DataFrame) -> Table:
    """How far every variant carries, with its multiples over uniform spans.

    Args:
        effective: As `moa_search.evaluation.effective.effective_table` returns it.
    """
    table = Table(title="Effective context in tokens: longest length with 90 % right", title_justify="left")
    table.add_column("variant")
    for name in ("task", "n", "effective context", "95 %", "fails at", "average span", "x, equal span", "x, equal KV"):
        table.add_column(name, justify="right")
    for row in effective.astype(object).where(effective.notna(), None).to_dict("records"):
        cells = [escape(row["variant"]), escape(row["task"]), str(row["n"]), str(row["effective_context"])]
        cells.append(f"{row['low']}-{row['high']}")
        cells += ["" if row[name] is None else str(row[name]) for name in ("fails_at", "average_span")]
        for name in ("at_equal_span", "at_equal_density"):
            ratio, bracket = row[name], row[f"{name}_bracket"]
            cells.append(f"{ratio:.2f} ({bracket})" if ratio is not None else bracket or "")
        table.add_row(*cells)
    return table


def effective_lines(items: pd.DataFrame) -> list[str]:
    """Effective context of every variant on each task that is about retrieval and was tried at several lengths."""
    from moa_search.evaluation.effective import THRESHOLD, effective_contexts
    from moa_search.tasks import TASKS

    lines = []
    for name in dict.fromkeys(items["task"]):
        task = TASKS.get(name)
        if task is None or not task.is_retrieval or items[items["task"] == name]["length"].nunique() < 2:
            continue
        lines.append(f"effective context, {task.name} (longest length with {THRESHOLD:.0%} right, 95 % interval):")
        for name, found in effective_contexts(items, task.name).items():
            lines.append(f"  {escape(name)}: {found.bracket} tokens ({found.low}-{found.high}), n = {found.items}")
    return lines


def harness_table(summary: pd.DataFrame) -> Table:
    """What lm-evaluation-harness found, as `moa_search.evaluation.harness.harness_summary` returns it."""
    table = Table("variant", "task", "metric", title="lm-evaluation-harness", title_justify="left")
    for name in ("n", "value", "less dense, 95 %"):
        table.add_column(name, justify="right")
    for row in summary.astype(object).where(summary.notna(), None).to_dict("records"):
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        value = row["value"]
        shown = f"{value:.4g}" if isinstance(value, float | int) else str(value)
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.2g}"
        difference = ""
        if row["difference"] is not None:
            low, high = row["difference_low"], row["difference_high"]
            difference = f"{row['difference']:+.3f}  {low:+.3f} to {high:+.3f}"
        count = "" if row["n"] is None else str(int(row["n"]))
        table.add_row(escape(row["variant"]), escape(row["task"]), escape(metric), count, shown + error, difference)
    return table


def signed_interval(row: pd.Series, name: str) -> str:
    """A difference with its sign and its interval; nothing where it isn't known."""
    if row[name] != row[name]:
        return ""
    return f"{row[name]:+.2f}  {row[f'{name}_low']:+.2f} to {row[f'{name}_high']:+.2f}"
