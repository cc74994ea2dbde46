"""Which items make which batch, how long that takes, and how batches are read ahead."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from backend.config.train import TrainOptions
from backend.data.epochs import Length, plan_length
from backend.errors import UserError
from backend.training.dataset import load_training_set
from backend.training.order import Group, epoch_batches
from backend.training.stream import BatchStream
from backend.training.training_set import TrainingSet
from tests.unit.training.training_folder import clips, stills, together, videos_are_texts

__all__ = ["videos_are_texts"]

T2V = TrainOptions(task="k5-demo-t2v")
GROUPS = (
    Group(0, (2, 6, 8), 4, 3, tuple(range(10))),
    Group(0, (3, 6, 8), 4, 3, (10, 11)),
    Group(1, (1, 6, 8), 1, 1, (12, 13, 14)),
)


def test_an_epoch_shows_every_item_as_often_as_it_should() -> None:
    batches = epoch_batches(GROUPS, 5, 0)
    shown = Counter(item for batch in batches for item in batch)
    assert shown == {**dict.fromkeys(range(12), 3), 12: 1, 13: 1, 14: 1}
    assert len(batches) == sum(group.batches for group in GROUPS) == 8 + 2 + 3
    for batch in batches:
        (group,) = {number for number, group in enumerate(GROUPS) for item in batch if item in group.items}
        assert len(batch) <= GROUPS[group].batch_size
    sizes = Counter(len(batch) for batch in batches if batch[0] < 10)
    assert sizes == {4: 7, 2: 1}, "30 samples: the last batch of a bucket is smaller"


def test_the_order_follows_from_seed_and_epoch() -> None:
    first = epoch_batches(GROUPS, 5, 0)
    assert first == epoch_batches(GROUPS, 5, 0)
    others = [epoch_batches(GROUPS, 5, 1), epoch_batches(GROUPS, 6, 0)]
    for other in others:
        assert other != first
        assert sorted(map(sorted, other)) != sorted(map(sorted, first)), "other items meet, too"
    kinds = [batch[0] < 10 for batch in first]
    assert kinds != sorted(kinds) != sorted(kinds, reverse=True), "buckets are mixed"
    # All of a bucket comes once before any of it comes again.
    single = epoch_batches([Group(0, (1, 1, 1), 5, 2, tuple(range(10)))], 0, 0)
    pairs = [set(one) | set(two) for one in single for two in single]
    assert set(range(10)) in pairs


def test_length_of_a_training() -> None:
    assert plan_length([(30, 4), (6, 4), (3, 1)], 1, 1, 100, None) == Length(13, 13, 100, 8)
    assert plan_length([(30, 4), (6, 4), (3, 1)], 2, 2, 100, None) == Length(13, 4, 100, 25)
    assert plan_length([(30, 4), (6, 4), (3, 1)], 2, 2, 100, 3) == Length(13, 4, 12, 3)
    assert plan_length([(1, 8)], 8, 8, 1, None) == Length(1, 1, 1, 1)
    assert plan_length([(0, 4)], 1, 1, 100, None) == plan_length([], 1, 1, 100, 3) == Length(0, 0, 0, 0)
    for bad in (([(1, 0)], 1, 1, 1, None), ([(1, 1)], 0, 1, 1, None), ([(1, 1)], 1, 1, 1, 0)):
        with pytest.raises(ValueError, match="positive"):
            plan_length(*bad)


def test_length_agrees_with_the_batches_themselves() -> None:
    """Random groups, processes and accumulation: counted by running through the epochs."""
    rolls = random.Random(3)
    for _ in range(40):
        groups, start = [], 0
        for number in range(rolls.randint(1, 4)):
            count = rolls.randint(1, 9)
            size, repeats = rolls.randint(1, 4), rolls.randint(1, 3)
            groups.append(Group(number, (1, 1, 1), size, repeats, tuple(range(start, start + count))))
            start += count
        processes, accumulation, total = rolls.randint(1, 3), rolls.randint(1, 4), rolls.randint(1, 30)
        found = plan_length([(g.shown, g.batch_size) for g in groups], processes, accumulation, total, None)
        steps = epochs = 0
        while steps < total:
            batches = len(epoch_batches(groups, 0, epochs))
            assert batches == found.batches_per_epoch
            taken = len(range(0, batches, processes * accumulation))
            assert taken == found.steps_per_epoch
            steps += taken
            epochs += 1
        assert epochs == found.epochs


@pytest.fixture
def training_set(tmp_path: Path, videos_are_texts: None) -> TrainingSet:
    """Eleven batches an epoch, of two datasets and three shapes."""
    facts = {**dict.fromkeys("abcde", "80 60 9 24"), **dict.fromkeys("fgh", "60 80 9 24")}
    video = clips(tmp_path / "v", facts, target_frames=[5], enable_bucket=True, batch_size=2, num_repeats=2)
    found = load_training_set(T2V, together(video, stills(tmp_path / "s", 3)), 7)
    assert found.batches_per_epoch == 11
    return found


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_come_in_order_whoever_reads_them(training_set: TrainingSet, workers: int, persistent: bool) -> None:
    stream = BatchStream(training_set, workers, persistent)
    for epoch, start in ((0, 0), (1, 0), (2, 0), (5, 4), (5, 4), (6, 2)):
        expected = training_set.batches(epoch)
        slots = [sum(map(len, expected[:number])) for number in range(len(expected))]
        found = list(stream.epoch(epoch, start))
        assert [number for number, _ in found] == list(range(start, 11))
        for number, batch in found:
            assert batch.names == tuple(training_set.items[item].name for item in expected[number])
            assert batch.first_slot == slots[number]
    stream.close()


def test_processes_share_an_epoch(training_set: TrainingSet) -> None:
    whole = {number: batch.names for number, batch in BatchStream(training_set, 0).epoch(0)}
    shares = [list(BatchStream(training_set, 1, False, rank, 3).epoch(0, 2)) for rank in range(3)]
    assert [[number for number, _ in share] for share in shares] == [[3, 6, 9], [4, 7, 10], [2, 5, 8]]
    for share in shares:
        assert all(whole[number] == batch.names for number, batch in share)


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("k5-batches")}


def test_persistent_threads_live_on_and_begin_the_next_epoch(training_set: TrainingSet) -> None:
    reads: list[tuple[int, ...]] = []
    original = training_set.read

    def counted(numbers, first_slot=0):
        reads.append(tuple(numbers))
        return original(numbers, first_slot)

    training_set.read = counted  # type: ignore[method-assign]
    passing, lasting = BatchStream(training_set, 2, False), BatchStream(training_set, 2, True)
    list(passing.epoch(0))
    assert not _threads()
    assert len(reads) == 11
    reads.clear()
    list(lasting.epoch(0))
    kept = _threads()
    assert 1 <= len(kept) <= 2
    list(lasting.epoch(1))
    assert _threads() >= kept, "the same threads, not new ones"
    lasting.close()
    assert not _threads()
    # Both epochs whole, each batch read once; of the third at most what may wait.
    expected = [*training_set.batches(0), *training_set.batches(1)]
    assert Counter(reads) >= Counter(expected)
    assert 22 <= len(reads) <= 22 + 4


def test_reading_ahead_is_bounded(training_set: TrainingSet) -> None:
    reads: list[int] = []
    original, enough = training_set.read, threading.Event()

    def counted(numbers, first_slot=0):
        reads.append(first_slot)
        if len(reads) >= 4:
            enough.set()
        return original(numbers, first_slot)

    training_set.read = counted  # type: ignore[method-assign]
    stream = BatchStream(training_set, 2)
    batches = stream.epoch(0)
    next(batches)
    # The one that is given and three behind it; no other is begun however long nobody asks.
    assert enough.wait(30)
    time.sleep(0.2)
    assert len(reads) == 4
    batches.close()
    assert not _threads(), "ending early ends the threads"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_when_its_batch_is_due(training_set: TrainingSet, workers: int) -> None:
    broken = training_set.batches(0)[6][0]
    path = training_set.items[broken].latent_path
    whole = path.read_bytes()
    path.write_bytes(b"damaged")
    stream = BatchStream(training_set, workers, True)
    # Items are repeated: it is due at the first batch that holds it.
    due = next(number for number, items in enumerate(training_set.batches(0)) if broken in items)
    seen = []
    with pytest.raises(UserError, match=path.name):
        for number, _ in stream.epoch(0):
            seen.append(number)
    assert seen == list(range(due))
    # Repaired, the same stream goes on from there.
    path.write_bytes(whole)
    assert [number for number, _ in stream.epoch(0, due)] == list(range(due, 11))
    stream.close()
