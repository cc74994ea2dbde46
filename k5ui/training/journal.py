"""The journal of one training, folded into what the live view shows; it grows with the file and stays bounded."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from backend.events import read_events
from backend.jobs.facts import number, whole_number
from backend.jobs.view import STOP_REQUESTS
from k5ui.training.series import BANDS, Columns

#: Where a training's time goes; phases that are not named here count as loading.
BUDGET: tuple[str, ...] = ("train", "sample", "validate", "save", "load")
MAX_LISTED = 5000
_OWN = {"sample": "sample", "checkpoint": "save", "validation": "validate"}
_PAGE_BYTES = 1 << 20


class TrainingJournal:
    """What a training has written so far. Use it under `guard`; `read` takes in what is new.

    `checkpoints`, `samples` and `validations` are the newest records of their kinds, `resumes` those of attempts that
    went on from a state, `stopping` the requests to stop that the engine has taken. `version` is a number that changes
    whenever one of these lists but `validations` did. Times in seconds.
    """

    def __init__(self, path: Path, max_rows: int | None = None) -> None:
        self.guard = threading.Lock()
        self._path = path
        self._max_rows = max_rows
        self.version = 0
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self._last_seq: int | None = 0
        self.size = 0
        self.columns = Columns() if self._max_rows is None else Columns(self._max_rows)
        self.validations: deque[dict[str, Any]] = deque(maxlen=MAX_LISTED)
        self.checkpoints: deque[dict[str, Any]] = deque(maxlen=MAX_LISTED)
        self.samples: deque[dict[str, Any]] = deque(maxlen=MAX_LISTED)
        self.resumes: deque[dict[str, Any]] = deque(maxlen=100)
        self.budget = dict.fromkeys(BUDGET, 0.0)
        self.skipped = 0
        self.stopping: set[str] = set()
        self._last: float | None = None
        self._bucket = "load"

    def read(self, seconds: float = 0.4) -> float:
        """Take in new records for at most about `seconds`; returns the share of the file that is read, 0 to 1."""
        end = time.monotonic() + seconds
        try:
            self.size = self._path.stat().st_size
        except OSError:
            return 1.0
        while True:
            page = read_events(self._path, self._offset, last_seq=self._last_seq, max_bytes=_PAGE_BYTES)
            if page.restarted:
                generation = self.columns.generation
                self._begin()
                self.columns.generation = generation + 1
                self.version += 1
            self._offset, self._last_seq = page.offset, page.last_seq
            for record in page.records:
                self._add(record)
            if not page.more:
                return 1.0
            if time.monotonic() >= end:
                return min(1.0, self._offset / max(self.size, 1))

    def _add(self, record: dict[str, Any]) -> None:
        kind, moment = record["type"], float(record["t"])
        self._spend(kind, record, moment)
        if kind == "step":
            self._step(record)
        elif kind == "validation":
            self._keep(self.validations, record, "loss")
        elif kind == "checkpoint":
            self._keep(self.checkpoints, record, "path")
        elif kind == "sample":
            self._keep(self.samples, record, "path")
        elif kind == "phase" and record.get("phase") == "resume":
            self._keep(self.resumes, record, "path")
        elif kind == "request_done" and record.get("request") in STOP_REQUESTS:
            self.stopping.add(record["request"])
        elif kind == "started":
            self.stopping.clear()

    def _keep(self, rows: deque[dict[str, Any]], record: dict[str, Any], needed: str) -> None:
        value = record.get(needed)
        right = number(value) is not None if needed == "loss" else isinstance(value, str)
        if not right or whole_number(record.get("step")) is None:
            return
        # A path that is written again (an attempt from an earlier state) is the newer one.
        if needed == "path" and rows is not self.resumes:
            for old in [row for row in rows if row["path"] == record["path"]]:
                rows.remove(old)
        rows.append(record)
        self.version += rows is not self.validations

    def _step(self, record: dict[str, Any]) -> None:
        step = whole_number(record.get("step"))
        if step is None or not 0 <= step < 1 << 31:
            return
        bands = record.get("band_loss")
        bands = bands if isinstance(bands, list) else []
        values = {f"band{index}": number(value) for index, value in enumerate(bands[:BANDS])}
        for name, key in (("loss", "loss"), ("lr", "lr"), ("grad_norm", "grad_norm"), ("memory", "memory_bytes")):
            values[name] = number(record.get(key))
        self.columns.append(step, values)
        self.skipped += record.get("skipped") is True

    def _spend(self, kind: str, record: dict[str, Any], moment: float) -> None:
        """Put the time since the record before into the budget: the record's own part to what it did, the rest to the
        phase. A first step after a sample that announced no new phase is training again."""
        passed = max(0.0, moment - self._last) if self._last is not None and kind != "started" else 0.0
        self._last = moment
        own = "train" if kind == "step" else _OWN.get(kind)
        took = number(record.get("step_seconds" if kind == "step" else "took_seconds"))
        part = 0.0
        if own is not None:
            part = passed if own == self._bucket or took is None else min(passed, max(took, 0.0))
            self.budget[own] += part
        self.budget[self._bucket] += passed - part
        if kind == "step":
            self._bucket = "train"
        elif kind == "started":
            self._bucket = "load"
        elif kind == "phase":
            phase = record.get("phase")
            self._bucket = phase if phase in BUDGET else "load"
