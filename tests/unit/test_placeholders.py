"""Command lines: placeholders, words, this Python."""

from __future__ import annotations

import pytest

from orch_workers.placeholders import command_line, fill, script_word

VALUES = {"host": "h", "port": "80", "base_path": "/view/w", "work_dir": "/o/works/w"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--port={port} {host}", "--port=80 h"),
        ("{{port}}", "{port}"),
        ("{other} {} {{other}} {1} {port", "{other} {} {{other}} {1} {port"),
        ('{"a": {port}}', '{"a": 80}'),
        ("${port}", "$80"),
        ("{base_path}{work_dir}", "/view/w/o/works/w"),
    ],
)
def test_fill(text: str, expected: str) -> None:
    assert fill(text, VALUES) == expected


def line(
    command: list[str] | str, args: list[str] | None = None, run: list[str] | None = None, shell: bool = False
) -> list[str]:
    return command_line(command, args or [], run or [], shell=shell, values=VALUES, python="/py")


def test_words() -> None:
    assert line("train.py --x 'a b' $HOME") == ["/py", "train.py", "--x", "a b", "$HOME"]
    assert line("python train.py") == line("python3 train.py") == ["/py", "train.py"]
    assert line(["/usr/bin/env", "python"]) == ["/usr/bin/env", "python"]
    assert line("python3.11 x") == ["python3.11", "x"]
    assert line(["sub/my train.py"]) == ["/py", "sub/my train.py"]
    assert line("serve", ["--port={port}"], ["{port}", "{{port}}"]) == ["serve", "--port=80", "{port}", "{{port}}"]


def test_shell() -> None:
    text = """cd "$X" && run.py ${port} $(ls {a,b}) {{port}} --port {port} | tee 'x' """
    assert line(text, ["{host}"], ["a b", "{port}"], shell=True) == [
        "bash", "-c", text.replace("{{port}} --port {port}", "{port} --port 80"), "bash", "h", "a b", "{port}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "shell", "word"), [("", False, "empty"), (" ", True, "empty"), ("a 'b", False, "a 'b")]
)
def test_what_cannot_be_run(command: str, shell: bool, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        line(command, shell=shell)


def test_script_word() -> None:
    assert script_word(["/py", "a/b.py", "x"], "/py") == "a/b.py"
    assert script_word(["/py", "-m", "b.py"], "/py") is None
    assert script_word(["/py"], "/py") is None
    assert script_word(["cat", "b.py"], "/py") is None
