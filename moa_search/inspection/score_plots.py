"""Scores as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moa_search.inspection.charts import INK, in_ink
from moa_search.pictures import OKABE_ITO

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
MARKS = "osD^vPX*"
PANELS_PER_ROW = 2


def plot_by_length(summary: pd.DataFrame, value: str, *, label: str, threshold: float | None = None) -> Figure:
    """One line per variant over lengths, with 95 % intervals.

    Args:
        summary: Of one task, as `moa_search.evaluation.summarise` returns it.
        value: ``score`` or ``nll``.
        label: Of the upward axis.
        threshold: Drawn as a line across, if given.
    """
    with in_ink():
        figure, axes = _figure(5.4, 4.2)
        for place, (name, rows) in enumerate(_variants(summary)):
            rows = rows.sort_values("length")
            # Variants are set apart a little, so that their intervals can be told from each other.
            x = rows["length"] * (1 + 0.012 * place)
            spread = [rows[value] - rows[f"{value}_low"], rows[f"{value}_high"] - rows[value]]
            axes.errorbar(x, rows[value], yerr=spread, label=name, capsize=2, linewidth=1.5, **_style(place, name))
        if threshold is not None:
            axes.axhline(threshold, linewidth=1, linestyle=":", color="grey")
        axes.set_xscale("log", base=2)
        lengths = sorted(summary["length"].unique())
        axes.set_xticks(lengths, [str(length) for length in lengths], rotation=45 if len(lengths) > 8 else 0)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        _legend(figure, axes)
    return figure


def plot_by_position(items: pd.DataFrame) -> Figure:
    """Loss along documents: one panel per length, one line per variant, means over documents."""
    lengths = sorted(items["length"].unique())
    with in_ink():
        figure, panels = _panels(len(lengths), width=2.8, height=2.6)
        for axes, length in zip(panels, lengths, strict=True):
            for place, (name, rows) in enumerate(_variants(items)):
                mean = rows[rows["length"] == length].groupby("depth")["nll"].mean()
                axes.plot(mean.index * length, mean, label=name, linewidth=1.5, markersize=4, **_style(place, name))
            axes.set_title(f"{length} tokens", loc="left", fontsize=10)
            axes.set_xlabel("position")
        panels[0].set_ylabel("nats per token")
        _legend(figure, panels[0])
    return figure


def plot_depths(items: pd.DataFrame) -> Figure:
    """Score by depth and length: one panel per variant, dark where answers are wrong."""
    from matplotlib import colormaps

    variants = _variants(items)
    table = items.pivot_table(index="depth", columns=["variant", "length"], values="score", aggfunc="mean")
    with in_ink():
        figure, panels = _panels(len(variants), width=2.6, height=2.3)
        for axes, (name, _) in zip(panels, variants, strict=True):
            shown = table[name]
            colours = colormaps["viridis"].with_extremes(bad="lightgrey")
            image = axes.imshow(shown, vmin=0, vmax=1, cmap=colours, aspect="auto")
            axes.set_title(name, loc="left", fontsize=9)
            axes.set_xticks(range(shown.shape[1]), [str(length) for length in shown.columns], fontsize=8)
            axes.set_yticks(range(shown.shape[0]), [f"{depth:.0%}" for depth in shown.index], fontsize=8)
        panels[0].set_ylabel("depth")
        figure.colorbar(image, ax=panels, label="score", shrink=0.8)
    return figure


def _variants(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(name), group) for name, group in rows.groupby("variant", sort=False)]


def _style(place: int, name: str) -> dict[str, Any]:
    """Colour, dash and mark differ, so that lines can be told apart without colours; dense takes the text's colour."""
    others = OKABE_ITO[:-1]  # the last is black, which a dark page swallows
    colour = INK if name == "dense" else others[place % len(others)]
    return {"color": colour, "linestyle": DASHES[place % len(DASHES)], "marker": MARKS[place % len(MARKS)]}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    across = min(count, PANELS_PER_ROW)
    down = -(-count // across)
    figure = Figure(figsize=(width * across + 0.6, height * down + 0.4), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(2, len(names)), frameon=False, fontsize=9)
