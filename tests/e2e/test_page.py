"""Streamlit pages on AppState: shown through the proxy, run again when what they read changes, no click lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect
from state_server import StateServer, flow_node, work_node
from testkit import free_port, wait_until

import orch_ui

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PAGE = """
import streamlit as st

RUNS = [0]

def main_ui(state):
    RUNS[0] += 1
    st.write(f"x is {state.x}, {state.trainer.status.stage} {state.trainer.progress}, run {RUNS[0]}")
    if st.button("Add"):
        state.rows.append(len(state.rows))
    if st.button("Slow"):
        seen = state.x
        state.waiting = True
        import time
        until = time.time() + 10
        while time.time() < until and not __import__("pathlib").Path("go").exists():
            time.sleep(0.02)
        state.x = seen + 1
    if st.button("Break"):
        raise ValueError("on purpose")
"""

SCRIPT = """
import streamlit as st
from orch import AppState

st.write(f"page says {AppState().x}")
"""


class StreamlitPage:
    def __init__(self, folder: Path, server: StateServer, render: str) -> None:
        self.port = free_port()
        env = {**os.environ, **orch_ui.frontend_env(server.url, server.token, "ui", render, str(folder / "app.py"))}
        self.process = subprocess.Popen(
            orch_ui.frontend_command("/view/ui", "127.0.0.1", self.port), cwd=folder, env=env, start_new_session=True
        )
        server.add_page("ui", self.port)
        wait_until(self._answers, 30, what="Streamlit answers")

    def _answers(self) -> bool:
        assert self.process.poll() is None, "Streamlit ended"
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/view/ui/_stcore/health").is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def server() -> Iterator[StateServer]:
    ui = flow_node(
        {"x": 1, "rows": [], "waiting": False, "other": 0},
        works={"trainer": work_node(stage="running", progress=0.25, reason=None, message="", since=1.0)},
    )
    with StateServer({**flow_node(flows={"ui": ui}), "app": {}}) as running:
        yield running


@pytest.fixture
def serve(tmp_path: Path, server: StateServer) -> Iterator[Callable[[str, str], StreamlitPage]]:
    pages: list[StreamlitPage] = []

    def start(source: str, render: str) -> StreamlitPage:
        (tmp_path / render.partition(":")[0]).write_text(textwrap.dedent(source))
        pages.append(StreamlitPage(tmp_path, server, render))
        return pages[-1]

    yield start
    for page in pages:
        page.close()


def frame_of(page: Page, server: StateServer) -> object:
    page.goto(f"{server.url}/view/ui/?token={server.token}")
    return page


def test_a_page_follows_what_it_reads(
    page: Page, server: StateServer, serve: Callable[[str, str], StreamlitPage]
) -> None:
    serve(PAGE, "ui_page.py:main_ui")
    frame_of(page, server)
    expect(page.get_by_text("x is 1, running 0.25")).to_be_visible()
    page.wait_for_timeout(1000)
    delays = []
    for value in range(2, 12):
        server.set("/flows/ui/vars/x", value)
        begin = time.perf_counter()
        page.get_by_text(f"x is {value}, running 0.25").wait_for()
        delays.append(time.perf_counter() - begin)
        page.wait_for_timeout(100)
    print("seconds from write to page:", " ".join(f"{delay:.3f}" for delay in sorted(delays)))
    server.set("/flows/ui/works/trainer/status/progress", 0.5)
    shown = page.get_by_text("x is 11, running 0.5")
    shown.wait_for()
    run = shown.inner_text()
    server.set("/flows/ui/vars/other", 5)  # nobody reads it
    page.wait_for_timeout(500)
    assert shown.inner_text() == run
    assert sorted(delays)[len(delays) // 2] < 0.3


def test_no_click_is_lost_while_the_page_is_run_again_all_the_time(
    page: Page, server: StateServer, serve: Callable[[str, str], StreamlitPage]
) -> None:
    serve(PAGE, "ui_page.py:main_ui")
    frame_of(page, server)
    expect(page.get_by_text("x is 1,")).to_be_visible()
    for count in range(15):
        for step in range(3):
            server.set("/flows/ui/vars/x", 100 * count + step)
        page.get_by_role("button", name="Add").click()
        server.set("/flows/ui/vars/x", 100 * count + 50)
        wait_until(lambda n=count: len(server.value("/flows/ui/vars/rows")) == n + 1, 5, what=f"click {count}")


def test_a_conflict_is_shown_and_the_page_goes_on(
    page: Page, server: StateServer, serve: Callable[[str, str], StreamlitPage], tmp_path: Path
) -> None:
    serve(PAGE, "ui_page.py:main_ui")
    frame_of(page, server)
    page.get_by_role("button", name="Slow").click()
    wait_until(lambda: server.value("/flows/ui/vars/waiting"), 5, what="the click is being handled")
    server.set("/flows/ui/vars/x", 70)
    (tmp_path / "go").touch()
    expect(page.get_by_text("Changed elsewhere, please repeat")).to_be_visible()
    expect(page.get_by_text("x is 70,")).to_be_visible()
    expect(page.get_by_text("Changed elsewhere, please repeat")).to_be_visible()
    page.get_by_role("button", name="Slow").click()
    expect(page.get_by_text("x is 71,")).to_be_visible()


def test_an_error_of_the_page_is_shown_in_it(
    page: Page, server: StateServer, serve: Callable[[str, str], StreamlitPage]
) -> None:
    serve(PAGE, "ui_page.py:main_ui")
    frame_of(page, server)
    page.get_by_role("button", name="Break").click()
    expect(page.get_by_text("ValueError: on purpose").first).to_be_visible()


def test_a_page_that_is_a_script_asks_for_its_state_itself(
    page: Page, server: StateServer, serve: Callable[[str, str], StreamlitPage]
) -> None:
    serve(SCRIPT, "page.py")
    frame_of(page, server)
    expect(page.get_by_text("page says 1")).to_be_visible()
    server.set("/flows/ui/vars/x", 2)
    expect(page.get_by_text("page says 2")).to_be_visible()


def test_a_page_finds_its_app_again_after_the_server_was_away(
    page: Page, server: StateServer, serve: Callable[[str, str], StreamlitPage]
) -> None:
    streamlit = serve(PAGE, "ui_page.py:main_ui")
    page.goto(f"http://127.0.0.1:{streamlit.port}/view/ui/")
    expect(page.get_by_text("x is 1,")).to_be_visible()
    port = int(server.url.rpartition(":")[2])
    tree = server.value("")
    server.__exit__()
    tree["flows"]["ui"]["vars"]["x"] = 5
    with StateServer(tree, port=port):
        expect(page.get_by_text("x is 5,")).to_be_visible()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
