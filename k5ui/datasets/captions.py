"""Caption files as the page edits them: text with a revision, written whole or not at all, never through a link."""

from __future__ import annotations

import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from backend.config.dataset import DatasetEntry
from backend.config.dataset_text import value_problem
from backend.errors import UserError
from backend.files import write_atomic, write_problem
from k5ui.datasets.documents import Conflict, revision_of
from k5ui.datasets.snapshot import Row
from k5ui.roots import Roots

NO_FILE = "none"
MAX_CAPTION_BYTES = 1 << 20
#: Files that are written as captions end so; a setting must not turn programs or media into captions.
CAPTION_SUFFIXES = frozenset({".txt", ".text", ".caption", ".captions", ".cap", ".md", ".tags", ".prompt"})
# A pipe in the folder must not make anybody wait; Windows has no such flag, but one for files that are not text.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class CaptionNow(NamedTuple):
    """A caption as it is now. `text` None: there is none, or `problem` says why it cannot be read.

    `revision` stands for `data`, the bytes of the file ("none": no file). `location` is where the caption is or would
    be.
    """

    text: str | None
    revision: str
    editable: bool
    location: str | None
    problem: str | None = None
    data: bytes | None = None


def read_caption_now(row: Row, entry: DatasetEntry, roots: Roots) -> CaptionNow:
    """The caption of a source without white space at its ends. It never raises: a page is drawn from it."""
    location = caption_location(row, entry)
    if location is None or not row.allowed:
        return CaptionNow(row.source.caption if row.allowed else None, NO_FILE, False, None)
    if roots.exposed and not roots.allows(location):
        return CaptionNow(None, NO_FILE, False, None, "The caption lies outside of the folders that this app may read.")
    editable = not os.path.islink(location) and Path(location).suffix.lower() in CAPTION_SUFFIXES
    try:
        data = read_file(location)
    except UserError as error:
        return CaptionNow(None, NO_FILE, False, location, error.message)
    if data is None:
        return CaptionNow(None, NO_FILE, editable, location)
    revision = revision_of(data)
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        problem = f"The caption is not UTF-8 (byte {error.start + 1}). Save it again as UTF-8 text."
        return CaptionNow(None, revision, False, location, problem)
    return CaptionNow(text.replace("\r\n", "\n"), revision, editable, location, data=data)


def caption_location(row: Row, entry: DatasetEntry) -> str | None:
    """The caption file of a source, or where a new one belongs; None when captions stand in a JSONL file."""
    if entry.jsonl_file is not None:
        return None
    if row.source.caption_location is not None:
        return row.source.caption_location
    return os.path.splitext(row.source.location)[0] + entry.caption_extension


def read_file(location: str) -> bytes | None:
    """The bytes of a caption file, None if there is none.

    Raises:
        UserError: it cannot be read, is no regular file, or is longer than 1 MB.
    """
    try:
        descriptor = os.open(location, _READ)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{os.path.basename(location)} is not a file. Move it away.")
            # As much as there is: a buffer of the largest size for each of ten thousand captions costs seconds.
            data = os.read(descriptor, min(status.st_size, MAX_CAPTION_BYTES) + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"The caption cannot be read: {error.strerror or error}. Check the file.") from error
    if len(data) > MAX_CAPTION_BYTES:
        raise UserError("The caption is longer than 1 MB. Check that it is a caption.")
    return data


def new_bytes(text: str, old: bytes | None) -> bytes:
    """The bytes of a caption file that says `text`, with the line ends and the end of the old one.

    Raises:
        UserError: the text is too long or cannot stand in a file.
    """
    trouble = value_problem(text)
    if trouble:
        raise UserError(f"The caption {trouble}", "caption")
    plain = text.replace("\r\n", "\n").strip()
    if old is None or old.endswith(b"\n"):
        plain += "\n"
    data = plain.replace("\n", "\r\n").encode() if old and b"\r\n" in old else plain.encode()
    if len(data) > MAX_CAPTION_BYTES:
        raise UserError("A caption may be at most 1 MB long. Shorten it.", "caption")
    return data


def replace_file(location: str, expected: str, data: bytes | None, durable: bool = True) -> None:
    """Put `data` in place of a caption file of the expected revision; None takes a file away that was made here.

    What a file held must already be in the journal: then a power cut costs nothing even when not `durable`, which
    leaves out waiting for the disk.

    Raises:
        Conflict: the file was changed meanwhile.
        UserError: it cannot be written.
    """
    current = read_file(location)
    if (NO_FILE if current is None else revision_of(current)) != expected:
        raise Conflict(f"The caption {os.path.basename(location)} was changed by another program. Nothing was written.")
    try:
        if data is None:
            with suppress(FileNotFoundError):
                os.unlink(location)
        elif durable:
            write_atomic(location, data)
        else:
            _write_fast(location, data)
    except OSError as error:
        problem = write_problem(error, Path(location))
        if problem is error:
            raise UserError(f"{location} cannot be written: {error.strerror or error}.") from error
        raise problem from error


def _write_fast(location: str, data: bytes) -> None:
    temporary = os.path.join(os.path.dirname(location), f".k5-{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as handle:
            handle.write(data)
        os.replace(temporary, location)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise
