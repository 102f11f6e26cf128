"""Tables of scores: means, differences and effective contexts, of our tasks and of lm-evaluation-harness's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from moa_search.inspection.printing import Column, Table, column, digits, is_missing, percent, plain, whole, with_error

if TYPE_CHECKING:
    from moa_search.formats import Plan

ANSWERED = {"forced": "teacher-forced", "generated": "generated"}
"""How answers came about, in words."""

Row = Mapping[str, Any]


def score_frame(
    summary: pd.DataFrame, title: str, differences: pd.DataFrame | None = None, *, titled: Sequence[str] = ()
) -> Table:
    """Means of every variant with 95 % bootstrap intervals and, where given, differences from dense attention.

    Args:
        summary: Of one task, as `moa_search.evaluation.summarise` returns it.
        title: Of the table.
        differences: As `moa_search.evaluation.paired_differences` returns them.
        titled: Headings of columns that the title speaks for.
    """
    metric = str(summary["metric"].iloc[0])
    keys = [
        column("variant", left=True),
        column("length", "tokens"),
        column("density", "tokens kept", percent),
        *_bytes_columns(summary),
        column("attention_density", "prefill computed", percent),
        column("n"),
    ]
    columns = [key for key in keys if key.heading not in titled] + [_mean("nll", "NLL"), _mean("score", metric)]
    if differences is not None:
        summary = summary.merge(
            differences.drop(columns=["against", "n"]), on=["task", "length", "variant"], how="left"
        )
        columns += [_difference("nll", "NLL less dense"), _difference("score", f"{metric} less dense")]
    return Table(summary, columns, title)


def _bytes_columns(summary: pd.DataFrame) -> list[Column]:
    """Bytes held, where they were measured; what else reading the prompt takes, where that differs from one pass."""
    if "kv_share" not in summary:
        return []
    columns = [column("kv_share", "bytes kept", percent)]
    if (summary["extra_passes"] > 0).any() or (summary["kv_share"] > summary["density"] + 0.01).any():
        columns += [column("kv_peak", "at peak", percent), column("extra_passes", None, digits(1))]
    return columns


def score_frames(items: pd.DataFrame) -> list[Table]:
    """One table per task and length, less dense attention where that was measured.

    Args:
        items: As `moa_search.evaluation.compare_variants` returns them.
    """
    from moa_search.evaluation import paired_differences, summarise

    differences = paired_differences(items) if "dense" in set(items["variant"]) else None
    tables = []
    for (task, length), rows in summarise(items).groupby(["task", "length"], sort=False):
        how, count = ANSWERED[str(rows["answers"].iloc[0])], rows["n"].iloc[0]
        title = f"{task} at {length} tokens, {how}: mean of {count} items, 95 % interval"
        tables.append(score_frame(rows, title, differences, titled=("tokens", "prefill computed", "n")))
    return tables


def length_frame(summary: pd.DataFrame) -> Table:
    """One row per variant and one column per length: bytes held, NLL and score with its interval.

    Args:
        summary: Of one task, as `moa_search.evaluation.summarise` returns it.
    """
    task, metric = str(summary["task"].iloc[0]), str(summary["metric"].iloc[0])
    columns, rows = [column("variant", left=True)], {name: {"variant": name} for name in summary["variant"]}
    for length, at in summary.groupby("length"):
        for row in at.to_dict("records"):
            score = _bracket(row, "score")
            losses = "" if is_missing(row["nll"]) else f"{row['nll']:.2f} / "
            rows[row["variant"]][f"at {length}"] = f"{row.get('kv_share', row['density']):.0%}: {losses}{score}"
        columns.append(column(f"at {length}", f"{length} tokens, n = {at['n'].iloc[0]}"))
    losses = " NLL /" if summary["nll"].notna().any() else ""
    return Table(pd.DataFrame(rows.values()), columns, f"{task}: bytes kept:{losses} {metric} [95 % interval]")


def difference_frame(differences: pd.DataFrame, against: str) -> Table:
    """What variants score less one of them, on the same items.

    Args:
        differences: As `moa_search.evaluation.paired_differences` returns them.
        against: Name of that one.
    """
    columns = [
        column("variant", left=True),
        column("task", left=True),
        column("length", "tokens"),
        column("n"),
        _difference("nll", "NLL"),
        _difference("score", "score"),
    ]
    return Table(differences[differences["against"] == against], columns, f"Less {against}, the same items")


def effective_frame(effective: pd.DataFrame, task: str | None = None) -> Table:
    """How far every variant carries, with its multiples over uniform spans.

    Args:
        effective: As `moa_search.evaluation.effective.effective_table` returns it.
        task: One of its tasks; by default all, with a column that names them.
    """
    columns = [
        column("variant", left=True),
        *([column("task", left=True)] if task is None else []),
        column("n"),
        column("effective_context"),
        Column("95 %", lambda row: f"{row['low']}-{row['high']}"),
        column("fails_at", None, whole),
        column("but_not_at"),
        column("average_span", None, whole),
        _multiple("at_equal_span", "window_context", "x, equal span (window)"),
        _multiple("at_equal_density", "uniform_context", "x, equal KV (uniform)"),
    ]
    frame = effective if task is None else effective[effective["task"] == task]
    if not (frame["but_not_at"].fillna("") != "").any():
        columns = [shown for shown in columns if shown.heading != "but not at"]
    of = "" if task is None else f", {task}"
    return Table(frame, columns, f"Effective context{of} in tokens: the longest length with 90 % right")


def effective_lines(items: pd.DataFrame) -> list[str]:
    """Effective context of every variant on each task that is about retrieval and was tried at several lengths."""
    from moa_search.evaluation.effective import THRESHOLD, effective_contexts
    from moa_search.tasks import TASKS

    lines = []
    for name in dict.fromkeys(items["task"]):
        task = TASKS.get(name.partition(":")[0])
        if task is None or not task.is_retrieval or items[items["task"] == name]["length"].nunique() < 2:
            continue
        lines.append(f"effective context, {name} (longest length with {THRESHOLD:.0%} right, 95 % interval):")
        for variant, found in effective_contexts(items, name).items():
            lines.append(f"  {variant}: {found.bracket} tokens ({found.low}-{found.high}), n = {found.items}")
    return lines


def position_frame(items: pd.DataFrame, task: str) -> Table:
    """Loss along documents: one row per length and position, one column per variant."""
    mean = items.groupby(["variant", "length", "depth"], sort=False)["nll"].mean().reset_index()
    mean["position"] = (mean["depth"] * mean["length"]).round().astype(int)
    frame = mean.pivot_table(index=["length", "position"], columns="variant", values="nll", sort=False).reset_index()
    columns = [column("length"), column("position")]
    columns += [column(str(name), str(name), digits(2)) for name in frame.columns[2:]]
    return Table(frame, columns, f"{task}: loss by position, nats per token")


def depth_frame(items: pd.DataFrame, task: str) -> Table:
    """Score by depth and length: one row per variant and depth, one column per length."""
    frame = items.pivot_table(index=["variant", "depth"], columns="length", values="score", sort=False).reset_index()
    columns = [column("variant", left=True), column("depth", None, "{:.0%}".format)]
    columns += [column(str(name), str(name), digits(2)) for name in frame.columns[2:]]
    return Table(frame.rename(columns=str), columns, f"{task}: score by depth and length")


def compared_plans_frame(plans: Mapping[str, Plan], lengths: Sequence[int]) -> Table:
    """Which plans were compared: how they were found, and what they keep at each length."""
    rows = []
    for name, plan in plans.items():
        origin = plan.provenance
        how = "" if origin is None else " ".join(filter(None, (origin.searcher, origin.criterion)))
        kept = {f"kept@{length}": _kept_text(plan, length) for length in lengths}
        rows.append({"plan": name, "how": how, **kept, "fingerprint": plan.fingerprint[:19]})
    columns = [column("plan", left=True), column("how", "found by", left=True)]
    columns += [column(f"kept@{length}", f"kept at {length}") for length in lengths]
    columns.append(column("fingerprint"))
    return Table(pd.DataFrame(rows), columns, "Plans and what they keep of the KV cache")


def _kept_text(plan: Plan, length: int) -> str:
    kept = percent(plan.density(length))
    return kept if plan.is_plain else f"{kept} in {percent(plan.share(length))} of the bytes"


def harness_frame(summary: pd.DataFrame) -> Table:
    """What lm-evaluation-harness found, as `moa_search.evaluation.harness.harness_summary` returns it."""

    def metric(row: Row) -> str:
        return str(row["metric"]) if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"

    def value(row: Row) -> str:
        found = row["value"]
        return with_error(found, row["stderr"], ".4g", ".2g") if isinstance(found, float | int) else str(found)

    columns = [
        column("variant", left=True),
        column("task", left=True),
        Column("metric", metric, left=True),
        column("n", None, whole),
        Column("value", value),
        Column("less dense, 95 %", lambda row: _signed(row, "difference", ".3f")),
    ]
    return Table(summary, columns, "lm-evaluation-harness")


def _mean(name: str, heading: str) -> Column:
    return Column(heading, lambda row: _bracket(row, name))


def _bracket(row: Row, name: str) -> str:
    return plain(row[name], lambda mean: f"{mean:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]")


def _difference(name: str, heading: str) -> Column:
    return Column(heading, lambda row: _signed(row, f"{name}_difference", ".2f"))


def _signed(row: Row, name: str, form: str) -> str:
    """A difference with its sign and its interval; nothing where it isn't known."""
    low, high = f"{name}_low", f"{name}_high"
    show: Callable[[float], str] = lambda mean: f"{mean:+{form}} [{row[low]:+{form}}, {row[high]:+{form}}]"  # noqa: E731
    return plain(row[name], show)


def _multiple(ratio: str, of: str, heading: str) -> Column:
    """How many times as far, what the grid of lengths leaves open, and the length that it is a multiple of."""

    def show(row: Row) -> str:
        bracket = plain(row[f"{ratio}_bracket"])
        if is_missing(row[ratio]):
            return bracket
        return f"{row[ratio]:.2f} ({bracket}) of {row[of]:.0f}"

    return Column(heading, show)
