"""Where every random number of training comes from: a hash of seed, epoch, batch and purpose, never a hidden state.

So a run goes on from a position alone, and any number of processes draws what a single one would.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: object) -> int:
    """A whole number of 0 to 2^32 - 1 for these parts, equal on every machine.

    torch's CPU generator takes no more bits of a seed; that two of very many batches share a seed by chance only gives
    them the same noise.
    """
    text = "\n".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:4], "big")


def generator(seed: int, epoch: int, batch: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("noise", "timesteps", ...) of micro-batch `batch` (from 0) of `epoch` (from 0).

    `batch` counts the batches of the epoch over all processes.
    """
    return torch.Generator().manual_seed(seed_of(seed, epoch, batch, purpose))


def reseed(seed: int, epoch: int, batch: int) -> None:
    """Seed torch's global generators (CPU and accelerators) before the forward pass of a micro-batch, for dropout."""
    torch.manual_seed(seed_of(seed, epoch, batch, "forward"))
