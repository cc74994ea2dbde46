"""Requests of the page and signals: each is found, answered once, and none comes back from an earlier run."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from backend.jobs import runner
from backend.jobs.facts import read_facts
from backend.progress import Reporter
from backend.training.requests import Requests


class Records:
    """A journal in memory."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []

    def emit(self, type: str, /, **fields: Any) -> int:
        self.records.append((type, fields))
        return len(self.records)


@pytest.fixture
def journal() -> Records:
    return Records()


@pytest.fixture
def requests(tmp_path: Path, journal: Records) -> Requests:
    return Requests(tmp_path, Reporter(journal, tmp_path))


def ask(folder: Path, name: str) -> None:
    """What the app writes."""
    runner._write_request(folder / "requests" / name)


def test_nothing_is_asked_in_an_empty_folder_or_without_one(requests: Requests, journal: Records) -> None:
    assert requests.poll() == set()
    assert Requests(None, Reporter(journal)).poll() == set()


@pytest.mark.parametrize("name", sorted(runner.REQUESTS))
def test_whatever_the_app_can_ask_for_is_found_and_answered_once(
    name: Any, requests: Requests, journal: Records, tmp_path: Path
) -> None:
    ask(tmp_path, name)
    assert requests.poll() == {name}
    assert requests.poll() == {name}, "until it is answered"
    requests.answered(name, step=12)
    requests.answered(name, step=13)
    assert requests.poll() == set()
    assert journal.records == [("request_done", {"request": name, "step": 12})]


@pytest.mark.parametrize("name", ["save", "sample"])
def test_save_and_sample_can_be_asked_again(name: Any, requests: Requests, journal: Records, tmp_path: Path) -> None:
    for step in range(3):
        ask(tmp_path, name)
        assert requests.poll() == {name}
        requests.answered(name, step=step)
        assert not (tmp_path / "requests" / name).exists()
    assert [fields["step"] for _, fields in journal.records] == [0, 1, 2]
    assert len(os.listdir(tmp_path / "requests" / "done")) == 3
    assert read_facts(tmp_path).requests == frozenset(), "the folder of what was answered is no request"


def test_what_is_asked_while_it_is_being_done_is_not_lost(requests: Requests, tmp_path: Path) -> None:
    ask(tmp_path, "save")
    assert requests.poll() == {"save"}
    ask(tmp_path, "save")
    requests.answered("save")
    assert requests.poll() == {"save"}


def test_a_stop_stays_in_the_folder_so_that_the_page_shows_it(requests: Requests, tmp_path: Path) -> None:
    ask(tmp_path, "stop")
    requests.poll()
    requests.answered("stop")
    assert "stop" in read_facts(tmp_path).requests


def test_an_answered_stop_does_not_end_the_next_run_in_this_folder(tmp_path: Path, journal: Records) -> None:
    reporter = Reporter(journal, tmp_path)
    ask(tmp_path, "stop_and_save")
    with Requests(tmp_path, reporter) as first:
        first.poll()
        first.answered("stop_and_save")
    with Requests(tmp_path, reporter) as second:
        assert second.poll() == set()
        assert read_facts(tmp_path).requests == frozenset(), "else the page shows the new run as stopping"
        ask(tmp_path, "stop_and_save")
        assert second.poll() == {"stop_and_save"}


def test_a_stop_that_nobody_answered_is_still_asked_for(tmp_path: Path, journal: Records) -> None:
    """It may have come while the program was loading."""
    ask(tmp_path, "stop")
    with Requests(tmp_path, Reporter(journal)) as requests:
        assert requests.poll() == {"stop"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"id": "../../x"}', b'{"id": 5}'])
def test_a_request_made_by_hand_counts(content: bytes, requests: Requests, tmp_path: Path) -> None:
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "save").write_bytes(content)
    assert requests.poll() == {"save"}
    requests.answered("save")
    assert requests.poll() == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requests"]


def test_other_files_are_no_requests(requests: Requests, tmp_path: Path) -> None:
    (tmp_path / "requests").mkdir()
    for name in ("kill", ".save.1234.tmp", "saves", "done"):
        (tmp_path / "requests" / name).write_text("{}")
    assert requests.poll() == set()


def test_a_folder_that_cannot_be_written_is_asked_once_all_the_same(
    requests: Requests, journal: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path, "sample")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert requests.poll() == {"sample"}
    requests.answered("sample")
    assert (tmp_path / "requests" / "sample").exists()
    assert requests.poll() == set()
    assert len(journal.records) == 1


def test_answering_what_nobody_asked_writes_nothing(requests: Requests, journal: Records) -> None:
    requests.answered("save")
    requests.answered("stop_and_save")
    assert journal.records == []


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_means_save_and_end(number: int, requests: Requests, journal: Records) -> None:
    with requests:
        assert requests.poll() == set()
        os.kill(os.getpid(), number)
        assert requests.poll() == {"stop_and_save"}
        requests.answered("stop_and_save", step=3)
        assert requests.poll() == set()
    assert journal.records == [("request_done", {"request": "stop_and_save", "step": 3})]


def test_a_second_ctrl_c_ends_at_once_but_a_second_term_does_not(requests: Requests) -> None:
    with requests:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.poll() == {"stop_and_save"}
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_before_are_put_back(requests: Requests) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), requests:
        assert signal.getsignal(signal.SIGTERM) != before[1]
        1 / 0  # noqa: B018
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_changes_no_signals(requests: Requests) -> None:
    seen: list[Any] = []

    def inside() -> None:
        with requests:
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
