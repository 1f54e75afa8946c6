"""The waiter: the tiny parent of one script. It outlives the agent and writes down how the script ended.

A fork server (zygote.py) forks one waiter an attempt; `attend` is that waiter's whole life:

1. It leads a session of its own, so that nothing meant for the agent reaches it; on Linux it adopts descendants whose
   parents ended.
2. It forks a child, which makes a process group of its own, claims the attempt by creating `<key>.run.json` (this fails
   if the key was ever used: at most one start an attempt), tells the agent its pid and becomes the script.
3. It waits. SIGTERM means stop: TERM to the group, after the grace KILL (`<key>.stop.json` may name another grace).
   An attempt with a lease is stopped as well once the flow has not answered the agent for that long: the agent notes
   each answer in a file, so this holds however the agent fares. So is one with a guard, when that process ends.
4. When the script has ended it writes `<key>.exit.json`, then ends what is left of the descendants, then exits.

If the waiter is killed, the kernel kills the script (PDEATHSIG): an attempt without a waiter has no exit code.

What a waiter touches is its memory: a page shared with the fork server becomes its own when it as much as reads an
object there. Hence few imports, nothing else of orch, and all that can be done in the child is done there.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NamedTuple, NoReturn

    Reply = Callable[[dict[str, Any] | None], None]

    class ProcStat(NamedTuple):
        pid: int
        state: str
        ppid: int
        pgrp: int
        session: int
        start: str
else:
    from collections import namedtuple

    ProcStat = namedtuple("ProcStat", "pid state ppid pgrp session start")

__all__ = [
    "ProcStat", "attend", "boot_id", "descendants", "die_with", "name_process", "proc_stat", "reserve", "steady",
    "unreserve", "wake_pipe", "write_record",
]  # fmt: skip

LINUX = sys.platform == "linux"
ROOM = 4096
"""Bytes of disk that an attempt takes at its start for the record of its end."""
NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit codes of a command that cannot be started, as shells have them."""


def crash_point(name: str, step: str = "") -> None:
    """Where a test may end this process; the fork server puts `orch_drive.crash.crash_point` here if one wants to."""


_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int | bytes) -> None:
    if LINUX and _libc.prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def die_with(parent: int) -> None:
    """From now on a SIGKILL for this process when its parent ends, also if it has ended already; 0: no more (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if parent else 0)
    if LINUX and parent and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def name_process(name: str) -> None:
    """The name that ps and top show (Linux; at most 15 bytes)."""
    _prctl(_PR_SET_NAME, name.encode())


# ---- who is who ------------------------------------------------------------------------------------------------------


def boot_id() -> str:
    """Names this boot of this machine; pids and start times of another boot mean nothing."""
    if not LINUX:
        return ""
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def steady() -> float:
    """Seconds on a clock that all processes of this machine share and nobody sets; on Linux it runs during suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME if LINUX else time.CLOCK_MONOTONIC)


def proc_stat(pid: int) -> ProcStat | None:
    """What the kernel says of a process, None if there is none. A zombie is still listed (state "Z").

    `start` is an opaque text: with the boot id and the pid it names one incarnation.
    """
    if not LINUX:
        return _proc_stat_ps(pid)
    try:
        text = _read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in parentheses and may hold anything, parentheses and spaces included.
    fields = text[text.rindex(b")") + 2 :].split()
    return ProcStat(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), fields[19].decode())


def _proc_stat_ps(pid: int) -> ProcStat | None:
    import subprocess

    command = ["ps", "-o", "stat=,ppid=,pgid=,lstart=", "-p", str(pid)]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split(maxsplit=3)
    if len(words) < 4:
        return None
    return ProcStat(pid, words[0][0], int(words[1]), int(words[2]), 0, words[3].strip())


def descendants(pid: int) -> list[ProcStat]:
    """All living descendants of a process, parents before children. Linux only: elsewhere the list is empty."""
    if not LINUX:
        return []
    found: list[ProcStat] = []
    generation = [pid]
    while generation:
        children = [child for parent in generation for child in _children(parent)]
        stats = [stat for child in children if (stat := proc_stat(child)) is not None and stat.state not in "ZX"]
        found += stats
        generation = children  # a zombie has no children: they were handed to the subreaper
    return found


