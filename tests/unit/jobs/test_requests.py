"""What a run can be asked for: every request of training arrives as a file of its own, stops once, others anew."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from backend.errors import UserError
from backend.jobs.facts import read_facts
from backend.jobs.process import identify
from backend.jobs.runner import REQUESTS, request
from backend.jobs.states import JobState
from backend.jobs.store import Run
from backend.jobs.view import STOP_REQUESTS, view_run
from tests.unit.jobs.conftest import put_events, put_json


@pytest.fixture
def alive(make_run: Callable[..., Run]) -> Run:
    """A run whose engine is this very process."""
    run = make_run()
    identity = identify(os.getpid())
    assert identity is not None
    put_json(run.folder / "command.json", {"engine": identity.as_dict()})
    put_events(run, ("started", 1.0, {}), ("step", 0.5, {"step": 1, "total": 9}))
    return run


def test_the_requests_of_training_are_known() -> None:
    assert {"stop", "stop_and_save", "stop_after_epoch", "save", "sample"} == REQUESTS
    assert {"stop", "stop_and_save", "stop_after_epoch"} == STOP_REQUESTS


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_a_live_run_can_be_asked(name: str, alive: Run) -> None:
    assert view_run(alive).state is JobState.RUNNING
    request(alive, name)
    assert read_facts(alive.folder).requests == {name}
    # Who asks for a file or a sample has not asked for the end.
    assert view_run(alive).state is (JobState.STOPPING if name in STOP_REQUESTS else JobState.RUNNING)


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_asking_again_is_a_new_request_unless_it_is_a_stop(name: str, alive: Run) -> None:
    numbers = []
    for _ in range(2):
        request(alive, name)
        numbers.append(json.loads((alive.folder / "requests" / name).read_text())["id"])
    assert (numbers[0] == numbers[1]) is name.startswith("stop")


def test_what_was_answered_is_no_request(alive: Run) -> None:
    """The engine moves it into a folder."""
    request(alive, "save")
    done = alive.folder / "requests" / "done"
    done.mkdir()
    os.replace(alive.folder / "requests" / "save", done / "save-1")
    assert read_facts(alive.folder).requests == frozenset()


def test_a_run_that_does_not_work_cannot_be_asked(make_run: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match="is not working"):
        request(make_run(), "save")
