"""A Python Work in its own process: builds it, runs it, keeps its state live both ways.

`main` runs in a process forked from the warm fork server, which has imported app.py. Two threads keep the vars in step
with the agent: one sends what the code changes, one applies what others change. They speak plain HTTP through the
standard library, whose import every fork shares.
"""

from __future__ import annotations

import http.client
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

import msgspec

from orch.calls import Stage
from orch.component import decode_argument
from orch.errors import OrchError, StateTypeError
from orch.paths import write_atomic
from orch.state import to_json
from orch.tracked import LEAVES, Vars
from orch.wire import Op, decode, encode
from orch.work import Status, Work, WorkView
from orch_workers.live import LiveVars
from orch_workers.messages import Batch, Changes, Outcome, Taken, Told, WorkOrder

__all__ = ["LiveLink", "main"]

log = logging.getLogger(__name__)

FLUSH_WITHIN = 5.0
"""Seconds that the end of `run` waits for an agent that does not answer; what is left goes into the outcome."""
MAX_OPS = 2_000
"""Operations in one batch: one revision must stay a reasonable size."""
MAX_BATCHES = 50
NEWS_KEEP = 1.0
"""Seconds that what others changed waits for the code to read a variable; then it is applied without."""
RETRY_FIRST = 0.05
RETRY_MOST = 1.0


def main(payload: dict[str, Any]) -> int:
    """Runs the ordered Work. Returns the exit code: 0, 1 after an exception, 143 after SIGTERM."""
    order = msgspec.convert(payload, WorkOrder)
    secrets = _Secrets({name: os.environ[name] for name in order.secrets if os.environ.get(name)})
    outcome = Outcome(session=order.session)
    link: LiveLink | None = None
    work: Work | None = None
    code = 0
    try:
        with _sigterm_raises():
            link = LiveLink(order, os.environ["ORCH_TOKEN"])
            _bind_drives(order, link)  # before the constructor makes any
            work = _build(order)
            work._vars.load(order.vars)
            link.start(work._vars)
            try:
                result = _run(work, order)
                secrets.refuse(result, f"the result of {order.work}.run()")
                outcome = msgspec.structs.replace(outcome, result=result)
            except _Stopped:
                raise
            except SystemExit as end:
                code = _exit_code(end)
            except BaseException as error:
                code = 1
                outcome = _failure(outcome, error, secrets)
                _hook(work.on_exception, error)
    except _Stopped:
        code = 128 + signal.SIGTERM
        if work is not None:
            _hook(work.on_exit)
    except BaseException as error:
        code = 1
        outcome = _failure(outcome, error, secrets)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on it only takes as long as the agent does
    if link is not None:
        # The flow would refuse what holds a secret, but this goes through a file.
        unsent = [batch for batch in link.finish(FLUSH_WITHIN) if secrets.held_by(batch) is None]
        outcome = msgspec.structs.replace(outcome, unsent=unsent)
    write_atomic(Path(order.result_file), encode(outcome), point="pywork.result")
    return code


def _build(order: WorkOrder) -> Work:
    work = Work._build(order.record, order.work)
    work._view = WorkView(host=order.host, port=order.port, status=Status(stage=Stage.RUNNING))
    return work


def _bind_drives(order: WorkOrder, link: LiveLink) -> None:
    """Drives in vars and arguments act as this work's own, from its cwd."""

    from orch_drive import Drive
    from orch_drive import drive as drives
    from orch_drive.manifest import to_json

    def bound(data: dict[str, Any]) -> Any:
        return Drive.from_state(data).bind(
            base_url=order.drive_url,
            component=order.work,
            cwd=order.cwd,
            epoch=order.epoch,
            call=order.call,
            on_publish=lambda manifest: link.published(to_json(manifest)),
        )

    LEAVES["$drive"] = bound
    drives.own_epoch = order.epoch
    drives.on_publish = lambda manifest: link.published(to_json(manifest))


def _run(work: Work, order: WorkOrder) -> Any:
    args = [decode_argument(value) for value in order.args]
    kwargs = {name: decode_argument(value) for name, value in order.kwargs.items()}
    work.on_start()
    return to_json(work.run(*args, **kwargs), f"the result of {order.work}.run()")


def _hook(hook: Callable[..., None], *args: Any) -> None:
    """A user's hook at the end of a call: what it raises is shown and changes nothing."""
    try:
        hook(*args)
    except BaseException as error:
        _show(error)


def _failure(outcome: Outcome, error: BaseException, secrets: _Secrets) -> Outcome:
    _show(error)
    message = f"{type(error).__name__}: {error}"
    hint = error.hint if isinstance(error, OrchError) else ""
    return msgspec.structs.replace(
        outcome,
        error=secrets.redacted(f"{message} ({hint})" if hint else message),
        traceback=secrets.redacted("".join(_trace(error))),
    )


