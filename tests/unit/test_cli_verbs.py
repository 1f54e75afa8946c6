"""The verbs themselves: help, unknown words, exit codes, pointers, tables, lines of the console."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orch._version import __version__
from orch.cli import main
from orch.cli.console import Console, printable
from orch.cli.observe import work_row
from orch.cli.output import ago, error_line, print_table, size
from orch.cli.state import _touches, pointer_of
from orch.cli.verbs import FAMILIES
from orch.errors import NotFound, OrchError, UsageError

VERBS = sorted(verb for verbs in FAMILIES.values() for verb in verbs)


def test_version_loads_nothing_heavy() -> None:
    code = "import sys; from orch.cli import main; main(['--version']); print(*sys.modules)"
    shown, loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown == f"orch {__version__}"
    assert not {"rich", "httpx", "fastapi", "msgspec", "fsspec", "asyncio", "orch.service"} & set(loaded.split())


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb} " in shown


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    assert f"usage: orch {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frob"], "orch: there is no verb 'frob'; `orch --help` lists the verbs\n"),
        (["stats"], "orch: there is no verb 'stats'; did you mean `orch status`?\n"),
        (["state"], "orch: state: one of get, set, watch, history is wanted, and nothing was said; "),
        (["drive", "frob"], "orch: drive: one of ls, get, put, rm, versions, verify is wanted, not 'frob'; "),
        (["restart"], "orch: restart: the following arguments are required: WORK; see `orch restart --help`\n"),
        (["logs", "--tail", "many"], "orch: logs: argument --tail: invalid int value: 'many'; "),
        (["logs", "--tail", "-1"], "orch: logs: --tail -1 is no number of lines; "),
        (["logs", "--call", "1-a-1"], "orch: logs: --call needs one WORK; "),
        (["ps", "--app", "nobody"], "orch: --app 'nobody' is no folder, no URL and no app that was run by this user; "),
        (["--app", "nobody", "ps"], "orch: --app 'nobody' is no folder, "),
        (["ps", "--app", "http://127.0.0.1:1"], "orch: no token for http://127.0.0.1:1; "),
        (["ps"], "orch: no app has been run in "),
        (["open"], "orch: no app has been run in "),
        (["stop"], "orch: no app has been run in "),
        (["state", "get"], "orch: no app has been run in "),
        (["init", "file"], "orch: init: "),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "file").touch()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_an_error_is_one_line() -> None:
    assert error_line(OrchError("first\n  second.", hint="do\nthis")) == "orch: first second; do this"
    assert error_line(UsageError("no hint")) == "orch: no hint"
    assert error_line(FileNotFoundError(2, "No such file or directory", "/x")) == "orch: /x: No such file or directory"
    assert error_line(ZeroDivisionError("oops")).startswith("orch: unexpected ZeroDivisionError: oops; ORCH_DEBUG=1")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frob"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("ORCH_DEBUG", "1")
    assert main(["frob"]) == 2
    assert "Traceback" in capsys.readouterr().err


# ---- init and doctor -----------------------------------------------------------------------------------------------


def test_init_writes_an_app_and_never_over_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".git").mkdir()
    assert main(["init", str(tmp_path)]) == 0
    for name in ("app.py", "scripts/train.py"):
        ast.parse((tmp_path / name).read_text())
    (tmp_path / "app.py").write_text("mine")
    capsys.readouterr()
    assert main(["init", str(tmp_path)]) == 2
    assert "is not empty (app.py, scripts); orch writes over nothing" in capsys.readouterr().err
    assert (tmp_path / "app.py").read_text() == "mine"


def test_the_script_of_init_runs_by_itself(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path)]) == 0
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "--epochs", "1"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "epoch 1/1 loss 1.000\n"
    assert "1.000" in (tmp_path / "results" / "index.html").read_text()


def test_doctor_fails_for_a_broken_app_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "app.py").write_text("x = (")
    assert main(["doctor", "--app", str(tmp_path), "--json"]) == 1
    found = {check["check"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["app file"]["result"] == "failed"
    assert "was never closed" in found["app file"]["found"]
    assert found["python"]["result"] == "ok"
    (tmp_path / "app.py").write_text("x = 1")
    assert main(["doctor", "--app", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("CHECK ")


# ---- names ---------------------------------------------------------------------------------------------------------

TREE: dict[str, Any] = {
    "vars": {"epochs": 3, "opts": {"lr": [1, {"a/b": 2}]}},
    "flows": {"ui": {"vars": {"train_start": False}, "flows": {}, "works": {}}},
    "works": {"trainer": {"vars": {"x": 1}, "status": {"stage": "running"}, "calls": {}}},
    "structures": {"models": {"order": ["0"], "flows": {}, "works": {"0": {"vars": {"z": 1}}}}},
    "app": {"stage": "running"},
}


@pytest.mark.parametrize(
    ("typed", "pointer"),
    [
        ("", ""),
        ("/vars/epochs", "/vars/epochs"),
        ("epochs", "/vars/epochs"),
        ("root.epochs", "/vars/epochs"),
        ("opts.lr.1.a/b", "/vars/opts/lr/1/a~1b"),
        ("ui.train_start", "/flows/ui/vars/train_start"),
        ("trainer.x", "/works/trainer/vars/x"),
        ("trainer.vars.x", "/works/trainer/vars/x"),
        ("trainer.status.stage", "/works/trainer/status/stage"),
        ("models.0.z", "/structures/models/works/0/vars/z"),
        ("models.order", "/structures/models/order"),
        ("app.stage", "/app/stage"),
        ("ui", "/flows/ui"),
    ],
)
def test_pointers_and_names(typed: str, pointer: str) -> None:
    assert pointer_of(typed, TREE) == pointer


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("nope", "the root flow has no 'nope'", "there is: ui, trainer, models, epochs, opts"),
        ("ui.train", "ui has no 'train'", "there is: train_start"),
        ("opts.lr.2", "opts.lr has no '2'", "there is: 0 to 1"),
    ],
)
def test_a_wrong_name_says_what_there_is(typed: str, message: str, hint: str) -> None:
    with pytest.raises(NotFound) as caught:
        pointer_of(typed, TREE)
    assert message in caught.value.message
    assert hint == caught.value.hint


def test_which_operations_touch_a_value() -> None:
    def touches(path: str, pointer: str, source: str | None = None) -> bool:
        op = {"op": "move" if source else "replace", "path": path}
        return _touches({**op, "from": source} if source else op, pointer)

    assert touches("/vars/a", "/vars/a")
    assert touches("/vars/a/0", "/vars/a")
    assert touches("/vars", "/vars/a")
    assert touches("", "/vars/a")
    assert touches("/vars/b", "")
    assert not touches("/vars/ab", "/vars/a")
    assert not touches("/vars/a", "/vars/ab")
    assert touches("/vars/b/0", "/vars/a", source="/vars/a/1")


# ---- tables and lines ----------------------------------------------------------------------------------------------


def test_a_work_as_a_row() -> None:
    work = {
        "name": "ui.trainer",
        "status": {"stage": "failed", "reason": "exit_code", "since": 100.0},
        "calls": {
            "1-ui.trainer-1": {"id": "1-ui.trainer-1", "stage": "succeeded", "attempt": 1},
            "1-ui.trainer-2": {"id": "1-ui.trainer-2", "stage": "failed", "attempt": 3, "exit_code": 7},
        },
        "progress": 0.25,
        "url": "/view/ui.trainer/",
    }
    assert work_row(work, now=165.0) == {
        "work": "ui.trainer",
        "stage": "failed",
        "reason": "exit 7",
        "call": "1-ui.trainer-2",
        "attempt": 3,
        "since": "1m 05s",
        "progress": "25%",
        "url": "/view/ui.trainer/",
    }
    assert work_row({"name": "idle"})["stage"] is None


def test_a_running_call_is_shown_before_a_waiting_one() -> None:
    calls = {"a": {"id": "a", "stage": "running", "attempt": 1}, "b": {"id": "b", "stage": "pending", "attempt": 0}}
    assert work_row({"name": "w", "calls": calls})["call"] == "a"


def test_plain_tables_cut_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("WORK", "URL"), [{"work": "a", "url": "x" * 300}, {"work": "b" * 100, "url": None}])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head == "WORK" + " " * 98 + "URL"
    assert first.split() == ["a", "x" * 300]
    assert second.split() == ["b" * 100, "-"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (65, "1m 05s"), (7500, "2h 05m"), (90000, "1d 1h"), (-5, "0s")]
)
def test_times(seconds: float, text: str) -> None:
    assert ago(1_000_000.0 - seconds, 1_000_000.0) == text


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**20, 2**50)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "1024.0 TiB"]


@pytest.mark.parametrize(
    ("line", "plain", "colour"),
    [
        ("hello\r\n", "hello", "hello"),
        (" 10%\r 50%\r100%\n", "100%", "100%"),
        ("\x1b[31mred\x1b[0m", "red", "\x1b[31mred\x1b[0m\x1b[0m"),
        ("a\x1b[2Jb\x1b]0;title\x07c\x1b[1Ad", "abcd", "abcd"),
        ("bell\x07tab\tnul\x00", "bell tab\tnul ", "bell tab\tnul "),
        ("ü€", "ü€", "ü€"),
    ],
)
def test_lines_of_scripts_cannot_move_the_cursor(line: str, plain: str, colour: str) -> None:
    assert printable(line, colour=False) == plain
    assert printable(line, colour=True) == colour


class Stream(io.StringIO):
    def __init__(self, *, tty: bool = False) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def test_console_is_plain_without_a_terminal() -> None:
    out, err = Stream(), Stream()
    told: list[str] = []
    console = Console(out, err, on_url=told.append)
    console.step("loading app.py")
    console.work("ui.trainer", "starting")
    console.work("ui.trainer", "starting")
    console.work("ui.trainer", "running", "pid 7")
    console.log("ui.trainer", "epoch 1/3\n")
    console.url("http://127.0.0.1:7501/?token=x")
    console.url("http://127.0.0.1:7501/?token=x")
    console.warn("port 7501 is taken")
    console.stopping(12.0)
    console.done(0, "")
    console.done(1, "trainer failed")
    assert told == ["http://127.0.0.1:7501/?token=x"]
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert out.getvalue().splitlines()[:4] == [
        "orch loading app.py",
        "ui.trainer | starting",
        "ui.trainer | running (pid 7)",
        "ui.trainer | epoch 1/3",
    ]
    assert "    http://127.0.0.1:7501/?token=x\n" in out.getvalue()
    assert err.getvalue() == "orch: warning: port 7501 is taken\norch: failed: trainer failed\n"


def test_console_gives_each_work_a_colour_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Stream(tty=True)
    console = Console(out, Stream())
    console.log("a", "x")
    console.log("b", "x")
    first, second = out.getvalue().splitlines()
    assert first.partition("a |")[0] != second.partition("b |")[0]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Stream(tty=True)
    Console(plain, Stream()).log("a", "x")
    assert plain.getvalue() == "a | x\n"


def test_console_tells_once_of_a_failure() -> None:
    out, err = Stream(), Stream()
    console = Console(out, err)
    console.failed("w", "exit code 4")
    console.work("w", "failed", "exit code 4")
    assert (out.getvalue(), err.getvalue()) == ("", "orch: w failed: exit code 4\n")
    console.work("v", "failed", "exit code 5")
    console.failed("v", "exit code 5")
    assert (out.getvalue().count("exit code 5"), err.getvalue().count("exit code 5")) == (1, 0)


def test_console_survives_a_terminal_that_went_away() -> None:
    class Gone(Stream):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    out, err = Gone(), Stream()
    console = Console(out, err)
    console.note("x")
    console.note("x")
    console.error("still said")
    assert out.writes == 1
    assert err.getvalue() == "orch: still said\n"


def test_console_survives_a_terminal_that_is_not_utf8() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Console(out, Stream()).log("w", "100 €")
    assert raw.getvalue() == b"w | 100 \\u20ac\n"
