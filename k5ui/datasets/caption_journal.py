"""What captions were before they were changed from here: steps that can be undone and redone, also after a restart.

One line of JSON for each step, written before the files are touched: {"op": "edit", "step": n, "changes": [{"path",
"before", "after"}]}, with texts as Latin-1 of the bytes and null for no file; {"op": "undo"} and {"op": "redo"} move
the place in the list.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from backend.errors import UserError
from backend.files import write_atomic, write_problem
from k5ui.datasets.captions import NO_FILE, replace_file
from k5ui.datasets.documents import Conflict, revision_of
from k5ui.roots import Roots

MAX_BYTES = 64 << 20
MAX_STEPS = 500
_MANY = 20


class Change(NamedTuple):
    """The bytes of one caption file before and after; None: there is no file."""

    path: str
    before: bytes | None
    after: bytes | None


@dataclass
class Outcome:
    """How many files were changed, the names of those that another program had changed, and how many steps are left."""

    changed: int = 0
    conflicts: list[str] = field(default_factory=list)
    undo_left: int = 0
    redo_left: int = 0


class CaptionJournal:
    """The steps of one dataset, in one file. Safe to use from several threads."""

    def __init__(self, path: str | Path, roots: Roots) -> None:
        self.path = Path(path)
        self._roots = roots
        self._guard = threading.Lock()
        self._counted_at: tuple[tuple[int, int], tuple[int, int]] | None = None

    def left(self) -> tuple[int, int]:
        """How many steps can be undone and redone; the file is read only when it has changed."""
        with self._guard:
            try:
                status = os.stat(self.path)
            except OSError:
                return 0, 0
            stamp = (status.st_mtime_ns, status.st_size)
            if self._counted_at is None or self._counted_at[0] != stamp:
                done, undone = self._read()
                self._counted_at = stamp, (len(done), len(undone))
            return self._counted_at[1]

    def apply(self, changes: Sequence[Change]) -> Outcome:
        """Write the step down, then change the files; a file that changed since it was read is left as it is.

        Raises:
            UserError: the journal or a file cannot be written. What was changed until then can be undone.
        """
        with self._guard:
            record = {"op": "edit", "t": round(time.time(), 3), "changes": [_packed(change) for change in changes]}
            self._append(record)
            outcome = self._carry_out([(change.path, change.before, change.after) for change in changes])
            return self._counted(outcome)

    def undo(self) -> Outcome:
        """Take the last step back. Files that another program has changed since are left as they are.

        Raises:
            UserError: there is nothing to undo, or a file cannot be written.
        """
        with self._guard:
            done, _ = self._read()
            if not done:
                raise UserError("There is no change of captions to undo.")
            outcome = self._carry_out([(change.path, change.after, change.before) for change in done[-1]])
            self._append({"op": "undo"})
            return self._counted(outcome)

    def redo(self) -> Outcome:
        """Make the step again that was undone last.

        Raises:
            UserError: there is nothing to redo, or a file cannot be written.
        """
        with self._guard:
            _, undone = self._read()
            if not undone:
                raise UserError("There is no change of captions to make again.")
            outcome = self._carry_out([(change.path, change.before, change.after) for change in undone[-1]])
            self._append({"op": "redo"})
            return self._counted(outcome)

    def _counted(self, outcome: Outcome) -> Outcome:
        done, undone = self._read()
        outcome.undo_left, outcome.redo_left = len(done), len(undone)
        return outcome

    def _carry_out(self, moves: Sequence[tuple[str, bytes | None, bytes | None]]) -> Outcome:
        outcome = Outcome()
        for path, expected, data in moves:
            if self._roots.exposed and not self._roots.allows(path):
                outcome.conflicts.append(os.path.basename(path))
                continue
            try:
                replace_file(path, _revision(expected), data, durable=len(moves) <= _MANY)
                outcome.changed += 1
            except Conflict:
                outcome.conflicts.append(os.path.basename(path))
        return outcome

    def _read(self) -> tuple[list[list[Change]], list[list[Change]]]:
        """(steps that are done, oldest first; steps that were undone, the last undone at the end)."""
        done: list[list[Change]] = []
        undone: list[list[Change]] = []
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return done, undone
        for line in lines:
            record = _record(line)
            if record.get("op") == "edit":
                done.append(_changes(record))
                undone.clear()
            elif record.get("op") == "undo" and done:
                undone.append(done.pop())
            elif record.get("op") == "redo" and undone:
                done.append(undone.pop())
        return done, undone

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"
        if len(line) > MAX_BYTES:
            raise UserError("This changes more text than can be undone. Change fewer captions at once.")
        self._shorten(len(line))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as handle:
                if handle.tell() > 0:  # the rest of a line that was cut off by a power cut is no part of this one
                    handle.seek(-1, os.SEEK_END)
                    line = line if handle.read(1) == b"\n" else b"\n" + line
                handle.write(line)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            problem = write_problem(error, self.path)
            if problem is error:
                raise UserError(f"{self.path} cannot be written: {error.strerror or error}.") from error
            raise problem from error

    def _shorten(self, more: int) -> None:
        """Forget the oldest steps of a journal that grows too large."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        done, undone = self._read()
        if size + more <= MAX_BYTES and len(done) < MAX_STEPS:
            return
        kept = (done + undone[::-1])[-MAX_STEPS // 2 :]
        lines = [
            json.dumps({"op": "edit", "changes": [_packed(change) for change in step]}, separators=(",", ":"))
            for step in kept
        ]
        lines += ['{"op":"undo"}'] * min(len(undone), len(kept))
        while lines and sum(map(len, lines)) + more > MAX_BYTES:
            lines.pop(0)
        write_atomic(self.path, "".join(f"{line}\n" for line in lines))


def _revision(data: bytes | None) -> str:
    return NO_FILE if data is None else revision_of(data)


def _packed(change: Change) -> dict[str, str | None]:
    path = os.fsencode(change.path).decode("latin-1")
    before, after = (data if data is None else data.decode("latin-1") for data in (change.before, change.after))
    return {"path": path, "before": before, "after": after}


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _changes(record: dict[str, Any]) -> list[Change]:
    try:
        return [
            Change(os.fsdecode(item["path"].encode("latin-1")), _bytes(item["before"]), _bytes(item["after"]))
            for item in record["changes"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError):
        return []  # a damaged step changes nothing


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("latin-1")
