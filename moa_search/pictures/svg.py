"""Heat maps as SVG: every cell says what it stands for, under the mouse and under the keyboard's focus."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["cell_grid", "hex_colours"]

CELL, GAP, LEFT, TOP, BOTTOM = 20, 1, 26, 4, 34
MISSING = "#d3d3d3"


def hex_colours(values: npt.NDArray[Any], *, low: float, high: float, colours: str = "viridis") -> list[list[str]]:
    """A colour map's colours of values from ``low`` to ``high``, of any shape ``[a, b]``; grey for NaN."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shares = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    return [
        [MISSING if np.isnan(share) else to_hex(colormaps[colours](float(share))) for share in row] for row in shares
    ]


def cell_grid(fills: Sequence[Sequence[str]], titles: Sequence[Sequence[str]], *, label: str, focusable: bool) -> str:
    """A grid with layers across and KV heads down.

    Args:
        fills: Colours ``[layer][kv_head]``.
        titles: What a cell says, likewise.
        label: What the picture is, for those who can't see it.
        focusable: Whether cells are stops of the keyboard: the first by Tab, the others by what the page adds.

    Returns:
        An ``<svg>`` element as wide as its place, cells with ``data-layer`` and ``data-head``.
    """
    layers, heads = len(fills), len(fills[0])
    width, height = LEFT + layers * CELL, TOP + heads * CELL + BOTTOM
    parts = [
        f'<svg class="cells" role="group" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg" '
        'style="max-width:100%;height:auto;font:10px sans-serif;fill:currentColor">'
    ]
    for head in range(0, heads, -(-heads // 16)):
        y = TOP + head * CELL + CELL * 0.68
        parts.append(f'<text x="{LEFT - 4}" y="{y:g}" text-anchor="end">{head}</text>')
    for layer in range(0, layers, -(-layers // 40)):
        x = LEFT + layer * CELL + CELL / 2
        parts.append(f'<text x="{x:g}" y="{TOP + heads * CELL + 13}" text-anchor="middle">{layer}</text>')
    parts.append(f'<text x="{LEFT}" y="{height - 6}">layers across, KV heads down</text>')
    for layer, row in enumerate(fills):
        for head, fill in enumerate(row):
            says = escape(titles[layer][head])
            stop = f' tabindex="{0 if layer == head == 0 else -1}"' if focusable else ""
            parts.append(
                f'<rect x="{LEFT + layer * CELL}" y="{TOP + head * CELL}" width="{CELL - GAP}" '
                f'height="{CELL - GAP}" fill="{fill}" data-layer="{layer}" data-head="{head}" role="img" '
                f'aria-label="{says}"{stop}><title>{says}</title></rect>'
            )
    return "".join([*parts, "</svg>"])
