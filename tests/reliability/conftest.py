"""Real runs of the stub engine, and waiting for facts instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backend.config.generate import GenerateOptions
from backend.jobs.runner import kill
from backend.jobs.states import JobState
from backend.jobs.store import Run, RunStore
from backend.jobs.view import RunView, view_run
from tests.fakes.engine_stub import ENTRY

MakeRun = Callable[..., Run]


@pytest.fixture
def store(workspace: Path) -> Iterator[RunStore]:
    """A store for stub runs; whatever still runs at the end of the test is ended."""
    store = RunStore(workspace, extra_entries=[ENTRY])
    yield store
    for run in store.list():
        if view_run(run).state.alive:
            kill(run, 0.0)


@pytest.fixture
def make_run(store: RunStore) -> MakeRun:
    """Make a run of the stub engine; the words in the prompt say what happens to it."""

    def make(prompt: str = "a circle") -> Run:
        return store.create("generate", GenerateOptions(task="k5-demo-t2v", prompt=prompt), prompt, entry=ENTRY)

    return make


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for a fact."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.01)


def wait_for_state(run: Run, *states: JobState, seconds: float = 30.0) -> RunView:
    """Wait until a run is in one of these states and return how it looks then."""
    wait_until(lambda: view_run(run).state in states, f"{states}, it is {view_run(run).state}", seconds)
    return view_run(run)


def wait_for_end(run: Run) -> RunView:
    """Wait until a run has ended."""
    wait_until(lambda: view_run(run).state.terminal, f"the end of {run.title}")
    return view_run(run)


def starts(run: Run) -> int:
    """How often the run's engine was started: it counts itself."""
    path = run.folder / "starts.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0
