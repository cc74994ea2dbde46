"""What there is to do: every item of every dataset in fixed groups, and which of them this process has to encode."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backend.config.dataset import DatasetConfig, DatasetEntry
from backend.data.items import Item
from backend.data.ledger import DatasetLedger, LatentRow, check_dataset
from backend.data.media import MediaReader
from backend.data.recipes import LatentRecipe
from backend.data.sizes import latent_bytes
from backend.errors import Problem, Problems, Stopped, UserError
from backend.files import existing_parent, require_free_space
from backend.progress import ItemMeter, Reporter

_SHOWN_SOURCES = 50


class LatentJob(NamedTuple):
    """One item that is to be encoded, and where its cache goes."""

    entry: DatasetEntry
    item: Item
    path: Path

    @property
    def pixel_bytes(self) -> int:
        """Bytes of its frames as uint8 RGB."""
        return 3 * self.item.frames * self.item.bucket.width * self.item.bucket.height

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What items of one batch share: dataset, frames, height and width."""
        bucket = self.item.bucket
        return self.entry.index, self.item.frames, bucket.height, bucket.width


@dataclass(frozen=True)
class LatentPlan:
    """All items in groups that do not depend on what is cached already, and the rows that say what is.

    `groups` hold items of one dataset, size and length, at most a batch of them; `rows` maps a cache's path to its row
    of the ledger.
    """

    groups: list[list[LatentJob]]
    rows: dict[Path, LatentRow]

    @property
    def jobs(self) -> list[LatentJob]:
        """All items, in the order of the groups."""
        return [job for group in self.groups for job in group]

    def wanted(self, job: LatentJob, *, skip_existing: bool) -> bool:
        """Whether a job is to be done; caches of other tools that fit are as good as valid ones."""
        return not (skip_existing and self.rows[job.path].verdict.usable)


def look_at_datasets(
    config: DatasetConfig, recipe: LatentRecipe, reader: MediaReader, reporter: Reporter
) -> list[tuple[DatasetEntry, DatasetLedger]]:
    """The ledger of every enabled dataset.

    Raises:
        Problems: folders that cannot be read, and every dataset that gives no item, with the reason.
        Stopped: somebody asked for it.
    """
    found: list[tuple[DatasetEntry, DatasetLedger]] = []
    problems: list[Problem] = []
    for entry in config.enabled:
        try:
            ledger = check_dataset(entry, latents=recipe, reader=reader, on_progress=_Looking(reporter, entry.index))
        except UserError as error:
            problems += error.problems
            continue
        found.append((entry, ledger))
        if not ledger.latents:
            problems.append(_why_empty(entry, ledger))
    if problems:
        raise Problems(problems)
    return found


class _Looking:
    """Says how many sources were looked at, and notices a request to stop."""

    def __init__(self, reporter: Reporter, dataset: int) -> None:
        self._reporter, self._dataset = reporter, dataset
        self._meter: ItemMeter | None = None
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        if self._reporter.requested() is not None:
            raise Stopped("Stopped as asked, before anything was cached.")
        if self._meter is None:
            self._meter = self._reporter.item_meter(total, "sources")
        if done > self._done:
            self._meter.done(done - self._done, dataset=self._dataset)
            self._done = done


def _why_empty(entry: DatasetEntry, ledger: DatasetLedger) -> Problem:
    key = f"{entry.kind}_{'directory' if entry.source_directory is not None else 'jsonl_file'}"
    field = f"datasets[{entry.index}].{key}"
    if ledger.problems:
        return Problem(field, f"gives no usable item: {ledger.problems[0].message}")
    if not ledger.sources:
        left_out = f" ({ledger.excluded} are left out by exclude)" if ledger.excluded else ""
        return Problem(field, f"{entry.source} has no {entry.kind} that can be used{left_out}. Check the path.")
    first = ledger.skipped[0]
    more = f", and {len(ledger.skipped) - 1} more" if len(ledger.skipped) > 1 else ""
    return Problem(field, f"none of its {ledger.sources} sources can be used: {first.reason}{more}.")


def source_notices(entry: DatasetEntry, ledger: DatasetLedger) -> list[Problem]:
    """What a person should know of a dataset's sources: counts first, then at most 50 of each sort."""
    where = f"datasets[{entry.index}]"
    notices = [Problem(problem.field, problem.message) for problem in ledger.problems[:_SHOWN_SOURCES]]
    for broken, what in ((True, "cannot be read"), (False, "give no clip")):
        rows = [skipped for skipped in ledger.skipped if skipped.broken is broken]
        if rows:
            listed = [f"{row.source.identity}: {row.reason}" for row in rows]
            notices.append(counted_notice(where, listed, len(rows), ledger.sources, f"sources {what}"))
    if ledger.missing_captions:
        count = len(ledger.missing_captions)
        notices.append(
            Problem(
                where, f"{count} of {ledger.sources} sources have no caption; their latents are cached all the same."
            )
        )
    return notices


def counted_notice(where: str | None, listed: Sequence[str], count: int, total: int, what: str) -> Problem:
    """Such as "3 of 120 sources cannot be read:", and the first fifty of them, one a line."""
    lines = [f"{count} of {total} {what}:", *(f"  {printable(line)}" for line in listed[:_SHOWN_SOURCES])]
    if len(listed) > _SHOWN_SOURCES:
        lines.append(f"  and {len(listed) - _SHOWN_SOURCES} more")
    return Problem(where, "\n".join(lines))


def printable(text: str) -> str:
    """One line that every terminal can show: file names may hold line breaks and bytes that are no UTF-8."""
    plain = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else "?" for letter in plain)


def plan_latents(found: Iterable[tuple[DatasetEntry, DatasetLedger]], batch_size: int | None) -> LatentPlan:
    """Put all items into groups of at most `batch_size` (None: the dataset's own)."""
    groups: list[list[LatentJob]] = []
    rows: dict[Path, LatentRow] = {}
    for entry, ledger in found:
        size = batch_size or entry.batch_size
        alike: dict[tuple[int, int, int, int], list[LatentJob]] = {}
        for row in ledger.latents:
            job = LatentJob(entry, row.item, Path(ledger.cache_directory, row.item.latent_name))
            rows[job.path] = row
            alike.setdefault(job.key, []).append(job)
        for _, jobs in sorted(alike.items()):
            groups += [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return LatentPlan(groups, rows)


def require_space(jobs: Sequence[LatentJob], plan: LatentPlan, dtype: str) -> None:
    """Make sure that the disks hold what will be written; what is replaced makes room only afterwards.

    Raises:
        Problems: every disk that is too small, with the cache folder that is on it.
    """
    needed: dict[int, int] = {}
    largest: dict[int, int] = {}
    folders: dict[int, LatentJob] = {}
    disks: dict[Path, int] = {}
    for job in jobs:
        folder = job.path.parent
        disk = disks.get(folder)
        if disk is None:
            disk = disks[folder] = os.stat(existing_parent(folder)).st_dev
        size = latent_bytes(job.item, dtype)
        needed[disk] = needed.get(disk, 0) + max(size - plan.rows[job.path].bytes, 0)
        largest[disk] = max(largest.get(disk, 0), size)
        folders.setdefault(disk, job)
    problems: list[Problem] = []
    for disk, job in folders.items():
        try:
            field = f"datasets[{job.entry.index}].cache_directory"
            require_free_space(job.path.parent, needed[disk] + largest[disk], field)
        except UserError as error:
            problems += error.problems
    if problems:
        raise Problems(problems)
