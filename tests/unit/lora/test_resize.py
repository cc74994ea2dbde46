"""Another rank: exact above the true rank, the best possible below it (Eckart and Young), by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.lora.formats import LoraWeights
from backend.lora.resize import resize_pair


def _pair(rank: int, alpha: float, dtype: torch.dtype = torch.float64, out: int = 40, width: int = 24) -> LoraWeights:
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LoraWeights(down.to(dtype), up.to(dtype), alpha)


def _delta(pair: LoraWeights) -> np.ndarray:
    return pair.alpha / pair.rank * (pair.up.double().numpy() @ pair.down.double().numpy())


@pytest.mark.parametrize("rank", [6, 9, 30])
def test_nothing_is_lost_when_the_rank_is_not_smaller(rank: int) -> None:
    pair = _pair(6, 3.0)
    found = resize_pair(pair, rank)
    assert found.weights.rank == rank
    assert found.weights.alpha == 3.0 / 6 * rank
    assert abs(found.kept - 1) < 1e-12
    assert np.allclose(_delta(found.weights), _delta(pair), rtol=1e-10, atol=1e-10)


def test_the_true_rank_is_enough_however_large_the_stored_one_is() -> None:
    small = _pair(3, 3.0)
    mix = torch.randn(3, 12, dtype=torch.float64)
    wide = LoraWeights(torch.linalg.pinv(mix) @ small.down, small.up @ mix, 12.0)
    found = resize_pair(wide, 3)
    assert np.allclose(_delta(found.weights), _delta(wide), atol=1e-9)
    assert resize_pair(wide, 12, keep_energy=1.0).weights.rank == 3


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_below_it_the_error_is_the_least_that_any_pair_of_this_rank_can_have(rank: int) -> None:
    pair = _pair(8, 4.0)
    found = resize_pair(pair, rank)
    values = np.linalg.svd(_delta(pair), compute_uv=False)
    error = np.linalg.norm(_delta(found.weights) - _delta(pair))
    assert abs(error - np.sqrt((values[rank:] ** 2).sum())) < 1e-9
    assert abs(found.kept - (values[:rank] ** 2).sum() / (values**2).sum()) < 1e-12


def test_rank_by_energy_is_the_smallest_that_keeps_the_share() -> None:
    pair = _pair(8, 8.0)
    values = np.linalg.svd(_delta(pair), compute_uv=False)
    shares = np.cumsum(values**2) / (values**2).sum()
    for wanted in (0.3, 0.6, 0.9, 0.999):
        found = resize_pair(pair, 8, keep_energy=wanted)
        assert found.weights.rank == int(np.argmax(shares >= wanted)) + 1
        assert found.kept >= wanted - 1e-12
    assert resize_pair(pair, 2, keep_energy=0.999).weights.rank == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_format_is_kept_and_rounding_is_all_that_is_lost(dtype: torch.dtype) -> None:
    pair = _pair(5, 2.5, dtype)
    found = resize_pair(pair, 5)
    assert found.weights.up.dtype == dtype
    error = np.linalg.norm(_delta(found.weights) - _delta(pair)) / np.linalg.norm(_delta(pair))
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


def test_an_untrained_pair_stays_without_effect() -> None:
    pair = LoraWeights(torch.randn(4, 10), torch.zeros(6, 4), 4.0)
    for found in (resize_pair(pair, 2), resize_pair(pair, 2, keep_energy=0.9)):
        assert torch.count_nonzero(found.weights.up) == 0
        assert found.kept == 1.0
