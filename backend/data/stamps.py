"""What identifies the content of a source, a caption or a cache: cheap stamps first, hashes when they differ."""

from __future__ import annotations

import functools
import hashlib
import operator
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from backend.files import fingerprint

_HASH_DIGITS = 16


class Stamp(NamedTuple):
    """Size in bytes, modification time in nanoseconds and inode; equal stamps mean an untouched file."""

    size: int
    mtime_ns: int
    inode: int


# What `Stamp(...)` does, without the call of a Python function: a ledger asks for hundreds of thousands.
_MAKE = functools.partial(tuple.__new__, Stamp)
_FIELDS = operator.attrgetter("st_size", "st_mtime_ns", "st_ino")


def stamp_of(location: str | Path) -> Stamp:
    """The stamp of a file; of a folder (of frames): the sum of the sizes and the latest time of the files in it.

    Raises:
        OSError: it is not there or cannot be looked at.
    """
    status = os.stat(location)
    if stat.S_ISDIR(status.st_mode):
        parts = [os.stat(file) for file in _frames_of(location)]
        latest = max((part.st_mtime_ns for part in parts), default=0)
        return Stamp(sum(part.st_size for part in parts), latest, status.st_ino)
    return _MAKE((status.st_size, status.st_mtime_ns, status.st_ino))


def stamps_of(locations: Sequence[str]) -> list[Stamp | OSError]:
    """`stamp_of` each of very many, in their order; for one that is not there or cannot be looked at, why."""
    stamps: list[Stamp | OSError] = []
    keep, is_folder = stamps.append, stat.S_ISDIR
    statuses = map(os.stat, locations)
    while len(stamps) < len(locations):
        # An error leaves the loop; `statuses` then goes on with the next file.
        try:
            for status in statuses:
                if is_folder(status.st_mode):
                    keep(stamp_of(locations[len(stamps)]))
                else:
                    keep(_MAKE(_FIELDS(status)))
        except OSError as error:
            keep(error)
    return stamps


def content_hash(location: str | Path) -> str:
    """16 hexadecimal digits for the content of a file (see `backend.files.fingerprint`) or of a folder of frames.

    Raises:
        OSError: it cannot be read.
    """
    if not os.path.isdir(location):
        return fingerprint(location)
    digest = hashlib.sha256()
    for file in _frames_of(location):
        digest.update(os.fsencode(os.path.basename(file)) + b"\0" + fingerprint(file).encode() + b"\n")
    return digest.hexdigest()[:_HASH_DIGITS]


def text_hash(text: str) -> str:
    """16 hexadecimal digits for a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_HASH_DIGITS]


def _frames_of(folder: str | Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(item.path for item in entries if item.is_file() and not item.name.startswith("."))
