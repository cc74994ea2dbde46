"""What people see of a run, computed from facts: its journal, its processes, its result, its requests, the queue."""

from __future__ import annotations

import copy
import signal
import threading
import time
import tomllib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.jobs.facts import (
    EVENTS_FILE,
    KILL_REQUEST,
    OPTIONS_FILE,
    QUEUE_FILE,
    RESULT_FILE,
    RunFacts,
    log_tail,
    number,
    read_facts,
    read_order,
    whole_number,
)
from backend.jobs.fold import Fold
from backend.jobs.process import ProcessIdentity, alive_since
from backend.jobs.states import Evidence, JobState, Reason, decide
from backend.jobs.supervisor import ENTRIES

if TYPE_CHECKING:
    from backend.jobs.store import Run

STOP_REQUESTS = frozenset({"stop", "stop_and_save", "stop_after_epoch"})
_KINDS = {entry: kind for kind, entry in ENTRIES.items()}
_CACHED_RUNS = 1000
_MAX_OPTIONS_BYTES = 1_000_000


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it. Times are seconds since 1970, durations seconds; None: not known (yet).

    `message` is a sentence for people; `reason` says in a word why the state is as it is. `outputs` are the fields of
    the run's `sample` records in their order (`path` relative to the run folder if it lies inside). `stalled_seconds`
    is the time since the engine last did something other than a heartbeat, for a live run. `gap` tells that records are
    missing or unreadable; `log_tail` is filled for crashes, interruptions, failed and slow starts. `seed` and `prompt`
    are those of the last sample, before it those of options.toml (a seed of -1 is not known yet). `step` and `total`
    count things of `unit` ("" for denoising steps); `item_name` is the one at work, `dataset` its [[datasets]] table.
    `epoch` (from 1), `epochs` and `loss` (of the last step that had one) are those of a training. `kind` is that of the
    program for runs that a terminal has made.
    """

    id: str
    kind: str
    title: str
    state: JobState
    reason: Reason
    created: float
    started: float | None
    ended: float | None
    seconds: float | None
    phase: str
    step: int | None
    total: int | None
    seconds_per_step: float | None
    remaining_seconds: float | None
    item: int | None
    items: int | None
    item_name: str
    dataset: int | None
    unit: str
    epoch: int | None
    epochs: int | None
    loss: float | None
    message: str
    problems: list[dict[str, str | None]]
    outputs: list[dict[str, Any]]
    finished_outputs: list[str]
    warnings: list[str]
    seed: int | None
    prompt: str | None
    task: str
    attempt: int
    exit_code: int | None
    signal: int | None
    stop_requested: bool
    stalled_seconds: float | None
    silent_seconds: float | None
    queue_position: int | None
    gap: bool
    log_tail: str


class _Folds:
    """Folded journals, kept so that a poll reads only what is new."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._known: OrderedDict[tuple[Path, int], tuple[Fold, threading.Lock]] = OrderedDict()

    def read(self, folder: Path) -> Fold:
        """The fold of a run's journal as of now; a copy, so that the caller may keep it."""
        journal = folder / EVENTS_FILE
        try:
            key = (journal, journal.stat().st_ino)
        except OSError:
            return Fold()
        with self._guard:
            fold, guard = self._known.setdefault(key, (Fold(), threading.Lock()))
            self._known.move_to_end(key)
            while len(self._known) > _CACHED_RUNS:
                self._known.popitem(last=False)
        with guard:
            fold.read(journal)
            snapshot = copy.copy(fold)
            snapshot.samples, snapshot.answered = list(fold.samples), set(fold.answered)
            snapshot.warnings = fold.warnings.copy()
            return snapshot


_FOLDS = _Folds()
_ENDED: dict[Run, tuple[Any, RunView]] = {}


def view_run(run: Run) -> RunView:
    """Compute what is known of `run` now. Never raises for damaged files; a deleted run looks like an empty one.

    The view of a run with a result is kept until its result or its journal changes.
    """
    stamp = (_stamp(run.folder / RESULT_FILE), _stamp(run.folder / EVENTS_FILE))
    kept = _ENDED.get(run)
    if kept is not None and kept[0] == stamp:
        return kept[1]
    view = _view(run)
    if stamp[0] is not None and view.state.terminal:
        if len(_ENDED) >= _CACHED_RUNS:
            _ENDED.clear()
        _ENDED[run] = (stamp, view)
    return view


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _view(run: Run) -> RunView:
    facts = read_facts(run.folder)
    fold = _FOLDS.read(run.folder)
    now = time.time()
    _, alive = _engine(facts, fold)
    if not alive:  # it may have written its last words between the two readings
        fold = _FOLDS.read(run.folder)
    order = read_order(run.folder.parent.parent / QUEUE_FILE) or []
    evidence = _evidence(facts, fold, alive, run.id in order, now)
    state, reason = decide(evidence)
    started = fold.started or fold.first or facts.claimed_at
    ended = _ended(facts, fold) if state.terminal else None
    last_work = fold.last_work or started
    options = _options(run.folder / OPTIONS_FILE)
    sample = {**options, **(fold.samples[-1] if fold.samples else {})}
    seed, prompt = whole_number(sample.get("seed")), sample.get("prompt")
    tail = log_tail(run.folder) if reason not in (Reason.NONE, Reason.NOT_IN_QUEUE, Reason.KILLED_ON_REQUEST) else ""
    return RunView(
        id=run.id,
        kind=run.kind or _KINDS.get(fold.entry, ""),
        title=run.title,
        state=state,
        reason=reason,
        created=run.created,
        started=started,
        ended=ended,
        seconds=_seconds(fold, started, ended if state.terminal else now),
        phase=fold.phase,
        step=fold.step,
        total=fold.total,
        seconds_per_step=fold.seconds_per_step,
        remaining_seconds=fold.remaining_seconds if state.alive else None,
        item=fold.item,
        items=fold.items,
        item_name=fold.item_name,
        dataset=fold.dataset,
        unit=fold.unit,
        epoch=fold.epoch,
        epochs=fold.epochs,
        loss=fold.loss,
        message=_message(state, reason, facts, fold),
        problems=fold.problems if fold.terminal == "error" else [],
        outputs=fold.samples,
        finished_outputs=fold.finished_outputs,
        warnings=list(fold.warnings),
        seed=seed if seed is not None and seed >= 0 else None,
        prompt=prompt if isinstance(prompt, str) else None,
        task=fold.task or str(options.get("task", "")),
        attempt=fold.attempt,
        exit_code=evidence.exit_code,
        signal=evidence.signal,
        stop_requested=evidence.stop_requested or evidence.kill_requested,
        stalled_seconds=max(0.0, now - last_work) if state.alive and last_work is not None else None,
        silent_seconds=evidence.silent_seconds if state.alive else None,
        queue_position=order.index(run.id) if state is JobState.QUEUED and run.id in order else None,
        gap=fold.gap,
        log_tail=tail,
    )


