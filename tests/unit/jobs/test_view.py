"""What a run looks like, from run folders that are laid out by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from backend.jobs.fold import Fold
from backend.jobs.process import ProcessIdentity, identify
from backend.jobs.states import JobState, Reason
from backend.jobs.store import Run
from backend.jobs.view import RunView, view_run
from tests.unit.jobs.conftest import put_events, put_json

MakeRun = Callable[..., Run]
STARTED: dict[str, Any] = {"attempt": 1, "entry": "stub", "pid": 1 << 22, "task": "k5-demo-t2v", "versions": {}}


@pytest.fixture(scope="module")
def living() -> Iterator[ProcessIdentity]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) as process:
        identity = identify(process.pid)
        assert identity is not None
        yield identity
        process.kill()


@pytest.fixture(scope="module")
def dead() -> ProcessIdentity:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = identify(process.pid)
        process.kill()
    assert identity is not None
    return identity


def lay_out(run: Run, engine: ProcessIdentity | None, supervisor: ProcessIdentity | None, **result: Any) -> None:
    put_json(
        run.folder / "started.json",
        {"time": time.time() - 3, "supervisor": supervisor.as_dict() if supervisor else None},
    )
    if engine is not None:
        put_json(run.folder / "command.json", {"engine": engine.as_dict()})
    if result:
        put_json(run.folder / "result.json", {"ended": time.time(), **result})


def step(age: float = 0.0, number: int = 2) -> tuple[str, float, dict[str, Any]]:
    return "step", age, {"step": number, "total": 5, "seconds_per_step": 0.5, "remaining_seconds": 1.5}


def test_a_new_run_waits(make_run: MakeRun) -> None:
    view = view_run(make_run("a red circle"))
    assert (view.state, view.reason) == (JobState.QUEUED, Reason.NOT_IN_QUEUE)
    assert (view.prompt, view.seed, view.task) == ("a red circle", 7, "k5-demo-t2v")
    assert view.started is view.ended is view.seconds is view.stalled_seconds is None


def test_the_queue_gives_a_place(make_run: MakeRun) -> None:
    first, second = make_run(), make_run()
    put_json(first.folder.parent.parent / "queue.json", {"version": 1, "order": [second.id, first.id]})
    view = view_run(first)
    assert (view.state, view.reason, view.queue_position) == (JobState.QUEUED, Reason.NONE, 1)


def test_starting_running_and_silent(make_run: MakeRun, living: ProcessIdentity) -> None:
    run = make_run()
    lay_out(run, None, living)
    assert view_run(run).state is JobState.STARTING
    lay_out(run, living, living)
    put_events(run, ("started", 5, STARTED), ("phase", 4, {"phase": "denoise", "message": "go"}), step(3))
    view = view_run(run)
    assert view.state is JobState.RUNNING
    assert (view.phase, view.step, view.total, view.seconds_per_step, view.remaining_seconds, view.message) == (
        "denoise", 2, 5, 0.5, 1.5, "go",
    )  # fmt: skip
    assert view.stalled_seconds == pytest.approx(3, abs=0.5)
    put_events(run, ("started", 500, STARTED), step(300), ("heartbeat", 5, {}))
    view = view_run(run)
    assert view.state is JobState.RUNNING
    assert view.stalled_seconds == pytest.approx(300, abs=1)
    assert view.silent_seconds == pytest.approx(5, abs=1)
    put_events(run, ("started", 500, STARTED), step(300))
    assert view_run(run).state is JobState.NOT_RESPONDING


def test_slow_start_shows_the_log(make_run: MakeRun, living: ProcessIdentity) -> None:
    run = make_run()
    lay_out(run, living, living)
    put_json(run.folder / "started.json", {"time": time.time() - 121, "supervisor": living.as_dict()})
    (run.folder / "log.txt").write_text("loading\n")
    view = view_run(run)
    assert (view.state, view.reason, view.log_tail) == (JobState.STARTING, Reason.SLOW_START, "loading")


def test_a_clock_that_jumped_back_makes_nobody_silent(make_run: MakeRun, living: ProcessIdentity) -> None:
    run = make_run()
    lay_out(run, living, living)
    put_events(run, ("started", -3600, STARTED), step(-3600))
    view = view_run(run)
    assert view.state is JobState.RUNNING
    assert view.stalled_seconds == view.silent_seconds == view.seconds == 0.0


def test_stop_requests_show_at_once(make_run: MakeRun, living: ProcessIdentity) -> None:
    run = make_run()
    lay_out(run, living, living)
    put_events(run, ("started", 1, STARTED), step())
    (run.folder / "requests" / "save").touch()
    assert view_run(run).state is JobState.RUNNING
    (run.folder / "requests" / "stop").touch()
    assert view_run(run).state is JobState.STOPPING
    assert view_run(run).stop_requested


@pytest.mark.parametrize("change", ["create_time", "boot_id", "gone"])
def test_a_process_that_only_looks_the_same_is_gone(
    make_run: MakeRun, living: ProcessIdentity, dead: ProcessIdentity, change: str
) -> None:
    """A job whose pid now belongs to another process, or to another boot, must not show as running for ever."""
    other = {
        "create_time": replace(living, create_time=living.create_time - 100, start_ticks=None),
        "boot_id": replace(living, boot_id="another boot"),
        "gone": dead,
    }[change]
    run = make_run()
    lay_out(run, other, other)
    put_events(run, ("started", 5, {**STARTED, "pid": other.pid}), step(1))
    view = view_run(run)
    assert (view.state, view.reason) == (JobState.INTERRUPTED, Reason.NO_RESULT)
    assert view.ended is not None


def test_an_engine_without_its_supervisor_is_still_alive(
    make_run: MakeRun, living: ProcessIdentity, dead: ProcessIdentity
) -> None:
    run = make_run()
    lay_out(run, living, dead)
    put_events(run, ("started", 1, STARTED), step())
    assert view_run(run).state is JobState.RUNNING


def test_a_supervisor_that_has_not_written_the_result_yet_keeps_the_job_alive(
    make_run: MakeRun, living: ProcessIdentity, dead: ProcessIdentity
) -> None:
    """Else a job would flash as interrupted between the engine's end and the result."""
    run = make_run()
    lay_out(run, dead, living)
    put_events(run, ("started", 1, STARTED), step())
    assert view_run(run).state is JobState.RUNNING
    lay_out(run, dead, living, exit_code=3, signal=None)
    assert view_run(run).state is JobState.CRASHED


