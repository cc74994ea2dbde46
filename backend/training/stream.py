"""Reads the batches of one process ahead of the training, in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from backend.training.training_set import Batch, TrainingSet

_AHEAD_PER_WORKER = 2


class _Place(NamedTuple):
    """One batch of an epoch: its number, its items, and how many samples of the epoch come before it."""

    epoch: int
    number: int
    items: tuple[int, ...]
    first_slot: int


class BatchStream:
    """Gives one of several processes its share of an epoch's batches: batch b belongs to process b % count."""

    def __init__(
        self, training_set: TrainingSet, workers: int, persistent: bool = False, rank: int = 0, count: int = 1
    ) -> None:
        """Nothing is read yet.

        Args:
            workers: threads that read; each has at most two batches waiting. 0 reads when a batch is asked for.
            persistent: keep the threads over the end of an epoch, and let them begin the next one meanwhile.
        """
        self._set = training_set
        self._workers = workers
        self._persistent = persistent and workers > 0
        self._rank, self._count = rank, count
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[_Place, Future[Batch]]] = deque()

    def epoch(self, epoch: int, start_batch: int = 0) -> Generator[tuple[int, Batch]]:
        """The batches of `epoch` that belong to this process, from batch `start_batch` on, each with its number.

        An error while a batch is read is raised when that batch is due. Ending the iteration early drops what was read
        ahead; only one iteration may run at a time.

        Raises:
            UserError: as `TrainingSet.read`.
        """
        places = self._places(epoch, start_batch)
        if not self._workers:
            for place in places:
                yield place.number, self._read(place)
            return
        following = self._places(epoch + 1, 0) if self._persistent else iter(())
        finished = False
        try:
            yield from self._read_ahead(epoch, itertools.chain(places, following))
            finished = True
        finally:
            if not (self._persistent and finished):
                self._forget()
            if not self._persistent:
                self.close()

    def close(self) -> None:
        """End the threads; a batch that is being read is finished first. The stream can be used again afterwards."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _read_ahead(self, epoch: int, places: Iterator[_Place]) -> Iterator[tuple[int, Batch]]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="k5-batches")
        places = self._continue(places)
        while True:
            while len(self._ahead) < _AHEAD_PER_WORKER * self._workers:
                place = next(places, None)
                if place is None:
                    break
                self._ahead.append((place, self._pool.submit(self._read, place)))
            if not self._ahead or self._ahead[0][0].epoch != epoch:
                return
            place, future = self._ahead.popleft()
            yield place.number, future.result()

    def _continue(self, places: Iterator[_Place]) -> Iterator[_Place]:
        """What is still to be read of `places`; what was begun at the end of the last epoch is kept if it is that."""
        begun = [place for place, _ in self._ahead]
        wanted = list(itertools.islice(places, len(begun)))
        if begun == wanted:
            return places
        self._forget()
        return itertools.chain(wanted, places)

    def _forget(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _read(self, place: _Place) -> Batch:
        return self._set.read(place.items, place.first_slot)

    def _places(self, epoch: int, start_batch: int) -> Iterator[_Place]:
        first_slot = 0
        for number, items in enumerate(self._set.batches(epoch)):
            if number >= start_batch and number % self._count == self._rank:
                yield _Place(epoch, number, items, first_slot)
            first_slot += len(items)
