"""Reading ahead within bounds, writing behind with one failure, and the share of one of several processes."""

from __future__ import annotations

import threading
import time

import pytest

from backend.caching.reading_ahead import ReadAhead
from backend.caching.share import Share
from backend.caching.writing import WriteBehind
from backend.errors import Stopped, UserError


def test_everything_is_read_once_and_errors_stay_with_their_job() -> None:
    def read(job: int) -> int:
        if job % 7 == 3:
            raise UserError(f"job {job}")
        return job * job

    with ReadAhead(range(50), read, lambda _: 1, workers=4, limit_bytes=1000) as ahead:
        found = dict(ahead)
    assert sorted(found) == list(range(50))
    for job, result in found.items():
        assert (str(result) == f"job {job}") if job % 7 == 3 else result == job * job


@pytest.mark.parametrize(("limit", "most"), [(100, 10), (25, 2), (1, 1), (10_000, 12)])
def test_memory_is_bounded(limit: int, most: int) -> None:
    """Ten bytes a job: by bytes, by the count of four a worker; a job that is larger than the limit goes alone."""
    guard, live, peak = threading.Lock(), 0, 0

    def read(job: int) -> int:
        nonlocal live, peak
        with guard:
            live += 1
            peak = max(peak, live)
        return job

    with ReadAhead(range(40), read, lambda _: 10, workers=3, limit_bytes=limit) as ahead:
        time.sleep(0.3)
        assert peak == most
        for _ in ahead:
            with guard:
                live -= 1
            time.sleep(0.002)
    # The one that was just handed out is counted until it is used.
    assert peak <= most + 1


def test_closing_early_ends_the_threads() -> None:
    free = threading.Event()

    def read(job: int) -> int:
        free.wait(10)
        return job

    began = time.perf_counter()
    with ReadAhead(range(9), read, lambda _: 1, workers=2, limit_bytes=9, stopper=free.set):
        pass
    assert time.perf_counter() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_a_stop_is_noticed_while_nothing_is_ready() -> None:
    free = threading.Event()

    def stop() -> None:
        raise Stopped("asked")

    ahead = ReadAhead(
        [1], lambda _: free.wait(10), lambda _: 1, workers=1, limit_bytes=9, stopper=free.set, waiting=stop
    )
    with ahead, pytest.raises(Stopped, match="asked"):
        list(ahead)


def test_writes_happen_in_order_elsewhere() -> None:
    done: list[tuple[int, str]] = []
    writer = WriteBehind()
    for number in range(40):
        writer.put(lambda number=number: done.append((number, threading.current_thread().name)))
    writer.finish()
    writer.finish()
    assert done == [(number, "write-behind") for number in range(40)]


def test_the_first_failure_ends_the_writing() -> None:
    done: list[int] = []

    def write(number: int) -> None:
        if number == 2:
            raise UserError("No space is left.")
        done.append(number)

    writer = WriteBehind()
    with pytest.raises(UserError, match="No space"):
        for number in range(1000):
            writer.put(lambda number=number: write(number))
    with pytest.raises(UserError, match="No space"):
        writer.finish()
    assert done == [0, 1]


def test_shares_cover_everything_once() -> None:
    groups = list(range(17))
    for count in (1, 2, 3, 8, 20):
        shares = [Share(rank, count).take(groups) for rank in range(count)]
        assert sorted(group for share in shares for group in share) == groups
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_share_of_this_process() -> None:
    assert Share.of_process({}) == Share(0, 1, 0, 1, False)
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "true"}
    assert Share.of_process(given) == Share(5, 8, 1, 4, True)
    assert not Share.of_process(given).first
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"RANK": "-1"}):
        with pytest.raises(UserError, match="RANK"):
            Share.of_process(wrong)