def _children(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    children: list[int] = []
    for thread in threads:
        try:
            children += [int(word) for word in _read(f"/proc/{pid}/task/{thread}/children").split()]
        except (FileNotFoundError, ProcessLookupError):
            if not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"):
                return _children_by_scan(pid)  # a kernel built without CONFIG_PROC_CHILDREN
    return children


def _children_by_scan(pid: int) -> list[int]:
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [other for other in pids if (stat := proc_stat(other)) is not None and stat.ppid == pid]


# ---- records ---------------------------------------------------------------------------------------------------------


def write_record(path: str, record: dict[str, Any], *, exclusive: bool = False, point: str) -> None:
    """Put a JSON file in place at once: it is there complete and on disk, or not at all.

    Raises FileExistsError if `exclusive` and there is one already, else OSError.
    """
    folder = os.path.dirname(path)
    draft = _draft(path, os.getpid())
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT, 0o600)  # not truncated: what was reserved for it is written over
    try:
        try:
            data = json.dumps(record).encode()
            _write_all(fd, data)
            os.ftruncate(fd, len(data))
            crash_point(point, "written")
            os.fsync(fd)
        finally:
            os.close(fd)
        crash_point(point, "synced")
        if exclusive:
            os.link(draft, path)  # unlike rename, this fails if the name is taken
        else:
            os.rename(draft, path)
    finally:
        if exclusive or os.path.exists(draft):
            os.unlink(draft)
    crash_point(point, "renamed")
    folder_fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def reserve(path: str, pid: int) -> str:
    """Take the room that the record `path`, to be written by the process `pid`, will need: a disk that fills up
    meanwhile does not lose it. Returns the file that holds the room. Raises OSError."""
    draft = _draft(path, pid)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        _write_all(fd, b" " * ROOM)
    except OSError:
        os.unlink(draft)
        raise
    finally:
        os.close(fd)
    return draft


def unreserve(path: str, pid: int) -> None:
    """Give back what was reserved, if the record was never written."""
    try:
        os.unlink(_draft(path, pid))
    except FileNotFoundError:
        pass


def _draft(path: str, pid: int) -> str:
    return f"{path}.{pid}.tmp"


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


# ---- the waiter ------------------------------------------------------------------------------------------------------


def attend(key: str, grace: float, lease: str, guard: int, request: bytes, record_dir: str, reply: Reply) -> NoReturn:
    """The life of a waiter, in a process just forked for it.

    `request` is the JSON of a ProcessSpec. `lease` is "" or "<seconds>:<grace>:<path of the contact file>". `guard` is
    a pidfd of the process that the script may not outlive, or -1. `reply` is called once, by the script's process, with
    the run record or with what failed; with None by the waiter, which will not reply.
    """
    code = 1
    try:
        _Waiter(key, grace, lease, guard, record_dir).live(request, reply)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(code)  # never back into the fork server's code, nor its atexit handlers


