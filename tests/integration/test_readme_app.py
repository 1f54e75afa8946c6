"""The README's example does what the README says it does, on two small scripts."""

import re
from collections.abc import Callable
from pathlib import Path

from testkit import RunningApp, wait_until

README = Path(__file__).resolve().parents[2] / "README.md"
TRAIN = """
    import argparse, pathlib
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--save", type=pathlib.Path)
    args = parser.parse_args()
    args.save.parent.mkdir(exist_ok=True)
    args.save.write_text(f"trained for {args.epochs} epochs")
    with open("trainings", "a") as log:
        log.write(f"{args.epochs}\\n")
"""
SERVE = """
    import argparse, http.server, pathlib
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--model", type=pathlib.Path)
    args = parser.parse_args()
    MODEL = args.model.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(MODEL)

    http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()
"""


def test_it_trains_serves_and_replaces(orch_app: Callable[..., RunningApp]) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    app = orch_app(source, {"train.py": TRAIN, "serve.py": SERVE})

    def served(text: str) -> None:
        wait_until(lambda: app.request("GET", "/view/server/").text == text, 30, what=lambda: f"{text}\n{app.output()}")

    served("trained for 3 epochs")
    assert [tab["name"] for tab in app.get("/layout")] == ["MODEL"]
    app.set("/vars/epochs", 5)
    served("trained for 5 epochs")
    app.set("/vars/epochs", 3)
    served("trained for 3 epochs")
    assert (app.folder / "trainings").read_text().split() == ["3", "5"]
    assert app.interrupt() == 130
