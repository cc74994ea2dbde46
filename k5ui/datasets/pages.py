"""Datasets as the routes give them: plain JSON values made from snapshots; every path in it was found by a look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backend.errors import Problem, UserError
from k5ui.datasets.captions import read_caption_now
from k5ui.datasets.documents import kind_of_table, plain_tables, read_document, settled
from k5ui.datasets.known import KnownDataset
from k5ui.datasets.library import DatasetLibrary
from k5ui.datasets.scans import Look
from k5ui.datasets.snapshot import EntrySnapshot, Row, Snapshot

MAX_SKIPPED = 100
MAX_CLIPS = 200
_NO_COUNTS = {"sources": 0, "items": 0, "skipped": 0, "missing_captions": 0, "excluded": 0}


def summary(dataset: KnownDataset, look: Look) -> dict[str, Any]:
    """A dataset in the list."""
    snapshot = look.snapshot
    return {
        "id": dataset.id,
        "name": printable(dataset.name),
        "path": printable(str(dataset.path)),
        "problems": problem_list(snapshot.problems if snapshot else ()),
        "entries": [_entry(entry) for entry in snapshot.entries] if snapshot else [],
        "scanning": dict(zip(("done", "total"), look.scanning, strict=True)) if look.scanning else None,
        "scanned": snapshot is not None,
        "steps_per_epoch": snapshot.steps if snapshot else None,
        "items": snapshot.items if snapshot else None,
        "version": look.version,
    }


def detail(dataset: KnownDataset, look: Look, shown: str | None) -> dict[str, Any]:
    """A dataset with its text and every table; `shown` is the revision that the page shows, None for none."""
    page = summary(dataset, look)
    snapshot = look.snapshot
    try:
        text, revision = read_document(dataset.path)
    except UserError as error:
        empty = {"text": "", "revision": "", "changed_outside": shown is not None, "general": {}, "editable": False}
        return page | empty | {"problems": problem_list(error.problems), "notices": [], "entries": []}
    try:
        general, tables = plain_tables(text, dataset.path)
    except UserError:  # the snapshot names what is wrong with it
        general, tables = {}, []
    entries = [
        _full_entry(entry, _table(tables, entry.entry.index)) for entry in (snapshot.entries if snapshot else ())
    ]
    if not entries:
        entries = [_unread_entry(index, table) for index, table in enumerate(tables)]
    return page | {
        "text": text,
        "revision": revision,
        "changed_outside": shown is not None and shown != revision,
        "editable": dataset.path.suffix.lower() == ".toml",
        "notices": problem_list(snapshot.notices if snapshot else ()),
        "general": plain(general),
        "entries": entries,
    }


def _entry(entry: EntrySnapshot) -> dict[str, Any]:
    settings = entry.entry
    shown = {"index": settings.index, "kind": settings.kind, "source": printable(str(settings.source))}
    return shown | {"enabled": settings.enabled} | entry.counts


def _full_entry(entry: EntrySnapshot, given: Mapping[str, Any]) -> dict[str, Any]:
    skipped = [row for row in entry.rows if row.reason is not None and not row.excluded][:MAX_SKIPPED]
    return _entry(entry) | {
        "values": plain(settled(entry.entry)),
        "given": plain(given),
        "buckets": entry.buckets,
        "steps_per_epoch": entry.steps,
        "skipped_list": [
            {
                "name": printable(row.source.identity),
                "key": row.key,
                "reason": printable(row.reason),
                "broken": row.broken,
            }
            for row in skipped
        ],
    }


def _unread_entry(index: int, table: dict[str, Any]) -> dict[str, Any]:
    """A table of a file that cannot be used (yet): what stands in it, so that a form can repair it."""
    kind, source = kind_of_table(table)
    shown = {"index": index, "kind": kind, "source": printable(source), "enabled": table.get("enabled") is not False}
    empty = {"values": {}, "given": plain(table), "buckets": [], "steps_per_epoch": None, "skipped_list": []}
    return shown | _NO_COUNTS | empty


def _table(tables: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    return tables[index] if index < len(tables) else {}


def item_page(
    dataset: KnownDataset, snapshot: Snapshot, rows: Sequence[Row], offset: int, limit: int,
    findings: Mapping[str, list[dict[str, Any]]], library: DatasetLibrary,
) -> dict[str, Any]:  # fmt: skip
    """Some rows as the grid shows them, with captions as they are now."""
    shown = rows[offset : offset + limit]
    return {
        "total": len(rows),
        "offset": offset,
        "items": [item(dataset, snapshot, row, findings.get(row.key, []), library) for row in shown],
    }


def item(
    dataset: KnownDataset, snapshot: Snapshot, row: Row, findings: Iterable[dict[str, Any]], library: DatasetLibrary
) -> dict[str, Any]:
    """One source."""
    caption = read_caption_now(row, snapshot.entry_of(row), library.roots)
    media = row.media
    missing = library.previews.thumb_problem(row) if media else row.reason
    return {
        "key": row.key,
        "name": printable(row.source.identity),
        "entry": row.entry,
        "kind": row.source.kind,
        "width": media.width if media else None,
        "height": media.height if media else None,
        "frames": media.frames if media else None,
        "fps": round(media.fps, 4) if media and media.fps else None,
        "seconds": round(media.seconds, 3) if media and media.seconds else None,
        "variable_rate": bool(media and media.variable_rate),
        "bytes": row.stamp.size if row.stamp else None,
        "caption": caption.text,
        "caption_problem": caption.problem,
        "caption_revision": caption.revision,
        "caption_editable": caption.editable,
        "clips": clips(row)[:MAX_CLIPS],
        "clip_count": len(row.items),
        "reason": printable(row.reason) if row.reason else None,
        "broken": row.broken,
        "excluded": row.excluded,
        "findings": list(findings),
        "missing": printable(missing) if missing else None,
        "thumb": address(dataset, row, "thumb") if media and not missing else None,
        "preview": address(dataset, row, "preview") if media and not missing and row.source.kind == "video" else None,
    }


def clips(row: Row) -> list[dict[str, int]]:
    """The items of a row: index, start, frames, width, height of the bucket."""
    return [
        {
            **{"index": index, "start": item.clip.start if item.clip else 0, "frames": item.frames},
            **{"width": item.bucket.width, "height": item.bucket.height},
        }
        for index, item in enumerate(row.items)
    ]


def address(dataset: KnownDataset, row: Row, what: str, *more: object) -> str:
    """The address of a picture of a row, relative to the page; another one when the file has changed."""
    path = "/".join(["api/datasets", dataset.id, what, row.key, *map(str, more)])
    stamp = row.stamp
    return f"{path}?v={stamp.mtime_ns:x}-{stamp.size:x}" if stamp else path


def problem_list(problems: Iterable[Problem]) -> list[dict[str, str | None]]:
    """Problems as JSON."""
    return [{"field": problem.field, "message": printable(problem.message)} for problem in problems]


def printable(text: str | None) -> str:
    """Text that every browser takes: bytes of a file name that are no UTF-8 become question marks."""
    return (text or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def plain(value: Any) -> Any:
    """Values of a TOML or JSON file as JSON has them; dates become text, numbers without a value None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
