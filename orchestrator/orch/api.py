"""Routes that a Flow adds to the REST API: `configure_api` returns a list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Delete", "Get", "Post", "Put", "Route"]


class Route:
    """One route: `Post("/train", self.start_training)`. FastAPI's rules for the function's parameters apply."""

    method = "GET"

    def __init__(self, route: str, method: Callable[..., Any]) -> None:
        if not isinstance(route, str) or not route:
            raise ValueError(f"{type(self).__name__}({route!r}): a path such as '/train' is needed")
        if not callable(method):
            raise TypeError(f"{type(self).__name__}({route!r}): a method or a function is needed")
        self.route = "/" + route.lstrip("/")
        self.endpoint = method

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.route!r}, {self.endpoint!r})"


class Get(Route):
    method = "GET"


class Post(Route):
    method = "POST"


class Put(Route):
    method = "PUT"


class Delete(Route):
    method = "DELETE"
