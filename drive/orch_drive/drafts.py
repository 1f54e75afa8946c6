"""Files on their way into somebody's folder: named so that whoever comes later can tell those of killed processes."""

from __future__ import annotations

import os
import secrets
import socket
import zlib
from pathlib import Path

__all__ = ["OWN_FOLDER", "PREFIX", "draft_in", "process_exists", "sweep"]

OWN_FOLDER = ".orch"
"""An app's own folder is never published: its token, its state, its Drive."""
PREFIX = ".orch-tmp-"


def draft_in(folder: Path) -> Path:
    """A new name in that folder, of this process."""
    return folder / f"{PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def sweep(folder: Path) -> None:
    """Remove what processes of this machine have left there that are gone. Another machine's may be at work."""
    for draft in folder.glob(f"{PREFIX}{_host()}-*"):
        pid = draft.name.split("-")[-2]
        if pid.isdigit() and not process_exists(int(pid)):
            draft.unlink(missing_ok=True)


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def process_exists(pid: int) -> bool:
    """Whether some process of this machine has that pid, a zombie included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
