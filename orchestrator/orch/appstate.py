"""`orch.AppState` lives in the ui package, which stands on this one; it is found by name when it is first used."""

from importlib import import_module

AppState = import_module("orch_ui.state").AppState

__all__ = ["AppState"]
