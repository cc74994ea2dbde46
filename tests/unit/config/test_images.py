"""Facts about images: size as people see it, and the size of the clip that follows."""

from __future__ import annotations

import random
import time
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from backend.config.images import image_size, size_for_image
from backend.errors import UserError


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == ((20, 30) if orientation >= 5 else (30, 20))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_common_formats_by_content_not_by_name(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (33, 17)).save(tmp_path / f"a.{kind}")
    (tmp_path / f"a.{kind}").rename(tmp_path / "b.dat")
    assert image_size(tmp_path / "b.dat") == (33, 17)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a"],
)
def test_what_is_not_an_image(tmp_path: Path, content: bytes) -> None:
    """PostScript is refused too: reading it would start another program."""
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png is not an image that can be read\. Use PNG") as caught:
        image_size(path, "image")
    assert caught.value.field == "image"


def test_missing_images_folders_and_impossible_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path, tmp_path / ("x" * 5000), "a\0b"):
        with pytest.raises(UserError, match="does not exist"):
            image_size(path, "image")


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (20_000, 9_000)])
def test_too_many_pixels_are_refused_from_the_header(tmp_path: Path, width: int, height: int) -> None:
    Image.new("1", (width, height)).save(tmp_path / "big.png")
    started = time.perf_counter()
    with pytest.raises(UserError, match="100 million"):
        image_size(tmp_path / "big.png", "image")
    assert time.perf_counter() - started < 0.5


def test_a_big_but_allowed_image_gives_no_warning(tmp_path: Path) -> None:
    Image.new("1", (10_000, 9_500)).save(tmp_path / "big.png")
    assert image_size(tmp_path / "big.png") == (10_000, 9_500)


def _nearest_side(side: int, other: int, max_area: int, multiple: int) -> set[int]:
    """round(side k) multiple with k = sqrt(max_area / (side other)) / multiple, in exact integers.

    The number to round is the root of area side / (other multiple^2); n is nearest when (2n-1)^2 <= 4 times that
    <= (2n+1)^2. At an exact half both neighbours count.
    """
    four = 4 * Fraction(max_area * side, other * multiple * multiple)
    low = 0
    while (2 * low + 1) ** 2 < four:
        low += 1
    found = {low} | ({low + 1} if (2 * low + 1) ** 2 == four else set())
    return {max(1, count) * multiple for count in found}


def test_500_random_images_get_the_official_size() -> None:
    rng = random.Random(7)
    for _ in range(500):
        width, height = rng.randint(1, 6000), rng.randint(1, 6000)
        area, multiple = rng.choice([(512 * 768, 16), (1024 * 1024, 128), (64 * 64, 16)])
        found = size_for_image(width, height, area, multiple)
        assert found[0] in _nearest_side(width, height, area, multiple)
        assert found[1] in _nearest_side(height, width, area, multiple)


@pytest.mark.parametrize(
    ("image", "expected"),
    [((768, 512), (768, 512)), ((1920, 1080), (832, 464)), ((100, 100), (624, 624)), ((1080, 1920), (464, 832))],
)
def test_known_sizes_of_the_sd_task(image: tuple[int, int], expected: tuple[int, int]) -> None:
    """A small image is enlarged as well: sqrt(512 * 768) = 627.07, nearest multiple of 16 is 624."""
    assert size_for_image(*image, 512 * 768, 16) == expected


def test_sides_of_nabla_are_multiples_of_128() -> None:
    assert size_for_image(1920, 1080, 1024 * 1024, 128) == (1408, 768)


def test_too_many_pixels_are_not_decoded_to_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (10_001, 10_000)).save(tmp_path / "big.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the image was decoded"))
    with pytest.raises(UserError, match="100 million"):
        image_size(tmp_path / "big.png")
