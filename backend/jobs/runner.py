"""Start a run, ask it to stop, end it by force. The work itself is in processes that do not need this one."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from backend.errors import EngineError, K5Error, UserError
from backend.files import write_atomic
from backend.jobs.facts import KILL_REQUEST, LOG_FILE, REQUESTS_FOLDER, RESULT_FILE, is_claimed, log_tail, read_facts
from backend.jobs.process import end_tree, is_alive
from backend.jobs.store import Run
from backend.jobs.supervisor import claim, detached, engine_environment, module_of, write_result
from backend.jobs.view import engine_of, view_run

#: What an engine can be asked; it answers between two steps with a `request_done` record.
REQUESTS = frozenset({"stop", "stop_and_save", "stop_after_epoch", "save", "sample"})
_START_SECONDS = 20.0
_GRACE_SECONDS = 5.0


def start(run: Run) -> None:
    """Start the run's supervisor and wait until it has claimed the run (about 0.1 s). The engine starts after that.

    Raises:
        UserError: the run was started before, cannot be started, or its folder cannot be written.
        EngineError: the supervisor did not come up; this is written down as the run's result.
    """
    if not run.entry:
        raise UserError(f"The run '{run.title}' was not made by this app and cannot be started. Make it again.")
    if is_claimed(run.folder):
        raise UserError(f"The run '{run.title}' was started before. Make a copy of it to run it again.")
    arguments = [sys.executable, "-m", "backend.jobs.supervisor", str(run.folder), "--entry", module_of(run.entry)]
    try:
        with open(run.folder / LOG_FILE, "ab", buffering=0) as log:
            supervisor = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=engine_environment(),
                **detached(),
            )
    except OSError as error:
        raise UserError(f"{run.folder} cannot be used: {error}. Check the workspace.") from error
    # Somebody must collect it when it ends; a thread that waits costs nothing and needs no care.
    threading.Thread(target=supervisor.wait, name=f"wait for {run.id}", daemon=True).start()
    deadline = time.monotonic() + _START_SECONDS
    while not is_claimed(run.folder):
        if supervisor.poll() is not None and not is_claimed(run.folder):
            _record_failed_start(run)
        if time.monotonic() >= deadline:
            return  # a very slow machine: the supervisor will still claim the run, once
        time.sleep(0.005)


def _record_failed_start(run: Run) -> None:
    """Give a run that could not start its end, so that nobody tries it for ever; then raise the reason."""
    message = "The job's supervisor ended at once. " + (log_tail(run.folder, max_lines=3) or "The log is empty.")
    try:
        if claim(run.folder, {"failed": True}):
            write_result(run.folder, exit_code=None, signal=None, error=message)
    except (OSError, K5Error) as error:
        raise UserError(f"{run.folder} cannot be written: {error}. Free some space or check its rights.") from error
    raise EngineError(message, "start")


def request(run: Run, name: str) -> None:
    """Ask a live run for something; asking again for the same thing changes nothing.

    Raises:
        UserError: the request is unknown, the run is not alive, or its folder cannot be written.
    """
    if name not in REQUESTS:
        raise UserError(f"{name!r} is not a request. Choose one of {', '.join(sorted(REQUESTS))}.")
    state = view_run(run).state
    if not state.alive:
        raise UserError(f"The run '{run.title}' is not working (it is {state}), so it cannot be asked to {name}.")
    path = run.folder / REQUESTS_FOLDER / name
    # A stop stays asked for; `save` and `sample` are new each time, so that the engine can tell by the id.
    if not (name.startswith("stop") and path.exists()):
        _write_request(path)


def _write_request(path: Path) -> None:
    write_atomic(path, json.dumps({"id": secrets.token_hex(8), "time": round(time.time(), 3)}) + "\n")


def kill(run: Run, grace_seconds: float = _GRACE_SECONDS) -> None:
    """End a live run with everything that it started: TERM, `grace_seconds`, then KILL. Its result is on the disk then.

    The supervisor records the result; if that is dead too, this process does. A run that has ended is left as it is.

    Raises:
        UserError: the run was never started, or its folder cannot be written.
    """
    state = view_run(run).state
    if state.terminal:
        return
    if not state.alive:
        raise UserError(f"The run '{run.title}' has not started. Take it out of the queue instead.")
    _write_request(run.folder / REQUESTS_FOLDER / KILL_REQUEST)
    last_signal = _end_engine(run, grace_seconds)
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline:
        facts = read_facts(run.folder)
        if facts.result is not None:
            return
        if not is_alive(facts.supervisor):
            break
        time.sleep(0.02)
    facts = read_facts(run.folder)
    if facts.supervisor is not None and is_alive(facts.supervisor):
        end_tree(facts.supervisor, 0.0)
    if not (run.folder / RESULT_FILE).exists():
        write_result(run.folder, exit_code=None, signal=last_signal or int(signal.SIGTERM), recorded_by="runner")


def _end_engine(run: Run, grace_seconds: float) -> int | None:
    """End the engine; one that is being started right now is waited for. Returns the last signal sent."""
    deadline = time.monotonic() + grace_seconds
    while (engine := engine_of(run)) is None and read_facts(run.folder).alive and time.monotonic() < deadline:
        time.sleep(0.02)
    return end_tree(engine, grace_seconds) if engine is not None else None
