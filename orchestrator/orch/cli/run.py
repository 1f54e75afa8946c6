"""`orch run`: check the command line, take the folder, hand over to the service."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from orch.cli.console import Console, open_browser, wants_browser
from orch.cli.options import DEFAULT_PORT, Mode, RunOptions
from orch.errors import UsageError
from orch.paths import AppFolder

__all__ = ["ask_secret", "options_from", "read_env_file", "run", "run_arguments", "start_detached"]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_APP_NAME = re.compile(r"\w[\w .-]{0,63}")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "orch run [APP] [--local | --ray ADDRESS | --cloud aws] [options] [-- ARGS]"
    parser.epilog = "ARGS become the sys.argv of the app file."
    parser.add_argument("app", nargs="*", metavar="APP", help="the app file (default: app.py)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="on this machine (the default)")
    where.add_argument("--ray", metavar="ADDRESS", help="on a Ray cluster")
    where.add_argument("--cloud", nargs="?", const="aws", metavar="aws", help="on machines of a cloud")
    parser.add_argument("--name", help="the app's name (default: the App's own, else the folder's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="answer to this name too")
    parser.add_argument("--port", help=f"port to serve on, 0 for a free one (default: {DEFAULT_PORT})")
    browser = parser.add_mutually_exclusive_group()
    browser.add_argument("--open", action="store_true", default=None, help="open a browser")
    browser.add_argument("--no-open", action="store_false", dest="open", help="never open one")
    parser.add_argument("-d", "--detach", action="store_true", help="start in the background, print the URL")
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="environment of every script")
    parser.add_argument("--env-file", metavar="F", help="file of K=V lines; --env wins")
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="environment that is never written down or shown; without a value: from the environment, or asked",
    )
    parser.add_argument("--drive", metavar="URL", help="where shared files live (default: .orch/drive)")
    parser.add_argument("--durable", action="store_true", help="fsync every change, not only launches and ends")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the last run")
    again.add_argument("--fresh", action="store_true", help="forget what earlier runs left behind")
    parser.add_argument("--dry-run", action="store_true", help="say what would be started, start nothing")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--detached", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Blocks until the app has ended (with --detach: until it serves). The exit code of the command."""
    if args.detached:
        handed = json.load(sys.stdin)
        ready_fd = int(handed.pop("ready_fd"))
        os.set_inheritable(ready_fd, False)
        return _serve(_from_json(handed), Console(on_url=lambda url: _tell(ready_fd, url), ends_by="`orch stop`"))
    _hide_secrets(args.secret)
    options = options_from(args)
    if options.mode == "aws":
        from orch.cli.cloud import run_on_aws

        return run_on_aws(options)
    if options.dry_run:
        return _dry_run(options)
    if options.detach:
        return start_detached(options)
    return _serve(options, Console(on_url=open_browser if wants_browser(options.open) else None))


def _hide_secrets(words: list[str]) -> None:
    """Start this command anew without the values of `--secret NAME=VALUE`: everybody on the machine may read a command
    line, an environment only its user. Returns if there are none."""
    given = [word for word in words if re.fullmatch(rf"{_VARIABLE.pattern}=.+", word, re.DOTALL)]
    command = list(sys.orig_argv)
    end = command.index("--") if "--" in command else len(command)
    environ = dict(os.environ)
    changed = False
    for at, word in enumerate(command[:end]):
        value = word.removeprefix("--secret=")
        if value in given and (word != value or command[at - 1] == "--secret"):
            name, _, environ[name] = value.partition("=")
            command[at] = word.removesuffix(value) + name
            changed = True
    if changed:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *command[1:]], environ)


def _serve(options: RunOptions, console: Console) -> int:
    folder = AppFolder(options.app_file.parent)
    with folder.lock():
        if not options.fresh:
            folder.check_claim(options.app_file)
        from orch.service import serve

        return serve(options, folder, console)


