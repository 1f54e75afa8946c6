"""Runs a page's script again when a value that it has read changes: one watcher a Streamlit server, for all sessions.

It follows the app's server-sent events; nothing polls, neither here nor in the browser. Hazard: a rerun stops a script
that is running, and a click that this run was about to see would be lost; so a session is only rerun while it rests,
and what changed meanwhile is looked up when its run ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

import httpx
import msgspec

from orch.errors import OrchError
from orch.state import parse_pointer
from orch_ui.state import AppServer, ScriptRun, Tokens

__all__ = ["Watcher"]

log = logging.getLogger(__name__)

KEPT = 1000
"""Revisions remembered for scripts that are still running."""
LOG_PAUSE = 0.25
"""Seconds between two reruns because of log lines."""
BUSY_PAUSE = 0.02
"""Seconds until a session is looked at again whose script runner has not gone yet."""
RETRY_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)


class _Session:
    def __init__(self) -> None:
        self.run: ScriptRun | None = None
        self.running = False
        self.wanted = False
        self.automatic = False
        self.logged = 0.0


class Watcher:
    """Made once a process; `begin` and `end` are called around each run of a session's script."""

    def __init__(self, server: AppServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._sessions: dict[str, _Session] = {}
        self._changes: deque[tuple[int, list[Tokens]]] = deque(maxlen=KEPT)
        self._connected = threading.Event()
        self._known = False
        self._log_thread: threading.Thread | None = None
        threading.Thread(target=self._follow, args=("diff",), name="orch-state-events", daemon=True).start()

    def begin(self, session_id: str, run: ScriptRun) -> None:
        """A session's script starts."""
        self._connected.wait(timeout=1.0)
        with self._lock:
            session = self._sessions.setdefault(session_id, _Session())
            run.automatic, session.automatic = session.automatic, False
            session.run, session.running, session.wanted = run, True, False

    def end(self, session_id: str) -> None:
        """It has ended, somehow."""
        with self._lock:
            session = self._sessions[session_id]
            session.running = False
            run = session.run
            if run is not None and run.log_reads and self._log_thread is None:
                self._log_thread = threading.Thread(
                    target=self._follow, args=("log",), name="orch-log-events", daemon=True
                )
                self._log_thread.start()
            if session.wanted or (run is not None and self._missed(run)):
                self._ask(session_id, session)

    def _missed(self, run: ScriptRun) -> bool:
        if run.rev is not None and len(self._changes) == KEPT and run.rev < self._changes[0][0] - 1:
            return True  # it ran for so long that nobody knows any more
        return any(run.affected(rev, paths) for rev, paths in self._changes)

    # -- events
    def _follow(self, kinds: str) -> None:
        after: int | None = None
        failures = 0
        while True:
            try:
                with self._server.stream(kinds, after) as response:
                    response.raise_for_status()
                    kind = ""
                    for line in response.iter_lines():
                        if line.startswith("retry:"):
                            failures = 0
                            self._caught_up(kinds)
                        elif line.startswith("id:"):
                            after = int(line[3:])
                        elif line.startswith("event:"):
                            kind = line[6:].strip()
                        elif line.startswith("data:"):
                            self._event(kind, msgspec.json.decode(line[5:]))
            except (httpx.HTTPError, msgspec.DecodeError) as error:
                log.info("the app's events are interrupted: %s", error)
                after = None  # another server counts anew; what was missed is found by asking for the state
            if kinds == "diff":
                self._connected.clear()
            time.sleep(RETRY_PAUSES[min(failures, len(RETRY_PAUSES) - 1)])
            failures += 1

    def _caught_up(self, kinds: str) -> None:
        """Events come from now on; look whether anything happened before."""
        if kinds != "diff":
            return
        self._connected.set()
        with self._lock:
            again, self._known = self._known, True
            if again:  # it may be another server, whose revisions say nothing about ours
                self._changes.clear()
                for session_id, session in self._sessions.items():
                    self._ask(session_id, session)
                return
            runs = [(key, session) for key, session in self._sessions.items() if session.run and session.run.reads]
        for session_id, session in runs:
            run = session.run
            try:
                if run is None or run.rev is None or self._server.unchanged(self._server.base(), run.rev):
                    continue
            except (AttributeError, OrchError) as error:
                log.info("the state cannot be read: %s", error)
                return
            with self._lock:
                self._ask(session_id, session)

    def _event(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "diff":
            paths = [parse_pointer(op["path"]) for op in data["ops"]]
            paths += [parse_pointer(op["from"]) for op in data["ops"] if "from" in op]
            # an append changes the list, whatever place in it the operation names
            paths = [path[:-1] if path and path[-1] == "-" else path for path in paths]
            with self._lock:
                self._changes.append((data["rev"], paths))
                for session_id, session in self._sessions.items():
                    if session.run is not None and session.run.affected(data["rev"], paths):
                        self._ask(session_id, session)
        elif kind == "log":
            now = time.monotonic()
            with self._lock:
                for session_id, session in self._sessions.items():
                    if session.run is not None and data.get("work") in session.run.log_reads:
                        if now - session.logged >= LOG_PAUSE:
                            session.logged = now
                            self._ask(session_id, session)

    # -- Streamlit
    def _ask(self, session_id: str, session: _Session) -> None:
        """Rerun when the session rests. Called with the lock held."""
        if session.running:
            session.wanted = True
            return
        from streamlit import runtime

        if runtime.exists():
            loop = runtime.get_instance()._get_async_objs().eventloop
            loop.call_soon_threadsafe(self._rerun, session_id, loop)

    def _rerun(self, session_id: str, loop: Any) -> None:
        """On Streamlit's event loop."""
        from streamlit import runtime

        info = runtime.get_instance()._session_mgr.get_active_session_info(session_id)
        with self._lock:
            session = self._sessions.get(session_id)
            if info is None or session is None:
                self._sessions.pop(session_id, None)
                return
            if session.running:
                session.wanted = True
                return
        if info.session._scriptrunner is not None:  # a click is about to run, or the last run is being tidied up
            loop.call_later(BUSY_PAUSE, self._rerun, session_id, loop)
            return
        session.automatic = True
        info.session.request_rerun(None)
