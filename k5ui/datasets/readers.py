"""One set of guarded decoding processes for everything that looks at media for the page."""

from __future__ import annotations

import os
import threading

from backend.data.watchdog import MediaReader
from backend.errors import Stopped

STALL_SECONDS = 20.0
WORKERS = min(4, max(2, (os.cpu_count() or 2) // 2))


class SharedReader:
    """Starts the processes when they are needed and keeps them until `close`. Safe to use from several threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._reader: MediaReader | None = None
        self._closed = False

    def get(self) -> MediaReader:
        """The reader.

        Raises:
            Stopped: it was closed.
        """
        with self._guard:
            if self._closed:
                raise Stopped("The app ends.")
            if self._reader is None:
                self._reader = MediaReader(WORKERS, STALL_SECONDS)
            return self._reader

    def close(self) -> None:
        """End the processes; whoever waits for one gets `Stopped`."""
        with self._guard:
            self._closed = True
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
