"""Pictures of the service's page for the documentation, taken with Chromium.

    modeclip serve runs/demo --port 8080
    python docs/page_pictures.py http://127.0.0.1:8080

Colours are reduced to 256, which pages of few colours bear without a trace.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ASSETS = Path(__file__).parent / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HEART = [(0.5, 0.82), (0.2, 0.52), (0.16, 0.36), (0.24, 0.24), (0.38, 0.22), (0.5, 0.34)]
"""The left half of a heart, as shares of the canvas."""


def save(page: Page, name: str) -> None:
    """Save what a browser shows."""
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1500)  # pictures on the map fade in, and the map comes to rest
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(ASSETS / name, "PNG", optimize=True)


def main() -> None:
    """Take a picture of each view that docs/page.md shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--words", default="umbrella")
    parser.add_argument("--cluster", default="umbrella", help="Words of the cluster whose card is shown.")
    arguments = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        context = chromium.new_context(viewport={"width": 1200, "height": 800}, color_scheme="light")
        context.set_default_timeout(120_000)
        context.add_init_script("if (top === self) localStorage.setItem('modeclip.tour', 'seen')")
        page = context.new_page()
        page.goto(f"{arguments.url}/#/search?q={arguments.words}")
        page.locator(".hit").first.wait_for()
        save(page, "page-search.png")
        page.set_viewport_size({"width": 1200, "height": 1180})
        page.goto(f"{arguments.url}/#/classify")
        draw(page)
        page.locator(".why img").first.wait_for()
        save(page, "page-classify.png")
        page.set_viewport_size({"width": 1200, "height": 800})
        page.goto(f"{arguments.url}/#/atlas")
        page.locator("summary", has_text="Clusters").click()
        page.get_by_label("Find a cluster by its words").fill(arguments.cluster)
        page.locator(".names button").first.click()
        page.locator(".side .thumbs img").first.wait_for()
        page.locator("summary", has_text="Clusters").click()
        page.get_by_role("button", name="Show all").click()
        save(page, "page-atlas.png")
        chromium.close()


def draw(page: Page) -> None:
    """Draw a heart."""
    box = page.locator(".board").bounding_box()
    assert box is not None
    for side in (1, -1):
        places = [(box["x"] + (0.5 + side * (x - 0.5)) * box["width"], box["y"] + y * box["height"]) for x, y in HEART]
        page.mouse.move(*places[0])
        page.mouse.down()
        for x, y in places[1:]:
            page.mouse.move(x, y, steps=8)
        page.mouse.up()


if __name__ == "__main__":
    main()
