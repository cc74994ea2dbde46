"""The caching runs of a workspace, by dataset: those at work, how the last ones ended, and how fast they were."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backend.jobs.states import JobState
from backend.jobs.store import Run, RunStore
from backend.jobs.view import RunView, view_run
from k5ui.caching.pace import Measured, measure, same_kind
from k5ui.caching.request import KINDS

Viewed = tuple[Run, RunView]
_MEASURED_RUNS = 30
_SHOWN_WARNINGS = 50
_OF_A_DATASET = "datasets["


class CacheRuns:
    """Finds caching runs. `options_of` gives the options of a run as plain values."""

    def __init__(self, store: RunStore, options_of: Callable[[Run], Mapping[str, Any]]) -> None:
        self._store = store
        self._options_of = options_of
        self._guard = threading.Lock()
        self._measured: dict[str, Measured | None] = {}

    def of_dataset(self, path: Path) -> list[Viewed]:
        """The runs of one dataset configuration, newest first."""
        wanted = os.fspath(path)
        runs = [run for run in self._store.list() if run.kind in KINDS]
        return [(run, view_run(run)) for run in runs if self._options_of(run).get("dataset_config") == wanted]

    def measured(self, kind: str, options: Mapping[str, Any]) -> list[Measured]:
        """What finished runs of a kind with the same weights and number formats tell, newest first."""
        wanted = same_kind(kind, options)
        found: list[Measured] = []
        runs = [run for run in self._store.list() if run.kind == kind]
        for run in runs[:_MEASURED_RUNS]:
            if same_kind(kind, self._options_of(run)) == wanted:
                known = self._measure(run)
                found += [known] if known is not None else []
        return found

    def _measure(self, run: Run) -> Measured | None:
        with self._guard:
            if run.id in self._measured:
                return self._measured[run.id]
        view = view_run(run)
        if not view.state.terminal:
            return None
        result = measure(run.folder, run.kind, view.seconds) if view.state is JobState.FINISHED else None
        with self._guard:
            self._measured[run.id] = result
        return result


def at_work(runs: list[Viewed]) -> list[Viewed]:
    """Those that run or wait in the queue, in the order in which they are worked off."""
    active = [item for item in runs if item[1].state.alive or item[1].queue_position is not None]
    return sorted(active, key=lambda item: -1 if item[1].queue_position is None else item[1].queue_position)


def live_page(viewed: Viewed, frame: str | None) -> dict[str, Any]:
    """A run at work as the tab shows it; `frame` is the address of a picture of the item, if there is one."""
    run, view = viewed
    return {
        "id": run.id,
        "kind": run.kind,
        "state": view.state.value,
        "phase": view.phase,
        "message": view.message,
        "step": view.step,
        "total": view.total,
        "unit": view.unit,
        "item": view.item_name,
        "seconds_per_item": view.seconds_per_step,
        "remaining_seconds": view.remaining_seconds,
        "queue_position": view.queue_position,
        "seconds": view.seconds,
        "frame": frame,
    }


def last_pages(runs: list[Viewed]) -> list[dict[str, Any]]:
    """How the newest run of each kind ended, where that leaves something to say: failures, items left out, a stop.

    What a run says of a dataset as a whole stands in its ledger anyway, so that is left out here.
    """
    pages = []
    for kind in KINDS:
        newest = next(((run, view) for run, view in runs if run.kind == kind), None)
        if newest is None or not newest[1].state.terminal:
            continue
        run, view = newest
        told = [text for text in view.warnings if not text.startswith(_OF_A_DATASET)]
        if view.state is JobState.FINISHED and (kind == "cache_text" or not told):
            continue
        pages.append(
            {
                "id": run.id,
                "kind": kind,
                "state": view.state.value,
                "message": view.message if view.state is not JobState.FINISHED else "",
                "problems": [row["message"] for row in view.problems],
                "warnings": told[-_SHOWN_WARNINGS:],
                "warnings_total": len(told),
                "step": view.step,
                "total": view.total,
                "ended": view.ended,
            }
        )
    return pages
