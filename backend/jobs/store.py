"""The run folders of a workspace: made whole, listed, found again, moved to the trash."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from backend.config.options import Options, to_toml
from backend.errors import UserError
from backend.files import fsync_folder, write_atomic, write_problem
from backend.jobs.facts import (
    COMMAND_FILE,
    EVENTS_FILE,
    OPTIONS_FILE,
    REQUEST_FILE,
    REQUESTS_FOLDER,
    STARTED_FILE,
    is_claimed,
    number,
    read_json,
)
from backend.jobs.supervisor import ENTRIES, claim
from backend.jobs.view import view_run

#: What a run folder may be called; ours are `20261123-0233-a1b2c3`, ones made in a terminal may be called otherwise.
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_TITLE = 200
_WINDOWS_RETRIES = 20


@dataclass(frozen=True)
class Run:
    """One run folder. `created` is in seconds since 1970; `kind` and `entry` are empty if nobody can start the run."""

    id: str
    folder: Path
    kind: str
    title: str
    created: float
    entry: str


class RunStore:
    """All runs of one workspace folder.

    `extra_entries` are module names that runs may start besides the project's own four (tests use it).
    """

    def __init__(self, workspace: str | Path, extra_entries: Collection[str] = ()) -> None:
        self.workspace = Path(workspace).absolute()
        self.runs_folder = self.workspace / "runs"
        self.trash_folder = self.workspace / "trash"
        self.entries = frozenset((*ENTRIES.values(), *extra_entries))
        self._cache: dict[str, tuple[int, Run]] = {}

    def create(self, kind: str, options: Options, title: str, entry: str | None = None) -> Run:
        """Make a run folder with its options; it appears under its name only when it is whole. Nothing is started.

        `kind` is generate, train, cache_latents or cache_text; `entry` the module instead of the kind's own.

        Raises:
            UserError: unknown kind or entry, or the workspace cannot be written.
        """
        entry = ENTRIES.get(kind, "") if entry is None else entry
        if kind not in ENTRIES or entry not in self.entries:
            raise UserError(f"{kind!r} with program {entry!r} is not something that can be run here.")
        created = time.time()
        request = {"kind": kind, "title": " ".join(title.split())[:_MAX_TITLE], "created": created, "entry": entry}
        temporary = self.runs_folder / f".new-{secrets.token_hex(8)}"
        try:
            temporary.mkdir(parents=True)
            write_atomic(temporary / OPTIONS_FILE, to_toml(options))
            write_atomic(temporary / REQUEST_FILE, json.dumps(request, ensure_ascii=True) + "\n")
            (temporary / REQUESTS_FOLDER).mkdir()
            return self.get(self._give_name(temporary, created))
        except OSError as error:
            raise _plain_error(error, self.runs_folder) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _give_name(self, temporary: Path, created: float) -> str:
        stamp = time.strftime("%Y%m%d-%H%M", time.localtime(created))
        while True:
            run_id = f"{stamp}-{secrets.token_hex(3)}"
            if not os.path.lexists(self.runs_folder / run_id):  # a folder with files in it is never replaced anyway
                os.rename(temporary, self.runs_folder / run_id)
                fsync_folder(self.runs_folder)
                return run_id

    def list(self) -> list[Run]:
        """All runs, newest first. Folders that are no runs are left out; damaged runs are listed with what is known."""
        found: dict[str, tuple[int, Run]] = {}
        try:
            entries = os.scandir(self.runs_folder)
        except OSError:
            return []
        with entries:
            for item in entries:
                try:
                    known = self._read(item.name) if item.is_dir(follow_symlinks=False) else None
                except OSError:
                    continue
                if known is not None:
                    found[item.name] = known
        self._cache = found
        return sorted((run for _, run in found.values()), key=lambda run: (run.created, run.id), reverse=True)

    def get(self, run_id: str) -> Run:
        """The run of this name.

        Raises:
            UserError: there is none, or the name is not one that a run can have.
        """
        known = None
        if isinstance(run_id, str) and RUN_ID.fullmatch(run_id):
            folder = self.runs_folder / run_id
            known = self._read(run_id) if folder.is_dir() and not folder.is_symlink() else None
        if known is None:
            raise UserError(f"There is no run {str(run_id)[:120]!r} in this workspace. Reload the list of runs.")
        return known[1]

    def _read(self, run_id: str) -> tuple[int, Run] | None:
        if not RUN_ID.fullmatch(run_id):
            return None
        folder = self.runs_folder / run_id
        try:
            stamp = os.stat(folder / REQUEST_FILE).st_mtime_ns
        except OSError:
            # Started in a terminal, or damaged: what is there decides whether it is a run at all.
            marks = (EVENTS_FILE, OPTIONS_FILE, COMMAND_FILE, STARTED_FILE)
            stamp = -1
            if not any(os.path.lexists(folder / name) for name in marks):
                return None
        cached = self._cache.get(run_id)
        if cached is not None and cached[0] == stamp:
            return cached
        request = read_json(folder / REQUEST_FILE) or {}
        kind, entry, title = request.get("kind"), request.get("entry"), request.get("title")
        created = number(request.get("created"))
        return stamp, Run(
            id=run_id,
            folder=folder,
            kind=kind if isinstance(kind, str) and kind in ENTRIES else "",
            title=title[:_MAX_TITLE] if isinstance(title, str) and title else run_id,
            created=os.stat(folder).st_mtime if created is None else created,
            entry=entry if isinstance(entry, str) and entry in self.entries else "",
        )

    def trash(self, run_id: str) -> Path:
        """Move a run to the workspace's trash folder and return where it is now.

        A run that was never started is claimed first, so that nobody starts it while it moves.

        Raises:
            UserError: the run is alive, unknown, or cannot be moved.
        """
        run = self.get(run_id)
        claimed_here = False
        try:
            _refuse_alive(run)
            if not is_claimed(run.folder):
                claimed_here = claim(run.folder, {"trashed": True})
                if not claimed_here:
                    _refuse_alive(run)
            self.trash_folder.mkdir(parents=True, exist_ok=True)
            target = self._free_name(run_id)
            _rename(run.folder, target)
            fsync_folder(self.trash_folder)
        except OSError as error:
            if claimed_here:
                (run.folder / STARTED_FILE).unlink(missing_ok=True)
            raise _plain_error(error, run.folder) from error
        self._cache.pop(run_id, None)
        return target

    def _free_name(self, run_id: str) -> Path:
        target = self.trash_folder / run_id
        while os.path.lexists(target):
            target = self.trash_folder / f"{run_id}-{secrets.token_hex(3)}"
        return target


def _refuse_alive(run: Run) -> None:
    if view_run(run).state.alive:
        raise UserError(f"The run '{run.title}' is still working. Stop it first, then delete it.")


def _rename(source: Path, target: Path) -> None:
    """Rename; on Windows a virus scanner or a viewer may hold a file for a moment, so try for a second there."""
    for attempt in range(_WINDOWS_RETRIES):
        try:
            os.rename(source, target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == _WINDOWS_RETRIES - 1:
                raise
            time.sleep(0.05)


def _plain_error(error: OSError, path: Path) -> Exception:
    problem = write_problem(error, path)
    return UserError(f"{path} cannot be used: {error}.") if problem is error else problem
