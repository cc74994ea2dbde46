"""The journal's promises: whole lines, growing numbers, nothing that a reader or an engine could stumble over."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from pathlib import Path

import pytest

from backend import events
from backend.errors import UserError
from backend.events import (
    DURABLE_TYPES,
    MAX_TEXT,
    MAX_WAITING_RECORDS,
    Heartbeat,
    Journal,
    NullJournal,
    encode_record,
    read_events,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def sequence(path: Path) -> list[int]:
    return [record["seq"] for record in read_events(path).records]


def test_a_record_is_one_line_with_version_number_time_and_type(path: Path) -> None:
    before = time.time()
    with Journal(path) as journal:
        assert journal.emit("step", step=3, total=5) == 1
        assert journal.emit("finished", outputs=["outputs/a.mp4"]) == 2
        assert not journal.degraded
    lines = path.read_text("utf-8").splitlines()
    first = json.loads(lines[0])
    assert {k: first[k] for k in ("v", "seq", "type", "step", "total")} == {
        "v": 1, "seq": 1, "type": "step", "step": 3, "total": 5,
    }  # fmt: skip
    assert before - 0.01 <= first["t"] <= time.time() + 0.01
    assert len(lines) == 2


def test_each_record_is_one_write_to_an_append_descriptor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffered file lost acknowledged records in a tenth of the kills that were tried; one write a line lost none."""
    written: list[bytes] = []
    real = os.write

    def spy(descriptor: int, data: bytes) -> int:
        written.append(data)
        return real(descriptor, data)

    with Journal(path) as journal:
        monkeypatch.setattr(os, "write", spy)
        journal.emit("step", step=1)
        journal.emit("step", step=2)
        monkeypatch.undo()
        import fcntl

        assert fcntl.fcntl(journal._descriptor, fcntl.F_GETFL) & os.O_APPEND
    assert [data.count(b"\n") for data in written] == [1, 1]
    assert all(data.endswith(b"\n") for data in written)


def test_only_durable_records_are_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    with Journal(path) as journal:
        for kind in ("started", "phase", "step", "heartbeat", *sorted(DURABLE_TYPES)):
            monkeypatch.setattr(os, "fsync", lambda _, kind=kind: synced.append(kind))
            journal.emit(kind)
        monkeypatch.undo()
    assert synced == sorted(DURABLE_TYPES)
    assert {"checkpoint", "error", "stopped", "finished", "sample"} == DURABLE_TYPES


def test_nan_and_infinity_become_null_and_are_named(path: Path) -> None:
    with Journal(path) as journal:
        journal.emit(
            "step", loss=math.nan, rate=math.inf, nested={"grad": -math.inf, "fine": 1.5}, rows=[1.0, math.nan]
        )
    record = read_events(path).records[0]
    assert record["loss"] is None
    assert record["nested"] == {"grad": None, "fine": 1.5}
    assert record["rows"] == [1.0, None]
    assert record["nonfinite"] == ["loss", "rate", "nested.grad", "rows"]
    assert b"NaN" not in path.read_bytes()


def test_text_is_cut_and_odd_values_are_written_as_text(path: Path) -> None:
    with Journal(path) as journal:
        journal.emit("warning", message="я" * 5000, where=Path("outputs") / "a.mp4", problems=[{"message": "x" * 3000}])
        journal.emit(
            "warning", message="half \udc80 a name", big=1 << 80, odd=object, pair=(1, "2"), flag=True, no=None
        )
    first, second = read_events(path).records
    assert len(first["message"]) == MAX_TEXT
    assert first["message"].endswith("я…")
    assert first["where"] == "outputs/a.mp4"
    assert len(first["problems"][0]["message"]) == MAX_TEXT
    assert second["message"] == "half \\udc80 a name"
    assert second["big"] == str(1 << 80)
    assert second["pair"] == [1, "2"]
    assert second["flag"] is True
    assert second["no"] is None
    json.dumps(second, ensure_ascii=False).encode("utf-8")


def test_a_record_never_outgrows_its_limit() -> None:
    line = encode_record(1, 2.0, "progress", {"rows": ["y" * 1000] * 1000, "message": "kept"})
    assert len(line) < events.MAX_RECORD_BYTES
    assert json.loads(line)["dropped"] == ["rows"]
    assert json.loads(line)["message"] == "kept"


@pytest.mark.parametrize("name", ["v", "seq", "t"])
def test_reserved_names_are_refused(path: Path, name: str) -> None:
    with Journal(path) as journal, pytest.raises(ValueError, match="may not be called"):
        journal.emit("step", **{name: 1})


def test_a_second_writer_is_refused_and_may_write_after_the_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_LOCK_WAIT_SECONDS", 0.05)
    with Journal(path) as journal:
        journal.emit("started")
        with pytest.raises(UserError, match="Another process is writing"):
            Journal(path)
        journal.emit("step")
    with Journal(path) as journal:
        assert journal.emit("step") == 3
    assert sequence(path) == [1, 2, 3]


