"""The verbs: which there are, who handles them, and how their words are parsed.

A family is a module with, for each of its verbs, `<verb>_arguments(parser)` and `<verb>(args) -> int`. Only the family
that is asked for is imported, which keeps `orch --version` and `orch --help` instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from orch.errors import UsageError

__all__ = ["Parser", "dispatch"]

FAMILIES: dict[str, dict[str, str]] = {
    "run": {"run": "run an app (app.py in this folder, if you do not say which)"},
    "observe": {
        "ps": "the works and what they are doing",
        "status": "the app in one glance",
        "logs": "output of the works",
        "events": "what happens, as it happens",
    },
    "control": {
        "stop": "stop the app, or one work",
        "restart": "stop a work and start its latest call again",
        "open": "open the app in a browser",
        "dashboard": "start the operations dashboard",
        "down": "end everything of the app: server, agents, scripts",
    },
    "state": {
        "state get": "read a value of the state tree",
        "state set": "write a value of the state tree",
        "state watch": "print the changes of a value",
        "state history": "the kept revisions of a value",
    },
    "drive": {
        "drive ls": "the files of the Drive",
        "drive get": "download a file or folder",
        "drive put": "upload a file or folder",
        "drive rm": "delete a file or folder",
        "drive versions": "the kept versions of a path",
        "drive verify": "check the files against their checksums",
    },
    "setup": {
        "doctor": "check this machine and this folder",
        "init": "write a small app into an empty folder",
    },
}

EPILOG = """\
Most verbs take --app FOLDER|URL|NAME (default: this folder); those that read take --json.
`orch VERB --help` tells more. Exit codes: 0 stopped, 1 failed, 2 usage, 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an exception that becomes one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('orch ')}: {message}", hint=f"see `{self.prog} --help`")


def _families() -> dict[str, str]:
    return {verb: family for family, verbs in FAMILIES.items() for verb in verbs}


def _help() -> str:
    lines = ["usage: orch VERB [...]", "", "Run scripts that work as an app, without changing them.", ""]
    for verbs in FAMILIES.values():
        lines += [f"  {verb:<15} {summary}" for verb, summary in verbs.items()]
        lines.append("")
    return "\n".join([*lines, EPILOG])


def _choose(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into a verb and the rest. Raises UsageError."""
    families = _families()
    head, rest = words[0], list(words[1:])
    if head in families:
        return head, rest
    seconds = [verb.split()[1] for verb in families if verb.startswith(head + " ")]
    if not seconds:
        import difflib

        near = difflib.get_close_matches(head, {verb.split()[0] for verb in families}, n=1)
        hint = f"did you mean `orch {near[0]}`?" if near else "`orch --help` lists the verbs"
        raise UsageError(f"there is no verb {head!r}", hint=hint)
    if rest and rest[0] in seconds:
        return f"{head} {rest[0]}", rest[1:]
    said = f"not {rest[0]!r}" if rest and not rest[0].startswith("-") else "and nothing was said"
    raise UsageError(
        f"{head}: one of {', '.join(seconds)} is wanted, {said}", hint=f"for example `orch {head} {seconds[0]}`"
    )


def _wants_help(words: Sequence[str]) -> bool:
    return not words or words[0] in ("-h", "--help", "help")


def dispatch(words: Sequence[str]) -> int:
    """Parse and run one command line. Raises UsageError and whatever the verb raises."""
    words = list(words)
    if words[:1] == ["--app"] and len(words) > 2:
        # The usual place is after the verb; in front it is understood too.
        words = [*words[2:3], *words[3:], *words[:2]]
    if _wants_help(words):
        sys.stdout.write(_help())
        return 0 if words else 2
    families = _families()
    if len(words) == 2 and _wants_help(words[1:]) and words[0] not in families:
        mine = {
            verb: text for verbs in FAMILIES.values() for verb, text in verbs.items() if verb.split()[0] == words[0]
        }
        if mine:
            sys.stdout.write("".join(f"  orch {verb:<15} {text}\n" for verb, text in mine.items()))
            return 0
    verb, rest = _choose(words)
    family = families[verb]
    module = import_module(f"orch.cli.{family}")
    function = verb.split()[-1]
    parser = Parser(prog=f"orch {verb}", description=FAMILIES[family][verb] + ".", allow_abbrev=False)
    getattr(module, f"{function}_arguments")(parser)
    tail: list[str] = []
    if family == "run" and "--" in rest:
        cut = rest.index("--")
        rest, tail = rest[:cut], rest[cut + 1 :]
    try:
        args = parser.parse_intermixed_args(rest)
    except SystemExit as end:
        return int(end.code or 0)
    if family == "run":
        args.argv = tuple(tail)
    return int(getattr(module, function)(args))
