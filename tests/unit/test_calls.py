"""Calls as data: the transition table, identity, the book of one Work."""

from __future__ import annotations

from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orch import Call, CloudCompute, Drive, Stage
from orch.calls import MOVES, RETRIED, Book, InvalidMove, Reason, call_id, call_key, json_arguments, number_of, work_of
from orch.errors import StateTypeError

LIVE = {Stage.PENDING, Stage.RUNNING, Stage.UNKNOWN}
DONE = {Stage.SUCCEEDED, Stage.FAILED, Stage.STOPPED}


def call(number: int = 1, *args: Any, **fields: Any) -> Call:
    return Call(id=call_id(1, "ui.w", number), work="ui.w", key=call_key(args, {}), args=args, **fields)


# ---- transitions -----------------------------------------------------------------------------------------------------


def test_the_table_knows_every_stage_that_a_call_can_have() -> None:
    assert set(MOVES) == LIVE | DONE
    assert Stage.NOT_STARTED not in MOVES, "a Work may be not started, a call is asked for"


@pytest.mark.parametrize(("before", "after"), list(product(sorted(LIVE | DONE), repeat=2)))
def test_moves(before: Stage, after: Stage) -> None:
    allowed = before in LIVE and (before, after) not in {(Stage.RUNNING, Stage.RUNNING), (Stage.UNKNOWN, Stage.UNKNOWN)}
    if allowed:
        assert call(stage=before).move(after).stage is after
    else:
        with pytest.raises(InvalidMove, match=rf"1-ui\.w-1 \(attempt 0\) cannot go from {before} to {after}"):
            call(stage=before).move(after)


def test_nothing_leads_out_of_a_done_call() -> None:
    assert all(not MOVES[stage] for stage in DONE)


def test_contact_lost_is_not_an_end() -> None:
    unknown = call(stage=Stage.RUNNING).move(Stage.UNKNOWN)
    assert (unknown.done, unknown.succeeded, unknown.failed) == (False, False, False)
    assert unknown.move(Stage.RUNNING).stage is Stage.RUNNING


@pytest.mark.parametrize("stage", sorted(LIVE | DONE))
def test_done_succeeded_failed(stage: Stage) -> None:
    one = call(stage=stage)
    assert one.done is (stage in DONE)
    assert one.succeeded is (stage is Stage.SUCCEEDED)
    assert one.failed is (stage is Stage.FAILED)


def test_what_is_retried() -> None:
    not_retried = {Reason.STOPPED, Reason.REPLACED, Reason.INFEASIBLE, Reason.BUILD_FAILED}
    assert set(Reason) - RETRIED == not_retried


def test_a_move_keeps_the_call_as_it_was() -> None:
    before = call(stage=Stage.PENDING)
    after = before.move(Stage.RUNNING, started_at=5.0)
    assert (before.stage, before.started_at) == (Stage.PENDING, None)
    assert (after.stage, after.started_at) == (Stage.RUNNING, 5.0)


def test_a_call_has_no_truth_value() -> None:
    with pytest.raises(TypeError, match=r"\.succeeded"):
        bool(call())
    with pytest.raises(TypeError, match=r"\.result"):
        assert not call()


def test_public_is_json_and_shows_nothing_internal() -> None:
    shown = call(1, [1], {"a": None}, stage=Stage.FAILED, reason=Reason.TIMEOUT, fresh=True, due=5.0).public()
    assert msgspec.json.decode(msgspec.json.encode(shown)) == shown
    assert set(shown) == {
        "id", "args", "kwargs", "stage", "reason", "message", "result", "exit_code", "attempt", "started_at",
        "finished_at",
    }  # fmt: skip
    assert (shown["stage"], shown["reason"]) == ("failed", "timeout")


# ---- identity --------------------------------------------------------------------------------------------------------


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(item) for key, item in reversed(value.items())}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(st.lists(JSON, max_size=3), st.dictionaries(st.text(max_size=3), JSON, max_size=3))
def test_key_order_at_any_depth_does_not_matter(args: list[Any], kwargs: dict[str, Any]) -> None:
    assert call_key(args, kwargs) == call_key(reordered(args), reordered(kwargs))


@given(JSON, JSON)
def test_other_json_is_another_call(one: Any, two: Any) -> None:
    canonical = [msgspec.json.encode(value, order="deterministic") for value in (one, two)]
    assert (call_key([one], {}) == call_key([two], {})) is (canonical[0] == canonical[1])


def test_order_repetition_form_and_type_count() -> None:
    forms = [([[1, 2]], {}), ([[2, 1]], {}), ([[1, 1, 2]], {}), ([1, 2], {}), ([], {"a": 1}), ([1], {}), (["1"], {})]
    forms += [([True], {}), ([1.5], {}), ([None], {}), ([], {}), ([{}], {}), ([[]], {})]
    assert len({call_key(args, kwargs) for args, kwargs in forms}) == len(forms)


def test_the_key_is_the_sha256_of_canonical_json() -> None:
    import hashlib

    assert call_key(({"b": 1, "a": [2]},), {"x": None}) == hashlib.sha256(b'[[{"a":[2],"b":1}],{"x":null}]').hexdigest()


def test_arguments_become_plain_json() -> None:
    args, kwargs = json_arguments("w", [(1, 2), Drive("m")], {"c": CloudCompute("gpu")})
    assert args[0] == [1, 2]
    assert next(iter(args[1])) == "$drive"
    assert next(iter(kwargs["c"])) == "$compute"
    with pytest.raises(StateTypeError, match=r"w\.run\(\) argument 0.*set"):
        json_arguments("w", [{1}], {})
    with pytest.raises(StateTypeError, match=r"argument lr.*nan"):
        json_arguments("w", [], {"lr": float("nan")})


