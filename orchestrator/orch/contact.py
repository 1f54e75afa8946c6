"""Contact with agents: how long each has been silent, what a lease has to be, and when a silence may be acted on. PURE.

A silent agent is a suspect, after `UNKNOWN_AFTER` its Works are `unknown`, and after a Work's `lost_after` its
`on_lost` is done. Many that fall silent together say more of the network between than of themselves: then a circuit
breaker keeps the flow from acting on any of them.
"""

from __future__ import annotations

__all__ = ["UNKNOWN_AFTER", "Contacts", "lease_for"]

UNKNOWN_AFTER = 10.0
"""Seconds of silence after which nothing is known of an agent."""
BREAKER_WINDOW = 10.0
BREAKER_AGENTS = 3
BREAKER_SHARE = 0.5
BREAKER_HOSTS = 2
BREAKER_TIME = 600.0
CLOCK_DRIFT = 0.9
"""An agent's clock may be 10 % slower than the flow's."""


def lease_for(lost_after: float, grace: float) -> tuple[float, float]:
    """(seconds after the last contact at which a script gets its TERM, seconds from there to the KILL).

    With the KILL everything is over, `grace` before the flow's patience of `lost_after` is, however the clocks drift.
    Where `lost_after` is too short for such a grace, a third of it has to do.

    Source: C. Gray, D. Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache
    consistency", SOSP 1989: the holder's term ends before the grantor's, by the bound on the clocks' drift.
    """
    grace = min(grace, lost_after / 3)
    return CLOCK_DRIFT * (lost_after - grace) - grace, grace


class Contacts:
    """The silences of one flow's agents. Times are seconds on a clock of the caller's that nobody sets."""

    def __init__(self) -> None:
        self._hosts: dict[str, str] = {}
        self._quiet: dict[str, float] = {}
        """Of the silent ones: the last sign of life."""
        self._held: set[str] = set()
        """The breaker is open for these."""
        self._until = 0.0
        self._judged: set[str] = set()
        """Silent ones that a breaker has held back long enough."""

    def know(self, agent: str, host: str) -> None:
        self._hosts[agent] = host

    def forget(self, agent: str) -> None:
        for known in (self._hosts, self._quiet):
            known.pop(agent, None)
        self._held.discard(agent)
        self._judged.discard(agent)

    def heard(self, agent: str) -> str:
        """A sign of life. What there is to say of it, or an empty string."""
        self._quiet.pop(agent, None)
        self._judged.discard(agent)
        if agent not in self._held:
            return ""
        self._judged |= self._held - {agent}
        self._held = set()
        return f"agent {agent} answers again: contact with single agents may have been lost, not with all"

    def missed(self, agent: str, silence: float, clock: float) -> None:
        """It did not answer, at `clock`, and was last heard `silence` seconds ago."""
        self._quiet[agent] = clock - silence

    def held(self, agent: str, clock: float) -> tuple[bool, str]:
        """(whether nothing may be done about this agent's silence yet, what there is to say of that)."""
        if self._held and clock >= self._until:
            self._judged |= self._held
            self._held = set()
            if agent in self._judged:
                return False, f"contact with several agents is lost for {BREAKER_TIME / 60:g} minutes: acting on it"
        if agent in self._held:
            return True, ""
        together = self._together(agent)
        hosts = {self._hosts.get(name, name) for name in together}
        if (
            agent in self._judged
            or len(together) < BREAKER_AGENTS
            or len(together) < BREAKER_SHARE * len(self._hosts)
            or len(hosts) < BREAKER_HOSTS
        ):
            return False, ""
        if not self._held:
            self._until = clock + BREAKER_TIME
        self._held |= together
        return True, (
            f"contact with {len(together)} of {len(self._hosts)} agents was lost within {BREAKER_WINDOW:g} s: "
            f"nothing is done about any of them until one answers, or for {BREAKER_TIME / 60:g} minutes"
        )

    def _together(self, agent: str) -> set[str]:
        """The most agents, this one among them, that fell silent within one window."""
        best: set[str] = set()
        mine = self._quiet[agent]
        for begin in self._quiet.values():
            if begin <= mine <= begin + BREAKER_WINDOW:
                inside = {name for name, quiet in self._quiet.items() if begin <= quiet <= begin + BREAKER_WINDOW}
                best = max(best, inside, key=len)
        return best
