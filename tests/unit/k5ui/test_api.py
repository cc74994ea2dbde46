"""The read-only routes, asked through Starlette's test client: shapes, offsets, cut characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from k5ui.api import MAX_LOG_BYTES, Json, log_page, router
from k5ui.services import Services

FORM = {"task": "k5-demo-t2v", "prompt": "a red circle"}


@pytest.fixture
def services(workspace: Path) -> Services:
    return Services(workspace)


@pytest.fixture
def ask(services: Services):
    """Answers of the routes as they go out, without a server: (status, value)."""
    routes = {route.path: route.endpoint for route in router(services).routes if isinstance(route, APIRoute)}

    def call(path: str, **arguments):
        answer = routes[path](**arguments)
        return answer.status_code, json.loads(answer.body)

    return call


def test_status_runs_and_clips(services: Services, ask) -> None:
    assert ask("/api/runs", limit=5) == (200, {"runs": []})
    assert ask("/api/clips", limit=5) == (200, {"clips": []})
    (run_id,) = services.submit_generate(FORM)
    status, value = ask("/api/status")
    assert status == 200
    assert value["queue"] == [run_id]
    assert {"running", "device", "version"} <= value.keys()
    (row,) = ask("/api/runs", limit=5)[1]["runs"]
    expected = "id kind title state phase step total seconds_per_step remaining_seconds created started ended seconds"
    assert {*expected.split(), "prompt", "task", "seed", "message", "problems", "outputs"} <= row.keys()
    detail = ask("/api/runs/{run_id}", run_id=run_id)[1]
    assert detail | row == detail
    assert {"warnings", "exit_code", "stalled_seconds", "log_tail", "options_toml"} <= detail.keys()
    assert 'prompt = "a red circle"' in detail["options_toml"]


def test_events_by_offset(services: Services, ask) -> None:
    (run_id,) = services.submit_generate(FORM)
    journal = services.store.get(run_id).folder / "events.jsonl"
    line = '{"v":1,"seq":%d,"t":1.0,"type":"phase","phase":"load"}\n'
    journal.write_text(line % 1)
    _, page = ask("/api/runs/{run_id}/events", run_id=run_id, since=0)
    assert [record["seq"] for record in page["records"]] == [1]
    journal.write_text(line % 1 + line % 2 + "{torn")
    _, page = ask("/api/runs/{run_id}/events", run_id=run_id, since=page["offset"])
    assert [record["seq"] for record in page["records"]] == [2]
    assert page["gap"] is False
    assert ask("/api/runs/{run_id}/events", run_id="../x", since=0)[0] == 404


def test_samples_carry_an_address(services: Services, ask) -> None:
    (run_id,) = services.submit_generate(FORM)
    folder = services.store.get(run_id).folder
    (folder / "outputs").mkdir()
    (folder / "outputs" / "a.mp4").write_bytes(b"x")
    sample = {"v": 1, "seq": 1, "t": 1.0, "type": "sample", "path": "outputs/a.mp4", "kind": "video"}
    (folder / "events.jsonl").write_text(json.dumps(sample) + "\n")
    (record,) = ask("/api/runs/{run_id}/events", run_id=run_id, since=0)[1]["records"]
    assert services.media.resolve(record["output"]["media"]).path == folder / "outputs" / "a.mp4"


def test_outputs_as_the_page_shows_them(services: Services) -> None:
    (run_id,) = services.submit_generate(FORM)
    folder = services.store.get(run_id).folder
    (folder / "a.png").write_bytes(b"x")
    assert services.pages.output(run_id, {"path": "a.png"})["url"].startswith("/api/media/")
    assert services.pages.output(run_id, {"path": str(folder / "a.png")})["name"] == "a.png"
    assert services.pages.output(run_id, {"path": 7}) is None


# --- the log ------------------------------------------------------------------------------------------------------


def read_all(path: Path, offset: int = 0) -> str:
    text = ""
    while True:
        page = log_page(path, offset)
        text, before, offset = text + page["text"], offset, page["offset"]
        if offset in (before, page["size"]):
            return text


def test_a_long_log_in_parts_is_the_whole_log(tmp_path: Path) -> None:
    """Characters of two to four bytes lie across the borders of the parts."""
    text = "xя€😀" * 30_000
    log = tmp_path / "log.txt"
    log.write_text(text, encoding="utf-8")
    for shift in range(4):
        log.write_bytes(b"." * shift + text.encode())
        assert read_all(log) == "." * shift + text
    assert len(log_page(log, 0)["text"].encode()) <= MAX_LOG_BYTES


@pytest.mark.parametrize("back", range(1, 12))
def test_the_end_of_a_log_begins_with_a_whole_character(tmp_path: Path, back: int) -> None:
    log = tmp_path / "log.txt"
    log.write_text("я€😀abc", encoding="utf-8")
    page = log_page(log, -back)
    assert "\ufffd" not in page["text"]
    assert "я€😀abc".endswith(page["text"])
    assert page["offset"] == page["size"] == log.stat().st_size


def test_a_character_that_is_being_written_waits(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    whole = ("x" * (MAX_LOG_BYTES - 1) + "я").encode()
    log.write_bytes(whole)
    page = log_page(log, 0)
    assert page["offset"] == MAX_LOG_BYTES - 1
    assert log_page(log, page["offset"])["text"] == "я"


def test_bytes_that_are_no_text_and_logs_that_are_not_there(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert log_page(log, 0) == {"text": "", "offset": 0, "size": 0}
    log.write_bytes(b"a\xff\xfeb")
    assert log_page(log, 0)["text"] == "a\ufffd\ufffdb"
    assert log_page(log, 99)["text"] == "a\ufffd\ufffdb", "a log that was replaced starts again"
    assert log_page(log, 4) == {"text": "", "offset": 4, "size": 4}
    assert log_page(tmp_path, 0)["text"] == ""


def test_answers_are_plain_json_that_nobody_keeps() -> None:
    answer = Json({"a": "half \ud800 я"})
    assert answer.body == b'{"a":"half \\ud800 \\u044f"}'
    assert answer.headers["cache-control"] == "no-store"
    with pytest.raises(ValueError, match="Out of range"):
        Json({"a": float("nan")})


def test_the_router_is_read_only(services: Services) -> None:
    application = FastAPI()
    application.include_router(router(services))
    methods = {m for route in router(services).routes if isinstance(route, APIRoute) for m in route.methods}
    assert methods == {"GET", "HEAD"}
