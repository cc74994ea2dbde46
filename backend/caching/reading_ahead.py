"""Reads work ahead of whoever uses it: several threads, results as they are ready, bounded by bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
_WAIT_SECONDS = 0.5
_AHEAD = 4


class ReadAhead(Generic[Job, Result]):
    """Calls `read` for every job in `workers` threads and gives (job, result or error) in the order of completion.

    Jobs are begun in their order. One is begun only while the results that are being made or wait here stay below
    `limit_bytes` together (a single one may be larger) and are at most `_AHEAD` a worker, so memory does not depend on
    how many jobs there are.

    Args:
        size_of: bytes of a job's result, known before it is read.
        stopper: called when it is closed early, to make calls of `read` that are under way return.
        waiting: called twice a second while there is no result; what it raises ends the iteration.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        read: Callable[[Job], Result],
        size_of: Callable[[Job], int],
        *,
        workers: int,
        limit_bytes: int,
        stopper: Callable[[], None] = lambda: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._jobs, self._read, self._size_of, self._limit = jobs, read, size_of, limit_bytes
        self._stopper, self._waiting = stopper, waiting
        self._next = 0
        self._held = self._held_count = 0
        self._limit_count = _AHEAD * workers
        self._closed = False
        self._change = threading.Condition()
        self._ready: queue.SimpleQueue[tuple[Job, Result | Exception, int]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"read-ahead-{number}", daemon=True)
            for number in range(min(workers, len(jobs)))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ReadAhead[Job, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Job, Result | Exception]]:
        for _ in range(len(self._jobs)):
            job, result, size = self._await()
            with self._change:
                self._held -= size
                self._held_count -= 1
                self._change.notify_all()
            yield job, result

    def _await(self) -> tuple[Job, Result | Exception, int]:
        while True:
            try:
                return self._ready.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                self._waiting()

    def close(self) -> None:
        """Begin no more jobs, and wait for the threads."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if any(thread.is_alive() for thread in self._threads):
            self._stopper()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            taken = self._take()
            if taken is None:
                return
            job, size = taken
            try:
                result: Result | Exception = self._read(job)
            except Exception as error:  # It belongs to this job; whoever uses the results decides what it means.
                result = error
            self._ready.put((job, result, size))

    def _take(self) -> tuple[Job, int] | None:
        with self._change:
            while not self._closed and self._next < len(self._jobs):
                job = self._jobs[self._next]
                size = self._size_of(job)
                fits = self._held_count < self._limit_count and self._held + size <= self._limit
                if fits or not self._held_count:
                    self._next += 1
                    self._held += size
                    self._held_count += 1
                    return job, size
                self._change.wait()
            return None
