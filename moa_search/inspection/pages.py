"""Self-contained HTML pages: no network, light and dark, readable on a phone and on paper, every chart with its table.

A page is a title and sections; a section is a heading and blocks, which are strings of HTML made by the functions here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from moa_search.formats.files import atomic_write
from moa_search.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["INK", "Page", "facts", "figure_block", "in_ink", "paragraph", "svg_of", "table_block"]

INK = "#1b2a3c"
"""Colour of text and axes in figures; `svg_of` puts the page's own in its place, light or dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #5b6470; --line: #d4d9df; --mark: #f3f5f8;
  --link: #0b57b0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #14171b; --faint: #a5aeb9; --line: #3a414a; --mark: #1f242a; --link: #8fc1ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; background: var(--paper); padding: .5rem; }
h1 { margin-bottom: 0; font-size: 1.6rem; line-height: 1.25; }
h1, h2, h3, p, li, figcaption, summary { overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
header p, figcaption, caption, footer { color: var(--faint); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
figure { margin: 1.5rem 0; }
figure svg, figure img { display: block; width: 100%; height: auto; max-height: 90vh; color: var(--ink); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { caption-side: top; padding-bottom: .25rem; text-align: left; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
thead th { background: var(--mark); }
tbody th { font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1rem; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .5rem; } }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; --mark: #eee; --link: #000; }
  body { max-width: none; font-size: 10pt; }
  nav, .skip { display: none; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  th, td { padding: .15rem .4rem; white-space: normal; }
}
"""


@dataclass
class Page:
    """A page that grows by sections.

    Attributes:
        title: Of the page.
        subtitle: A line below it.
        style: CSS beside that of every page.
        script: JavaScript that runs at the end of the page.
    """

    title: str
    subtitle: str = ""
    style: str = ""
    script: str = ""
    _sections: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, title: str, *blocks: str) -> None:
        """Add a section of blocks of HTML; its anchor is its title in lower case with hyphens."""
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        taken = [name for name, _, _ in self._sections]
        unique = anchor if anchor not in taken else f"{anchor}-{len(taken)}"
        self._sections.append((unique, title, "\n".join(blocks)))

    def render(self) -> str:
        """The whole page."""
        links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in self._sections)
        body = "\n".join(
            f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{escape(title)}</h2>\n'
            f"{content}\n</section>"
            for name, title, content in self._sections
        )
        subtitle = f"<p>{escape(self.subtitle)}</p>" if self.subtitle else ""
        script = f"<script>{self.script}</script>\n" if self.script else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<link rel="icon" href="data:,">\n'  # else a browser asks a server for one
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}{self.style}</style>\n</head>\n<body>\n"
            '<a class="skip" href="#content">Skip to content</a>\n'
            f"<header>\n<h1>{escape(self.title)}</h1>\n{subtitle}\n</header>\n"
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="content">\n{body}\n</main>\n'
            f"<footer><p>Made by moa-search {__version__}.</p></footer>\n{script}</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page atomically."""
        with atomic_write(path) as file:
            file.write(self.render().encode())


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def facts(entries: Mapping[str, object]) -> str:
    """Names and values as a list."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in entries.items())
    return f"<dl>{rows}</dl>"


def table_block(
    frame: pd.DataFrame,
    caption: str,
    *,
    formats: Mapping[str, Callable[[Any], str]] | None = None,
    text: Sequence[str] = (),
) -> str:
    """A table that scrolls sideways where the screen is narrow; the first column names the rows.

    Args:
        frame: Without its index.
        caption: What the table shows.
        formats: How to write the values of a column; by default as they are, missing ones as nothing.
        text: Columns that are aligned to the left, beside the first.
    """
    formats = formats or {}
    left = {str(name) for name in text}
    columns = [str(name) for name in frame.columns]
    head = "".join(f'<th scope="col"{_text_class(name, left)}>{escape(name)}</th>' for name in columns)
    rows = []
    for values in frame.itertuples(index=False, name=None):
        cells = []
        for place, (name, value) in enumerate(zip(columns, values, strict=True)):
            shown = escape(formats[name](value) if name in formats else _plain(value))
            cell = f'<th scope="row">{shown}</th>' if place == 0 else f"<td{_text_class(name, left)}>{shown}</td>"
            cells.append(cell)
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>\n</div>"
    )


def figure_block(picture: str | Figure, alt: str, *, caption: str = "", table: str = "") -> str:
    """A picture with a text that stands for it and, folded below it, the table of what it shows.

    Args:
        picture: A matplotlib figure, or SVG.
        alt: What is to be seen.
        caption: Below the picture.
        table: Made by `table_block`.
    """
    drawn = picture if isinstance(picture, str) else svg_of(picture, alt)
    labelled = drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    data = f"<details><summary>Data as a table</summary>\n{table}\n</details>" if table else ""
    return f"<figure>\n{labelled}\n{below}</figure>\n{data}"


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


def _plain(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _text_class(name: str, left: set[str]) -> str:
    return ' class="text"' if name in left else ""
