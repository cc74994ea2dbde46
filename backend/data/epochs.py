"""The arithmetic of epochs, batches and steps, for the trainer and for the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Length(NamedTuple):
    """How long a training is; all zero when there is nothing to train on.

    Attributes:
        batches_per_epoch: over all processes.
        steps_per_epoch: optimizer steps; the last one of an epoch may have fewer batches.
        total_steps: optimizer steps in all.
        epochs: passes over the dataset, a last one that is not finished included.
    """

    batches_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    epochs: int


def plan_length(
    groups: Iterable[tuple[int, int]],
    processes: int,
    accumulation: int,
    max_train_steps: int,
    max_train_epochs: int | None,
) -> Length:
    """Count batches and steps.

    Args:
        groups: for every bucket of every dataset its items times repeats, and the size of its batches. The last batch
            of a bucket may be smaller; batches never mix buckets or datasets.
        processes: that train together; each step takes `accumulation` batches of each.
        max_train_steps: optimizer steps, unless `max_train_epochs` is given.

    Raises:
        ValueError: a count is not positive.
    """
    pairs = [(count, size) for count, size in groups if count]
    counts = (processes, accumulation, max_train_steps, *([] if max_train_epochs is None else [max_train_epochs]))
    if min(counts) < 1 or any(count < 0 or size < 1 for count, size in pairs):
        raise ValueError("Items, batch sizes, processes, accumulation, steps and epochs are positive.")
    batches = sum(-(-count // size) for count, size in pairs)
    if not batches:
        return Length(0, 0, 0, 0)
    steps = -(-batches // (processes * accumulation))
    total = max_train_steps if max_train_epochs is None else steps * max_train_epochs
    return Length(batches, steps, total, -(-total // steps))
