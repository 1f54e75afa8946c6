"""The Runtime seam: what places agents. Like Popen, but the handle can be stored and adopted by a later process."""

from __future__ import annotations

from typing import Any, Protocol

from orch.wire import AgentSpec

__all__ = ["Handle", "Runtime"]

Handle = dict[str, Any]
"""JSON: whatever the runtime needs to find its agent again; always has "agent", "epoch", "url", "token"."""


class Runtime(Protocol):
    """Implementations: local, ray, fake. One contract suite runs over all of them."""

    name: str

    async def launch(self, spec: AgentSpec) -> Handle:
        """Start an agent and wait until it answers. Raises RuntimeLost with the reason."""

    async def poll(self, handle: Handle) -> str | None:
        """None while the agent's process lives, else why it ended."""

    async def kill(self, handle: Handle) -> None:
        """End the agent itself, at once; the scripts' waiters are not its business."""

    async def ended(self, handle: Handle, timeout: float) -> bool:
        """True once the agent's process has ended; False if that takes longer than `timeout` seconds."""

    async def adopt(self, handle: Handle) -> bool:
        """True if the handle's agent (this incarnation) is alive."""
