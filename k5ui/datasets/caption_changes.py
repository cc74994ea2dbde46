"""Changes of captions that the page asks for: one, or many by find and replace; each is a step that can be undone."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

from backend.errors import UserError
from backend.jobs.supervisor import engine_environment
from k5ui.datasets.caption_journal import CaptionJournal, Change, Outcome
from k5ui.datasets.captions import CAPTION_SUFFIXES, CaptionNow, new_bytes, read_caption_now
from k5ui.datasets.known import KnownDataset
from k5ui.datasets.library import DatasetLibrary
from k5ui.datasets.pages import printable
from k5ui.datasets.replacing import Replacement, replace_texts
from k5ui.datasets.snapshot import Row, Snapshot

MAX_EXAMPLES = 20
MAX_CAPTIONS = 200_000
_SHOWN = 2000


def set_caption(library: DatasetLibrary, dataset: KnownDataset, key: str, revision: str, text: str) -> dict[str, Any]:
    """Write the caption of one source, which may have had none; returns {"caption", "caption_revision"}.

    When the file is not of this revision the answer is {"error", "conflict", "caption", "caption_revision"} with what
    is in it now.

    Raises:
        UserError: no such source, a caption that is not edited here, or one that cannot be written.
    """
    snapshot, row = library.row(dataset, key)
    now = read_caption_now(row, snapshot.entry_of(row), library.roots)
    if now.location is None or not now.editable:
        raise UserError(now.problem or _why_not(now))
    if now.revision != revision:
        return _conflict(now)
    data = new_bytes(text, now.data)
    if data != now.data:
        outcome = library.journal(dataset).apply([Change(now.location, now.data, data)])
        library.scans.refresh(dataset)
        if outcome.conflicts:
            return _conflict(read_caption_now(row, snapshot.entry_of(row), library.roots))
    after = read_caption_now(row, snapshot.entry_of(row), library.roots)
    return {"caption": after.text, "caption_revision": after.revision} | _left(library.journal(dataset))


def _conflict(now: CaptionNow) -> dict[str, Any]:
    error = "The caption was changed by another program meanwhile. Nothing was written."
    return {"error": error, "conflict": True, "caption": now.text, "caption_revision": now.revision}


def _why_not(now: CaptionNow) -> str:
    if now.location is None:
        return "This caption stands in a JSONL file. Edit that file."
    if os.path.islink(now.location):
        return "This caption file is a link to another file. Edit that file."
    return f"Captions are edited here when they end in {', '.join(sorted(CAPTION_SUFFIXES))}."


def change_captions(
    library: DatasetLibrary, dataset: KnownDataset, entry: int | None, keys: Collection[str] | None, how: Replacement,
    dry: bool,
) -> dict[str, Any]:  # fmt: skip
    """Find and replace in captions, of a table or of some sources (None: all that are not excluded).

    Returns {"changed", "examples": [{key, name, before, after}], "conflicts": [names], "unchanged"}; with `dry` nothing
    is written and `changed` counts what would be.

    Raises:
        UserError: the pattern is wrong or too slow, there is nothing to do, or a file cannot be written.
    """
    how.check()
    snapshot = library.snapshot(dataset)
    texts: list[tuple[Row, CaptionNow]] = []
    for row in _chosen(snapshot, entry, keys):
        now = read_caption_now(row, snapshot.entry_of(row), library.roots)
        if now.editable and now.text is not None and now.location is not None:
            texts.append((row, now))
    before = [now.text or "" for _, now in texts]
    after = replace_texts(before, how, engine_environment())
    changed = [
        (row, now, new)
        for (row, now), new in zip(texts, after, strict=True)
        if now.text is not None and new.strip() != now.text
    ]
    examples = [
        {
            **{"key": row.key, "name": printable(row.source.identity)},
            **{"before": (now.text or "")[:_SHOWN], "after": new[:_SHOWN]},
        }
        for row, now, new in changed[:MAX_EXAMPLES]
    ]
    answer = {"changed": len(changed), "examples": examples, "conflicts": [], "unchanged": len(texts) - len(changed)}
    if dry or not changed:
        return answer
    # Each file is compared once more when it is written; what others changed meanwhile is left to them.
    changes = [Change(now.location, now.data, new_bytes(new, now.data)) for _, now, new in changed if now.location]
    outcome = library.journal(dataset).apply(changes)
    library.scans.refresh(dataset)
    return answer | {"changed": outcome.changed, "conflicts": outcome.conflicts} | _left(library.journal(dataset))


def _chosen(snapshot: Snapshot, entry: int | None, keys: Collection[str] | None) -> Sequence[Row]:
    """Rows whose captions are changed, each caption file once."""
    rows = snapshot.select(entry)
    if keys is not None:
        wanted = frozenset(keys)
        rows = [row for row in rows if row.key in wanted]
    else:
        rows = [row for row in rows if not row.excluded]
    if len(rows) > MAX_CAPTIONS:
        raise UserError(f"At most {MAX_CAPTIONS} captions are changed at once. Choose a part of them.")
    found = {row.source.caption_location: row for row in rows if row.source.caption_location is not None}
    return list(found.values())


def step(library: DatasetLibrary, dataset: KnownDataset, move: Callable[[CaptionJournal], Outcome]) -> dict[str, Any]:
    """Undo or redo; returns {"changed", "left", "conflicts", "undo", "redo"}, `left` of the same direction.

    Raises:
        UserError: there is no such step, or a file cannot be written.
    """
    try:
        outcome = move(library.journal(dataset))
    finally:
        library.scans.refresh(dataset)
    left = outcome.redo_left if move is CaptionJournal.redo else outcome.undo_left
    return {
        **{"changed": outcome.changed, "conflicts": outcome.conflicts, "left": left},
        **{"undo": outcome.undo_left, "redo": outcome.redo_left},
    }


def _left(journal: CaptionJournal) -> dict[str, int]:
    return dict(zip(("undo", "redo"), journal.left(), strict=True))
