"""No route lies outside the guard, and our own routes change nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from k5ui.guard import CLOSED_ROUTES

OWN = {
    *("/api/status", "/api/runs", "/api/runs/{run_id}", "/api/runs/{run_id}/events", "/api/runs/{run_id}/log"),
    *("/api/clips", "/api/media/{media}", "/api/{rest:path}"),
}


@pytest.fixture(scope="module")
def rows(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, int, int]]:
    """(method, path, status for a foreign host, status without the token) of every route that the app has."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.probe", str(tmp_path_factory.mktemp("probe"))],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(row) for row in json.loads(done.stdout.strip().splitlines()[-1])]


def test_gradios_routes_are_among_them(rows) -> None:
    paths = {path for _, path, _, _ in rows}
    assert {"/", "/config", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/queue/data"} <= paths
    assert len(paths) > 60


def test_strangers_get_nothing_anywhere(rows) -> None:
    assert {row for row in rows if row[2] != 403} == set()


def test_without_the_token_there_is_nothing_anywhere(rows) -> None:
    open_routes = {row for row in rows if row[3] != 401}
    assert {row for row in open_routes if not (row[3] == 404 and row[1].startswith(CLOSED_ROUTES))} == set()


def test_our_own_routes_only_read(rows) -> None:
    own = [row for row in rows if row[1].startswith("/api/")]
    assert {path for _, path, _, _ in own} == OWN
    assert {method for method, _, _, _ in own} <= {"GET", "HEAD"}
