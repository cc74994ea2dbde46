"""Keeps a value for each key that takes long to make: made in a thread, shown as it was until the new one is there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from backend.errors import Problems

_LOG = logging.getLogger(__name__)
#: Nothing changes on a disk so often that it must be looked at more often while nobody works on it.
QUIET_SECONDS = 8.0
#: While a run makes progress.
BUSY_SECONDS = 1.5
# Looking may cost this share of the time at most.
_QUIET_SHARE, _BUSY_SHARE = 20.0, 4.0


@dataclass(frozen=True)
class Kept:
    """What is known of a key: the newest value (None: none yet), or why there is none; `checked` seconds since 1970."""

    value: Any = None
    error: str | None = None
    checked: float | None = None
    took: float = 0.0
    working: bool = False


@dataclass
class _Entry:
    kept: Kept
    reasons: Any = None
    progress: Any = None
    ended: float = float("-inf")
    asked: bool = False


class Keeper:
    """Makes values with `make(key)` in threads, one at a time for a key and at most one at a time altogether."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make
        self._guard = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    def look(self, key: str, reasons: Any, progress: Any = None) -> Kept:
        """What is known now; a new value is begun when `reasons` changed, soon when `progress` did, else from time to
        time, and always after `ask`."""
        with self._guard:
            entry = self._entries.setdefault(key, _Entry(Kept()))
            if not entry.kept.working and self._due(entry, reasons, progress):
                entry.reasons, entry.progress, entry.asked = reasons, progress, False
                entry.kept = replace(entry.kept, working=True)
                threading.Thread(target=self._work, args=(key, entry), name=f"ledger {key}", daemon=True).start()
            return entry.kept

    def ask(self, key: str) -> None:
        """Make a new value at the next look, however new the old one is."""
        with self._guard:
            if key in self._entries:
                self._entries[key].asked = True

    def run(self, key: str, action: Callable[[], None]) -> None:
        """Do something else that belongs to a key in a thread, not while its value is being made; then make it anew."""

        def work() -> None:
            with self._one_at_a_time:
                action()
            self.ask(key)

        threading.Thread(target=work, name=f"tidy {key}", daemon=True).start()

    @staticmethod
    def _due(entry: _Entry, reasons: Any, progress: Any) -> bool:
        age = time.monotonic() - entry.ended
        if entry.asked or reasons != entry.reasons:
            return True
        if progress != entry.progress and age > max(BUSY_SECONDS, _BUSY_SHARE * entry.kept.took):
            return True
        return age > max(QUIET_SECONDS, _QUIET_SHARE * entry.kept.took)

    def _work(self, key: str, entry: _Entry) -> None:
        with self._one_at_a_time:
            began = time.monotonic()
            value = error = None
            try:
                value = self._make(key)
            except Problems as problem:
                error = sentences(problem)
            except Exception:
                _LOG.exception("The caches of dataset %s could not be checked.", key)
                error = "The caches could not be checked; the app's log says why."
            ended = time.monotonic()
        with self._guard:
            entry.kept = Kept(value, error, time.time(), ended - began, False)
            entry.ended = ended


def sentences(error: Problems) -> str:
    """All problems of an error as one text; those of a field begin with its name."""
    return " ".join(f"{item.field}: {item.message}" if item.field else item.message for item in error.problems)
