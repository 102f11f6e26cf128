"""Pictures by matplotlib, in colours for every colour vision: viridis and cividis for amounts, Okabe-Ito for lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Line colours of Okabe and Ito (2008); the yellow, too pale on white, is left out."""

MISSING = "lightgrey"
MOST_TICKS = 15


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (6.4, 4.0)) -> Axes:
    """The caller's Axes, or those of a new figure of pyplot's, which a notebook shows by itself; in inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def cells_size(layers: int, heads: int) -> tuple[float, float]:
    """Width and height in inches of a figure with a heat map."""
    return max(5.0, 0.27 * layers + 1.8), max(1.6, 0.32 * heads + 1.1)


def draw_cells(
    values: npt.NDArray[Any],
    ax: Axes | None,
    *,
    title: str,
    label: str,
    limits: tuple[float, float],
    colours: str = "viridis",
    logarithmic: bool = False,
    xlabel: str = "layer",
) -> Axes:
    """A heat map with layers across and KV heads down.

    Args:
        values: ``[layer, kv_head]``; NaN is grey.
        ax: Axes to draw on, or None.
        title: Above it.
        label: Of the colour bar.
        limits: Values of the first and the last colour; what lies beyond takes their colour.
        colours: A colour map of matplotlib's.
        logarithmic: Whether equal ratios are equal steps of colour.
        xlabel: Below it.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    layers, heads = values.shape
    ax = axes_or_new(ax, cells_size(layers, heads))
    norm = (LogNorm if logarithmic else Normalize)(*limits, clip=True)
    image = ax.imshow(
        np.ma.masked_invalid(values.T),
        cmap=colormaps[colours].with_extremes(bad=MISSING),
        norm=norm,
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("KV head")
    ax.set_xticks(range(0, layers, -(-layers // MOST_TICKS)))
    ax.set_yticks(range(0, heads, max(1, heads // 8)))
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.01)
    return ax


def draw_mask(mask: npt.NDArray[np.bool_], length: int, ax: Axes | None, *, title: str, native: bool = False) -> Axes:
    """Which key each query attends.

    Args:
        mask: ``[query, key]``, at positions equally far apart from 0 to ``length``.
        length: Tokens.
        ax: Axes to draw on, or None.
        title: Above it.
        native: Whether it is the model's own window, which is drawn in grey.
    """
    from matplotlib.colors import ListedColormap

    ax = axes_or_new(ax, (4.2, 4.2))
    colours = ListedColormap(["#00000000", "dimgrey" if native else OKABE_ITO[0]])
    ax.imshow(mask, cmap=colours, vmin=0, vmax=1, extent=(0, length, length, 0), interpolation="auto")
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    return ax


def draw_lines(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    ax: Axes | None,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Axes:
    """Lines over lengths, which double from tick to tick, each with a dash of its own beside its colour."""
    ax = axes_or_new(ax)
    dashes = ("-", "--", ":", "-.")
    for index, (name, y) in enumerate(lines.items()):
        ax.plot(x, y, label=name, color=OKABE_ITO[index % len(OKABE_ITO)], linestyle=dashes[index % len(dashes)])
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(bottom=0)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax
