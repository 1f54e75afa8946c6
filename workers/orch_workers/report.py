"""`from orch_workers import report; report(loss=0.1, progress=0.5)`: for scripts that want to tell how they are doing.

Outside orch it does nothing. It never raises into the script and never makes it wait: a thread sends what was reported
last, at most twice a second; what is left is sent when the script ends. Standard library only.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import sys
import threading
import time
import types
import urllib.request
import warnings
from http.client import HTTPException
from typing import SupportsFloat

__all__ = ["report"]

INTERVAL = 0.5
"""Seconds between two messages."""
TIMEOUT = 2.0
"""Seconds for one message; the last one must not hold up the end of the script for longer."""


def report(progress: SupportsFloat | None = None, **metrics: SupportsFloat) -> None:
    """Tells orch the script's progress (0..1) and any metrics, by name: `report(progress=0.5, loss=0.1)`.

    Values are numbers, or anything that `float` takes (a tensor of one element). What is not finite is left out, with
    one warning. Cheap: call it at every step.
    """
    if not os.environ.get("ORCH_REPORT_URL"):
        return
    if progress is not None and (value := _number("progress", progress)) is not None:
        _sender.take("progress", value)
    for name, given in metrics.items():
        if (value := _number(name, given)) is not None:
            _sender.take(name, value)


_warned = False


def _number(name: str, given: SupportsFloat) -> float | None:
    global _warned
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        value = math.nan
    if math.isfinite(value):
        return value
    if not _warned:
        _warned = True
        words = f"orch: report({name}={given!r}) is no finite number and is left out (said once)"
        try:
            warnings.warn(words, RuntimeWarning, stacklevel=3)
        except RuntimeWarning:  # warnings are errors here, but a report must never end a script
            pass
    return None


class _Sender:
    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a forked child has no thread, and must not send these again

    def _reset(self) -> None:
        self.lock = threading.Lock()
        self.sending = threading.Lock()  # so that the end of the script waits for a message that is on its way
        self.some = threading.Event()
        self.values: dict[str, float] = {}
        self.thread: threading.Thread | None = None
        self.sent_at = -INTERVAL

    def take(self, name: str, value: float) -> None:
        with self.lock:
            self.values[name] = value
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="orch report", daemon=True)
                try:
                    self.thread.start()
                    atexit.register(self.flush)
                except RuntimeError:  # the interpreter is about to end: too late for a thread, and for this report
                    pass
        self.some.set()

    def _run(self) -> None:
        while True:
            self.some.wait()
            pause = self.sent_at + INTERVAL - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            self.flush()

    def flush(self) -> None:
        with self.sending:
            with self.lock:
                self.some.clear()
                values, self.values = self.values, {}
            if not values:
                return
            self.sent_at = time.monotonic()
            if not _send(values):
                with self.lock:  # with the next ones, unless those are newer
                    self.values = {**values, **self.values}
                self.some.set()


def _send(values: dict[str, float]) -> bool:
    body: dict[str, object] = {"metrics": {name: value for name, value in values.items() if name != "progress"}}
    if "progress" in values:
        body["progress"] = values["progress"]
    # Never through a proxy: the agent is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(
            os.environ["ORCH_REPORT_URL"],
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('ORCH_TOKEN', '')}"},
        )
        with opener.open(request, timeout=TIMEOUT) as response:
            response.read()
    except (OSError, ValueError, HTTPException):  # the agent is away or refuses: the script goes on
        return False
    return True


_sender = _Sender()


class _Callable(types.ModuleType):
    """Module and function have one name: whoever imported the module first must still be able to call what he gets."""

    def __call__(self, progress: SupportsFloat | None = None, **metrics: SupportsFloat) -> None:
        report(progress, **metrics)


sys.modules[__name__].__class__ = _Callable
