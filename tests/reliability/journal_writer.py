"""Kill journal writers at random moments: fork one, let it count what `emit` has acknowledged, SIGKILL it, look.

Run as `python journal_writer.py FOLDER TRIALS SEED`; prints one JSON object. A process of its own, because it forks.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

from backend.events import Journal, read_events

ROUNDS = 2  # each file is written by several attempts, one after another
KINDS = ("step", "progress", "step", "heartbeat", "step", "warning")


def write_until_killed(path: Path, acknowledged: mmap.mmap, text: str) -> None:
    """Never returns."""
    journal = Journal(path)
    count = 0
    while True:
        count += 1
        kind = "sample" if count % 200 == 0 else KINDS[count % len(KINDS)]
        seq = journal.emit(kind, message=text[: count % len(text)], step=count)
        if journal.degraded:
            os._exit(9)
        acknowledged[:8] = struct.pack("<q", seq)


def kill_one(path: Path, generator: random.Random) -> int:
    """The number of the last record that a writer had been told is written when it was killed."""
    acknowledged = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        try:
            write_until_killed(path, acknowledged, "щука и lynx " * 40)
        finally:
            os._exit(1)
    time.sleep(generator.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the writer ended by itself: {status}"
    return struct.unpack("<q", acknowledged[:8])[0]


def read_all(path: Path) -> tuple[list[int], bool]:
    numbers, gap, offset, last = [], False, 0, None
    while True:
        page = read_events(path, offset, last_seq=last)
        numbers += [record["seq"] for record in page.records]
        gap, offset, last = gap or page.gap, page.offset, page.last_seq
        if not page.more:
            return numbers, gap


def main() -> None:
    folder, trials, generator = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    report = {"kills": 0, "acknowledged": 0, "lost": 0, "duplicates": 0, "gaps": 0, "torn": 0}
    for trial in range(trials):
        path = folder / f"{trial}.jsonl"
        before = 0
        for _ in range(ROUNDS if trial % 2 else 1):
            acknowledged = max(kill_one(path, generator), before)
            numbers, gap = read_all(path)
            report["kills"] += 1
            report["acknowledged"] += acknowledged - before
            report["lost"] += len(set(range(1, acknowledged + 1)) - set(numbers))
            report["duplicates"] += len(numbers) - len(set(numbers))
            report["gaps"] += gap
            report["torn"] += path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            before = max(numbers, default=0)
        with Journal(path) as journal:
            assert journal.emit("finished") == before + 1
        numbers, gap = read_all(path)
        assert numbers == list(range(1, before + 2))
        assert not gap
        path.unlink()
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
