"""The tabs at `/` on a real app: nested ones, another site's page, what waits and what has failed; the dashboard."""

from __future__ import annotations

import http.server
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect
from testkit import RunningApp, free_port, orch_command, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

APP = """
import sys
from orch import App, Flow, ScriptWork, ServiceWork, StaticFrontend, StreamlitFrontend

SERVE = "python -u serve.py {port}"


def render(state):
    import streamlit as st
    st.write(f"x is {state.x}")
    if st.button("Add"):
        state.x = state.x + 1


class Page(Flow):
    def __init__(self):
        super().__init__()
        self.x = 1

    def configure_layout(self):
        return StreamlitFrontend(render)


class Site(Flow):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def configure_layout(self):
        return StaticFrontend(self.folder)


class More(Flow):
    def __init__(self):
        super().__init__()
        self.b = Site("b")
        self.c = Site("c")

    def configure_layout(self):
        return [{"name": "B", "content": self.b}, {"name": "C / D", "content": self.c}]


class Group(Flow):
    def __init__(self):
        super().__init__()
        self.page = Page()
        self.a = Site("a")
        self.more = More()

    def configure_layout(self):
        return [
            {"name": "Page", "content": self.page},
            {"name": "A", "content": self.a},
            {"name": "More", "content": self.more},
        ]


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.group = Group()
        self.slow = ServiceWork(SERVE + " go")
        self.broken = ServiceWork(SERVE + " never", restart="never")
        self.many = [ScriptWork("python -c 1") for _ in range(12)]

    def run(self):
        self.slow.run()
        self.broken.run()

    def configure_layout(self):
        return [
            {"name": "Group", "content": self.group},
            {"name": "Slow", "content": self.slow},
            {"name": "Broken", "content": self.broken},
            {"name": "Elsewhere", "content": sys.argv[1]},
        ]


app = App(Root(), name="shell")
"""
SERVE = """
import http.server, pathlib, sys, time
print("loading the model", flush=True)
if sys.argv[2] == "never":
    sys.exit("no model <here>")
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.02)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"<h1>up at last</h1>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Another site: it tells what it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<h1>another site</h1><p>{self.headers.get('Referer')} {self.headers.get('Cookie')}</p>".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_address[1]}/page"
        server.shutdown()
        thread.join()


@pytest.fixture
def app(orch_app: Callable[..., RunningApp], elsewhere: str) -> RunningApp:
    files = {f"{name}/index.html": f"<h1>page {name}</h1>" for name in "abc"}
    return orch_app(APP, {**files, "serve.py": SERVE}, argv=(elsewhere,))


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/_stcore/health").is_success
    except httpx.TransportError:
        return False


def test_tabs(page: Page, app: RunningApp, shoot: Callable[[Page, str], None]) -> None:
    def tab(name: str) -> None:
        found = page.get_by_role("tab", name=re.compile(f"^{name.replace('/', '.')}( not ready|$)"))
        found.click()
        expect(found).to_have_attribute("aria-selected", "true")

    def shown(name: str, text: str) -> None:
        expect(page.frame_locator(f'iframe[title="{name}"]:visible').get_by_text(text)).to_be_visible()

    page.goto(f"{app.url}/?token={app.token}")
    # Nested: the first leaf is shown, a level below has a row of its own.
    rows = page.get_by_role("tablist")
    expect(rows.nth(0).get_by_role("tab")).to_have_count(4)
    expect(rows.nth(1).get_by_role("tab")).to_have_text(["Page", "A", "More"])
    shown("Page", "x is 1")
    app.set("/flows/group/flows/page/vars/x", 41)
    shown("Page", "x is 41")
    page.frame_locator('iframe[title="Page"]').get_by_role("button", name="Add").click()
    shown("Page", "x is 42")
    assert app.state("/flows/group/flows/page/vars/x") == 42
    tab("A")
    shown("A", "page a")
    tab("More")
    expect(rows.nth(1).get_by_role("tab")).to_have_text(["Page", "A", "More"])
    expect(rows.nth(2).get_by_role("tab")).to_have_text(["B", "C / D"])
    shown("B", "page b")
    tab("C / D")
    shown("C / D", "page c")
    shoot(page, "nested")
    page.reload()
    shown("C / D", "page c")
    tab("Page")
    shown("Page", "x is 42")
    expect(page.get_by_role("tab", name="C / D")).to_have_count(0)

    # What waits says why, and is there as soon as it answers.
    expect(page.get_by_role("tab", name="Slow").get_by_role("img")).to_be_visible()
    tab("Slow")
    shown("Slow", "nothing answers on port")
    shown("Slow", "loading the model")
    shoot(page, "waiting")
    (app.folder / "go").touch()
    shown("Slow", "up at last")
    expect(page.get_by_role("tab", name="Slow").get_by_role("img")).to_have_count(0)

    tab("Broken")
    shown("Broken", "exit code 1")
    shown("Broken", "no model <here>")
    shoot(page, "broken")

    # Another site's page learns nothing of this one.
    tab("Elsewhere")
    shown("Elsewhere", "another site")
    shown("Elsewhere", "None None")
    expect(rows.nth(1).get_by_role("tab")).to_have_count(0)
    link = page.get_by_role("link", name="open in a tab of its own")
    box = link.bounding_box()
    width = page.viewport_size
    assert box is not None and width is not None
    assert box["x"] + box["width"] <= width["width"], "many works push nothing out of the window"
    with page.expect_popup() as popup:
        link.click()
    expect(popup.value.get_by_text("another site")).to_be_visible()


def test_a_service_that_goes_away_is_waited_for_again(page: Page, app: RunningApp) -> None:
    (app.folder / "go").touch()
    page.goto(f"{app.url}/?token={app.token}#Slow")
    frame = page.frame_locator('iframe[title="Slow"]')
    expect(frame.get_by_text("up at last")).to_be_visible()
    app.post("/works/slow/stop")
    expect(frame.get_by_text("orch restart slow")).to_be_visible()
    app.post("/works/slow/restart")
    expect(frame.get_by_text("up at last")).to_be_visible()


def test_the_dashboard(page: Page, app: RunningApp, tmp_path: Path, shoot: Callable[[Page, str], None]) -> None:
    port = free_port()
    command = [*orch_command(), "dashboard", "--no-open", "--port", str(port), "--app", str(app.folder)]
    dashboard = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **app.env}, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port), 30, what="the dashboard answers")
        page.goto(f"http://127.0.0.1:{port}/")
        expect(page.get_by_role("heading", name="shell")).to_be_visible()
        expect(page.get_by_text("run 1 · running")).to_be_visible()
        expect(page.get_by_test_id("stDataFrame")).to_be_visible()
        expect(page.get_by_text("loading the model")).to_be_visible()
        page.get_by_test_id("stSelectbox").get_by_role("combobox").click()
        page.get_by_role("option", name="broken", exact=True).click()
        expect(page.get_by_text("no model <here>")).to_be_visible()
        page.get_by_role("tab", name="State").click()
        expect(page.get_by_test_id("stJson")).to_contain_text("group")
        rev = app.set("/flows/group/flows/page/vars/x", 7)
        expect(page.get_by_text(f"revision {rev}")).to_be_visible()
        shoot(page, "dashboard")
        app.interrupt()
        expect(page.get_by_text("The app does not answer")).to_be_visible()
        expect(page.get_by_text("Traceback")).to_have_count(0)
    finally:
        dashboard.send_signal(signal.SIGTERM)  # what is left of it then fails the test
        dashboard.wait(10)
