"""The operations dashboard, run by Streamlit's own test harness on canned answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("streamlit", reason="the dashboard needs streamlit: pip install 'orch[ui]'")

from streamlit.testing.v1 import AppTest

import orch_ui

MAIN = Path(orch_ui.__file__).parent / "dashboard" / "main.py"
ANSWERS: dict[str, Any] = {
    "/app": {"name": "studio", "run": 2},
    "/status": {"stage": "running", "message": "", "rev": 7},
    "/state": {"works": {"train": {"status": {"stage": "running"}, "calls": {"2-train-1": {}, "2-train-2": {}}}}},
}


def test_it_shows_the_latest_call_and_says_when_the_app_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    away = False

    def get(url: str, **options: Any) -> httpx.Response:
        if away:
            raise httpx.ConnectError("refused")
        path, request = url.removeprefix("http://app/api/v1"), httpx.Request("GET", url)
        if path == "/works/train/logs":
            asked.append(options["params"])
            return httpx.Response(200, text="one\ntwo\n", request=request)
        return httpx.Response(200, json=ANSWERS[path], request=request)

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setenv("ORCH_FLOW_URL", "http://app")
    monkeypatch.setenv("ORCH_FLOW_TOKEN", "t")
    page = AppTest.from_file(str(MAIN), default_timeout=30).run()
    assert not page.exception
    assert page.title[0].value == "studio"
    assert [params["call"] for params in asked] == ["2-train-2"]
    assert page.code[0].value == "two\none"
    away = True
    page.run()
    assert not page.exception
    assert "refused" in page.error[0].value
