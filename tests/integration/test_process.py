"""Processes as the agent has them: real ones, well behaved and not."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from orch_workers import process as process_module
from orch_workers.process import Process, ProcessSpec, Spawner, SpawnError
from orch_workers.progress import ProgressParser

CHILDREN = Path(__file__).resolve().parent.parent / "children"
LONG = 30.0


async def until(predicate: Callable[[], Any], what: str, timeout: float = LONG) -> Any:
    deadline = time.monotonic() + timeout
    while not (answer := predicate()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        await asyncio.sleep(0.005)
    return answer


def lives(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return False
    return fields[0] not in "ZX"


class Box:
    """One Spawner and a folder for what its scripts write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = folder / "run"
        self.spawner = Spawner(self.records)
        self.log = folder / "logs" / "train" / "call.log"

    def spec(self, *argv: str, key: str = "1-train-1.1", **changes: Any) -> ProcessSpec:
        given: dict[str, Any] = {
            "key": key,
            "argv": list(argv),
            "cwd": str(self.folder),
            "env": dict(os.environ),
            "log": str(self.log),
            "grace": 5.0,
        }
        return ProcessSpec(**{**given, **changes})

    async def child(self, name: str, *arguments: str, **changes: Any) -> Process:
        return await self.spawner.start(self.spec(sys.executable, str(CHILDREN / name), *arguments, **changes))

    async def ready(self, name: str = "ready") -> str:
        path = self.folder / name
        await until(lambda: path.exists() and (name == "ready" or path.read_text()), f"file {name}")
        return path.read_text()


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    box = Box(tmp_path)
    yield box
    for process in Spawner.adopt(box.records):
        await process.stop(0.0)
    await box.spawner.aclose()


# ---- ends ------------------------------------------------------------------------------------------------------------


async def test_exit_code_and_log(box: Box) -> None:
    process = await box.spawner.start(box.spec("sh", "-c", "echo out; echo err >&2; exit 4", header="# call 1"))
    ended = await process.wait()
    assert (ended.exit_code, ended.signal, ended.error, ended.lost, ended.stopped) == (4, None, "", False, False)
    assert box.log.read_text() == "# call 1\nout\nerr\n"
    assert stat.S_IMODE(box.log.stat().st_mode) == 0o600
    assert abs(ended.at - time.time()) < LONG
    await process.gone()
    assert not process.alive


async def test_a_signal_is_named(box: Box) -> None:
    process = await box.spawner.start(box.spec("sh", "-c", "kill -SEGV $$"))
    ended = await process.wait()
    assert (ended.exit_code, ended.signal, ended.signal_name) == (None, signal.SIGSEGV, "SIGSEGV")


