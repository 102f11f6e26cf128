"""The pages in Chromium, where there is one: nothing on the console, tooltips under mouse and keyboard, no overflow.

Skipped without Chromium or without playwright (``pip install 'moa-search[browser]'``); what the pages say is tested
without a browser.
"""

import shutil

import pytest

from moa_search.formats import Plan
from moa_search.inspection.pages import diff_page, plan_page, profile_page, report_page
from moa_search.spans import SpanRule

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]

WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page at a width; what the console or the network says is collected in ``page.said``."""
    opened = []

    def go(made, width, scheme="light"):
        made.save(tmp_path / "page.html")
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened.append(context)
        page = context.new_page()
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.said.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        page.said = [said for said in page.said if not said.startswith(("file:", "data:"))]
        return page

    yield go
    for context in opened:
        context.close()


@pytest.fixture
def wide_plan(tiny_signature):
    """As wide as a large model."""
    model = tiny_signature.model_copy(update={"num_hidden_layers": 48})
    rules = [[SpanRule(64 + layer, 0), SpanRule(0, 4 * layer)] for layer in range(48)]
    return Plan.from_rules(rules, model)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_quiet_and_no_wider_than_the_screen(visit, wide_plan, tiny_profile, small_report, width):
    other = Plan.uniform(SpanRule(300, 0), wide_plan.model)
    names = ["a/rather/long/path/to/a/plan/that/does/not/break.json", "b"]
    for made in (
        plan_page(wide_plan, title=names[0]),
        profile_page(tiny_profile),
        diff_page([wide_plan, other], names),
        report_page(small_report),
    ):
        page = visit(made, width)
        assert page.said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_exact_rule_under_the_mouse(visit, wide_plan, width):
    page = visit(plan_page(wide_plan, lengths=[1024]), width)
    tip = page.locator(".tip")
    assert not tip.is_visible()
    for layer, head in ((0, 0), (47, 1)):
        page.locator(f"rect[data-layer='{layer}'][data-head='{head}']").hover()
        assert tip.inner_text() == wide_plan.cell_texts(1024)[layer][head]
        box = tip.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    page.locator("h1").hover()
    assert not tip.is_visible()


def test_the_exact_rule_under_the_keyboard(visit, wide_plan):
    page = visit(plan_page(wide_plan, lengths=[512, 1024]), WIDTHS["desktop"])
    tip = page.locator(".tip")
    stops = []
    for _ in range(30):
        page.keyboard.press("Tab")
        stops.append(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.tagName")
        )
        if stops[-1] == wide_plan.cell_texts(512)[0][0]:
            break
    assert tip.inner_text() == wide_plan.cell_texts(512)[0][0], stops
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert tip.inner_text() == wide_plan.cell_texts(512)[1][1], "at the edge it stays"
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.keyboard.press("Tab")
    assert tip.inner_text() == wide_plan.cell_texts(1024)[0][0], "one stop for each heat map"


def test_dark_and_paper(visit, tiny_plan):
    made = plan_page(tiny_plan)
    dark = visit(made, WIDTHS["desktop"], "dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert dark.evaluate(colour) == "rgb(20, 23, 27)"
    assert visit(made, WIDTHS["desktop"]).evaluate(colour) == "rgb(255, 255, 255)"
    dark.emulate_media(media="print")
    assert dark.evaluate(colour) == "rgb(255, 255, 255)"
    assert not dark.locator("nav").is_visible()
    assert dark.evaluate("document.documentElement.scrollWidth") <= WIDTHS["desktop"]
