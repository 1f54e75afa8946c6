"""The studio in a browser: what the README shows, on the real app, from the first page to a failed training."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import FrameLocator, Page, expect
from testkit import RunningApp

ROOT = Path(__file__).resolve().parents[2]
TRAINED = 240_000
"""Milliseconds that a training of two epochs may take on a busy machine."""

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def studio(tmp_path: Path, orch_app: Callable[..., RunningApp]) -> RunningApp:
    """app.py and scripts/ in a folder of their own; `digits_long.npz` makes a training that is long enough to watch."""
    folder = tmp_path / "studio"
    folder.mkdir()
    shutil.copy(ROOT / "app.py", folder)
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    with np.load(folder / "scripts/data/digits.npz") as digits:
        longer = {name: np.concatenate([digits[name]] * (4 if "train" in name else 1)) for name in digits}
    np.savez(folder / "digits_long.npz", **longer)
    return orch_app(folder)


class Studio:
    """The page as its user sees it."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def tab(self, name: str) -> FrameLocator:
        tab = self.page.get_by_role("tab", name=name, exact=False)
        tab.click()
        expect(tab).to_have_attribute("aria-selected", "true")
        return self.page.frame_locator(f'iframe[title="{name}"]')

    def choose(self, label: str, option: str) -> FrameLocator:
        """An entry of a Streamlit select box on the APP tab."""
        app = self.tab("APP")
        app.get_by_test_id("stSelectbox").filter(has_text=label).get_by_role("combobox").click()
        app.get_by_role("option", name=option, exact=True).click()
        return app

    def start_training(self, arguments: str) -> FrameLocator:
        app = self.choose("Main Menu", "Train")
        app.get_by_label("Train Arguments").fill(arguments)
        app.get_by_role("button", name="Start Training").click()
        expect(app.get_by_role("button", name="Start Training")).to_be_disabled()
        return app

    def tensorboard_shows(self, run: str, timeout: float) -> None:
        """TensorBoard's own Reload button, until the run is in its list."""
        board = self.tab("TRAIN DIAG")
        deadline = time.monotonic() + timeout
        while not board.get_by_text(run, exact=True).first.is_visible():
            assert time.monotonic() < deadline, f"{run} is not in TensorBoard after {timeout:g} s"
            board.locator("app-header-reload button").click()
            self.page.wait_for_timeout(500)

    def recognise(self, example: int) -> str:
        """The label that EVAL gives to an example."""
        gradio = self.tab("EVAL")
        gradio.get_by_role("button", name="Clear", exact=True).click()
        expect(gradio.get_by_test_id("label-output-value")).to_have_count(0)
        gradio.locator(".gallery-item").nth(example).click()
        expect(gradio.locator("img[alt]").first).to_be_visible()
        gradio.get_by_role("button", name="Submit").click()
        label = gradio.get_by_test_id("label-output-value")
        expect(label).to_have_text(re.compile(r"^\s*\d\s*$"))
        return label.inner_text().strip()


def test_the_studio(page: Page, studio: RunningApp, shoot: Callable[[Page, str], None]) -> None:
    user = Studio(page)
    with np.load(ROOT / "scripts/data/digits.npz") as digits:
        truth = [str(digit) for digit in digits["y_test"][:10]]

    page.goto(f"{studio.url}/?token={studio.token}")
    assert "token" not in page.url
    expect(page).to_have_title("studio")
    expect(page.get_by_role("tab")).to_have_count(3)
    assert [tab.split()[0] for tab in page.get_by_role("tab").all_inner_texts()] == ["APP", "TRAIN", "EVAL"]
    expect(user.tab("APP").get_by_role("heading", name="Studio")).to_be_visible(timeout=60_000)
    shoot(page, "about")

    expect(user.tab("TRAIN DIAG").get_by_text("TensorBoard", exact=True).first).to_be_visible(timeout=60_000)
    shoot(page, "diag-empty")
    gradio = user.tab("EVAL")
    expect(gradio.get_by_text("scripts/data/base_model.pt2")).to_be_visible(timeout=60_000)
    expect(gradio.locator(".gallery-item")).to_have_count(10)
    assert user.recognise(0) == truth[0]

    app = user.start_training("--trainer.max_epochs=2 --data.path=digits_long.npz")
    expect(app.get_by_text(re.compile(r"Training: \d+%"))).to_be_visible(timeout=60_000)
    shoot(page, "train")
    user.tensorboard_shows("version_0", timeout=60)
    shoot(page, "diag")
    assert studio.state("/works/train/status/stage") == "running", "it ended before TensorBoard showed it"
    assert user.recognise(1) == truth[1], "EVAL answers while a training runs"

    app = user.tab("APP")
    expect(app.get_by_text("Training finished")).to_be_visible(timeout=TRAINED)
    shoot(page, "trained")

    app = user.choose("Main Menu", "Deploy")
    user.choose("Select Model", "version_0")
    app.get_by_role("button", name="Deploy Model").click()
    expect(app.get_by_text("Deployed: version_0, ready in EVAL")).to_be_visible(timeout=60_000)
    shoot(page, "deploy")
    gradio = user.tab("EVAL")
    expect(gradio.get_by_text("lightning_logs/version_0/model.pt2")).to_be_visible(timeout=60_000)
    answers = [user.recognise(example) for example in range(3)]
    assert answers == truth[:3]
    shoot(page, "inference")

    app = user.choose("Main Menu", "Deploy")
    user.tab("EVAL").get_by_role("button", name="Retrain").click()
    expect(user.tab("EVAL").get_by_text("Training starts with the latest arguments")).to_be_visible()
    app = user.tab("APP")  # the Deploy page is still there, and the new model arrives in its list by itself
    studio.wait_state("/flows/ui/vars/models", lambda models: models[0] == "version_1", TRAINED / 1000)
    box = app.get_by_test_id("stSelectbox").filter(has_text="Select Model").get_by_role("combobox")
    page.wait_for_timeout(300)
    box.click()
    expect(app.get_by_role("option")).to_have_text(["version_1", "version_0", "base"])
    page.keyboard.press("Escape")

    app = user.start_training("--trainer.max_epochs=2 --trainer.no_such_argument=1")
    expect(app.get_by_text("Training failed (exit_code)")).to_be_visible(timeout=60_000)
    expect(app.get_by_test_id("stCode")).to_contain_text("no_such_argument")
    expect(app.get_by_role("button", name="Start Training")).to_be_enabled()
    shoot(page, "failed")
    assert studio.get("/status")["stage"] == "running"


def test_the_shell_remembers_the_tab_and_follows_the_keyboard(page: Page, studio: RunningApp) -> None:
    page.goto(f"{studio.url}/?token={studio.token}")
    page.get_by_role("tab", name="APP").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="TRAIN DIAG")).to_be_focused()
    expect(page.get_by_role("tab", name="TRAIN DIAG")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="EVAL")).to_have_attribute("aria-selected", "true")
    page.reload()
    expect(page.get_by_role("tab", name="EVAL")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("status")).to_contain_text("studio: running")
    studio.interrupt()
    expect(page.get_by_role("alert")).to_contain_text("connection to the app is lost")
