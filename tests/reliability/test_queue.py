"""The queue with real jobs: crashes between any two steps, two apps on one workspace, restarts."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backend.jobs.queue import JobQueue
from backend.jobs.states import JobState
from backend.jobs.store import Run, RunStore
from backend.jobs.view import view_run
from tests.conftest import REPOSITORY
from tests.fakes.engine_stub import ENTRY
from tests.reliability.conftest import MakeRun, starts, wait_for_end, wait_for_state, wait_until

APP = """
import os, signal, sys, time
from backend.jobs import queue as queue_module, runner
from backend.jobs.queue import JobQueue
from backend.jobs.store import RunStore

die_at = sys.argv[2]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if die_at == "before the start":
    queue_module.start = lambda run: die()
if die_at == "before the spawn":
    runner.subprocess.Popen = lambda *a, **k: die()
if die_at == "after the spawn":
    real = runner.subprocess.Popen
    def spawn(*a, **k):
        real(*a, **k)
        die()
    runner.subprocess.Popen = spawn
if die_at == "after the claim":
    start = queue_module.start
    def start_and_die(run):
        start(run)
        die()
    queue_module.start = start_and_die
if die_at == "while the order is written":
    queue_module.write_atomic = lambda *a: die()

queue = JobQueue(RunStore(sys.argv[1], extra_entries=["tests.fakes.engine_stub"]))
queue.start_thread(0.02)
print("up", flush=True)
time.sleep(120)
"""


def start_app(workspace: Path, die_at: str = "never") -> subprocess.Popen[str]:
    app = subprocess.Popen(
        [sys.executable, "-c", APP, str(workspace), die_at],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    assert app.stdout is not None
    assert app.stdout.readline() == "up\n"
    return app


def end_app(app: subprocess.Popen[str]) -> None:
    with app:
        app.kill()


def enqueue(store: RunStore, runs: list[Run]) -> None:
    queue = JobQueue(store)
    for run in runs:
        queue.enqueue(run.id)


@pytest.mark.parametrize(
    "moment",
    ["before the start", "before the spawn", "after the spawn", "after the claim", "while the order is written"],
)
def test_an_app_that_dies_at_any_point_of_a_start_loses_nothing_and_runs_nothing_twice(
    store: RunStore, make_run: MakeRun, moment: str
) -> None:
    runs = [make_run(f"job {index}") for index in range(2)]
    enqueue(store, runs)
    app = start_app(store.workspace, moment)
    with app:
        assert app.wait(timeout=60) == -signal.SIGKILL
    assert JobQueue(store).pending()[-1] == runs[1].id
    second = start_app(store.workspace)
    for run in runs:
        wait_until(lambda run=run: starts(run) > 0, "the start")
        assert wait_for_end(run).state is JobState.FINISHED
    end_app(second)
    assert [starts(run) for run in runs] == [1, 1]
    assert JobQueue(store).pending() == []


def test_two_apps_on_one_workspace_run_twenty_jobs_once_each(store: RunStore, make_run: MakeRun) -> None:
    """One of the two apps is killed half way, and a new one comes."""
    runs = [make_run(f"job {index}") for index in range(20)]
    enqueue(store, runs)
    apps = [start_app(store.workspace) for _ in range(2)]
    wait_until(lambda: starts(runs[8]) > 0, "half of the jobs", 60)
    end_app(apps[0])
    apps[0] = start_app(store.workspace)
    wait_until(lambda: all(view_run(run).state.terminal for run in runs), "all jobs", 90)
    time.sleep(0.3)
    for app in apps:
        end_app(app)
    assert [starts(run) for run in runs] == [1] * 20
    assert [str(view_run(run).state) for run in runs] == ["finished"] * 20
    spans = sorted((view.started or 0.0, view.ended or 0.0) for view in map(view_run, runs))
    assert all(ended <= began + 0.001 for (_, ended), (began, _) in itertools.pairwise(spans)), "two at once"


def test_a_restarted_app_adopts_the_running_job_and_goes_on_after_a_crash(store: RunStore, make_run: MakeRun) -> None:
    slow, crash, last = make_run("[slow]"), make_run("[crash]"), make_run("last")
    enqueue(store, [slow, crash, last])
    end_app_after = start_app(store.workspace)
    wait_for_state(slow, JobState.RUNNING)
    end_app(end_app_after)
    again = start_app(store.workspace)
    time.sleep(0.5)
    assert view_run(slow).state is JobState.RUNNING
    assert (starts(crash), JobQueue(store).pending()) == (0, [crash.id, last.id])
    engine = int((slow.folder / "starts.txt").read_text())
    os.kill(engine, signal.SIGKILL)
    assert wait_for_end(slow).state is JobState.CRASHED
    wait_until(lambda: starts(last) == 1, "the last job")
    assert wait_for_end(last).state is JobState.FINISHED
    end_app(again)
    assert view_run(crash).state is JobState.CRASHED
    assert [starts(run) for run in (slow, crash, last)] == [1, 1, 1]


def test_a_supervisor_that_dies_right_after_its_claim_shows_and_the_queue_goes_on(
    store: RunStore, make_run: MakeRun
) -> None:
    lost, last = make_run(), make_run()
    code = (
        "import os, signal, sys; from pathlib import Path; from backend.jobs import supervisor\n"
        "supervisor.subprocess.Popen = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "supervisor.supervise(Path(sys.argv[1]), sys.argv[2])"
    )
    enqueue(store, [lost, last])
    done = subprocess.run(
        [sys.executable, "-c", code, str(lost.folder), ENTRY],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert view_run(lost).state is JobState.INTERRUPTED
    app = start_app(store.workspace)
    wait_until(lambda: starts(last) == 1, "the next job")
    assert wait_for_end(last).state is JobState.FINISHED
    end_app(app)
    assert starts(lost) == 0


def test_apps_change_one_order_at_the_same_time_without_losing_a_job(store: RunStore, make_run: MakeRun) -> None:
    runs = [make_run(f"job {index}") for index in range(15)]
    code = (
        "import sys; from backend.jobs.queue import JobQueue; from backend.jobs.store import RunStore\n"
        "queue = JobQueue(RunStore(sys.argv[1], extra_entries=['tests.fakes.engine_stub']))\n"
        "for name in sys.argv[2:]: queue.enqueue(name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(store.workspace), *[run.id for run in runs[part::3]]], env=environment
        )
        for part in range(3)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 3
    pending = JobQueue(store).pending()
    assert len(pending) == 15
    assert set(pending) == {run.id for run in runs}
