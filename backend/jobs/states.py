"""The states of a job as people see them, and the rule that finds the state from facts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

#: A live job whose journal has been silent for longer is shown as not responding (the heartbeat comes every 10 s).
SILENCE_SECONDS = 60.0
#: A live job without any record after this time is a slow start.
SLOW_START_SECONDS = 120.0


class JobState(StrEnum):
    """What a job is doing; the value is the word that tables and the page use."""

    QUEUED = "queued"  # not started yet; its place is in the queue
    STARTING = "starting"  # claimed by its supervisor, nothing in the journal yet
    RUNNING = "running"  # alive, and the journal is fresh
    NOT_RESPONDING = "not_responding"  # alive, but the journal is silent; never killed automatically
    STOPPING = "stopping"  # alive, and somebody asked it to stop
    FINISHED = "finished"  # said so itself
    STOPPED = "stopped"  # ended because somebody asked
    FAILED = "failed"  # ended with an error that it could name
    CRASHED = "crashed"  # ended without a word: exit code or signal
    INTERRUPTED = "interrupted"  # gone, and nobody saw it end: the machine or its supervisor went down

    @property
    def alive(self) -> bool:
        """True while a process of the job runs."""
        return self in _ALIVE

    @property
    def terminal(self) -> bool:
        """True when the job will not change any more."""
        return self is not JobState.QUEUED and self not in _ALIVE


_ALIVE = frozenset({JobState.STARTING, JobState.RUNNING, JobState.NOT_RESPONDING, JobState.STOPPING})


class Reason(StrEnum):
    """Why a state is as it is, where the state's word alone does not say it; the page turns it into a sentence."""

    NONE = ""
    NOT_IN_QUEUE = "not_in_queue"
    SLOW_START = "slow_start"
    LATE_FAILURE = "late_failure"
    KILLED_ON_REQUEST = "killed_on_request"
    START_FAILED = "start_failed"
    OUT_OF_MEMORY = "out_of_memory"
    SIGNAL = "signal"
    EXIT_CODE = "exit_code"
    NO_RESULT = "no_result"


@dataclass(frozen=True)
class Evidence:
    """The facts that decide a state.

    `terminal` is the type of the last finished, stopped or error record of this attempt; `silent_seconds` the time
    since the last record (or since the start, without any); `exit_code` and `signal` come from result.json.
    """

    claimed: bool
    alive: bool
    in_queue: bool = False
    has_records: bool = False
    terminal: str | None = None
    silent_seconds: float = 0.0
    stop_requested: bool = False
    kill_requested: bool = False
    has_result: bool = False
    start_failed: bool = False
    exit_code: int | None = None
    signal: int | None = None


def decide(facts: Evidence) -> tuple[JobState, Reason]:
    """The state of a job and the reason behind it, from facts alone."""
    if not facts.claimed and not facts.has_records and not facts.alive:
        return JobState.QUEUED, Reason.NONE if facts.in_queue else Reason.NOT_IN_QUEUE
    if facts.alive:
        return _alive(facts)
    if facts.start_failed:
        return JobState.FAILED, Reason.START_FAILED
    failed_exit = facts.has_result and (facts.signal is not None or facts.exit_code not in (0, None))
    if facts.terminal == "finished":
        return JobState.FINISHED, Reason.LATE_FAILURE if failed_exit else Reason.NONE
    if facts.terminal == "stopped":
        return JobState.STOPPED, Reason.NONE
    if facts.terminal == "error":
        return JobState.FAILED, Reason.NONE
    if facts.kill_requested:
        return JobState.STOPPED, Reason.KILLED_ON_REQUEST
    if not facts.has_result:
        return JobState.INTERRUPTED, Reason.NO_RESULT
    if facts.signal is not None:
        return JobState.CRASHED, Reason.OUT_OF_MEMORY if facts.signal == 9 else Reason.SIGNAL
    return JobState.CRASHED, Reason.EXIT_CODE


def _alive(facts: Evidence) -> tuple[JobState, Reason]:
    if facts.stop_requested or facts.kill_requested or facts.terminal == "stopped":
        return JobState.STOPPING, Reason.NONE
    if not facts.has_records:
        slow = facts.silent_seconds > SLOW_START_SECONDS
        return JobState.STARTING, Reason.SLOW_START if slow else Reason.NONE
    if facts.silent_seconds >= SILENCE_SECONDS:
        return JobState.NOT_RESPONDING, Reason.NONE
    return JobState.RUNNING, Reason.NONE
