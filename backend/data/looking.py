"""A first look at very many sources with all cores; what an index remembers is not opened again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import islice

from backend.data.items import Look, media_facts, source_stamp
from backend.data.ledger_index import LedgerIndex, Seen
from backend.data.scan import Source
from backend.data.watchdog import MediaReader
from backend.errors import UserError

# So few files are opened faster than a process starts.
FEW = 32
_AHEAD = 4

Progress = Callable[[int, int], None]


class Looks:
    """What is known of sources by their location; give `look` to `build_items`."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen | UserError] = {}

    def look(self, source: Source) -> Seen:
        """Stamp and facts of a source that was looked at.

        Raises:
            UserError: it is broken or gone.
        """
        found = self.seen[source.location]
        if isinstance(found, UserError):
            raise found
        return found


def look_here(sources: Sequence[Source], index: LedgerIndex) -> Looks:
    """Look at every source; those that the index does not remember are probed in this process, one after the other."""
    looks = Looks()
    recalled = index.recall_all(sources)
    for source in sources:
        found = recalled[source.location]
        if found is None:
            try:
                found = index.look(source)
            except UserError as error:
                found = error
        looks.seen[source.location] = found
    return looks


def look_at_all(
    sources: Sequence[Source],
    *,
    index: LedgerIndex,
    workers: int | None = None,
    reader: MediaReader | None = None,
    on_progress: Progress | None = None,
) -> Looks:
    """Look at every source; those that the index does not remember are probed in guarded processes, several at once.

    Args:
        index: asked and told; `index.save()` is the caller's.
        workers: how many processes at most, None: one for each core. None are started for nothing.
        reader: a reader to use instead of starting one; its own number of processes then counts.
        on_progress: called in this thread with sources done and sources in all; what it raises ends the look.

    Raises:
        Stopped: the reader was closed.
    """
    looks = Looks()
    new: dict[str, Source] = {}
    recalled = index.recall_all(sources)
    for source in sources:
        known = recalled[source.location]
        if known is None:
            new[source.location] = source
        else:
            looks.seen[source.location] = known
    done = len(sources) - len(new)
    if on_progress is not None:
        on_progress(done, len(sources))
    if not new:
        return looks
    workers = min(workers or os.cpu_count() or 1, -(-len(new) // FEW))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        # Left first, so that no thread of the pool waits for an answer any more when the pool is waited for.
        guarded = reader or stack.enter_context(MediaReader(workers))
        for source, found in _in_turn(pool, guarded_look(guarded), new.values(), workers * _AHEAD):
            looks.seen[source.location] = found
            if not isinstance(found, UserError):
                index.remember(source, found)
            done += 1
            if on_progress is not None:
                on_progress(done, len(sources))
    return looks


def guarded_look(reader: MediaReader) -> Look:
    """`backend.data.items.look_at` in the processes of a reader: a hostile file costs itself and nothing else."""

    def look(source: Source) -> Seen:
        # The stamp comes first: a change while the file is probed must not go unnoticed.
        stamp = source_stamp(source)
        return stamp, media_facts(reader.probe(source.location), source.path)

    return look


def _in_turn(
    pool: ThreadPoolExecutor, look: Look, sources: Iterable[Source], ahead: int
) -> Iterable[tuple[Source, Seen | UserError]]:
    """Results as they come; no more than `ahead` wait, so that an end is an end."""
    waiting: dict[Future[Seen], Source] = {}
    coming = iter(sources)
    while True:
        for source in islice(coming, ahead - len(waiting)):
            waiting[pool.submit(look, source)] = source
        if not waiting:
            return
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            source = waiting.pop(future)
            try:
                yield source, future.result()
            except UserError as error:
                yield source, error
