"""Writes caches off the main path: one thread, a short queue, and the first failure ends the work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_WAITING_FILES = 16


class WriteBehind:
    """Calls what it is given, one after the other, in a thread of its own.

    The queue is short, so that an encoder that is faster than the disk waits. After a failure nothing more is written,
    and the next call of `put` or `finish` raises it.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING_FILES)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="write-behind", daemon=True)
        self._thread.start()

    def put(self, write: Callable[[], None]) -> None:
        """Have `write` called soon.

        Raises:
            whatever an earlier one raised.
        """
        self._raise_failure()
        self._waiting.put(write)

    def finish(self) -> None:
        """Wait until everything is written and the thread has ended; may be called again.

        Raises:
            whatever a write raised.
        """
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            write = self._waiting.get()
            if write is None:
                return
            if self._failure is not None:
                continue  # The queue is emptied, so that nobody waits for room in it.
            try:
                write()
            except BaseException as error:
                self._failure = error
