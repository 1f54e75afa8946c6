"""The pure half of the Drive: paths, codec, overlay, and the index that answers a Flow."""

from __future__ import annotations

import subprocess
import sys
from itertools import count

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orch_drive.errors import DriveAmbiguous, DriveCorrupt, DriveError, DrivePathError
from orch_drive.manifest import (
    KEEP,
    Entry,
    Manifest,
    ManifestIndex,
    TornManifest,
    chain_key,
    chain_path,
    check_component,
    check_path,
    decode,
    diff,
    encode,
    format_of,
    from_json,
    glob_regex,
    narrow,
    to_json,
)

serials = count(1)


def version(path: str, names: str = "", *, component: str = "trainer", number: int = 1, **more: object) -> Manifest:
    entries = [Entry(name=name, size=len(name), sha256=f"{name}-{number}") for name in names.split()]
    is_dir = bool(more.pop("is_dir", True))
    values = {"drive": "app", "at": 1.0, "serial": next(serials), **more}
    return Manifest(component=component, path=path, version=number, is_dir=is_dir, entries=entries, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given_path", "plain"),
    [
        ("a", "a"),
        ("a/b/", "a/b"),
        ("./a//b/./c", "a/b/c"),
        (".", "."),
        ("./", "."),
        ("-rf", "-rf"),
        ("ä ö/日本", "ä ö/日本"),
        ("..a/b..", "..a/b.."),
        ("~root", "~root"),
    ],
)
def test_a_path_has_one_spelling(given_path: str, plain: str) -> None:
    assert check_path(given_path) == plain


@pytest.mark.parametrize(
    "bad",
    ["", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "..\\x", "a\\..\\b", "a\0b", "x" * 256, "\udcff", "//x"],
)
def test_a_path_that_could_leave_the_root_is_refused(bad: str) -> None:
    with pytest.raises(DrivePathError):
        check_path(bad)
    with pytest.raises(ValueError, match=r"."):
        check_path(bad)


def test_component_names() -> None:
    assert check_component("root.ui.trainer") == "ui.trainer"
    assert check_component("root") == "root"
    for bad in ("", "a/b", "..", "a..b", ".a", "a b"):
        with pytest.raises(DrivePathError):
            check_component(bad)


@given(st.text(min_size=1))
def test_a_checked_path_never_leaves_and_is_stable(text: str) -> None:
    try:
        path = check_path(text)
    except DrivePathError:
        return
    assert not path.startswith("/") and ".." not in path.split("/")
    assert check_path(path) == path
    key = chain_key(path)
    assert "/" not in key and key not in (".", "..") and len(key.encode()) < 200
    assert chain_path(key) in (path, None)


def test_long_paths_have_keys_of_their_own() -> None:
    one, other = "x/" * 100 + "a", "x/" * 100 + "b"
    assert chain_key(one) != chain_key(other)
    assert len(chain_key(one)) < 200 and chain_path(chain_key(one)) is None


def test_codec_keeps_everything_and_sees_every_flipped_byte() -> None:
    manifest = version("logs", "a b/c", call="1-t-1", host="h", cwd="/x", epoch=3)
    data = encode(manifest)
    assert decode(data) == manifest
    assert from_json(to_json(manifest)) == manifest
    for position in range(len(data) - 1):
        flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with pytest.raises((DriveCorrupt, TornManifest)):
            decode(flipped)


def test_a_torn_manifest_is_told_from_a_corrupt_one() -> None:
    data = encode(version("logs", "a"))
    for length in range(len(data)):
        with pytest.raises(TornManifest):
            decode(data[:length])


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../b", ""])
def test_a_manifest_with_an_escaping_name_is_refused(name: str) -> None:
    manifest = Manifest(
        drive="app",
        component="t",
        path="logs",
        version=1,
        serial=1,
        is_dir=True,
        entries=[Entry(name=name, size=1, sha256="0")],
    )
    with pytest.raises(DriveCorrupt):
        decode(encode(manifest))
    with pytest.raises(DriveCorrupt):
        from_json(to_json(manifest))


def test_only_a_manifest_that_needs_it_has_the_newer_format() -> None:
    own, parts = "u" + "0" * 24 + "-1", [("first", 3), ("second", 4)]
    plain = Entry(name="a", size=7, sha256="whole")
    named = Entry(name="a", size=7, sha256="whole", blob=own)
    grown = Entry(name="a", size=7, sha256="whole", blob=own, parts=parts)
    assert (format_of([plain]), format_of([plain, named])) == (1, 2)
    assert b"format" not in encode(version("logs", "a")) and b'"format":2' in encode(version("logs", "a", format=2))
    assert plain.pieces == [("whole", "whole", 7)] and named.pieces == [(own, "whole", 7)]
    assert grown.pieces == [(own, "first", 3), ("second", "second", 4)]


