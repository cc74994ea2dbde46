"""Looks at datasets in the background, so that no request waits for a folder: snapshots, and how far the next one is.

A request is answered from the snapshot that is there. It also asks cheaply whether the configuration file or a folder
has changed since, and starts another look when it has; captions and sources that were changed in place are found by a
look every so often while somebody watches.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from backend.config.dataset import load_dataset_config
from backend.errors import K5Error, Problem, Problems, Stopped
from k5ui.datasets.known import KnownDataset
from k5ui.datasets.looking import Looker
from k5ui.datasets.readers import SharedReader
from k5ui.datasets.snapshot import EntrySnapshot, Snapshot
from k5ui.roots import Roots

CHECK_SECONDS = 0.7
REFRESH_SECONDS = 15.0
_REFRESH_FACTOR = 20.0
_AT_ONCE = 2
_MAX_FOLDERS = 200
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """The newest snapshot (None: the first look has not ended), the progress of a look that goes on, and a number that
    grows with every change."""

    snapshot: Snapshot | None
    scanning: tuple[int, int] | None
    version: int


class Scans:
    """The looks at all datasets of a library. Safe to use from several threads; `close` ends what goes on."""

    def __init__(self, roots: Roots, reader: SharedReader) -> None:
        self._roots, self._reader = roots, reader
        self._guard = threading.Lock()
        self._tasks: dict[str, _Task] = {}
        self._turns = threading.Semaphore(_AT_ONCE)
        self._closed = threading.Event()

    def look(self, dataset: KnownDataset, wait: float = 0.0) -> Look:
        """What is known of a dataset; starts another look if it has changed, and waits for that at most so long."""
        return self._task(dataset).view(wait)

    def refresh(self, dataset: KnownDataset, wait: float = 0.0) -> Look:
        """Look again at once: something was changed from here. What goes on already ends first."""
        return self._task(dataset).view(wait, again=True)

    def close(self) -> None:
        """End the looks that go on; they leave nothing behind."""
        self._closed.set()
        with self._guard:
            tasks = list(self._tasks.values())
        for task in tasks:
            task.join()

    def _task(self, dataset: KnownDataset) -> _Task:
        with self._guard:
            if dataset.id not in self._tasks:
                self._tasks[dataset.id] = _Task(dataset, Looker(self._roots, self._reader), self._turns, self._closed)
            return self._tasks[dataset.id]


class _Task:
    """One dataset: the snapshot, and the thread that makes the next one."""

    def __init__(
        self, dataset: KnownDataset, looker: Looker, turns: threading.Semaphore, closed: threading.Event
    ) -> None:
        self._dataset, self._turns, self._closed = dataset, turns, closed
        self._looker = looker
        self._change = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._progress: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._again = False
        self._version = 0
        self._checked = self._finished = float("-inf")
        self._seconds = 0.0

    def view(self, wait: float, again: bool = False) -> Look:
        """See `Scans.look` and `Scans.refresh`."""
        deadline = time.monotonic() + wait
        with self._change:
            if self._thread is not None:
                self._again = self._again or again
            elif again or self._is_stale():
                self._start()
            while self._thread is not None and (left := deadline - time.monotonic()) > 0:
                self._change.wait(left)
            return Look(self._snapshot, self._progress, self._version)

    def join(self) -> None:
        """Wait until no look goes on."""
        with self._change:
            thread = self._thread
        if thread is not None:
            thread.join(10)

    def _is_stale(self) -> bool:
        if self._snapshot is None:
            return True
        now = time.monotonic()
        if now - self._checked < CHECK_SECONDS:
            return False
        self._checked = now
        if now - self._finished > max(REFRESH_SECONDS, _REFRESH_FACTOR * self._seconds):
            return True
        return _signature(self._dataset, self._snapshot.folders) != self._snapshot.signature

    def _start(self) -> None:
        if self._closed.is_set():
            return
        self._again, self._progress = False, (0, 0)
        self._thread = threading.Thread(target=self._work, name=f"look at {self._dataset.name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            with self._turns:
                self._look()
        except Stopped:
            _LOG.debug("The look at %s was ended.", self._dataset.path)
        finally:
            with self._change:
                self._thread, self._progress = None, None
                if self._again:
                    self._start()
                self._change.notify_all()

    def _look(self) -> None:
        started = time.monotonic()
        try:
            snapshot = self._snapshot_now()
        except Problems as error:
            snapshot = self._nothing(error.problems)
        except Stopped:
            raise
        except (OSError, K5Error) as error:
            _LOG.exception("Looking at %s failed.", self._dataset.path)
            snapshot = self._nothing((Problem(None, f"The dataset cannot be looked at: {error}"),))
        with self._change:
            if snapshot != self._snapshot:
                self._version += 1
            self._snapshot = snapshot
            self._finished = self._checked = time.monotonic()
            self._seconds = self._finished - started

    def _nothing(self, problems: tuple[Problem, ...]) -> Snapshot:
        file = _signature(self._dataset, ())
        return Snapshot((), problems, file=file, signature=file)

    def _snapshot_now(self) -> Snapshot:
        started = time.time_ns()
        before = _signature(self._dataset, ())
        config = load_dataset_config(self._dataset.path)
        entries, problems = self._looker.look(config, self._tell, self._closed)
        folders = _folders(entries)
        after = _signature(self._dataset, folders)
        # What was changed while it was looked at, or a moment before, is looked at once more.
        whole = after[:1] == before and all(stamp is None or stamp[0] < started for _, stamp in after[1:])
        return Snapshot(entries, tuple(problems), config.notices, before, after if whole else None, folders)

    def _tell(self, done: int, total: int) -> None:
        with self._change:
            self._progress = (done, total)


def _folders(entries: tuple[EntrySnapshot, ...]) -> tuple[str, ...]:
    """The folders and JSONL files whose modification tells of new and lost files; of very many the first ones."""
    found: dict[str, None] = {}
    for entry in entries:
        found[os.path.abspath(entry.entry.source)] = None
        if entry.entry.source_directory is not None:
            found |= dict.fromkeys(os.path.dirname(row.source.location) for row in entry.rows)
    return tuple(found)[:_MAX_FOLDERS]


def _signature(dataset: KnownDataset, folders: tuple[str, ...]) -> tuple[Any, ...]:
    """(path, (modification time in ns, size, inode) or None) of the configuration, then of the folders."""
    return tuple((path, _stamp(path)) for path in (os.fspath(dataset.path), *folders))


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
