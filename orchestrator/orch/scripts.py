"""ScriptWork and ServiceWork: existing scripts and commands, unchanged."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from orch.errors import StateTypeError
from orch.work import Work, number, one_of

__all__ = ["ScriptWork", "ServiceWork", "argument_error", "split_arguments"]

PLACEHOLDER = re.compile(r"\{\{|\}\}|\{base_path\}")


def _words(owner: str, args: Any) -> list[str]:
    if isinstance(args, str):
        return split(args, f"{owner}(args=...)")
    if not isinstance(args, list | tuple):
        raise StateTypeError(f"{owner}(args={args!r}): a str or a list of words is needed")
    return [_word(value) for value in args]


def _paths(owner: str, name: str, values: Any) -> list[str]:
    if isinstance(values, str):
        values = [values]
    for value in values:
        if not isinstance(value, str) or not value:
            raise StateTypeError(f"{owner}({name}=...): {value!r} is no path")
    return list(values)


class ScriptWork(Work):
    """Runs an existing script or command, unchanged, in a process group of its own.

    Args:
        command: a list of words, or a string that is split as a shell splits words (with `shell=True`: bash's own
        text).
            A first word ending `.py`, and the words python and python3, mean this Python. `{host}`, `{port}`,
            `{base_path}` and `{work_dir}` are replaced here, in `args`, `cwd` and `env`.
        args: further words. inputs, outputs: Drive paths, relative to `cwd`. sync_interval: seconds.
        vars: state variables of the work that the script may read and write.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "run" in cls.__dict__:
            raise TypeError(f"{cls.__name__} overrides ScriptWork.run, which starts the script: subclass Work instead")

    def __init__(
        self,
        command: str | list[str],
        *,
        args: str | list[str] = "",
        inputs: Any = (),
        outputs: Any = (),
        drive: Any = None,
        shell: bool = False,
        cwd: str | None = None,
        sync_interval: float = 2.0,
        vars: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        owner = type(self).__name__
        super().__init__(**options)
        words = [command] if isinstance(command, str) else command
        if not isinstance(words, list | tuple) or not words or not all(isinstance(w, str) and w for w in words):
            raise StateTypeError(f"{owner}(command={command!r}): a non-empty str or list of str is needed")
        if isinstance(command, str) and not shell:
            split(command, f"{owner}(command=...)")
        if shell and not isinstance(command, str):
            raise StateTypeError(f"{owner}(command=..., shell=True): bash needs the command as one str")
        self._options.update(
            command=command if isinstance(command, str) else list(command),
            script_args=_words(owner, args),
            inputs=_paths(owner, "inputs", inputs),
            outputs=_paths(owner, "outputs", outputs),
            drive=None if drive is None else _drive(owner, drive),
            shell=bool(shell),
            cwd=None if cwd is None else str(cwd),
            sync_interval=number(owner, "sync_interval", sync_interval),
        )
        for name, value in (vars or {}).items():
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
                raise StateTypeError(f"{owner}(vars=...): {name!r} is no attribute name")
            setattr(self, name, value)

    def _argument_error(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return argument_error(args, kwargs)

    def _declaration(self) -> dict[str, Any]:
        return {"kind": "script", **self._options}


class ServiceWork(ScriptWork):
    """A ScriptWork that stays up: `run(args)` declares what shall be up.

    Args:
        health: path that answers below 500 once ready. reload: Drive paths kept fresh while it runs.
        restart: "always", "on_failure" or "never" (delays 1, 2, 4 ... 30 s, reset after 60 s ready).
        prefix: "keep" passes /view/<work>/... on as it is, "strip" without the prefix; default: keep if `{base_path}`
            occurs in the command.
    """

    def __init__(
        self,
        command: str | list[str],
        *,
        health: str | None = "/",
        reload: Any = (),
        prefix: str | None = None,
        restart: str = "always",
        parallel: bool = True,
        when_busy: str = "replace",
        raise_exception: bool = False,
        lost_after: float = 30.0,
        **options: Any,
    ) -> None:
        owner = type(self).__name__
        super().__init__(
            command,
            health=health,
            parallel=parallel,
            when_busy=when_busy,
            raise_exception=raise_exception,
            lost_after=lost_after,
            **options,
        )
        text = " ".join(command) if not isinstance(command, str) else command
        text += " " + " ".join(self._options["script_args"])
        keeps = "{base_path}" in PLACEHOLDER.findall(text)
        self._options.update(
            reload=_paths(owner, "reload", reload),
            prefix=one_of(owner, "prefix", prefix or ("keep" if keeps else "strip"), "keep", "strip"),
            restart=one_of(owner, "restart", restart, "always", "on_failure", "never"),
        )

    def _declaration(self) -> dict[str, Any]:
        return {"kind": "service", **self._options}


def split(text: str, where: str) -> list[str]:
    """Words as a POSIX shell splits them. Raises StateTypeError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise StateTypeError(f"{where}: {text!r} cannot be split into words: {error}") from error


def split_arguments(args: Iterable[Any]) -> Iterator[str]:
    """The words of `run(*args)`: a str is split as a shell splits, a list is taken as it is. Raises ValueError."""
    for value in args:
        if isinstance(value, str):
            yield from shlex.split(value)
        elif isinstance(value, list):
            yield from map(_word, value)
        else:
            yield _word(value)


def argument_error(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """Why a script cannot be called with these arguments; empty if it can."""
    if kwargs:
        return f"a script takes no keyword arguments: {', '.join(kwargs)}"
    try:
        list(split_arguments(args))
    except ValueError as error:
        return f"arguments cannot be split into words: {error}"
    return ""


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        return msgspec.json.encode(value).decode()
    return str(value)


def _drive(owner: str, drive: Any) -> dict[str, Any]:
    to_state = getattr(drive, "to_state", None)
    if to_state is None:
        raise StateTypeError(f"{owner}(drive={drive!r}): a Drive is needed")
    return dict(to_state())
