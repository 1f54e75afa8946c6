"""`python -m orch.cli.cloud_head VERB`, on the Flow VM, over SSH from the user's machine.

    start   stdin: one line of JSON (options of `orch run`), then the app's folder as a zip. Puts it in place and starts
            the app: `orch run APP --ray auto --drive URL --host 127.0.0.1 -d`, by the same code.
    look    whether Ray and the app live.

The last line of stdout is the answer, one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from orch.cloud.cluster import APP_DIR, CONFIG_VARIABLE, HEAD_CONFIG
from orch.errors import OrchError
from orch.paths import AppFolder, write_atomic

__all__ = ["main", "unpack"]

LIST = ".orch-app.json"


def main(words: list[str]) -> int:
    from orch.cli.output import report_error

    try:
        if words == ["start"]:
            return _start(sys.stdin.buffer)
        if words == ["look"]:
            return _answer({"ray": _ray(), **_look(_folder())})
        raise OrchError(f"head: {words} is neither start nor look")
    except Exception as error:
        return report_error(error)


def _folder() -> AppFolder:
    return AppFolder(Path.home() / APP_DIR)


def _answer(value: Mapping[str, Any]) -> int:
    sys.stdout.write(json.dumps(value) + "\n")
    return 0


def _ray() -> bool:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "health-check", "--address", "127.0.0.1:6379"],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        timeout=60,
    )
    return done.returncode == 0


def _look(folder: AppFolder) -> dict[str, Any]:
    info = folder.read_server() if folder.exists and folder.serving() else None
    if info is None:
        return {"serving": False}
    return {"serving": True, "port": urlsplit(info.url).port, "token": folder.token(), "pid": info.pid}


def _start(stdin: IO[bytes]) -> int:
    wanted = json.loads(stdin.readline())
    folder = _folder()
    if folder.serving():
        raise folder.running_error()
    with tempfile.TemporaryFile() as package:
        shutil.copyfileobj(stdin, package)
        package.seek(0)
        unpack(package, folder.root, Path.home() / LIST)
    from orch.cli.options import RunOptions
    from orch.cli.run import start_detached

    # What the server, its agent on this machine and Ray's driver find.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ[CONFIG_VARIABLE] = os.path.expanduser(HEAD_CONFIG)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    os.environ["ORCH_BACKUP"] = wanted.pop("backup")
    os.environ.setdefault("AWS_DEFAULT_REGION", wanted.pop("region"))
    options = RunOptions(
        app_file=folder.root / wanted.pop("app_file"),
        mode="ray",
        address="auto",
        argv=tuple(wanted.pop("argv")),
        allow_hosts=tuple(wanted.pop("allow_hosts")),
        open=False,
        **wanted,
    )
    if (code := start_detached(options)) != 0:
        return code
    return _answer(_look(folder))


def unpack(package: IO[bytes], target: Path, listed: Path) -> None:
    """The zip's files take the place of those that the one before has put there (`listed` names them); what has been
    written beside them meanwhile stays. Raises OrchError on a path that leads out of the folder."""
    before = set(json.loads(listed.read_bytes())) if listed.exists() else set()
    with zipfile.ZipFile(package) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist() if not entry.is_dir()}
        for name in entries:
            if ".." in Path(name).parts or Path(name).is_absolute() or Path(name).parts[0] == ".orch":
                raise OrchError(f"the package holds {name!r}")
        target.mkdir(parents=True, exist_ok=True)
        for name in before - set(entries):
            (target / name).unlink(missing_ok=True)
        write_atomic(listed, json.dumps(sorted(before | set(entries))).encode())
        for name, entry in entries.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            path.chmod((entry.external_attr >> 16) & 0o777 or 0o644)
    write_atomic(listed, json.dumps(sorted(entries)).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
