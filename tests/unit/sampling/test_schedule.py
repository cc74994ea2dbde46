"""The sigma grid against its closed form and published values; noise against diffusers."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy
import pytest
import torch

from backend.sampling.schedule import draw_noise, seeded_generator, sigma_grid


def _closed_form(steps: int, scale: Fraction) -> list[float]:
    """sigma_i = s u / (1 + (s - 1) u), u = 1 - i / N, in exact fractions."""
    grid = [1 - Fraction(index, steps) for index in range(steps + 1)]
    return [float(scale * u / (1 + (scale - 1) * u)) for u in grid]


def test_100_random_grids_are_the_closed_form() -> None:
    rng = random.Random(1)
    for _ in range(100):
        steps, scale = rng.randint(1, 1000), Fraction(rng.randint(1, 2000), 100)
        found = sigma_grid(steps, float(scale))
        assert found.dtype == torch.float32
        assert found.shape == (steps + 1,)
        # Half a unit in the last place: the grid is computed in float64 and rounded once.
        numpy.testing.assert_array_max_ulp(found.numpy(), numpy.float32(_closed_form(steps, scale)), maxulp=1)


def test_published_values() -> None:
    """50 steps, scale 10: the last step starts at 0.169, where diffusers' own default ends elsewhere. Trap B9, B27."""
    grid = sigma_grid(50, 10.0)
    assert float(grid[-2]) == pytest.approx(10 / 59, rel=1e-6)
    assert float(grid[-2]) == pytest.approx(0.1695, abs=5e-5)
    assert float(grid[1]) == pytest.approx(9.8 / 9.82, rel=1e-6)
    assert float(sigma_grid(16, 5.0)[8]) == pytest.approx(5 / 6, rel=1e-6)


@pytest.mark.parametrize(("steps", "scale"), [(1, 10.0), (2, 0.01), (50, 1.0), (1000, 100.0)])
def test_a_grid_falls_from_one_to_zero(steps: int, scale: float) -> None:
    grid = sigma_grid(steps, scale)
    assert (float(grid[0]), float(grid[-1])) == (1.0, 0.0)
    assert bool((grid[1:] < grid[:-1]).all())
    if scale == 1.0:
        torch.testing.assert_close(grid, torch.linspace(1, 0, steps + 1))


@pytest.mark.filterwarnings("ignore")
def test_noise_is_the_noise_of_diffusers() -> None:
    """The same CPU generator gives diffusers' pipelines and us one start, for every seed. Trap B20."""
    from diffusers.utils.torch_utils import randn_tensor

    rng = random.Random(2)
    for seed in (0, 42, 2**31, 2**63 - 1, rng.randrange(2**63)):
        shape = (rng.randint(1, 9), rng.randint(2, 12), rng.randint(2, 12))
        ours = draw_noise(seeded_generator(seed), *shape)
        theirs = randn_tensor(
            (1, *shape, 16), generator=torch.Generator("cpu").manual_seed(seed), device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_noise_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw_noise(seeded_generator(1), 2, 4, 4)
    assert torch.equal(torch.rand(3), expected)
