"""What is known of one run folder, read from its files and from the process table; nothing is remembered here."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.jobs.process import ProcessIdentity, is_alive

OPTIONS_FILE = "options.toml"
REQUEST_FILE = "request.json"
#: Made once, exclusively, by the supervisor that may run the job: the reason why no job runs twice.
STARTED_FILE = "started.json"
COMMAND_FILE = "command.json"
RESULT_FILE = "result.json"
EVENTS_FILE = "events.jsonl"
LOG_FILE = "log.txt"
REQUESTS_FOLDER = "requests"
KILL_REQUEST = "kill"
QUEUE_FILE = "queue.json"

_MAX_JSON_BYTES = 1 << 20
_LARGEST = 1e18
#: An unreadable started.json that is younger may still be in the writing.
_CLAIM_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class RunFacts:
    """Everything about a run that does not need its journal.

    Times are seconds since 1970. `engine` and `supervisor` are who they were; `engine_alive` and `supervisor_alive`
    whether exactly these processes still run. `result` is None without a readable result.json.
    """

    claimed: bool
    claimed_at: float | None
    supervisor: ProcessIdentity | None
    engine: ProcessIdentity | None
    supervisor_alive: bool
    engine_alive: bool
    claim_pending: bool
    result: dict[str, Any] | None
    requests: frozenset[str]

    @property
    def alive(self) -> bool:
        """True while the job has a process, or may have one in a moment."""
        return self.engine_alive or self.supervisor_alive or self.claim_pending


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object of at most 1 MiB, or None if the file is missing, damaged or something else."""
    try:
        with open(path, "rb") as handle:
            content = handle.read(_MAX_JSON_BYTES + 1)
        value = json.loads(content) if len(content) <= _MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(value: Any) -> float | None:
    """A number from JSON that is of a usable size, else None."""
    # The comparison also refuses NaN, and whole numbers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return float(value)


def whole_number(value: Any) -> int | None:
    """An int from JSON, else None."""
    return value if type(value) is int else None


def is_claimed(folder: Path) -> bool:
    """True once a supervisor (or the trash) has taken the run: it will never be started again."""
    return os.path.lexists(folder / STARTED_FILE)


def read_facts(folder: Path) -> RunFacts:
    """Read the facts of a run; damaged files count as missing."""
    claim_path = folder / STARTED_FILE
    claim = read_json(claim_path)
    claimed = is_claimed(folder)
    command = read_json(folder / COMMAND_FILE) or {}
    # Processes first, the result last: a supervisor writes the result before it ends, so that "gone and no result" is
    # never an accident of the order.
    supervisor = ProcessIdentity.from_dict((claim or {}).get("supervisor"))
    engine = ProcessIdentity.from_dict(command.get("engine"))
    engine_alive, supervisor_alive = is_alive(engine), is_alive(supervisor)
    result = read_json(folder / RESULT_FILE)
    pending = claimed and claim is None and result is None and _age(claim_path) < _CLAIM_GRACE_SECONDS
    return RunFacts(
        claimed=claimed,
        claimed_at=number((claim or {}).get("time")),
        supervisor=supervisor,
        engine=engine,
        # The last thing that a supervisor does is to write the result; what it does after that is nobody's business.
        supervisor_alive=supervisor_alive and result is None,
        engine_alive=engine_alive,
        claim_pending=pending,
        result=result,
        requests=_requests(folder),
    )


def _age(path: Path) -> float:
    try:
        return abs(time.time() - path.stat().st_mtime)
    except OSError:
        return math.inf


def _requests(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder / REQUESTS_FOLDER) as entries:
            # A folder holds what was answered before.
            return frozenset(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())
    except OSError:
        return frozenset()


def read_order(path: Path) -> list[str] | None:
    """The run ids in a queue file, first to start first; [] if there is no file, None if it is damaged."""
    if not os.path.lexists(path):
        return []
    order = (read_json(path) or {}).get("order")
    if not isinstance(order, list) or not all(isinstance(item, str) for item in order):
        return None
    return list(dict.fromkeys(order))


def log_tail(folder: Path, max_bytes: int = 8192, max_lines: int = 40) -> str:
    """The end of log.txt as text: bytes that are not UTF-8 replaced, progress bars reduced to what they last showed."""
    try:
        with open(folder / LOG_FILE, "rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - max_bytes))
            content = handle.read(max_bytes)
    except OSError:
        return ""
    lines = content.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    if size > max_bytes:
        lines = lines[1:] or lines
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    return "\n".join(shown[-max_lines - 1 :]).strip("\n")
