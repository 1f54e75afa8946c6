"""The process that speaks to a Ray cluster for the flow server: `python -P -m orch.runtimes.ray_driver`.

Ray ends a driver's process, without asking it, when the cluster's head has been gone for a while, prints as it likes,
and blocks in calls that have no timeout. None of that may happen to a flow server: it starts this process, and starts
it again when it has ended. Standard input is one end of a socket pair; it ends when the other end is closed.

    first line   {"address", "package", "modules", "packages", "ship", "namespace", "machines"}
    answer       {"ready": true} or {"ready": false, "message", "hint"}
    request      {"id", "do": launch | watch | look | kill | reach | sweep | cancel, ...}
    answer       {"id", "ok": ...} or {"id", "error": kind, "message", "hint"}
    unasked      {"gone": [actor id, epoch], "why"}; {"waiting": agent}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import exceptions
from ray.util import accelerators
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orch.runtimes import ray_place
from orch.runtimes.ray_fit import misfit, wanted

log = logging.getLogger("orch.ray")

T = TypeVar("T")

SAY_AFTER = 2.0
"""Seconds after which it is said what a launch waits for."""
ASK_AGAIN = 2.0
"""Seconds between attempts to hear of an actor that cannot be reached."""
ANSWER = 5.0
"""Seconds that an actor has for an answer."""
GCS_ANSWER = 10.0
BUILD_TIMEOUT = 1800
TAIL_LINES = 15


class Refused(Exception):
    """What a request is answered with: the kind of error, the message, what to do."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(kind, message, hint)


