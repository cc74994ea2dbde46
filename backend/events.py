"""The journal of a run: an append-only file of JSON lines, written by the engine alone and read by anybody.

A record is `{"v": 1, "seq": 17, "t": 1795398789.12, "type": "step", ...}`; `seq` grows by one from 1, `t` is in seconds
since 1970. Each record is one `os.write` to an `O_APPEND` descriptor, so that whatever `emit` has returned survives a
kill of the process. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from backend.errors import UserError

RECORD_VERSION = 1
#: Records that must survive a power cut too: they speak of files that are already on the disk.
DURABLE_TYPES = frozenset({"checkpoint", "error", "stopped", "finished", "sample"})
MAX_TEXT = 2000
MAX_RECORD_BYTES = 1 << 18
MAX_WAITING_RECORDS = 1000
MAX_READ_BYTES = 4 << 20
HEARTBEAT_SECONDS = 10.0
_LOCK_WAIT_SECONDS = 1.0
_CHUNK = 1 << 16
_MAX_TIME = 1e12  # seconds; more is damage, and an int of 400 digits is no float
_RESERVED = ("v", "seq", "t", "type")


# --- locks --------------------------------------------------------------------------------------------------------


def try_lock(descriptor: int) -> bool:
    """Take the exclusive advisory lock of an open file without waiting; False if another descriptor holds it.

    The lock ends with the descriptor, so also with the process, however that dies. On Windows one byte far behind the
    end is locked, so that readers of the content are not disturbed. A file system without locks counts as unlocked.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 0x7FFFFFFE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def lock_within(descriptor: int, seconds: float) -> bool:
    """`try_lock` again and again for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not try_lock(descriptor):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


# --- writing ------------------------------------------------------------------------------------------------------


class EventSink(Protocol):
    """What the engine needs of a journal."""

    def emit(self, type: str, /, **fields: Any) -> int: ...


class NullJournal:
    """A journal that keeps nothing: for engines that run without a run folder."""

    degraded = False
    problem: str | None = None

    def emit(self, type: str, /, **fields: Any) -> int:
        """Do nothing; the sequence number is always 0."""
        return 0

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> NullJournal:
        return self

    def __exit__(self, *_: object) -> None:
        return


class Journal:
    """The only writer of one journal file; it holds the file's lock for its life and may be used from several threads.

    Opening cuts a torn last line away and goes on with the next sequence number. A write that fails later (disk full,
    folder gone) never raises: the last 1,000 records wait in memory and are written at the next `emit` that can;
    meanwhile `degraded` is True and `problem` holds the reason. Records that fall out of the memory show as a gap.

    Raises:
        UserError: the file cannot be opened for writing, or another process writes to it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.problem: str | None = None
        self._guard = threading.RLock()  # reentrant: a signal handler may emit while its own thread is in emit
        self._waiting: deque[tuple[bytes, bool]] = deque(maxlen=MAX_WAITING_RECORDS)
        self._unsynced = False
        self._torn_at: int | None = None
        self._closed = False
        self._descriptor = -1
        self._seq = 0
        try:
            self._open()
        except OSError as error:
            raise UserError(
                f"The journal {self.path} cannot be written: {error.strerror}. "
                "Choose a run folder that you may write to."
            ) from error

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.path, flags, 0o644)
        try:
            # A short wait: a process that has just been killed gives its lock back when the system has cleaned it up.
            if not lock_within(descriptor, _LOCK_WAIT_SECONDS):
                raise UserError(
                    f"Another process is writing to {self.path.parent}. "
                    "Wait for it to end, or choose another run folder."
                )
            os.ftruncate(descriptor, _whole_length(descriptor))
            self._seq = max(self._seq, _last_seq(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    @property
    def degraded(self) -> bool:
        """True while records wait in memory, or while the disk did not confirm the last durable one."""
        return bool(self._waiting) or self._unsynced

    def emit(self, type: str, /, **fields: Any) -> int:
        """Append one record and return its sequence number.

        NaN and infinity become null and their names are listed in `nonfinite`; text is cut at 2,000 characters.
        `checkpoint`, `sample`, `error`, `stopped` and `finished` are on the disk when this returns.

        Raises:
            ValueError: a field is called v, seq, t or type, or the journal is closed.
        """
        if any(name in fields for name in _RESERVED):
            raise ValueError(f"A record's fields may not be called {', '.join(_RESERVED)}.")
        with self._guard:
            if self._closed:
                raise ValueError(f"The journal {self.path} is closed.")
            self._seq += 1
            seq = self._seq
            self._waiting.append((encode_record(seq, time.time(), type, fields), type in DURABLE_TYPES))
            self._write_waiting()
            return seq

    def _write_waiting(self) -> None:
        try:
            self._make_ready()
            while self._waiting:
                entry = self._waiting.popleft()  # taken out first: a signal handler may emit in the middle of this
                try:
                    self._write(entry[0])
                except OSError:
                    self._waiting.appendleft(entry)
                    raise
                self._unsynced = self._unsynced or entry[1]
            if self._unsynced:
                os.fsync(self._descriptor)
                self._unsynced = False
            self.problem = None
        except OSError as error:
            self.problem = f"The journal cannot be written: {error.strerror or error}."
        except UserError as error:  # the file was deleted and somebody else holds the new one
            self.problem = error.message

    def _make_ready(self) -> None:
        """Open the file again if it was deleted under us, and finish a cut that failed before."""
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink == 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._torn_at = None
        if self._descriptor < 0:
            self._open()
        if self._torn_at is not None:
            os.ftruncate(self._descriptor, self._torn_at)
            self._torn_at = None

    def _write(self, line: bytes) -> None:
        start = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
        except OSError:
            self._cut(start)
            raise
        if written != len(line):
            self._cut(start)
            raise OSError(errno.ENOSPC, "no space left for a whole record")

    def _cut(self, start: int) -> None:
        self._torn_at = start
        with contextlib.suppress(OSError):  # then `_make_ready` cuts before the next write
            os.ftruncate(self._descriptor, start)
            self._torn_at = None

    def close(self) -> None:
        """Try once more to write what waits, sync, and give the lock back. Closing twice is allowed."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            self._unsynced = True
            self._write_waiting()
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Heartbeat:
    """A daemon thread that emits `heartbeat` every `seconds` between `start` and `stop` (or inside a `with` block)."""

    def __init__(self, journal: EventSink, seconds: float = HEARTBEAT_SECONDS) -> None:
        self._journal = journal
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Heartbeat:
        """Start the thread; starting twice is a programmer's mistake."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds):
            self._journal.emit("heartbeat")

    def stop(self) -> None:
        """End the thread and wait for it, so that the journal can be closed. Stopping twice is allowed."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Heartbeat:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def encode_record(seq: int, moment: float, type: str, fields: Mapping[str, Any]) -> bytes:
    """One record as a line of UTF-8 JSON with its newline; never raises for odd values, never longer than 256 KiB."""
    nonfinite: list[str] = []
    record: dict[str, Any] = {"v": RECORD_VERSION, "seq": seq, "t": round(moment, 3), "type": type}
    record |= {name: _plain(value, name, nonfinite, 0) for name, value in fields.items()}
    if nonfinite:
        record["nonfinite"] = nonfinite
    line = _dump(record)
    if len(line) > MAX_RECORD_BYTES:
        sizes = {name: len(_dump(record[name])) for name in record if name not in _RESERVED}
        dropped = []
        for name in sorted(sizes, key=lambda key: -sizes[key]):
            if len(line) <= MAX_RECORD_BYTES:
                break
            del record[name]
            dropped.append(name[:100])
            record["dropped"] = dropped[:20]
            line = _dump(record)
    return line


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _plain(value: Any, name: str, nonfinite: list[str], depth: int) -> Any:
    """`value` as JSON can hold it; `name` is what `nonfinite` lists."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else str(value)[:MAX_TEXT]
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite.append(name)
        return None
    if depth < 8 and isinstance(value, Mapping):
        return {_text(key): _plain(item, f"{name}.{key}"[:200], nonfinite, depth + 1) for key, item in value.items()}
    if depth < 8 and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, name, nonfinite, depth + 1) for item in value]
    return _text(value.as_posix() if isinstance(value, Path) else value)


