"""One table, three printers: the same cells everywhere, whatever is in them."""

import io
import re
from html import unescape

import pandas as pd
import pytest
from rich.console import Console

from moa_search.inspection.printing import Table, column, digits, to_html, to_markdown, to_rich, with_error

NASTY = "a | [b]bold[/b] <i> & \\"


@pytest.fixture
def table():
    frame = pd.DataFrame({"name": ["plain", NASTY], "loss": [0.51234, None], "count": [3, 12], "unseen": [1, 2]})
    columns = [column("name", left=True), column("loss", "loss @1024", digits(2)), column("count")]
    return Table(frame, columns, f"Losses of {NASTY}", group=["count"])


def in_terminal(table):
    console = Console(width=120, file=io.StringIO())
    console.print(to_rich(table))
    text = console.file.getvalue()
    rows = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if line.startswith(("│", "┃"))]
    return text, [[cell.strip() for cell in row] for row in rows]


def on_page(table):
    text = to_html(table)
    rows = re.findall(r"<tr>(.*?)</tr>", text, flags=re.DOTALL)
    return text, [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def in_document(table):
    text = to_markdown(table)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return text, [[cell.strip().replace("\\|", "|") for cell in row] for row in rows]


@pytest.mark.parametrize("show", [in_terminal, on_page, in_document])
def test_every_printer_shows_the_same_cells(table, show):
    text, rows = show(table)
    assert rows[-2:] == table.cells == [["plain", "0.51", "3"], [NASTY, "", "12"]]
    assert NASTY in unescape(text), "the title"
    assert "unseen" not in text


def test_notebooks_show_it_as_pages_do(table):
    assert table._repr_html_() == to_html(table)


def test_terminals_break_headings_before_lengths_and_draw_groups_apart(table):
    text, rows = in_terminal(table)
    assert rows[0] == ["", "loss", ""]
    assert rows[1] == ["name", "@1024", "count"]
    assert text.count("├") == 1


def test_pages_name_rows_and_columns(table):
    text, _ = on_page(table)
    assert re.findall(r'scope="(\w+)"', text) == ["col"] * 3 + ["row"] * 2
    assert "<i>" not in text


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [(0.5, 0.01, "0.5 ± 0.01"), (0.5, None, "0.5"), (0.5, float("nan"), "0.5"), (None, 0.1, ""), (pd.NA, None, "")],
)
def test_an_error_is_shown_as_far_as_it_is_known(value, error, shown):
    assert with_error(value, error) == shown
