"""orch: turn training and inference scripts that work into an app, without changing them.

    from orch import App, Flow, ScriptWork

    class Train(Flow):
        def __init__(self):
            super().__init__()
            self.train = ScriptWork("train.py", outputs=["lightning_logs"])

        def run(self):
            self.train.run("--epochs 2")

    app = App(Train())

Names are imported when they are first used: `import orch` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orch._version import __version__

if TYPE_CHECKING:
    from orch.api import Delete, Get, Post, Put
    from orch.app import App
    from orch.appstate import AppState
    from orch.calls import Call, Reason, Stage
    from orch.compute import BuildConfig, CloudCompute
    from orch.flow import Flow
    from orch.frontends import StaticFrontend, StreamlitFrontend
    from orch.scripts import ScriptWork, ServiceWork
    from orch.structures import Dict, List
    from orch.work import Work
    from orch_drive import Drive

__all__ = [
    "App",
    "AppState",
    "BuildConfig",
    "Call",
    "CloudCompute",
    "Delete",
    "Dict",
    "Drive",
    "Flow",
    "Get",
    "List",
    "Post",
    "Put",
    "Reason",
    "ScriptWork",
    "ServiceWork",
    "Stage",
    "StaticFrontend",
    "StreamlitFrontend",
    "Work",
    "__version__",
]

_HOME = {
    "App": "orch.app",
    "AppState": "orch.appstate",
    "BuildConfig": "orch.compute",
    "Call": "orch.calls",
    "CloudCompute": "orch.compute",
    "Delete": "orch.api",
    "Dict": "orch.structures",
    "Drive": "orch_drive",
    "Flow": "orch.flow",
    "Get": "orch.api",
    "List": "orch.structures",
    "Post": "orch.api",
    "Put": "orch.api",
    "Reason": "orch.calls",
    "ScriptWork": "orch.scripts",
    "ServiceWork": "orch.scripts",
    "Stage": "orch.calls",
    "StaticFrontend": "orch.frontends",
    "StreamlitFrontend": "orch.frontends",
    "Work": "orch.work",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orch' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
