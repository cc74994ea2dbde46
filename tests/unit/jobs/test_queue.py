"""The order of the queue and who may start what; starting itself is faked here (tests/reliability starts for real)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.errors import EngineError, UserError
from backend.jobs import queue as queue_module
from backend.jobs.process import identify
from backend.jobs.queue import JobQueue
from backend.jobs.store import Run, RunStore
from backend.jobs.supervisor import claim, write_result

MakeRun = Callable[..., Run]


@pytest.fixture
def queue(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> JobQueue:
    """A queue whose runs are claimed by this process: they count as alive until `end` is called."""
    me = identify(os.getpid())
    assert me is not None

    def begin(run: Run) -> None:
        assert claim(run.folder, {"supervisor": me.as_dict()})

    monkeypatch.setattr(queue_module, "start", begin)
    return JobQueue(store)


def end(run: Run, code: int = 0) -> None:
    write_result(run.folder, exit_code=code, signal=None)


def test_the_order_is_kept_and_survives_a_restart(store: RunStore, queue: JobQueue, make_run: MakeRun) -> None:
    runs = [make_run() for _ in range(4)]
    assert [queue.enqueue(run.id) for run in runs] == [0, 1, 2, 3]
    assert queue.enqueue(runs[1].id) == 1
    queue.move(runs[3].id, 0)
    queue.move(runs[0].id, 99)
    queue.remove(runs[1].id)
    assert JobQueue(store).pending() == [runs[3].id, runs[2].id, runs[0].id]
    assert json.loads((store.workspace / "queue.json").read_text())["order"] == queue.pending()


def test_one_at_a_time_in_order_and_on_after_a_failure(queue: JobQueue, make_run: MakeRun) -> None:
    runs = [make_run() for _ in range(3)]
    for run in runs:
        queue.enqueue(run.id)
    for index, code in enumerate((0, 3, 0)):
        assert queue.tick() == runs[index]
        assert queue.tick() is None
        assert queue.pending() == [run.id for run in runs[index + 1 :]]
        end(runs[index], code)
    assert queue.tick() is None
    queue.close()


def test_what_has_started_is_never_queued_again(queue: JobQueue, make_run: MakeRun) -> None:
    run = make_run()
    queue.enqueue(run.id)
    assert queue.tick() == run
    end(run, 3)
    with pytest.raises(UserError, match="started before"):
        queue.enqueue(run.id)
    with pytest.raises(UserError, match="not waiting"):
        queue.remove(run.id)
    with pytest.raises(UserError, match="not waiting"):
        queue.move(run.id, 0)
    assert queue.tick() is None


def test_a_claimed_run_that_is_still_in_the_file_is_dropped(queue: JobQueue, make_run: MakeRun) -> None:
    """What a crash between the start and the new order leaves behind."""
    first, second = make_run(), make_run()
    queue.enqueue(first.id)
    queue.enqueue(second.id)
    assert claim(first.folder, {"supervisor": None})
    os.utime(first.folder / "started.json", (1, 1))
    assert queue.pending() == [second.id]
    with pytest.raises(UserError, match="not waiting"):
        queue.remove(first.id)
    assert queue.tick() == second
    assert queue.pending() == []


def test_a_second_app_sees_and_changes_the_queue_but_does_not_start(
    store: RunStore, queue: JobQueue, make_run: MakeRun
) -> None:
    other = JobQueue(RunStore(store.workspace, store.entries))
    first, second, third = make_run(), make_run(), make_run()
    queue.enqueue(first.id)
    assert queue.tick() == first
    other.enqueue(second.id)
    other.enqueue(third.id)
    other.remove(third.id)
    end(first)
    assert other.tick() is None
    assert (queue.scheduling, other.scheduling) == (True, False)
    assert queue.pending() == other.pending() == [second.id]
    queue.close()
    assert other.tick() == second
    assert other.scheduling
    other.close()


def test_a_run_in_a_terminal_holds_the_queue_back(queue: JobQueue, make_run: MakeRun) -> None:
    terminal, waiting = make_run(), make_run()
    record = {"v": 1, "seq": 1, "t": time.time(), "type": "started", "pid": os.getpid(), "attempt": 1}
    (terminal.folder / "events.jsonl").write_text(json.dumps(record) + "\n")
    queue.enqueue(waiting.id)
    assert queue.tick() is None
    with open(terminal.folder / "events.jsonl", "a") as handle:
        handle.write(json.dumps({**record, "seq": 2, "pid": 1 << 22}) + "\n")
    assert queue.tick() == waiting


def test_a_failed_start_is_told_and_does_not_hold_the_others_up(
    store: RunStore, queue: JobQueue, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = make_run(title="bad"), make_run()
    begin = queue_module.start

    def start(run: Run) -> None:
        if run.id == bad.id:
            claim(run.folder, {"failed": True})
            write_result(run.folder, exit_code=None, signal=None, error="no python")
            raise EngineError("no python", "start")
        begin(run)

    monkeypatch.setattr(queue_module, "start", start)
    queue.enqueue(bad.id)
    queue.enqueue(good.id)
    queue.tick()
    assert queue.problem == "bad: no python"
    assert queue.tick() == good


def test_a_start_that_could_not_even_be_recorded_stays_in_the_queue(
    queue: JobQueue, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    queue.enqueue(run.id)
    begin = queue_module.start

    def full(_: Run) -> None:
        raise UserError("No space is left.")

    monkeypatch.setattr(queue_module, "start", full)
    with pytest.raises(UserError):
        queue.tick()
    assert queue.pending() == [run.id]
    monkeypatch.setattr(queue_module, "start", begin)
    assert queue.tick() == run


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"order": 5}', b'{"order": [5]}', b"\xff\xfe"])
def test_a_damaged_file_is_kept_and_nothing_starts_unasked(
    store: RunStore, queue: JobQueue, make_run: MakeRun, content: bytes
) -> None:
    run = make_run()
    (store.workspace / "queue.json").write_bytes(content)
    assert queue.pending() == []
    assert queue.tick() is None
    assert "damaged" in (queue.problem or "")
    kept = [name for name in os.listdir(store.workspace) if name.startswith("queue.damaged-")]
    assert [(store.workspace / name).read_bytes() for name in kept] == [content]
    queue.enqueue(run.id)
    assert queue.pending() == [run.id]


def test_unknown_deleted_and_foreign_runs_leave_the_order(store: RunStore, queue: JobQueue, make_run: MakeRun) -> None:
    gone, waiting = make_run(), make_run()
    queue.enqueue(gone.id)
    queue.enqueue(waiting.id)
    order = ["../../etc", "no-such-run", gone.id, waiting.id, waiting.id]
    (store.workspace / "queue.json").write_text(json.dumps({"order": order}))
    store.trash(gone.id)
    assert queue.pending() == [waiting.id]
    assert queue.tick() == waiting
    with pytest.raises(UserError):
        queue.enqueue("../../etc")
    with pytest.raises(UserError):
        queue.enqueue(gone.id)


def test_a_run_that_nobody_can_start_is_refused(store: RunStore, queue: JobQueue) -> None:
    folder = store.runs_folder / "foreign"
    folder.mkdir(parents=True)
    (folder / "options.toml").touch()
    with pytest.raises(UserError, match="cannot be started"):
        queue.enqueue("foreign")


def test_the_thread_starts_jobs_survives_trouble_and_ends(
    queue: JobQueue, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run() for _ in range(2)]
    for run in runs:
        queue.enqueue(run.id)
    begin, calls = queue_module.start, []

    def flaky(run: Run) -> None:
        calls.append(run.id)
        if len(calls) == 1:
            raise RuntimeError("odd")
        begin(run)

    monkeypatch.setattr(queue_module, "start", flaky)
    queue.start_thread(0.01)
    queue.start_thread(0.01)
    wait_for(lambda: len(calls) == 2 and queue.problem is None)
    end(runs[0])
    wait_for(lambda: len(calls) == 3)
    queue.close()
    queue.close()
    assert not queue.scheduling
    assert calls == [runs[0].id, runs[0].id, runs[1].id]


def test_a_deleted_lock_file_is_taken_anew(store: RunStore, queue: JobQueue, make_run: MakeRun) -> None:
    queue.enqueue(make_run().id)
    queue.tick()
    (store.workspace / "queue.lock").unlink()
    queue.tick()
    assert queue.scheduling
    queue.enqueue(make_run().id)
    other = JobQueue(store)
    other.tick()
    assert (queue.scheduling, other.scheduling) in ((True, False), (False, True))
    queue.close()
    other.close()


def test_an_idle_queue_writes_nothing(workspace: Path, queue: JobQueue) -> None:
    queue.tick()
    queue.tick()
    assert sorted(os.listdir(workspace)) == ["queue.lock"]
    queue.close()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
