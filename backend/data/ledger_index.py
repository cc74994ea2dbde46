"""Remembers what was read from sources, captions and cache headers, so that a second look only asks for their stamps.

The index is a hidden file in the cache folder. It is a shortcut and nothing more: whatever does not have the stamp that
it had is read again, and a missing or damaged index costs time only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from backend.data.cache_facts import CacheFacts, Verdict, read_latent_facts, read_text_facts
from backend.data.cache_names import INDEX_FILE
from backend.data.items import MediaFacts, look_at, source_stamp
from backend.data.scan import Source, read_caption
from backend.data.stamps import Stamp, content_hash, stamp_of, text_hash
from backend.errors import UserError
from backend.files import write_atomic

_VERSION = "2"
_READERS = {"latent": read_latent_facts, "text": read_text_facts}
_TABLES = ("media", "captions", "hashes", "caches")
Seen = tuple[Stamp, MediaFacts]


class LedgerIndex:
    """The index of one cache folder.

    Entries that are not asked for are forgotten when it is saved, but a whole table that nobody asked about stays.
    """

    def __init__(self, folder: str | Path) -> None:
        self._base = os.path.join(os.fspath(folder), "")
        self._old = _load(self._base + INDEX_FILE)
        self._media: dict[str, Seen] = {}
        self._captions: dict[str, tuple[Stamp, str, str]] = {}
        self._hashes: dict[str, tuple[Stamp, str]] = {}
        self._caches: dict[str, tuple[Stamp, CacheFacts]] = {}
        self._shared: list[dict[str, str]] = self._old["shared"]
        self._shared_ids = {_frozen(shared): number for number, shared in enumerate(self._shared)}
        self._changed = False

    def look(self, source: Source) -> Seen:
        """Stamp and facts of a source; it is probed, in this process, only when its stamp is new.

        Raises:
            UserError: it is broken or gone.
        """
        known = self.recall(source)
        if known is None:
            known = look_at(source)
            self.remember(source, known)
        return known

    def count_new(self, sources: Sequence[Source]) -> int:
        """How many of these sources the index has never seen (those that changed since are not counted)."""
        return sum(source.location not in self._old["media"] for source in sources)

    def recall(self, source: Source) -> Seen | None:
        """What is remembered of a source that has not changed since; None: it has to be probed.

        Raises:
            UserError: it is gone.
        """
        location = source.location
        stamp = source_stamp(source)
        known = self._media.get(location) or self._old["media"].get(location)
        if known is None or known[0] != stamp:
            return None
        self._media[location] = known
        return known

    def remember(self, source: Source, seen: Seen) -> None:
        """Keep what a probe found."""
        self._media[source.location] = seen
        self._changed = True

    def caption_hash(self, source: Source, prefix: str) -> str:
        """The hash of a source's whole caption; its file is read only when its stamp is new.

        Raises:
            UserError: there is no caption, or it cannot be read.
        """
        location = source.caption_location
        if location is None:
            return text_hash(read_caption(source, prefix))
        try:
            stamp = stamp_of(location)
        except OSError as error:
            raise UserError(
                f"The caption {location} cannot be read: {error.strerror or error}. Check the file."
            ) from error
        known = self._old["captions"].get(location)
        if known is None or known[0] != stamp or known[1] != prefix:
            known = (stamp, prefix, text_hash(read_caption(source, prefix)))
            self._changed = True
        self._captions[location] = known
        return known[2]

    def content_hash(self, location: str) -> str:
        """The hash of a source's content, asked for when its time differs from the one that its caches remember.

        Raises:
            OSError: it cannot be read.
        """
        stamp = stamp_of(location)
        known = self._old["hashes"].get(location) or self._hashes.get(location)
        if known is None or known[0] != stamp:
            known = (stamp, content_hash(location))
            self._changed = True
        self._hashes[location] = known
        return known[1]

    def cache_facts(self, name: str, what: str) -> tuple[CacheFacts | Verdict, int]:
        """What the header of the cache file `name` says ("latent" or "text"), and the file's size in bytes.

        The header is read only when the stamp is new. Files that cannot be understood give a verdict at once. Equal
        `shared` facts are one object.
        """
        try:
            stamp = stamp_of(self._base + name)
        except OSError as error:
            return Verdict("broken", (f"cannot be read: {error.strerror or error}",)), 0
        known = self._old["caches"].get(name)
        if known is None or known[0] != stamp:
            try:
                facts = _READERS[what](self._base + name)
            except UserError as error:
                return Verdict("broken", (error.message,)), stamp.size
            known = (stamp, facts._replace(shared=self._shared[self._intern(facts.shared)]))
            self._changed = True
        self._caches[name] = known
        return known[1], stamp.size

    def _intern(self, shared: Mapping[str, str]) -> int:
        key = _frozen(shared)
        number = self._shared_ids.get(key)
        if number is None:
            number = self._shared_ids[key] = len(self._shared)
            self._shared.append(dict(shared))
        return number

    def save(self) -> None:
        """Store what was asked for since the index was loaded, if that is not what is stored already."""
        asked = {"media": self._media, "captions": self._captions, "hashes": self._hashes, "caches": self._caches}
        tables: dict[str, dict[str, Any]] = {name: asked[name] or self._old[name] for name in _TABLES}
        same = not self._changed and all(len(tables[name]) == len(self._old[name]) for name in _TABLES)
        if same or not os.path.isdir(self._base):
            return
        numbers = {id(shared): number for number, shared in enumerate(self._shared)}
        # Columns instead of rows: a few long lists are read several times faster than many short ones.
        columns = {
            "media": _columns(tables["media"], lambda row: row[1]),
            "captions": _columns(tables["captions"], lambda row: row[1:]),
            "hashes": _columns(tables["hashes"], lambda row: row[1:]),
            "caches": _columns(tables["caches"], lambda row: (row[1][0], numbers[id(row[1][1])], *row[1][2:])),
        }
        body = json.dumps(columns | {"shared": self._shared}, separators=(",", ":"))
        # A folder that may be read but not written is checked all the same, only more slowly.
        with suppress(UserError, OSError):
            write_atomic(self._base + INDEX_FILE, f"{_seal(body.encode())}\n{body}")


def _columns(table: dict[str, Any], rest: Callable[[Any], tuple[Any, ...]]) -> list[Any]:
    """Keys, size, time and inode of the stamps, then one list for each of the values that `rest` gives of a row."""
    return list(zip(*((key, *row[0], *rest(row)) for key, row in table.items()), strict=True))


def _rows(columns: list[list[Any]]) -> tuple[list[str], Iterable[Stamp], list[list[Any]]]:
    """What `_columns` made: keys, stamps, and the other columns."""
    if not columns:
        return [], [], []
    keys, sizes, times, inodes, *rest = columns
    return keys, map(_make(Stamp), zip(sizes, times, inodes, strict=True)), rest


def _make(kind: type[tuple[Any, ...]]) -> Callable[[tuple[Any, ...]], Any]:
    # What `kind(...)` does, without the call of a Python function for each of very many.
    return functools.partial(tuple.__new__, kind)


def _frozen(shared: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(shared.items()))


def _seal(body: bytes) -> str:
    return hashlib.sha256(_VERSION.encode() + body).hexdigest()


def _load(location: str) -> dict[str, Any]:
    """The stored tables; empty ones when there are none, of another version, or not exactly as they were written."""
    tables: dict[str, Any] = {name: {} for name in _TABLES} | {"shared": []}
    try:
        with open(location, "rb") as handle:
            seal, _, body = handle.read().partition(b"\n")
        if seal != _seal(body).encode():
            return tables
        stored = json.loads(body)
    except (OSError, ValueError):
        return tables
    tables["shared"] = shared = stored["shared"]
    for name in ("captions", "hashes"):
        keys, stamps, rest = _rows(stored[name])
        tables[name] = dict(zip(keys, zip(stamps, *rest, strict=True), strict=True))
    keys, stamps, rest = _rows(stored["media"])
    facts: Iterable[Any] = map(_make(MediaFacts), zip(*rest, strict=True))
    tables["media"] = dict(zip(keys, zip(stamps, facts, strict=True), strict=True))
    keys, stamps, rest = _rows(stored["caches"])
    if rest:
        rest[1] = [shared[number] for number in rest[1]]
    facts = map(_make(CacheFacts), zip(*rest, strict=True))
    tables["caches"] = dict(zip(keys, zip(stamps, facts, strict=True), strict=True))
    return tables
