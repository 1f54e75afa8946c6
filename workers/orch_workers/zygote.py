"""The fork server: imports once, then forks a waiter for every attempt it is asked to start.

Started by the agent with one end of a socket pair as standard input. Requests are lines `<key> <grace> <lease> <json>`,
with a lease of "-" or "<seconds>:<grace>"; answers are JSON lines, written by the fork server and by the processes it
forked:

    {"ready": true} or {"ready": false, "error", "traceback"}      once, when the imports are done
    {"started": key, ...run record} or {"failed": key, "error"}    by the process that becomes the script
    {"reaped": key}                                                the waiter has ended

There are two: a light one for scripts, which imports next to nothing (what it touches is each waiter's memory), and a
warm one for Python Works, which has imported the user's app.py. Both end with the agent; waiters and scripts live on,
unless there is a guard: a process, the agent's parent, that they may not outlive.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys

if __name__ == "__main__":  # run by path, isolated and without site-packages: the package must still be found
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from orch_workers import waiter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["main"]


def main(argv: list[str]) -> NoReturn:
    """`argv`: record folder, contact file, pid of the guard ("0" for none), then for the warm one: "--warm", app file
    ("" for none), its arguments."""
    record_dir, contact, guard_pid, *rest = argv
    home = os.environ.get("ORCH_CRASH_HOME")
    if home is not None:
        sys.path.append(home)
        from orch_drive import crash

        crash.once_in(os.path.dirname(record_dir))
        waiter.crash_point = crash.crash_point
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    waiter.name_process("orch-zygote")
    guard = _open_guard(int(guard_pid))
    if rest:
        problem = _import_app(rest[1], rest[2:])
        if problem is not None:
            _send(control, {"ready": False, **problem})
            os._exit(1)
    try:
        _send(control, {"ready": True})
        _Server(control, record_dir, contact, guard).serve()
    except (BrokenPipeError, ConnectionResetError):  # the agent is gone
        os._exit(0)


def _open_guard(pid: int) -> int:
    """A descriptor that is readable once that process has ended; -1 for none (and where there is no pidfd)."""
    if not pid or not waiter.LINUX:
        return -1
    try:
        guard = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)  # the agent has ended with it
    agent = waiter.proc_stat(os.getppid())
    if agent is None or agent.ppid != pid:
        os._exit(1)  # asked after the open: the number is another process's by now
    return guard


def _send(control: socket.socket, answer: dict[str, Any]) -> None:
    # One small write: lines of several processes on this socket do not mix.
    control.sendall(json.dumps(answer).encode() + b"\n")


def _import_app(app_file: str, app_argv: list[str]) -> dict[str, str] | None:
    """Imports app.py as the flow server does. None, or what went wrong, for the user to read."""
    import importlib
    import traceback
    from pathlib import Path

    importlib.import_module("orch_workers.pywork")
    if not app_file:
        return None
    from orch.loader import load_module

    try:
        load_module(Path(app_file), app_argv)
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != app_file:
            trace = trace.tb_next  # from the user's first line on
        lines = traceback.format_exception(error.with_traceback(trace))
        return {"error": f"{app_file} cannot be imported: {type(error).__name__}: {error}", "traceback": "".join(lines)}
    finally:
        sys.stdout.flush()
    return None


class _Server:
    def __init__(self, control: socket.socket, record_dir: str, contact: str, guard: int) -> None:
        self.control = control
        self.contact = contact
        self.guard = guard
        self.record_dir = record_dir
        self.children: dict[int, str] = {}

    def serve(self) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        wake = waiter.wake_pipe()
        # A collection would write to every object and so copy every shared page into each waiter.
        gc.collect()
        gc.disable()
        gc.freeze()
        poller = select.poll()
        poller.register(self.control, select.POLLIN)
        poller.register(wake, select.POLLIN)
        rest = b""
        while True:
            for fd, _event in poller.poll():
                if fd == wake:
                    os.read(wake, 512)
                    self.reap()
                    continue
                # Small pieces: what is in this buffer when a waiter is forked stays in the waiter's memory.
                data = self.control.recv(1 << 16)
                if not data:
                    os._exit(0)  # the agent is gone
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self.start(line)

    def reap(self) -> None:
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            key = self.children.pop(pid, None)
            if key is not None:
                _send(self.control, {"reaped": key})

    def start(self, line: bytes) -> None:
        key, grace, lease, request = line.split(b" ", 3)
        name = key.decode()
        waiter.crash_point("zygote.asked")
        try:
            pid = os.fork()
        except OSError as error:
            _send(self.control, {"failed": name, "error": f"cannot fork a process: {error.strerror}"})
            return
        if pid == 0:
            until = f"{lease.decode()}:{self.contact}" if lease != b"-" else ""
            waiter.attend(name, float(grace), until, self.guard, request, self.record_dir, self.reply)
        waiter.crash_point("zygote.forked")
        self.children[pid] = name

    def reply(self, answer: dict[str, Any] | None) -> None:
        if answer is not None:
            try:
                _send(self.control, answer)
            except OSError:  # the agent is gone; the next one finds the record
                pass
        self.control.close()


if __name__ == "__main__":
    main(sys.argv[1:])