def _dry_run(options: RunOptions) -> int:
    """Says what would be started. The app file is imported as by a start; nothing is written, nothing is started."""
    from orch.cli.output import print_table
    from orch.journal import Journal
    from orch.loader import load_app
    from orch.program import Program

    folder = AppFolder(options.app_file.parent)
    if not options.fresh:
        folder.check_claim(options.app_file)
    run = "a new one, number 1"
    if folder.state_db.exists():
        journal = Journal.open(folder.state_db, readonly=True)
        runs = journal.runs()
        journal.close()
        if runs and not options.fresh and (options.resume or runs[-1].how is None):
            run = f"goes on with number {runs[-1].run}"
        elif runs:
            run = f"a new one, number {runs[-1].run + 1}"
    app = load_app(options.app_file, list(options.argv))
    rows = [
        {
            "work": spec.name,
            "kind": spec.kind,
            "runs": spec.command if isinstance(spec.command, str) else " ".join(spec.command),
            "compute": spec.compute.get("name"),
        }
        for spec in Program(app.root).specs()
        if not spec.hidden
    ]
    for row in rows:
        row["runs"] = row["runs"] or "Python"
    lines = {
        "app": f"{options.name or app.name or folder.root.name} ({options.app_file})",
        "run": run,
        "serves": f"http://{options.host}:{options.port}" + ("" if options.port_given else " (or the next free port)"),
        "drive": options.drive or folder.drive.as_uri(),
        "env": ", ".join(options.env),
        "secrets": ", ".join(options.secrets),
    }
    sys.stdout.write("".join(f"{name:<12} {value}\n" for name, value in lines.items() if value) + "\n")
    print_table(("WORK", "KIND", "RUNS", "COMPUTE"), rows)
    return 0


# ---- checking ------------------------------------------------------------------------------------------------------


def options_from(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> RunOptions:
    """The checked options. Raises UsageError that says what, where and what to do."""
    app_file = _app_file(args.app)
    mode: Mode = "local"
    if args.ray is not None:
        mode = "ray"
    elif args.cloud is not None:
        if args.cloud != "aws":
            raise UsageError(
                f"run: --cloud knows aws, not {args.cloud!r}",
                hint="write the app file in front: `orch run app.py --cloud`",
            )
        mode = "aws"
    if args.name is not None and not _APP_NAME.fullmatch(args.name):
        raise UsageError(
            f"run: --name {args.name!r} cannot be an app's name",
            hint="letters, digits, `_`, `-`, `.` and spaces, at most 64",
        )
    env = read_env_file(Path(args.env_file)) if args.env_file is not None else {}
    for text in args.env:
        name, separator, value = text.partition("=")
        if not separator or not _VARIABLE.fullmatch(name):
            raise UsageError(f"run: --env {text!r} is not of the form K=V", hint="for example --env EPOCHS=3")
        env[name] = value
    return RunOptions(
        app_file=app_file,
        mode=mode,
        address=args.ray,
        name=args.name,
        host=args.host,
        port=_port(args.port),
        port_given=args.port is not None,
        allow_hosts=tuple(args.allow_host),
        open=args.open,
        detach=args.detach,
        env=env,
        secrets=_secrets(args.secret, environ),
        drive=_drive(args.drive),
        durable=args.durable,
        resume=args.resume,
        fresh=args.fresh,
        dry_run=args.dry_run,
        yes=args.yes,
        argv=args.argv,
    )


def _app_file(words: list[str]) -> Path:
    # `orch run app app.py` is how Lightning's users type it.
    if words and words[0] == "app" and (len(words) > 1 or not Path("app").exists()):
        words = words[1:]
    if len(words) > 1:
        raise UsageError(
            f"run: one app file is wanted, not {len(words)} ({' '.join(words)})",
            hint="arguments for the app file follow `--`",
        )
    path = Path(words[0] if words else "app.py").expanduser().absolute()
    if path.is_dir():
        path = path / "app.py"
    if not path.is_file():
        raise UsageError(
            f"run: there is no app file {path}", hint="`orch init` writes a small one into an empty folder"
        )
    if path.suffix != ".py":
        raise UsageError(f"run: {path} is no Python file", hint="an app file ends with .py and defines one orch.App")
    if not path.stem.isidentifier():
        raise UsageError(
            f"run: {path.name} cannot be imported under that name",
            hint="name it with letters, digits and `_`, like app.py",
        )
    return path


def _port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise UsageError(f"run: --port {text!r} is not a port", hint="a number from 1 to 65535, or 0 for any free one")
    return int(text)


def read_env_file(path: Path) -> dict[str, str]:
    """K=V lines; `#` comments, `export ` and matching quotes around the value are understood, nothing is expanded.
    Raises UsageError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"run: --env-file {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, separator, value = line.removeprefix("export ").partition("=")
        name, value = name.strip(), value.strip()
        if not separator or not _VARIABLE.fullmatch(name):
            raise UsageError(f"run: {path}:{number} is not of the form K=V: {line!r}", hint="comments start with #")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found[name] = value
    return found


def ask_secret(name: str) -> str:
    """Ask for a secret on the terminal. Raises UsageError without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            f"run: the secret {name} has no value and is not in the environment",
            hint=f"--secret {name}=VALUE, or export {name}",
        )
    return getpass.getpass(f"secret {name}: ", stream=sys.stderr)


