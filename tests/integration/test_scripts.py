"""The studio's scripts, each by itself, as somebody has them who has never heard of orch."""

from __future__ import annotations

import ast
import csv
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from testkit import free_port, wait_until

for needed in ("torch", "pytorch_lightning", "gradio", "streamlit"):
    pytest.importorskip(needed, reason=f"the studio needs {needed}: pip install -e '.[studio]'")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SEED_ARGUMENTS = (
    "--trainer.max_epochs=2 --trainer.limit_train_batches=12 --trainer.limit_val_batches=4 "
    "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.monitor=val_acc"
).split()

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=110
    )


@pytest.mark.parametrize("script", ["train_script.py", "gradio_script.py", "ui_script.py"])
def test_no_script_imports_orch(script: str) -> None:
    modules = {
        name
        for node in ast.walk(ast.parse((SCRIPTS / script).read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules
    assert not {name for name in modules if name.split(".")[0].startswith("orch")}


def test_training_logs_and_saves_a_model_that_needs_no_class(tmp_path: Path) -> None:
    first = run("train_script.py", *SEED_ARGUMENTS, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    again = run("train_script.py", "fit", *SEED_ARGUMENTS, cwd=tmp_path)
    assert again.returncode == 0, again.stderr

    for number in range(2):
        version = tmp_path / "lightning_logs" / f"version_{number}"
        assert list(version.glob("events.out.tfevents.*"))
        with (version / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows if row["val_acc"]] == ["0", "1"]
        assert any(row["train_loss"] for row in rows)
        assert list(version.glob("checkpoints/*.ckpt"))
    assert "Epoch 1: 100%" in first.stdout + first.stderr
    assert "version_1/model.pt2" in again.stdout

    model = (tmp_path / "lightning_logs/version_1/model.pt2").read_bytes()
    assert str(SCRIPTS).encode() not in model, "the model tells where it was made"
    use = (
        "import torch; model = torch.export.load('lightning_logs/version_1/model.pt2').module();"
        "print([tuple(model(torch.zeros(n, 1, 28, 28)).shape) for n in (1, 5)])"
    )
    loaded = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip() == "[(1, 10), (5, 10)]", loaded.stderr


def test_a_wrong_argument_ends_the_training_and_is_named(tmp_path: Path) -> None:
    done = run("train_script.py", "--trainer.no_such_argument=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "no_such_argument" in done.stderr
    assert not (tmp_path / "lightning_logs").exists()


def test_the_base_model_is_good_and_small() -> None:
    model = SCRIPTS / "data" / "base_model.pt2"
    assert model.stat().st_size < 1024 * 1024
    assert b"train_script.py" not in model.read_bytes(), "the model tells where it was made"
    check = (
        "import numpy, torch; digits = numpy.load('digits.npz');"
        "images = torch.from_numpy(digits['x_test']).float().unsqueeze(1) / 255;"
        "found = torch.export.load('base_model.pt2').module()(images).argmax(1).numpy();"
        "print((found == digits['y_test']).mean())"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=model.parent, capture_output=True, text=True, timeout=60)
    assert float(done.stdout) >= 0.97, done.stderr


class Recogniser:
    """gradio_script.py while it runs."""

    def __init__(self, cwd: Path, **env: str) -> None:
        self.cwd = cwd
        self.url = f"http://127.0.0.1:{free_port()}"
        self.temporary = cwd / "tmp"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "gradio_script.py"), "--port", self.url.rpartition(":")[2]],
            cwd=cwd,
            env={**os.environ, "TMPDIR": str(self.temporary), **env},
            stdout=subprocess.DEVNULL,
        )
        wait_until(self._answers, 60, what="Gradio answers")

    def _answers(self) -> bool:
        assert self.process.poll() is None, "Gradio ended"
        try:
            return httpx.get(self.url).is_success
        except httpx.TransportError:
            return False

    @property
    def config(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/config").json()
        return answer

    def call(self, name: str, data: list[Any]) -> tuple[str, Any]:
        """(event, its data) that an endpoint ends with."""
        begun = httpx.post(f"{self.url}/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
        text = httpx.get(f"{self.url}/gradio_api/call/{name}/{begun}", timeout=30).text
        event, result = [line.partition(": ")[2] for line in text.strip().splitlines()[-2:]]
        return event, json.loads(result)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


def start_recogniser(cwd: Path, **env: str) -> Iterator[Recogniser]:
    server = Recogniser(cwd, **env)
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture
def recogniser(tmp_path: Path) -> Iterator[Recogniser]:
    yield from start_recogniser(tmp_path)


def buttons(config: dict[str, Any]) -> set[str]:
    return {part["props"].get("value") for part in config["components"] if part["type"] == "button"}


def test_gradio_recognises_its_examples_and_leaves_nothing(recogniser: Recogniser) -> None:
    config = recogniser.config
    assert buttons(config) >= {"Clear", "Submit", "Flag"}
    assert "Retrain" not in buttons(config)
    [dataset] = [part["props"] for part in config["components"] if part["type"] == "dataset"]
    samples = [sample[0] for sample in dataset["samples"]]
    assert len(samples) >= 11
    right = 0
    for sample in samples:
        event, [result] = recogniser.call("Recogniser", [{"path": sample["path"]}])
        assert event == "complete"
        assert len(result["confidences"]) == 10
        right += result["label"] == sample["path"].rpartition("_")[2][0]
    assert right >= len(samples) - 1
    event, _ = recogniser.call("Recogniser", [None])
    assert event == "error"
    page = httpx.get(recogniser.url).text
    assert "fonts.googleapis" not in page
    assert "cdnjs" not in page
    recogniser.stop()
    assert not list(recogniser.temporary.iterdir())


def test_gradio_asks_for_retraining_where_there_is_an_app(tmp_path: Path) -> None:
    seen: list[tuple[str, str, str, bytes]] = []

    class Agent(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.command, self.path, self.headers["Authorization"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Agent) as agent:
        thread = threading.Thread(target=agent.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{agent.server_port}/v1/works/eval/vars"
            for server in start_recogniser(tmp_path, ORCH_STATE_URL=url, ORCH_TOKEN="key"):
                assert "Retrain" in buttons(server.config)
                event, _ = server.call("ask_for_retraining", [])
                assert event == "complete"
        finally:
            agent.shutdown()
            thread.join()
    assert seen == [("PUT", "/v1/works/eval/vars/retrain", "Bearer key", b"true")]


def test_gradio_names_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = run("gradio_script.py", "--model_path", "nowhere.pt2", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere.pt2" in done.stderr


PAGE = """
from types import SimpleNamespace
import streamlit as st
import sys
sys.path.insert(0, {scripts!r})
import ui_script
st.session_state.setdefault("app", SimpleNamespace(**{state!r}))
ui_script.main_ui(st.session_state["app"])
"""
STATE = {
    "train_args": "--a=1",
    "train_start": False,
    "training": {"stage": "not_started"},
    "models": ["version_0", "base"],
    "model": "base",
    "serving": {"ready": True, "stage": "running", "message": ""},
}


def page(menu: str, **changes: Any) -> Any:
    """The page in Streamlit's own test harness, at an entry of the menu."""
    testing = pytest.importorskip("streamlit.testing.v1")
    app = testing.AppTest.from_string(PAGE.format(scripts=str(SCRIPTS), state={**STATE, **changes}), default_timeout=20)
    app.run()
    assert app.sidebar.selectbox[0].label == "Main Menu"
    assert app.sidebar.selectbox[0].options == ["About", "Train", "Deploy"]
    app.sidebar.selectbox[0].select(menu).run()
    assert not app.exception
    return app


def test_the_page_alone_says_what_it_is() -> None:
    testing = pytest.importorskip("streamlit.testing.v1")
    app = testing.AppTest.from_file(str(SCRIPTS / "ui_script.py"), default_timeout=20).run()
    assert not app.exception
    assert "orch run" in app.info[0].value


def test_the_train_page_asks_for_a_training() -> None:
    app = page("Train")
    assert app.text_area[0].label == "Train Arguments"
    assert app.text_area[0].value == "--a=1"
    app.text_area[0].input("--b=2")
    app.button[0].click().run()
    state = app.session_state["app"]
    assert (state.train_args, state.train_start) == ("--b=2", True)
    assert app.button[0].disabled


def test_a_failed_training_is_shown_with_its_reason_and_last_lines() -> None:
    failed = {"stage": "failed", "reason": "exit_code", "message": "exit code 2", "last_lines": ["one", "error: --x"]}
    app = page("Train", training=failed)
    assert "Training failed (exit_code): exit code 2" in app.error[0].value
    assert app.code[0].value == "one\nerror: --x"
    assert not app.button[0].disabled


def test_the_deploy_page_asks_for_a_model_and_says_what_is_up() -> None:
    app = page("Deploy")
    assert "base, ready" in app.success[0].value
    box = next(box for box in app.selectbox if box.label == "Select Model")
    assert box.options == ["version_0", "base"]
    box.select("version_0")
    app.button[0].click().run()
    assert app.session_state["app"].model == "version_0"
    app = page("Deploy", serving={"ready": False, "stage": "failed", "message": "no such file"})
    assert "no such file" in app.error[0].value
