"""One run of a page in its Streamlit process: find the user's function, give it the state, show what goes wrong."""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from orch.errors import StateConflict
from orch_ui.state import AppServer, AppState, ScriptRun, current_run
from orch_ui.watch import Watcher

__all__ = ["load", "show"]

CONFLICT = "orch: the last click met a conflict"
REPEAT = "Changed elsewhere, please repeat."

_watchers: dict[AppServer, Watcher] = {}
_modules: dict[str, tuple[int, ModuleType]] = {}
_lock = threading.Lock()


def show() -> None:
    """Run the page that ORCH_RENDER_FN names, once. What it has read is watched: a change runs it again."""
    context = get_script_run_ctx()
    if context is None:
        raise RuntimeError("this is a Streamlit page: start it with `streamlit run`")
    run = ScriptRun()
    try:
        watcher = _watcher(run.server)
    except AttributeError as error:
        st.error(str(error))
        return
    watcher.begin(context.session_id, run)
    if not run.automatic:
        st.session_state[CONFLICT] = False
    token = current_run.set(run)
    try:
        load(os.environ.get("ORCH_RENDER_FN", ""))(AppState())
        if st.session_state.get(CONFLICT):
            st.warning(REPEAT)
    except StateConflict:
        # The other one's change runs the page again at once: the words stay until the user does something.
        st.session_state[CONFLICT] = True
        st.warning(REPEAT)
    except Exception as error:
        st.exception(error)
    finally:
        current_run.reset(token)
        watcher.end(context.session_id)


def load(source: str) -> Callable[[AppState], Any]:
    """The function to call with the state. A file that was edited is loaded anew.

    Args:
        source: "file.py:function", "page.py" (run as a script), or "module:function"; relative to app.py's folder.
    Raises: FileNotFoundError, ImportError, AttributeError naming what is missing.
    """
    name, _, function = source.partition(":")
    folder = Path(os.environ.get("ORCH_APP_FILE") or "app.py").absolute().parent
    _on_path(folder)
    if not name.endswith(".py"):
        return _function(_module(name), function, source)
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"StreamlitFrontend({source!r}): there is no file {path}")
    _on_path(path.parent)
    if function:
        return _function(_file(path), function, source)

    def page(_state: AppState) -> None:
        runpy.run_path(str(path), run_name="__main__")

    return page


def _function(module: ModuleType, name: str, source: str) -> Callable[[AppState], Any]:
    found = getattr(module, name, None)
    if not callable(found):
        raise AttributeError(f"StreamlitFrontend({source!r}): {module.__file__} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def _watcher(server: AppServer) -> Watcher:
    with _lock:
        if server not in _watchers:
            _watchers[server] = Watcher(server)
        return _watchers[server]


def _on_path(folder: Path) -> None:
    """A script finds its neighbours; behind the app's own folder, before what is installed."""
    entry = str(folder)
    if entry not in sys.path:
        sys.path.insert(0 if not _modules else 1, entry)


def _module(name: str) -> ModuleType:
    with _lock:
        module = sys.modules.get(name) or importlib.import_module(name)
        changed = Path(module.__file__).stat().st_mtime_ns if module.__file__ else 0
        known = _modules.get(name)
        if known is not None and known[0] != changed:
            module = importlib.reload(module)
        _modules[name] = changed, module
        return module


def _file(path: Path) -> ModuleType:
    name = f"_orch_page_{path.stem}"
    changed = path.stat().st_mtime_ns
    with _lock:
        known = _modules.get(str(path))
        if known is not None and known[0] == changed:
            return known[1]
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and Streamlit's caches look their module up
        spec.loader.exec_module(module)
        _modules[str(path)] = changed, module
        return module