@pytest.mark.parametrize("work", ["w", "ui.trainer", "models.0", "a-b.c-1"])
def test_a_calls_id_names_run_work_and_number(work: str) -> None:
    made = call_id(12, work, 345)
    assert (work_of(made), number_of(made)) == (work, 345)


# ---- the book --------------------------------------------------------------------------------------------------------


def book(*calls: Call, held: str | None = None) -> Book:
    made = Book("ui.w", 1)
    made.restore(calls, held=held)
    return made


def test_calls_are_taken_in_the_order_asked_one_at_a_time() -> None:
    one = Book("ui.w", 1)
    for number in (1, 2):
        one.add(one.new((number,), {}, 0.0))
    first = one.take()
    assert first is not None
    assert first.id == "1-ui.w-1"
    assert one.take() is None
    one.finish(first.move(Stage.STOPPED))
    second = one.take()
    assert second is not None
    assert second.id == "1-ui.w-2"


def test_asking_anew_ends_a_hold() -> None:
    one = book(held="x")
    one.add(one.new((), {}, 0.0))
    assert one.held is None


def test_numbers_go_on_where_an_earlier_work_of_the_name_stopped() -> None:
    assert Book("ui.w", 1, used=7).new((), {}, 0.0).id == "1-ui.w-8"


def test_restore_finds_the_running_one_the_waiting_ones_and_the_latest_by_arguments() -> None:
    one = book(
        call(3, "b"),
        call(2, "a", stage=Stage.RUNNING, attempt=1),
        call(1, "a", stage=Stage.STOPPED, attempt=1),
    )
    assert one.current == "1-ui.w-2"
    assert one.queue == ["1-ui.w-3"]
    assert one.latest[call_key(("a",), {})] == "1-ui.w-2"
    assert one.counter == 3
    assert one.shown is not None
    assert one.shown.id == "1-ui.w-2"


def test_a_forgotten_failure_stays_forgotten() -> None:
    one = book(call(1, "a", stage=Stage.FAILED, attempt=1), call(2, "b", stage=Stage.SUCCEEDED, attempt=1))
    one.forget_failures()
    assert one.touched == {"1-ui.w-1"}
    assert set(one.latest.values()) == {"1-ui.w-2"}
    again = book(*one.calls.values())
    assert set(again.latest.values()) == {"1-ui.w-2"}
    assert again.counter == 2


def test_a_view_is_a_picture_that_later_changes_do_not_touch() -> None:
    one = Book("ui.w", 1)
    one.add(one.new((), {}, 0.0))
    view = one.view()
    taken = one.take()
    assert taken is not None
    one.finish(taken.move(Stage.STOPPED))
    one.add(one.new((1,), {}, 0.0))
    assert view.newest is not None
    assert (view.newest.stage, view.counter, len(view.latest)) == (Stage.PENDING, 1, 1)


def finished(book: Book, number: int, *args: Any, stage: Stage = Stage.SUCCEEDED, **fields: Any) -> None:
    book.add(call(number, *args, stage=Stage.PENDING))
    book.take()
    book.finish(call(number, *args, stage=stage, **fields))


def test_only_calls_of_no_more_use_are_forgotten() -> None:
    some = Book("ui.w", 1)
    finished(some, 1, "asked twice")
    finished(some, 2, "cached")
    finished(some, 3, "failed", stage=Stage.FAILED)
    finished(some, 4, "stopped", stage=Stage.STOPPED)
    finished(some, 5, "asked twice")
    finished(some, 6, "last")
    assert some.forget(newest=3, caches=True) == [call(1).id]
    assert some.latest[call(1, "asked twice").key] == call(5).id
    assert some.forget(newest=0, caches=True) == [call(4).id]
    assert call(4, "stopped").key not in some.latest
    assert sorted(map(number_of, some.calls)) == [2, 3, 5, 6]
    assert some.forget(newest=0, caches=True) == []

    again = book(*some.calls.values())
    assert again.forget(newest=0, caches=True) == []
    assert again.forget(newest=0, caches=False) == []  # they have been looked at, and nothing has happened since
    uncached = book(*some.calls.values())
    assert uncached.forget(newest=0, caches=False) == [call(2).id, call(3).id, call(5).id]
    assert list(uncached.latest.values()) == [call(6).id]


def test_a_result_that_is_not_handed_over_and_a_held_stop_are_not_forgotten() -> None:
    some = Book("ui.w", 1)
    finished(some, 1, "fresh", fresh=True)
    finished(some, 2, "held", stage=Stage.STOPPED)
    finished(some, 3, "last")
    some.held = call(2, "held").key
    assert some.forget(newest=0, caches=False) == []
    some.put(some.calls[call(1).id].replace(fresh=False))
    assert some.forget(newest=0, caches=False) == [call(1).id]
    finished(some, 4, "next")
    assert some.held is None
    assert some.forget(newest=0, caches=False) == [call(3).id]


def test_waiting_and_running_calls_are_not_forgotten() -> None:
    some = Book("ui.w", 1)
    for number in range(1, 6):
        some.add(call(number, number, stage=Stage.PENDING))
    running = some.take()
    assert running is not None
    assert some.forget(newest=1, caches=False) == []
    some.finish(running.move(Stage.SUCCEEDED))
    some.take()
    assert some.forget(newest=1, caches=False) == [running.id]
