"""Given images: how they are scaled, cropped and flattened, and how the frames after them are matched."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from backend.errors import UserError
from backend.sampling.condition import GivenFrames, fit_image, load_image, normalise_first_frames


def _levels(pixels: torch.Tensor) -> numpy.ndarray:
    """[1, 3, 1, H, W] in -1..1 -> [H, W, 3] in 0..255."""
    return ((pixels[0, :, 0].permute(1, 2, 0) + 1) * 127.5).numpy()


# --- first-frame normalisation ------------------------------------------------------------------------------------


def _official(latents: numpy.ndarray) -> numpy.ndarray:
    """The published per-frame formula in float64: [F, H, W, C], unbiased spread, reference frames 4 to 8."""
    result = latents.astype(numpy.float64).copy()
    reference = latents[4:9].astype(numpy.float64)
    for index in range(4):
        frame = latents[index].astype(numpy.float64)
        mean, spread = frame.mean(), frame.std(ddof=1)
        target_mean = min(max(reference.mean(), mean - 0.05), mean + 0.1)
        target_spread = min(max(reference.std(ddof=1), spread - 0.1), spread + 0.25)
        result[index] = (frame - mean) / spread * target_spread + target_mean
    return result


@pytest.mark.parametrize("frames", [9, 10, 13, 21, 31])
def test_normalisation_is_the_official_formula(frames: int) -> None:
    """Each frame has its own statistics (diffusers takes them over all four together). Traps B9, B27."""
    rng = numpy.random.default_rng(frames)
    for _ in range(6):
        scales = rng.uniform(0.3, 1.6, (frames, 1, 1, 1))
        shifts = rng.uniform(-0.4, 0.4, (frames, 1, 1, 1))
        latents = (rng.standard_normal((frames, 6, 5, 16)) * scales + shifts).astype(numpy.float32)
        found = normalise_first_frames(torch.from_numpy(latents)[None])[0].numpy()
        numpy.testing.assert_allclose(found, _official(latents), rtol=2e-5, atol=2e-5)
        assert numpy.array_equal(found[4:], latents[4:])


@pytest.mark.parametrize(("mean", "spread"), [(5.0, 1.0), (-5.0, 1.0), (0.0, 9.0), (0.0, 0.01)])
def test_the_limits_hold_on_every_side(mean: float, spread: float) -> None:
    latents = torch.randn(1, 12, 8, 8, 16, generator=torch.Generator().manual_seed(1))
    latents[:, 4:] = latents[:, 4:] * spread + mean
    found = normalise_first_frames(latents)
    for index in range(4):
        shift = float(found[:, index].mean() - latents[:, index].mean())
        grown = float(found[:, index].std() - latents[:, index].std())
        assert -0.0501 < shift < 0.1001
        assert -0.1001 < grown < 0.2501
    if mean > 0:
        assert float(found[:, 0].mean() - latents[:, 0].mean()) == pytest.approx(0.1, abs=1e-3)
    if spread > 1:
        assert float(found[:, 0].std() - latents[:, 0].std()) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("frames", range(1, 9))
def test_short_clips_stay_as_they_are(frames: int) -> None:
    """Trap B26: the official code gives a tuple for one frame and NaN for up to four."""
    latents = torch.randn(1, frames, 4, 4, 16)
    found = normalise_first_frames(latents)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, latents)


def test_constant_frames_stay_finite() -> None:
    """Trap B26: a frame without spread divides by zero."""
    latents = torch.randn(1, 9, 4, 4, 16)
    latents[:, 1] = 0.5
    found = normalise_first_frames(latents)
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found[:, 1], latents[:, 1])
    assert bool(torch.isfinite(normalise_first_frames(torch.ones(1, 9, 4, 4, 16))).all())


def test_normalisation_does_not_change_its_argument() -> None:
    latents = torch.randn(1, 9, 4, 4, 16)
    before = latents.clone()
    assert not torch.equal(normalise_first_frames(latents), latents)
    assert torch.equal(latents, before)


# --- given frames -------------------------------------------------------------------------------------------------


def test_given_frames_replace_and_mark() -> None:
    latents = torch.zeros(1, 5, 2, 2, 16)
    first, last = torch.ones(1, 1, 2, 2, 16), torch.full((1, 1, 2, 2, 16), 2.0)
    both = GivenFrames(first, last)
    assert both.replace(latents)[0, :, 0, 0, 0].tolist() == [1, 0, 0, 0, 2]
    assert both.mask(latents)[0, :, 0, 0, 0].tolist() == [1, 0, 0, 0, 1]
    assert GivenFrames(first).mask(latents)[0, :, 0, 0, 0].tolist() == [1, 0, 0, 0, 0]
    assert both.mask(latents).shape == (1, 5, 2, 2, 1)
    assert not latents.any()


# --- images to pixels ---------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_taken_as_it_is() -> None:
    pixels = numpy.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=numpy.uint8)
    found = fit_image(Image.fromarray(pixels), 48, 32)
    assert found.shape == (1, 3, 1, 32, 48)
    assert found.dtype == torch.float32
    numpy.testing.assert_allclose(_levels(found), pixels, atol=1e-4)
    assert float(found.min()) >= -1
    assert float(found.max()) <= 1


def test_200_random_fits_cover_the_clip_with_a_true_aspect() -> None:
    """A picture of coordinates: the scale is the same in both directions and the middle stays in the middle."""
    rng = random.Random(3)
    for _ in range(200):
        width, height = rng.randint(8, 200), rng.randint(8, 200)
        target = 16 * rng.randint(1, 8), 16 * rng.randint(1, 8)
        rows, columns = numpy.mgrid[0:height, 0:width]
        picture = numpy.stack([columns / max(width - 1, 1) * 255, rows / max(height - 1, 1) * 255, 0 * rows], -1)
        found = _levels(fit_image(Image.fromarray(picture.astype(numpy.uint8)), *target))
        assert found.shape == (target[1], target[0], 3)
        middle = found[target[1] // 2 - 1 : target[1] // 2 + 1, target[0] // 2 - 1 : target[0] // 2 + 1].mean((0, 1))
        assert abs(middle[0] - 127.5) < 10
        assert abs(middle[1] - 127.5) < 10
        scale = max(target[0] / width, target[1] / height)
        seen = (numpy.ptp(found[..., 0]) / 255 * (width - 1), numpy.ptp(found[..., 1]) / 255 * (height - 1))
        for length, whole, wanted in zip(seen, (width, height), target, strict=True):
            # Source pixels that remain visible; bilinear blending at the edges and 8 bits cost about one and a half.
            assert abs(length - min(whole, wanted / scale)) <= 1.6 + 1 / scale + whole * 3 / 255


def test_edges_are_never_empty() -> None:
    for size in ((1, 1), (1, 500), (500, 1), (3, 7)):
        found = _levels(fit_image(Image.new("RGB", size, (255, 128, 0)), 64, 32))
        numpy.testing.assert_allclose(found, numpy.broadcast_to([255, 128, 0], found.shape), atol=1e-3)


def test_exif_orientation_and_transparency_over_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the left column becomes the top row
    picture = numpy.zeros((8, 16, 3), numpy.uint8)
    picture[:, :8] = (200, 0, 0)
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    turned = load_image(tmp_path / "a.png", "image")
    assert turned.size == (8, 16)
    assert turned.getpixel((4, 2)) == (200, 0, 0)
    assert turned.getpixel((4, 13)) == (0, 0, 0)
    Image.new("RGBA", (4, 4), (0, 0, 200, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", "image").getpixel((1, 1)) == (255, 255, 255)
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "half.webp", lossless=True)
    assert load_image(tmp_path / "half.webp", "image").getpixel((1, 1)) == pytest.approx((127, 127, 127), abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixels_becomes_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.tiff" if mode == "CMYK" else "a.png"
    Image.new(mode, (16, 16)).save(tmp_path / name)
    image = load_image(tmp_path / name, "image")
    assert (image.mode, image.size) == ("RGB", (16, 16))


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "a.gif", transparency=1)
    assert load_image(tmp_path / "a.gif", "image").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("cut", [0, 20, 60, 200])
def test_a_damaged_image_is_one_sentence(tmp_path: Path, cut: int) -> None:
    pixels = numpy.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.png cannot be decoded") as caught:
        load_image(tmp_path / "a.png", "image_last")
    assert caught.value.field == "image_last"
    with pytest.raises(UserError):
        load_image(tmp_path / "none.png", "image")
