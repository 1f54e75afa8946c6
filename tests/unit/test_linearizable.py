"""The checker accepts what a register can do and rejects what it cannot."""

from __future__ import annotations

import random
import threading
import time

from linearizable import Operation, Register, explain

START = Register("a", 1)


def read(value: str, rev: int, invoked: float, answered: float) -> Operation:
    return Operation("read", "ok", invoked, answered, value=value, rev=rev)


def cas(expected: str, value: str, rev: int, invoked: float, answered: float) -> Operation:
    return Operation("test", "ok", invoked, answered, expected=expected, value=value, rev=rev)


def test_what_follows_one_another() -> None:
    assert explain([], START) is None
    assert explain([read("a", 1, 0, 1), cas("a", "b", 2, 2, 3), read("b", 2, 4, 5)], START) is None


def test_a_stale_read_is_rejected() -> None:
    stale = read("a", 1, 4, 5)
    assert explain([cas("a", "b", 2, 2, 3), stale], START) == stale
    # It may have come first while both were under way.
    assert explain([cas("a", "b", 2, 2, 5), read("a", 1, 3, 4)], START) is None
    # But not once somebody has seen the new value.
    assert explain([cas("a", "b", 2, 2, 9), read("b", 2, 3, 4), read("a", 1, 5, 6)], START) is not None


def test_only_one_of_two_wins() -> None:
    assert explain([cas("a", "b", 2, 0, 9), cas("a", "c", 3, 0, 9)], START) is not None
    lost = Operation("test", "failed", 0, 9, expected="a", value="c")
    assert explain([cas("a", "b", 2, 0, 9), lost], START) is None
    assert explain([cas("a", "b", 2, 4, 9), Operation("test", "failed", 0, 3, expected="a")], START) is not None


def test_a_lost_answer_may_be_either() -> None:
    unknown = Operation("test", "unknown", 2, expected="a", value="b")
    assert explain([unknown, read("a", 1, 50, 51)], START) is None
    assert explain([unknown, read("b", 7, 50, 51)], START) is None
    assert explain([unknown, read("a", 1, 50, 51), read("b", 7, 60, 61)], START) is None  # late, before it was dropped
    assert explain([unknown, read("b", 7, 50, 51), read("a", 1, 60, 61)], START) is not None
    assert explain([unknown, read("b", 7, 0, 1)], START) is not None  # not before it was asked for
    assert explain([unknown, read("b", 7, 3, 4), read("b", 8, 5, 6)], START) is not None  # one set, two revisions


def test_an_acknowledged_set_that_disappears_is_rejected() -> None:
    assert explain([cas("a", "b", 2, 0, 1), cas("a", "c", 2, 5, 6), read("c", 2, 7, 8)], START) is not None
    assert explain([cas("a", "b", 9, 0, 1), cas("b", "c", 4, 2, 3)], START) is not None  # revisions go back


def test_conditions_on_revisions() -> None:
    def match(rev: int, value: str, became: int, invoked: float, answered: float) -> Operation:
        return Operation("match", "ok", invoked, answered, expected=rev, value=value, rev=became)

    assert explain([match(1, "b", 5, 0, 1), match(5, "c", 6, 2, 3)], START) is None
    assert explain([match(1, "b", 5, 0, 1), match(1, "c", 6, 2, 3)], START) is not None
    refused = Operation("match", "failed", 2, 3, expected=5, value="c")
    assert explain([match(1, "b", 5, 0, 1), refused], START) is not None
    unknown = Operation("test", "unknown", 0, expected="a", value="b")
    assert explain([unknown, match(4, "c", 6, 2, 3), read("c", 6, 4, 5)], START) is None
    assert explain([unknown, refused, read("b", 5, 4, 5)], START) is None


def test_a_real_register_and_what_becomes_of_it_when_one_answer_is_changed() -> None:
    lock, register, history = threading.Lock(), [START], []
    chance = random.Random(7)
    seeds = [chance.random() for _ in range(4)]

    def client(number: int) -> None:
        mine = random.Random(seeds[number])
        seen = START
        for turn in range(150):
            invoked = time.perf_counter()
            if mine.random() < 0.5:
                with lock:
                    seen = register[0]
                answer = read(seen.value, seen.rev or 0, invoked, time.perf_counter())
            else:
                value = f"{number}.{turn}"
                with lock:
                    took = register[0].value == seen.value
                    if took:
                        register[0] = Register(value, (register[0].rev or 0) + 1)
                    rev = register[0].rev
                end = time.perf_counter()
                if took and mine.random() < 0.1:
                    answer = Operation("test", "unknown", invoked, expected=seen.value, value=value)
                elif took:
                    answer = cas(seen.value, value, rev or 0, invoked, end)
                else:
                    answer = Operation("test", "failed", invoked, end, expected=seen.value, value=value)
            history.append(answer)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert explain(history, START) is None
    reads = [op for op in history if op.kind == "read" and op.value != "a"]
    for wrong in chance.sample(reads, 10):
        broken = [read("a", 1, op.invoked, op.answered) if op is wrong else op for op in history]
        earlier = any(op.kind == "read" and op.value != "a" and op.answered < wrong.invoked for op in history)
        assert explain(broken, START) is not None or not earlier
