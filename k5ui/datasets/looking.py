"""Looks at the sources and captions of a dataset: what was seen before and has not changed is not opened again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from backend.config.dataset import DatasetConfig, DatasetEntry
from backend.data.items import Item, MediaFacts, build_items, look_at, media_facts, source_stamp
from backend.data.scan import Scan, Source, read_caption_file, scan_dataset
from backend.data.stamps import Stamp, stamp_of
from backend.errors import Problem, Stopped, UserError
from k5ui.datasets.readers import WORKERS, SharedReader
from k5ui.datasets.snapshot import CaptionText, EntrySnapshot, make_row
from k5ui.roots import Roots

_OUTSIDE = "lies outside of the folders that this app may read."
Progress = Callable[[int, int], None]
Seen = tuple[Stamp, MediaFacts | UserError]


class Looker:
    """What is remembered of the files of one dataset between two looks; used by one thread at a time."""

    def __init__(self, roots: Roots, reader: SharedReader) -> None:
        self._roots, self._reader = roots, reader
        self._media: dict[str, Seen] = {}
        self._captions: dict[str, tuple[Stamp, CaptionText]] = {}
        self._opened = 0

    @property
    def opened(self) -> int:
        """How many media files were opened so far (not those that were remembered)."""
        return self._opened

    def look(
        self, config: DatasetConfig, progress: Progress, closed: threading.Event
    ) -> tuple[tuple[EntrySnapshot, ...], list[Problem]]:
        """Every table with its rows, and what is wrong with folders and JSONL files.

        Raises:
            Stopped: `closed` was set on the way.
        """
        problems: list[Problem] = []
        scans = [(entry, self._scan(entry, problems)) for entry in config.datasets]
        total = sum(len(scan.sources) + len(scan.excluded) for _, scan in scans)
        progress(0, total)
        sources = [source for _, scan in scans for source in (*scan.sources, *scan.excluded)]
        seen = self._look_at_all([source for source in sources if self._allows(source.location)], progress, closed)
        locations = [source.caption_location for source in sources if source.caption_location is not None]
        captions = {location: self._captions[location] for location in locations if self._note(location)}
        self._media, self._captions = seen, captions
        return tuple(self._entry(entry, scan) for entry, scan in scans), problems

    def _scan(self, entry: DatasetEntry, problems: list[Problem]) -> Scan:
        try:
            if not self._allows(str(entry.source)):
                raise UserError(f"{entry.source} {_OUTSIDE}", f"datasets[{entry.index}]")
            scan = scan_dataset(entry)
        except UserError as error:
            if entry.enabled:
                problems += error.problems
            return Scan()
        problems += scan.problems
        return scan

    def _allows(self, location: str) -> bool:
        return not self._roots.exposed or self._roots.allows(location)

    def _note(self, location: str) -> bool:
        """Read a caption unless it is remembered; False for one that is not there or may not be read."""
        if not self._allows(location):
            return False
        try:
            stamp = stamp_of(location)
        except OSError:
            return False
        known = self._captions.get(location)
        if known is None or known[0] != stamp:
            self._captions[location] = (stamp, read_text(location))
        return True

    def _look_at_all(self, sources: Sequence[Source], progress: Progress, closed: threading.Event) -> dict[str, Seen]:
        seen: dict[str, Seen] = {}
        waiting: list[Source] = []
        for source in sources:
            try:
                stamp = source_stamp(source)
            except UserError as error:
                seen[source.location] = (Stamp(0, 0, 0), error)
                continue
            known = self._media.get(source.location)
            if known is not None and known[0] == stamp:
                seen[source.location] = known
            else:
                waiting.append(source)
        done = len(sources) - len(waiting)
        self._opened += len(waiting)
        # Threads only where a process does the work; headers of images are read faster than a thread is asked to.
        videos = [source for source in waiting if source.kind == "video"]
        with ThreadPoolExecutor(WORKERS) as pool:
            futures = [(source, pool.submit(_guarded, self._reader, source, closed)) for source in videos]
            for source in waiting:
                if source.kind == "image":
                    seen[source.location] = _look(look_at, source)
                    done = _tell(progress, done, len(sources), closed)
            for source, future in futures:
                seen[source.location] = future.result()
                done = _tell(progress, done, len(sources), closed)
        return seen

    def _entry(self, entry: DatasetEntry, scan: Scan) -> EntrySnapshot:
        def remembered(source: Source) -> tuple[Stamp, MediaFacts]:
            stamp, found = self._media[source.location]
            if isinstance(found, UserError):
                raise found
            return stamp, found

        inside = [source for source in scan.sources if source.location in self._media]
        plan = build_items(entry, inside, look=remembered)
        items: dict[Source, list[Item]] = {}
        for item in plan.items:
            items.setdefault(item.source, []).append(item)
        reasons = {skipped.source: skipped for skipped in plan.skipped}
        rows = []
        for source in (*scan.sources, *scan.excluded):
            values = self._known(source)
            reason = reasons.get(source)
            if reason is not None:
                values |= {"reason": _without_path(reason.reason, source), "broken": reason.broken}
            values |= {"items": tuple(items.get(source, ()))}
            rows.append(make_row(entry, source, **values))
        used = len(scan.sources)
        rows[used:] = [row._replace(excluded=True) for row in rows[used:]]
        return EntrySnapshot(entry, tuple(rows))

    def _known(self, source: Source) -> dict[str, Any]:
        values: dict[str, Any] = {"caption": CaptionText(source.caption)}
        if source.caption_location is not None:
            known = self._captions.get(source.caption_location)
            values["caption"] = known[1] if known else CaptionText(None, "The caption cannot be read.")
        seen = self._media.get(source.location)
        if seen is None:
            return values | {"allowed": False, "reason": _OUTSIDE, "broken": True, "caption": CaptionText(None)}
        if isinstance(seen[1], UserError):
            return values
        return values | {"stamp": seen[0], "media": seen[1]}


def read_text(location: str) -> CaptionText:
    """The text of a caption file without white space at its ends, or why it cannot be read."""
    try:
        return CaptionText(read_caption_file(location).strip())
    except UserError as error:
        return CaptionText(None, error.message)


def _look(look: Callable[[Source], tuple[Stamp, MediaFacts]], source: Source) -> Seen:
    try:
        return look(source)
    except UserError as error:
        try:
            return source_stamp(source), error
        except UserError:
            return Stamp(0, 0, 0), error


def _guarded(reader: SharedReader, source: Source, closed: threading.Event) -> Seen:
    if closed.is_set():
        raise Stopped("The app ends.")

    def look(source: Source) -> tuple[Stamp, MediaFacts]:
        stamp = source_stamp(source)
        return stamp, media_facts(reader.get().probe(source.location), source.path)

    return _look(look, source)


def _tell(progress: Progress, done: int, total: int, closed: threading.Event) -> int:
    if closed.is_set():
        raise Stopped("The app ends.")
    progress(done + 1, total)
    return done + 1


def _without_path(reason: str, source: Source) -> str:
    """A sentence without the absolute path of the file, whose name stands beside it on the page."""
    for start in (f"{source.location}: ", f"{source.location} "):
        reason = reason.removeprefix(start)
    return reason
