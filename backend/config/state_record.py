"""What a saved training state is, without its tensors: where it stands, made by what, and whether it is whole.

A state is a folder. Its COMPLETE.json was written last and names every file with size and SHA-256; a folder without
it, or with files that differ from it, is no state. No torch: the page reads this too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.errors import UserError

COMPLETE = "COMPLETE.json"
POSITION = "position.json"
FORMAT = 1
FIELD = "resume"
_MAX_JSON_BYTES = 16 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True, order=True)
class Position:
    """Where training stands: optimizer steps done, epoch (from 0), and this epoch's batches done over all processes."""

    step: int
    epoch: int
    batch: int


@dataclass(frozen=True)
class StateRecord:
    """A whole state: its position, the run's seed and options, how many processes it had, and what the trainer added.

    `extra` holds dataset_fingerprint and base_fingerprint, which `backend.config.resume_diff` compares; `versions` are
    those of Python, torch and this program; `optimizer` and `schedule` are classes, by their dotted names.
    """

    folder: Path
    position: Position
    seed: int
    processes: int
    options: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    optimizer: str = ""
    schedule: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_record(folder: str | Path, *, hashes: bool = False) -> StateRecord:
    """Read a state's record after a check that it is whole: sizes of all files, with `hashes` their content as well.

    Raises:
        UserError: no state, one that is not whole, damaged, or of a later version of this program.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not there. Give the folder of a state, whose name ends in -state.", FIELD)
    if not (folder / COMPLETE).is_file():
        raise UserError(
            f"{folder} is not a whole state: it has no {COMPLETE}, which is written last. Take another one.", FIELD
        )
    complete = _read_json(folder / COMPLETE)
    if complete.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {complete.get('format')}, this program reads {FORMAT}. "
            "Go on with the version that wrote it.",
            FIELD,
        )
    problem = _difference(folder, complete.get("files"), hashes)
    if problem:
        raise UserError(f"{folder} is damaged: {problem}. Take another state.", FIELD)
    try:
        return _record(folder, _read_json(folder / POSITION))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / POSITION} is damaged: {error!r}. Take another state.", FIELD) from None


def _record(folder: Path, values: dict[str, Any]) -> StateRecord:
    position = Position(*(int(values["position"][name]) for name in ("step", "epoch", "batch")))
    return StateRecord(
        folder=folder,
        position=position,
        seed=int(values["seed"]),
        processes=int(values["processes"]),
        options=dict(values["options"]),
        versions=dict(values["versions"]),
        optimizer=str(values["optimizer"]),
        schedule=str(values["schedule"]),
        extra=dict(values["extra"]),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} is far too large. Take another state.", FIELD)
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the path and its rights.", FIELD) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}. Take another state.", FIELD) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no object. Take another state.", FIELD)
    return value


def _difference(folder: Path, files: Any, hashes: bool) -> str:
    """What makes the folder differ from its list of files; empty if nothing does."""
    if not isinstance(files, dict) or POSITION not in files:
        return f"{COMPLETE} lists no files"
    for name, facts in files.items():
        if not isinstance(facts, dict) or Path(name).name != name:
            return f"{COMPLETE} names {name!r}"
        path = folder / name
        try:
            size = path.stat().st_size
            if size != facts.get("bytes"):
                return f"{name} has {size} bytes, not {facts.get('bytes')}"
            if hashes and sha256_of(path) != facts.get("sha256"):
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


# --- the states of a run ------------------------------------------------------------------------------------------


def saving_folder(final: Path) -> Path:
    """Where a state is built before it gets its name."""
    return final.with_name(f".{final.name}.saving")


def replaced_folder(final: Path) -> Path:
    """Where a state of the same name waits while the new one takes its place."""
    return final.with_name(f".{final.name}.replaced")


def state_folders(output_dir: str | Path, output_name: str) -> Iterator[Path]:
    """Folders that are called like states of `output_name`, whole or not, in any order.

    A folder that was set aside for a new one counts under its hidden name while the new one is not there: whoever
    replaced it was killed between two renames.
    """
    pattern = re.compile(rf"{re.escape(output_name)}(-\d{{6,}}|-step\d{{8,}})?-state")
    try:
        names = os.listdir(output_dir)
    except OSError:
        return
    for name in names:
        if pattern.fullmatch(name):
            yield Path(output_dir, name)
        elif name.startswith(".") and name.endswith(".replaced"):
            final = Path(output_dir, name[1:].removesuffix(".replaced"))
            if pattern.fullmatch(final.name) and not final.exists():
                yield Path(output_dir, name)


def latest_state(output_dir: str | Path, output_name: str) -> Path | None:
    """The whole state of `output_name` with the most steps, content checked; None if there is none."""
    found: list[tuple[Position, int, Path]] = []
    for folder in state_folders(output_dir, output_name):
        try:
            record = read_record(folder)
            written = (folder / COMPLETE).stat().st_mtime_ns
        except (UserError, OSError):
            continue  # Not whole, or deleted a moment ago: then it is no state.
        # The name "a-000005-state" may be the fifth epoch of "a" or the end of "a-000005"; its options say which.
        if record.options.get("output_name", output_name) == output_name:
            found.append((record.position, written, folder))
    for _, _, folder in sorted(found, reverse=True):
        try:
            return read_record(folder, hashes=True).folder
        except UserError:
            continue  # Its content rotted; the one before it is better than none.
    return None
