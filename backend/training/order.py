"""The order of an epoch: which items make which batch, from seed and epoch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from backend.training.draws import generator


class Group(NamedTuple):
    """The items of one dataset whose latents have the same shape; only they share batches.

    `shape` is [F, H, W] of the latents; `items` are numbers of items; each is shown `repeats` times in an epoch.
    """

    dataset: int
    shape: tuple[int, int, int]
    batch_size: int
    repeats: int
    items: tuple[int, ...]

    @property
    def shown(self) -> int:
        """How many samples of it an epoch has."""
        return len(self.items) * self.repeats

    @property
    def batches(self) -> int:
        """How many batches of it an epoch has; the last one may be smaller."""
        return -(-self.shown // self.batch_size)


def epoch_batches(groups: Sequence[Group], seed: int, epoch: int) -> list[tuple[int, ...]]:
    """All batches of epoch `epoch` (from 0) in the order in which they are trained, as numbers of items.

    Every item of a group is shown once before any of it is shown again; then the batches of all groups are mixed.
    """
    batches: list[tuple[int, ...]] = []
    for number, group in enumerate(groups):
        random = generator(seed, epoch, number, "items")
        order: list[int] = []
        for _ in range(group.repeats):
            order += [group.items[place] for place in torch.randperm(len(group.items), generator=random).tolist()]
        batches += [tuple(order[start : start + group.batch_size]) for start in range(0, len(order), group.batch_size)]
    mixed = torch.randperm(len(batches), generator=generator(seed, epoch, 0, "batches")).tolist()
    return [batches[place] for place in mixed]
