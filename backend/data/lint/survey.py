"""Measures the sources of a dataset, those that changed since the last time only."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from backend.data.items import media_facts, source_stamp
from backend.data.lint.facts import Fact, FactStore
from backend.data.lint.measure import measure_still, measure_video
from backend.data.scan import Source
from backend.data.stamps import content_hash
from backend.data.watchdog import MediaReader
from backend.errors import UserError

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry

Outcome = Fact | UserError


def survey(
    entry: DatasetEntry, sources: Sequence[Source], facts: FactStore, reader: MediaReader, workers: int
) -> Generator[tuple[Source, Outcome]]:
    """Yield every source with its fact, or with the reason why it cannot be used, in the order in which they are done.

    `workers` sources are looked at at once; videos in the processes of `reader`. What is known by its stamp is not
    opened. Broken sources are not remembered: the disk may have been the cause, so they are tried again next time.
    Closing the generator leaves out what was not begun and waits for the rest; close `reader` to end that too.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lint")
    try:
        waiting = {pool.submit(_examine, entry, source, facts, reader): source for source in sources}
        for future in as_completed(waiting):
            yield waiting.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _examine(entry: DatasetEntry, source: Source, facts: FactStore, reader: MediaReader) -> Outcome:
    try:
        return examine(entry, source, facts, reader)
    except UserError as error:
        return error


def examine(entry: DatasetEntry, source: Source, facts: FactStore, reader: MediaReader) -> Fact:
    """The fact of one source, measured if it is not known.

    Raises:
        UserError: it is broken or gone.
    """
    # The stamp comes first: a change while the file is measured must not go unnoticed.
    stamp = source_stamp(source)
    known = facts.known(source.location, stamp)
    if known is not None:
        return known
    media = media_facts(reader.probe(source.location), source.path)
    if source.kind == "image":
        measured = measure_still(source.location)
    else:
        measured = measure_video(source, entry, media, reader)
    try:
        content = content_hash(source.location)
    except OSError as error:
        raise UserError(f"{source.location} cannot be read: {error.strerror or error}. Check the file.") from error
    fact = Fact(stamp, media, content, measured)
    facts.add(source.location, fact)
    return fact
