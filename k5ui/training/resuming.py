"""Going on from a state: where it stands, and what has changed since, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.config.resume_diff import Difference, differences
from backend.config.state_record import Position, read_record, state_folders
from backend.config.train import TrainOptions
from backend.errors import UserError
from k5ui.training.history import read_lines

_MAX_SHOWN = 200


@dataclass(frozen=True)
class Resumed:
    """A state that a training goes on from; `problem` says why it cannot be read."""

    folder: Path
    position: Position | None = None
    rows: tuple[Difference, ...] = ()
    problem: str | None = None

    @property
    def impossible(self) -> list[str]:
        """Sentences for everything that keeps the training from going on."""
        if self.problem is not None:
            return [self.problem]
        return [f"{row.name}: {row.why}" for row in self.rows if row.kind == "impossible"]

    def page(self, source: str) -> dict[str, Any]:
        """For the page: name, path, step and epoch (from 1), source run, rows (name, old, new, kind, why)."""
        rows = [
            {"name": row.name, "old": _shown(row.old), "new": _shown(row.new), "kind": row.kind, "why": row.why}
            for row in self.rows
        ]
        return {
            "name": self.folder.name,
            "path": str(self.folder),
            "run": source,
            "step": self.position.step if self.position is not None else None,
            "epoch": self.position.epoch + 1 if self.position is not None else None,
            "rows": rows,
            "problem": self.problem,
        }


def compare_with_state(options: TrainOptions) -> Resumed:
    """What `options`, which name a state folder, would go on from and change."""
    folder = Path(options.resume or "")
    try:
        record = read_record(folder)
    except UserError as error:
        return Resumed(folder, problem=error.message)
    # Fingerprints of dataset and weights are taken by the engine, which compares them when it starts.
    rows = differences(record.options, options, {**record.extra, "seed": record.seed}, {})
    return Resumed(folder, record.position, tuple(row for row in rows if not _same_prompts(row)))


def _same_prompts(row: Difference) -> bool:
    """Whether only the place of a prompt file differs: the page writes its lines into the folder of each run."""
    if row.name != "sample_prompts" or row.old is None or row.new is None:
        return False
    return read_lines(Path(row.old)) == read_lines(Path(row.new)) != ""


def newest_state(folders: list[Path], name: str) -> Path | None:
    """The whole state of a training called `name` with the most steps; None: there is none."""
    found: list[tuple[Position, Path]] = []
    for folder in folders:
        for path in state_folders(folder, name):
            try:
                found.append((read_record(path).position, path))
            except UserError:
                continue  # not whole, so it is no state
    return max(found)[1] if found else None


def _shown(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
