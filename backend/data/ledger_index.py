"""Remembers what was read from sources, captions and cache headers, so that a second look only asks for their stamps.

The index is a hidden file in the cache folder. It is a shortcut and nothing more: whatever does not have the stamp that
it had is read again, and a missing or damaged index costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from backend.data.cache_facts import CacheFacts, Verdict, read_latent_facts, read_text_facts
from backend.data.cache_names import INDEX_FILE
from backend.data.items import MediaFacts, look_at
from backend.data.scan import Source, read_caption
from backend.data.stamps import Stamp, content_hash, stamp_of, text_hash
from backend.errors import UserError
from backend.files import write_atomic

_VERSION = "1"
_READERS = {"latent": read_latent_facts, "text": read_text_facts}


class LedgerIndex:
    """The index of one cache folder. Entries that are not asked for are forgotten when it is saved."""

    def __init__(self, folder: str | Path) -> None:
        self._base = os.path.join(os.fspath(folder), "")
        self._old = _load(self._base + INDEX_FILE)
        # Lists instead of tuples and one flat list per entry: that is what JSON gives, and it is read fastest.
        self._media: dict[str, list[Any]] = {}
        self._captions: dict[str, list[Any]] = {}
        self._hashes: dict[str, list[Any]] = {}
        self._caches: dict[str, list[Any]] = {}
        self._shared: list[dict[str, str]] = self._old["shared"]
        self._shared_ids = {_frozen(shared): number for number, shared in enumerate(self._shared)}
        self._changed = False

    def look(self, source: Source) -> tuple[Stamp, MediaFacts]:
        """Stamp and facts of a source; it is probed only when its stamp is new.

        Raises:
            UserError: it is broken or gone.
        """
        known = self._old["media"].get(source.location)
        if known is not None:
            try:
                stamp = stamp_of(source.location)
            except OSError as error:
                raise UserError(
                    f"{source.location} cannot be read: {error.strerror or error}. Check the file."
                ) from error
            if known[0] == stamp[0] and known[1] == stamp[1] and known[2] == stamp[2]:
                self._media[source.location] = known
                return stamp, MediaFacts(*known[3:])
        stamp, media = look_at(source)
        self._media[source.location] = [*stamp, *media]
        self._changed = True
        return stamp, media

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
        if known is None or known[0] != stamp[0] or known[1] != stamp[1] or known[2] != stamp[2] or known[3] != prefix:
            known = [*stamp, prefix, text_hash(read_caption(source, prefix))]
            self._changed = True
        self._captions[location] = known
        return known[4]

    def content_hash(self, location: str) -> str:
        """The hash of a source's content, asked for when its time differs from the one that its caches remember.

        Raises:
            OSError: it cannot be read.
        """
        stamp = stamp_of(location)
        known = self._old["hashes"].get(location) or self._hashes.get(location)
        if known is None or known[:3] != [*stamp]:
            known = [*stamp, content_hash(location)]
            self._changed = True
        self._hashes[location] = known
        return known[3]

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
        if known is None or known[0] != stamp[0] or known[1] != stamp[1] or known[2] != stamp[2]:
            try:
                facts = _READERS[what](self._base + name)
            except UserError as error:
                return Verdict("broken", (error.message,)), stamp.size
            known = [*stamp, facts.ours, self._intern(facts.shared), *facts[2:]]
            self._changed = True
        self._caches[name] = known
        return CacheFacts(known[3], self._shared[known[4]], known[5], known[6], known[7], known[8]), stamp.size

    def _intern(self, shared: Any) -> int:
        key = _frozen(shared)
        number = self._shared_ids.get(key)
        if number is None:
            number = self._shared_ids[key] = len(self._shared)
            self._shared.append(dict(shared))
        return number

    def save(self) -> None:
        """Store what was asked for since the index was loaded, if that is not what is stored already."""
        tables = {"media": self._media, "captions": self._captions, "hashes": self._hashes, "caches": self._caches}
        same = not self._changed and all(len(table) == len(self._old[name]) for name, table in tables.items())
        if same or not os.path.isdir(self._base):
            return
        body = json.dumps(tables | {"shared": self._shared}, separators=(",", ":"))
        # A folder that may be read but not written is checked all the same, only more slowly.
        with suppress(UserError, OSError):
            write_atomic(self._base + INDEX_FILE, f"{_seal(body.encode())}\n{body}")


def _frozen(shared: Any) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(shared.items()))


def _seal(body: bytes) -> str:
    return hashlib.sha256(_VERSION.encode() + body).hexdigest()


def _load(location: str) -> dict[str, Any]:
    """The stored tables; empty ones when there are none, of another version, or not exactly as they were written."""
    try:
        with open(location, "rb") as handle:
            seal, _, body = handle.read().partition(b"\n")
        if seal == _seal(body).encode():
            return json.loads(body)
    except (OSError, ValueError):
        pass
    return {"media": {}, "captions": {}, "hashes": {}, "caches": {}, "shared": []}
