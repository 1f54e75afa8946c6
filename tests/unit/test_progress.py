"""What is read off output: real output of the libraries, and what scripts print by hand."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orch_workers.progress import LINE_BYTES, ProgressParser, epochs_in

DATA = Path(__file__).resolve().parent.parent / "data"


def seen(*pieces: str, argv: list[str] | None = None) -> list[float | None]:
    parser = ProgressParser(argv or [])
    values = [parser.feed(piece.encode()) for piece in pieces]
    return [None if value is None else round(value, 3) for value in values]


def course(data: bytes, step: int, argv: list[str]) -> list[float]:
    parser, values = ProgressParser(argv), []
    for at in range(0, len(data), step):
        value = parser.feed(data[at : at + step])
        if value is not None and (not values or values[-1] != value):
            values.append(value)
    return values


@pytest.mark.parametrize("step", [7, 100, 1 << 20])
@pytest.mark.parametrize("name", ["lightning_tqdm.txt", "lightning_rich.txt"])
def test_lightning_over_three_epochs(name: str, step: int) -> None:
    """Its sanity check and validation bars neither raise nor reset the progress of training."""
    values = course((DATA / name).read_bytes(), step, ["train.py", "fit", "--trainer.max_epochs", "3"])
    assert values == sorted(values)
    assert values[-1] == 1.0
    if step == 7:
        assert values[0] <= 1 / 60
        assert {1 / 3, 2 / 3} <= set(values) or len(values) > 10


def test_lightning_without_a_known_number_of_epochs() -> None:
    """Each epoch is a cycle of its own, from its first step to its last."""
    values = course((DATA / "lightning_tqdm.txt").read_bytes(), 7, [])
    falls = [n for n in range(1, len(values)) if values[n] < values[n - 1]]
    assert len(falls) == 2
    assert all(values[n - 1] == 1.0 and values[n] < 0.1 for n in falls)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["epoch 1/4\n", "epoch 2/4\n", "epoch 4/4\n"], [0.25, 0.5, 1.0]),
        (["Epoch [2/4]\n"], [0.5]),
        (["Epoch 2 of 4 done\n"], [0.5]),
        (["Epoch: 3/4, loss: 0.1\n"], [0.75]),
        (["Epoch 0/3\n", "Epoch 1/3\n"], [0.0, 0.25]),
        (["Epoch [1/5], Step [10/100], Loss: 0.5\n", "Epoch [2/5], Step [50/100]\n"], [0.02, 0.3]),
        (["Epoch: [0][ 10/100]\tTime\n", "max_epochs=2\n", "Epoch: [1][ 50/100]\tTime\n"], [0.1, 0.1, 0.75]),
        (["Epoch 1/2:  50%|##   | 5/10 [00:01<00:01", "\rEpoch 2/2:  50%|##   | 5/10 [00:01<00:01"], [0.25, 0.75]),
        (["step 1/10\n", "step 5/10\n", "step 2/10\n"], [0.1, 0.5, 0.5]),
        (["progress: 37%\n", "accuracy 99%\n", "50 % done\n", "60% complete\n"], [0.37, 0.37, 0.5, 0.6]),
        (["Working... ━━━━━━━━━╺━━━━━━━━━  45% 0:00:10\n"], [0.45]),
        (["\r 37%|####      | 12/32 [00:01<00:02, 3.1it/s]"], [0.375]),
        (["\r 37%|####      | 12.3k/33.0k [00:01<00:02, 3.1kB/s]"], [0.37]),
        (["\r 37%|####      | 1", "2/32 [00:01"], [None, 0.375]),
        (["epoch 1", "0/20", "\n"], [None, None, 0.5]),
        (["\x1b[32m 50%|##   | 5/10 [0\x1b[0m"], [0.5]),
        (["see a/1/2 and 3/4, 99% | of it\n", "5/10 apples\n", "epochs are nice\n"], [None, None, None]),
        (["12/32 [=====>......] - ETA: 3s\n"], [0.375]),
    ],
)
def test_what_scripts_print(pieces: list[str], expected: list[float | None]) -> None:
    assert seen(*pieces) == expected


def test_a_bar_after_a_bar_is_a_new_cycle() -> None:
    pieces = [
        "download: 100%|####| 5/5 [00:00",
        "\n",
        "train:  10%|#   | 1/10 [00:00",
        "\rtrain:  20%|#   | 2/10 [00:00",
    ]
    assert seen(*pieces) == [1.0, 1.0, 0.1, 0.2]


def test_a_bar_within_a_bar_is_a_part_of_it() -> None:
    pieces = [
        "epochs:   0%|          | 0/4 [00:00<?, ?it/s]",
        "\n\rbatch:  50%|#####     | 5/10 [00:00<?]",
        "\rbatch: 100%|##########| 10/10 [00:00<?]",
        "\x1b[A\repochs:  25%|##        | 1/4 [00:00<?, ?it/s]",
        "\n\rbatch:  50%|#####     | 5/10 [00:00<?]",
    ]
    assert seen(*pieces) == [0.0, 0.125, 0.25, 0.25, 0.375]


def test_a_bar_that_was_left_does_not_stay_for_ever() -> None:
    pieces = ["find:  50%|##  | 5/10 [00:00\r"]
    for n in range(5):
        pieces += [f"part {n}:   0%|    | 0/4 [00:00\r", f"part {n}: 100%|####| 4/4 [00:00\r"]
    assert seen(*pieces, "last:  10%|   | 1/10 [00:00\r")[-1] == 0.1


def test_validation_alone_is_progress() -> None:
    pieces = ["Validation:  50%|##   | 1/2 [0\r", "Training:   0%|  | 0/10 [0\r", "Validation: 100%|####| 2/2 [0\r"]
    assert seen(*pieces) == [0.5, 0.0, 0.0]


def test_a_second_fit_is_a_new_cycle() -> None:
    assert seen("epoch 3/3\n", "epoch 1/3\n") == [1.0, 0.333]


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        (["train.py", "fit", "--trainer.max_epochs=7"], 7),
        (["train.py", "--num-epochs", "5"], 5),
        (["--epochs", "2"], 2),
        (["--epochs", "many"], None),
        (["--warmup_epochs", "2"], None),
        ([], None),
    ],
)
def test_epochs_of_a_command(words: list[str], epochs: int | None) -> None:
    assert epochs_in(words) == epochs


# ---- last lines ------------------------------------------------------------------------------------------------------


def test_tail_is_what_a_terminal_shows() -> None:
    parser = ProgressParser()
    parser.feed(b"one\r\n\n  \x1b[31mtwo\x1b[0m  \n 10%|#\r 20%|##\r\x1b[K\n\x1b[2K\nbad \xff byte\nunfinished")
    assert parser.tail() == ["one", "  two", " 20%|##", "bad \N{REPLACEMENT CHARACTER} byte", "unfinished"]
    assert parser.tail(2) == parser.tail()[-2:]
    parser.feed(b"\rover\n")
    assert parser.tail(2) == ["bad \N{REPLACEMENT CHARACTER} byte", "over"]


def test_memory_is_bounded() -> None:
    parser = ProgressParser()
    chunk = b"x" * (1 << 20)
    parser.feed(chunk)
    tracemalloc.start()
    for _ in range(20):
        parser.feed(chunk)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 4 * LINE_BYTES
    assert peak < 3 * len(chunk)
    parser.feed(b"\nshort\n")
    assert [len(line) for line in parser.tail()] == [2_000, 5]
    for n in range(1_000):
        parser.feed(b"line %d\n" % n)
    assert len(parser.tail(10_000)) <= 201


@given(
    st.lists(
        st.sampled_from([b"\r", b"\n", b"\x1b[2K", b"epoch 1/2", b" 50%|#| 1/2 [", b"\xe2\x94\x81", b"\xff", b"x" * 50])
    ),
    st.integers(1, 9),
)
def test_where_the_output_is_cut_does_not_matter(parts: list[bytes], step: int) -> None:
    data = b"".join(parts) + b"\n"
    whole, cut = ProgressParser(), ProgressParser()
    whole.feed(data)
    for at in range(0, len(data), step):
        value = cut.feed(data[at : at + step])
        assert value is None or 0.0 <= value <= 1.0
    assert cut.tail(1_000) == whole.tail(1_000)
    assert (cut.progress is None) == (whole.progress is None)