class Driver:
    def __init__(self, config: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        self.config = config
        self.send = send
        self.place: Any = None
        self.seen: dict[str, dict[str, float]] = {}
        """What every machine has that there was: one that is lost may come back, or another like it."""
        self.requests: dict[int, asyncio.Task[None]] = {}
        self.watches: dict[tuple[str, int], asyncio.Task[None]] = {}

    # -- the cluster

    def connect(self) -> None:
        """Blocks. Raises what Ray raises."""
        self._init({})
        if self.config["ship"] or (self.config["ship"] is None and not self._has_orch()):
            ray.shutdown()
            self._init({"py_modules": self.config["modules"], "pip": _pip(self.config["packages"])})
        ray.cloudpickle.register_pickle_by_value(ray_place)
        self.place = ray.remote(ray_place.Place)

    def _init(self, environment: dict[str, Any]) -> None:
        if self.config["package"]:
            environment = {"working_dir": self.config["package"], **environment}
        if environment:
            environment["config"] = {"setup_timeout_seconds": BUILD_TIMEOUT}
        ray.init(
            address=self.config["address"],
            namespace=self.config["namespace"],
            runtime_env=environment or None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )

    def _has_orch(self) -> bool:
        """Whether the cluster's Python has this very orch. One machine is asked: they are alike, or actors will say."""

        def versions() -> tuple[str, int] | None:
            try:
                from orch import __version__
                from orch.wire import PROTOCOL
            except ImportError:
                return None
            return __version__, PROTOCOL

        return bool(ray.get(ray.remote(versions).options(num_cpus=0).remote()) == versions())

    async def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await asyncio.wait_for(asyncio.to_thread(ray.nodes), GCS_ANSWER)
        return found

    async def find(self, name: str) -> Any:
        """The living (or awaited) actor of that name, or None."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(ray.get_actor, name), GCS_ANSWER)
        except ValueError:
            return None

    # -- requests

    def take(self, request: dict[str, Any]) -> None:
        if request["do"] == "cancel":
            task = self.requests.get(request["of"])
            if task is not None:
                task.cancel()
            return
        self.requests[request["id"]] = asyncio.create_task(self._answer(request), name=request["do"])

    async def finish(self) -> None:
        """Nobody asks any more: what was asked is done, but nobody would know of what is launched."""
        for task in self.requests.values():
            if task.get_name() == "launch":
                task.cancel()
        if self.requests:
            await asyncio.wait(self.requests.values(), timeout=ANSWER)

    async def _answer(self, request: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            answer["ok"] = await getattr(self, f"do_{request['do']}")(**request["with"])
        except Refused as error:
            answer |= dict(zip(("error", "message", "hint"), error.args, strict=True))
        except Exception as error:
            log.exception("%s", request["do"])
            answer |= {"error": "lost", "message": _first_line(error), "hint": ""}
        finally:
            del self.requests[request["id"]]
        self.send(answer)

    async def do_launch(
        self, name: str, spec: dict[str, Any], machine: str, build: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The handle, once the agent answers."""
        who = spec["agent"]
        while True:
            actor = await self.find(name)
            new = actor is None
            if new:
                needs = await self._feasible(spec, machine)
                actor = await asyncio.to_thread(self._create, name, spec, needs, build)
            try:
                answer = await self._start(actor, spec)
            except asyncio.CancelledError:
                if new:  # nothing runs there, and nobody would know of it
                    ray.kill(actor)
                raise
            except exceptions.ActorUnavailableError:
                await asyncio.sleep(ASK_AGAIN)  # it may have started: asked again, it says so
                continue
            except exceptions.ActorDiedError as error:
                if not new:
                    continue
                raise Refused(
                    "died", f"the actor of {spec['agent']} has died while it started: {_why(error)}"
                ) from None
            except exceptions.RuntimeEnvSetupError as error:
                raise Refused(
                    "build_failed", f"the environment of {spec['agent']} cannot be made: {_tail(error)}"
                ) from None
            except exceptions.ActorUnschedulableError as error:
                raise Refused("infeasible", f"{who} cannot be placed: {_first_line(error)}") from None
            if "error" in answer:
                if new:
                    ray.kill(actor)
                raise Refused(answer["error"], answer["message"], answer["hint"])
            handle: dict[str, Any] = {**answer["handle"], "actor": name}
            self.watch(handle)
            return handle

    async def _feasible(self, spec: dict[str, Any], machine: str) -> dict[str, float]:
        """What it needs. Raises Refused if no machine has that, nor one that could be launched."""
        nodes = [node for node in await self.nodes() if node["Alive"]]
        shapes = [node["Resources"] for node in nodes] + self.config["machines"]
        self.seen |= {node["NodeID"]: node["Resources"] for node in nodes}
        possible = [*shapes, *self.seen.values()]
        needs = wanted(
            spec.get("compute", {}),
            machine=machine,
            offered={name for shape in possible for name in shape},
            accelerators=_accelerators(),
        )
        # Ray's autoscaler names the group of each machine that it has launched. What it could launch is told to nobody.
        autoscaled = not self.config["machines"] and any("ray.io/node-group" in node["Labels"] for node in nodes)
        if misfit(needs, possible) and not autoscaled:
            raise Refused("infeasible", f"{spec['agent']} cannot be placed: {misfit(needs, shapes)}")
        return needs

    def _create(self, name: str, spec: dict[str, Any], needs: dict[str, float], build: dict[str, Any] | None) -> Any:
        rest = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU", "memory")}
        place = self.place.options(
            name=name,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=0,
            num_cpus=needs.get("CPU", 0),
            num_gpus=needs.get("GPU", 0),
            memory=needs.get("memory"),
            resources=rest or None,
            runtime_env={**build, "config": {"setup_timeout_seconds": BUILD_TIMEOUT}} if build else None,
            enable_task_events=False,
        )
        return place.remote(spec["app_id"], spec["agent"], "CPU" in needs)

    async def _start(self, actor: Any, spec: dict[str, Any]) -> dict[str, Any]:
        ref = actor.start.remote(spec)
        answer = asyncio.wrap_future(ref.future())
        done, _ = await asyncio.wait([answer], timeout=SAY_AFTER)
        if not done:
            self.send({"waiting": spec["agent"]})
        found: dict[str, Any] = await answer
        return found

    async def do_watch(self, handle: dict[str, Any]) -> str | None:
        """Tell when it has ended. What is known of it now: None, or why it has ended."""
        self.watch(handle)
        return await self.do_look(handle)

    async def do_look(self, handle: dict[str, Any]) -> str | None:
        """Why the agent has ended, if that is certain."""
        return await self._verdict(handle, lambda actor: asyncio.wait_for(_future(actor.look, handle), ANSWER))

    async def do_kill(self, handle: dict[str, Any]) -> bool:
        """End the agent's actor, unless a newer incarnation lives in it. Whether there was anything to end."""
        actor = await self.find(handle["actor"])
        if actor is None or _id(actor) != handle["actor_id"]:
            return False
        with contextlib.suppress(TimeoutError, exceptions.RayError):
            if await asyncio.wait_for(_future(actor.living), ANSWER) > handle["epoch"]:
                return False
        ray.kill(actor)
        return True

    async def do_lives(self, handle: dict[str, Any]) -> bool:
        """Whether the place of this agent, which has ended, may be there for another one. If not, its scripts have
        ended too: they have their grace when their actor dies, and the answer waits for that."""

        async def living(actor: Any) -> None:
            await asyncio.wait_for(_future(actor.living), ANSWER)

        if await self._verdict(handle, living) is None:
            return True
        there = NodeAffinitySchedulingStrategy(handle["node"], soft=False)
        look = ray.remote(ray_place.cleared).options(
            num_cpus=0, max_retries=0, scheduling_strategy=there, enable_task_events=False
        )
        try:
            await asyncio.wrap_future(look.remote(handle["folder"]).future())
        except exceptions.RayError as error:
            log.info("%s cannot be looked at: %s", handle["folder"], _first_line(error))
            return True
        return False

    async def do_host(self) -> str:
        return str(ray.util.get_node_ip_address())

    async def do_reach(self) -> bool:
        await self.nodes()
        return True

    async def do_sweep(self, prefix: str, exact: bool = False) -> list[str]:
        """End every actor of an app, or (`exact`) that one; their names."""
        found = await asyncio.wait_for(asyncio.to_thread(ray.util.list_named_actors), GCS_ANSWER)
        ended = []
        for name in found:
            named = name == prefix if exact else name.startswith(prefix)
            if named and (actor := await self.find(name)) is not None:
                ray.kill(actor)
                ended.append(name)
        return ended

    # -- watching

    def watch(self, handle: dict[str, Any]) -> None:
        key = (handle["actor_id"], handle["epoch"])
        if key not in self.watches:
            self.watches[key] = asyncio.create_task(self._watch(key, handle))

    async def _watch(self, key: tuple[str, int], handle: dict[str, Any]) -> None:
        why = None
        while why is None:
            why = await self._verdict(handle, lambda actor: _future(actor.gone, handle))
            if why is None:
                await asyncio.sleep(ASK_AGAIN)
        del self.watches[key]
        self.send({"gone": list(key), "why": why})

    async def _verdict(self, handle: dict[str, Any], ask: Callable[[Any], Awaitable[str | None]]) -> str | None:
        """What the actor says, or that it is dead: of its own and not with its machine, of which Ray cannot know
        whether it is dead or out of reach. None also if nobody says anything."""
        try:
            actor = await self.find(handle["actor"])
            if actor is not None and _id(actor) == handle["actor_id"]:
                return await ask(actor)
            why = "its actor has ended"
        except exceptions.ActorDiedError as error:
            why = f"its actor has died ({_why(error)})"
        except Exception as error:  # whatever it is, it is no proof of death
            log.info("%s cannot be asked: %s", handle["actor"], _first_line(error))
            return None
        try:
            nodes = await self.nodes()
        except Exception as error:
            log.info("the cluster does not answer: %s", _first_line(error))
            return None
        return why if any(node["NodeID"] == handle["node"] and node["Alive"] for node in nodes) else None


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _future(method: Any, handle: dict[str, Any] | None = None) -> asyncio.Future[Any]:
    ref = method.remote(handle["epoch"]) if handle is not None else method.remote()
    return asyncio.wrap_future(ref.future())


def _id(actor: Any) -> str:
    name: str = actor._actor_id.hex()
    return name


def _pip(packages: list[str]) -> dict[str, Any]:
    return {"packages": packages, "pip_check": False}


def _accelerators() -> set[str]:
    return {value for name, value in vars(accelerators).items() if name.isupper() and isinstance(value, str)}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _why(error: BaseException) -> str:
    """The line of an ActorDiedError that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fields = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:")
    said = [line for line in lines[1:] if not line.startswith(fields)] or lines
    return said[0].partition(" Some common causes include")[0][:300]


def _tail(error: BaseException) -> str:
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])


async def serve(control: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(32, thread_name_prefix="ray"))
    reader, writer = await asyncio.open_connection(sock=control, limit=1 << 24)

    def send(answer: dict[str, Any]) -> None:
        writer.write(json.dumps(answer).encode() + b"\n")

    driver = Driver(json.loads(await reader.readline()), send)
    try:
        await asyncio.to_thread(driver.connect)
    except Exception as error:
        log.exception("cannot connect")
        send({"ready": False, "message": _first_line(error), "hint": ""})
        await writer.drain()
        return
    send({"ready": True})
    while line := await reader.readline():
        driver.take(json.loads(line))
    await driver.finish()


def main() -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    with contextlib.suppress(ConnectionError):
        asyncio.run(serve(control))
    # No farewell to Ray: it may hang, and a driver that is gone is all the same to detached actors.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
