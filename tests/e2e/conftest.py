"""A headless browser that may only talk to this machine, and screenshots in artifacts/e2e."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright", reason="the browser tests need playwright: pip install -e '.[dev]'")

from playwright.sync_api import Browser, Page, expect, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOCAL = {"127.0.0.1", "localhost"}
PATIENCE = 30_000
"""Milliseconds that the browser waits for what a test expects, unless it says otherwise."""

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh browser session. The test fails if any of its requests was meant for another machine."""
    context = browser.new_context(viewport={"width": 1390, "height": 868})
    context.set_default_timeout(PATIENCE)
    foreign: list[str] = []

    def check(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname not in LOCAL:
            foreign.append(url)

    page = context.new_page()
    context.on("request", lambda request: check(request.url))
    page.on("websocket", lambda socket: check(socket.url))
    yield page
    context.close()
    assert not foreign, f"requests that left the machine: {foreign}"


@pytest.fixture
def shoot(artifacts: Path) -> Callable[[Page, str], None]:
    """`shoot(page, "train")` keeps a screenshot as artifacts/e2e/train.png."""
    folder = artifacts / "e2e"
    folder.mkdir(exist_ok=True)

    def take(page: Page, name: str) -> None:
        (folder / f"{name}.png").write_bytes(page.screenshot())

    return take