class _Secrets:
    """Environment whose values may be written nowhere, by name."""

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values

    def held_by(self, value: Any) -> str | None:
        """Name of the secret that is somewhere in it."""
        text = encode(value)
        return next((name for name, secret in self._values.items() if encode(secret)[1:-1] in text), None)

    def refuse(self, value: Any, what: str) -> None:
        """Raises StateTypeError naming the secret."""
        name = self.held_by(value)
        if name is not None:
            raise StateTypeError(
                f"{what} holds the value of the secret {name}",
                hint="secrets reach works by environment only, they are never stored",
            )

    def redacted(self, text: str) -> str:
        for name, secret in self._values.items():
            text = text.replace(secret, f"<{name}>").replace(repr(secret)[1:-1], f"<{name}>")
        return text


def _show(error: BaseException) -> None:
    with suppress(OSError):  # a log that cannot be written hides nothing: the outcome says it too
        sys.stderr.write("".join(_trace(error)))


def _trace(error: BaseException) -> list[str]:
    """The traceback from the first frame outside this file on."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename == __file__ and frame.tb_next is not None:
        frame = frame.tb_next
    return traceback.format_exception(error.with_traceback(frame))


def _exit_code(end: SystemExit) -> int:
    if isinstance(end.code, int):
        return end.code & 0xFF
    if end.code is None:
        return 0
    sys.stderr.write(f"{end.code}\n")
    return 1


class _Stopped(BaseException):
    """SIGTERM has come. Not an Exception: the work's own `except Exception` shall not swallow it."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends what the main thread does, once, with `_Stopped`; a second one waits for the KILL."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    yield


# ---- live state ------------------------------------------------------------------------------------------------------


