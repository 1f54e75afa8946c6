"""The pages that orch itself shows: the tabs, their assets, and what is seen while a work does not answer yet.

They come from the package `orch_ui.shell`, found by name: orch runs without it, with plain pages.
"""

from __future__ import annotations

import html
import mimetypes
import re
from functools import cache
from importlib import resources
from typing import Any

from orch.server.backend import WaitingTarget
from orch.server.redact import Redactor

__all__ = ["asset", "index_page", "waiting_page"]

PACKAGE = "orch_ui.shell"
STYLE = """<style>body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:10vh auto;padding:0 1rem;color:#222}
pre{background:#eee;padding:.7em;border-radius:6px;overflow:auto}@media(prefers-color-scheme:dark){body{background:#16181d;
color:#ddd}pre{background:#2a2d35}a{color:#8ab4ff}}</style>"""
PLAIN_INDEX = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{{{name}}}}</title>{STYLE}
<h1>{{{{name}}}}</h1><ul>{{{{tabs}}}}</ul><p><a href="/docs">REST API</a></p></html>"""
PLAIN_WAITING = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="1"><title>{{{{title}}}}</title>{STYLE}
<h1>{{{{title}}}}</h1><p>{{{{stage}}}}: {{{{message}}}}</p><pre>{{{{last_lines}}}}</pre></html>"""


@cache
def _file(path: str) -> bytes | None:
    """A file of the shell's package, None if there is none."""
    try:
        node = resources.files(PACKAGE)
        for part in path.split("/"):
            if part in ("", ".", "..") or part.startswith("__") or part.endswith(".py"):
                return None
            node = node / part
        return node.read_bytes() if node.is_file() else None
    except (ModuleNotFoundError, FileNotFoundError, NotADirectoryError):
        return None


def asset(path: str) -> tuple[bytes, str] | None:
    """(bytes, content type) of a file beside the index page."""
    data = _file(path)
    if data is None:
        return None
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return data, f"{kind}; charset=utf-8" if kind.startswith("text/") or kind.endswith("javascript") else kind


def _fill(template: str, values: dict[str, str]) -> bytes:
    """Replace each `{{name}}` by its value, which is HTML already."""

    def value(match: re.Match[str]) -> str:
        return values.get(match[1], "")

    return re.sub(r"\{\{\s*(\w+)\s*\}\}", value, template).encode()


def index_page(name: str, layout: list[dict[str, Any]]) -> bytes:
    """The page with the tabs."""
    found = _file("index.html")
    links = "".join(
        f'<li><a href="{html.escape(str(tab.get("url") or "#"))}">{html.escape(str(tab.get("name", "")))}</a></li>'
        for tab in layout
    )
    return _fill(found.decode() if found else PLAIN_INDEX, {"name": html.escape(name), "tabs": links})


def waiting_page(target: WaitingTarget, redactor: Redactor) -> bytes:
    """The page in place of a work that does not answer; it loads itself again until the work does."""
    found = _file("waiting.html")
    values = {
        "component": target.component,
        "title": target.title,
        "stage": target.stage.replace("_", " "),
        "message": target.message,
        "last_lines": "\n".join(target.last_lines),
    }
    shown = {key: html.escape(redactor.text(value)) for key, value in values.items()}
    return _fill(found.decode() if found else PLAIN_WAITING, shown)
