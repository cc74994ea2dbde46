"""Finds the sources of a dataset, with their captions, in one pass over its folder or its JSONL file."""

from __future__ import annotations

import fnmatch
import functools
import json
import operator
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backend.data.cache_names import unique_keys
from backend.data.formats import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from backend.data.pauses import no_collection
from backend.errors import Problem, UserError

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry

_MAX_CAPTION_BYTES = 1 << 20
_MAX_LINE_BYTES = 4 << 20
_SHOWN = 120


class Source(NamedTuple):
    """One image or video of a dataset.

    Attributes:
        location: absolute path of the file, or of a folder of frames (JSONL video datasets only).
        kind: "image" or "video".
        identity: its path inside the dataset's folder with forward slashes, or the path as the JSONL file has it.
        name: the key of its caches; no two sources of a dataset share one.
        caption_location: path of the caption file, None when there is none.
        caption: the caption itself if the JSONL file gave it.
    """

    location: str
    kind: str
    identity: str
    name: str
    caption_location: str | None = None
    caption: str | None = None

    @property
    def path(self) -> Path:
        """The file or the folder of frames."""
        return Path(self.location)

    @property
    def caption_path(self) -> Path | None:
        """The caption file, if the caption is in one."""
        return Path(self.caption_location) if self.caption_location is not None else None

    @property
    def has_caption(self) -> bool:
        """Whether there is a caption; an empty one counts."""
        return self.caption is not None or self.caption_location is not None


@dataclass
class Scan:
    """What a dataset consists of, sorted by path (JSONL: in the order of its lines).

    `sources` holds those of `missing_captions` too, but none of `excluded`, which the configuration leaves out (their
    cache names stay theirs, so that nothing is renamed when one is left out or taken back). `problems` are bad lines
    and folders that cannot be read: with any of them `sources` is not the whole dataset.
    """

    sources: list[Source] = field(default_factory=list)
    missing_captions: list[Source] = field(default_factory=list)
    excluded: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


# identity, stem, location, caption_location, caption; a plain tuple, because there may be very many.
_Found = tuple[str, str, str, str | None, str | None]


def scan_dataset(entry: DatasetEntry) -> Scan:
    """Find all sources of one dataset. No media file and no caption file is opened.

    Hidden files are left out, as other tools do; so is the cache folder when it lies inside a recursive source folder.
    Symbolic links are followed, circles of them once. Paths in a JSONL file are absolute, relative to that file's
    folder, or relative to the working directory, in this order.

    Raises:
        UserError: the folder or the JSONL file does not exist or cannot be read.
    """
    with no_collection():
        return _scan(entry)


def _scan(entry: DatasetEntry) -> Scan:
    scan = Scan()
    where = f"datasets[{entry.index}].{entry.kind}"
    if entry.jsonl_file is not None:
        found = _read_jsonl(str(entry.jsonl_file), entry.kind, f"{where}_jsonl_file", scan.problems)
    else:
        found = _walk(entry, f"{where}_directory", scan.problems)
    names = unique_keys((stem, identity) for identity, stem, *_ in found)
    kind = entry.kind
    # What `Source(...)` does, without a call of a Python function for each.
    make = functools.partial(tuple.__new__, Source)
    scan.sources = [
        make((location, kind, identity, name, caption_location, caption))
        for (identity, _, location, caption_location, caption), name in zip(found, names, strict=True)
    ]
    if entry.exclude:
        out = excluded_identities([source.identity for source in scan.sources], entry.exclude)
        scan.excluded = [source for source in scan.sources if source.identity in out]
        scan.sources = [source for source in scan.sources if source.identity not in out]
    scan.missing_captions = [source for source in scan.sources if source[4] is None and source[5] is None]
    return scan


