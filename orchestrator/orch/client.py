"""HTTP client of a running app: the REST API as Python calls that block. Used by the CLI and for scripting an app.

    with Client("http://127.0.0.1:7501", token) as app:
        app.put_state("/flows/ui/vars/train_start", True)
        app.stop_work("ui.trainer")

Errors of the server arrive as the classes they left it as (`orch.errors`, `orch_drive.errors`); an app that does not
answer is `RuntimeLost`. httpx is imported with the first request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

import orch.errors
import orch_drive.errors
from orch.errors import NotFound, OrchError, RuntimeLost
from orch.wire import Op

if TYPE_CHECKING:
    import httpx

__all__ = ["Client", "ServerEvent"]

TIMEOUT = 30.0
READ_TIMEOUT = 10.0
"""For what is answered at once, whatever the flow is doing."""
SILENCE = 60.0
"""Seconds without a byte after which an event stream counts as broken: the server sends a sign of life every 15 s."""
PROBLEM_TYPE = "urn:orch:problem:"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of the app: kinds are diff, status, log, app, layout."""

    id: int
    kind: str
    data: dict[str, Any]


class Client:
    """Talks to one app. A context manager; safe to use from several threads.

    Args:
        url: where the app is served, e.g. http://127.0.0.1:7501
        token: the content of .orch/token
        cause: what the app's history names as the origin of writes, "api" or "ui".
    """

    def __init__(self, url: str, token: str, *, cause: str = "api") -> None:
        self.url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {token}", "x-orch-cause": cause}
        self._client: httpx.Client | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back; the next request opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    # -- state

    def state(self, pointer: str = "", *, rev: int | None = None) -> Any:
        """The value at a JSON pointer, now or at an earlier revision that is kept. NotFound."""
        return self._get(_route("state", pointer), rev=rev)

    def read(self, pointer: str = "") -> tuple[Any, int]:
        """The value, and the revision at which it last changed. NotFound."""
        response = self._send("GET", _route("state", pointer))
        return _json(response), _etag(response)

    def patch(self, ops: Sequence[Op], *, match: int | None = None) -> int:
        """Apply RFC 6902 operations, all or nothing; returns the revision once it is journalled. `match`: the revision
        that the tree must still have (StateMismatch)."""
        headers = {"content-type": "application/json-patch+json", **_if_match(match)}
        return int(_json(self._send("PATCH", "/api/v1/state", body=ops, headers=headers))["rev"])

    def put_state(self, pointer: str, value: Any, *, match: int | None = None) -> int:
        """Set one value; returns the revision once it is journalled. `match`: the revision at which the value must have
        changed last (StateMismatch)."""
        response = self._send("PUT", _route("state", pointer), body=value, headers=_if_match(match))
        return int(_json(response)["rev"])

    def wait_change(self, pointer: str, *, after: int, wait: float = TIMEOUT) -> int:
        """Wait until the value has changed after that revision, at most `wait` seconds; returns the revision at which
        it has last changed by then."""
        params = {"after": after, "wait": wait}
        return _etag(self._send("HEAD", _route("state", pointer), params=params, timeout=wait + TIMEOUT))

    def history(self, pointer: str = "", *, limit: int = 20) -> list[dict[str, Any]]:
        """Kept revisions that touched the value: {"rev", "at", "cause", "ops"}, newest last."""
        return list(self._get(_route("history", pointer), limit=limit))

    # -- works

    def works(self) -> list[dict[str, Any]]:
        """Every work: status, calls, url, progress, agent."""
        return list(self._get("/api/v1/works"))

    def work(self, name: str) -> dict[str, Any]:
        """One work. NotFound."""
        return dict(self._get(_work(name)))

    def stop_work(self, name: str) -> dict[str, Any]:
        """Stop the work's call and hold the work."""
        return dict(self._post(f"{_work(name)}/stop"))

    def restart_work(self, name: str) -> dict[str, Any]:
        """Stop the work, then its latest call again."""
        return dict(self._post(f"{_work(name)}/restart"))

    def run_work(self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask for a call of the work."""
        return dict(self._post(f"{_work(name)}/run", {"args": list(args), "kwargs": dict(kwargs or {})}))

    def logs(
        self,
        name: str,
        *,
        call: str | None = None,
        tail: int | None = None,
        since: str | float | None = None,
        follow: bool = False,
        grep: str | None = None,
    ) -> Iterator[bytes]:
        """What the work's scripts wrote, as it comes, in pieces that need not be lines; see the logs route."""
        params = {"call": call, "tail": tail, "since": since, "follow": follow or None, "grep": grep}
        with self._stream(f"{_work(name)}/logs", params, None if follow else TIMEOUT) as response:
            yield from response.iter_bytes()

    # -- events

    def events(
        self, after: int | None = None, *, kinds: Sequence[str] = (), follow: bool = True
    ) -> Iterator[ServerEvent]:
        """What happens, from `after` (exclusive; None: from now on): without `follow` what is kept, else until the app
        ends."""
        params = {"after": after, "kinds": ",".join(kinds) or None, "follow": follow}
        with self._stream("/api/v1/events", params, SILENCE) as response:
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                name, _, value = line.partition(":")
                if name:
                    fields[name] = value.removeprefix(" ")
                elif not line and "data" in fields:
                    yield ServerEvent(int(fields["id"]), fields["event"], msgspec.json.decode(fields["data"]))
                    fields = {}

    # -- app

    def layout(self) -> list[dict[str, Any]]:
        """The tabs."""
        return list(self._get("/api/v1/layout"))

    def status(self) -> dict[str, Any]:
        """The app in one glance."""
        return dict(self._get("/api/v1/status"))

    def app(self) -> dict[str, Any]:
        """Which app this is: {"id", "name", "run", "stage", "url", "version", "file", "pid", "drive"}."""
        return dict(self._get("/api/v1/app"))

    def stop_app(self, message: str = "") -> None:
        """Ask the app to stop its works and end."""
        self._post("/api/v1/app/stop", {"message": message})

    def alive(self) -> bool:
        """Whether a server answers at all."""
        try:
            return bool(_json(self._send("GET", "/healthz", timeout=5.0))["status"] == "ok")
        except OrchError:
            return False

    # -- drive

    def drive_list(
        self, drive: str, path: str = ".", *, component: str | None = None, recursive: bool = True
    ) -> list[dict[str, Any]]:
        """The files below a folder of a Drive: {"path", "size", "version", "component", "at", ...}. NotFound."""
        return list(self._get(_drive(drive, path), component=component, recursive=recursive))

    def drive_versions(
        self, drive: str, path: str, *, component: str | None = None, partial: bool = False
    ) -> list[dict[str, Any]]:
        """The kept versions of a path, oldest first. NotFound."""
        return list(self._get(_drive(drive, path), component=component, partial=partial, versions=True))

    def drive_verify(
        self, drive: str, path: str = ".", *, component: str | None = None, version: int | None = None
    ) -> int:
        """Compare the stored bytes with their checksums; returns the number of files. DriveCorrupt names a bad one."""
        params = {"component": component, "version": version, "verify": True}
        return int(_json(self._send("GET", _drive(drive, path), params=params, timeout=None))["files"])

    def drive_link(
        self, drive: str, path: str, *, seconds: int, component: str | None = None, version: int | None = None
    ) -> str:
        """An address of a file in a bucket that needs no token, for that many seconds."""
        found = self._get(_drive(drive, path), component=component, version=version, link=True, seconds=seconds)
        return str(found["url"])

    def drive_put(
        self,
        drive: str,
        path: str,
        source: Path,
        *,
        sync: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Upload a file or folder as one new version of `path`; returns {"path", "version", "size", ...}. `sync`: what
        the folder lacks is gone from the Drive too. `progress(done, total)` is told of bytes."""
        from orch.zips import zipped
        from orch_drive.store import files_in

        files = list(files_in(source)) if source.is_dir() else [(source.name, source)]
        done, total = 0, sum(file.stat().st_size for _, file in files)

        def moved(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        def pieces() -> Iterator[bytes]:
            with source.open("rb") as file:
                while data := file.read(1 << 20):
                    yield data
                    moved(len(data))

        if source.is_dir():
            rows = (
                (name, os.access(file, os.X_OK), file.stat().st_mtime, lambda file=file: file.open("rb"))
                for name, file in files
            )
            content, params = zipped(rows, compress=False, moved=moved), {"zip": True, "sync": sync or None}
        else:
            content, params = pieces(), {}
        return dict(_json(self._send("PUT", _drive(drive, path), params=params, content=content, timeout=None)))

    def drive_find(
        self,
        drive: str,
        path: str,
        *,
        component: str | None = None,
        version: int | None = None,
        partial: bool = False,
    ) -> list[dict[str, Any]]:
        """What `drive_get` can download of a path: {"path", "version", "component", "size", "sha256"} of the file
        itself, or of each file of the folder. NotFound, DriveAmbiguous."""
        route = _drive(drive, path)
        params = {"component": component, "version": version, "partial": partial, "recursive": True}
        with self._stream(route, params, TIMEOUT) as response:
            headers = response.headers
            if "x-orch-version" not in headers:
                return list(msgspec.json.decode(response.read()))
        file = {"size": int(headers["content-length"]), "sha256": headers["etag"].strip('"')}
        return [{"path": path, "version": int(headers["x-orch-version"]), "component": component, **file}]

    def drive_get(self, drive: str, file: Mapping[str, Any], *, partial: bool = False) -> Iterator[bytes]:
        """The bytes of a file that `drive_find` has found, in pieces."""
        params = {"component": file["component"], "version": None if partial else file["version"], "partial": partial}
        with self._stream(_drive(drive, file["path"]), params, TIMEOUT) as response:
            yield from response.iter_raw()

    def drive_delete(self, drive: str, path: str, *, component: str | None = None) -> None:
        """Delete a file or folder of a Drive. NotFound, DriveAmbiguous."""
        self._send("DELETE", _drive(drive, path), params={"component": component})

    # -- requests

    def _http(self) -> httpx.Client:
        if self._client is None:
            import httpx

            # trust_env: an app on this machine or network is not behind the proxy that the environment may name.
            self._client = httpx.Client(base_url=self.url, headers=self._headers, timeout=TIMEOUT, trust_env=False)
        return self._client

    def _get(self, route: str, **params: Any) -> Any:
        return _json(self._send("GET", route, params=params, timeout=READ_TIMEOUT))

    def _post(self, route: str, body: Any = msgspec.UNSET) -> Any:
        return _json(self._send("POST", route, body=body))

    def _send(
        self,
        method: str,
        route: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = msgspec.UNSET,
        content: Any = None,
        timeout: float | None = TIMEOUT,
    ) -> httpx.Response:
        fields = dict(headers or {})
        if body is not msgspec.UNSET:
            content = msgspec.json.encode(body)
            fields.setdefault("content-type", "application/json")
        with self._reached():
            response = self._http().request(
                method, route, params=_words(params or {}), headers=fields, content=content, timeout=timeout
            )
        if response.status_code >= 400:
            raise _error(response.status_code, response.content, self.url)
        return response

    @contextmanager
    def _stream(self, route: str, params: Mapping[str, Any], timeout: float | None) -> Iterator[httpx.Response]:
        with (
            self._reached(),
            self._http().stream("GET", route, params=_words(params), timeout=timeout) as response,
        ):
            if response.status_code >= 400:
                raise _error(response.status_code, response.read(), self.url)
            yield response

    @contextmanager
    def _reached(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            raise RuntimeLost(
                f"the app at {self.url} does not answer in time",
                hint="it may be stopped (SIGSTOP) or very busy; `orch down` ends it by force",
            ) from error
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise RuntimeLost(
                f"the app at {self.url} does not answer: {reason}", hint="is it running? `orch run` starts it"
            ) from error


def _words(params: Mapping[str, Any]) -> dict[str, str]:
    """Query parameters, those that are None left out."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in params.items()
        if value is not None
    }


def _route(prefix: str, pointer: str) -> str:
    return f"/api/v1/{prefix}{_quoted(pointer)}"


def _work(name: str) -> str:
    short = name if name == "root" else name.removeprefix("root.")
    return f"/api/v1/works/{_segment(short)}"


def _drive(drive: str, path: str) -> str:
    return f"/api/v1/drive/{_segment(drive)}/{_quoted('' if path == '.' else path)}"


def _quoted(path: str) -> str:
    return "/".join(_segment(part) for part in path.split("/"))


def _segment(name: str) -> str:
    # `.` and `..` are names like others here, but a URL that holds them as they are would be shortened.
    return "%2E" * len(name) if name in (".", "..") else quote(name, safe="~")


def _json(response: httpx.Response) -> Any:
    return msgspec.json.decode(response.content)


def _etag(response: httpx.Response) -> int:
    return int(response.headers["etag"].strip('"'))


def _if_match(rev: int | None) -> dict[str, str]:
    return {} if rev is None else {"if-match": f'"{rev}"'}


def _error(status: int, body: bytes, url: str) -> Exception:
    """The exception that a problem document stands for."""
    try:
        problem = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.MsgspecError:
        problem = {}
    detail = problem.get("detail") or problem.get("title") or f"HTTP {status} from {url}"
    name = "".join(part.capitalize() for part in str(problem.get("type", "")).removeprefix(PROBLEM_TYPE).split("-"))
    kind: Any = getattr(orch.errors, name, None) or getattr(orch_drive.errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, OrchError | orch_drive.errors.DriveError)):
        kind = NotFound if status == 404 else OrchError
    error = kind(str(detail), hint=str(problem.get("hint") or ""))
    assert isinstance(error, OrchError | orch_drive.errors.DriveError)
    error.status = status
    return error
