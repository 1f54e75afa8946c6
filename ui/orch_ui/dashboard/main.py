"""What an app does, for whoever operates it: works, their logs, the state tree. `streamlit run` executes it.

Needs ORCH_FLOW_URL and ORCH_FLOW_TOKEN (see `orch_ui.frontend_env`).
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

import httpx
import streamlit as st


def get(path: str, **params: Any) -> httpx.Response:
    """GET below /api/v1. Raises httpx.HTTPError."""
    response = httpx.get(
        f"{os.environ['ORCH_FLOW_URL']}/api/v1{path}",
        params=params,
        headers={"Authorization": f"Bearer {os.environ['ORCH_FLOW_TOKEN']}"},
        timeout=10.0,
        trust_env=False,
    )
    return response.raise_for_status()


def row(name: str, status: dict[str, Any]) -> dict[str, Any]:
    """One work as a line of the table."""
    since = status.get("since")
    return {
        "work": name,
        "stage": status.get("stage"),
        "reason": status.get("reason") or "",
        "since": datetime.fromtimestamp(since) if since else None,
        "ready": bool(status.get("is_ready")),
        "progress": status.get("progress"),
        "message": status.get("message") or "",
    }


def works_of(node: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Every work of the tree by short name."""
    found = {prefix + name: work for name, work in node.get("works", {}).items()}
    for name, flow in node.get("flows", {}).items():
        found |= works_of(flow, f"{prefix}{name}.")
    for name, structure in node.get("structures", {}).items():
        found |= works_of(structure, f"{prefix}{name}.")
    return found


@st.fragment(run_every=2.0)
def picture() -> None:
    """Tables that follow the app, or why there are none."""
    try:
        draw()
    except KeyError as error:
        st.error(f"{error} is not set: this page is started by orch")
    except httpx.HTTPError as error:
        st.error(f"The app does not answer: {error}. Is it running?")


def draw() -> None:
    """What the app says now."""
    app, status, tree = get("/app").json(), get("/status").json(), get("/state").json()
    st.title(app["name"])
    st.caption(f"run {app['run']} · {status['stage']} {status.get('message') or ''} · revision {status['rev']}")
    works = works_of(tree)
    st.dataframe(
        [row(name, work["status"]) for name, work in works.items()],
        hide_index=True,
        column_config={"progress": st.column_config.ProgressColumn(min_value=0.0, max_value=1.0)},
    )
    logs, state = st.tabs(["Logs", "State"])
    with logs:
        if name := st.selectbox("Work", list(works), key="work"):
            call = {"call": calls[-1]} if (calls := list(works[name].get("calls", {}))) else {}
            try:
                lines = get(f"/works/{name}/logs", tail=200, **call).text.splitlines()
            except httpx.HTTPStatusError:  # no log yet, or one that is not shown
                lines = []
            st.caption("the latest call, newest line first")
            st.code("\n".join(reversed(lines)) or "(nothing yet)", language=None, height=420)
    with state:
        st.json(tree, expanded=2)


def main() -> None:
    st.set_page_config(page_title="orch", layout="wide")
    picture()


main()