class _Waiter:
    def __init__(self, key: str, grace: float, lease: str, guard: int, record_dir: str) -> None:
        self.key = key
        self.grace = grace
        self.lease = lease
        self.guard = guard
        self.cut = False  # the lease has run out, or the guard has ended
        self.base = os.path.join(record_dir, key)
        self.wake = wake_pipe()
        self.pid = 0
        self.start_pipe = 0  # what the child says of its start, see _become_script
        self.status: int | None = None  # wait status of the script
        self.stop_asked = False
        self.deadline: float | None = None  # monotonic: KILL what is left by then
        # Descendants that got their TERM: some programs take a second one as an order to drop everything.
        self.told: set[int] = set()

    def live(self, request: bytes, reply: Reply) -> None:
        os.setsid()
        name_process("orch-waiter")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wake pipe tells
        signal.signal(signal.SIGTERM, self._on_term)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._start(request, reply)
        self._watch()
        told = _read_all(self.start_pipe)
        if told:  # else the attempt was not even recorded as started
            self._record_exit(told[1:].decode(errors="replace"))
        self._end_descendants()

    def _on_term(self, *_: object) -> None:
        self.stop_asked = True

    def _start(self, request: bytes, reply: Reply) -> None:
        self.start_pipe, tell = os.pipe()
        waiter = os.getpid()
        # A stop may come at once: until the child has its own signal handling, keep TERM pending instead of lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.start_pipe)
            if self.guard >= 0:
                os.close(self.guard)
            _become_script(request, self.base, waiter, tell, reply)
        crash_point("waiter.forked")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        os.close(tell)
        reply(None)
        try:
            os.setpgid(self.pid, self.pid)  # here and in the child: whoever comes first, a signal to the group finds it
        except (ProcessLookupError, PermissionError):
            pass

    # -- wait

    def _watch(self) -> None:
        """Until the script has ended; does what SIGTERM asks meanwhile."""
        killed = False
        while not self._reap():
            if self.deadline is None:
                self._sleep(self._leased())
            else:
                self._sleep(None if killed else self.deadline - time.monotonic())
            first = self.deadline is None
            if self._stop_wanted() and first:
                self._signal_all(signal.SIGTERM)
                self._signal_all(signal.SIGCONT)  # a process that is held by SIGSTOP would not see its TERM
            if self.deadline is not None and not killed and time.monotonic() >= self.deadline:
                self._signal_all(signal.SIGKILL)
                killed = True

    def _leased(self) -> float | None:
        """Seconds until the lease runs out as far as is known now; 0 asks for the stop. None without a lease."""
        if not self.lease:
            return None
        seconds, _, path = self.lease.split(":", 2)
        try:
            with open(path) as file:
                contact = float(file.read())
        except (OSError, ValueError) as error:
            sys.stderr.write(f"{path} does not tell of the last contact: the lease of {self.key} is over ({error})\n")
            contact = 0.0
        left = contact + float(seconds) - steady()
        if left <= 0:
            self.cut = self.stop_asked = True
        return max(0.0, left)

    def _stop_wanted(self) -> bool:
        """Whether a stop was asked since the last look; it can only bring the deadline nearer."""
        if not self.stop_asked:
            return False
        self.stop_asked = False
        grace = float(self.lease.split(":", 2)[1]) if self.cut and self.lease else self.grace
        try:
            with open(f"{self.base}.stop.json") as file:
                grace = float(json.load(file)["grace"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError) as error:
            sys.stderr.write(f"{self.base}.stop.json is not readable, the grace is {grace} s: {error}\n")
        deadline = time.monotonic() + grace
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)
        return True

    def _reap(self) -> bool:
        """Collects ended children, adopted ones too; True once the script is among them."""
        while self.status is None:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return False
            if pid == self.pid:
                self.status = status
        return True

    def _sleep(self, seconds: float | None) -> None:
        poller = select.poll()
        poller.register(self.wake, select.POLLIN)
        if self.guard >= 0:
            poller.register(self.guard, select.POLLIN)
        for fd, _ in poller.poll(None if seconds is None else max(0.0, seconds) * 1000):
            if fd == self.guard:
                self.guard = -1  # it stays readable
                self.cut = self.stop_asked = True
        try:
            while os.read(self.wake, 512):
                pass
        except BlockingIOError:
            pass

    def _signal_all(self, sig: int) -> None:
        """To the whole group and to the descendants that left it. Only while the script is not reaped: until then no
        stranger can have its group id."""
        try:
            os.killpg(self.pid, sig)
        except ProcessLookupError:  # it moved to another group
            _signal_one(self.pid, sig)
        except PermissionError:  # some member runs as another user; macOS says so of a group of zombies
            _signal_one(self.pid, sig)
        for stat in descendants(os.getpid()):
            self.told.add(stat.pid)
            if stat.pgrp != self.pid:
                _signal_one(stat.pid, sig)

    # -- end

    def _record_exit(self, error: str) -> None:
        assert self.status is not None
        code = os.waitstatus_to_exitcode(self.status)
        record = {
            "key": self.key,
            "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "at": time.time(),
            "error": error,
            "stopped": self.deadline is not None,
            "cut": self.cut,
        }
        while True:
            try:
                write_record(f"{self.base}.exit.json", record, point="waiter.exit")
                return
            except OSError as problem:
                # A full disk may be freed: while the waiter lives the call is not lost. A folder does not come back.
                if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                self._sleep(1.0)
                if self._stop_wanted():
                    raise

    def _end_descendants(self) -> None:
        """TERM to all that is left, KILL after the grace; returns when nothing is left."""
        until = time.monotonic() + self.grace
        self.deadline = until if self.deadline is None else min(self.deadline, until)
        pause = 0.01
        while not self._alone():
            self._stop_wanted()
            kill = time.monotonic() >= self.deadline
            for stat in self._left():
                if kill:
                    _signal_one(stat.pid, signal.SIGKILL)
                elif stat.pid not in self.told:
                    self.told.add(stat.pid)
                    _signal_one(stat.pid, signal.SIGTERM)
                    _signal_one(stat.pid, signal.SIGCONT)
            # What was killed may have forked meanwhile: look again soon, without spinning on what cannot die.
            pause = min(1.0, pause * 2)
            self._sleep(pause if kill else min(pause, self.deadline - time.monotonic()))

    def _left(self) -> list[ProcStat]:
        if LINUX:
            return descendants(os.getpid())
        # Without a subreaper only the group can be found; a negative pid addresses it as a whole.
        return [ProcStat(-self.pid, "", 0, self.pid, 0, "")]

    def _alone(self) -> bool:
        """Whether no descendant is left. On Linux orphans become our children, so having no child says it."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            return False
        except ChildProcessError:
            if LINUX:
                return True
        try:
            os.killpg(self.pid, 0)
            return False
        except (ProcessLookupError, PermissionError):
            return True


def _signal_one(pid: int, sig: int) -> None:
    try:
        os.kill(pid, sig)
    except (ProcessLookupError, PermissionError):  # ended meanwhile, or now another user's
        pass


def _start_of(pid: int) -> str:
    stat = proc_stat(pid)
    return stat.start if stat is not None else ""


def wake_pipe() -> int:
    """The reading end of a pipe that gets a byte at every signal that has a handler."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _read_all(fd: int) -> bytes:
    data = b""
    while part := os.read(fd, 4096):
        data += part
    os.close(fd)
    return data


