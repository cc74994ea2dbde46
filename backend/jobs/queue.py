"""The queue of a workspace: one job at a time, in an order that survives crashes, shared by all apps on the workspace.

Two files: queue.json holds the order and is changed under a short lock; queue.lock is held by the one app that starts
jobs, for its life. A job leaves the order only after its supervisor has claimed it (started.json, made exclusively), so
a crash at any point neither loses a job nor runs one twice. A job that failed or crashed does not hold the next one up,
and is never started again by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from backend.errors import EngineError, K5Error, UserError
from backend.events import lock_within, try_lock
from backend.files import write_atomic
from backend.jobs.facts import EVENTS_FILE, QUEUE_FILE, RESULT_FILE, is_claimed, read_order
from backend.jobs.runner import start
from backend.jobs.store import Run, RunStore
from backend.jobs.view import view_run

_EDIT_SECONDS = 30.0
_TICK_SECONDS = 1.0
_LOG = logging.getLogger(__name__)


class JobQueue:
    """The order of jobs that wait in `store`'s workspace, and the scheduler that starts them.

    Every method may be called from any thread and by several apps at once; only the app that holds queue.lock starts
    jobs. `problem` is a sentence about what keeps the queue from working, or None.
    """

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.problem: str | None = None
        self._file = store.workspace / QUEUE_FILE
        self._lock_file = store.workspace / "queue.lock"
        self._edit_file = store.workspace / "queue.json.lock"
        self._lock = -1
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    # --- the order ------------------------------------------------------------------------------------------------

    def enqueue(self, run_id: str) -> int:
        """Put a run at the end of the queue (where it is already, it stays) and return its place, 0 for the next.

        Raises:
            UserError: unknown run, one that was started before, or the workspace cannot be written.
        """
        run = self.store.get(run_id)
        with self._edit() as order:
            if _was_started(run):
                raise UserError(f"The run '{run.title}' was started before. Make a copy of it to run it again.")
            if not run.entry:
                raise UserError(f"The run '{run.title}' was not made by this app and cannot be started.")
            if run_id not in order:
                order.append(run_id)
            return order.index(run_id)

    def remove(self, run_id: str) -> None:
        """Take a run out of the queue; the run itself stays.

        Raises:
            UserError: it is not in the queue, perhaps because it has just started.
        """
        with self._edit() as order:
            if run_id not in order or is_claimed(self.store.get(run_id).folder):
                raise UserError("This run is not waiting in the queue (any more). Stop it if it is working.")
            order.remove(run_id)

    def move(self, run_id: str, position: int) -> None:
        """Put a waiting run at a place of the queue, 0 for the next; places behind the end mean the end.

        Raises:
            UserError: it is not in the queue.
        """
        with self._edit() as order:
            if run_id not in order:
                raise UserError("This run is not waiting in the queue (any more).")
            order.remove(run_id)
            order.insert(max(0, position), run_id)

    def pending(self) -> list[str]:
        """The ids of the runs that wait, the next one first."""
        order = read_order(self._file) or []
        return [run_id for run_id in order if (run := self._run(run_id)) is not None and not _was_started(run)]

    @contextlib.contextmanager
    def _edit(self) -> Iterator[list[str]]:
        """The order, to be changed in place; what has changed is written when the block ends well."""
        self.store.workspace.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._edit_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock_within(descriptor, _EDIT_SECONDS):
                raise UserError("Another app holds the queue and does not let go. Try again, or close that app.")
            order = read_order(self._file)
            if order is None:
                order = self._set_aside()
            before = list(order)
            yield order
            if order != before:
                write_atomic(self._file, json.dumps({"version": 1, "order": order}) + "\n")
        finally:
            os.close(descriptor)

    def _set_aside(self) -> list[str]:
        """Keep a damaged queue file under another name; nothing is started that nobody asked for again."""
        kept = self._file.with_name(f"queue.damaged-{time.strftime('%Y%m%d-%H%M%S')}.json")
        os.replace(self._file, kept)
        self.problem = f"The queue file was damaged and is kept as {kept.name}. Put the waiting runs in again."
        return []

    def _run(self, run_id: str) -> Run | None:
        try:
            return self.store.get(run_id)
        except UserError:
            return None

    # --- the scheduler --------------------------------------------------------------------------------------------

    @property
    def scheduling(self) -> bool:
        """True while this app is the one that starts jobs."""
        return self._lock >= 0

    def tick(self) -> Run | None:
        """Start the next run if none is alive and this app may; returns it if one was started.

        Runs that were started before and ones that are gone leave the order. A run that cannot be started has its
        reason recorded and does not hold the others up.

        Raises:
            UserError, OSError: the workspace cannot be used; nothing is lost, the next tick tries again.
        """
        with self._guard:
            if not self._may_schedule() or not (read_order(self._file) or self._file_is_damaged()):
                return None
            with self._edit() as order:
                order[:] = [run_id for run_id in order if self._still_waits(run_id)]
                if not order or self._busy():
                    return None
                run = self.store.get(order[0])
                try:
                    start(run)
                    self.problem = None
                except EngineError as error:
                    self.problem = f"{run.title}: {error.message}"
                if is_claimed(run.folder):
                    del order[0]
                return run

    def _file_is_damaged(self) -> bool:
        return read_order(self._file) is None

    def _may_schedule(self) -> bool:
        if self._lock >= 0 and os.fstat(self._lock).st_nlink == 0:  # the lock file was deleted under us
            self._give_lock_back()
        if self._lock < 0:
            self.store.workspace.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o644)
            if not try_lock(descriptor):
                os.close(descriptor)
                return False
            self._lock = descriptor
        return True

    def _still_waits(self, run_id: str) -> bool:
        run = self._run(run_id)
        return run is not None and bool(run.entry) and not _was_started(run)

    def _busy(self) -> bool:
        """True while any run of the workspace is alive, also one that another app or a terminal started."""
        for run in self.store.list():
            if (run.folder / RESULT_FILE).exists() or not _was_started(run):
                continue
            if view_run(run).state.alive:
                return True
        return False

    def start_thread(self, seconds: float = _TICK_SECONDS) -> None:
        """Tick every `seconds` in a daemon thread until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, args=(seconds,), name="job queue", daemon=True)
            self._thread.start()

    def _loop(self, seconds: float) -> None:
        failed = False
        while not self._ended.wait(seconds):
            try:
                self.tick()
                if failed:
                    self.problem, failed = None, False
            except (K5Error, OSError) as error:
                self.problem, failed = f"The queue cannot go on: {error}", True
            except Exception:  # one odd folder must not end the scheduler of all the others
                _LOG.exception("The queue's tick failed.")
                self.problem, failed = "The queue cannot go on; the app's log says why.", True

    def close(self) -> None:
        """Stop scheduling and give the lock back; jobs that run go on. Closing twice is allowed."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._guard:
            self._give_lock_back()

    def _give_lock_back(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> JobQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _was_started(run: Run) -> bool:
    folder: Path = run.folder
    return is_claimed(folder) or (folder / EVENTS_FILE).exists()
