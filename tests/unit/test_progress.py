"""What a run tells: events, paths, requests to stop, steps with a forecast."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from backend import progress
from backend.errors import Problem
from backend.progress import Reporter


class Memory:
    """A journal in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def emit(self, type: str, /, **fields: Any) -> int:
        self.records.append({"type": type, **fields})
        return len(self.records)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["type"] == kind]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_paths_inside_the_run_folder_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Memory()
    reporter = Reporter(journal, Path("run"), io.StringIO())
    reporter.sample(tmp_path / "run" / "outputs" / "a.mp4", "video", width=64)
    reporter.sample(Path("run/outputs/b.mp4"), "video")
    reporter.sample(Path("else/c.mp4"), "video")
    assert reporter.outputs == ["outputs/a.mp4", "outputs/b.mp4", str(tmp_path / "else" / "c.mp4")]
    assert journal.of("sample")[0] == {"type": "sample", "path": "outputs/a.mp4", "kind": "video", "width": 64}


def test_a_request_is_answered_once(tmp_path: Path) -> None:
    journal = Memory()
    reporter = Reporter(journal, tmp_path, io.StringIO())
    assert reporter.requested() is None
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "stop_and_save").touch()
    assert [reporter.requested() for _ in range(3)] == ["stop_and_save"] * 3
    assert journal.of("request_done") == [{"type": "request_done", "request": "stop_and_save"}]
    (tmp_path / "requests" / "stop").touch()
    assert reporter.requested() == "stop"
    assert len(journal.of("request_done")) == 2
    assert Reporter(journal).requested() is None


def test_steps_with_rate_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of the last twenty steps; what happens between clips counts for nothing."""
    clock = {"now": 100.0}
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock["now"])
    journal, stream = Memory(), io.StringIO()
    meter = Reporter(journal, None, stream).step_meter(2, 6)
    for item in (1, 2):
        clock["now"] += 1000.0
        meter.begin_clip()
        for step in (1, 2, 3):
            clock["now"] += 2.0
            meter.step(item, step, 3)
    records = journal.of("step")
    assert [(record["item"], record["step"], record["total"], record["items"]) for record in records] == [
        (item, step, 3, 2) for item in (1, 2) for step in (1, 2, 3)
    ]
    assert {record["seconds_per_step"] for record in records} == {2.0}
    assert [record["remaining_seconds"] for record in records] == [10.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    assert stream.getvalue().splitlines() == [
        "clip 1/2, step 3/3, 2.00 s/step, 6 s left", "clip 2/2, step 3/3, 2.00 s/step, 0 s left",
    ]  # fmt: skip


def test_a_terminal_gets_a_line_that_replaces_itself() -> None:
    stream = Terminal()
    meter = Reporter(Memory(), None, stream).step_meter(1, 2)
    meter.begin_clip()
    meter.step(1, 1, 2)
    meter.step(1, 2, 2)
    assert stream.getvalue().count("\r") == 2
    assert stream.getvalue().count("\n") == 1


def test_phases_progress_and_warnings() -> None:
    journal, stream = Memory(), io.StringIO()
    reporter = Reporter(journal, None, stream)
    reporter.phase("text", "Reading")
    reporter.progress(1, 4, "prompts", "Loading CLIP")
    reporter.warning(Problem("frames", "were rounded."))
    assert reporter.phase_name == "text"
    assert journal.records == [
        {"type": "phase", "phase": "text", "message": "Reading"},
        {"type": "progress", "phase": "text", "done": 1, "total": 4, "unit": "prompts", "message": "Loading CLIP"},
        {"type": "warning", "message": "were rounded.", "field": "frames"},
    ]
    assert stream.getvalue() == "Reading\nNote: --frames: were rounded.\n"


def test_items_with_rate_remaining_time_and_few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand items in 20 seconds are at most five records a second; the first and the last are among them."""
    clock = {"now": 100.0}
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock["now"])
    journal, stream = Memory(), io.StringIO()
    reporter = Reporter(journal, None, stream)
    reporter.phase("vae", "Encoding")
    meter = reporter.item_meter(10_000, "clips")
    for number in range(1, 10_001):
        clock["now"] += 0.002
        meter.done(item=f"clip {number}", dataset=3)
    records = journal.of("progress")
    assert 80 <= len(records) <= 101
    assert records[0]["done"] == 1
    assert records[-1]["done"] == records[-1]["total"] == 10_000
    assert {record["phase"] for record in records} == {"vae"}
    assert {record["dataset"] for record in records} == {3}
    assert all(record["item"] == f"clip {record['done']}" for record in records)
    assert all(abs(record["rate"] - 500.0) < 1e-3 for record in records)
    for record in records:
        assert abs(record["remaining_seconds"] - (10_000 - record["done"]) / 500.0) <= 0.06
    assert stream.getvalue().splitlines() == ["Encoding", "10000/10000 clips, 500.00/s, 0 s left, clip 10000"]


def test_the_rate_of_items_is_that_of_the_last_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock["now"])
    journal = Memory()
    meter = Reporter(journal, None, io.StringIO()).item_meter(200, "clips")
    for seconds in [1.0] * 50 + [10.0] * 12:
        clock["now"] += seconds
        meter.done()
    assert abs(journal.of("progress")[49]["rate"] - 1.0) < 1e-6
    last = journal.of("progress")[-1]
    assert abs(last["rate"] - 0.1) < 1e-6
    assert abs(last["remaining_seconds"] - 1380.0) < 0.1
    assert "item" not in last
    assert "dataset" not in last


def test_several_items_at_once_and_a_terminal_line() -> None:
    journal, stream = Memory(), Terminal()
    meter = Reporter(journal, None, stream).item_meter(6, "captions")
    meter.done(4)
    meter.done(2)
    assert [record["done"] for record in journal.of("progress")] == [4, 6]
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 2