def _read(path: str) -> bytes:
    return _read_all(os.open(path, os.O_RDONLY))


def _open_log(path: str, header: str) -> int:
    """The log, opened to append; the header stands on a line of its own even if the attempt before ended mid-line."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    if header:
        size = os.fstat(fd).st_size
        if size:
            reader = os.open(path, os.O_RDONLY)
            if os.pread(reader, 1, size - 1) != b"\n":
                header = "\n" + header
            os.close(reader)
        os.write(fd, header.rstrip("\n").encode(errors="surrogateescape") + b"\n")
    return fd


# ---- the script ------------------------------------------------------------------------------------------------------


def _become_script(request: bytes, base: str, waiter: int, tell: int, reply: Reply) -> NoReturn:
    """In the forked child: claim the attempt, put everything as a script expects it, exec (or run the Python Work).

    `tell` is a pipe to the waiter: one byte once the start is recorded, then, if there is no exec, the reason.
    """
    code = NOT_EXECUTABLE
    record_path = f"{base}.run.json"
    try:
        os.setpgid(0, 0)
        # Python ignores SIGPIPE and SIGXFSZ, and what is ignored or blocked stays so through exec. SIGPIPE waits:
        # the agent that is told of the start may be dead.
        for sig in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
            if signal.getsignal(sig) is not signal.SIG_DFL:
                signal.signal(sig, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != waiter:
            os._exit(code)  # it ended before the line above
        spec: dict[str, Any] = json.loads(request)
        try:
            log = _open_log(spec["log"], spec["header"])
        except OSError as error:
            reply({"failed": spec["key"], "error": f"cannot write the log {spec['log']}: {error.strerror}"})
            os._exit(code)
        record = {
            "key": spec["key"],
            "waiter_pid": waiter,
            "waiter_start": _start_of(waiter),
            "pid": os.getpid(),
            "pid_start": _start_of(os.getpid()),
            "pgid": os.getpid(),
            "boot_id": boot_id(),
            "at": time.time(),
            "argv": spec["argv"],
        }
        room = ""
        try:
            room = reserve(f"{base}.exit.json", waiter)
            write_record(record_path, record, exclusive=True, point="waiter.run")
        except OSError as error:
            if room:
                os.unlink(room)
            reason = "it was started before" if isinstance(error, FileExistsError) else error.strerror
            reply({"failed": spec["key"], "error": f"cannot record the start in {record_path}: {reason}"})
            os._exit(code)
        os.write(tell, b"s")
        reply({"started": spec["key"], **record})
        crash_point("waiter.run.told")
        # Names every process of this attempt on this machine, for the day when the waiter is gone.
        spec["env"]["ORCH_RUN_RECORD"] = record_path
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(null)
        os.close(log)
        code, reason = _run(spec, tell)
        os.write(tell, reason.encode(errors="replace")[:4000])
    except BaseException as error:
        os.write(tell, f"the process cannot be prepared: {type(error).__name__}: {error}".encode()[:4000])
    finally:
        os._exit(code)


def _run(spec: dict[str, Any], tell: int) -> tuple[int, str]:
    """Does not return, except with exit code and reason if the script cannot be started."""
    try:
        os.chdir(spec["cwd"])
    except OSError as error:
        code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        return code, f"the working directory {spec['cwd']} cannot be entered: {error.strerror}"
    if spec["python"] is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(tell)
        _run_python(spec)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvpe(spec["argv"][0], spec["argv"], spec["env"])
    except FileNotFoundError as error:
        return NOT_FOUND, _explain(spec, error)
    except (OSError, ValueError, IndexError) as error:
        return NOT_EXECUTABLE, _explain(spec, error)


def _explain(spec: dict[str, Any], error: Exception) -> str:
    """Why a command cannot be executed, in one line, for who wrote it."""
    if not spec["argv"] or not spec["argv"][0]:
        return "the command is empty"
    name, cwd = spec["argv"][0], spec["cwd"]
    if isinstance(error, FileNotFoundError):
        if "/" not in name:
            return f"command not found: {name} (PATH is {spec['env'].get('PATH', 'not set')})"
        if os.path.exists(name):
            return f"{name} cannot be started: the interpreter named in its first line does not exist"
        return f"no such file: {name} (working directory {cwd})"
    if isinstance(error, PermissionError):
        if os.path.isdir(name):
            return f"{name} is a folder, not a program (working directory {cwd})"
        return f"{name} is not executable (working directory {cwd}): chmod +x it, or name its interpreter"
    if isinstance(error, OSError) and error.errno == errno.ENOEXEC:
        return f"{name} is no program and has no #! line (working directory {cwd}): name its interpreter"
    if isinstance(error, OSError) and error.errno == errno.E2BIG:
        return f"the arguments or the environment of {name} are too long for this system"
    return f"{name} cannot be started (working directory {cwd}): {getattr(error, 'strerror', None) or error}"


def _run_python(spec: dict[str, Any]) -> NoReturn:
    """A Python Work, in a fork of the process that has imported app.py. Ends as an interpreter would end."""
    import atexit
    import gc
    import random
    import threading
    import traceback

    code: object = 1
    try:
        gc.enable()
        random.seed()
        os.environ.clear()
        os.environ.update(spec["env"])
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        from orch_workers import pywork

        code = pywork.main(spec["python"])
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(code + "\n")
            code = 1
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # joins non-daemon threads, as at the end of any program
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF if isinstance(code, int) else 0 if code is None else 1)
