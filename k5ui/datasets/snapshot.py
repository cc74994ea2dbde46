"""What a dataset consisted of when it was looked at last: a row for each source, counts, buckets; never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from backend.config.dataset import DatasetEntry
from backend.data.items import Item, MediaFacts
from backend.data.scan import Source
from backend.data.stamps import Stamp
from backend.errors import Problem
from k5ui.datasets.keys import source_key


class CaptionText(NamedTuple):
    """The caption of a source without the dataset's prefix; `problem` says why it cannot be read."""

    text: str | None
    problem: str | None = None


class Row(NamedTuple):
    """One source: what it is (None: it could not be looked at), its items, and why it has none.

    `allowed` is False for a source or a caption file outside of the folders that an exposed app may read: nothing of
    it is ever opened.
    """

    key: str
    entry: int
    source: Source
    stamp: Stamp | None
    media: MediaFacts | None
    items: tuple[Item, ...]
    caption: CaptionText
    reason: str | None = None
    broken: bool = False
    excluded: bool = False
    allowed: bool = True

    @property
    def has_caption(self) -> bool:
        """Whether there is a caption that says something."""
        return bool(self.caption.text and self.caption.text.strip())


@dataclass(frozen=True)
class EntrySnapshot:
    """The sources of one [[datasets]] table in the order of the scan, the excluded ones at the end."""

    entry: DatasetEntry
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...] = ()

    @cached_property
    def counts(self) -> dict[str, int]:
        """sources (without excluded ones), items, skipped, missing_captions, excluded."""
        used = [row for row in self.rows if not row.excluded]
        return {
            "sources": len(used),
            "items": sum(len(row.items) for row in used),
            "skipped": sum(row.reason is not None for row in used),
            "missing_captions": sum(not row.source.has_caption for row in used),
            "excluded": len(self.rows) - len(used),
        }

    @cached_property
    def buckets(self) -> list[dict[str, int]]:
        """Items of one size and length: width, height, frames, items, repeats, batch_size, batches of an epoch."""
        counts: dict[tuple[int, int, int], int] = {}
        for row in self.rows:
            for item in row.items:
                size = (item.bucket.width, item.bucket.height, item.frames)
                counts[size] = counts.get(size, 0) + 1
        repeats, batch = self.entry.num_repeats, self.entry.batch_size
        return [
            {
                **{"width": width, "height": height, "frames": frames, "items": count},
                **{"repeats": repeats, "batch_size": batch, "batches": -(-count * repeats // batch)},
            }
            for (width, height, frames), count in sorted(counts.items())
        ]

    @property
    def steps(self) -> int:
        """Steps of an epoch; 0 for a dataset that is switched off."""
        return sum(bucket["batches"] for bucket in self.buckets) if self.entry.enabled else 0


@dataclass(frozen=True)
class Snapshot:
    """All tables of a dataset as they were looked at.

    `file` stands for the configuration file as it was read, `signature` for it and the `folders`; see `scans`.
    """

    entries: tuple[EntrySnapshot, ...]
    problems: tuple[Problem, ...] = ()
    notices: tuple[Problem, ...] = ()
    file: Any = None
    signature: Any = field(default=None, compare=False)
    folders: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all tables."""
        return tuple(row for entry in self.entries for row in entry.rows)

    @cached_property
    def by_key(self) -> Mapping[str, Row]:
        """Rows by key; of a source that a JSONL file names twice the first."""
        found: dict[str, Row] = {}
        for row in self.rows:
            found.setdefault(row.key, row)
        return found

    @property
    def items(self) -> int:
        """Items of the tables that are used."""
        return sum(entry.counts["items"] for entry in self.entries if entry.entry.enabled)

    @property
    def steps(self) -> int:
        """Steps of an epoch: for each bucket the items times the repeats, in batches, rounded up."""
        return sum(entry.steps for entry in self.entries)

    def entry_of(self, row: Row) -> DatasetEntry:
        """The table that a row belongs to."""
        return next(entry.entry for entry in self.entries if entry.entry.index == row.entry)

    def select(
        self, entry: int | None = None, text: str = "", only: str = "all", found: Iterable[str] = (),
        size: tuple[int, int, int] | None = None,
    ) -> Sequence[Row]:  # fmt: skip
        """The rows of a table (None: all) whose name or caption holds `text` in any case, and that `only` names.

        `only` is all, no_caption, skipped, excluded, findings (keys in `found`), image or video. `size` (width, height,
        frames) keeps the rows with an item of that bucket.
        """
        rows: Sequence[Row] = self.rows
        if entry is not None:
            rows = next((item.rows for item in self.entries if item.entry.index == entry), ())
        wanted = frozenset(found)
        tests = {
            "no_caption": lambda row: not row.has_caption and not row.excluded,
            "skipped": lambda row: row.reason is not None and not row.excluded,
            "excluded": lambda row: row.excluded,
            "findings": lambda row: row.key in wanted,
            "image": lambda row: row.source.kind == "image",
            "video": lambda row: row.source.kind == "video",
        }
        if only in tests:
            rows = [row for row in rows if tests[only](row)]
        if size is not None:
            rows = [row for row in rows if any((*_size(item), item.frames) == size for item in row.items)]
        needle = text.strip().casefold()
        if needle:
            rows = [row for row in rows if _holds(row, needle)]
        return rows


def _size(item: Item) -> tuple[int, int]:
    return item.bucket.width, item.bucket.height


def _holds(row: Row, needle: str) -> bool:
    return needle in row.source.identity.casefold() or needle in (row.caption.text or "").casefold()


def make_row(entry: DatasetEntry, source: Source, **values: Any) -> Row:
    """A row with its key; what is not given is not known."""
    empty: dict[str, Any] = {"stamp": None, "media": None, "items": (), "caption": CaptionText(None)}
    return Row(source_key(entry.index, source.identity), entry.index, source, **(empty | values))