class LiveLink:
    """Keeps `vars` in step with the agent, from `start` to `finish`.

    Everything that touches the vars, the numbers and the queue does so under one lock, which is also the lock of the
    vars: a change and its place in the order are one step."""

    def __init__(self, order: WorkOrder, token: str) -> None:
        self._order = order
        self._token = token
        self._vars: Vars
        self._lock = threading.RLock()
        self._live = LiveVars(order.rev, order.vars)
        self._open: list[Op] = []
        self._last: dict[str, int] = {}
        self._published: list[dict[str, Any]] = []
        self._n = 0
        self._queue: deque[Batch] = deque()
        self._to_send = threading.Event()
        self._settled = threading.Condition(self._lock)
        self._news: deque[Told] = deque()
        self._news_since = 0.0
        self._ending = False

    def start(self, vars: Vars) -> None:
        """From here on changes of `vars` are reported, and those of others applied to them."""
        with self._lock:
            self._vars = vars
            self._vars._lock = self._lock
            self._vars._report = self._changed
            self._vars.get = self._get  # type: ignore[method-assign]
        for target in (self._send_loop, self._receive_loop):
            threading.Thread(target=target, name=f"orch{target.__name__}", daemon=True).start()

    def published(self, manifest: dict[str, Any]) -> None:
        """The code has put something on a Drive."""
        with self._lock:
            self._published.append(manifest)
        self._to_send.set()

    def finish(self, timeout: float) -> list[Batch]:
        """Waits until the agent has all changes, at most `timeout` seconds. Returns those that the tree has not echoed:
        an agent that has them leaves them out, one that comes later takes them."""
        with self._settled:
            self._close_batch()
            self._to_send.set()
            self._settled.wait_for(lambda: not self._queue, timeout)
            self._ending = True
            self._requeue(0)
            left = list(self._queue)
        self._to_send.set()
        return left

    # -- what the code changes

    def _changed(self, op: Op) -> None:
        """Called by the vars, under the lock."""
        path = op["path"]
        name = path.split("/", 2)[1]
        before = self._last.get(name)
        if before is not None and op["op"] == "replace":
            last = self._open[before]
            if last["op"] == "replace" and last["path"] == path:
                last["value"] = op["value"]  # nobody has seen the value between: it was never a revision
                return
        if len(self._open) >= MAX_OPS:
            self._close_batch()
        self._last[name] = len(self._open)
        if "from" in op:
            self._last[op["from"].split("/", 2)[1]] = len(self._open)
        self._open.append(op)
        if len(self._open) == 1:
            self._to_send.set()

    def _close_batch(self) -> None:
        if not self._open and not self._published:
            return
        self._n += 1
        if self._open:
            self._live.local(self._n, self._open)
        self._queue.append(Batch(n=self._n, ops=self._open, published=self._published))
        self._open, self._published = [], []
        self._last.clear()

    def _send_loop(self) -> None:
        connection = _Connection(self._order.url)
        delay = RETRY_FIRST
        while True:
            self._to_send.wait()
            with self._lock:
                if self._ending:
                    return
                self._to_send.clear()
                self._close_batch()
                batches = [self._queue[i] for i in range(min(len(self._queue), MAX_BATCHES))]
                if not batches:
                    continue
                after = max((n for n, _ in self._live.pending if n < batches[0].n), default=0)
            changes = Changes(session=self._order.session, batches=batches, after=after)
            try:
                taken = decode(Taken, connection.post(encode(changes), self._token))
            except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
                log.debug("the agent does not answer: %s", error)
                time.sleep(delay)
                delay = min(RETRY_MOST, delay * 2)
                self._to_send.set()
                continue
            delay = RETRY_FIRST
            self._took(taken.n, after)

    def _took(self, n: int, after: int) -> None:
        with self._settled:
            if n < after:
                self._requeue(n)
            while self._queue and self._queue[0].n <= n:
                self._queue.popleft()
            if self._queue:
                self._to_send.set()
            else:
                self._settled.notify_all()

    # -- what others change

    def _receive_loop(self) -> None:
        url = f"{self._order.url}?session={quote(self._order.session)}"
        delay = RETRY_FIRST
        while not self._ending:
            connection = _Connection(url)
            try:
                for line in connection.lines(self._token):
                    delay = RETRY_FIRST
                    self._told(decode(Told, line))
            except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
                log.debug("the agent does not answer: %s", error)
            connection.close()
            time.sleep(delay)
            delay = min(RETRY_MOST, delay * 2)

    def _told(self, told: Told) -> None:
        with self._lock:
            if told.vars is not None:
                self._requeue(told.received)
                self._to_send.set()
            if not self._news:
                self._news_since = time.monotonic()
            self._news.append(told)
            echo = told.n is not None and told.ops is None and told.vars is None and not told.drop
            if (echo and len(self._news) == 1) or time.monotonic() - self._news_since > NEWS_KEEP:
                self._catch_up()
        if told.error:
            sys.stderr.write(f"orch: a change of {self._order.work} was not taken: {told.error}\n")

    def _get(self, name: str) -> Any:
        """The vars' `get`. What others changed is applied here, by the thread that reads, and not when it arrives:
        `self.rows.append(x)` is two steps, and a `rows` that is replaced between them would swallow the `x`."""
        if self._news:
            with self._lock:
                self._catch_up()
        return Vars.get(self._vars, name)

    def _catch_up(self) -> None:
        self._close_batch()  # own changes so far lie under what comes now
        while self._news:
            told = self._news.popleft()
            if told.vars is not None:
                ops = self._live.reset(told.rev, told.vars, told.n or 0)
            elif told.drop:
                ops = self._live.drop(told.n or 0)
            else:
                ops = self._live.remote(told.rev, told.ops, told.n)
            if ops:
                self._apply(ops)
        if self._queue:
            self._to_send.set()

    def _apply(self, ops: list[Op]) -> None:
        try:
            self._vars.apply(ops, in_place=False)
        except OrchError as error:
            log.warning("the vars of %s were out of step and are taken over as a whole: %s", self._order.work, error)
            self._vars.load(self._live.view())

    def _requeue(self, received: int) -> None:
        """A new agent may not have what the former one took: say again what the tree has not echoed."""
        queued = {batch.n: batch for batch in self._queue}
        again = {n: queued.get(n) or Batch(n=n, ops=ops) for n, ops in self._live.pending}
        self._queue = deque(batch for n, batch in sorted({**queued, **again}.items()) if n > received)


class _Connection:
    """One kept-alive HTTP connection to the agent on this machine."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = parts.path + (f"?{parts.query}" if parts.query else "")
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=30)

    def post(self, body: bytes, token: str) -> bytes:
        """The answer's body. Raises OSError, HTTPException; the next call connects anew."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        try:
            self._connection.request("POST", self._target, body, headers)
            return self._answer().read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def lines(self, token: str) -> Iterator[bytes]:
        """Lines of a streamed answer, until it ends."""
        self._connection.request("GET", self._target, headers={"Authorization": f"Bearer {token}"})
        response = self._answer()
        if self._connection.sock is not None:
            self._connection.sock.settimeout(None)  # quiet is not silence: the agent may have nothing to tell for hours
        while line := response.readline():
            yield line

    def close(self) -> None:
        self._connection.close()

    def _answer(self) -> http.client.HTTPResponse:
        response = self._connection.getresponse()
        if response.status != 200:
            reason = response.read()[:300].decode(errors="replace")
            raise http.client.HTTPException(f"HTTP {response.status}: {reason}")
        return response
