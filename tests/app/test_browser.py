"""The whole page in a headless Chromium: upload, caption, gate overlay, experts off, errors.

pip install 'visexpert[app,browser-test]'; apt-get install chromium; pytest -m browser tests/app/test_browser.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from visexpert.app.session import Session

server = pytest.importorskip("visexpert.app.server", reason="the page needs the extra app")
playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs the extra browser-test")

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PATIENCE_MS = 120_000
WRITTEN = "document.querySelector('#answer textarea').value"


@pytest.fixture
def page(session: Session, port: int) -> Iterator[Any]:
    """A tab that shows the page; it fails on any request to another machine."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH: apt-get install chromium")
    elsewhere: list[str] = []
    with server.serving(session, port=port) as url, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        tab = browser.new_page(viewport={"width": 1180, "height": 900})
        tab.set_default_timeout(PATIENCE_MS)
        tab.on("request", lambda request: elsewhere.append(request.url) if away(request.url, url) else None)
        tab.goto(url, wait_until="domcontentloaded")
        tab.wait_for_selector("#ask")
        yield tab
        browser.close()
    assert elsewhere == []


def away(address: str, url: str) -> bool:
    return not address.startswith((url, "data:", "blob:"))


def table(tab: Any) -> list[str]:
    """Text of the table's cells, row by row, below its title and three headers."""
    cells = [line.strip() for line in tab.locator("#table").inner_text().splitlines() if line.strip()]
    assert cells[1:4] == ["model", "answer", "GFLOP"]
    return cells[4:]


def test_upload_caption_overlay_and_experts_off(page: Any, session: Session, picture: Path) -> None:
    page.set_input_files("#image input[type=file]", picture)
    page.wait_for_function(f"{WRITTEN} != ''")
    everyone = session.ask(picture, "describe the image", session.experts)
    assert page.input_value("#answer textarea") == everyone.text
    overlay = page.wait_for_selector("#overlay img", state="visible")
    page.wait_for_function("document.querySelector('#overlay img').naturalWidth > 500")
    before = overlay.get_attribute("src")
    page.wait_for_function("document.querySelector('#table').innerText.includes('merged')")
    assert table(page) == [cell for row in everyone.rows for cell in row]

    page.get_by_label("semantic").uncheck()
    page.wait_for_function("document.querySelector('#table').innerText.includes('ToVE: depth, edges')")
    fewer = session.ask(picture, "describe the image", ["depth", "edges"])
    page.wait_for_function(f"{WRITTEN} == {fewer.text!r}")
    page.wait_for_function("source => document.querySelector('#overlay img').src != source", arg=before)

    page.locator("#prompt input").fill("where is the zebra ?")
    page.locator("#prompt input").press("Enter")
    page.wait_for_function("document.querySelector('#note textarea')?.value.includes('zebra')")


def test_an_example_is_one_click(page: Any) -> None:
    page.locator("button.gallery-item, .gallery-item").first.click()
    page.wait_for_function(f"{WRITTEN} != ''")
    page.wait_for_selector("#overlay img", state="visible")


def test_errors_are_shown_as_our_sentence(page: Any, tmp_path: Path) -> None:
    page.click("#ask")
    page.wait_for_selector("text=There is no image yet; drop one, or take a scene.")
    broken = tmp_path / "broken.png"
    broken.write_text("no image", encoding="utf-8")
    page.set_input_files("#image input[type=file]", broken)
    page.wait_for_selector("text=The image broken.png cannot be read")