def test_a_journal_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        Journal(tmp_path / "missing" / "events.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        Journal(tmp_path / "folder")


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("no newline here")
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError):
        Journal(tmp_path / "events.jsonl")
    assert (tmp_path / "precious").read_text() == "no newline here"


def test_numbers_go_on_after_damaged_lines_so_that_the_gap_shows(path: Path) -> None:
    with Journal(path) as journal:
        for step in range(4):
            journal.emit("step", step=step)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + b"{damage\n" + b"\xff\xfe\n" + b"torn")
    with Journal(path) as journal:
        assert journal.emit("step") == 5
    page = read_events(path)
    assert [record["seq"] for record in page.records] == [1, 2, 5]
    assert page.gap


def test_last_number_is_found_across_read_blocks(path: Path) -> None:
    with Journal(path) as journal:
        for _ in range(40):
            journal.emit("warning", rows=["z" * 1900] * 40)
        size = path.stat().st_size
        path.write_bytes(path.read_bytes() + b"x" * 200_000)
    assert size > 40 * 70_000
    with Journal(path) as journal:
        assert path.stat().st_size == size
        assert journal.emit("step") == 41


class FullDisk:
    """`os.write` that accepts only so many more bytes and then behaves as a full disk does: a part, then ENOSPC."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.real = os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.real(descriptor, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", range(0, 240, 7))
def test_a_full_disk_never_raises_loses_nothing_and_leaves_no_torn_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """The record that did not fit is cut away again; sealing it with a newline would bring it back as a duplicate."""
    with Journal(path) as journal:
        disk = FullDisk(room)
        monkeypatch.setattr(os, "write", disk)
        for step in range(8):
            journal.emit("step", step=step)
        assert journal.degraded
        assert "space" in (journal.problem or "").lower()
        assert not path.stat().st_size or path.read_bytes().endswith(b"\n")
        disk.room = 1 << 20
        journal.emit("finished")
        assert not journal.degraded
        assert journal.problem is None
        monkeypatch.undo()
    page = read_events(path)
    assert [record["seq"] for record in page.records] == list(range(1, 10))
    assert not page.gap


def test_a_cut_that_fails_is_made_up_for_before_the_next_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(path) as journal:
        journal.emit("step")
        disk = FullDisk(10)
        monkeypatch.setattr(os, "write", disk)

        def broken(*_: object) -> None:
            raise OSError(errno.EIO, "no")

        monkeypatch.setattr(os, "ftruncate", broken)
        journal.emit("step")
        assert not path.read_bytes().endswith(b"\n")
        monkeypatch.undo()
        journal.emit("step")
    assert sequence(path) == [1, 2, 3]


def test_only_the_last_thousand_records_wait_and_the_gap_shows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(path) as journal:
        monkeypatch.setattr(os, "write", FullDisk(0))
        for step in range(MAX_WAITING_RECORDS + 500):
            journal.emit("step", step=step)
        monkeypatch.undo()
        journal.emit("finished")
    page = read_events(path)
    assert len(page.records) == MAX_WAITING_RECORDS
    assert page.records[-1]["type"] == "finished"
    assert page.gap


def test_a_failed_sync_is_visible_and_made_up_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    with Journal(path) as journal:
        monkeypatch.setattr(os, "fsync", broken)
        journal.emit("sample", path="outputs/a.png")
        assert journal.degraded
        monkeypatch.undo()
        journal.emit("step")
        assert not journal.degraded
    assert sequence(path) == [1, 2]


def test_a_deleted_folder_does_not_stop_the_engine_and_a_new_one_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with Journal(folder / "events.jsonl") as journal:
        journal.emit("step")
        (folder / "events.jsonl").unlink()
        folder.rmdir()
        assert journal.emit("step") == 2
        assert journal.degraded
        folder.mkdir()
        assert journal.emit("step") == 3
        assert not journal.degraded
    assert sequence(folder / "events.jsonl") == [2, 3]


def test_threads_share_a_journal(path: Path) -> None:
    with Journal(path) as journal:
        threads = [threading.Thread(target=lambda: [journal.emit("step") for _ in range(200)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sequence(path) == list(range(1, 801))


def test_a_closed_journal_refuses_and_closes_twice(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.emit("step")


def test_heartbeats_come_and_end(path: Path) -> None:
    with Journal(path) as journal:
        with Heartbeat(journal, 0.01) as heartbeat:
            deadline = time.monotonic() + 5
            while len(sequence(path)) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        heartbeat.stop()
        count = len(sequence(path))
        time.sleep(0.05)
        assert len(sequence(path)) == count >= 3
    assert {record["type"] for record in read_events(path).records} == {"heartbeat"}


def test_the_null_journal_takes_everything() -> None:
    with NullJournal() as journal:
        assert journal.emit("step", step=1) == 0
        assert not journal.degraded


# --- the reader ---------------------------------------------------------------------------------------------------


def test_reading_goes_on_from_an_offset_and_waits_for_whole_lines(path: Path) -> None:
    path.write_bytes(encode_record(1, 1.0, "step", {}) + encode_record(2, 1.0, "step", {})[:-5])
    page = read_events(path)
    assert [record["seq"] for record in page.records] == [1]
    path.write_bytes(encode_record(1, 1.0, "step", {}) + encode_record(2, 1.0, "step", {}))
    page = read_events(path, page.offset, last_seq=page.last_seq)
    assert [record["seq"] for record in page.records] == [2]
    assert not page.gap
    assert page.offset == path.stat().st_size
    assert read_events(path, page.offset, last_seq=page.last_seq).records == []


@pytest.mark.parametrize("max_bytes", [1, 20, 64, 100, 200, 1000])
def test_small_pages_give_the_same_records(path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int) -> None:
    monkeypatch.setattr(events, "MAX_RECORD_BYTES", 1)
    with Journal(path) as journal:
        for step in range(50):
            journal.emit("step", step=step)
    largest = max(len(line) for line in path.read_bytes().splitlines(keepends=True))
    found, page = [], events.EventPage()
    for _ in range(10_000):
        page = read_events(path, page.offset, last_seq=page.last_seq, max_bytes=max_bytes)
        found += page.records
        if page.offset == path.stat().st_size:
            break
    assert page.offset == path.stat().st_size
    if max_bytes >= largest:
        assert [record["seq"] for record in found] == list(range(1, 51))
        assert not page.gap


def test_a_reader_that_asks_for_little_still_gets_large_records(path: Path) -> None:
    with Journal(path) as journal:
        journal.emit("warning", rows=["z" * 1900] * 60)
        journal.emit("step")
    page = read_events(path, max_bytes=1000)
    assert [record["seq"] for record in page.records] == [1, 2]
    assert not page.gap


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"[]", b"null", b"17", b'"text"', b"\x00\x01", b"\xff" * 40, b"{}", b"[" * 100_000,
        b'{"seq":1,"t":1}', b'{"seq":true,"t":1,"type":"step"}', b'{"seq":"2","t":1,"type":"step"}',
        b'{"seq":2,"t":"now","type":"step"}', b'{"seq":2,"t":NaN,"type":"step"}', b'{"seq":2,"t":1e999,"type":"step"}',
        b'{"seq":2,"t":1,"type":5}',
        b'{"seq":2,"t":1' + b"0" * 400 + b',"type":"step"}',
        b'{"seq":2,"t":-1,"type":"step"}', b'{"seq":-2,"t":1,"type":"step"}',
        b'{"seq":' + b"9" * 5000 + b',"t":1,"type":"step"}',
    ],
)  # fmt: skip
def test_lines_that_are_no_records_are_skipped(path: Path, line: bytes) -> None:
    path.write_bytes(encode_record(1, 1.0, "step", {}) + line + b"\n" + encode_record(2, 1.0, "step", {}))
    page = read_events(path)
    assert [record["seq"] for record in page.records] == [1, 2]
    assert page.gap == bool(line)


def test_foreign_numbers_and_half_characters_cannot_reach_a_page(path: Path) -> None:
    path.write_bytes(b'{"seq":1,"t":1,"type":"step","loss":1e999,"rate":NaN,"name":"\\ud800x"}\n')
    record = read_events(path).records[0]
    assert record["loss"] is None
    assert record["rate"] is None
    json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")


def test_gaps_show_within_a_page_and_between_pages(path: Path) -> None:
    lines = [encode_record(number, 1.0, "step", {}) for number in (1, 2, 4, 5)]
    path.write_bytes(b"".join(lines))
    assert read_events(path).gap
    offset = len(lines[0]) + len(lines[1])
    assert read_events(path, offset, last_seq=2).gap
    assert not read_events(path, offset).gap
    path.write_bytes(b"".join(lines[1:2]))
    assert read_events(path).gap


def test_a_replaced_file_is_read_from_its_start(path: Path) -> None:
    path.write_bytes(encode_record(1, 1.0, "step", {}))
    page = read_events(path, 10_000, last_seq=80)
    assert page.restarted
    assert [record["seq"] for record in page.records] == [1]
    assert not page.gap


def test_missing_files_and_folders_are_empty_pages(tmp_path: Path) -> None:
    for name in ("missing", ".", "nul\0byte"):
        page = read_events(tmp_path / name, 5)
        assert page.records == []
        assert page.offset == 5


def test_a_page_is_bounded_and_a_line_without_end_does_not_hold_it_up(path: Path) -> None:
    path.write_bytes(b"x" * (3 << 20) + b"\n" + encode_record(1, 1.0, "step", {}))
    page, calls, gap = events.EventPage(), 0, False
    while not page.records and calls < 10:
        page = read_events(path, page.offset, last_seq=page.last_seq, max_bytes=1 << 20)
        calls, gap = calls + 1, gap or page.gap
        assert page.more == (not page.records)
    assert [record["seq"] for record in page.records] == [1]
    assert gap
    assert calls <= 4
