"""Metrics of real log files, read as they grow, torn, damaged or not."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import pytest

from orch_workers import metrics as metrics_module
from orch_workers.metrics import CsvMetrics, EventMetrics, MetricsReader

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "metrics" / "scalars.tfevents"
"""Written by TensorBoard's own writer: two scalars (one as double tensor), a NaN, a histogram, a text."""


def test_csv_as_lightning_writes_it() -> None:
    parser = CsvMetrics()
    assert parser.feed(b"epoch,loss,step,val") == {}
    assert parser.feed(b"_loss\r\n0,0.5,4,\n0,") == {"epoch": 0.0, "loss": 0.5, "step": 4.0}
    assert parser.feed(b",9,0.25\n1,nan,14,inf\n") == {"epoch": 1.0, "step": 14.0, "val_loss": 0.25}
    assert parser.feed(b'too,few\n1,"text",15,\n') == {"epoch": 1.0, "step": 15.0}


@pytest.mark.parametrize("step", [1, 5, 64, 1 << 20])
def test_events_as_tensorboard_writes_them(step: int) -> None:
    data, parser, latest = GOLDEN.read_bytes(), EventMetrics(), {}
    for at in range(0, len(data), step):
        latest.update(parser.feed(data[at : at + step]))
    assert latest == {"train/loss": pytest.approx(0.2), "double": 0.4}


def test_scalars_of_older_and_newer_tensors() -> None:
    def field(number: int, kind: int, content: bytes) -> bytes:
        return bytes([number << 3 | kind]) + (bytes([len(content)]) if kind == 2 else b"") + content

    def record(*values: bytes) -> bytes:
        event = field(2, 0, b"\x07") + field(5, 2, b"".join(field(1, 2, value) for value in values))
        return struct.pack("<Q", len(event)) + bytes(4) + event + bytes(4)

    simple = field(1, 2, b"a") + field(2, 5, struct.pack("<f", 0.5))
    floats = field(1, 2, b"b") + field(8, 2, field(1, 0, b"\x01") + field(5, 2, struct.pack("<f", 1.5)))
    content = field(1, 2, b"c") + field(8, 2, field(1, 0, b"\x02") + field(4, 2, struct.pack("<d", 2.5)))
    many = field(1, 2, b"d") + field(8, 2, field(1, 0, b"\x01") + field(4, 2, struct.pack("<ff", 1, 2)))
    assert EventMetrics().feed(record(simple, floats, content, many)) == {"a": 0.5, "b": 1.5, "c": 2.5}


@pytest.mark.parametrize("data", [b"\xff" * 100, struct.pack("<Q", 4) + bytes(4) + b"\x2a\x7fxx" + bytes(4)])
def test_what_is_no_event_file_says_so(data: bytes) -> None:
    with pytest.raises(ValueError):
        EventMetrics().feed(data)


def test_reader_follows_files_as_they_grow(tmp_path: Path) -> None:
    reader = MetricsReader([tmp_path / "logs"])
    assert reader.poll() == {}
    version = tmp_path / "logs" / "version_0"
    version.mkdir(parents=True)
    (version / "metrics.csv").write_text("loss,step\n0.5,1\n0.2")
    (version / "events.out.tfevents.1.host.2.3").write_bytes(GOLDEN.read_bytes()[:-7])
    (version / "events.out.tfevents.bad").write_bytes(b"\xff" * 40)
    found = _settled(reader)
    assert found["loss"] == 0.5 and found["train/loss"] == pytest.approx(0.2)
    with (version / "metrics.csv").open("a") as file:
        file.write("5,2\n")
    assert reader.poll()["loss"] == 0.25
    (version / "metrics.csv").write_text("loss\n9\n")  # written anew, shorter
    assert reader.poll()["loss"] == 9.0
    (version / "metrics.csv").unlink()
    assert reader.poll()["loss"] == 9.0
    assert all(math.isfinite(value) for value in reader.poll().values())


def test_reader_leaves_earlier_runs_alone(tmp_path: Path) -> None:
    for name, at in (("version_0", 1_000.0), ("version_1", 3_000.0)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "metrics.csv"
        path.write_text(f"{name}\n1\n")
        os.utime(path, (at, at))
    assert MetricsReader([tmp_path], since=2_000.0).poll() == {"version_1": 1.0}


def test_reader_takes_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("loss\n1\n")
    assert MetricsReader([tmp_path / "metrics.csv"]).poll() == {"loss": 1.0}


def test_reader_works_in_bounded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "READ_BYTES", 10)
    (tmp_path / "metrics.csv").write_text("loss\n" + "".join(f"{n}\n" for n in range(10, 20)))
    reader = MetricsReader([tmp_path])
    assert reader.poll() == {"loss": 10.0}
    assert reader.poll()["loss"] < 19.0
    assert _settled(reader) == {"loss": 19.0}
    monkeypatch.setattr(metrics_module, "MAX_TAGS", 3)
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "metrics.csv").write_text("a,b,c,d,e\n1,2,3,4,5\n")
    assert len(_settled(reader)) == 3


def test_reader_does_not_search_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "SCAN_FILES", 50)
    for n in range(30):
        (tmp_path / f"d{n}").mkdir()
        for m in range(10):
            (tmp_path / f"d{n}" / f"metrics{m}").touch()
    looked: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or scandir(path))
    MetricsReader([tmp_path]).poll()
    assert len(looked) < 10


def _settled(reader: MetricsReader) -> dict[str, float]:
    before: dict[str, float] = {}
    for _ in range(metrics_module.SCAN_EVERY + 5):
        before = reader.poll()
    return before


def test_the_last_look_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orch_workers.metrics.READ_BYTES", 16)
    reader = MetricsReader([tmp_path])
    assert reader.poll() == {}
    # Written after the last search for files, and longer than one step.
    (tmp_path / "metrics.csv").write_text("step,loss\n" + "".join(f"{n},{n}\n" for n in range(50)))
    assert reader.poll() == {}
    assert reader.poll(final=True) == {"step": 49.0, "loss": 49.0}
