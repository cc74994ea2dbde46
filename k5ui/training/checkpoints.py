"""What a training has saved, and which run wrote a state: from there earlier attempts are found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from backend.config.state_record import COMPLETE
from backend.jobs.facts import whole_number
from backend.jobs.store import Run

MAX_ROWS = 500
_MAX_ATTEMPTS = 50
_KINDS = ("lora", "state")


def checkpoint_path(run: Run, record: Mapping[str, Any]) -> Path | None:
    """Where a `checkpoint` record says that its file or folder lies; None if a relative path leads out of the run."""
    path = record.get("path")
    if not isinstance(path, str) or not path or "\0" in path:
        return None
    full = Path(os.path.normpath(run.folder / path))
    return full if os.path.isabs(path) or full.is_relative_to(run.folder) else None


def checkpoint_rows(
    run: Run, records: Iterable[Mapping[str, Any]], allowed: Callable[[Path], bool]
) -> list[dict[str, Any]]:
    """The files and states that are still there, newest first: kind, name, path, step, epoch, why, bytes, t.

    What was removed since (only the last ones are kept), or may not be read, is left out.
    """
    rows: list[dict[str, Any]] = []
    for record in reversed(list(records)):
        path = checkpoint_path(run, record)
        kind = record.get("kind")
        if path is None or kind not in _KINDS or not allowed(path):
            continue
        if not (path / COMPLETE).is_file() if kind == "state" else not path.is_file():
            continue
        rows.append(
            {
                "kind": kind,
                "name": path.name,
                "path": os.fspath(path),
                "step": whole_number(record.get("step")),
                "epoch": whole_number(record.get("epoch")),
                "why": record.get("why") if isinstance(record.get("why"), str) else "",
                "bytes": whole_number(record.get("bytes")),
                "t": record["t"],
            }
        )
        if len(rows) >= MAX_ROWS:
            break
    return rows


class Attempts:
    """Follows `resume` from a run to the run that wrote the state.

    `runs` lists the trainings, newest first, `options_of` gives the options of a run, `checkpoints_of` and
    `resumes_of` what its journal says.
    """

    def __init__(
        self,
        runs: Callable[[], list[Run]],
        options_of: Callable[[Run], Mapping[str, Any]],
        checkpoints_of: Callable[[Run], list[dict[str, Any]]],
        resumes_of: Callable[[Run], list[dict[str, Any]]],
    ) -> None:
        self._runs = runs
        self._options_of = options_of
        self._checkpoints_of = checkpoints_of
        self._resumes_of = resumes_of

    def chain(self, run: Run) -> list[tuple[Run, int | None]]:
        """The earlier attempts and `run` itself, oldest first, each with the step after which it began (None: at the
        start, or not known yet)."""
        found: list[tuple[Run, int | None]] = []
        current: Run | None = run
        while current is not None and len(found) < _MAX_ATTEMPTS and current.id not in {known.id for known, _ in found}:
            owner, step = self._before(current)
            found.append((current, step))
            current = owner
        return found[::-1]

    def _before(self, run: Run) -> tuple[Run | None, int | None]:
        """The run whose state `run` went on from, and the step of that state."""
        resumed = self._resumes_of(run)
        step = whole_number(resumed[-1].get("step")) if resumed else None
        given = resumed[-1].get("path") if resumed else self._options_of(run).get("resume")
        if not isinstance(given, str) or not os.path.isabs(given):
            return None, step
        state = Path(os.path.normpath(given))
        for other in self._runs():
            if other.id == run.id or other.created > run.created or not self._may_own(other, state):
                continue
            for record in self._checkpoints_of(other):
                if record.get("kind") == "state" and checkpoint_path(other, record) == state:
                    return other, step if step is not None else whole_number(record.get("step"))
        return None, step

    def _may_own(self, run: Run, state: Path) -> bool:
        """Whether the state lies where the run saves; only the journals of such runs are read."""
        if state.is_relative_to(run.folder):
            return True
        folder = self._options_of(run).get("output_dir")
        return isinstance(folder, str) and os.path.normpath(folder) == os.fspath(state.parent)
