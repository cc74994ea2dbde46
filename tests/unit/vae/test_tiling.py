"""Explicit tiling: its rule, its limits, its way into metadata and back."""

from __future__ import annotations

import pytest

from backend.errors import UserError
from backend.vae.tiling import Tiling, choose_tiling, latent_frames, pixel_frames

# The lengths that other trainers get wrong (Trap B6), and single images.
FRAMES = {1: 1, 5: 2, 17: 5, 49: 13, 81: 21, 121: 31, 241: 61}


def test_frame_rule() -> None:
    """Trap B6: latent frames = (n - 1) / 4 + 1 and back, for every length."""
    assert {frames: latent_frames(frames) for frames in FRAMES} == FRAMES
    assert all(pixel_frames(latent_frames(4 * n + 1)) == 4 * n + 1 for n in range(200))


@pytest.mark.parametrize("frames", [-3, 0, 2, 16, 120])
def test_other_lengths_are_refused(frames) -> None:
    with pytest.raises(ValueError, match="4n \\+ 1"):
        latent_frames(frames)


def test_no_latents() -> None:
    with pytest.raises(ValueError, match="at least one"):
        pixel_frames(0)


@pytest.mark.parametrize(
    ("width", "height", "frames", "temporal", "spatial"),
    [
        (64, 64, 17, False, False),
        (768, 512, 1, False, False),
        (512, 768, 17, False, False),
        (768, 512, 121, True, False),
        (776, 512, 21, True, True),
        (1280, 768, 241, True, True),
    ],
)
def test_rule(width, height, frames, temporal, spatial) -> None:
    tiling = choose_tiling(width, height, frames)
    assert (tiling.temporal_enabled, tiling.spatial_enabled) == (temporal, spatial)
    assert (tiling.temporal_window, tiling.temporal_stride) == (16, 12)
    assert tiling.splits_time(frames) == temporal
    assert tiling.spatial_tile**2 <= 512 * 768


def test_windows_start_after_17_frames() -> None:
    assert [Tiling().splits_time(frames) for frames in (1, 17, 21)] == [False, False, True]
    assert not Tiling(temporal_enabled=False).splits_time(1001)


@pytest.mark.parametrize(
    "numbers",
    [
        {"temporal_stride": 13},
        {"temporal_window": 18},
        {"temporal_stride": 20},
        {"temporal_stride": 0},
        {"spatial_tile": 100},
        {"spatial_stride": 1024},
    ],
)
def test_numbers_that_would_give_wrong_counts_are_refused(numbers) -> None:
    """Trap B6: a window that is no multiple of four, or a stride that skips frames, makes wrong frame counts."""
    with pytest.raises(ValueError, match="multiples of"):
        Tiling(**numbers)


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(False, 32, 16, True, 256, 192), choose_tiling(1280, 768, 241)])
def test_metadata_round_trip(tiling) -> None:
    metadata = tiling.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert Tiling.from_metadata({"other": "key", **metadata}) == tiling


@pytest.mark.parametrize("change", [{"vae_tiling_temporal_window": "x"}, {"vae_tiling_spatial_stride": "-8"}])
def test_metadata_that_is_wrong(change) -> None:
    with pytest.raises(UserError, match="how the VAE was tiled"):
        Tiling.from_metadata(Tiling().to_metadata() | change)
    with pytest.raises(UserError, match="how the VAE was tiled"):
        Tiling.from_metadata({})
