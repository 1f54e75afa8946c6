"""App: one Flow tree with its Works, its Drive and its state."""

from __future__ import annotations

from orch.component import Component
from orch.errors import UsageError
from orch.flow import Flow
from orch.work import Work

__all__ = ["App"]


class App:
    """What an app file defines, once, at module level.

    Args:
        root: the Flow that orchestrates, or a single Work: then the app stops once it has succeeded.
        name: shown in the page's title, in `orch ps` and to other apps; default: the folder's name.
    """

    def __init__(self, root: Flow | Work, *, name: str | None = None) -> None:
        if not isinstance(root, Flow | Work):
            raise UsageError(f"App({root!r}): the root must be a Flow or a Work")
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise UsageError(f"App(name={name!r}): a non-empty str is needed")
        if root._parent is not None:
            raise UsageError(f"App({root!r}): it already belongs to {root._parent.name}")
        self.root = root
        self.name = name

    def get(self, name: str) -> Component:
        """The component called `root.ui.trainer`.

        Raises: ValueError for a wrong prefix, AttributeError naming parent and child for an unknown child.
        """
        from orch.program import find_component

        return find_component(self.root, name)

    def works(self) -> list[Work]:
        """Every Work of the app."""
        if isinstance(self.root, Work):
            return [self.root]
        return self.root.works()

    def named_works(self) -> list[tuple[str, Work]]:
        return [(work.name, work) for work in self.works()]

    @property
    def flows(self) -> dict[str, Flow]:
        """Every Flow of the app by name, the root first."""
        return {} if isinstance(self.root, Work) else {flow.name: flow for flow in self.root._flows_first()}

    def __repr__(self) -> str:
        return f"App({self.root!r}, name={self.name!r})"
