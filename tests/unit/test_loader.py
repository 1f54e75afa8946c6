"""An app file that cannot be loaded: the error names the file beside it that is to blame, and the line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orch.errors import UsageError
from orch.loader import load_app


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path, argv, modules = list(sys.path), list(sys.argv), set(sys.modules)
    yield tmp_path
    sys.path[:], sys.argv[:] = path, argv
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"broken_app.py": "x = 1\ny = (\n"}, "broken_app.py, line 2: '(' was never closed"),
        ({"broken_app.py": "\n1 / 0"}, "broken_app.py, line 2: ZeroDivisionError: division by zero"),
        (
            {"broken_app.py": "\neval('(')"},
            "broken_app.py, line 2: SyntaxError: '(' was never closed (<string>, line 1)",
        ),
        ({"broken_app.py": "import helps", "helps.py": "\nx = ("}, "helps.py, line 2: '(' was never closed"),
        (
            {"broken_app.py": "import helps", "helps.py": "\nimport json; json.loads('1 2')"},
            "helps.py, line 2: JSONDecodeError: Extra data: line 1 column 3 (char 2)",
        ),
        (
            {"broken_app.py": "import inside.deep", "inside/deep.py": "raise SystemExit(3)"},
            "inside/deep.py, line 1: SystemExit: 3",
        ),
    ],
)
def test_the_file_and_the_line_are_named(folder: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        load_app(folder / "broken_app.py", [])
    assert caught.value.message == said