def test_a_claim_in_the_writing_is_a_start_and_an_old_half_one_is_an_interruption(make_run: MakeRun) -> None:
    run = make_run()
    (run.folder / "started.json").touch()
    assert view_run(run).state is JobState.STARTING
    os.utime(run.folder / "started.json", (time.time() - 60, time.time() - 60))
    assert view_run(run).state is JobState.INTERRUPTED


ENDINGS: list[tuple[str, dict[str, Any], dict[str, Any], JobState, Reason, str]] = [
    ("finished", {"outputs": ["outputs/a.png"], "seconds": 4.5}, {"exit_code": 0}, JobState.FINISHED, Reason.NONE, ""),
    (
        "finished",
        {"outputs": [], "seconds": 1},
        {"exit_code": 4},
        JobState.FINISHED,
        Reason.LATE_FAILURE,
        "exit code 4",
    ),
    ("stopped", {"reason": "asked"}, {"exit_code": 0}, JobState.STOPPED, Reason.NONE, "asked"),
    ("error", {"message": "no room", "exit_code": 1}, {"exit_code": 1}, JobState.FAILED, Reason.NONE, "no room"),
    ("step", {}, {"exit_code": 3}, JobState.CRASHED, Reason.EXIT_CODE, "exit code 3"),
    ("step", {}, {"signal": 9}, JobState.CRASHED, Reason.OUT_OF_MEMORY, "memory"),
    ("step", {}, {"signal": 11}, JobState.CRASHED, Reason.SIGNAL, "SIGSEGV"),
    ("step", {}, {"error": "no such program"}, JobState.FAILED, Reason.START_FAILED, "no such program"),
]


@pytest.mark.parametrize(("kind", "fields", "result", "state", "reason", "words"), ENDINGS)
def test_endings(
    make_run: MakeRun,
    dead: ProcessIdentity,
    kind: str,
    fields: dict[str, Any],
    result: dict[str, Any],
    state: JobState,
    reason: Reason,
    words: str,
) -> None:
    run = make_run()
    lay_out(run, dead, dead, **{"exit_code": None, "signal": None, **result})
    put_events(run, ("started", 9, STARTED), (kind, 1, fields))
    (run.folder / "log.txt").write_bytes(b"one\n10%\r50%\r100%\n\xff bad\n")
    view = view_run(run)
    assert (view.state, view.reason) == (state, reason)
    assert words in view.message
    assert view.exit_code == result.get("exit_code")
    assert view.remaining_seconds is None
    assert view.ended == pytest.approx(time.time(), abs=2)
    assert view.log_tail == ("one\n100%\n� bad" if reason is not Reason.NONE else "")
    assert view.seconds == fields.get("seconds", pytest.approx(9, abs=2))


def test_problems_keep_their_fields(make_run: MakeRun, dead: ProcessIdentity) -> None:
    run = make_run()
    lay_out(run, dead, dead, exit_code=2, signal=None)
    rows = [{"field": "width", "message": "too wide"}, {"field": 5, "message": 6}, "odd"]
    put_events(run, ("started", 1, STARTED), ("error", 1, {"message": "two problems", "problems": rows}))
    assert view_run(run).problems == [{"field": "width", "message": "too wide"}, {"field": None, "message": ""}]


