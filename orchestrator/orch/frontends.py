"""What a tab can show besides a Work: a Streamlit page, or a folder of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orch.errors import StateTypeError

__all__ = ["Frontend", "StaticFrontend", "StreamlitFrontend"]


class Frontend:
    """Base of the frontends that `configure_layout` may return."""

    def key(self) -> dict[str, Any]:
        """JSON that says what is shown; equal keys mean the same frontend."""
        raise NotImplementedError


class StreamlitFrontend(Frontend):
    """A Streamlit page: a module-level `render_fn(state)`, `"file.py:function"` or `"page.py"`.

    A file is not imported by the flow server, only by the page's own process.
    """

    def __init__(self, render_fn: Callable[..., Any] | str) -> None:
        if isinstance(render_fn, str):
            file, _, function = render_fn.partition(":")
            if not file.endswith(".py"):
                raise StateTypeError(f"StreamlitFrontend({render_fn!r}): give 'file.py:function' or 'page.py'")
            self.source = f"{file}:{function}" if function else file
            self.file: str | None = file
        else:
            qualname = getattr(render_fn, "__qualname__", "")
            if not callable(render_fn) or not qualname or "<" in qualname or "." in qualname:
                raise StateTypeError(
                    f"StreamlitFrontend({render_fn!r}): a function at the top level of a module is needed",
                    hint="the page runs in a process of its own and imports the function by name",
                )
            self.source = f"{render_fn.__module__}:{qualname}"
            self.file = None

    def key(self) -> dict[str, Any]:
        return {"streamlit": self.source}


class StaticFrontend(Frontend):
    """A folder of files with an index.html, relative to app.py's folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)

    def key(self) -> dict[str, Any]:
        return {"static": self.folder}
