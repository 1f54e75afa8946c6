"""Files shared by Works: content-addressed, versioned, verified; on local disk or behind any fsspec URL.

    from orch_drive import Drive

    drive = Drive("models")      # under the app's drive URL
    drive.put("checkpoints")     # a file or a directory, one version, all or nothing
    drive.get("checkpoints")     # verified, file by file by rename

Rooms: `drive` (what users call), `store` (publish, resolve, fetch, versions, gc), `storage` (bytes: local disk and
fsspec), `s3` (bytes in a bucket), `manifest` (PURE: what a version consists of, which file a path means), `errors`.
Importing the package loads only `drive` and `errors`; fsspec and the S3 libraries are loaded by the first Drive that
needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orch_drive.drive import Drive
from orch_drive.errors import (
    DriveAmbiguous,
    DriveConflict,
    DriveCorrupt,
    DriveError,
    DriveNotFound,
    DriveNotHere,
    DrivePathError,
    DriveStaleEpoch,
    DriveUnavailable,
)

if TYPE_CHECKING:
    from orch_drive.manifest import Entry, Manifest, ManifestIndex, VersionInfo
    from orch_drive.store import DriveStore

__all__ = [
    "Drive",
    "DriveAmbiguous",
    "DriveConflict",
    "DriveCorrupt",
    "DriveError",
    "DriveNotFound",
    "DriveNotHere",
    "DrivePathError",
    "DriveStaleEpoch",
    "DriveStore",
    "DriveUnavailable",
    "Entry",
    "Manifest",
    "ManifestIndex",
    "VersionInfo",
]

_LAZY = {
    "DriveStore": "store",
    "Entry": "manifest",
    "Manifest": "manifest",
    "ManifestIndex": "manifest",
    "VersionInfo": "manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'orch_drive' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"orch_drive.{_LAZY[name]}"), name)
