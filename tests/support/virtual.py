"""asyncio in virtual time: a loop whose clock jumps to the next timer, and parties that live on it.

A `Party` is a process that does not exist as one: everything that runs in its context (tasks, timers, callbacks that
were made there) is its own. It has a clock, which may run faster or slower than the loop's, it can be held (SIGSTOP)
and ended (SIGKILL): then nothing of it runs any more, no `finally` either. So a whole system of flow and agents lives
in one thread, and one seed always gives the same life.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import selectors
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

__all__ = ["EPOCH", "Clock", "Deadlock", "Party", "VirtualExecutor", "VirtualLoop", "VirtualTime", "here", "steady"]

EPOCH = 1_800_000_000.0
_PARTY: ContextVar[Party | None] = ContextVar("party", default=None)


class Deadlock(RuntimeError):
    """Everybody waits, and no timer is set."""


class Clock:
    """`rate`: seconds that it shows in one of the loop's. `ahead`: what its wall clock is ahead by."""

    def __init__(self, rate: float = 1.0, ahead: float = 0.0) -> None:
        self.rate = rate
        self.ahead = ahead

    def shows(self, moment: float) -> float:
        return moment * self.rate

    def moment(self, shown: float) -> float:
        return shown / self.rate


class Party:
    """One process: what was made in its context."""

    def __init__(self, loop: VirtualLoop, name: str, clock: Clock | None = None) -> None:
        self.loop = loop
        self.name = name
        self.clock = clock or Clock()
        self.runs = True
        self.ended = False
        self.at_end: list[Callable[[], None]] = []
        """Called when it ends, by whatever way."""
        self._parked: list[asyncio.Handle] = []
        self._context = copy_context()
        self._context.run(_PARTY.set, self)
        loop.parties.append(self)

    def task(self, body: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """A task of this party, whoever starts it."""
        return self.loop.create_task(body, name=name or self.name, context=self._context.copy())

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function as this party."""
        return self._context.copy().run(function, *args)

    def kill(self) -> None:
        """Nothing of it runs any more."""
        self.runs = False
        self.end()

    def end(self) -> None:
        """It is over (by itself, when nobody has killed it)."""
        if not self.ended:
            self.ended = True
            for function in self.at_end:
                function()

    def hold(self) -> None:
        self.runs = False

    def release(self) -> None:
        """What became due while it was held, or since it was killed, goes on."""
        self.runs = True
        parked, self._parked = self._parked, []
        self.loop.ready(parked)

    def park(self, handle: asyncio.Handle) -> None:
        self._parked.append(handle)


def here() -> Party | None:
    """Whose code this is."""
    return _PARTY.get()


class _Parking:
    """What a party that is held would do waits until it is released."""

    __slots__ = ()
    _context: Context

    def _run(self) -> None:
        party = self._context.get(_PARTY)
        if party is not None and not party.runs:
            party.park(self)  # type: ignore[arg-type]
        else:
            super()._run()  # type: ignore[misc]


class _Handle(_Parking, asyncio.Handle):
    __slots__ = ()


class _Timer(_Parking, asyncio.TimerHandle):
    __slots__ = ()


class _Jump(selectors.SelectSelector):
    """Nothing ever comes from outside: instead of waiting, time moves on."""

    loop: VirtualLoop
    busy = 0
    """Turns of the loop in this moment."""

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("nothing will ever happen")
        if self.loop.idle:
            self.busy = 0
            self.loop.jump()
        self.busy += 1
        if self.busy > 100_000:
            raise Deadlock(f"endless work at {self.loop.now}")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`random` decides how long work in threads takes."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self, random: random.Random, *, limit: float = float("inf")) -> None:
        self.now = 0.0
        self.limit = limit
        self.random = random
        self.parties: list[Party] = []
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 0.0  # a timer that comes a little early is asked for again and again: no time passes

    @property
    def idle(self) -> bool:
        return bool(self._scheduled) and not self._ready and not self._stopping

    def jump(self) -> None:
        self.now = math.nextafter(max(self.now, self._scheduled[0].when()), math.inf)
        if self.now > self.limit:
            raise Deadlock(f"it has not ended after {self.limit:g} s")

    def ready(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def time(self) -> float:
        party = _PARTY.get()
        return self.now if party is None else party.clock.shows(self.now)

    def at(self, moment: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        """`call_at` by the loop's own clock."""
        timer = _Timer(moment, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        party = _PARTY.get()
        if party is not None:
            shown, when = when, party.clock.moment(when)
            while party.clock.shows(when) < shown:
                when = math.nextafter(when, math.inf)
        timer = self.at(when, callback, *args, context=context)
        assert isinstance(timer, asyncio.TimerHandle)
        return timer

    def _call_soon(self, callback: Any, args: Any, context: Context | None) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _write_to_self(self) -> None:
        """There is one thread only."""

    def run_in_executor(self, executor: Any, function: Any, *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()

        def done(value: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

        if executor is None:
            executor = VirtualExecutor()
        executor.work(function, args, done)
        return future

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:
        """No signal comes."""

    def finish(self) -> None:
        """End every task, also those of parties that were killed, and close."""
        self.limit = float("inf")
        for _ in range(100):
            for party in self.parties:  # (one may end others)
                party.release()
            left = asyncio.all_tasks(self)
            if not left:
                break
            for task in left:
                task.cancel()
            self.run_until_complete(asyncio.wait(left, timeout=60.0))
        else:
            raise RuntimeError(f"tasks that cannot be ended: {asyncio.all_tasks(self)}")
        self.run_until_complete(self.shutdown_asyncgens())
        self.close()


class VirtualExecutor:
    """`ThreadPoolExecutor(1)`: one thing after another, each at once and in between two moments."""

    SLOWEST = 0.02

    def __init__(self, max_workers: int = 1, thread_name_prefix: str = "") -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        self._free = 0.0

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        self.work(function, args, lambda value, error: None)

    def work(self, function: Callable[..., Any], args: Any, done: Callable[[Any, BaseException | None], None]) -> None:
        loop = self._loop
        start = max(loop.now, self._free)
        self._free = end = start + loop.random.random() ** 3 * self.SLOWEST
        outcome: list[Any] = [None, None]

        def act() -> None:
            try:
                outcome[0] = function(*args)
            except BaseException as error:
                outcome[1] = error

        if loop.random.random() < 0.5:  # a kill in the middle finds it done, or not
            loop.at(start, act)
            loop.at(end, lambda: done(*outcome))
        else:
            loop.at(end, lambda: (act(), done(*outcome)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


class VirtualTime:
    """Stands in for the module `time`."""

    def time(self) -> float:
        party, loop = _PARTY.get(), asyncio.get_running_loop()
        return EPOCH + loop.time() + (party.clock.ahead if party is not None else 0.0)

    def monotonic(self) -> float:
        return steady()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def steady() -> float:
    """Stands in for `waiter.steady`."""
    return asyncio.get_running_loop().time()
