"""Pages stand on their own and can be read without seeing the charts."""

import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from matplotlib.figure import Figure

from moa_search.inspection.charts import INK, in_ink, svg_of
from moa_search.inspection.pages.page import Page, facts, figure_block, paragraph
from moa_search.inspection.printing import Table, column, digits, to_html

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Tree(HTMLParser):
    """Tags, attributes and text; tags that aren't closed as they were opened are an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


@pytest.fixture
def figure():
    drawn = Figure(figsize=(3, 2))
    axes = drawn.subplots()
    axes.plot([1, 2, 3], [3, 1, 2], color="#0072b2")
    axes.set_title("Fall & rise", color=INK)
    return drawn


@pytest.fixture
def page(figure):
    frame = pd.DataFrame({"plan": ["a<b", "c"], "loss": [0.51234, None], "why": ["x", "y"]})
    columns = [column("plan"), column("loss", None, digits(2)), column("why", left=True)]
    table = Table(frame, columns, "Losses & plans")
    made = Page("Spans <of> a model", subtitle="two & two", scripts=["grid.js"])
    made.add("First part", paragraph("1 < 2"), facts({"n": 3, "who & what": "<me>"}), to_html(table))
    made.add("First part", figure_block(figure, 'a "line"', caption="it falls", table=table))
    return made


def test_it_is_well_formed_and_asks_no_network_for_anything(page):
    text = page.render()
    tree = Tree(text)
    loaded = [attributes.get(name) for _, attributes in tree.seen for name in ("src", "href", "xlink:href")]
    assert all(link is None or link.startswith(("#", "data:")) for link in loaded)
    assert not re.search(r"@import|url\((?!#)", text)


def test_what_it_says_is_escaped(page):
    words = "".join(Tree(page.render()).words)
    for text in ("Spans <of> a model", "two & two", "1 < 2", "a<b", "who & what", "<me>", "Losses & plans"):
        assert text in words


def test_sections_can_be_reached_by_links_of_their_own(page):
    tree = Tree(page.render())
    places = [attributes["id"] for attributes in tree.all("section")]
    assert places == ["first-part", "first-part-1"]
    linked = [attributes["href"] for attributes in tree.all("a")]
    assert linked == ["#content", "#first-part", "#first-part-1"]


def test_a_chart_says_what_it_shows_and_carries_its_table(page):
    tree = Tree(page.render())
    (picture,) = tree.all("svg")
    assert (picture["role"], picture["aria-label"]) == ("img", 'a "line"')
    assert len(tree.all("details")) == 1
    assert len(tree.all("table")) == 2


def test_tables_name_their_rows_and_columns(page):
    tree = Tree(page.render())
    scopes = [attributes["scope"] for attributes in tree.all("th")]
    assert scopes == 2 * (["col"] * 3 + ["row"] * 2)
    assert "0.51" in tree.words
    assert not {"None", "nan"} & set(tree.words), "what is missing is left out"


def test_a_figure_keeps_its_text_and_takes_the_colour_of_the_page(figure):
    drawn = svg_of(figure)
    assert drawn.startswith("<svg")
    assert "Fall &amp; rise" in drawn
    assert INK not in drawn
    assert "currentColor" in drawn
    assert "#0072b2" in drawn
    assert svg_of(figure) == drawn, "equal figures give equal bytes"


def test_figures_of_one_page_share_no_ids(figure):
    both = svg_of(figure, "one") + svg_of(figure, "two")
    places = re.findall(r' id="([^"]*)"', both)
    assert places
    assert len(places) == len(set(places))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', both)) == set(places), "no id that nothing points to"


def test_axes_and_ticks_take_the_colour_of_text():
    with in_ink():
        plain = Figure(figsize=(3, 2))
        plain.subplots().set_xlabel("tokens")
        drawn = svg_of(plain)
    assert "currentColor" in drawn
    assert "#000000" not in drawn


def test_a_page_is_written_whole(page, tmp_path):
    page.save(tmp_path / "out" / "page.html")
    assert (tmp_path / "out" / "page.html").read_text() == page.render()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["page.html"]
