"""Another rank for a LoRA: the best approximation of up @ down of that rank, by singular values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backend.lora.formats import LoraWeights


@dataclass(frozen=True)
class Resized:
    """A pair of another rank, and which share of the squared singular values of up @ down it keeps (1.0: all)."""

    weights: LoraWeights
    kept: float


def resize_pair(pair: LoraWeights, rank: int, keep_energy: float | None = None) -> Resized:
    """The pair whose product is nearest to that of `pair` among those of `rank`, computed in float64.

    alpha / rank stays what it was. The product is exact, up to rounding, when `rank` is not below the true rank; ranks
    above that are filled with zeros. With `keep_energy` the rank is the smallest that keeps this share of the squared
    singular values, at most `rank`.
    """
    up_basis, up_small = torch.linalg.qr(pair.up.double())
    down_basis, down_small = torch.linalg.qr(pair.down.double().t())
    left, values, right = torch.linalg.svd(up_small @ down_small.t())
    energy = values.square()
    total = float(energy.sum())
    if keep_energy is not None:
        rank = _rank_for(energy, keep_energy, rank)
    count = min(rank, len(values))
    root = values[:count].sqrt()
    down = torch.zeros(rank, pair.down.shape[1], dtype=torch.float64)
    up = torch.zeros(pair.up.shape[0], rank, dtype=torch.float64)
    down[:count] = root[:, None] * (right[:count] @ down_basis.t())
    up[:, :count] = (up_basis @ left[:, :count]) * root
    kept = float(energy[:count].sum()) / total if total > 0 else 1.0
    alpha = pair.alpha / pair.rank * rank
    return Resized(LoraWeights(down.to(pair.down.dtype), up.to(pair.up.dtype), alpha), kept)


def _rank_for(energy: torch.Tensor, share: float, limit: int) -> int:
    total = float(energy.sum())
    if total == 0:
        return 1
    # The share is compared with a rounding margin, so that 1.0 keeps the true rank and not every rounding error.
    reached = energy.cumsum(0) / total >= share - 1e-12
    return min(int(reached.to(torch.int8).argmax()) + 1, limit)