def _secrets(words: list[str], environ: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not _VARIABLE.fullmatch(name):
            # The word itself is not repeated: it may be the secret.
            raise UsageError(
                "run: --secret wants NAME or NAME=VALUE", hint="the name is that of an environment variable"
            )
        if not separator:
            value = environ.get(name) or ask_secret(name)
        if not value:
            raise UsageError(f"run: the secret {name} is empty", hint=f"--secret {name}=VALUE, or export {name}")
        found[name] = value
    return found


def _drive(url: str | None) -> str | None:
    if url is None:
        return None
    protocol, separator, rest = url.partition("://")
    if not separator:
        return Path(url).expanduser().absolute().as_uri()
    from fsspec.registry import known_implementations

    if protocol not in known_implementations or not rest:
        raise UsageError(
            f"run: --drive {url!r} is no fsspec URL", hint="for example file:///data/drive or s3://bucket/prefix"
        )
    if protocol == "memory":
        raise UsageError("run: --drive memory:// is not shared by processes", hint="a folder or s3://bucket/prefix")
    if protocol in ("s3", "s3a"):
        import importlib.util

        if not all(map(importlib.util.find_spec, ("obstore", "botocore"))):
            raise UsageError("run: --drive s3:// comes with the extra [s3]", hint="pip install 'orch[s3]'")
    return url


# ---- in the background ---------------------------------------------------------------------------------------------


def _from_json(value: dict[str, Any]) -> RunOptions:
    value["app_file"] = Path(value["app_file"])
    value["allow_hosts"] = tuple(value["allow_hosts"])
    value["argv"] = tuple(value["argv"])
    return RunOptions(**value)


def _to_json(options: RunOptions) -> dict[str, Any]:
    value = {field.name: getattr(options, field.name) for field in fields(options)}
    return {**value, "app_file": str(options.app_file)}


def _tell(ready_fd: int, url: str) -> None:
    """The parent reads the URL; if it is gone, the app runs all the same."""
    try:
        os.write(ready_fd, url.encode())
    except BrokenPipeError:
        pass
    finally:
        os.close(ready_fd)


def _said(log: Path, begin: int) -> list[str]:
    """Lines of the server's log, the last ones if there are many."""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read()[-64_000:].decode(errors="replace").splitlines()


def start_detached(options: RunOptions) -> int:
    """Blocks until the app serves, then leaves it behind; the exit code."""
    folder = AppFolder(options.app_file.parent)
    folder.create()
    if folder.serving():
        raise folder.running_error()
    log = folder.server_log
    if log.exists() and log.stat().st_size > 10 * 2**20:
        os.replace(log, log.with_suffix(".log.1"))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    begin = os.fstat(out).st_size
    ready, ready_fd = os.pipe()
    try:
        # The options travel by stdin: a command line is everybody's to read, and they hold secrets. -P: modules beside
        # the user's app must not shadow ours.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "orch.cli", "run", str(options.app_file), "--detached"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            pass_fds=(ready_fd,),
            start_new_session=True,
        )
    finally:
        os.close(out)
        os.close(ready_fd)
    assert child.stdin is not None
    handed = _to_json(replace(options, detach=True, open=False))
    with os.fdopen(ready, "rb") as pipe:
        try:
            with child.stdin:
                child.stdin.write(json.dumps({**handed, "ready_fd": ready_fd}).encode())
            url = pipe.read().decode()
        except BrokenPipeError:
            url = ""
        except KeyboardInterrupt:
            sys.stderr.write(f"orch: it goes on starting in the background (pid {child.pid}); `orch down` ends it\n")
            raise
    if not url:
        code = child.wait()
        said = _said(log, begin)
        sys.stderr.write("".join(line + "\n" for line in said[-20:]))
        if not said:
            sys.stderr.write(f"orch: the server ended with code {code} and said nothing; its log is {log}\n")
        return code if code > 0 else 1
    for line in _said(log, begin):  # what a start in the foreground says on the terminal: another port, a run resumed
        if line.startswith(("orch ", "orch: ")) and not line.startswith("orch |"):
            (sys.stderr if line.startswith("orch: ") else sys.stdout).write(line + "\n")
    sys.stdout.write(f"orch: running in the background (pid {child.pid}), log {log}\n{url}\n")
    if wants_browser(options.open):
        import webbrowser

        webbrowser.open(url)
    # It is meant to outlive this command: say so, or Popen warns that it still runs.
    child.returncode = 0
    return 0
