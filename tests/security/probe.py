"""Builds the app without serving it and prints every route, and how the guard answers strangers there, as JSON."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import app
from k5ui.guard import Guard


def flatten(routes: Any, prefix: str = "") -> list[tuple[str, tuple[str, ...]]]:
    """(path, methods) of all routes, also those of mounted applications and included routers."""
    found = []
    for route in routes:
        inner = getattr(getattr(route, "app", None), "routes", None) if not hasattr(route, "methods") else None
        included = getattr(getattr(route, "original_router", None), "routes", None)
        if included is not None or inner is not None:
            found += flatten(included if included is not None else inner, prefix + (getattr(route, "path", "") or ""))
        else:
            found.append((prefix + route.path, tuple(sorted(getattr(route, "methods", None) or ()))))
    return found


def ask(guard: Guard, method: str, path: str, host: str) -> int:
    """The status of one request that comes to the guard directly."""
    answers: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answers.append(message["status"])

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", host.encode())]}
    asyncio.run(guard(scope, receive, send))
    return answers[0]


def main(folder: str) -> None:
    workspace = app.prepare_workspace(folder)
    app.prepare_environment(workspace)
    policy = app.make_policy("127.0.0.1", [], None, 7860, "")
    _, application = app.build(workspace, [], False, policy)
    assert isinstance(application, Guard), "what is served is the guard, and nothing stands before it"
    exposed = Guard(application.app, replace(policy, token="a token"))
    routes = flatten(application.app.routes)
    rows = []
    for path, methods in routes:
        concrete = re.sub(r"\{[^}]*\}", "x", path)
        for method in methods or ("GET",):
            stranger = ask(application, method, concrete, "evil.example")
            rows.append([method, path, stranger, ask(exposed, method, concrete, "localhost")])
    print("\n" + json.dumps(rows))


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
