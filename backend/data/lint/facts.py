"""Remembers what was measured in sources, so that a second look only measures what changed.

The facts are a hidden file in the cache folder, a shortcut and nothing more: whatever does not have the stamp and the
settings that it was measured with is measured again, and a missing or damaged file costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from backend.data.items import MediaFacts
from backend.data.lint.measure import Measurement
from backend.data.stamps import Stamp, text_hash
from backend.files import write_atomic

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry

FACTS_FILE = ".k5_lint.json"
# To be raised when the same file would be measured differently.
_VERSION = 1


class Fact(NamedTuple):
    """What is known of one source: its stamp, what it is, a hash of its content, and what is in it."""

    stamp: Stamp
    media: MediaFacts
    content: str
    measurement: Measurement


class FactStore:
    """The facts of one dataset; safe to use from several threads. Those that are not asked for are forgotten."""

    def __init__(self, entry: DatasetEntry) -> None:
        self._path = os.path.join(os.fspath(entry.cache_directory), FACTS_FILE)
        self._settings = settings_hash(entry)
        self._old = _load(self._path)
        self._new: dict[str, dict[str, Any]] = {}
        self._changed = False
        self._lock = threading.Lock()

    def known(self, location: str, stamp: Stamp) -> Fact | None:
        """What was measured in a source, if it has the same stamp and the settings are the same."""
        record = self._old.get(location)
        try:
            fact = None if record is None else _fact(record, self._settings)
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        if fact is None or fact.stamp != stamp:
            return None
        with self._lock:
            self._new[location] = self._old[location]
        return fact

    def add(self, location: str, fact: Fact) -> None:
        """Remember what was measured."""
        record = {
            "settings": self._settings,
            "stamp": list(fact.stamp),
            "media": list(fact.media),
            "content": fact.content,
            "measured": fact.measurement.as_json(),
        }
        with self._lock:
            self._new[location] = record
            self._changed = True

    def save(self, whole: bool = True) -> None:
        """Store what is known, atomically; with `whole` off, what was not asked for yet is kept as well.

        Raises:
            UserError, OSError: the cache folder cannot be written.
        """
        with self._lock:
            records = dict(self._new) if whole else {**self._old, **self._new}
            unchanged = not self._changed and records.keys() == self._old.keys()
            self._changed = False
        if unchanged:
            return
        body = json.dumps(records, separators=(",", ":"))
        write_atomic(self._path, f"{_seal(body.encode())}\n{body}")
        self._old = records


def settings_hash(entry: DatasetEntry) -> str:
    """16 hexadecimal digits for the settings on which the choice of frames depends."""
    keys = ("frame_extraction", "target_frames", "frame_stride", "frame_sample", "max_frames", "source_fps")
    settings = {key: getattr(entry, key) for key in keys} if entry.kind == "video" else {}
    return text_hash(json.dumps([_VERSION, entry.kind, settings], sort_keys=True))


def _fact(record: Mapping[str, Any], settings: str) -> Fact | None:
    if record["settings"] != settings:
        return None
    stamp, media = Stamp(*record["stamp"]), MediaFacts(*record["media"])
    return Fact(stamp, media, str(record["content"]), Measurement.from_json(record["measured"]))


def _seal(body: bytes) -> str:
    return hashlib.sha256(f"{_VERSION}\n".encode() + body).hexdigest()


def _load(path: str) -> dict[str, dict[str, Any]]:
    """The stored records; none when there are none, of another version, or not exactly as they were written."""
    try:
        with open(path, "rb") as handle:
            seal, _, body = handle.read().partition(b"\n")
        if seal == _seal(body).encode():
            return json.loads(body)
    except (OSError, ValueError):
        return {}
    return {}
