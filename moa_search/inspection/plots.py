"""Plans, profiles, fronts and speed as picture files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moa_search.errors import ConfigError
from moa_search.formats import Plan, Profile
from moa_search.formats.files import atomic_write
from moa_search.inspection.charts import chart, draw_front
from moa_search.inspection.frames.speed import variant_text
from moa_search.pictures import cells_size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moa_search.search import Front


def plot_spans(plan: Plan, lengths: Sequence[int]) -> Figure:
    """`Plan.plot_spans` at several lengths, one below the other.

    Args:
        plan: The plan.
        lengths: Context lengths in tokens.
    """
    from matplotlib.figure import Figure

    width, height = cells_size(plan.model.num_hidden_layers, plan.model.num_key_value_heads)
    figure = Figure(figsize=(width, height * len(lengths) + 0.3), layout="constrained")
    for axes, length in zip(figure.subplots(len(lengths), 1, squeeze=False)[:, 0], lengths, strict=True):
        plan.plot_spans(length, ax=axes)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


def save_heat_map(plan: Plan, path: str | os.PathLike[str], *, lengths: Sequence[int]) -> None:
    """Write `plot_spans` as PNG, atomically."""
    save_figure(plot_spans(plan, lengths), path)


def save_diff_map(plans: Sequence[Plan], path: str | os.PathLike[str], *, length: int) -> None:
    """Write `Plan.plot_diff` of two plans as PNG, atomically."""
    save_figure(_one_map(plans[0], lambda ax: plans[0].plot_diff(plans[1], length, ax=ax)), path)


def save_influence_map(profile: Profile, path: str | os.PathLike[str], *, length: int, criterion: str) -> None:
    """Write `Profile.plot_influence` as PNG, atomically."""
    save_figure(_one_map(profile.header, lambda ax: profile.plot_influence(length, criterion=criterion, ax=ax)), path)


def save_front_plot(front: Front, path: str | os.PathLike[str]) -> None:
    """Write the front's chart as PNG, atomically.

    Raises:
        ConfigError: The plans predict no losses to draw.
    """
    if any(not plan.predicted or plan.predicted[-1].loss is None for plan in front.plans):
        raise ConfigError("output: a plan of the front predicts no loss, so there is no chart to draw")
    save_figure(chart(lambda ax: draw_front(ax, front.plans, front.names, front.chosen_index)), path)


def plot_budgets(front: Front) -> Figure:
    """Predicted loss over the share of bytes, one line per length with its standard error; the knee is marked.

    Args:
        front: Of several budgets.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    lengths = [metrics.length for metrics in front.plans[0].predicted]
    for index, length in enumerate(lengths):
        metrics = [plan.predicted[index] for plan in front.plans]
        axes.errorbar(
            [100 * m.bytes_kept for m in metrics],
            [m.loss or 0.0 for m in metrics],
            yerr=[m.loss_error or 0.0 for m in metrics],
            marker="o",
            capsize=3,
            label=f"{length} tokens",
        )
    if front.has_knee:
        at = 100 * front.chosen.predicted[-1].bytes_kept
        axes.axvline(at, color="grey", linestyle=":", label=f"knee, {front.asked[front.chosen_index or 0]:.4g}")
    criterion = front.chosen.provenance.criterion if front.chosen.provenance else None
    axes.set_xlabel("bytes of the KV cache kept (%)")
    axes.set_ylabel("predicted loss" + (f" ({criterion})" if criterion else ""))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def save_budgets_plot(front: Front, path: str | os.PathLike[str]) -> None:
    """Write `plot_budgets` as PNG, atomically."""
    save_figure(plot_budgets(front), path)


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
        lines.setdefault(f"{variant_text(row)}, {batch}", []).append(row)
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


def _one_map(of: Any, draw: Callable[[Axes], Any]) -> Figure:
    """A figure for one heat map; ``of`` has the model."""
    from matplotlib.figure import Figure

    width, height = cells_size(of.model.num_hidden_layers, of.model.num_key_value_heads)
    figure = Figure(figsize=(width, height + 0.3), layout="constrained")
    draw(figure.subplots())
    return figure
