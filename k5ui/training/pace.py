"""How long a step took before and how much memory: from the person's own runs of the same kind, and nothing else."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.events import read_events
from backend.files import write_atomic
from backend.jobs.facts import EVENTS_FILE, number, read_json
from backend.jobs.store import Run, RunStore
from backend.jobs.view import view_run

PLAN_FILE = "plan.json"
_RUNS = 40
_ENOUGH_STEPS = 3
# Two runs of the same options and of datasets whose items differ by less than this count as the same.
_SAME_SIZE = 0.02
#: What decides how long a step takes and how much memory it needs, besides the size of the items.
_SAME = (
    "task", "dit", "device", "mixed_precision", "attention", "fp8_base", "fp8_scaled", "gradient_checkpointing",
    "gradient_checkpointing_cpu_offload", "blocks_to_swap", "network_dim", "gradient_accumulation_steps",
    "optimizer_type", "force_nabla_attention", "nabla_P",
)  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """What an earlier run measured: seconds of a step, and the most memory in bytes (None: it did not say)."""

    seconds: float
    memory: int | None


@dataclass(frozen=True)
class _Measured:
    kind: tuple[Any, ...]
    size: float
    pace: Pace


def note_plan(folder: Path, size: float) -> None:
    """Write down how large a batch of a run is (megapixel-frames), so that its speed tells something later.

    Raises:
        UserError: the folder cannot be written.
    """
    write_atomic(folder / PLAN_FILE, json.dumps({"version": 1, "batch_size": size}) + "\n")


class Paces:
    """Finds what finished trainings of a workspace measured; journals are read once."""

    def __init__(self, store: RunStore, options_of: Any) -> None:
        self._store = store
        self._options_of = options_of
        self._guard = threading.Lock()
        self._known: dict[str, tuple[int, _Measured | None]] = {}

    def find(self, options: Mapping[str, Any], size: float) -> Pace | None:
        """The newest run with the same kind of steps; None: there is none, so nobody can know yet."""
        wanted = _kind(options)
        for run in [run for run in self._store.list() if run.kind == "train"][:_RUNS]:
            measured = self._measure(run)
            if measured is None or measured.kind != wanted:
                continue
            if abs(measured.size - size) <= _SAME_SIZE * max(size, measured.size):
                return measured.pace
        return None

    def _measure(self, run: Run) -> _Measured | None:
        try:
            length = os.stat(run.folder / EVENTS_FILE).st_size
        except OSError:
            return None
        with self._guard:
            known = self._known.get(run.id)
        if known is not None:
            grown = length >= 2 * known[0] or (length > known[0] and view_run(run).state.terminal)
            if not grown:  # a journal that is being written is not read again at every look
                return known[1]
        size = number((read_json(run.folder / PLAN_FILE) or {}).get("batch_size"))
        pace = _pace(run.folder) if size is not None else None
        found = _Measured(_kind(self._options_of(run)), size, pace) if pace is not None and size is not None else None
        with self._guard:
            self._known[run.id] = (length, found)
        return found


def _kind(options: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(options.get(name) for name in _SAME)


def _pace(folder: Path) -> Pace | None:
    seconds, memory, steps, offset = None, None, 0, 0
    while True:
        page = read_events(folder / EVENTS_FILE, offset)
        for record in page.records:
            if record["type"] == "step":
                steps += 1
                seconds = number(record.get("seconds_per_step")) or seconds
                peak = number(record.get("memory_bytes"))
                memory = max(int(peak), memory or 0) if peak is not None else memory
        offset = page.offset
        if not page.more:
            break
    return Pace(seconds, memory) if seconds is not None and steps >= _ENOUGH_STEPS else None
