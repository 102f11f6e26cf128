"""One table, three printers: for terminals, for pages and for documents.

A `Table` is a frame of values, as a CSV holds them, with how to show them: `to_rich`, `to_html` and `to_markdown` print
the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moa_search.pictures.templates import load_macros

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table as RichTable

FACT_WIDTH = 10
"""Characters that a terminal leaves for the name of a fact."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: Above it; terminals break it before ``@``.
        show: The text of a row's cell.
        left: Whether its cells are texts, which are aligned to the left; the first column of a page's table always is.
        stands_out: Of which rows the cell is bold in a terminal.
    """

    heading: str
    show: Callable[[Row], str]
    left: bool = False
    stands_out: Callable[[Row], bool] = lambda row: False


@dataclass(frozen=True)
class Table:
    """A frame and how to show it.

    Attributes:
        frame: Values, one row for each of the table's.
        columns: What is shown of them.
        title: What the table shows.
        group: Columns of the frame that are the same within a group of rows; terminals draw a line between groups.
    """

    frame: pd.DataFrame
    columns: Sequence[Column]
    title: str = ""
    group: Sequence[str] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The frame, row by row."""
        return [{str(name): value for name, value in row.items()} for row in self.frame.to_dict("records")]

    @property
    def cells(self) -> list[list[str]]:
        """The texts, row by row."""
        return [[column.show(row) for column in self.columns] for row in self.rows]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return to_html(self)


def column(
    name: str, heading: str | None = None, form: Callable[[Any], str] | None = None, *, left: bool = False
) -> Column:
    """A column that shows one column of the frame; what is missing is left out.

    Args:
        name: Of the frame's column.
        heading: By default the name with spaces.
        form: Makes a value a text; by default ``str``.
        left: As for `Column`.
    """
    return Column(
        name.replace("_", " ") if heading is None else heading, lambda row: plain(row.get(name), form or str), left
    )


def plain(value: Any, form: Callable[[Any], str] = str) -> str:
    """A value as text, nothing where it is missing."""
    return "" if is_missing(value) else form(value)


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN or pandas' NA."""
    import pandas as pd

    return value is None or value is pd.NA or value != value


def percent(value: float) -> str:
    """A share in percent."""
    return f"{value:.1%}"


def mebibytes(value: float) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:.1f}"


def whole(value: float) -> str:
    """A whole number, which a column with missing values holds as another type."""
    return f"{value:.0f}"


def digits(count: int) -> Callable[[float], str]:
    """Numbers with so many digits behind the point."""
    return lambda value: f"{value:.{count}f}"


def with_error(value: float | None, error: float | None, form: str = ".4g", error_form: str = ".1g") -> str:
    """A number with its standard error, as far as they are known."""
    return plain(value, lambda known: f"{known:{form}}" + plain(error, lambda wide: f" ± {wide:{error_form}}"))


def to_rich(table: Table) -> RichTable:
    """The table for a terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(table.title, "table.title"), title_justify="left")
    for shown in table.columns:
        heading = shown.heading.replace(" @", "\n@")
        drawn.add_column(Text(heading), justify="left" if shown.left else "right", no_wrap="\n" in heading)
    last = None
    for row in table.rows:
        key = [row[name] for name in table.group]
        if last is not None and key != last:
            drawn.add_section()
        last = key
        drawn.add_row(*(Text(cell.show(row), "bold" if cell.stands_out(row) else "") for cell in table.columns))
    return drawn


def to_html(table: Table) -> str:
    """The table for a page: it scrolls sideways where the screen is narrow, and its first column names the rows."""
    return str(load_macros(__package__, "pages/blocks.html").table(table.title, table.columns, table.cells))


def to_markdown(table: Table) -> str:
    """The table for a document, its title above it."""
    lines = [[shown.heading for shown in table.columns], *table.cells]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    rule = "|" + "|".join("---" if shown.left or place == 0 else "--:" for place, shown in enumerate(table.columns))
    title = [f"**{table.title}**", ""] if table.title else []
    return "\n".join([*title, texts[0], f"{rule}|", *texts[1:]]) + "\n"


def fact_lines(facts: Mapping[str, str]) -> list[str]:
    """Names and values for a terminal, one per line."""
    from rich.markup import escape

    return [f"{name:<{FACT_WIDTH}}{escape(value)}" for name, value in facts.items()]
