"""Charts for pages: figures in a page's ink, and what they show."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moa_search.formats import Plan, Profile
from moa_search.formats.provenance import LengthMetrics
from moa_search.pictures import OKABE_ITO

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b2a3c"
"""Colour of text and axes in figures; `svg_of` puts the page's own in its place, light or dark."""

SAME_SHARE = 0.01
"""Plans whose densities differ by less are of one budget: their losses at two lengths are set against each other."""


@contextlib.contextmanager
def in_ink() -> Iterator[None]:
    """Figures that are made and drawn within have text, axes and ticks in `INK`."""
    import matplotlib as mpl

    with mpl.rc_context(
        {"text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    ):
        yield


def svg_of(figure: Figure, name: str = "") -> str:
    """A matplotlib figure as SVG to stand in a page: its text stays text, its background the page's.

    What is drawn in `INK` takes the page's colour of text; equal figures give equal bytes.

    Args:
        figure: The figure.
        name: Tells it from other figures of one page, whose ids mustn't be the same.
    """
    import matplotlib as mpl

    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moa-search"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor").strip()
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', drawn))
    prefix = f"f{hashlib.sha256(name.encode()).hexdigest()[:8]}-"

    def own(match: re.Match[str]) -> str:
        return f' id="{prefix}{match[1]}"' if match[1] in used else ""

    drawn = re.sub(r' id="([^"]*)"', own, drawn)
    return re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}", drawn)


def chart(draw: Callable[[Axes], Any], *, width: float = 5.6, height: float = 3.4) -> Figure:
    """A figure in the colours of a page; sizes in inches."""
    from matplotlib.figure import Figure

    with in_ink():
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
    return figure


def draw_layers(ax: Axes, per_layer: npt.NDArray[np.float64], native: Sequence[int], ylabel: str) -> None:
    """Bars of one value per layer, those of native layers grey."""
    colours = ["grey" if layer in native else OKABE_ITO[0] for layer in range(len(per_layer))]
    ax.bar(range(len(per_layer)), per_layer, color=colours)
    ax.set_xlabel("layer (grey: own window)" if native else "layer")
    ax.set_ylabel(ylabel)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", alpha=0.3)


def draw_front(ax: Axes, plans: Sequence[Plan], names: Sequence[str], chosen: int | None) -> None:
    """The plans of a front by their predicted losses: over bytes, or under one budget at the first and last length.

    Every plan has a name beside it, the chosen one a ring around it. Extrapolated losses aren't drawn where there are
    others.
    """
    known = [_known(plan) for plan in plans]
    kept = [metrics[-1].bytes_kept for metrics in known]
    lengths = [metrics.length for metrics in known[0]]
    if len(lengths) > 1 and max(kept) - min(kept) < SAME_SHARE:
        x = [metrics[0].loss or 0.0 for metrics in known]
        ax.set_xlabel(f"predicted loss at {lengths[0]} tokens")
    else:
        x = [100 * share for share in kept]
        ax.set_xlabel(f"bytes of the KV cache kept at {lengths[-1]} tokens (%)")
    y = [metrics[-1].loss or 0.0 for metrics in known]
    ax.set_ylabel(f"predicted loss at {lengths[-1]} tokens")
    ax.plot(x, y, "o", color=OKABE_ITO[0], label="plans")
    for name, across, up in zip(names, x, y, strict=True):
        ax.annotate(name, (across, up), xytext=(5, 4), textcoords="offset points", fontsize=8)
    if chosen is not None:
        ax.plot(x[chosen], y[chosen], "o", markersize=14, fillstyle="none", color=OKABE_ITO[1], label="plan.json")
    ax.margins(0.12)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)


def _known(plan: Plan) -> list[LengthMetrics]:
    """Predictions from losses that were profiled, or all where there are none."""
    return [metrics for metrics in plan.predicted if not metrics.extrapolated] or list(plan.predicted)


def draw_window_losses(
    ax: Axes, profile: Profile, length: int, heads: Sequence[tuple[int, int]], criterion: str
) -> None:
    """What every window costs some heads, with standard errors."""
    from moa_search.formats.criteria import window_losses

    entry = profile.by_length[length]
    mean, error = window_losses(entry, criterion)
    for index, (layer, head) in enumerate(heads):
        ax.errorbar(
            entry.header.windows,
            mean[layer, head],
            yerr=error[layer, head],
            color=OKABE_ITO[index % len(OKABE_ITO)],
            marker="osD^v"[index % 5],
            markersize=3,
            label=f"layer {layer}, KV head {head}",
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("window (tokens)")
    ax.set_ylabel(f"{criterion} loss at {length} tokens")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
