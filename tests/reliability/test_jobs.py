"""Real supervisors and engines: how jobs end, and what survives whose death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from backend.config.generate import GenerateOptions
from backend.config.options import load_toml
from backend.errors import UserError
from backend.events import read_events
from backend.jobs import runner
from backend.jobs.facts import read_facts
from backend.jobs.process import ProcessIdentity, is_alive
from backend.jobs.runner import kill, request, start
from backend.jobs.states import JobState, Reason
from backend.jobs.store import Run, RunStore
from backend.jobs.supervisor import claim
from backend.jobs.view import view_run
from tests.conftest import REPOSITORY
from tests.fakes.engine_stub import ENTRY
from tests.reliability.conftest import MakeRun, starts, wait_for_end, wait_for_state, wait_until


def result_of(run: Run) -> dict[str, object]:
    return json.loads((run.folder / "result.json").read_text())


def engine_of(run: Run) -> ProcessIdentity:
    wait_until(lambda: read_facts(run.folder).engine is not None, "command.json")
    engine = read_facts(run.folder).engine
    assert engine is not None
    return engine


def supervisor_of(run: Run) -> ProcessIdentity:
    supervisor = read_facts(run.folder).supervisor
    assert supervisor is not None
    return supervisor


def in_the_middle(run: Run) -> None:
    wait_until(lambda: (view_run(run).step or 0) >= 2 and view_run(run).phase == "denoise", "step 2")


def test_a_job_runs_from_any_folder_and_leaves_its_facts(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called `backend` where the app was started must not hide ours; output goes to the log."""
    (tmp_path / "backend").mkdir()
    (tmp_path / "backend" / "__init__.py").write_text("raise SystemExit('the wrong backend')\n")
    monkeypatch.chdir(tmp_path)
    run = make_run("a circle")
    start(run)
    view = wait_for_end(run)
    assert view.state is JobState.FINISHED
    assert (run.folder / "outputs" / "clip.png").read_bytes().startswith(b"\x89PNG")
    assert [sample["path"] for sample in view.outputs] == ["outputs/clip.png"]
    assert (view.seed, view.prompt, view.task, view.exit_code) == (42, "a circle", "k5-demo-t2v", 0)
    command = json.loads((run.folder / "command.json").read_text())
    assert command["argv"][1:] == [
        "-m", run.entry, "--config_file", str(run.folder / "options.toml"), "--run_dir", str(run.folder),
    ]  # fmt: skip
    assert command["cwd"] == str(tmp_path)
    assert {"pid", "create_time", "boot_id", "versions"} <= set(command)
    assert (run.folder / "log.txt").read_text() == "stub: a circle\n"
    assert starts(run) == 1
    assert not read_events(run.folder / "events.jsonl").gap


def test_engine_and_supervisor_have_sessions_of_their_own(make_run: MakeRun) -> None:
    run = make_run("[slow]")
    start(run)
    engine, supervisor = engine_of(run), supervisor_of(run)
    wait_for_state(run, JobState.RUNNING)
    assert os.getsid(supervisor.pid) == supervisor.pid
    assert os.getsid(engine.pid) == engine.pid
    environment = psutil.Process(engine.pid).environ()
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert environment["HF_HUB_OFFLINE"] == os.environ["HF_HUB_OFFLINE"]
    assert psutil.Process(engine.pid).open_files() is not None
    assert os.readlink(f"/proc/{engine.pid}/fd/0") == os.devnull


@pytest.mark.parametrize(
    ("prompt", "state", "reason", "code", "number"),
    [
        ("[crash]", JobState.CRASHED, Reason.EXIT_CODE, 3, None),
        ("[kill]", JobState.CRASHED, Reason.OUT_OF_MEMORY, None, 9),
        ("[fail]", JobState.FAILED, Reason.NONE, 2, None),
        ("[oom]", JobState.FAILED, Reason.NONE, 1, None),
        ("[late]", JobState.FINISHED, Reason.LATE_FAILURE, 4, None),
        ("[silent]", JobState.CRASHED, Reason.EXIT_CODE, 0, None),
    ],
)
def test_endings(
    make_run: MakeRun, prompt: str, state: JobState, reason: Reason, code: int | None, number: int | None
) -> None:
    run = make_run(prompt)
    start(run)
    view = wait_for_end(run)
    assert (view.state, view.reason, view.exit_code, view.signal) == (state, reason, code, number)
    assert (result_of(run)["exit_code"], result_of(run)["signal"]) == (code, number)
    if prompt == "[crash]":
        assert "about to crash" in view.log_tail
    if prompt == "[fail]":
        assert [row["field"] for row in view.problems] == ["width", None]


def test_a_job_is_started_once_however_often_it_is_asked_for(make_run: MakeRun) -> None:
    run = make_run()
    command = [sys.executable, "-m", "backend.jobs.supervisor", str(run.folder), "--entry", run.entry]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    supervisors = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [supervisor.wait(timeout=60) for supervisor in supervisors] == [0] * 4
    assert starts(run) == 1
    assert wait_for_end(run).state is JobState.FINISHED
    with pytest.raises(UserError, match="started before"):
        start(run)


