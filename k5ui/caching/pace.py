"""How long caching will take: from finished runs of the same kind, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from backend.events import read_events
from backend.files import write_atomic
from backend.jobs.facts import EVENTS_FILE, number, read_json, whole_number

WORK_FILE = "work.json"
_RUNS = 5
_UNITS = ("items", "captions")
# What decides how long an item takes, besides its size.
_SAME = ("vae", "vae_dtype", "vae_tiling", "text_encoder_qwen", "dtype", "quantized_qwen", "device")


@dataclass(frozen=True)
class Work:
    """What there is to do: items, and their size in megapixel-frames (captions: their number)."""

    items: int = 0
    size: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.items + other.items, self.size + other.size)


@dataclass(frozen=True)
class Measured:
    """A finished run: seconds for loading and all else that does not grow with the work, seconds of work, its size."""

    before: float
    seconds: float
    size: float


def same_kind(kind: str, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be equal for one run to tell something about another."""
    return (kind, *(options.get(name) for name in _SAME))


def note_work(folder: Path, work: Work) -> None:
    """Write down what a run is asked to do, so that its duration tells something later.

    Raises:
        UserError: the folder cannot be written.
    """
    write_atomic(folder / WORK_FILE, json.dumps({"version": 1, **asdict(work)}) + "\n")


def measure(folder: Path, kind: str, seconds: float | None) -> Measured | None:
    """What a finished run of `seconds` tells; None if it did nothing, or its journal and its work do not fit."""
    marks = _marks(folder)
    counted = max((mark.total for mark in marks), default=0)
    worked = sum(mark.seconds for mark in marks)
    if seconds is None or worked <= 0 or not counted:
        return None
    size: float | None = float(counted)
    if kind == "cache_latents":  # items differ in size, so their number alone says little
        noted = read_json(folder / WORK_FILE) or {}
        size = number(noted.get("size")) if noted.get("items") == counted else None
    return Measured(max(0.0, seconds - worked), worked, size) if size else None


class _Mark(NamedTuple):
    """A phase in which items were counted: seconds from its beginning to the last of them, and how many there were."""

    seconds: float
    total: int


def _marks(folder: Path) -> list[_Mark]:
    marks: list[_Mark] = []
    began = offset = 0
    counting = False
    while True:
        page = read_events(folder / EVENTS_FILE, offset)
        for record in page.records:
            if record["type"] == "phase":
                began, counting = record["t"], False
            elif record["type"] == "progress" and record.get("unit") in _UNITS:
                if counting:
                    marks.pop()
                marks.append(_Mark(record["t"] - began, whole_number(record.get("total")) or 0))
                counting = True
        offset = page.offset
        if not page.more:
            return marks


def expected_seconds(past: list[Measured], work: Work) -> float | None:
    """Seconds that `work` will take after the newest runs (`past`, newest first); None: nobody can know yet."""
    newest = past[:_RUNS]
    size = sum(run.size for run in newest)
    if not newest or not size:
        return None
    if not work.items:
        return 0.0
    before = sum(run.before for run in newest) / len(newest)
    return before + work.size * sum(run.seconds for run in newest) / size
