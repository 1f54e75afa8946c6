"""What the browser shows: AppState for Streamlit pages, the page's process, the tab shell, the dashboard."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["DASHBOARD", "SHELL", "frontend_command", "frontend_env"]

SHELL = Path(__file__).parent / "shell"
"""index.html: the tabs. waiting.html: what a tab shows until its server answers ({{title}}, {{stage}}, {{message}},
{{last_lines}} are replaced, HTML-escaped)."""
DASHBOARD = Path(__file__).parent / "dashboard" / "main.py"
"""Streamlit page about a whole app; needs ORCH_FLOW_URL and ORCH_FLOW_TOKEN only."""

ENTRY = Path(__file__).parent / "streamlit_entry" / "main.py"


def frontend_command(
    base_path: str, host: str, port: int | str, *, script: Path = ENTRY, python: str | None = None
) -> list[str]:
    """Words that start a Streamlit server whose pages live below `base_path` ("/view/ui"), for use behind the proxy.

    Its working directory is the app's folder, its environment has `frontend_env` and the app's own.
    """
    options = {
        "server.baseUrlPath": base_path,
        "server.address": host,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        "theme.primaryColor": "#6d3fd1",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [python or sys.executable, "-P", "-m", "streamlit", "run", str(script), *words]


def frontend_env(url: str, token: str, scope: str, render: str, app_file: str) -> dict[str, str]:
    """What the page's process needs to know.

    Args:
        url, token: the flow server and the app's token.
        scope: short name of the flow whose page it is, "" for the root.
        render: "file.py:function", "page.py", or "module:function" (StreamlitFrontend.source).
        app_file: app.py; files and modules are looked up in its folder.
    """
    return {
        "ORCH_FLOW_URL": url,
        "ORCH_FLOW_TOKEN": token,
        "ORCH_FLOW_SCOPE": scope,
        "ORCH_RENDER_FN": render,
        "ORCH_APP_FILE": app_file,
    }