def engine_of(run: Run) -> ProcessIdentity | None:
    """The run's engine process if it is alive: as its supervisor wrote it down, else as its journal names it."""
    engine, _ = _engine(read_facts(run.folder), _FOLDS.read(run.folder))
    return engine


def _options(path: Path) -> dict[str, Any]:
    """options.toml as plain values, {} if it is missing or damaged."""
    try:
        facts = path.stat()
        return _read_options(path, facts.st_mtime_ns) if facts.st_size <= _MAX_OPTIONS_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}


@lru_cache(maxsize=_CACHED_RUNS)
def _read_options(path: Path, _: int) -> dict[str, Any]:
    return tomllib.loads(path.read_text("utf-8"))


def _engine(facts: RunFacts, fold: Fold) -> tuple[ProcessIdentity | None, bool]:
    if facts.engine is not None:
        return (facts.engine if facts.engine_alive else None), facts.alive
    # No command.json: started in a terminal, or the supervisor died right after the start.
    known = fold.pid is not None and fold.started is not None and facts.result is None
    engine = alive_since(fold.pid, fold.started) if known and fold.pid and fold.started is not None else None
    return engine, facts.alive or engine is not None


def _evidence(facts: RunFacts, fold: Fold, alive: bool, in_queue: bool, now: float) -> Evidence:
    result = facts.result or {}
    # A clock that was set back makes the last record lie in the future: then nothing is old.
    since = fold.last if fold.records else facts.claimed_at
    return Evidence(
        claimed=facts.claimed,
        alive=alive,
        in_queue=in_queue,
        has_records=fold.records > 0,
        terminal=fold.terminal,
        silent_seconds=max(0.0, now - since) if since is not None else 0.0,
        stop_requested=bool(STOP_REQUESTS & facts.requests),
        kill_requested=KILL_REQUEST in facts.requests,
        has_result=facts.result is not None,
        start_failed=isinstance(result.get("error"), str),
        exit_code=whole_number(result.get("exit_code")),
        signal=whole_number(result.get("signal")),
    )


def _ended(facts: RunFacts, fold: Fold) -> float | None:
    recorded = number((facts.result or {}).get("ended"))
    return recorded if recorded is not None else fold.last or facts.claimed_at


def _seconds(fold: Fold, started: float | None, until: float | None) -> float | None:
    if fold.terminal == "finished" and fold.seconds is not None:
        return fold.seconds
    return max(0.0, until - started) if started is not None and until is not None else None


def _message(state: JobState, reason: Reason, facts: RunFacts, fold: Fold) -> str:
    result = facts.result or {}
    code, number_of_signal = whole_number(result.get("exit_code")), whole_number(result.get("signal"))
    ending = f"signal {_signal_name(number_of_signal)}" if number_of_signal is not None else f"exit code {code}"
    sentences = {
        Reason.NOT_IN_QUEUE: "Not started and not in the queue. Start it, or delete it.",
        Reason.SLOW_START: "Still starting after two minutes. The log may say why.",
        Reason.LATE_FAILURE: f"Finished, but the program then ended with {ending}. The outputs are whole.",
        Reason.KILLED_ON_REQUEST: "Ended by force on request.",
        Reason.START_FAILED: str(result.get("error", "")),
        Reason.OUT_OF_MEMORY: "Killed by the system (signal 9), perhaps because memory ran out.",
        Reason.SIGNAL: f"The program was ended by {ending}. The log may say why.",
        Reason.EXIT_CODE: f"The program ended without saying why ({ending}). The log may say more.",
        Reason.NO_RESULT: "The run was cut off: the computer or the program around it went down.",
    }
    if reason is not Reason.NONE:
        return sentences[reason]
    return fold.error if state is JobState.FAILED else fold.message


def _signal_name(value: int) -> str:
    try:
        return f"{value} ({signal.Signals(value).name})"
    except ValueError:
        return str(value)
