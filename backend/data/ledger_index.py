"""Remembers what was read from sources, captions and cache headers, so that a second look only asks for their stamps.

The index is a hidden file in the cache folder. It is a shortcut and nothing more: whatever does not have the stamp that
it had is read again, and a missing or damaged index costs time only.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from backend.data.cache_facts import CacheFacts, Verdict, read_latent_facts, read_text_facts
from backend.data.cache_names import INDEX_FILE
from backend.data.columns import pack_tables, unpack_tables
from backend.data.items import MediaFacts, look_at, source_problem
from backend.data.scan import Source, read_caption
from backend.data.stamps import Stamp, content_hash, stamp_of, stamps_of, text_hash
from backend.errors import UserError
from backend.files import write_atomic

_VERSION = "3"
_READERS = {"latent": read_latent_facts, "text": read_text_facts}
_TABLES = ("media", "captions", "hashes", "latent", "text")
_NOWHERE = Stamp(0, 0, 0)
Seen = tuple[Stamp, MediaFacts]
#: Stamp of a cache file, and what its header says or why it is of no use.
Cached = tuple[Stamp, CacheFacts | Verdict]


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
        # A table for each, because of what one of them says the other never says anything.
        self._caches: dict[str, dict[str, tuple[Stamp, CacheFacts]]] = {"latent": {}, "text": {}}
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
        (found,) = self.recall_all([source]).values()
        if isinstance(found, UserError):
            raise found
        return found

    def recall_all(self, sources: Sequence[Source]) -> dict[str, Seen | UserError | None]:
        """By location, what `recall` finds of each of very many sources, or the error that it would raise."""
        recalled: dict[str, Seen | UserError | None] = {}
        now, old = self._media, self._old["media"]
        locations = [source.location for source in sources]
        for location, stamp in zip(locations, stamps_of(locations), strict=True):
            known = old.get(location)
            if known is None or known[0] != stamp:
                # Perhaps it was probed since the index was loaded.
                known = now.get(location)
                if isinstance(stamp, OSError):
                    recalled[location] = source_problem(location, stamp)
                    continue
                if known is None or known[0] != stamp:
                    recalled[location] = None
                    continue
            recalled[location] = now[location] = known
        return recalled

    def remember(self, source: Source, seen: Seen) -> None:
        """Keep what a probe found."""
        self._media[source.location] = seen
        self._changed = True

    def caption_hashes(self, sources: Sequence[Source], prefix: str) -> list[str | UserError]:
        """The hash of each source's whole caption, or why it has none; a file is read only when its stamp is new."""
        old, now = self._old["captions"], self._captions
        locations = [source.caption_location for source in sources]
        stamps = iter(stamps_of([location for location in locations if location is not None]))
        hashes: list[str | UserError] = []
        for source, location in zip(sources, locations, strict=True):
            if location is None:
                hashes.append(_hash_caption(source, prefix))
                continue
            stamp = next(stamps)
            known = old.get(location)
            if known is None or known[0] != stamp or known[1] != prefix:
                if isinstance(stamp, OSError):
                    hashes.append(_unreadable(location, stamp))
                    continue
                found = _hash_caption(source, prefix)
                if isinstance(found, UserError):
                    hashes.append(found)
                    continue
                known = (stamp, prefix, found)
                self._changed = True
            now[location] = known
            hashes.append(known[2])
        return hashes

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
        stamp, facts = self.cache_facts_of([name], what)[name]
        return facts, stamp.size

    def cache_facts_of(self, names: Sequence[str], what: str) -> dict[str, Cached]:
        """By name, the stamp of each of very many cache files and what `cache_facts` says of it."""
        cached: dict[str, Cached] = {}
        old, now, base = self._old[what], self._caches[what], self._base
        for name, stamp in zip(names, stamps_of([base + name for name in names]), strict=True):
            known = old.get(name)
            if known is not None and known[0] == stamp:
                cached[name] = now[name] = known
            elif isinstance(stamp, OSError):
                cached[name] = _NOWHERE, Verdict("broken", (f"cannot be read: {stamp.strerror or stamp}",))
            else:
                cached[name] = stamp, self._read_cache(name, what, stamp)
        return cached

    def _read_cache(self, name: str, what: str, stamp: Stamp) -> CacheFacts | Verdict:
        try:
            facts = _READERS[what](self._base + name)
        except UserError as error:
            return Verdict("broken", (error.message,))
        facts = facts._replace(shared=self._shared[self._intern(facts.shared)])
        self._caches[what][name] = (stamp, facts)
        self._changed = True
        return facts

    def _intern(self, shared: Mapping[str, str]) -> int:
        key = _frozen(shared)
        number = self._shared_ids.get(key)
        if number is None:
            number = self._shared_ids[key] = len(self._shared)
            self._shared.append(dict(shared))
        return number

    def save(self) -> None:
        """Store what was asked for since the index was loaded, if that is not what is stored already."""
        asked = {"media": self._media, "captions": self._captions, "hashes": self._hashes} | self._caches
        tables: dict[str, dict[str, Any]] = {name: asked[name] or self._old[name] for name in _TABLES}
        same = not self._changed and all(len(tables[name]) == len(self._old[name]) for name in _TABLES)
        if same or not os.path.isdir(self._base):
            return
        numbers = {id(shared): number for number, shared in enumerate(self._shared)}

        def cache(row: tuple[Stamp, CacheFacts]) -> tuple[Any, ...]:
            ours, shared, *rest = row[1]
            return ours, numbers[id(shared)], *rest

        body = pack_tables(
            {
                "media": _columns(tables["media"], lambda row: row[1]),
                "captions": _columns(tables["captions"], lambda row: row[1:]),
                "hashes": _columns(tables["hashes"], lambda row: row[1:]),
                "latent": _columns(tables["latent"], cache),
                "text": _columns(tables["text"], cache),
                "shared": [self._shared],
            }
        )
        # A folder that may be read but not written is checked all the same, only more slowly.
        with suppress(UserError, OSError):
            write_atomic(self._base + INDEX_FILE, _seal(body).encode() + b"\n" + body)


def _hash_caption(source: Source, prefix: str) -> str | UserError:
    try:
        return text_hash(read_caption(source, prefix))
    except UserError as error:
        return error


def _unreadable(location: str, error: OSError) -> UserError:
    return UserError(f"The caption {location} cannot be read: {error.strerror or error}. Check the file.")


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
        stored = unpack_tables(body)
    except (OSError, ValueError):
        return tables
    tables["shared"] = shared = stored["shared"][0]
    for name in ("captions", "hashes"):
        keys, stamps, rest = _rows(stored[name])
        tables[name] = dict(zip(keys, zip(stamps, *rest, strict=True), strict=True))
    keys, stamps, rest = _rows(stored["media"])
    facts: Iterable[Any] = map(_make(MediaFacts), zip(*rest, strict=True))
    tables["media"] = dict(zip(keys, zip(stamps, facts, strict=True), strict=True))
    for name in ("latent", "text"):
        keys, stamps, rest = _rows(stored[name])
        if rest:
            rest[1] = [shared[number] for number in rest[1]]
        facts = map(_make(CacheFacts), zip(*rest, strict=True))
        tables[name] = dict(zip(keys, zip(stamps, facts, strict=True), strict=True))
    return tables