def excluded_identities(identities: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Those of `identities` that a dataset's `exclude` names or that fit a pattern in it (`*` also takes slashes).

    An entry that is the identity of a source means that source alone: brackets in file names are then no pattern.
    """
    known = set(identities)
    named = known.intersection(exclude)
    patterns = [entry for entry in exclude if entry not in known and any(letter in entry for letter in "*?[")]
    if not patterns:
        return named
    fits = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns)).match
    return named | {identity for identity in known if fits(identity)}


def read_caption(source: Source, prefix: str = "") -> str:
    """The caption of `source` with white space cut off at both ends, after `prefix` and one space if there is one.

    Raises:
        UserError: there is no caption, or its file is unreadable, too large or not UTF-8.
    """
    if source.caption is not None:
        return join_caption(prefix, source.caption)
    if source.caption_location is None:
        raise UserError(f"{source.location} has no caption. Write one, or exclude the file.")
    return join_caption(prefix, read_caption_file(source.caption_location))


def read_caption_file(location: str) -> str:
    """The text of a caption file; a byte order mark at its beginning is no part of it.

    Raises:
        UserError: the file is unreadable, too large or not UTF-8.
    """
    try:
        with open(location, "rb", buffering=0) as handle:
            raw = handle.read(_MAX_CAPTION_BYTES + 1) or b""
    except OSError as error:
        raise UserError(f"The caption {location} cannot be read: {error.strerror or error}. Check the file.") from error
    if len(raw) > _MAX_CAPTION_BYTES:
        raise UserError(f"The caption {location} is longer than 1 MB. Check that it is a caption.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The caption {location} is not UTF-8 (byte {error.start + 1}). Save it again as UTF-8 text."
        ) from error


def join_caption(prefix: str, caption: str) -> str:
    """The caption that the model reads: the dataset's prefix or trigger word, one space, the source's own caption."""
    return f"{prefix.strip()} {caption.strip()}".strip()


# --- folders ------------------------------------------------------------------------------------------------------


def _walk(entry: DatasetEntry, where: str, problems: list[Problem]) -> list[_Found]:
    root = os.path.abspath(str(entry.source_directory))
    if not os.path.isdir(root):
        raise UserError(f"the folder {root} does not exist. Check its path, and that its drive is connected.", where)
    excluded = {_folder_id(root)}
    if entry.recursive and os.path.abspath(str(entry.cache_directory)) != root:
        excluded.add(_folder_id(str(entry.cache_directory)))
    extensions = VIDEO_EXTENSIONS if entry.kind == "video" else IMAGE_EXTENSIONS
    found: list[_Found] = []
    waiting = [(root, "")]
    while waiting:
        folder, inside = waiting.pop()
        try:
            children = _list_folder(folder, inside, extensions, entry.caption_extension, found)
        except OSError as error:
            if folder == root:
                raise UserError(f"the folder {root} cannot be read: {error.strerror}. Check it.", where) from error
            problems.append(Problem(where, f"the folder {folder} cannot be read: {error.strerror}. Check it."))
            continue
        if entry.recursive:
            for child in children:
                location = os.path.join(folder, child)
                identity = _folder_id(location)
                if identity is not None and identity not in excluded:
                    excluded.add(identity)
                    waiting.append((location, f"{inside}{child}/"))
    found.sort(key=operator.itemgetter(0))
    return found


def _folder_id(folder: str) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _list_folder(
    folder: str, inside: str, extensions: tuple[str, ...], caption_extension: str, found: list[_Found]
) -> list[str]:
    """Add the media files of one folder to `found`, sorted; returns its visible subfolders, sorted.

    Nothing but the listing itself is asked of the system: kinds of entries come with it, captions are looked up in it.
    """
    with os.scandir(folder) as entries:
        listed = list(entries)
    files = [item.name for item in listed if item.is_file()]
    folders = []
    if len(files) < len(listed):
        folders = [item.name for item in listed if item.name[0] != "." and not item.is_file() and item.is_dir()]
    media = [name for name in files if name.lower().endswith(extensions)]
    media.sort()
    # A caption is never one of the media files, whatever the extension of captions is.
    present = set() if caption_extension.lower().endswith(extensions) else set(files)
    base = os.path.join(folder, "")
    for name in media:
        if name[0] != ".":
            stem = name[: name.rindex(".")]
            caption = stem + caption_extension
            found.append((inside + name, stem, base + name, base + caption if caption in present else None, None))
    return sorted(folders)


# --- JSONL --------------------------------------------------------------------------------------------------------


def _read_jsonl(location: str, kind: str, where: str, problems: list[Problem]) -> list[_Found]:
    found: list[_Found] = []
    base = os.path.dirname(os.path.abspath(location))
    try:
        with open(location, "rb") as handle:
            for number, raw in _lines(handle):
                try:
                    item = _read_line(raw, kind, base)
                except UserError as error:
                    problems.append(Problem(where, f"line {number}: {error.message}"))
                    continue
                if item is not None:
                    found.append(item)
    except OSError as error:
        raise UserError(f"{location} cannot be read: {error.strerror or error}. Check its path.", where) from error
    return found


def _lines(handle: Any) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, the rest of one that is too long left out."""
    number = 0
    while raw := handle.readline(_MAX_LINE_BYTES + 1):
        number += 1
        rest = raw
        while len(rest) > _MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = handle.readline(_MAX_LINE_BYTES + 1)
        yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


def _read_line(raw: bytes, kind: str, base: str) -> _Found | None:
    """One line of a JSONL file; None for an empty one.

    Raises:
        UserError: what is wrong with the line.
    """
    if not raw.strip():
        return None
    if len(raw) > _MAX_LINE_BYTES:
        raise UserError("is longer than 4 MB. Check that every source has a line of its own.")
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 (byte {error.start + 1}). Save the file again as UTF-8 text.") from error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"is not JSON ({reason[:_SHOWN]}).") from error
    if not isinstance(record, dict):
        raise UserError(f'is not a table. Write {{"{kind}_path": "...", "caption": "..."}}.')
    caption = record.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise UserError(f"its caption is not text but {json.dumps(caption)[:_SHOWN]}. Put it in quotes.")
    if caption is not None and not _is_text(caption):
        raise UserError("its caption holds a broken character. Type it again.")
    location = _locate(record, kind, base)
    identity = record[f"{kind}_path"]
    stem = os.path.splitext(os.path.basename(os.path.normpath(location)))[0]
    return identity, stem, location, None, caption


def _locate(record: dict[str, Any], kind: str, base: str) -> str:
    key, other = f"{kind}_path", "image_path" if kind == "video" else "video_path"
    path = record.get(key)
    if path is None and other in record:
        raise UserError(f"has {other}, but this is a dataset of {kind}s. Write {key}, or move it to another dataset.")
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"has no {key}.")
    if "\0" in path or not _is_text(path):
        raise UserError(f"its {key} {path[:_SHOWN]!r} is not a path.")
    for folder in (base, os.getcwd()):
        location = os.path.abspath(os.path.join(folder, path))
        if os.path.isfile(location) or (kind == "video" and os.path.isdir(location)):
            return location
    raise UserError(f"{path[: _SHOWN * 4]} does not exist.")


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