@pytest.mark.parametrize("blob", ["../x", "u/../../x", "0" * 64, "u", "u" * 20])
def test_a_blob_cannot_be_named_out_of_its_folder(blob: str) -> None:
    entry = Entry(name="a", size=1, sha256="0", blob=blob)
    manifest = msgspec.structs.replace(version("logs", format=2), entries=[entry])
    with pytest.raises(DriveCorrupt, match="blob"):
        decode(encode(manifest))
    with pytest.raises(DriveCorrupt, match="blob"):
        from_json(to_json(manifest))


def test_a_newer_format_says_what_to_do() -> None:
    with pytest.raises(DriveCorrupt, match=r"newer"):
        decode(encode(version("logs", "a", format=99)))


def test_diff() -> None:
    changes = diff(version("x", "a b"), version("x", "b c", number=2))
    assert (changes.added, changes.changed, changes.removed) == (["c"], ["b"], ["a"])
    assert not diff(version("x", "a"), version("x", "a"))


def test_narrow() -> None:
    logs = version("logs", "v0/model.pt v0/x/y v1/model.pt top")
    assert narrow(logs, "logs") is logs
    model = narrow(logs, "logs/v0/model.pt")
    assert model is not None and not model.is_dir
    assert [entry.name for entry in model.entries] == ["model.pt"] and model.within == "logs"
    assert model.drive_path(model.entries[0]) == "logs/v0/model.pt"
    folder = narrow(logs, "logs/v0")
    assert folder is not None and [entry.name for entry in folder.entries] == ["model.pt", "x/y"]
    everything = narrow(logs, ".")
    assert everything is not None and everything.entries[-1].name == "logs/top"
    assert narrow(logs, "logs/v") is None and narrow(logs, "log") is None


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("logs/*/model.pt", ["logs/a/model.pt"], ["logs/a/b/model.pt", "logs/model.pt"]),
        ("**/model.pt", ["model.pt", "a/b/model.pt"], ["a/model.ptx"]),
        ("logs/**", ["logs/a", "logs/a/b"], ["log"]),
        ("v?", ["v1", "v."], ["v", "v12", "v/"]),
        ("v[0-2]*", ["v0", "v2x"], ["v3"]),
        ("v[!0]", ["v1"], ["v0", "v/"]),
        ("a.b*", ["a.bc"], ["axbc"]),
        ("[", ["["], ["x"]),
        ("a[b", ["a[b"], ["ab"]),
        ("*\n*", ["x\ny"], ["xy"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    regex = glob_regex(pattern)
    assert all(regex.match(path) for path in yes)
    assert not any(regex.match(path) for path in no)


def test_list_of_folders_patterns_and_files() -> None:
    index = ManifestIndex([version("logs", "v0/model.pt v0/log v1/model.pt"), version("best", "best", is_dir=False)])
    assert index.list() == ["best", "logs"]
    assert index.list("logs") == ["logs/v0", "logs/v1"]
    assert index.list("logs/v0") == ["logs/v0/log", "logs/v0/model.pt"]
    assert index.list("logs", recursive=True) == ["logs/v0/log", "logs/v0/model.pt", "logs/v1/model.pt"]
    assert index.list("logs/*/model.pt") == ["logs/v0/model.pt", "logs/v1/model.pt"]
    assert index.list("logs/*") == ["logs/v0", "logs/v1"]
    assert index.list("logs/v0*", recursive=True) == ["logs/v0/log", "logs/v0/model.pt"]
    assert index.list("best") == ["best"]
    assert index.list("none") == index.list("none*") == []
    assert index.list(component="other") == []
    assert [info.path for info in index.files("root.trainer")] == [
        "best",
        "logs/v0/log",
        "logs/v0/model.pt",
        "logs/v1/model.pt",
    ]


def test_a_name_that_looks_like_a_pattern() -> None:
    index = ManifestIndex([version("logs", "v[0] v0")])
    assert index.list("logs/v[0]") == ["logs/v[0]"]


def test_several_owners() -> None:
    index = ManifestIndex([version("logs", "a"), version("logs", "b", component="ui.other")])
    assert index.owners("logs") == ["trainer", "ui.other"]
    assert index.owners("logs/a") == ["trainer"]
    assert index.list("logs") == ["logs/a", "logs/b"]
    with pytest.raises(DriveAmbiguous, match=r"trainer, ui\.other"):
        index.resolve("logs")
    with pytest.raises(DriveAmbiguous):
        index.resolve("logs", version=1)
    found = index.resolve("logs", component="root.ui.other")
    assert found is not None and found.component == "ui.other"
    one = index.resolve("logs/b")
    assert one is not None and one.component == "ui.other"
    assert {info.component for info in index.versions("logs")} == {"trainer", "ui.other"}


def test_the_newest_publish_decides_about_what_lies_below_it() -> None:
    index = ManifestIndex([version("logs", "a b", number=1)])
    index.add(version("logs/a", "a", number=1, is_dir=False, call="late"))
    both = index.resolve("logs")
    assert both is not None and [entry.name for entry in both.entries] == ["a", "b"]
    newest = index.resolve("logs/a")
    assert newest is not None and newest.call == "late"
    before = both.serial
    index.add(version("logs", "b c", number=2))
    again = index.resolve("logs")
    assert again is not None and [entry.name for entry in again.entries] == ["b", "c"] and again.serial > before
    assert index.resolve("logs/a") is None


def test_a_folder_of_paths_published_one_by_one() -> None:
    index = ManifestIndex([version(f"out/{name}", name, is_dir=False) for name in "abc"])
    folder = index.resolve("out")
    assert folder is not None and folder.is_dir and [entry.name for entry in folder.entries] == ["a", "b", "c"]
    assert len(index.versions("out")) == 3
    assert index.resolve("out", version=1) is None, "the folder itself has no versions"


def test_a_file_takes_the_place_of_a_folder_and_back() -> None:
    index = ManifestIndex([version("x", "a b")])
    index.add(version("x", "x", is_dir=False, number=2))
    assert index.list(recursive=True) == ["x"]
    index.add(version("x/deep", "deep", is_dir=False))
    assert index.list(recursive=True) == ["x/deep"]


def test_deletion_hides_and_forgets_history() -> None:
    index = ManifestIndex([version("x", "a", number=n) for n in (1, 2)])
    index.add(version("x", number=3, deleted=True, is_dir=False))
    assert index.list() == [] and index.resolve("x") is None and index.versions("x") == []
    assert index.resolve("x", version=2) is None
    index.add(version("x", "a", number=4))
    assert [info.version for info in index.versions("x")] == [4]


def test_versions_are_kept_and_selected() -> None:
    index = ManifestIndex([version("x", "a b" if n % 2 else "a", number=n) for n in range(1, 16)])
    assert [info.version for info in index.versions("x")] == list(range(6, 16))
    assert len(index.versions("x")) == KEEP
    assert [info.version for info in index.versions("x/b")] == [7, 9, 11, 13, 15]
    old = index.resolve("x/b", version=9)
    assert old is not None and old.version == 9
    assert index.resolve("x/b", version=8) is None and index.resolve("x", version=1) is None


def test_a_path_that_the_newest_version_lost_is_still_in_the_older() -> None:
    index = ManifestIndex([version("x", "a b", number=1), version("x", "a", number=2)])
    assert index.resolve("x/b") is None
    old = index.resolve("x/b", version=1)
    assert old is not None and [info.version for info in index.versions("x/b")] == [1]


def test_partial_versions_are_seen_only_when_asked_for() -> None:
    index = ManifestIndex([version("x", "a", number=1)])
    index.add(version("x", "a b", number=2, partial=True))
    assert index.resolve("x/b") is None and index.list("x") == ["x/a"]
    unfinished = index.resolve("x", partial=True)
    assert unfinished is not None and unfinished.partial and len(unfinished.entries) == 2
    assert [info.partial for info in index.versions("x")] == [False]
    assert [info.partial for info in index.versions("x", partial=True)] == [False, True]
    index.add(version("x", "a b c", number=2, partial=True))
    newer = index.resolve("x", partial=True)
    assert newer is not None and newer.serial > unfinished.serial
    index.add(version("x", "z", number=2))
    done = index.resolve("x", partial=True)
    assert done is not None and not done.partial and done.entries[0].name == "z"


def test_a_late_partial_does_not_come_back() -> None:
    late = version("x", "a", number=1, partial=True)
    index = ManifestIndex([version("x", "a", number=1), late])
    found = index.resolve("x", partial=True)
    assert found is not None and not found.partial


def test_order_of_arrival_does_not_matter() -> None:
    manifests = [version("x", f"f{n}", number=n) for n in range(1, 5)]
    one, other = ManifestIndex(manifests), ManifestIndex(reversed(manifests))
    assert one.resolve("x") == other.resolve("x") and one.versions("x") == other.versions("x")


def test_an_empty_folder_is_something() -> None:
    index = ManifestIndex([version("empty")])
    found = index.resolve("empty")
    assert found is not None and found.is_dir and index.list() == ["empty"] and index.list("empty") == []


def test_remove() -> None:
    index = ManifestIndex([version("x", "a")])
    index.remove("root.trainer", "x")
    assert index.list() == []


def test_errors_have_a_status_and_a_default_message() -> None:
    error = DriveAmbiguous(hint="h")
    assert isinstance(error, DriveError) and (error.status, error.hint) == (409, "h")
    assert error.message == "Several components publish this path."


def test_the_import_is_light() -> None:
    code = (
        "import sys; from orch_drive import Drive; Drive('models').to_state()\n"
        "print(sorted({'fsspec', 'msgspec', 'asyncio', 'boto3', 'orch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
