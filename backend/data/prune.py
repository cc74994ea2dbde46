"""Moves orphans of a cache folder to its trash. Nothing is deleted, and nothing else is touched."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backend.data.cache_names import TRASH_FOLDER
from backend.data.ledger import DatasetLedger, Orphan
from backend.data.stamps import stamp_of
from backend.errors import UserError
from backend.files import fsync_folder, write_problem

# A temporary file younger than this may belong to a writer that is at work.
_UNFINISHED_SECONDS = 3600.0


@dataclass
class Pruned:
    """What was moved where.

    `trash` is None when nothing was moved. `left` names files that stayed: changed since the check, or perhaps still
    being written.
    """

    trash: Path | None = None
    moved: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    bytes: int = 0


def prune(ledgers: Sequence[DatasetLedger]) -> list[Pruned]:
    """Move the orphans of checked datasets to `.k5_trash/<time>` in their cache folders; one result per ledger.

    All ledgers are checked before anything moves.

    Raises:
        UserError: a dataset could not be read completely or has no source at all (a drive that is not connected looks
            like that), two datasets share a cache folder, or a folder cannot be written.
    """
    folders: dict[str, int] = {}
    for ledger in ledgers:
        _require_complete(ledger)
        folder = os.path.realpath(ledger.cache_directory)
        if folder in folders:
            raise UserError(
                f"datasets[{folders[folder]}] and datasets[{ledger.index}] share the cache folder {folder}; what one "
                "of them needs looks left over to the other. Give each a cache folder of its own."
            )
        folders[folder] = ledger.index
    return [_prune_one(ledger) for ledger in ledgers]


def _require_complete(ledger: DatasetLedger) -> None:
    where = f"datasets[{ledger.index}]"
    if ledger.problems:
        raise UserError(
            f"{where} could not be read completely ({ledger.problems[0].message}), so nobody knows which caches are "
            "left over. Repair it first."
        )
    if not ledger.sources and not ledger.excluded and ledger.orphans:
        raise UserError(
            f"{where} has no sources, so all {len(ledger.orphans)} files in {ledger.cache_directory} look left over. "
            "Check that its folder is connected; delete the caches by hand if they are not wanted."
        )


def _prune_one(ledger: DatasetLedger) -> Pruned:
    result = Pruned()
    folder = Path(ledger.cache_directory)
    for orphan in ledger.orphans:
        source = folder / orphan.name
        if not _still_an_orphan(source, orphan):
            result.left.append(orphan.name)
            continue
        try:
            if result.trash is None:
                stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime())
                result.trash = folder / TRASH_FOLDER / f"{stamp}-{secrets.token_hex(3)}"
                result.trash.mkdir(parents=True)
            os.rename(source, result.trash / orphan.name)
        except OSError as error:
            raise write_problem(error, source) from error
        result.moved.append(orphan.name)
        result.bytes += orphan.stamp.size
    if result.trash is not None:
        fsync_folder(result.trash)
        fsync_folder(folder)
    return result


def _still_an_orphan(path: Path, orphan: Orphan) -> bool:
    try:
        stamp = stamp_of(path)
    except OSError:
        return False
    if path.is_symlink() or stamp != orphan.stamp:
        return False
    return orphan.why != "unfinished" or time.time() - stamp.mtime_ns / 1e9 > _UNFINISHED_SECONDS