def test_a_supervisor_runs_no_program_that_only_the_folder_names(make_run: MakeRun) -> None:
    run = make_run()
    command = [sys.executable, "-m", "backend.jobs.supervisor", str(run.folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "names no program" in done.stderr
    assert view_run(run).state is JobState.QUEUED


def test_stop_is_answered_between_steps_and_may_be_asked_twice(make_run: MakeRun) -> None:
    run = make_run("[slow]")
    start(run)
    in_the_middle(run)
    request(run, "stop")
    first = (run.folder / "requests" / "stop").read_bytes()
    assert view_run(run).state in (JobState.STOPPING, JobState.STOPPED)
    if view_run(run).state.alive:
        request(run, "stop")
        assert (run.folder / "requests" / "stop").read_bytes() == first
    view = wait_for_end(run)
    assert (view.state, view.exit_code) == (JobState.STOPPED, 0)
    kinds = [
        record["type"] for record in read_events(run.folder / "events.jsonl").records if record["type"] != "heartbeat"
    ]
    assert kinds[-2:] == ["request_done", "stopped"]
    with pytest.raises(UserError, match="is not working"):
        request(run, "stop")


def test_a_stop_during_the_start_is_not_lost(make_run: MakeRun) -> None:
    run = make_run("[slow]")
    start(run)
    request(run, "stop")
    assert view_run(run).state is JobState.STOPPING
    assert wait_for_end(run).state is JobState.STOPPED


@pytest.mark.parametrize("name", ["", "../stop", "kill", "STOP", "stop\0"])
def test_unknown_requests_are_refused(make_run: MakeRun, name: str) -> None:
    with pytest.raises(UserError, match="is not a request"):
        request(make_run(), name)


def test_a_job_that_ignores_everything_is_ended_by_force_with_its_children(make_run: MakeRun) -> None:
    run = make_run("[ignore-stop] [child]")
    start(run)
    in_the_middle(run)
    child = int(view_run(run).warnings[0].split()[-1])
    assert psutil.pid_exists(child)
    request(run, "stop")
    time.sleep(0.3)
    assert view_run(run).state is JobState.STOPPING
    began = time.monotonic()
    kill(run, grace_seconds=0.5)
    assert 0.5 <= time.monotonic() - began < 5
    view = view_run(run)
    assert (view.state, view.reason, view.signal) == (JobState.STOPPED, Reason.KILLED_ON_REQUEST, 9)
    wait_until(lambda: not psutil.pid_exists(child), "the grandchild's end", 5)
    kill(run)


def test_a_hanging_job_is_never_killed_by_itself_and_obeys_term(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.jobs.states.SILENCE_SECONDS", 0.5)
    run = make_run("[hang]")
    start(run)
    view = wait_for_state(run, JobState.NOT_RESPONDING)
    assert (view.silent_seconds or 0) >= 0.5
    assert is_alive(engine_of(run))
    kill(run)
    assert view_run(run).state is JobState.STOPPED
    assert result_of(run)["signal"] == signal.SIGTERM


def test_children_of_an_engine_that_crashed_are_ended(make_run: MakeRun) -> None:
    """They would keep its memory and its lock on the journal."""
    run = make_run("[child] [kill]")
    start(run)
    assert wait_for_end(run).state is JobState.CRASHED
    child = int(view_run(run).warnings[0].split()[-1])
    wait_until(lambda: not psutil.pid_exists(child), "the grandchild's end", 5)


def test_an_engine_that_is_killed_has_crashed_with_the_reason(make_run: MakeRun) -> None:
    run = make_run("[slow]")
    start(run)
    in_the_middle(run)
    os.kill(engine_of(run).pid, signal.SIGKILL)
    view = wait_for_end(run)
    assert (view.state, view.reason, view.signal) == (JobState.CRASHED, Reason.OUT_OF_MEMORY, 9)
    assert "memory" in view.message


def test_a_job_outlives_its_supervisor_and_can_still_be_stopped(make_run: MakeRun) -> None:
    run = make_run("[slow]")
    start(run)
    in_the_middle(run)
    os.kill(supervisor_of(run).pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(supervisor_of(run)), "the supervisor's end")
    assert view_run(run).state is JobState.RUNNING
    request(run, "stop")
    assert wait_for_end(run).state is JobState.STOPPED
    assert not (run.folder / "result.json").exists()


def test_without_a_supervisor_a_crash_shows_as_interrupted(make_run: MakeRun) -> None:
    run = make_run("[slow]")
    start(run)
    in_the_middle(run)
    os.kill(supervisor_of(run).pid, signal.SIGKILL)
    os.kill(engine_of(run).pid, signal.SIGKILL)
    view = wait_for_end(run)
    assert (view.state, view.reason) == (JobState.INTERRUPTED, Reason.NO_RESULT)


def test_without_a_supervisor_the_one_who_kills_records_it(make_run: MakeRun) -> None:
    run = make_run("[slow] [ignore-stop]")
    start(run)
    in_the_middle(run)
    os.kill(supervisor_of(run).pid, signal.SIGKILL)
    kill(run, grace_seconds=0.2)
    assert result_of(run)["signal"] == 9
    assert result_of(run)["recorded_by"] == "runner"
    assert view_run(run).reason is Reason.KILLED_ON_REQUEST


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_supervisor_outlives_the_signals_of_a_logout(make_run: MakeRun, number: int) -> None:
    run = make_run("[slow]")
    start(run)
    os.kill(supervisor_of(run).pid, number)
    request(run, "stop")
    ended = wait_for_end(run)
    # Only the supervisor writes the exit code down.
    assert (ended.state, ended.exit_code) == (JobState.STOPPED, 0)


APP = """
import sys, time
from backend.jobs.runner import start
from backend.jobs.store import RunStore
store = RunStore(sys.argv[1], extra_entries=["tests.fakes.engine_stub"])
start(store.get(sys.argv[2]))
print("started", flush=True)
time.sleep(60)
"""


def test_a_job_outlives_the_app_and_a_new_process_sees_how_it_ended(make_run: MakeRun, store: RunStore) -> None:
    """The app's whole process group is killed, as a closed terminal or a service manager would do it."""
    run = make_run("[slow]")
    app = subprocess.Popen(
        [sys.executable, "-c", APP, str(store.workspace), run.id],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    with app:
        assert app.stdout is not None
        assert app.stdout.readline() == "started\n"
        in_the_middle(run)
        os.killpg(app.pid, signal.SIGKILL)
    step = view_run(run).step or 0
    wait_until(lambda: (view_run(run).step or 0) > step + 3, "more steps after the app's death")
    assert view_run(run).state is JobState.RUNNING
    look = (
        "import sys; from backend.jobs.store import RunStore; from backend.jobs.view import view_run\n"
        "store = RunStore(sys.argv[1], extra_entries=['tests.fakes.engine_stub'])\n"
        "print(view_run(store.get(sys.argv[2])).state)"
    )
    request(run, "stop")
    wait_for_end(run)
    seen = subprocess.run(
        [sys.executable, "-c", look, str(store.workspace), run.id],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert seen.stdout.strip() == "stopped", seen.stderr


def test_an_engine_that_cannot_be_started_leaves_the_reason(make_run: MakeRun) -> None:
    """Both the interpreter that is missing and the log that cannot be opened."""
    run = make_run()
    (run.folder / "log.txt").mkdir()
    with pytest.raises(UserError, match="cannot be used"):
        start(run)
    assert view_run(run).state is JobState.QUEUED
    code = (
        "import sys; from pathlib import Path; from backend.jobs import supervisor\n"
        "folder, entry = Path(sys.argv[1]), sys.argv[2]\n"
        "sys.executable = '/nowhere/python'\n"
        "raise SystemExit(supervisor.supervise(folder, entry))"
    )
    (run.folder / "log.txt").rmdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code, str(run.folder), run.entry], env=environment, check=True, timeout=60)
    view = view_run(run)
    assert (view.state, view.reason) == (JobState.FAILED, Reason.START_FAILED)
    assert "/nowhere/python" in view.message


def test_a_supervisor_that_does_not_come_up_ends_the_job_with_a_reason(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    real: Callable[[], dict[str, str]] = runner.engine_environment
    monkeypatch.setattr(runner, "engine_environment", lambda: {**real(), "PYTHONPATH": "", "PYTHONHOME": "/nowhere"})
    with pytest.raises(Exception, match="supervisor ended at once"):
        start(run)
    assert view_run(run).reason is Reason.START_FAILED
    assert starts(run) == 0


def test_a_claim_that_could_not_be_written_is_no_claim(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full disk the job stays where it is and starts later."""
    run = make_run()
    monkeypatch.setattr(os, "write", lambda *_: 3)
    with pytest.raises(OSError, match="space"):
        claim(run.folder, {"supervisor": None})
    monkeypatch.undo()
    assert view_run(run).state is JobState.QUEUED
    start(run)
    assert wait_for_end(run).state is JobState.FINISHED


def test_hostile_paths_and_prompts_reach_the_engine_unchanged(tmp_path: Path) -> None:
    prompt = "quotes ' \" \\ $HOME `id` ; rm -rf / \n--run_dir=/tmp/evil -- \u2028 Кириллица 🎬"
    store = RunStore(tmp_path / 'it\'s a "work space"; $(id) Ω', extra_entries=[ENTRY])
    run = store.create("generate", GenerateOptions(task="k5-demo-t2v", prompt=prompt), "x", entry=ENTRY)
    start(run)
    view = wait_for_end(run)
    assert (view.state, view.prompt) == (JobState.FINISHED, prompt)
    assert load_toml(run.folder / "options.toml")["prompt"] == prompt


def test_a_live_run_is_not_trashed_and_an_ended_one_is(make_run: MakeRun, store: RunStore) -> None:
    run = make_run("[slow]")
    start(run)
    with pytest.raises(UserError, match="still working"):
        store.trash(run.id)
    kill(run)
    assert (store.trash(run.id) / "result.json").exists()
    assert store.list() == []
