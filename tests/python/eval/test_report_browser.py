"""The report in a real browser: no word on the console, nothing that axe finds, no width beyond the screen's."""

import shutil

import pytest

pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")
sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser; ./dev test installs it")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="checks accessibility; ./dev test installs it")

from pbsattn_eval import report  # noqa: E402
from test_report import RUNS  # noqa: E402

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; install the package chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    report.write([make(folder / name) for name, make in RUNS.items()], folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 390)])
def test_page(browser, address, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []

    # By keys alone: the first stop leads past the contents, and a figure's table opens.
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("figure table").first.is_visible()
    page.close()
