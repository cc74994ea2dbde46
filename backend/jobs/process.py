"""Processes that are known by more than a number: pid, start time and the boot they belong to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
#: Two clock ticks: psutil derives create times from ticks of 10 ms.
_CREATE_TIME_TOLERANCE = 0.02
#: Create times are counted from a boot time that is known to a second only.
_RECORD_TOLERANCE = 2.0


@dataclass(frozen=True)
class ProcessIdentity:
    """One process for good: a later one with the same pid differs in the start time, one after a reboot in the boot.

    `create_time` is in seconds since 1970; `start_ticks` counts from boot and so does not move when the clock is set
    (Linux only); `boot_id` is empty where the system has none.
    """

    pid: int
    create_time: float
    boot_id: str = ""
    start_ticks: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The identity as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> ProcessIdentity | None:
        """The identity in a JSON value, or None if it is damaged."""
        if not isinstance(value, dict):
            return None
        pid, created, boot, ticks = (value.get(key) for key in ("pid", "create_time", "boot_id", "start_ticks"))
        if type(pid) is not int or not 0 < pid < 1 << 31:
            return None
        if isinstance(created, bool) or not isinstance(created, int | float) or not 0 <= created < 1e12:
            return None
        return cls(pid, float(created), boot if isinstance(boot, str) else "", ticks if type(ticks) is int else None)


def boot_id() -> str:
    """The system's name for the current boot; empty where there is none (then start times alone must do)."""
    try:
        return _BOOT_ID_FILE.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of a running process, or None if there is none with this pid."""
    try:
        return ProcessIdentity(pid, psutil.Process(pid).create_time(), boot_id(), _start_ticks(pid))
    except psutil.Error:
        return None


def is_alive(identity: ProcessIdentity | None) -> bool:
    """True when exactly this process still runs; a zombie does not."""
    if identity is None:
        return False
    if identity.boot_id and identity.boot_id != (boot_id() or identity.boot_id):
        return False
    try:
        process = psutil.Process(identity.pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        ticks = _start_ticks(identity.pid)
        if identity.start_ticks is not None and ticks is not None:
            return ticks == identity.start_ticks
        return abs(process.create_time() - identity.create_time) <= _CREATE_TIME_TOLERANCE
    except psutil.Error:
        return False


def alive_since(pid: int, moment: float) -> ProcessIdentity | None:
    """The process with this pid if it was already there at `moment` (seconds since 1970), else None.

    For runs that somebody started in a terminal: only the pid and the time of their first record are known. A process
    that got the number later is younger than that record.
    """
    identity = identify(pid)
    if identity is None or identity.create_time > moment + _RECORD_TOLERANCE or not is_alive(identity):
        return None
    return identity


def _start_ticks(pid: int) -> int | None:
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses itself; the start time is field 22, the 20th behind it.
    fields = content.rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else None


def tree(root: ProcessIdentity) -> list[ProcessIdentity]:
    """`root` (if alive), its descendants, and what is left of the session that it leads, also when `root` is gone."""
    found: dict[int, ProcessIdentity] = {}
    if is_alive(root):
        found[root.pid] = root
        try:
            children = psutil.Process(root.pid).children(recursive=True)
        except psutil.Error:
            children = []
        pids = [child.pid for child in children]
    else:
        pids = []
    for pid in [*pids, *_session_members(root)]:
        identity = found.get(pid) or identify(pid)
        if identity is not None and is_alive(identity):
            found[pid] = identity
    return list(found.values())


def _session_members(leader: ProcessIdentity) -> list[int]:
    """Pids of the session that `leader` opened: they keep its number even after it has ended."""
    if os.name == "nt" or (leader.boot_id and leader.boot_id != boot_id()):
        return []
    current = identify(leader.pid)
    if current is not None and is_alive(current) and not is_alive(leader):
        return []  # the number belongs to somebody else now
    members = []
    for pid in psutil.pids():
        try:
            if pid != leader.pid and os.getsid(pid) == leader.pid:
                members.append(pid)
        except OSError:
            continue
    return members


def signal_all(processes: Iterable[ProcessIdentity], number: int) -> None:
    """Send a signal to each process that is still the same; ones that ended meanwhile are left out."""
    for identity in processes:
        if is_alive(identity):
            try:
                psutil.Process(identity.pid).send_signal(number)
            except psutil.NoSuchProcess:
                continue


def end_tree(root: ProcessIdentity, grace_seconds: float) -> int | None:
    """Ask the whole tree to end, wait `grace_seconds`, then end it by force. Returns the last signal that was sent.

    None means that nothing was left to signal. Grandchildren that ignore the request, and ones whose parents are gone,
    are ended too.
    """
    remaining = tree(root)
    if not remaining:
        return None
    known = {member.pid: member for member in remaining}
    signal_all(remaining, signal.SIGTERM)
    if _wait_gone(root, known, grace_seconds):
        return int(signal.SIGTERM)
    hard = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has one way only
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        signal_all(known.values(), hard)
        if _wait_gone(root, known, 0.2):
            break
    return int(hard)


def _wait_gone(root: ProcessIdentity, known: dict[int, ProcessIdentity], seconds: float) -> bool:
    """Wait until the tree is empty; processes that it starts meanwhile are added to `known`."""
    deadline = time.monotonic() + seconds
    while True:
        known.update({member.pid: member for member in tree(root)})
        if not any(is_alive(member) for member in known.values()):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
