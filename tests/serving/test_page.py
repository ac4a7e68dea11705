"""The page in a real browser: Debian's Chromium, driven by Playwright, and looked through by axe-core."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from modeclip.data.catalog import Catalog
from modeclip.serving.app import create_app
from modeclip.serving.service import open_service
from modeclip.system.files import only_process

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.slow,
]
PATIENCE = 120_000
ROOT = Path(__file__).parents[2]
HEART = ROOT / "docs" / "assets" / "heart.png"


class Server:
    """The service in a thread, at a port that it takes again when it is restarted."""

    def __init__(self, run: Path, key: str = "") -> None:
        self.run, self.port, self.key = run, 0, key
        self.start()

    def start(self) -> None:
        place = socket.socket()
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", self.port))
        self.port = place.getsockname()[1]
        self.service = open_service(self.run)
        config = uvicorn.Config(
            create_app(self.service, key=self.key, look=False),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self._server, self._place = uvicorn.Server(config), place
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [place]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._place.close()
        self.service.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def server(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service of a copy of the run, which masks may be added to."""
    running = Server(shutil.copytree(served_run, tmp_path_factory.mktemp("page") / "run"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[Callable[..., Page]]:
    """Open an address as a visitor who has seen the tour; whatever goes wrong in a script fails the test."""
    contexts, wrong = [], []

    def open_at(address: str = "", *, new: bool = False, of: Server = server, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        if not new:
            context.add_init_script("if (top === self) localStorage.setItem('modeclip.tour', 'seen')")
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{of.url}/{address}")
        return page

    expect.set_options(timeout=PATIENCE)
    yield open_at
    for context in contexts:
        context.close()
    assert not wrong


def drop(page: Page, selector: str, path: Path) -> None:
    """Drop a file on an element."""
    page.evaluate(
        """([selector, data]) => {
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
          transfer.items.add(new File([bytes], "heart.png", { type: "image/png" }));
          const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
          document.querySelector(selector).dispatchEvent(event);
        }""",
        [selector, base64.b64encode(path.read_bytes()).decode()],
    )


def draw(page: Page, selector: str, points: list[tuple[float, float]]) -> None:
    """Draw with the mouse; points are shares of the element's width and height."""
    box = page.locator(selector).bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for x, y in places[1:]:
        page.mouse.move(x, y, steps=5)
    page.mouse.up()


def words_of(page: Page) -> Any:
    return page.get_by_label("What the pictures should show")


def test_search_answers_and_reload_and_back_find_it_again(open_page: Callable[..., Page]) -> None:
    page = open_page()
    words_of(page).fill("arrow")
    page.keyboard.press("Enter")
    expect(page.locator(".hit").first).to_be_visible()
    first = page.locator(".hit").first.get_attribute("aria-label") or ""
    assert "q=arrow" in page.url
    expect(page.locator(".legend li").first).to_contain_text("expert")
    words_of(page).fill("heart")
    page.keyboard.press("Enter")
    expect(page.locator(".hit").first).not_to_have_attribute("aria-label", first)
    page.go_back()
    expect(page.locator(".hit").first).to_have_attribute("aria-label", first)
    page.reload()
    expect(page.locator(".hit").first).to_have_attribute("aria-label", first)
    expect(words_of(page)).to_have_value("arrow")
    page.locator(".hit").first.click()
    expect(page.get_by_role("dialog")).to_contain_text("standard deviations")
    page.go_forward()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.go_back()
    expect(page.locator(".hit").first).to_have_attribute("aria-label", first)
    page.locator(".hit").first.click()
    page.get_by_role("link", name="Similar pictures").click()
    expect(page.locator(".chosen img")).to_be_visible()
    expect(page.locator(".hit .caption").first).to_have_text(first.split(", strength")[0])  # it is most like itself


def test_filters_leave_out_and_say_what_is_wrong(open_page: Callable[..., Page]) -> None:
    page = open_page("#/search?q=arrow&n=24&where=no_such+%3D+1")
    expect(page.get_by_role("alert")).to_contain_text("no_such")
    page.get_by_role("button", name="Without filters").click()
    expect(page.locator(".hit")).to_have_count(24)
    condition = page.get_by_label("Condition on the columns")
    condition.fill("caption = 'nothing has this'")
    condition.press("Enter")
    expect(page.get_by_text("Nothing is that close").or_(page.get_by_role("alert"))).to_be_visible()
    condition.fill("")
    condition.press("Enter")
    expect(page.locator(".hit")).to_have_count(24)


def test_a_dropped_picture_is_classified_with_reasons(open_page: Callable[..., Page]) -> None:
    page = open_page("#/classify?classes=heart%2C+home%2C+star")
    expect(page.locator(".board")).to_be_visible()
    drop(page, ".view", HEART)
    expect(page.locator(".classes li")).to_have_count(3)
    shares = [float(words.split()[0]) for words in page.locator(".classes li > b").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=2)
    expect(page.locator(".why img").first).to_be_visible()
    assert not WRONG.search(page.locator("main").inner_text())
    verdict = page.locator(".verdict strong").inner_text()
    page.reload()
    expect(page.locator(".verdict strong")).to_have_text(verdict)


def test_a_drawing_is_classified_with_each_stroke(open_page: Callable[..., Page]) -> None:
    page = open_page("#/classify")
    draw(page, ".board", [(0.2, 0.2), (0.8, 0.8)])
    expect(page.locator(".verdict strong")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("What is it?")).to_be_visible()


def test_a_lasso_becomes_a_mask_of_the_catalog(open_page: Callable[..., Page], server: Server) -> None:
    page = open_page("#/atlas")
    expect(page.locator(".keys li").first).to_be_visible()
    page.get_by_role("button", name="Lasso").click()
    draw(page, ".map canvas", [(0.25, 0.03), (0.9, 0.03), (0.9, 0.9), (0.25, 0.9), (0.25, 0.05)])
    expect(page.locator(".selection strong")).to_contain_text("selected")
    page.get_by_label("Name of the selection").fill("all_of_it")
    page.get_by_role("button", name="Save as mask").click()
    expect(page.locator(".said")).to_contain_text("--mask all_of_it")
    expect(page.locator("#colour")).to_have_value("all_of_it")
    expect(page.locator(".keys li.is")).to_have_count(1)  # the colours are those of the mask
    expect(page.locator(".keys li.not")).to_have_count(1)
    shown = int(page.locator(".said").inner_text().split("Saved: ")[1].split(" ")[0].replace(",", ""))
    assert len(Catalog.open(server.run).select("all_of_it")) == shown > 0
    page.get_by_role("button", name="Delete this mask").click()
    page.get_by_role("button", name="Delete it for good?").click()
    expect(page.locator("#colour")).to_have_value("expert")
    assert "all_of_it" not in Catalog.open(server.run).columns


def test_a_cluster_opens_by_its_name_and_the_map_by_keys(open_page: Callable[..., Page]) -> None:
    page = open_page("#/atlas")
    page.locator("summary", has_text="Clusters").click()
    page.locator(".names button").first.click()
    expect(page.locator(".side .thumbs img").first).to_be_visible()
    assert "cluster=" in page.url
    page.get_by_role("button", name="Add to the selection").click()
    expect(page.locator(".selection strong")).to_contain_text("selected")
    page.go_back()
    expect(page.locator(".side")).to_be_hidden()
    page.go_forward()
    expect(page.locator(".side .thumbs img").first).to_be_visible()
    page.locator(".side .main").press("Escape")
    expect(page.locator(".side")).to_be_hidden()
    page.get_by_role("button", name="Show all").click()
    page.locator(".map canvas").focus()
    page.keyboard.press("+")
    page.wait_for_url("**zoom=1.350**")
    page.reload()
    expect(page.locator(".keys li").first).to_be_visible()
    assert page.locator(".map canvas").evaluate("canvas => canvas.map.view.zoom") == 1.35


def test_a_restart_is_said_and_mended(open_page: Callable[..., Page], server: Server) -> None:
    page = open_page("#/search?q=arrow")
    expect(page.locator(".hit").first).to_be_visible()
    server.stop()
    words_of(page).fill("heart")
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_contain_text("does not answer")
    server.start()
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator(".hit").first).to_be_visible()
    expect(words_of(page)).to_have_value("heart")


def test_a_service_with_a_key_asks_for_it_and_takes_only_the_right_one(
    open_page: Callable[..., Page], served_run: Path
) -> None:
    locked = Server(served_run / "bundle", key="open-sesame")
    try:
        page = open_page("#/classify", of=locked)
        dialog, field = page.get_by_role("dialog"), page.get_by_label("API key", exact=True)
        expect(dialog).to_contain_text("asks for a key")
        dialog.locator("#key").fill("sesame")
        dialog.get_by_role("button", name="Go on").click()
        expect(dialog).to_contain_text("not the right one")
        dialog.locator("#key").fill("open-sesame")
        dialog.get_by_role("button", name="Go on").click()
        expect(page.locator("form, canvas").first).to_be_visible()
        expect(field).to_have_count(0)
        page.reload()  # the key of this session is kept
        expect(page.locator("form, canvas").first).to_be_visible()
        expect(page.get_by_role("dialog")).to_have_count(0)
    finally:
        locked.stop()


def test_a_model_in_training_is_shown_until_it_is_trained(open_page: Callable[..., Page], server: Server) -> None:
    folder = server.run / "models" / "expert-1"
    done = folder / "done.json"
    content = done.read_text()
    done.unlink()
    try:
        with only_process(folder):
            page = open_page("#/runs")
            expect(page.locator(".lead")).to_contain_text("1 model in training")
            expect(page.locator(".state.running")).to_have_count(1)
    finally:
        done.write_text(content)
    expect(page.locator(".lead")).to_contain_text("all trained")  # without a reload
    expect(page.locator(".state.running")).to_have_count(0)


@pytest.mark.parametrize("has_equal_cost", [True, False])
def test_the_headline_is_that_of_the_report(
    open_page: Callable[..., Page], server: Server, has_equal_cost: bool
) -> None:
    """The mixture against the dense model of its cost, not against the cheaper one that the results name first."""
    path = server.run / "results.json"
    before = path.read_text()

    def row(name: str, kind: str, samples: int, average: float, **more: object) -> dict[str, object]:
        return {"name": name, "kind": kind, "samples": samples, "average": average} | {
            "interval": [average - 0.02, average + 0.02],
            **more,
        }

    versus = {"difference": -0.05, "interval": [-0.08, -0.02]} if has_equal_cost else None
    rows = [
        row("dense", "dense", 1000, 0.30),
        *([row("dense-total", "dense", 4000, 0.40)] if has_equal_cost else []),
        row("mixture", "mixture", 4000, 0.35, rule="per_class", default=True, versus_dense_total=versus),
        row("oracle", "bound", 4000, 0.60),
    ]
    path.write_text(json.dumps(json.loads(before) | {"models": rows}))
    try:
        tiles = open_page("#/runs").locator(".tile")
        tiles.first.wait_for()
        said = {
            title: " ".join(more.split()) for title, _, more in (t.partition("\n") for t in tiles.all_inner_texts())
        }
    finally:
        path.write_text(before)
    best = "dense-total" if has_equal_cost else "mixture"
    assert said.pop("Best of all rows").endswith(best)  # labels choose the oracle
    assert said.pop("Mixture, rule per_class").startswith("35.0 %")
    wanted = {"Dense model of equal cost": "40.0 %", "Mixture against dense": "−5.0 points 95 %: −8.0 to −2.0"}
    assert set(said) == (set(wanted) if has_equal_cost else set())
    assert all(said[title].startswith(words) for title, words in wanted.items() if has_equal_cost)


def test_the_tour_has_four_steps_at_the_first_visit(open_page: Callable[..., Page]) -> None:
    page = open_page(new=True)
    for step in range(1, 5):
        expect(page.get_by_role("dialog")).to_contain_text(f"{step} of 4")
        page.get_by_role("dialog").get_by_role("button", name="Begin" if step == 4 else "Next").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.reload()
    expect(words_of(page)).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)


WRONG = re.compile(r"\bnull\b|undefined|\[object|NaN")
"""What a page shows where its script takes nothing for something."""
VIEWS = ("#/search", "#/search?q=arrow", "#/classify", "#/atlas?cluster=1", "#/runs", "#/system")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_no_view_hinders_anybody_or_is_wider_than_its_screen(
    open_page: Callable[..., Page], scheme: str, width: int
) -> None:
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    for address in VIEWS:
        page.evaluate("hash => { location.hash = hash }", address)
        page.locator(f".view.{address[2:].split('?')[0]}").wait_for()
        page.wait_for_load_state("networkidle")
        expect(page.locator(".waiting")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address
        assert not WRONG.search(page.locator("main").inner_text()), address
        found = Axe().run(page, options={"iframes": False})
        serious = [one for one in found.response["violations"] if one["impact"] in {"serious", "critical"}]
        assert not serious, (address, [(one["id"], one["nodes"][0]["html"][:200]) for one in serious])


def test_the_page_loads_nothing_from_elsewhere_and_shows_no_other_file(server: Server) -> None:
    answer = httpx.get(server.url, trust_env=False)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path in (ROOT / "src" / "modeclip" / "serving" / "site").iterdir():
        assert httpx.get(f"{server.url}/site/{path.name}", trust_env=False).status_code == 200
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
    for outside in ("/site/..%2fpage.py", "/site/page.py", "/runs/pages/..%2f..%2fetc%2fpasswd"):
        assert httpx.get(server.url + outside, trust_env=False).status_code == 404