def test_samples_and_warnings_are_kept_in_order(make_run: MakeRun, living: ProcessIdentity) -> None:
    run = make_run("from the form")
    lay_out(run, living, living)
    put_events(
        run,
        ("started", 3, STARTED),
        ("warning", 3, {"message": "rounded", "field": "frames"}),
        ("warning", 3, {"message": "plain"}),
        ("sample", 2, {"path": "outputs/a.png", "kind": "image", "seed": 11, "prompt": "first"}),
        ("sample", 2, {"no": "path"}),
        ("sample", 1, {"path": "outputs/b.png", "kind": "image", "seed": 12, "prompt": "second"}),
    )
    view = view_run(run)
    assert [sample["path"] for sample in view.outputs] == ["outputs/a.png", "outputs/b.png"]
    assert view.warnings == ["--frames: rounded", "plain"]
    assert (view.seed, view.prompt) == (12, "second")


def test_a_new_attempt_forgets_how_the_last_one_ended(make_run: MakeRun, living: ProcessIdentity) -> None:
    run = make_run()
    lay_out(run, living, living)
    put_events(
        run,
        ("started", 9, STARTED),
        ("error", 8, {"message": "no room"}),
        ("started", 2, {**STARTED, "attempt": 2}),
        step(1),
    )
    view = view_run(run)
    assert (view.state, view.attempt, view.problems) == (JobState.RUNNING, 2, [])


def test_a_poll_reads_only_what_is_new(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    put_events(run, ("started", 9, STARTED), step(5, 1))
    assert view_run(run).step == 1
    added: list[str] = []
    real = Fold.add
    monkeypatch.setattr(Fold, "add", lambda self, record: (added.append(record["type"]), real(self, record))[1])
    with open(run.folder / "events.jsonl", "a") as handle:
        handle.write(json.dumps({"v": 1, "seq": 3, "t": time.time(), "type": "step", "step": 2, "total": 5}) + "\n")
    assert view_run(run).step == 2
    assert added == ["step"]
    assert not view_run(run).gap


def test_a_replaced_journal_is_read_anew(make_run: MakeRun) -> None:
    run = make_run()
    put_events(run, ("started", 9, STARTED), *[step(5, number) for number in range(20)])
    assert view_run(run).step == 19
    put_events(run, ("started", 9, STARTED), step(5, 1))
    view = view_run(run)
    assert view.step == 1
    assert not view.gap


def test_a_run_of_a_terminal_shows(make_run: MakeRun, living: ProcessIdentity) -> None:
    run = make_run()
    put_events(run, ("started", 0, {**STARTED, "pid": living.pid}), step())
    assert view_run(run).state is JobState.RUNNING
    older = make_run()
    put_events(older, ("started", 7200, {**STARTED, "pid": living.pid}), step())
    assert view_run(older).state is JobState.INTERRUPTED


def test_last_words_between_two_readings_count(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a terminal that finishes just after its journal was read must not flash as interrupted."""
    run = make_run()
    put_events(run, ("started", 1, STARTED), step())

    def finish(*_: object) -> None:
        with open(run.folder / "events.jsonl", "a") as handle:
            handle.write(json.dumps({"v": 1, "seq": 3, "t": time.time(), "type": "finished", "outputs": []}) + "\n")

    monkeypatch.setattr("backend.jobs.view.alive_since", finish)
    assert view_run(run).state is JobState.FINISHED


@pytest.mark.parametrize(
    "name", ["started.json", "command.json", "result.json", "events.jsonl", "options.toml", "log.txt"]
)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\x00", b"[" * 5000, b'{"engine":{"pid":"x"}}', b"x" * (2 << 20)]
)
def test_damaged_files_never_raise(make_run: MakeRun, dead: ProcessIdentity, name: str, content: bytes) -> None:
    run = make_run()
    lay_out(run, dead, dead, exit_code=0, signal=None)
    put_events(run, ("started", 9, STARTED), step(5, 1))
    (run.folder / name).write_bytes(content)
    assert isinstance(view_run(run), RunView)


def test_fields_of_wrong_types_never_raise(make_run: MakeRun) -> None:
    run = make_run()
    odd: list[Any] = [None, True, -1, 1.5, 1e-320, 10**400, "text", [], {}, [1, {"a": []}]]
    kinds = (
        "started",
        "phase",
        "progress",
        "step",
        "sample",
        "warning",
        "error",
        "stopped",
        "finished",
        "request_done",
    )
    names = (
        "attempt",
        "pid",
        "task",
        "phase",
        "message",
        "step",
        "total",
        "rate",
        "path",
        "problems",
        "outputs",
        "seconds",
    )
    records = [(kind, 1.0, dict.fromkeys(names, value)) for kind in (*kinds, "new_type") for value in odd]
    put_events(run, *records)
    assert isinstance(view_run(run), RunView)
    for value in odd:
        result = {"exit_code": value, "signal": value, "ended": value, "error": value}
        put_json(run.folder / "result.json", result)
        put_json(run.folder / "command.json", {"engine": {"pid": 1, "create_time": value, "boot_id": value}})
        put_json(run.folder / "started.json", {"time": value, "supervisor": value})
        assert isinstance(view_run(run), RunView)


def test_a_deleted_run_looks_empty(make_run: MakeRun) -> None:
    run = make_run()
    for path in sorted(run.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    run.folder.rmdir()
    assert view_run(run).state is JobState.QUEUED
