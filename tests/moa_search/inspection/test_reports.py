"""A report's page says everything that its tables do."""

import re
from dataclasses import replace
from html import unescape

import pytest

from moa_search.inspection.pages import report_markdown, report_page


@pytest.fixture
def page(small_report):
    return report_page(small_report).render()


def tables(page):
    """Rows of cells by caption."""
    found = {}
    for table in re.findall(r"<table>.*?</table>", page, flags=re.DOTALL):
        caption = re.search(r"<caption>(.*?)</caption>", table)[1]
        rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
        cells = [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
        found[unescape(caption)] = cells
    return found


def test_every_section_is_there(page):
    titles = re.findall(r"<h2 [^>]*>(.*?)</h2>", page)
    assert titles == ["What ran", "Effective context", "Scores: passkey", "Scores: perplexity", "Differences", "Plans"]


def test_scores_with_their_intervals_and_memory(page):
    head, *rows = tables(page)["passkey, answers teacher-forced: means with 95 % intervals"]
    assert head == ["variant", "tokens", "tokens kept", "prefill computed", "n", "NLL", "exact match"]
    assert ["dense", "512", "100.0%", "100.0%", "6", "0.50 [0.50, 0.50]", "1.00 [1.00, 1.00]"] in rows
    assert len(rows) == 8


def test_effective_contexts_with_what_is_unknown_left_empty(page):
    head, *rows = tables(page)["Effective context, passkey in tokens: the longest length with 90 % right"]
    dense = dict(zip(head, rows[0], strict=True))
    assert (dense["effective context"], dense["fails at"], dense["average span"]) == ("1024", "", "1024")
    plan = dict(zip(head, rows[2], strict=True))
    assert (plan["effective context"], plan["fails at"]) == ("512", "1024")
    assert plan["x, equal KV (uniform)"].startswith("1.00 (")
    assert plan["x, equal span (window)"] == "", "no window was measured"


def test_depth_grids_and_losses_by_position(page):
    found = tables(page)
    head, *rows = found["passkey: score by depth and length"]
    assert head == ["variant", "depth", "512", "1024"]
    assert rows[0] == ["dense", "0%", "1.00", "1.00"]
    head, *rows = found["perplexity: loss by position, nats per token"]
    assert rows[0] == ["512", "0", "0.50", "1.50", "2.50", "3.50"]
    assert len(re.findall("<svg", page)) == 6


def test_differences_are_signed(page):
    rows = tables(page)["Less dense, the same items"]
    assert ["a <plan> of mine", "passkey", "512", "6", "+3.00 [+3.00, +3.00]", "+0.00 [+0.00, +0.00]"] in rows


def test_without_losses_there_is_no_chart_of_them(small_report):
    items = small_report.items.assign(nll=float("nan"), answers="generated")
    items = items[items["task"] == "passkey"]
    summary = small_report.summary[small_report.summary["task"] == "passkey"]
    summary = summary.assign(nll=float("nan"), nll_low=float("nan"), nll_high=float("nan"), answers="generated")
    page = report_page(replace(small_report, items=items, summary=summary)).render()
    assert "answers generated" in page
    assert "nan" not in page.replace("nancy", "")
    assert len(re.findall("<svg", page)) == 2


def test_the_document_has_the_cells_of_the_page(small_report, page):
    lines = [line.strip("|").split(" | ") for line in report_markdown(small_report).splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line] for line in lines]
    found = tables(page)
    captions = [name for name in found if name.startswith(("Effective context, passkey", "Less dense"))]
    assert len(captions) == 2
    for caption in captions:
        assert all(row in rows for row in found[caption])
    assert ["variant", "512 tokens, n = 6", "1024 tokens, n = 6"] in rows
    assert ["dense", "100%: 0.50 / 1.00 [1.00, 1.00]", "100%: 0.50 / 1.00 [1.00, 1.00]"] in rows


def test_equal_reports_give_equal_pages(small_report):
    assert report_page(small_report).render() == report_page(small_report).render()
