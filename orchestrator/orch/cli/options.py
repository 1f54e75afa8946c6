"""What `orch run` was asked to do, as data. The service reads it; the parsing is in `run.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["DEFAULT_PORT", "Mode", "RunOptions"]

DEFAULT_PORT = 7501

Mode = Literal["local", "ray", "aws"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """A checked command line of `orch run`."""

    app_file: Path
    """Absolute path of the app file; it exists."""
    mode: Mode = "local"
    address: str | None = None
    """Of the Ray cluster, with mode "ray"."""
    name: str | None = None
    """None: the App's own name, else the folder's."""
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    """The port to serve on, `DEFAULT_PORT` unless `--port` is given; 0 asks for a free one."""
    port_given: bool = False
    """Whether the user asked for it: a run that is resumed otherwise goes back to the port that it had."""
    allow_hosts: tuple[str, ...] = ()
    open: bool | None = None
    """Open a browser: True, False, or None for "only on a terminal"."""
    detach: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    """For every script; `--env` over `--env-file`."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment too, but never written down or shown."""
    drive: str | None = None
    """fsspec URL of the app's Drive; None: `.orch/drive`."""
    durable: bool = False
    resume: bool = False
    fresh: bool = False
    dry_run: bool = False
    yes: bool = False
    argv: tuple[str, ...] = ()
    """What followed `--`: the app file's `sys.argv[1:]`."""