async def test_ends_are_told_not_asked_for(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a next look: with an hour between looks the end is known at once all the same."""
    monkeypatch.setattr(process_module, "POLL", 3600.0)
    process = await box.child("waits_for_go.py")
    await box.ready()
    waiting = [asyncio.create_task(process.wait()), asyncio.create_task(process.wait())]
    going = asyncio.create_task(process.gone())
    await asyncio.sleep(0)
    (box.folder / "go").write_text("6")
    async with asyncio.timeout(LONG):
        assert [(await task).exit_code for task in waiting] == [6, 6]
        await going


async def test_the_end_does_not_wait_for_what_is_left(box: Box) -> None:
    process = await box.child("forks_and_exits.py", grace=600.0)
    async with asyncio.timeout(LONG):
        assert (await process.wait()).exit_code == 3
    assert lives(int(await box.ready("child"))) and process.alive


async def test_a_second_attempt_starts_on_a_line_of_its_own(box: Box) -> None:
    for attempt in (1, 2):
        spec = box.spec("printf", "no line end", key=f"1-train-1.{attempt}", header=f"# attempt {attempt}")
        await (await box.spawner.start(spec)).wait()
    assert box.log.read_text() == "# attempt 1\nno line end\n# attempt 2\nno line end"


async def test_what_a_script_finds(box: Box) -> None:
    """A process group of its own, three open files, no input, default signals, the given environment and no more."""
    code = (
        "import json, os, signal, sys; fds = sorted(int(f) for f in os.listdir('/proc/self/fd'));"
        "ignored = [l for l in open('/proc/self/status') if l.startswith(('SigIgn', 'SigBlk'))];"
        "print(json.dumps([os.getpgid(0) == os.getpid(), fds, sys.stdin.read(), ignored, sorted(os.environ)]))"
    )
    env = {"PATH": os.environ["PATH"], "ONLY": "this", "LC_ALL": "C.UTF-8"}
    process = await box.spawner.start(box.spec("/usr/bin/env", sys.executable, "-S", "-c", code, env=env))
    assert (await process.wait()).exit_code == 0, box.log.read_text()
    leader, fds, stdin, masks, names = json.loads(box.log.read_text())
    assert leader and stdin == ""
    assert fds in ([0, 1, 2], [0, 1, 2, 3])  # 3: listdir's own
    python_ignores = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
    values = {line.split(":")[0]: int(line.split()[1], 16) for line in masks}
    assert values["SigBlk"] == 0
    assert values["SigIgn"] & ~python_ignores == 0
    assert names == ["LC_ALL", "ONLY", "ORCH_RUN_RECORD", "PATH"]


async def test_broken_pipes_end_programs_as_in_a_shell(box: Box) -> None:
    process = await box.spawner.start(box.spec("bash", "-c", "yes | head -n 1; exit ${PIPESTATUS[0]}"))
    assert (await process.wait()).exit_code == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("argv", "cwd", "exit_code", "words"),
    [
        (["no-such-command-here", "x"], None, 127, "command not found: no-such-command-here"),
        (["./missing.sh"], None, 127, "no such file: ./missing.sh (working directory"),
        (["./plain.txt"], None, 126, "is not executable"),
        (["./no_line.sh"], None, 126, "has no #! line"),
        (["./bad_line.sh"], None, 127, "interpreter named in its first line does not exist"),
        (["./folder"], None, 126, "is a folder"),
        (["true"], "gone", 127, "working directory"),
        ([], None, 126, "the command is empty"),
        (["true", "x" * 3_000_000], None, 126, "too long"),
        (["true", "nul\0byte"], None, 126, "null byte"),
    ],
)
async def test_what_cannot_be_started_says_why(
    box: Box, argv: list[str], cwd: str | None, exit_code: int, words: str
) -> None:
    (box.folder / "plain.txt").write_text("x")
    (box.folder / "folder").mkdir()
    for name, text in (("no_line.sh", "echo x\n"), ("bad_line.sh", "#!/no/such/interpreter\n")):
        (box.folder / name).write_text(text)
        (box.folder / name).chmod(0o755)
    spec = box.spec(*argv, **({"cwd": str(box.folder / cwd)} if cwd else {}))
    process = await box.spawner.start(spec)
    async with asyncio.timeout(LONG):
        ended = await process.wait()
    assert ended.exit_code == exit_code
    assert words in ended.error


async def test_a_log_that_cannot_be_written_is_no_start(box: Box) -> None:
    (box.folder / "file").touch()
    with pytest.raises(SpawnError, match="cannot write the log"):
        await box.spawner.start(box.spec("true", log=str(box.folder / "file" / "log")))
    assert Spawner.adopt(box.records) == []


# ---- stop ------------------------------------------------------------------------------------------------------------


async def test_stop_lets_it_finish_its_words(box: Box) -> None:
    process = await box.child("hears_term.py")
    await box.ready()
    await process.stop(LONG)
    ended = await process.wait()
    assert (ended.exit_code, ended.stopped) == (7, True)
    assert box.log.read_text() == "last words\n"


async def test_stop_kills_after_the_grace(box: Box) -> None:
    process = await box.child("ignores_term.py")
    await box.ready()
    asked = time.monotonic()
    await asyncio.gather(process.stop(0.3), process.stop(0.3))
    assert 0.29 < time.monotonic() - asked < 5.0
    ended = await process.wait()
    assert (ended.signal, ended.stopped) == (signal.SIGKILL, True)
    await process.stop(0.3)  # once more, afterwards


async def test_a_second_stop_can_only_shorten(box: Box) -> None:
    process = await box.child("ignores_term.py", grace=60.0)
    await box.ready()
    patient = asyncio.create_task(process.stop(60.0))
    await until(lambda: (box.records / "1-train-1.1.stop.json").exists(), "the first stop")
    async with asyncio.timeout(LONG):
        await process.stop(0.0)
        await patient
    assert not lives(process.pid)


async def test_a_stop_right_after_the_start_is_heard(box: Box) -> None:
    for n in range(10):
        process = await box.spawner.start(box.spec("sleep", "600", key=f"1-train-{n}.1"))
        async with asyncio.timeout(LONG):
            await process.stop(60.0)
        assert (await process.wait()).signal == signal.SIGTERM


async def test_stop_reaches_a_stopped_process(box: Box) -> None:
    process = await box.spawner.start(box.spec("sleep", "600"))
    process.signal(signal.SIGSTOP)
    async with asyncio.timeout(LONG):
        await process.stop(60.0)
    assert (await process.wait()).signal == signal.SIGTERM


async def test_stop_does_without_a_waiter_that_hangs(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "PATIENCE", 0.2)
    process = await box.child("setsid_grandchild.py", "stay")
    grandchild = int(await box.ready("child"))
    os.kill(process.waiter_pid, signal.SIGSTOP)
    async with asyncio.timeout(LONG):
        await process.stop(0.1)
    await until(lambda: not lives(process.pid) and not lives(grandchild), "everything killed")


# ---- descendants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exit_code"), [("forks_and_exits.py", 3), ("setsid_grandchild.py", 0), ("daemon.py", 0)]
)
async def test_what_is_left_of_it_ends_too(box: Box, name: str, exit_code: int) -> None:
    process = await box.child(name, grace=0.3)
    ended = await process.wait()
    assert ended.exit_code == exit_code  # known at the main process' end, not when the rest is gone
    left = int(await box.ready("child"))
    await process.gone()
    assert not lives(left)


async def test_stop_reaches_those_that_left_the_group(box: Box) -> None:
    process = await box.child("setsid_grandchild.py", "stay")
    grandchild = int(await box.ready("child"))
    assert os.getpgid(grandchild) != process.pgid
    async with asyncio.timeout(LONG):
        await process.stop(60.0)
    assert not lives(grandchild)


async def test_standard_streams_closed_is_no_end(box: Box) -> None:
    process = await box.child("closes_stdout.py")
    await box.ready()
    assert process.alive and process.ended is None
    (box.folder / "go").touch()
    assert (await process.wait()).exit_code == 5


# ---- output ----------------------------------------------------------------------------------------------------------


async def test_a_flood_goes_to_the_log(box: Box) -> None:
    process = await box.child("floods.py")
    assert (await process.wait()).exit_code == 0
    assert box.log.stat().st_size == 200 * 5_000 * len("all work and no play\n")


async def test_a_line_of_100_mb(box: Box) -> None:
    process = await box.child("long_line.py")
    assert (await process.wait()).exit_code == 0
    parser = ProgressParser()
    with box.log.open("rb") as log:
        while data := log.read(1 << 20):
            parser.feed(data)
    assert parser.tail(1) == ["the end"]
    assert [len(line) for line in parser.tail(2)] == [2_000, 7]
    assert box.log.stat().st_size > 100 << 20


async def test_a_bar_of_carriage_returns(box: Box) -> None:
    process = await box.child("carriage_returns.py")
    assert (await process.wait()).exit_code == 0
    parser = ProgressParser()
    assert parser.feed(box.log.read_bytes()) == 1.0
    assert len(parser.tail()) == 1 and parser.tail()[0].startswith("train: 100%|####")


async def test_a_script_named_like_a_module(box: Box) -> None:
    for name in ("queue.py", "waits_for_go.py"):
        shutil.copy(CHILDREN / name, box.folder / name)
    for name in ("json.py", "select.py", "socket.py", "signal.py"):
        (box.folder / name).write_text('raise ImportError("shadowed")')
    before = os.getcwd()
    os.chdir(box.folder)
    try:
        spawner = Spawner(box.records)
        process = await spawner.start(box.spec(sys.executable, "-P", "queue.py"))
        assert (await process.wait()).exit_code == 0, box.log.read_text()
        await spawner.aclose()
    finally:
        os.chdir(before)
    assert "I am the user's queue" in box.log.read_text()


# ---- at most once, whoever dies --------------------------------------------------------------------------------------


async def test_a_key_starts_once(box: Box) -> None:
    other = Spawner(box.records)
    specs = [box.spec("sh", "-c", "echo started; sleep 600")] * 4
    processes = await asyncio.gather(*(s.start(x) for s, x in zip([box.spawner, other] * 2, specs, strict=True)))
    assert len({process.pid for process in processes}) == 1
    await until(lambda: box.log.read_text() == "started\n", "the script runs")
    await processes[0].stop(1.0)
    again = await box.spawner.start(specs[0])
    assert again.pid == processes[0].pid and again.ended is not None
    assert box.log.read_text() == "started\n"
    await other.aclose()


async def test_the_room_for_the_exit_record_is_taken_at_the_start(box: Box) -> None:
    process = await box.child("waits_for_go.py")
    await box.ready()
    [room] = box.records.glob(f"{process.key}.exit.json.*")
    taken = room.stat()
    assert taken.st_blocks * 512 >= 4096
    (box.folder / "go").write_text("6")
    assert (await process.wait()).exit_code == 6
    assert (box.records / f"{process.key}.exit.json").stat().st_ino == taken.st_ino


async def test_a_stop_that_cannot_be_recorded_is_a_stop(box: Box) -> None:
    process = await box.child("waits_for_go.py")
    await box.ready()
    (box.records / f"{process.key}.stop.json").mkdir()
    async with asyncio.timeout(LONG):
        await process.stop(0.1)
    assert not process.alive
    (box.records / f"{process.key}.stop.json").rmdir()


async def test_forgotten_records_are_gone(box: Box) -> None:
    process = await box.spawner.start(box.spec("sleep", "600"))
    await process.stop(1.0)
    process.forget()
    assert sorted(path.name for path in box.records.iterdir()) == ["zygote.log"]


async def test_many_at_once(box: Box) -> None:
    specs = [
        box.spec("sh", "-c", f"exit {n}", key=f"1-train-{n}.1", log=str(box.folder / f"{n}.log")) for n in range(64)
    ]
    processes = await asyncio.gather(*(box.spawner.start(spec) for spec in specs))
    ends = await asyncio.gather(*(process.wait() for process in processes))
    assert [end.exit_code for end in ends] == list(range(64))
    assert len({process.pid for process in processes}) == 64


async def test_the_fork_server_killed(box: Box) -> None:
    """Its scripts go on and their ends are recorded; the next start has a new one."""
    process = await box.child("waits_for_go.py")
    await box.ready()
    assert box.spawner._light is not None
    killed = box.spawner._light.child.pid
    os.kill(killed, signal.SIGKILL)
    second = await box.spawner.start(box.spec("true", key="1-train-2.1", log=str(box.folder / "second.log")))
    assert (await second.wait()).exit_code == 0
    assert lives(process.pid)
    (box.folder / "go").write_text("9")
    assert (await process.wait()).exit_code == 9


async def test_starts_while_the_fork_server_dies(box: Box) -> None:
    await (await box.spawner.start(box.spec("true"))).wait()
    assert box.spawner._light is not None
    pid = box.spawner._light.child.pid
    specs = [box.spec("sleep", "600", key=f"1-many-{n}.1", log=str(box.folder / f"{n}.log")) for n in range(32)]
    starts = [asyncio.create_task(box.spawner.start(spec)) for spec in specs]
    await until(lambda: len(list(box.records.glob("1-many-*.run.json"))) >= 4, "some starts")
    os.kill(pid, signal.SIGKILL)
    processes = await asyncio.gather(*starts)
    assert all(lives(process.pid) for process in processes)
    assert sorted(p.pid for p in Spawner.adopt(box.records) if p.alive) == sorted(p.pid for p in processes)


async def test_the_agent_killed(box: Box) -> None:
    """kill -9 of the agent: the script lives, its log has no gap, its exit code is there for the next agent."""
    agent = subprocess.Popen(
        [sys.executable, "-P", str(CHILDREN / "agent_side.py"), str(CHILDREN / "waits_for_go.py")], cwd=box.folder
    )
    try:
        await until((box.folder / "started").exists, "the start")
        await box.ready()
        (process,) = Spawner.adopt(box.records)
        zygotes = [pid for pid in _children(agent.pid)]
    finally:
        agent.kill()
        agent.wait()
    await until(lambda: not any(lives(pid) for pid in zygotes), "the fork server follows the agent")
    assert process.alive and lives(process.pid)
    again = Process.from_json(box.records, json.loads(json.dumps(process.to_json())))
    (box.folder / "go").write_text("9")
    ended = await again.wait()
    assert ended.exit_code == 9
    lines = (box.folder / "log").read_text().splitlines()
    assert lines == [str(n) for n in range(1, len(lines) + 1)]
    (adopted,) = Spawner.adopt(box.records)  # ended before this adoption
    assert await adopted.wait() == ended


async def test_the_agent_dies_while_a_script_is_started(box: Box) -> None:
    """Nobody hears that it was started; it runs all the same."""
    server = await box.spawner._light_server()
    os.kill(server.child.pid, signal.SIGSTOP)
    asked = asyncio.create_task(box.spawner.start(box.spec(sys.executable, str(CHILDREN / "waits_for_go.py"))))
    await until(lambda: server.pending, "the request")
    asked.cancel()
    server.writer.close()  # what was written is read before the end of file
    await server.writer.wait_closed()
    os.kill(server.child.pid, signal.SIGCONT)
    await box.ready()
    (process,) = Spawner.adopt(box.records)
    (box.folder / "go").write_text("7")
    assert (await process.wait()).exit_code == 7


async def test_the_waiter_killed(box: Box) -> None:
    """The waiter is part of the script: without it the script and all it started are gone, and the call is lost."""
    process = await box.child("setsid_grandchild.py", "stay")
    grandchild = int(await box.ready("child"))
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    os.kill(process.waiter_pid, signal.SIGKILL)
    async with asyncio.timeout(LONG):
        ended = await waiting
    assert ended.lost and ended.exit_code is None
    await until(lambda: not lives(process.pid) and not lives(grandchild), "all of it gone")
    assert not process.alive
    (adopted,) = Spawner.adopt(box.records)
    assert (await adopted.wait()).lost


async def test_another_boot_is_another_machine(box: Box) -> None:
    process = await box.spawner.start(box.spec("sleep", "600"))
    path = box.records / "1-train-1.1.run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "boot_id": "another"}))
    (stranger,) = Spawner.adopt(box.records)
    assert not stranger.alive
    assert (await stranger.wait()).lost
    assert lives(process.pid)
    path.write_text(json.dumps(record))


async def test_a_reused_pid_is_another_process(box: Box) -> None:
    process = await box.spawner.start(box.spec("sleep", "600"))
    record = {**process.to_json(), "key": "1-other-1.1", "waiter_start": "1", "pid_start": "1"}
    stranger = Process.from_json(box.records, record)
    assert not stranger.alive
    stranger.signal(signal.SIGKILL)
    assert (await stranger.wait()).lost
    assert process.alive


async def test_a_damaged_record_is_named_and_left(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    (box.records / "1-bad-1.1.run.json").write_text("{")
    assert Spawner.adopt(box.records) == []
    assert "1-bad-1.1.run.json is no run record" in caplog.text


# ---- Python Works ----------------------------------------------------------------------------------------------------


async def test_an_app_that_cannot_be_imported(box: Box) -> None:
    app = box.folder / "app.py"
    app.write_text("import sys\nprint('importing', sys.argv)\n\ndef broken():\n    return 1 / 0\n\nbroken()\n")
    spawner = Spawner(box.records, warm_app=str(app), argv=["--x", "1"])
    with pytest.raises(SpawnError, match=r"app.py cannot be imported: ZeroDivisionError") as caught:
        await spawner.start(box.spec(python={}))
    first, second, *_ = caught.value.traceback.splitlines()
    assert first.startswith("Traceback") and str(app) in second
    assert "return 1 / 0" in caught.value.traceback
    assert (box.records / "warm.log").read_text() == f"importing {[str(app), '--x', '1']}\n"
    script = await spawner.start(box.spec("true"))  # scripts do not care
    assert (await script.wait()).exit_code == 0
    app.write_text("import app\n")
    await spawner.warm()  # repaired
    await spawner.aclose()


async def test_an_app_named_like_a_module(box: Box) -> None:
    app = box.folder / "json.py"
    app.write_text("")
    spawner = Spawner(box.records, warm_app=str(app))
    with pytest.raises(SpawnError, match="has the name of a module"):
        await spawner.warm()
    await spawner.aclose()


async def test_an_error_in_a_python_work_is_its_exit_code(box: Box) -> None:
    """What is no order for `pywork` ends with a traceback in the log."""
    (box.folder / "app.py").write_text("")
    spawner = Spawner(box.records, warm_app=str(box.folder / "app.py"))
    process = await spawner.start(box.spec(python={"nonsense": 1}))
    ended = await process.wait()
    assert (ended.exit_code, ended.error) == (1, "")
    assert "ValidationError" in box.log.read_text()
    await spawner.aclose()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
