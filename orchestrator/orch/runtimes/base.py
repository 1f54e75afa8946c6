"""The Runtime seam: what places agents. Like Popen, but the handle can be stored and adopted by a later process."""

from __future__ import annotations

from typing import Any, Protocol

from orch.errors import RuntimeLost
from orch.wire import AgentSpec

__all__ = ["AgentDied", "BuildFailed", "Handle", "Infeasible", "PlacementError", "Runtime"]

Handle = dict[str, Any]
"""JSON: whatever the runtime needs to find its agent again; always has "agent", "epoch", "url", "token", "port" and
"pid"."""


class AgentDied(RuntimeLost):
    """The agent was killed before it was known: starting another one may help."""


class PlacementError(RuntimeLost):
    """The agent cannot be placed, and asking again does not help."""

    reason = "exception"
    """Of its Work's calls, which fail with it (`orch.calls.Reason`)."""


class Infeasible(PlacementError):
    """No machine that there is, or that can be had, has what the Work declares."""

    reason = "infeasible"


class BuildFailed(PlacementError):
    """The environment that the Work declares cannot be made."""

    reason = "build_failed"


class Runtime(Protocol):
    """Implementations: local, ray, fake. One contract suite runs over all of them."""

    name: str
    orphan_timeout: float | None
    """Seconds without contact after which an agent stops its scripts and leaves; None: never."""
    shared_records: bool
    """A new incarnation of an agent finds what all before it have written down. Else a handle's "since" says which is
    the first whose records it has, if not it itself."""
    own_places: bool
    """Every Work has an agent of its own, placed when it is needed; else one serves them all."""
    shared_files: bool
    """Its agents' logs are files of this machine."""

    async def launch(self, spec: AgentSpec) -> Handle:
        """Start an agent and wait until it answers, for as long as what it needs is in use by others; whoever waits may
        be cancelled. Raises RuntimeLost with the reason: AgentDied if the agent was killed, Infeasible, BuildFailed."""

    async def poll(self, handle: Handle) -> str | None:
        """None while the agent's process may be alive, else why it ended. Answers at once."""

    async def adoptable(self, handle: Handle) -> bool:
        """Of an agent that has ended: whether the next one would find its records, and its scripts where they run.
        False is certain too: all that ran there has ended with it."""

    async def kill(self, handle: Handle) -> None:
        """End the agent itself, at once, and give its place back; where that is a machine that goes on, the scripts'
        waiters are not its business."""

    async def ended(self, handle: Handle, timeout: float) -> bool:
        """True once the agent's process has ended; False if that takes longer than `timeout` seconds."""

    async def reachable(self) -> bool:
        """Whether this machine reaches anything of the runtime: else a silent agent says nothing about that agent."""

    def found(self, agent: str) -> Handle | None:
        """The handle of an agent that an earlier server left."""

    async def sweep(self) -> list[str]:
        """End every agent of this app that is left anywhere, and give their places back. What was ended, for the
        user."""

    def kill_started(self) -> None:
        """End every agent that this object has launched: the app cannot be loaded, they have nothing to do."""

    def reap(self) -> None:
        """Collect agents that have exited."""

    async def adopt(self, handle: Handle) -> bool:
        """True unless the handle's agent (this incarnation) has ended for sure."""

    async def host(self) -> str:
        """The address of this machine under which its agents reach it."""

    def waits(self, agent: str) -> str:
        """What a launch that is under way waits for, for people to read; empty if it does not."""

    def close(self) -> None:
        """Let go of everything that this process holds for it: agents live on."""
