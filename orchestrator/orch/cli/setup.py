"""`orch doctor` and `orch init`."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from orch._version import __version__
from orch.cli.options import DEFAULT_PORT
from orch.cli.output import print_json, print_table
from orch.cli.target import find_folder, find_target, read_arguments
from orch.errors import UsageError
from orch.paths import AppFolder

__all__ = ["Check", "checks", "doctor", "doctor_arguments", "init", "init_arguments"]

EXTRAS = {
    "ui": ("streamlit",),
    "s3": ("obstore", "botocore"),
    "studio": ("torch", "pytorch_lightning", "jsonargparse", "gradio", "tensorboard", "streamlit"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `missing` is no failure: an extra that is not installed."""

    check: str
    result: Literal["ok", "missing", "failed"]
    found: str
    hint: str = ""


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    read_arguments(parser)


def doctor(args: argparse.Namespace) -> int:
    """Exit code 1 if anything has failed."""
    is_url = args.app is not None and args.app.startswith(("http://", "https://"))
    folder = find_target(args.app).folder if is_url else find_folder(args.app)
    if folder is None:
        raise UsageError("doctor: that app is not on this machine", hint="run `orch doctor` where it was started")
    found = list(checks(folder))
    if args.json:
        print_json([asdict(check) for check in found])
    else:
        print_table(("CHECK", "RESULT", "FOUND", "HINT"), [asdict(check) for check in found])
    return 1 if any(check.result == "failed" for check in found) else 0


def checks(folder: AppFolder) -> Iterator[Check]:
    """All checks of this machine and of the folder."""
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Check("orch", "ok", __version__)
    if sys.platform.startswith("linux") or sys.platform == "darwin":
        yield Check("system", "ok", f"{platform.system()} {platform.release()}, {os.cpu_count()} processors")
    else:
        yield Check("system", "failed", platform.system(), "orch runs on Linux and macOS")
    bash = shutil.which("bash")
    yield Check("bash", "ok" if bash else "missing", bash or "not found", "" if bash else "needed for shell=True only")
    for extra, packages in EXTRAS.items():
        lacking = [name for name in packages if importlib.util.find_spec(name) is None]
        if lacking:
            yield Check(f"[{extra}]", "missing", f"no {', '.join(lacking)}", f"pip install 'orch[{extra}]'")
        else:
            yield Check(f"[{extra}]", "ok", ", ".join(f"{name} {_version(name)}" for name in packages))
    yield from _folder_checks(folder)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _folder_checks(folder: AppFolder) -> Iterator[Check]:
    if not folder.root.is_dir():
        yield Check("folder", "failed", f"{folder.root} is no folder", "say which: --app FOLDER")
        return
    yield _app_check(folder.root / (folder.claimed_by() or "app.py"))
    where = folder.orch if folder.exists else folder.root
    try:
        with tempfile.TemporaryFile(dir=where):
            yield Check(".orch", "ok", f"{where} is writable")
    except OSError as error:
        yield Check(".orch", "failed", f"{where}: {error.strerror}", "the app's folder must be writable")
    free = shutil.disk_usage(folder.root).free
    plenty = free > 2**30
    yield Check("disk", "ok" if plenty else "failed", f"{free / 2**30:.1f} GiB free", "" if plenty else "make room")
    if folder.serving():
        info = folder.read_server()
        yield Check("server", "ok", f"running, pid {folder.server_pid()}" + (f", {info.url}" if info else ""))
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
            yield Check("port", "ok", f"{DEFAULT_PORT} is free")
        except OSError as error:
            yield Check(
                "port", "missing", f"{DEFAULT_PORT}: {error.strerror}", "the next free one will be taken, or --port"
            )


def _app_check(app_file: Path) -> Check:
    try:
        ast.parse(app_file.read_bytes(), str(app_file))
    except FileNotFoundError:
        return Check("app file", "missing", f"no {app_file}", "`orch init` writes a small one into an empty folder")
    except (OSError, SyntaxError, ValueError) as error:
        return Check("app file", "failed", f"{app_file}: {error}", "correct the file")
    return Check("app file", "ok", str(app_file))


# ---- init ----------------------------------------------------------------------------------------------------------

APP = '''\
"""An orch app: what runs, and when. `orch run` starts it; `orch state set /vars/epochs 8` trains again."""

from orch import App, Flow, ScriptWork, ServiceWork


class Root(Flow):
    def __init__(self) -> None:
        super().__init__()
        # State: everybody sees it change (the works, the pages, `orch state watch`), and it survives a crash.
        self.epochs = 5
        # A script runs unchanged, in a process of its own. What it leaves in `results` is published to the Drive.
        self.train = ScriptWork("scripts/train.py", outputs=["results"], raise_exception=False)
        # A server stays up; `reload` keeps its copy of `results` fresh, on another machine too.
        self.site = ServiceWork("python -m http.server {port} --bind {host} --directory results", reload=["results"])

    def run(self) -> None:
        """Called at the start and whenever something has changed. Asking again for what is done does nothing."""
        self.site.run()
        self.train.run(["--epochs", str(self.epochs)])

    def configure_layout(self) -> list:
        return [{"name": "RESULTS", "content": self.site}]


app = App(Root())
'''

SCRIPT = '''\
"""A script as you have it already: it knows nothing of orch. Try it: python scripts/train.py --epochs 3"""

import argparse
import pathlib
import time

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
args = parser.parse_args()

results = pathlib.Path("results")
results.mkdir(exist_ok=True)
rows = []
for epoch in range(1, args.epochs + 1):
    time.sleep(1)  # the hard work
    loss = 1 / epoch
    rows.append(f"<tr><td>{epoch}<td>{loss:.3f}")
    print(f"epoch {epoch}/{args.epochs} loss {loss:.3f}", flush=True)
    (results / "index.html").write_text(f"<h1>Training</h1><table><tr><th>epoch<th>loss{''.join(rows)}</table>")
'''


def init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="an empty folder (default: this one)")


def init(args: argparse.Namespace) -> int:
    """Never writes over anything. Hidden files (.git, .venv) do not count."""
    root = Path(args.folder).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise UsageError(f"init: {root} is no folder")
    if root.is_dir() and (there := sorted(path.name for path in root.iterdir() if not path.name.startswith("."))):
        some = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
        raise UsageError(f"init: {root} is not empty ({some})", hint="orch writes over nothing: `orch init NEW_FOLDER`")
    for name, text in {"app.py": APP, "scripts/train.py": SCRIPT}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        sys.stdout.write(f"wrote {path}\n")
    there_hint = "" if root == Path.cwd() else f"cd {args.folder} && "
    sys.stdout.write(f"start it: {there_hint}orch run\n")
    return 0
