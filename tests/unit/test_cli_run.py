"""`orch run`: what the command line means, and the one line that each mistake gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orch.cli import main
from orch.cli.options import RunOptions
from orch.cli.run import _from_json, _to_json, options_from, read_env_file, run_arguments
from orch.cli.verbs import Parser
from orch.errors import UsageError


@pytest.fixture(autouse=True)
def app_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "app.py").write_text("")
    yield tmp_path


def parse(*words: str, environ: dict[str, str] | None = None) -> RunOptions:
    parser = Parser(prog="orch run", allow_abbrev=False)
    run_arguments(parser)
    args = parser.parse_intermixed_args(words)
    args.argv = ()
    return options_from(args, environ or {})


def test_defaults(app_folder: Path) -> None:
    options = parse()
    assert options == RunOptions(app_file=app_folder / "app.py")
    assert (options.mode, options.host, options.port, options.port_given) == ("local", "127.0.0.1", 7501, False)


@pytest.mark.parametrize(
    "words",
    [["app.py"], ["app", "app.py"], ["app", "--local", "app.py"], ["--local", "app"], ["."], ["app"]],
)
def test_the_app_file_can_be_said_in_several_ways(words: list[str], app_folder: Path) -> None:
    assert parse(*words).app_file == app_folder / "app.py"


def test_all_options(app_folder: Path) -> None:
    (app_folder / "more.env").write_text("A=file\nB=file\n")
    options = parse(
        *["--name", "my app", "--host", "0.0.0.0", "--allow-host", "a.example", "--allow-host", "b.example"],
        *["--port", "0", "--no-open", "-d", "--env", "A=1=2", "--env-file", "more.env", "--secret", "KEY=s3cret"],
        *["--secret", "TOKEN", "--drive", "drive", "--durable", "--resume", "--dry-run", "-y"],
        environ={"TOKEN": "from the environment"},
    )
    assert options == RunOptions(
        app_file=app_folder / "app.py",
        name="my app",
        host="0.0.0.0",
        port=0,
        port_given=True,
        allow_hosts=("a.example", "b.example"),
        open=False,
        detach=True,
        env={"A": "1=2", "B": "file"},
        secrets={"KEY": "s3cret", "TOKEN": "from the environment"},
        drive=(app_folder / "drive").as_uri(),
        durable=True,
        resume=True,
        dry_run=True,
        yes=True,
    )
    assert "s3cret" not in repr(options)


def test_options_survive_the_way_to_the_background(app_folder: Path) -> None:
    options = parse("--env", "A=1", "--secret", "K=v", "--allow-host", "h", "--fresh")
    assert _from_json(_to_json(options)) == options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope.py"], ["there is no app file", "nope.py", "orch init"]),
        (["a.py", "b.py"], ["one app file", "a.py b.py", "`--`"]),
        (["notes.txt"], ["notes.txt is no Python file"]),
        (["my-app.py"], ["my-app.py cannot be imported"]),
        (["--cloud", "app.py"], ["--cloud knows aws, not 'app.py'"]),
        (["--port", "x"], ["--port 'x' is not a port"]),
        (["--port", "65536"], ["--port '65536' is not a port"]),
        (["--name", "a/b"], ["--name 'a/b'"]),
        (["--env", "EPOCHS"], ["--env 'EPOCHS' is not of the form K=V"]),
        (["--env", "9=1"], ["--env '9=1' is not of the form K=V"]),
        (["--env-file", "none.env"], ["--env-file none.env cannot be read: No such file"]),
        (["--env-file", "bad.env"], ["bad.env:2 is not of the form K=V: 'what'"]),
        (["--secret", "KEY"], ["secret KEY has no value", "--secret KEY=VALUE"]),
        (["--secret", "KEY="], ["secret KEY is empty"]),
        (["--drive", "nope://x"], ["--drive 'nope://x' is no fsspec URL"]),
        (["--drive", "memory://x"], ["not shared by processes"]),
    ],
)
def test_mistakes(words: list[str], said: list[str], app_folder: Path) -> None:
    (app_folder / "notes.txt").touch()
    (app_folder / "my-app.py").touch()
    (app_folder / "bad.env").write_text("A=1\nwhat\n")
    with pytest.raises(UsageError) as caught:
        parse(*words)
    text = f"{caught.value.message}; {caught.value.hint}"
    for part in said:
        assert part in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", "--fresh"], "not allowed with argument --resume"),
        (["--local", "--ray", "x"], "not allowed with argument --local"),
        (["--open", "--no-open"], "not allowed with argument --open"),
        (["--frsh"], "unrecognized arguments: --frsh"),
        (["--port"], "--port: expected one argument"),
    ],
)
def test_mistakes_of_grammar_are_one_line_and_exit_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("orch: run: ")
    assert said in err


def test_a_secret_that_is_no_name_is_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        parse("--secret", "hunter-2")
    assert "hunter-2" not in str(caught.value) + caught.value.hint


def test_env_file(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("# c\n\nA=1\nexport B = two words \nC='q # q'\nD=\"x=y\"\nE=\nF='\n")
    assert read_env_file(path) == {"A": "1", "B": "two words", "C": "q # q", "D": "x=y", "E": "", "F": "'"}


def test_a_missing_app_leaves_nothing_behind(app_folder: Path) -> None:
    assert main(["run", "nope.py"]) == 2
    assert sorted(os.listdir(app_folder)) == ["app.py"]
