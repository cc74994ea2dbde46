"""Which part of the work this process does when several were started together (`accelerate launch`, torchrun)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from backend.errors import UserError

T = TypeVar("T")
_TRUE = ("1", "true", "yes", "on")


class Share(NamedTuple):
    """Process `rank` (from 0) of `count`, `local_rank` of `local_count` on this machine; `cpu_only`: without GPU."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    cpu_only: bool = False

    @classmethod
    def of_process(cls, environment: Mapping[str, str] | None = None) -> Share:
        """What RANK, WORLD_SIZE and LOCAL_RANK say; a process that was started alone does everything.

        Raises:
            UserError: these variables contradict each other.
        """
        values = os.environ if environment is None else environment
        try:
            rank, count = int(values.get("RANK", 0)), int(values.get("WORLD_SIZE", 1))
            local_rank = int(values.get("LOCAL_RANK", rank))
            local_count = int(values.get("LOCAL_WORLD_SIZE", count))
        except ValueError:
            raise UserError(
                "RANK, WORLD_SIZE and their local forms in the environment must be whole numbers."
            ) from None
        if not 0 <= rank < count or local_rank < 0 or local_count < 1:
            raise UserError(f"RANK is {rank} and WORLD_SIZE is {count}. Start all processes with one launcher.")
        return cls(rank, count, local_rank, local_count, values.get("ACCELERATE_USE_CPU", "").lower() in _TRUE)

    def take(self, groups: Sequence[T]) -> list[T]:
        """The groups of this process: every `count`-th one, so that none is done twice and none left out.

        All processes must be given the same list; it may not depend on what was cached before.
        """
        return list(groups[self.rank :: self.count])

    @property
    def first(self) -> bool:
        """Whether this process speaks for all of them."""
        return self.rank == 0
