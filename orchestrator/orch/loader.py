"""Load an app file: a module of its file's name, its folder on sys.path, exactly one module-level App."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

from orch.app import App
from orch.errors import OrchError, UsageError

__all__ = ["load_app", "load_module"]


def load_module(path: Path, argv: list[str]) -> object:
    """Import the file as a module of its own name. Raises whatever it raises."""
    name = path.stem
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.argv = [str(path), *argv]
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        raise UsageError(
            f"{path.name} has the name of a module that is already loaded ({name})",
            hint="give the app file another name, e.g. app.py",
        )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def load_app(path: Path, argv: list[str]) -> App:
    """The App of an app file. Raises UsageError saying what is wrong, in which file beside it and in which line."""
    try:
        module = load_module(path, argv)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
            line = f", line {error.lineno}" if error.lineno else ""
            raise UsageError(f"{_shown(Path(error.filename), path)}{line}: {error.msg}") from error
        where = next(
            (
                f"{_shown(Path(frame.filename), path)}, line {frame.lineno}"
                for frame in reversed(traceback.extract_tb(error.__traceback__))
                if _is_users(Path(frame.filename), path)
            ),
            path.name,
        )
        hint = error.hint if isinstance(error, OrchError) else ""
        raise UsageError(f"{where}: {type(error).__name__}: {error}", hint=hint) from error
    apps = {id(value): (name, value) for name, value in vars(module).items() if isinstance(value, App)}
    if not apps:
        raise UsageError(f"{path.name} defines no App", hint="add a line such as: app = App(MyFlow())")
    if len(apps) > 1:
        names = ", ".join(name for name, _ in apps.values())
        raise UsageError(f"{path.name} defines {len(apps)} Apps ({names})", hint="an app file defines exactly one")
    return next(iter(apps.values()))[1]


def _is_users(file: Path, app_file: Path) -> bool:
    """Whether it lies beside the app file, and not in an environment that happens to be there."""
    return file.is_relative_to(app_file.parent) and "site-packages" not in file.parts


def _shown(file: Path, app_file: Path) -> str:
    return str(file.relative_to(app_file.parent)) if _is_users(file, app_file) else str(file)
