"""Screenshots of the pages of moa-inspect and moa-eval report for the documentation: docs/images/page-*.png.

    pip install 'moa-search[browser]' and a Chromium, then: python tools/take_screenshots.py [REPORT.html]

What is drawn comes from profiles/smollm2-135m-instruct; a report takes an hour, so it is named if it is to be pictured.
Look at every picture before committing it.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from moa_search.api import diff_plans, inspect_front, inspect_plan, inspect_profile, search_front

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "profiles" / "smollm2-135m-instruct"
IMAGES = ROOT / "docs" / "images"
SECTIONS = {"report": "#scores-passkey"}
"""What is pictured where that isn't the top."""
COLOURS = 256
SIZES = {"desktop": (1280, 860, "light"), "phone": (390, 844, "dark")}


def make_pages(folder: Path) -> dict[str, Path]:
    """The pages by name."""
    profile = str(SHIPPED / "profile.safetensors")
    search_front(profile, density=[0.25], output=str(folder / "out"))
    pages = {name: folder / f"{name}.html" for name in ("plan", "profile", "diff", "front")}
    inspect_plan(str(folder / "out" / "plan.json"), html=str(pages["plan"]), profile=profile)
    inspect_profile(profile, html=str(pages["profile"]))
    diff_plans([str(SHIPPED / "half.json"), str(SHIPPED / "quarter.json")], html=str(pages["diff"]))
    inspect_front(str(folder / "out"), html=str(pages["front"]))
    return pages


def shoot(page: Page, path: Path, title: str) -> None:
    """The top of a page, with the tooltip of one head where there is a heat map in sight."""
    page.evaluate("title => { document.querySelector('h1').textContent = title; }", title)  # not a temporary folder
    cells = page.locator("rect[data-layer='7'][data-head='2']")
    cell, box = cells.first, cells.first.bounding_box() if cells.count() else None
    size = page.viewport_size
    if box is not None and size is not None and box["y"] < size["height"]:
        cell.hover()
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Make the pages and take the pictures."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("take_screenshots: needs Chromium (on Debian: apt-get install chromium)")
    titles = {
        "plan": "Plan plan.json",
        "profile": "Profile profile.safetensors",
        "diff": "half.json and quarter.json",
        "report": "Effective context of SmolLM2-135M",
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        pages = make_pages(Path(folder))
        if len(sys.argv) > 1:
            pages["report"] = Path(sys.argv[1]).absolute()
        for name, path in pages.items():
            for size, (width, height, scheme) in SIZES.items():
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(path.as_uri() + SECTIONS.get(name, ""))
                shoot(page, IMAGES / f"page-{name}-{size}.png", titles.get(name, "Front out"))
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
