"""What a script's command line becomes: placeholders, words, this Python. PURE: no I/O."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

__all__ = ["NAMES", "command_line", "fill", "script_word"]

NAMES = ("host", "port", "base_path", "work_dir")

_ALTERNATIVES = "|".join(NAMES)
_PLACEHOLDER = re.compile(rf"\{{\{{({_ALTERNATIVES})\}}\}}|\{{({_ALTERNATIVES})\}}")
# `${port}` is the shell's own parameter and stays the shell's.
_PLACEHOLDER_IN_SHELL = re.compile(rf"\{{\{{({_ALTERNATIVES})\}}\}}|(?<!\$)\{{({_ALTERNATIVES})\}}")
_PYTHONS = ("python", "python3")


def fill(text: str, values: Mapping[str, str], *, shell: bool = False) -> str:
    """`{port}` becomes its value, `{{port}}` becomes `{port}`; braces around anything else are left alone."""

    def value(match: re.Match[str]) -> str:
        escaped, name = match.groups()
        return "{" + escaped + "}" if escaped else values[name]

    return (_PLACEHOLDER_IN_SHELL if shell else _PLACEHOLDER).sub(value, text)


def command_line(
    command: Sequence[str] | str,
    script_args: Sequence[str],
    run_args: Sequence[str],
    *,
    shell: bool,
    values: Mapping[str, str],
    python: str,
) -> list[str]:
    """The argv of an attempt.

    `command` is split as a shell splits words unless it is a list or `shell` is set; `script_args` (of the constructor)
    get their placeholders, `run_args` (of `run(...)`) never do. A first word that ends in `.py`, is `python` or is
    `python3` means `python`. With `shell`, bash reads the command and finds the arguments in `"$@"`.

    Raises ValueError, saying what is wrong, for a command that is empty or cannot be split.
    """
    arguments = [fill(word, values) for word in script_args] + [str(word) for word in run_args]
    if shell:
        text = command if isinstance(command, str) else shlex.join(command)
        if not text.strip():
            raise ValueError("the command is empty")
        return ["bash", "-c", fill(text, values, shell=True), "bash", *arguments]
    if isinstance(command, str):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"the command {command!r} cannot be split into words: {error}") from error
    else:
        words = [str(word) for word in command]
    if not words:
        raise ValueError("the command is empty")
    words = [fill(word, values) for word in words]
    if words[0] in _PYTHONS:
        words[0] = python
    elif words[0].endswith(".py"):
        words.insert(0, python)
    return words + arguments


def script_word(argv: Sequence[str], python: str) -> str | None:
    """The Python file that an argv runs, if it runs one directly: `python train.py ...` but not `python -m train`."""
    if len(argv) > 1 and argv[0] == python and argv[1].endswith(".py"):
        return argv[1]
    return None
