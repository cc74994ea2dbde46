"""The table of states, row by row."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from backend.jobs.states import SILENCE_SECONDS, SLOW_START_SECONDS, Evidence, JobState, Reason, decide

NEW = Evidence(claimed=False, alive=False)
GONE = Evidence(claimed=True, alive=False, has_records=True)
ALIVE = Evidence(claimed=True, alive=True, has_records=True, silent_seconds=1.0)
ENDED = replace(GONE, has_result=True, exit_code=0)

ROWS = [
    ("not started, in the queue", replace(NEW, in_queue=True), JobState.QUEUED, Reason.NONE),
    ("not started, in no queue", NEW, JobState.QUEUED, Reason.NOT_IN_QUEUE),
    ("claimed, nothing said yet", replace(ALIVE, has_records=False), JobState.STARTING, Reason.NONE),
    (
        "nothing said for two minutes",
        replace(ALIVE, has_records=False, silent_seconds=SLOW_START_SECONDS + 1),
        JobState.STARTING,
        Reason.SLOW_START,
    ),
    ("alive and talking", ALIVE, JobState.RUNNING, Reason.NONE),
    ("just fresh enough", replace(ALIVE, silent_seconds=SILENCE_SECONDS - 0.1), JobState.RUNNING, Reason.NONE),
    ("alive and silent", replace(ALIVE, silent_seconds=SILENCE_SECONDS), JobState.NOT_RESPONDING, Reason.NONE),
    ("asked to stop", replace(ALIVE, stop_requested=True), JobState.STOPPING, Reason.NONE),
    (
        "asked to stop while it starts",
        replace(ALIVE, has_records=False, stop_requested=True),
        JobState.STOPPING,
        Reason.NONE,
    ),
    ("being ended by force", replace(ALIVE, kill_requested=True), JobState.STOPPING, Reason.NONE),
    ("has said that it stops", replace(ALIVE, terminal="stopped"), JobState.STOPPING, Reason.NONE),
    ("has said that it finishes", replace(ALIVE, terminal="finished"), JobState.RUNNING, Reason.NONE),
    ("has said what went wrong, still alive", replace(ALIVE, terminal="error"), JobState.RUNNING, Reason.NONE),
    ("finished, 0", replace(ENDED, terminal="finished"), JobState.FINISHED, Reason.NONE),
    ("finished, result missing", replace(GONE, terminal="finished"), JobState.FINISHED, Reason.NONE),
    ("finished, then 1", replace(ENDED, terminal="finished", exit_code=1), JobState.FINISHED, Reason.LATE_FAILURE),
    (
        "finished, then a signal",
        replace(ENDED, terminal="finished", exit_code=None, signal=11),
        JobState.FINISHED,
        Reason.LATE_FAILURE,
    ),
    ("stopped, 0", replace(ENDED, terminal="stopped"), JobState.STOPPED, Reason.NONE),
    ("stopped, 1", replace(ENDED, terminal="stopped", exit_code=1), JobState.STOPPED, Reason.NONE),
    ("stopped, result missing", replace(GONE, terminal="stopped"), JobState.STOPPED, Reason.NONE),
    (
        "stopped before the force that was asked for",
        replace(ENDED, terminal="stopped", kill_requested=True),
        JobState.STOPPED,
        Reason.NONE,
    ),
    ("error, 1", replace(ENDED, terminal="error", exit_code=1), JobState.FAILED, Reason.NONE),
    ("error, result missing", replace(GONE, terminal="error"), JobState.FAILED, Reason.NONE),
    ("no last word, exit code", replace(ENDED, exit_code=3), JobState.CRASHED, Reason.EXIT_CODE),
    ("no last word, exit code 0", ENDED, JobState.CRASHED, Reason.EXIT_CODE),
    ("no last word, signal 11", replace(ENDED, exit_code=None, signal=11), JobState.CRASHED, Reason.SIGNAL),
    ("no last word, signal 9", replace(ENDED, exit_code=None, signal=9), JobState.CRASHED, Reason.OUT_OF_MEMORY),
    (
        "died before its first record",
        replace(ENDED, has_records=False, exit_code=1),
        JobState.CRASHED,
        Reason.EXIT_CODE,
    ),
    (
        "ended by force on request",
        replace(ENDED, exit_code=None, signal=9, kill_requested=True),
        JobState.STOPPED,
        Reason.KILLED_ON_REQUEST,
    ),
    (
        "asked to stop, but crashed",
        replace(ENDED, exit_code=3, stop_requested=True),
        JobState.CRASHED,
        Reason.EXIT_CODE,
    ),
    ("gone, nobody saw how", GONE, JobState.INTERRUPTED, Reason.NO_RESULT),
    ("claimed, gone, nothing else", replace(GONE, has_records=False), JobState.INTERRUPTED, Reason.NO_RESULT),
    ("from a terminal, cut off", replace(GONE, claimed=False), JobState.INTERRUPTED, Reason.NO_RESULT),
    ("from a terminal, finished", replace(GONE, claimed=False, terminal="finished"), JobState.FINISHED, Reason.NONE),
    ("from a terminal, alive", replace(ALIVE, claimed=False), JobState.RUNNING, Reason.NONE),
    (
        "could not be started",
        replace(ENDED, has_records=False, exit_code=None, start_failed=True),
        JobState.FAILED,
        Reason.START_FAILED,
    ),
]


@pytest.mark.parametrize(("facts", "state", "reason"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_row(facts: Evidence, state: JobState, reason: Reason) -> None:
    assert decide(facts) == (state, reason)


def test_every_state_is_reached_and_every_combination_has_one() -> None:
    """A live process never looks ended, a gone one never looks alive, and nothing at all raises."""
    seen = set()
    bits = [False, True]
    for claimed, alive, queued, records, stop, kill, result, failed in product(*[bits] * 8):
        for terminal in (None, "finished", "stopped", "error"):
            for silent, code, signal in product((0.0, 61.0, 121.0), (None, 0, 1), (None, 9, 15)):
                facts = Evidence(
                    claimed, alive, queued, records, terminal, silent, stop, kill, result, failed, code, signal
                )
                state, _ = decide(facts)
                seen.add(state)
                assert state.alive == alive
                assert state.terminal == (not alive and (claimed or records))
    assert seen == set(JobState)


def test_words_are_the_contract() -> None:
    words = "queued starting running not_responding stopping finished stopped failed crashed interrupted"
    assert [str(state) for state in JobState] == words.split()
