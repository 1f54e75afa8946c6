"""The Runtime seam: what places agents. Like Popen, but the handle can be stored and adopted by a later process."""

from __future__ import annotations

from typing import Any, Protocol

from orch.errors import RuntimeLost
from orch.wire import AgentSpec

__all__ = ["AgentDied", "Handle", "Runtime"]

Handle = dict[str, Any]
"""JSON: whatever the runtime needs to find its agent again; always has "agent", "epoch", "url", "token"."""


class AgentDied(RuntimeLost):
    """The agent was killed before it was known: starting another one may help."""


class Runtime(Protocol):
    """Implementations: local, ray, fake. One contract suite runs over all of them."""

    name: str
    orphan_timeout: float | None
    """Seconds without contact after which an agent stops its scripts and leaves; None: never."""
    shared_records: bool
    """A new incarnation of an agent finds what the one before has written down."""

    async def launch(self, spec: AgentSpec) -> Handle:
        """Start an agent and wait until it answers. Raises RuntimeLost with the reason, AgentDied if it was killed."""

    async def poll(self, handle: Handle) -> str | None:
        """None while the agent's process lives, else why it ended."""

    async def kill(self, handle: Handle) -> None:
        """End the agent itself, at once; the scripts' waiters are not its business."""

    async def ended(self, handle: Handle, timeout: float) -> bool:
        """True once the agent's process has ended; False if that takes longer than `timeout` seconds."""

    async def reachable(self) -> bool:
        """Whether this machine reaches anything of the runtime: else a silent agent says nothing about that agent."""

    def found(self, agent: str) -> Handle | None:
        """The handle of an agent that an earlier server left."""

    def kill_started(self) -> None:
        """End every agent that this object has launched: the app cannot be loaded, they have nothing to do."""

    def reap(self) -> None:
        """Collect agents that have exited."""

    async def adopt(self, handle: Handle) -> bool:
        """True if the handle's agent (this incarnation) is alive."""
