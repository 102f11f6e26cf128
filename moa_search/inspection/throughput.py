"""Speed and memory as tables and a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from moa_search.inspection.plots import save_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from moa_search.evaluation.throughput.gate import Gate

__all__ = ["fact_lines", "gain_table", "plot_throughput", "save_throughput_plot", "throughput_table"]


def fact_lines(facts: Mapping[str, str], gates: Sequence[Gate]) -> list[str]:
    """What the numbers depend on, and how exact each plan was."""
    lines = [", ".join(f"{name} {escape(value)}" for name, value in facts.items())]
    for gate in gates:
        lines.append(
            f"plan {escape(gate.variant)}: logits off by {gate.error:.1e} of their size; plain attention under whole "
            f"masks {gate.yardstick:.1e}, dense {gate.dense:.1e}"
        )
    return lines


def throughput_table(summary: pd.DataFrame) -> Table:
    """Medians (lowest to highest) of every way, length and batch, and their ratio to dense at the same."""
    title = f"Median of {summary['n'].min()} runs (lowest - highest); x: times as fast as dense beside it"
    table = Table(title=title, title_justify="left")
    for name in ("length", "batch"):
        table.add_column(name, justify="right")
    table.add_column("variant")
    for name in ("KV\nkept", "prefill ms", "x", "decoded tokens/s", "x", "cache\nMiB", "peak\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in summary.sort_values(["length", "batch"], kind="stable").to_dict("records"):
        if last is not None and (row["length"], row["batch"]) != last:
            table.add_section()
        last = (row["length"], row["batch"])
        table.add_row(
            str(row["length"]),
            f"{row['batch']}{' = most' if row['is_largest'] else ''}",
            escape(_label(row)),
            f"{row['density']:.1%}",
            _spread(row, "prefill_ms"),
            _times(row["prefill_ratio"]),
            _spread(row, "decode_tokens_per_s"),
            _times(row["decode_ratio"]),
            f"{row['cache_bytes'] / 2**20:.1f}",
            "" if row["peak_bytes"] != row["peak_bytes"] else f"{row['peak_bytes'] / 2**20:.0f}",
        )
    return table


def gain_table(gains: pd.DataFrame) -> Table:
    """Gains in decoded tokens per second at largest batches, as `split_gains` gives them."""
    table = Table(title="Gain in decoded tokens/s, each at its largest batch", title_justify="left")
    table.add_column("length", justify="right")
    for name in ("variant", "against"):
        table.add_column(name)
    for name in ("batches", "gain", "= attention", "x batch", "x static cache"):
        table.add_column(name, justify="right")
    for row in gains.to_dict("records"):
        factors = [_times(row.get(name, float("nan"))) for name in ("attention", "batch", "static_cache")]
        batches = f"{row['dense_batch']} -> {row['plan_batch']}"
        table.add_row(str(row["length"]), escape(_label(row)), row["against"], batches, f"{row['gain']:.2f}", *factors)
    return table


def plot_throughput(summary: pd.DataFrame, facts: Mapping[str, str]) -> Figure:
    """Prefill time, decoding speed and size of the cache over length, with bars from the lowest to the highest run.

    One line per way and batch, and one for each way's largest batch, whatever that was at each length.
    """
    from matplotlib.figure import Figure

    panels = (
        ("prefill_ms", "prefill, ms"),
        ("decode_tokens_per_s", "decoded tokens/s"),
        ("cache_bytes", "KV cache, MiB"),
    )
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in summary.sort_values("length").to_dict("records"):
        batch = "largest batch" if row["is_largest"] else f"batch {row['batch']}"
        lines.setdefault(f"{_label(row)}, {batch}", []).append(row)
    for axis, (name, title) in zip(axes, panels, strict=True):
        scale = 2**20 if name == "cache_bytes" else 1
        for label, rows in sorted(lines.items()):
            middle = [row[name] / scale for row in rows]
            error = None
            if f"{name}_low" in rows[0]:
                below = [row[name] - row[f"{name}_low"] for row in rows]
                error = [below, [row[f"{name}_high"] - row[name] for row in rows]]
            style = "--" if rows[0]["kind"].startswith("dense") else "-"
            axis.errorbar([row["length"] for row in rows], middle, error, fmt=f"o{style}", capsize=3, label=label)
        axis.set(xscale="log", xlabel="tokens per prompt", title=title)
        axis.set_ylim(bottom=0)
        axis.set_xticks(ticks := sorted(set(summary["length"])), [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7)
    figure.suptitle(f"{facts['model']}, {facts['dtype']}, {facts['device']}, torch {facts['torch']}", fontsize=9)
    return figure


def save_throughput_plot(summary: pd.DataFrame, facts: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Write `plot_throughput` as PNG, atomically."""
    save_figure(plot_throughput(summary, facts), path)


def _label(row: Mapping[str, Any]) -> str:
    """A plan's compiled way has the plan's name, too."""
    return f"{row['variant']} static" if row["kind"] == "plan-static" else str(row["variant"])


def _spread(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.4g} ({row[f'{name}_low']:.4g} - {row[f'{name}_high']:.4g})"


def _times(ratio: float) -> str:
    return "" if ratio != ratio else f"{ratio:.2f}"
