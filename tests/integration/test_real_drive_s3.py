"""A real `orch run --drive s3://...`: works that share nothing but the bucket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from s3server import S3Server
from testkit import RunningApp, wait_until

APP = """
from orch import App, Drive, Flow, ScriptWork, ServiceWork, Work

class Keeper(Work):
    def __init__(self):
        super().__init__(parallel=True)
        self.models = Drive("models")
        self.kept = 0

    def run(self):
        with open("note.txt", "w") as file:
            file.write("kept")
        self.kept = self.models.put("note.txt")

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.trainer = ScriptWork(["train.py"], outputs=["logs"], cwd="one", sync_interval=0.2, parallel=True)
        self.board = ServiceWork(["board.py", "{port}"], reload=["trainer:logs"], cwd="two", sync_interval=0.2)
        self.after = ScriptWork(["after.py"], inputs=["trainer:logs"], cwd="three", parallel=True)
        self.keeper = Keeper()
        self.seen = []

    def run(self):
        self.board.run()
        self.keeper.run()
        if self.trainer.run().succeeded:
            self.after.run()
            self.seen = Drive("app").list("logs/*")

app = App(Root())
"""
TRAIN = """
import os, time
os.makedirs("logs", exist_ok=True)
with open("logs/events.out.tfevents.1", "w") as file:
    for n in range(10_000):
        print(n, file=file, flush=True)
        time.sleep(0.05)
        if os.path.exists("enough"):
            break
"""
BOARD = """
import http.server, sys
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""
AFTER = "print('lines', len(open('logs/events.out.tfevents.1').readlines()))"


def test_works_share_a_training_through_a_bucket(
    orch_app: Callable[..., RunningApp], app_folder: Callable[..., Path], s3_server: S3Server, s3_url: str
) -> None:
    files = {"one/train.py": TRAIN, "two/board.py": BOARD, "three/after.py": AFTER}
    folder = app_folder(APP, files)
    app = orch_app(folder, None, "--drive", s3_url, env=s3_server.env())

    def lines(place: str) -> int:
        path = folder / place / "logs/events.out.tfevents.1"
        return len(path.read_text().splitlines()) if path.exists() else 0

    first = wait_until(lambda: lines("two"), 60, what=app.output)
    wait_until(lambda: lines("two") > first + 5, 60, what="the curve grows while the training runs")
    (folder / "one/enough").touch()
    wait_until(lambda: app.get("/status")["works"]["after"] == "succeeded", 60, what=app.output)
    assert lines("three") == lines("one") and lines("one") > first
    wait_until(lambda: app.get("/state/vars/seen") == ["logs/events.out.tfevents.1"], 30, what=app.output)
    wait_until(lambda: app.get("/state/works/keeper/vars/kept") == 1, 30, what=app.output)
    assert not (folder / ".orch/drive/app").exists(), "nothing of it lies on the disk"
    answer = app.get("/drive/app/logs?verify=true")
    assert answer["files"] == 1
