"""Heat maps as SVG: every cell says what it stands for, under the mouse and under the keyboard's focus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moa_search.pictures.templates import load_macros, render

if TYPE_CHECKING:
    import numpy.typing as npt

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
    texts: list[tuple[str, str, str, object]] = []
    for head in range(0, heads, -(-heads // 16)):
        texts.append((f"{LEFT - 4}", f"{TOP + head * CELL + CELL * 0.68:g}", "end", head))
    for layer in range(0, layers, -(-layers // 40)):
        texts.append((f"{LEFT + layer * CELL + CELL / 2:g}", f"{TOP + heads * CELL + 13}", "middle", layer))
    texts.append((f"{LEFT}", f"{height - 6}", "", "layers across, KV heads down"))
    cells = [
        {
            "layer": layer,
            "head": head,
            "x": LEFT + layer * CELL,
            "y": TOP + head * CELL,
            "fill": fill,
            "says": titles[layer][head],
            "stop": 0 if layer == head == 0 else -1,
        }
        for layer, row in enumerate(fills)
        for head, fill in enumerate(row)
    ]
    drawn = render(
        "moa_search.pictures",
        "cells.svg",
        label=label,
        width=width,
        height=height,
        texts=texts,
        cells=cells,
        size=CELL - GAP,
        focusable=focusable,
    )
    return drawn.strip()


def notebook_html(kind: str, about: str, grid: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """What a notebook shows of an object: a line, a grid and a small table.

    Args:
        kind: Of the object.
        about: What it is, after its kind.
        grid: As `cell_grid` returns it.
        columns: Headings of the table.
        rows: Its cells.
    """
    return str(load_macros("moa_search.pictures", "notebook.html").shown(kind, about, grid, columns, rows))
