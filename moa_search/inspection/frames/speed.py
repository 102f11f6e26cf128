"""Tables of speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from moa_search.inspection.printing import Column, Table, column, digits, mebibytes, percent, plain

if TYPE_CHECKING:
    from moa_search.evaluation.throughput.gate import Gate


def throughput_frame(summary: pd.DataFrame) -> Table:
    """Medians (lowest to highest) of every variant, length and batch, and their ratio to dense at the same.

    Args:
        summary: As `moa_search.evaluation.throughput.summarise_throughput` returns it.
    """
    columns = [
        column("length"),
        Column("batch", lambda row: f"{row['batch']}{' = most' if row['is_largest'] else ''}"),
        Column("variant", variant_text, left=True),
        column("density", "tokens kept", percent),
        _spread("prefill_ms", "prefill ms"),
        column("prefill_ratio", "x", digits(2)),
        _spread("decode_tokens_per_s", "decoded tokens/s"),
        column("decode_ratio", "x", digits(2)),
        column("cache_bytes", "cache MiB", mebibytes),
        column("peak_bytes", "peak MiB", lambda count: f"{count / 2**20:.0f}"),
    ]
    title = f"Median of {summary['n'].min()} runs (lowest - highest); x: times as fast as dense beside it"
    return Table(summary.sort_values(["length", "batch"], kind="stable"), columns, title, group=["length", "batch"])


def gain_frame(gains: pd.DataFrame) -> Table:
    """Gains in decoded tokens per second at largest batches, as `split_gains` gives them."""
    columns = [
        column("length"),
        Column("variant", variant_text, left=True),
        column("against", left=True),
        Column("batches", lambda row: f"{row['dense_batch']} -> {row['plan_batch']}"),
        column("gain", None, digits(2)),
        column("attention", "= attention", digits(2)),
        column("batch", "x batch", digits(2)),
        column("static_cache", "x static cache", digits(2)),
    ]
    return Table(gains, columns, "Gain in decoded tokens/s, each at its largest batch")


def gate_lines(facts: Mapping[str, str], gates: Sequence[Gate]) -> list[str]:
    """What the numbers depend on, and how exact each plan was."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items())]
    for gate in gates:
        lines.append(
            f"plan {gate.variant}: logits off by {gate.error:.1e} of their size; plain attention under whole masks "
            f"{gate.yardstick:.1e}, dense {gate.dense:.1e}"
        )
    return lines


def variant_text(row: Mapping[str, Any]) -> str:
    """The name of a row's variant; a plan's compiled run has the plan's name, too."""
    return f"{row['variant']} static" if row["kind"] == "plan-static" else str(row["variant"])


def _spread(name: str, heading: str) -> Column:
    return Column(
        heading,
        lambda row: plain(row[name], lambda mid: f"{mid:.4g} ({row[f'{name}_low']:.4g} - {row[f'{name}_high']:.4g})"),
    )
