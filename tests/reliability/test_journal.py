"""The journal under kills, cuts, damage and full disks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from backend.errors import UserError
from backend.events import Journal, encode_record, read_events
from tests.conftest import REPOSITORY

MANY = pytest.mark.torture


def run_script(*arguments: str, timeout: float = 280) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("trials", [50, pytest.param(300, marks=MANY)])
def test_no_acknowledged_record_is_lost_by_a_kill(tmp_path: Path, trials: int) -> None:
    """A buffered file lost records in a tenth of such kills."""
    script = REPOSITORY / "tests" / "reliability" / "journal_writer.py"
    report = json.loads(run_script(str(script), str(tmp_path), str(trials), "11"))
    print(f"\n{report}")
    assert report["kills"] >= trials
    assert report["acknowledged"] > trials
    assert (report["lost"], report["duplicates"], report["gaps"]) == (0, 0, 0)


def journal_bytes(records: int) -> bytes:
    kinds = ("started", "step", "warning", "sample")
    return b"".join(
        encode_record(seq, 1000.0 + seq, kinds[seq % 4], {"message": "ж\n\"'\\ " * (seq % 3), "step": seq})
        for seq in range(1, records + 1)
    )


@pytest.mark.parametrize("records", [8, pytest.param(60, marks=MANY)])
def test_a_tail_that_is_cut_anywhere_costs_only_the_torn_record(tmp_path: Path, records: int) -> None:
    path, whole = tmp_path / "events.jsonl", journal_bytes(records)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert [record["seq"] for record in read_events(path).records] == list(range(1, kept + 1))
        with Journal(path) as journal:
            assert journal.emit("step", again=True) == kept + 1
        page = read_events(path)
        assert [record["seq"] for record in page.records] == list(range(1, kept + 2))
        assert page.records[-1]["again"]
        assert not page.gap


def damage(content: bytes, generator: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(generator.randint(1, 6)):
        place = generator.randrange(len(data) + 1)
        length = generator.choice((1, 1, 3, 40, 500))
        noise = bytes(generator.choice((0, 10, 34, 92, 123, 128, 255, generator.randrange(256))) for _ in range(length))
        kind = generator.randrange(4)
        if kind == 0:
            data[place : place + length] = noise
        elif kind == 1:
            data[place:place] = noise
        elif kind == 2:
            del data[place : place + length]
        else:
            data[place:place] = data[max(0, place - length) : place]
    return bytes(data)


@pytest.mark.parametrize("trials", [300, pytest.param(3000, marks=MANY)])
def test_random_damage_never_raises_and_what_is_written_after_it_is_read(tmp_path: Path, trials: int) -> None:
    path, whole, generator = tmp_path / "events.jsonl", journal_bytes(20), random.Random(5)
    intact = set(whole.splitlines())
    for _ in range(trials):
        damaged = damage(whole, generator)
        path.write_bytes(damaged)
        page = read_events(path)
        survivors = {line for line in damaged[: damaged.rfind(b"\n") + 1].split(b"\n") if line in intact}
        assert {json.loads(line)["seq"] for line in survivors} <= {record["seq"] for record in page.records}
        with Journal(path) as journal:
            seq = journal.emit("finished", outputs=["after"])
        again = read_events(path)
        assert again.records[:-1] == page.records
        assert again.records[-1]["seq"] == seq
        assert again.records[-1]["outputs"] == ["after"]


FULL_DISK = """
import json, resource, sys
from backend.events import Journal, read_events
path, limit = sys.argv[1], int(sys.argv[2])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
with Journal(path) as journal:
    told = [journal.emit("step", message="x" * (n % 90)) for n in range(60) if not journal.degraded]
    reached = journal.degraded
    whole = open(path, "rb").read()
    assert len(whole) <= limit and (not whole or whole.endswith(b"\\n"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.emit("finished")
    assert not journal.degraded
page = read_events(path)
assert [r["seq"] for r in page.records] == list(range(1, len(told) + 2)) and not page.gap
print(json.dumps(reached))
"""


@pytest.mark.parametrize("limits", [range(500, 520, 4), pytest.param(range(500, 560), marks=MANY)])
def test_a_real_file_size_limit_acts_like_a_full_disk_and_loses_nothing(tmp_path: Path, limits: range) -> None:
    for limit in limits:
        reached = run_script("-c", FULL_DISK, str(tmp_path / f"{limit}.jsonl"), str(limit))
        assert json.loads(reached) is True


def test_two_processes_cannot_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = "import sys; from backend.events import Journal\n"
    code += "with Journal(sys.argv[1]) as journal: print(journal.emit('step'), flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="Another process"):
            Journal(path)
        writer.kill()
    with Journal(path) as journal:
        assert journal.emit("step") == 2
