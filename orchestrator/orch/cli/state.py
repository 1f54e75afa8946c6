"""`orch state`: read, write and watch the state tree."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from orch.cli.output import note, print_json
from orch.cli.target import find_target, read_arguments
from orch.errors import NotFound

__all__ = [
    "get",
    "get_arguments",
    "history",
    "history_arguments",
    "pointer_of",
    "set",
    "set_arguments",
    "watch",
    "watch_arguments",
]

PATH_HELP = "a JSON pointer (/flows/ui/vars/x) or a name (ui.x, trainer.status.stage); default: everything"


def get_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default="", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--rev", type=int, metavar="N", help="as it was at an earlier revision that is still kept")
    read_arguments(parser)


def get(args: argparse.Namespace) -> int:
    target = find_target(args.app)
    if target.url is None:
        from orch.cli.offline import read_offline

        tree = read_offline(target, rev=args.rev).state
        note("the server is not running: this is the last run's state")
        value = _at(tree, pointer_of(args.path, tree))
    else:
        with target.client() as client:
            tree = client.state(rev=args.rev)
        value = _at(tree, pointer_of(args.path, tree))
    _print_value(value, as_json=args.json)
    return 0


def set_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a JSON pointer or a name, of a value below `vars`")
    parser.add_argument("value", metavar="JSON", help="the value; what is no JSON is taken as a string")
    read_arguments(parser)


def set(args: argparse.Namespace) -> int:
    try:
        value = json.loads(args.value, parse_constant=_no_constant)
    except ValueError:
        value = args.value
        note(f"taken as the string {json.dumps(value, ensure_ascii=False)}")
    with find_target(args.app).client() as client:
        pointer = args.path if args.path.startswith("/") else pointer_of(args.path, client.state())
        rev = client.put_state(pointer, value)
    if args.json:
        print_json({"rev": rev, "path": pointer, "value": value})
    else:
        sys.stdout.write(f"{pointer} = {json.dumps(value, ensure_ascii=False)} (revision {rev})\n")
    return 0


def _no_constant(text: str) -> None:
    # json takes NaN and Infinity, which are no JSON.
    raise ValueError(text)


def watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default="", metavar="PATH", help=PATH_HELP)
    read_arguments(parser)


def watch(args: argparse.Namespace) -> int:
    """Prints every change of the value, or below it, until the app ends."""
    with find_target(args.app).client() as client:
        pointer = args.path
        if pointer and not pointer.startswith("/"):
            pointer = pointer_of(pointer, client.state())
        for event in client.events(kinds=("diff",)):
            ops = [op for op in event.data["ops"] if _touches(op, pointer)]
            if not ops:
                continue
            if args.json:
                sys.stdout.write(json.dumps({**event.data, "ops": ops}, ensure_ascii=False) + "\n")
            else:
                _print_ops(event.data, ops)
            sys.stdout.flush()
    return 0


def history_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default="", metavar="PATH", help=PATH_HELP)
    parser.add_argument("-n", "--limit", type=int, default=20, metavar="N", help="at most that many (default: 20)")
    read_arguments(parser)


def history(args: argparse.Namespace) -> int:
    """The kept revisions that touched the value, newest last."""
    target = find_target(args.app)
    if target.url is None:
        from orch.cli.offline import history_offline, read_offline

        tree = read_offline(target).state
        revisions = history_offline(target, pointer_of(args.path, tree), args.limit)
    else:
        with target.client() as client:
            pointer = args.path if args.path.startswith("/") else pointer_of(args.path, client.state())
            revisions = client.history(pointer, limit=args.limit)
    if args.json:
        print_json(revisions)
    else:
        for revision in revisions:
            _print_ops(revision, revision["ops"], clock="%Y-%m-%d %H:%M:%S")
    return 0


# ---- pointers and names --------------------------------------------------------------------------------------------


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


def pointer_of(text: str, tree: dict[str, Any]) -> str:
    """The JSON pointer of what the user typed: a pointer, or names joined by dots as Python would reach them from the
    root flow (`ui.train_start`, `models.0.x`, `trainer.status.stage`). Raises NotFound naming what there is instead."""
    if not text or text.startswith("/"):
        return text
    names = text.split(".")
    if names[0] == "root" and "root" not in tree.get("works", {}):
        names = names[1:]
    parts: list[str] = []
    node: Any = tree
    component = True
    for n, name in enumerate(names):
        step = _step(node, name) if component else None
        if step is not None:
            kind, component = step
            parts += [*kind, name]
            for part in (*kind, name):
                node = node[part]
            continue
        component = False
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            where = ".".join(names[:n]) or "the root flow"
            raise NotFound(f"state: {where} has no {name!r}", hint=f"there is: {', '.join(_names(node)) or 'nothing'}")
        parts.append(name)
    return "".join(f"/{_escape(part)}" for part in parts)


def _step(node: dict[str, Any], name: str) -> tuple[tuple[str, ...], bool] | None:
    """Where a component has a child or variable of that name, and whether that is a component."""
    for kind in ("flows", "works", "structures"):
        if name in node.get(kind, {}):
            return (kind,), True
    if name in node.get("vars", {}):
        return ("vars",), False
    return None


def _names(node: Any) -> list[str]:
    if isinstance(node, list):
        return [f"0 to {len(node) - 1}"] if node else []
    if not isinstance(node, dict):
        return []
    names = [name for kind in ("flows", "works", "structures", "vars") for name in node.get(kind) or ()]
    return names or list(node)


def _at(tree: Any, pointer: str) -> Any:
    node = tree
    for raw in pointer.split("/")[1:]:
        part = raw.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            raise NotFound(
                f"state: {pointer} names nothing ({part!r})", hint=f"there is: {', '.join(_names(node)) or 'nothing'}"
            )
    return node


def _touches(op: dict[str, Any], pointer: str) -> bool:
    """Whether an operation changes the value at the pointer: it is at, below or above it."""
    for path in (op["path"], op.get("from")):
        if path is not None and (
            path == pointer or path.startswith(pointer + "/") or pointer.startswith(path.removesuffix("/") + "/")
        ):
            return True
    return False


def _print_value(value: Any, *, as_json: bool) -> None:
    if as_json or not isinstance(value, str):
        print_json(value)
    else:
        sys.stdout.write(value + "\n")


def _print_ops(revision: dict[str, Any], ops: list[dict[str, Any]], *, clock: str = "%H:%M:%S") -> None:
    at = revision.get("at")
    when = time.strftime(clock, time.localtime(at)) if at else "-"
    for op in ops:
        value = f" {json.dumps(op['value'], ensure_ascii=False)}" if "value" in op else ""
        source = f" from {op['from']}" if "from" in op else ""
        what = f"{op['op']} {op['path'] or '/'}{source}{value}"
        sys.stdout.write(f"{revision.get('rev', '-')} {when} {revision.get('cause') or '-'} {what}\n")
