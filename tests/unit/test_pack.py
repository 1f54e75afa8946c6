"""What of an app's folder is sent to other machines."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from orch.errors import UsageError

pytest.importorskip("pathspec")

from orch.runtimes.pack import pack


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def packed(folder: Path, target: Path) -> list[str]:
    pack(folder, target, "top")
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
    assert all(name.startswith("top/") for name in names)
    return sorted(name.removeprefix("top/") for name in names if not name.endswith("/"))


def test_what_is_never_sent(tmp_path: Path) -> None:
    app = fill(
        tmp_path / "app",
        "app.py",
        "scripts/train.py",
        ".env",
        ".orch/token",
        ".git/HEAD",
        "scripts/__pycache__/train.pyc",
        "venv/pyvenv.cfg",
        "venv/lib/x.py",
        ".venv/lib/x.py",
    )
    assert packed(app, tmp_path / "p.zip") == [".env", "app.py", "scripts/train.py"]


def test_orchignore_is_read_as_a_gitignore(tmp_path: Path) -> None:
    app = fill(
        tmp_path / "app", "a.log", "keep.log", "data/big.bin", "sub/data/small", "sub/x.tmp", "x y/z", ".gitignore"
    )
    (app / ".orchignore").write_text("# comment\n*.log\n!keep.log\n/data/\n**/*.tmp\nx y/\n!.orch/\n")
    (app / ".gitignore").write_text("sub/\n")
    (app / ".orch").mkdir()
    (app / ".orch" / "token").write_text("secret")
    assert packed(app, tmp_path / "p.zip") == [".gitignore", ".orchignore", "keep.log", "sub/data/small"]


def test_links_are_followed_and_modes_kept(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", "one", "deep/two")
    app = fill(tmp_path / "app", "run.sh")
    (app / "run.sh").chmod(0o755)
    (app / "link").symlink_to(elsewhere)
    (app / "one").symlink_to(elsewhere / "one")
    (app / "dangling").symlink_to(tmp_path / "nothing")
    (app / "round").symlink_to(app)
    os.mkfifo(app / "pipe")
    assert packed(app, tmp_path / "p.zip") == ["link/deep/two", "link/one", "one", "run.sh"]
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("top/one") == b"one"
        assert archive.getinfo("top/run.sh").external_attr >> 16 & 0o111
        assert not archive.getinfo("top/one").external_attr >> 16 & 0o111


def test_the_same_content_is_the_same_package(tmp_path: Path) -> None:
    one = fill(tmp_path / "one", "b", "a/c", "d")
    other = fill(tmp_path / "other", "d", "a/c", "b")
    os.utime(other / "b", (1, 1))
    pack(one, tmp_path / "1.zip", "top")
    pack(other, tmp_path / "2.zip", "top")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert (tmp_path / "1.zip").stat().st_mode & 0o077 == 0
    (other / "b").write_text("changed")
    pack(other, tmp_path / "2.zip", "top")
    assert (tmp_path / "1.zip").read_bytes() != (tmp_path / "2.zip").read_bytes()


def test_an_empty_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    assert packed(tmp_path / "app", tmp_path / "p.zip") == []


def test_too_large_names_the_largest_and_what_to_do(tmp_path: Path) -> None:
    app = fill(tmp_path / "app", "small")
    (app / "data.bin").write_bytes(os.urandom(200_000))
    with pytest.raises(UsageError, match=r"over 0 MiB packed; the largest: data\.bin") as caught:
        pack(app, tmp_path / "p.zip", "top", limit=100_000)
    assert str(app / ".orchignore") in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["app"], "no draft is left"


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    app = fill(tmp_path / "app", "secret")
    (app / "secret").chmod(0)
    with pytest.raises(UsageError, match="secret"):
        pack(app, tmp_path / "p.zip", "top")
