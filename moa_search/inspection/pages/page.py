"""Self-contained HTML pages: no network, light and dark, readable on a phone and on paper, every chart with its table.

A page is a title and sections; a section is a heading and blocks, which are HTML made by the functions here from the
templates beside this file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from moa_search.formats import Plan
from moa_search.formats.files import atomic_write
from moa_search.inspection.charts import svg_of
from moa_search.inspection.frames.plans import provenance_facts
from moa_search.inspection.printing import Table, to_html
from moa_search.pictures import cell_grid, hex_colours
from moa_search.pictures.templates import load_macros, render
from moa_search.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGE = "moa_search.inspection"

HOW_TO_READ = (
    "Layers are across, KV heads down. Point at a cell for its exact numbers, or go there with Tab and walk with the "
    "arrow keys."
)
SCALE_STEPS = 32


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: What links end with.
        title: Above it.
        blocks: HTML.
    """

    anchor: str
    title: str
    blocks: Sequence[str]


@dataclass
class Page:
    """A page that grows by sections.

    Attributes:
        title: Of the page.
        subtitle: A line below it.
        styles: Files of CSS, beside this one.
        scripts: Files of JavaScript that run at the end of the page, likewise.
        sections: What was added.
    """

    title: str
    subtitle: str = ""
    styles: Sequence[str] = ("page.css",)
    scripts: Sequence[str] = ()
    sections: list[Section] = field(default_factory=list)

    def add(self, title: str, *blocks: str) -> None:
        """Add a section of blocks of HTML; its anchor is its title in lower case with hyphens."""
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        taken = [section.anchor for section in self.sections]
        unique = anchor if anchor not in taken else f"{anchor}-{len(taken)}"
        self.sections.append(Section(unique, title, blocks))

    def render(self) -> str:
        """The whole page."""
        return render(PACKAGE, "pages/page.html", page=self, version=__version__)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page atomically."""
        with atomic_write(path) as file:
            file.write(self.render().encode())


def new_page(title: str, subtitle: str) -> Page:
    """A page whose heat maps answer to mouse, finger and keyboard."""
    return Page(title, subtitle, styles=("page.css", "grid.css"), scripts=("grid.js",))


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return str(_blocks().paragraph(text))


def heading(text: str) -> str:
    """A heading within a section."""
    return str(_blocks().heading(text))


def facts(entries: Mapping[str, object]) -> str:
    """Names and values as a list."""
    return str(_blocks().facts(entries))


def folded(summary: str, content: str) -> str:
    """HTML that unfolds below a line."""
    return str(_blocks().folded(summary, content))


def masks(figures: Sequence[str]) -> str:
    """Small pictures beside each other."""
    return str(_blocks().masks(figures))


def figure_block(picture: Figure, alt: str, *, caption: str = "", table: Table | None = None) -> str:
    """A picture with a text that stands for it and, folded below it, the table of what it shows.

    Args:
        picture: A matplotlib figure.
        alt: What is to be seen.
        caption: Below the picture.
        table: The numbers.
    """
    labelled = svg_of(picture, alt).replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
    drawn = str(_blocks().figure(labelled, caption))
    return drawn if table is None else drawn + folded("Data as a table", to_html(table))


def grid_block(
    fills: Sequence[Sequence[str]],
    texts: Sequence[Sequence[str]],
    label: str,
    *,
    colours: str,
    scale: tuple[str, str, str],
    native: bool = False,
) -> str:
    """A heat map that can be walked with the arrow keys, with its scale of colours; wide ones scroll sideways.

    Args:
        fills: Colours ``[layer][kv_head]``.
        texts: What cells say, likewise.
        label: What the picture is.
        colours: The colour map that the colours are from.
        scale: What its first and last colour mean, and of what.
        native: Whether some cells are grey.
    """
    first, last, of = scale
    steps = hex_colours(np.linspace(0, 1, SCALE_STEPS)[None], low=0, high=1, colours=colours)[0]
    cells = cell_grid(fills, texts, label=label, focusable=True)
    return str(_blocks().grid(cells, len(fills), _blocks().scale(steps, first, of, last), label, native))


def span_blocks(plan: Plan, lengths: Sequence[int]) -> list[str]:
    """One heat map of spans per length, each cell with its exact rule."""
    blocks = []
    for length in lengths:
        label = f"Share of a context of {length} tokens that each layer (across) and KV head (down) keeps"
        blocks += [
            heading(f"{length} tokens: keeps {plan.kept_text(length)}"),
            grid_block(
                hex_colours(plan.shares(length), low=0, high=1),
                plan.cell_texts(length),
                label,
                colours="viridis",
                scale=("0 %", "100 %", "span / n"),
                native=bool(plan.native_layers),
            ),
        ]
    return blocks


def origin_blocks(plan: Plan) -> list[str]:
    """All that a plan says about where it is from."""
    notes = plan.provenance.notes if plan.provenance else ()
    return [facts(provenance_facts(plan)), *(paragraph(f"Note: {note}") for note in notes)]


def _blocks() -> Any:
    return load_macros(PACKAGE, "pages/blocks.html")
