"""What runs on a machine where Works run: the agent, its processes, and `report` for scripts that want it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from orch_workers.report import report

__all__ = ["report"]


def __getattr__(name: str) -> object:
    # Lazy: the fork server imports this package too, and every module it holds is memory of each waiter.
    if name == "report":
        import sys
        from importlib import import_module

        function = import_module("orch_workers.report").report
        # The submodule has the same name: put the function where the import system has just put the module.
        setattr(sys.modules[__name__], name, function)
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
