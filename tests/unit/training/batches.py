"""Random batches in memory for the tests of inputs, loss and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend.training.training_set import Batch, pad_texts


def random_batch(
    lengths: Sequence[int],
    shape: tuple[int, int, int] = (4, 4, 6),
    *,
    text_dim: int = 48,
    pooled_dim: int = 24,
    dropout: Sequence[float] | None = None,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
) -> Batch:
    """One sample for each length (tokens of its text) with latents of `shape` [F, H, W]."""
    random = torch.Generator().manual_seed(seed)
    count = len(lengths)
    text, mask = pad_texts([torch.randn(length, text_dim, generator=random) for length in lengths])
    return Batch(
        names=tuple(f"item-{number}" for number in range(count)),
        kinds=tuple(kinds or ["video"] * count),
        latents=torch.randn(count, 16, *shape, generator=random),
        latents_image=torch.randn(count, 16, 2, *shape[1:], generator=random),
        text=text,
        text_mask=mask,
        pooled=torch.randn(count, pooled_dim, generator=random),
        empty_text=torch.randn(2, text_dim, generator=random),
        empty_pooled=torch.randn(pooled_dim, generator=random),
        caption_dropout=torch.tensor(dropout or [0.0] * count),
    )