def _text(value: Any) -> str:
    """Text of at most 2,000 characters that UTF-8 can hold (a file name may not be)."""
    text = str(value)
    text = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _whole_length(descriptor: int) -> int:
    """Length in bytes up to and with the last newline."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _CHUNK)
        os.lseek(descriptor, start, os.SEEK_SET)
        found = os.read(descriptor, end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _last_seq(descriptor: int) -> int:
    """Sequence number to go on after: that of the last readable record plus one for each damaged line behind it.

    Counting the damaged lines keeps their numbers free, so that a reader sees a gap where they were.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    damaged, tail = 0, b""
    while end > 0:
        start = max(0, end - _CHUNK)
        os.lseek(descriptor, start, os.SEEK_SET)
        lines = (os.read(descriptor, end - start) + tail).split(b"\n")
        tail = lines.pop(0) if start > 0 else b""
        for line in reversed(lines):
            record = _decode(line)
            if record is not None:
                return record["seq"] + damaged
            damaged += bool(line)
        end = start
    return damaged


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EventPage:
    """What one call of `read_events` found.

    `offset` is where the next call goes on, `last_seq` what it should be given. `gap` is True when records are missing
    or unreadable, `more` when whole lines are left, `restarted` when the file is shorter than the given offset (it was
    replaced) and the records are those of the new file from its start.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    offset: int = 0
    gap: bool = False
    last_seq: int | None = 0
    more: bool = False
    restarted: bool = False


def read_events(
    path: str | Path, offset: int = 0, *, last_seq: int | None = None, max_bytes: int = MAX_READ_BYTES
) -> EventPage:
    """Read the whole records after byte `offset`, at most `max_bytes` (256 KiB or more) of them. Never raises.

    Only bytes up to the last newline count, so a line that is being written is left for the next call; lines that are
    no record are skipped. `last_seq` is the number of the record before `offset` (None: not known, then a gap right at
    the start is not seen). A missing or unreadable file is an empty page.
    """
    last_seq = 0 if offset <= 0 else last_seq
    limit = max(max_bytes, MAX_RECORD_BYTES)  # less could not hold every record
    try:
        with open(path, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            restarted = offset > size
            if restarted or offset < 0:
                offset, last_seq = 0, 0
            handle.seek(offset)
            block = _read_fully(handle.fileno(), min(limit, size - offset))
    except (OSError, ValueError):
        return EventPage(offset=max(offset, 0), last_seq=last_seq)
    end = block.rfind(b"\n") + 1
    gap = False
    if end == 0 and len(block) >= limit:
        end, gap = len(block), True  # longer than any record of ours: damage, skipped block by block
    records: list[dict[str, Any]] = []
    for line in block[:end].split(b"\n"):
        record = _decode(line) if line else None
        if record is None:
            gap = gap or bool(line)
            continue
        gap = gap or (last_seq is not None and record["seq"] != last_seq + 1)
        last_seq = record["seq"]
        records.append(record)
    return EventPage(records, offset + end, gap, last_seq, bool(end) and size > offset + len(block), restarted)


def _read_fully(descriptor: int, length: int) -> bytes:
    parts = []
    while length > 0:
        part = os.read(descriptor, length)
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record of one line, or None if it is none."""
    try:
        record = json.loads(line, parse_float=_finite, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    seq, moment, type_ = record.get("seq"), record.get("t"), record.get("type")
    if type(seq) is not int or not 0 < seq < 1 << 53 or not isinstance(type_, str):
        return None
    if isinstance(moment, bool) or not isinstance(moment, int | float) or not 0 <= moment < _MAX_TIME:
        return None
    # Half of a surrogate pair can be written as an escape, but nobody can encode it again: a page would break on it.
    return _plain(record, "", [], 0) if b"\\ud" in line or b"\\uD" in line else record


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
