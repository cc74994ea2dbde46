"""One journal folded into what is known after its last record; more records can be added at any time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.errors import Problem
from backend.events import read_events
from backend.jobs.facts import number, whole_number

_TERMINAL = frozenset({"finished", "stopped", "error"})
_MAX_SAMPLES = 10_000
_MAX_WARNINGS = 100


@dataclass
class Fold:
    """What a journal says so far. Times are seconds since 1970, durations seconds; None: the journal does not say.

    A `started` record begins a new attempt: its steps, errors and ends count, those of the attempt before do not.
    A training (its steps have an `epoch`) keeps its step through the phases in between: samples, saving, validation.
    """

    offset: int = 0
    last_seq: int | None = 0
    records: int = 0
    gap: bool = False
    attempt: int = 0
    pid: int | None = None
    started: float | None = None
    first: float | None = None
    last: float | None = None
    last_work: float | None = None
    entry: str = ""
    task: str = ""
    phase: str = ""
    message: str = ""
    step: int | None = None
    total: int | None = None
    seconds_per_step: float | None = None
    remaining_seconds: float | None = None
    item: int | None = None
    items: int | None = None
    item_name: str = ""
    dataset: int | None = None
    unit: str = ""
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    terminal: str | None = None
    error: str = ""
    problems: list[dict[str, str | None]] = field(default_factory=list)
    seconds: float | None = None
    finished_outputs: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_WARNINGS))
    answered: set[str] = field(default_factory=set)

    def read(self, journal: Path) -> None:
        """Add what is new in the file; a file that was replaced by a shorter one is read from its start."""
        while True:
            page = read_events(journal, self.offset, last_seq=self.last_seq)
            if page.restarted:
                self.__init__()
            self.offset, self.last_seq, self.gap = page.offset, page.last_seq, self.gap or page.gap
            for record in page.records:
                self.add(record)
            if not page.more:
                return

    def add(self, record: dict[str, Any]) -> None:
        """Add one record; unknown types only move the clock, fields of a wrong type count as absent."""
        kind, moment = record["type"], float(record["t"])
        self.records += 1
        self.first = moment if self.first is None else self.first
        self.last = moment
        if kind != "heartbeat":
            self.last_work = moment
        handler = _HANDLERS.get(kind)
        if handler is not None:
            handler(self, record, moment)
        if kind in _TERMINAL:
            self.terminal = kind


def _started(fold: Fold, record: dict[str, Any], moment: float) -> None:
    fold.attempt = whole_number(record.get("attempt")) or fold.attempt + 1
    fold.pid = whole_number(record.get("pid"))
    fold.started = moment
    fold.entry, fold.task = _text(record, "entry"), _text(record, "task")
    fold.phase = fold.message = fold.error = fold.item_name = fold.unit = ""
    fold.step = fold.total = fold.item = fold.items = fold.dataset = fold.epoch = fold.epochs = fold.loss = None
    fold.seconds_per_step = fold.remaining_seconds = fold.seconds = fold.terminal = None
    fold.problems, fold.finished_outputs = [], []


def _phase(fold: Fold, record: dict[str, Any], _: float) -> None:
    fold.phase = _text(record, "phase") or fold.phase
    fold.message = _text(record, "message")
    if fold.epoch is not None:
        return
    fold.step = fold.total = fold.seconds_per_step = fold.remaining_seconds = fold.dataset = None
    fold.item_name = fold.unit = ""


def _progress(fold: Fold, record: dict[str, Any], _: float) -> None:
    fold.phase = _text(record, "phase") or fold.phase
    fold.message = _text(record, "message") or fold.message
    if fold.epoch is not None:
        return
    fold.step, fold.total = whole_number(record.get("done")), whole_number(record.get("total"))
    rate = number(record.get("rate"))
    fold.seconds_per_step = 1.0 / rate if rate is not None and rate > 1e-9 else None
    fold.remaining_seconds = number(record.get("remaining_seconds"))
    fold.item_name, fold.unit = _text(record, "item"), _text(record, "unit")
    fold.dataset = whole_number(record.get("dataset"))


def _step(fold: Fold, record: dict[str, Any], _: float) -> None:
    fold.step, fold.total = whole_number(record.get("step")), whole_number(record.get("total"))
    fold.seconds_per_step = number(record.get("seconds_per_step"))
    fold.remaining_seconds = number(record.get("remaining_seconds"))
    fold.item, fold.items = whole_number(record.get("item")), whole_number(record.get("items"))
    fold.epoch, fold.epochs = whole_number(record.get("epoch")), whole_number(record.get("epochs"))
    loss = number(record.get("loss"))
    fold.loss = fold.loss if loss is None else loss  # a skipped step has none; the last one stays
    if fold.epoch is not None:
        fold.unit = "steps"


def _sample(fold: Fold, record: dict[str, Any], _: float) -> None:
    if _text(record, "path") and len(fold.samples) < _MAX_SAMPLES:
        fold.samples.append({name: value for name, value in record.items() if name not in ("v", "type")})


def _warning(fold: Fold, record: dict[str, Any], _: float) -> None:
    name, message = _text(record, "field"), _text(record, "message")
    if message:
        fold.warnings.append(str(Problem(name or None, message)))


def _error(fold: Fold, record: dict[str, Any], _: float) -> None:
    fold.error = _text(record, "message")
    fold.phase = _text(record, "phase") or fold.phase
    given = record.get("problems")
    rows = [row for row in given if isinstance(row, dict)] if isinstance(given, list) else []
    fold.problems = [{"field": _text(row, "field") or None, "message": _text(row, "message")} for row in rows]
    if not rows and fold.error:
        fold.problems = [{"field": _text(record, "field") or None, "message": fold.error}]


def _stopped(fold: Fold, record: dict[str, Any], _: float) -> None:
    fold.message = _text(record, "reason") or fold.message


def _finished(fold: Fold, record: dict[str, Any], _: float) -> None:
    fold.seconds = number(record.get("seconds"))
    outputs = record.get("outputs")
    fold.finished_outputs = [item for item in outputs if isinstance(item, str)] if isinstance(outputs, list) else []
    fold.remaining_seconds = None


def _request_done(fold: Fold, record: dict[str, Any], _: float) -> None:
    fold.answered.add(_text(record, "request"))


_HANDLERS = {
    "started": _started,
    "phase": _phase,
    "progress": _progress,
    "step": _step,
    "sample": _sample,
    "warning": _warning,
    "error": _error,
    "stopped": _stopped,
    "finished": _finished,
    "request_done": _request_done,
}


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return value if isinstance(value, str) else ""
