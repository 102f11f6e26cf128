"""Drawing, below everything that has something to draw: numbers and texts in, Axes or SVG out.

It knows neither plans nor profiles, so that their own methods may use it.
"""

from moa_search.pictures.axes import OKABE_ITO, axes_or_new, cells_size, draw_cells, draw_lines, draw_mask
from moa_search.pictures.svg import cell_grid, hex_colours, notebook_html

__all__ = [
    "OKABE_ITO",
    "axes_or_new",
    "cell_grid",
    "cells_size",
    "draw_cells",
    "draw_lines",
    "draw_mask",
    "hex_colours",
    "notebook_html",
]
