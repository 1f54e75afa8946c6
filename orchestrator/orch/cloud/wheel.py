"""The orch that runs here, as a wheel: what a machine of the cloud installs is what the user has, byte for byte."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import zipfile
from pathlib import Path

from orch.errors import OrchError

__all__ = ["build_wheel"]

PACKAGES = ("orch", "orch_workers", "orch_drive", "orch_ui")
EPOCH = (1980, 1, 1, 0, 0, 0)
SKIPPED = {"__pycache__"}


def build_wheel(folder: Path) -> Path:
    """Write it into the folder; the same orch makes the same bytes. Raises OrchError."""
    distribution = importlib.metadata.distribution("orch")
    version = distribution.version
    info = f"orch-{version}.dist-info"
    contents: dict[str, bytes] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise OrchError(f"the package {package} of orch cannot be found", hint="install orch anew")
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*")):
            below = path.relative_to(root)
            if path.is_file() and not SKIPPED.intersection(below.parts):
                contents[f"{package}/{below.as_posix()}"] = path.read_bytes()
    contents[f"{info}/METADATA"] = (distribution.read_text("METADATA") or "").encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: orch\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in contents.items())
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = folder / f"orch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return wheel


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
