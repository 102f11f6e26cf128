"""What searches found: fronts, validations, comparisons and studies as tables, losses over densities as a picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from moa_search.inspection.plots import save_figure
from moa_search.inspection.tables import predicted_loss, with_error

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from moa_search.search import Front
    from moa_search.search.tuning import Summary

__all__ = [
    "budget_lines",
    "comparison_table",
    "front_table",
    "plot_densities",
    "save_density_plot",
    "study_lines",
    "study_table",
    "validation_table",
]

SHOWN_REMARKS = 5


def front_table(front: Front) -> Table:
    """The plans of a front with density and predicted loss at every length, the chosen one marked."""
    criterion = front.chosen.provenance.criterion if front.chosen.provenance else None
    table = Table(title="Front" + (f", predicted loss by {criterion}" if criterion else ""), title_justify="left")
    table.add_column("plan", justify="right", no_wrap=True)
    if front.densities:
        table.add_column("asked", justify="right")
    for metrics in front.chosen.predicted:
        table.add_column(f"kept\n@{metrics.length}", justify="right")
        table.add_column(f"predicted loss\n@{metrics.length}", justify="right", no_wrap=True)
    table.add_column("gap", justify="right")
    for index, plan in enumerate(front.plans):
        cells = [f"{front.densities[index]:.4g}"] if front.densities else []
        cells += [cell for m in plan.predicted for cell in (f"{m.density:.2%}", predicted_loss(m))]
        gap = plan.provenance.gap if plan.provenance else None
        name = "plan.json" if index == front.chosen_index else f"{index:02d}"
        if index == front.chosen_index and front.has_knee:
            name = "plan.json (knee)"
        table.add_row(name, *cells, "" if gap is None else f"{gap:.2%}")
    return table


def budget_lines(front: Front) -> list[str]:
    """For each budget of the chosen plan what was asked and what it uses, densities in the front's table aside."""
    shown = {metrics.length for metrics in front.chosen.predicted}
    return [
        f"{escape(use.asked.text)}: uses {use.used}"
        for use in front.usage
        if use.asked.kind != "density" or use.asked.length not in shown
    ]


def plot_densities(front: Front) -> Figure:
    """Predicted loss over density, one line per length with its standard error; the knee is marked.

    Args:
        front: Of several densities.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    lengths = [metrics.length for metrics in front.plans[0].predicted]
    for index, length in enumerate(lengths):
        metrics = [plan.predicted[index] for plan in front.plans]
        axes.errorbar(
            [100 * m.density for m in metrics],
            [m.loss or 0.0 for m in metrics],
            yerr=[m.loss_error or 0.0 for m in metrics],
            marker="o",
            capsize=3,
            label=f"{length} tokens",
        )
    if front.has_knee:
        at = 100 * front.chosen.predicted[-1].density
        axes.axvline(at, color="grey", linestyle=":", label=f"knee, {front.densities[front.chosen_index or 0]:.4g}")
    criterion = front.chosen.provenance.criterion if front.chosen.provenance else None
    axes.set_xlabel("KV cache kept (%)")
    axes.set_ylabel("predicted loss" + (f" ({criterion})" if criterion else ""))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def save_density_plot(front: Front, path: str | os.PathLike[str]) -> None:
    """Write `plot_densities` as PNG, atomically."""
    save_figure(plot_densities(front), path)


def validation_table(rows: pd.DataFrame) -> Table:
    """True losses of a front's plans, as `moa_search.api.validate_front` returns them."""
    table = Table(title="Held-out loss, nats per answer token", title_justify="left")
    table.add_column("plan")
    lengths = list(dict.fromkeys(rows["length"]))
    for length in lengths:
        for name in (f"kept\n@{length}", f"loss\n@{length}", f"above dense\n@{length}"):
            table.add_column(name, justify="right", no_wrap=True)
    first = rows.iloc[0]["plan"]
    dense = [f"{row['dense_loss']:.3f}" for _, row in rows[rows["plan"] == first].iterrows()]
    table.add_row("dense", *(cell for loss in dense for cell in ("100%", loss, "")))
    for name, group in rows.groupby("plan", sort=False):
        cells = []
        for _, row in group.iterrows():
            cells += [
                f"{row['density']:.1%}",
                _with_error(row["true_loss"], row["true_error"]),
                _with_error(row["difference"], row["difference_error"]),
            ]
        mark = " chosen" if group["chosen"].any() else " was chosen" if group["chosen_before"].any() else ""
        table.add_row(f"{escape(str(name))}[bold]{mark}[/bold]", *cells)
    return table


def comparison_table(rows: pd.DataFrame, criterion: str) -> Table:
    """Searchers side by side, as `moa_search.api.compare_searchers` returns them."""
    table = Table(title=f"Searchers at the same budget, predicted loss by {criterion}", title_justify="left")
    table.add_column("searcher")
    lengths = [name.removeprefix("density@") for name in rows.columns if name.startswith("density@")]
    truths = [name.removeprefix("true_loss@") for name in rows.columns if name.startswith("true_loss@")]
    for length in lengths:
        table.add_column(f"kept\n@{length}", justify="right")
        table.add_column(f"predicted loss\n@{length}", justify="right", no_wrap=True)
    for length in truths:
        table.add_column(f"true loss\n@{length}", justify="right", no_wrap=True)
    table.add_column("CPU s", justify="right")
    for _, row in rows.iterrows():
        cells = []
        for length in lengths:
            cells += [
                f"{row[f'density@{length}']:.1%}",
                with_error(row[f"loss@{length}"], row[f"loss_error@{length}"]),
            ]
        cells += [_with_error(row[f"true_loss@{length}"], row[f"true_error@{length}"]) for length in truths]
        table.add_row(row["searcher"], *cells, f"{row['cpu_s']:.1f}")
    return table


def study_table(summary: Summary) -> Table:
    """The best trials of a study."""
    table = Table(title="Best plans", title_justify="left")
    for name in ("trial", "held-out loss", "density", "criterion", "from"):
        table.add_column(name, justify="left" if name == "from" else "right")
    for result in summary.best:
        density = f"{result.values[1]:.2%}" if len(result.values) > 1 else ""
        origin = "the front" if result.is_seed else "the study"
        table.add_row(str(result.number), f"{result.values[0]:.4f}", density, result.knobs.criterion, origin)
    return table


def study_lines(summary: Summary) -> list[str]:
    """Trials by state, what tuning gained, and what went wrong."""
    counts = ", ".join(f"{count} {state.lower()}" for state, count in summary.counts.items() if count)
    lines = [f"trials: {counts}; {summary.reused} had a plan that was known"]
    if summary.seeds_best is not None and summary.tuned_best is not None:
        change = summary.tuned_best / summary.seeds_best - 1 if summary.seeds_best > 0 else 0.0
        lines.append(f"best of the front {summary.seeds_best:.4f}, best tuned {summary.tuned_best:.4f} ({change:+.1%})")
    lines += [escape(remark) for remark in summary.remarks[:SHOWN_REMARKS]]
    if len(summary.remarks) > SHOWN_REMARKS:
        lines.append(f"... and {len(summary.remarks) - SHOWN_REMARKS} more remarks")
    return lines


def _with_error(value: float, error: float | None) -> str:
    known = error is not None and error == error
    return f"{value:.3f} ± {error:.3f}" if known else f"{value:.3f}"
