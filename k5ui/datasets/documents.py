"""Changes of dataset files: each names the revision that it was made for, so that nobody's edit is overwritten."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from backend.config.dataset import DatasetEntry
from backend.config.dataset_document import MAX_DOCUMENT_BYTES, DatasetDocument, Value
from backend.config.dataset_text import decode, parse_text, read_bytes
from backend.data.scan import excluded_identities
from backend.errors import Problem, Problems, UserError

_GUARD = threading.Lock()
_SOURCE_ENDS = ("directory", "jsonl_file")


class Conflict(UserError):
    """What a change was made for is not what is there any more."""


def revision_of(data: bytes) -> str:
    """What identifies the content of a file: 16 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:16]


def read_document(path: Path) -> tuple[str, str]:
    """(text, revision) of a dataset file.

    Raises:
        UserError: missing, too large, not text.
    """
    data = read_bytes(path)
    return decode(data, path), revision_of(data)


def plain_tables(text: str, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What stands in [general] and in the [[datasets]] tables, however wrong the values are.

    Raises:
        UserError: the text is no TOML (JSON).
    """
    values = parse_text(text, path)
    general, tables = values.get("general"), values.get("datasets")
    rows = tables if isinstance(tables, list) else []
    return general if isinstance(general, dict) else {}, [row if isinstance(row, dict) else {} for row in rows]


def change_document(path: Path, revision: str, change: Callable[[DatasetDocument], None]) -> str:
    """Open, change and save a file; returns the new revision. Nothing is written when the result has no new meaning.

    Raises:
        Conflict: the file is not of this revision.
        UserError: it cannot be read, edited or written.
    """
    with _GUARD:
        document = _open(path, revision)
        before = document.text
        change(document)
        if document.text != before:
            document.save()
        return revision_of(path.read_bytes())


def _open(path: Path, revision: str) -> DatasetDocument:
    document = DatasetDocument.open(path)
    if revision_of(read_bytes(path, MAX_DOCUMENT_BYTES)) != revision:
        raise Conflict(f"{path.name} was changed meanwhile. The page shows it as it is now; make the change again.")
    return document


def set_key(document: DatasetDocument, place: int | str, key: str, value: Value | None) -> None:
    """Give a key of a table a value, or (None) remove it. A value that its key cannot have is refused.

    Raises:
        Problems: what is wrong with the value, or there is no such table.
    """
    known = {str(problem) for problem in _problems(document)}
    if value is None:
        document.remove(place, key)
    else:
        document.set(place, key, value)
    # What was wrong before may stay wrong: a person repairs one key after the other.
    new = [problem for problem in _problems(document) if str(problem) not in known]
    if new:
        raise Problems(new)


def _problems(document: DatasetDocument) -> list[Problem]:
    try:
        document.config()
    except Problems as error:
        return list(error.problems)
    return []


def exclude(document: DatasetDocument, index: int, identities: Sequence[str], on: bool) -> None:
    """Add identities to (or, with `on` False, take them from) the `exclude` list of a table.

    Raises:
        UserError: there is no such table; a pattern leaves a source out, which only a person can change; or the list
            grows too long for the file.
    """
    tables = document.datasets
    if not 0 <= index < len(tables):
        raise UserError(f"There is no dataset {index} in this file (any more).", "datasets")
    given = tables[index].get("exclude", document.general.get("exclude", []))
    before = [item for item in given if isinstance(item, str)] if isinstance(given, list) else []
    if on:
        after = [*before, *(item for item in dict.fromkeys(identities) if item not in before)]
    else:
        after = [item for item in before if item not in identities]
        if left := excluded_identities(identities, after):
            raise UserError(
                f"{min(left)} is left out by a pattern in exclude. Change the pattern in the text of the dataset."
            )
    if after == before:
        return
    if after or "exclude" in document.general:
        document.set(index, "exclude", after)
    else:
        document.remove(index, "exclude")


def settled(entry: DatasetEntry) -> dict[str, Any]:
    """All keys of a table as the program reads them, as plain JSON values."""
    values: dict[str, Any] = {}
    for key, value in vars(entry).items():
        if key not in ("index", "kind", "source_directory", "jsonl_file"):
            plain = list(value) if isinstance(value, tuple) else value
            values[key] = str(plain) if isinstance(plain, Path) else plain
    key, place = ("directory", entry.source_directory) if entry.source_directory else ("jsonl_file", entry.jsonl_file)
    return {f"{entry.kind}_{key}": str(place)} | values


def kind_of_table(table: dict[str, Any]) -> tuple[str, str]:
    """(kind, source) of a table that may be wrong; "image" and "" when it does not say."""
    for kind in ("video", "image"):
        for end in _SOURCE_ENDS:
            source = table.get(f"{kind}_{end}")
            if isinstance(source, str):
                return kind, source
    return "image", ""
