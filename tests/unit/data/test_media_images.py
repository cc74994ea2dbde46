"""Still images, orientation, colour, sizes, and files that are not what their names say."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
from PIL import Image, features

from backend.data.formats import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaError, kind_of
from backend.data.images import EXIF_ROTATIONS
from backend.data.media import decode_clip, fit_image, probe, read_image
from backend.data.scaling import Orientation, Target, make_target
from tests.unit.data.clips import corners, numbered, read_corners, set_matrix, write_clip, write_sound

# How `corners` (RG above BW), stored under each EXIF orientation, is seen.
EXIF_SEEN = {1: "RGBW", 2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB"}
MATRICES = {
    **{1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1)},
    **{5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)},
}


def test_extensions_in_any_letter_case() -> None:
    for extension in IMAGE_EXTENSIONS:
        assert kind_of(f"a.b{extension.title()}") == "image"
    for extension in VIDEO_EXTENSIONS:
        assert kind_of(Path(f"A{extension.upper()}")) == "video"
    assert [kind_of(name) for name in ("a.gif", "a.txt", "mp4", ".png")] == [None] * 4


@pytest.mark.parametrize("orientation", EXIF_SEEN)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(tmp_path, orientation, suffix) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(corners()).save(path, exif=exif, quality=95)
    info, pixels = probe(path), read_image(path)
    turned = orientation >= 5
    assert (info.width, info.height) == ((48, 64) if turned else (64, 48)) == (pixels.shape[1], pixels.shape[0])
    assert (info.rotation, info.mirrored) == EXIF_ROTATIONS[orientation]
    assert read_corners(pixels) == EXIF_SEEN[orientation]


@pytest.mark.parametrize("orientation", MATRICES)
def test_rotation_of_videos(tmp_path, orientation) -> None:
    """Telephones store upright clips lying down, with a matrix in the header."""
    path = write_clip(tmp_path / "clip.mp4", 3, draw=lambda _: corners())
    if orientation > 1:
        set_matrix(path, *MATRICES[orientation])
    info, clip = probe(path), decode_clip(path, [2, 1])
    turned = orientation >= 5
    assert (info.width, info.height) == ((48, 64) if turned else (64, 48))
    assert (info.rotation, info.mirrored) == EXIF_ROTATIONS[orientation]
    assert clip.shape == (2, info.height, info.width, 3)
    assert [read_corners(frame) for frame in clip] == [EXIF_SEEN[orientation]] * 2
    assert read_corners(decode_clip(path, [0], (30, 40))[0]) == EXIF_SEEN[orientation]


def test_orientations_agree_with_pillow() -> None:
    for transposed in (False, True):
        for mirrored_x in (False, True):
            for mirrored_y in (False, True):
                turn = Orientation(transposed, mirrored_x, mirrored_y)
                image = Image.fromarray(corners())
                if turn.mirrored:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                image = image.rotate(-turn.degrees, expand=True)
                assert numpy.array_equal(turn.apply(corners()), numpy.asarray(image))


def test_alpha_shows_white(tmp_path) -> None:
    pixels = numpy.zeros((4, 4, 4), numpy.uint8)
    pixels[:, 2:, 3] = 255
    pixels[0, 0, 3] = 128
    for name in ("a.png", "a.webp"):
        Image.fromarray(pixels).save(tmp_path / name, lossless=True)
        seen = read_image(tmp_path / name)
        assert seen.shape == (4, 4, 3)
        assert (seen[1:, :2] == 255).all()
        assert (seen[:, 2:] == 0).all()
        assert abs(int(seen[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png").tolist() == [[[255] * 3, [200, 100, 50]]]
    Image.fromarray(pixels[..., [0, 3]], "LA").save(tmp_path / "la.png")
    assert (read_image(tmp_path / "la.png")[1:, :2] == 255).all()


def test_deep_printing_and_plain_modes(tmp_path) -> None:
    deep = numpy.array([[0, 257, 32768, 65535]], numpy.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    assert numpy.abs(read_image(tmp_path / "print.jpg")[4, 4].astype(int) - [255, 0, 0]).max() < 4
    for mode in ("1", "L", "P", "RGB"):
        Image.fromarray(corners()).convert(mode).save(tmp_path / f"{mode}.bmp")
        assert read_image(tmp_path / f"{mode}.bmp").shape == (48, 64, 3)
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tiff")
    (tmp_path / "float.tiff").rename(tmp_path / "float.png")
    with pytest.raises(MediaError, match="floating-point"):
        read_image(tmp_path / "float.png")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif(tmp_path) -> None:
    Image.fromarray(corners()).save(tmp_path / "a.AVIF", quality=90)
    assert read_corners(read_image(tmp_path / "a.AVIF")) == "RGBW"
    assert probe(tmp_path / "a.AVIF").codec == "avif"


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_broken_images(tmp_path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)).save(path)
    whole = path.read_bytes()
    for content, sentence in (
        (b"", "not an image"),
        (b"I am a text", "not an image"),
        (whole[: len(whole) // 2], "damaged or cut off"),
        (_png(12000, 9000), "at most 100 million"),
        (_png(60000, 60000), "more than 100 million"),
    ):
        path.write_bytes(content)
        with pytest.raises(MediaError, match=sentence):
            read_image(path)
    with pytest.raises(MediaError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(MediaError, match="neither an image nor a video"):
        probe(tmp_path / "a.gif")


def test_files_that_are_no_video(tmp_path) -> None:
    """A playlist under the name of a video would make FFmpeg open other files and addresses."""
    good = write_clip(tmp_path / "good.mp4", 3)
    for content, sentence in (
        (b"", "is empty"),
        (b"I am a text", "not a video of a known kind"),
        (f"#EXTM3U\n#EXTINF:1,\n{good}\n".encode(), "not a video of a known kind"),
        (f"ffconcat version 1.0\nfile {good}\n".encode(), "not a video of a known kind"),
        (b"\0\0\0\x18ftypisom" + bytes(400), "cannot be opened as a video|holds no video"),
        (b"\x1a\x45\xdf\xa3" + bytes(400), "cannot be opened as a video|holds no video"),
    ):
        path = tmp_path / "bad.mp4"
        path.write_bytes(content)
        with pytest.raises(MediaError, match=sentence):
            probe(path)
        with pytest.raises(MediaError, match=sentence):
            decode_clip(path, [0])
    with pytest.raises(MediaError, match="sound only"):
        probe(write_sound(tmp_path / "sound.mp4"))
    with pytest.raises(MediaError, match="No such file"):
        probe(tmp_path / "none.mp4")
    odd = tmp_path / "concat:a|b, %d é.mp4"
    good.rename(odd)
    assert probe(odd).frames == 3
    assert probe(odd.rename(tmp_path / "really_mp4.avi")).frames == 3


def test_pixels_that_are_not_square(tmp_path) -> None:
    path = write_clip(tmp_path / "wide.mp4", 2, aspect=Fraction(4, 3))
    assert (probe(path).width, probe(path).height) == (85, 48)
    assert decode_clip(path, [0]).shape == (1, 48, 85, 3)


@pytest.mark.parametrize(("matrix", "levels"), [(1, 1), (5, 1), (1, 2), (None, None)])
def test_colours_follow_the_file_s_own_matrix_and_range(tmp_path, matrix, levels) -> None:
    """Reading BT.709 with the matrix of BT.601, as PyAV does by default in some versions, is off by 8 levels."""
    y, x = numpy.mgrid[0:96, 0:128]
    picture = numpy.stack([128 + 100 * numpy.sin(x / 15), 2 * y, x + y // 2], -1).astype(numpy.uint8)
    colour = {"colorspace": matrix, "color_range": levels} if matrix else None
    path = write_clip(tmp_path / "clip.mp4", 2, (128, 96), options={"crf": "1"}, draw=lambda _: picture, colour=colour)
    assert numpy.abs(decode_clip(path, [0])[0].astype(int) - picture).mean() < 2


def test_area_averages_are_exact() -> None:
    generator = numpy.random.default_rng(3)
    for width, height, size in ((64, 48, (64, 20)), (33, 47, (10, 11)), (50, 50, (49, 49)), (9, 9, (1, 1))):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
        expected = numpy.einsum("hy,yxc,wx->hwc", _cover(height, size[1]), pixels, _cover(width, size[0]))
        assert numpy.abs(fit_image(pixels, size) - expected).max() <= 0.51
    assert numpy.array_equal(fit_image(numbered(5), (64, 48), (1, 2, 30, 40)), numbered(5)[2:40, 1:30])
    grown = fit_image(numbered(5), (90, 48))
    assert numpy.array_equal(
        grown, numpy.asarray(Image.fromarray(numbered(5)).resize((90, 48), Image.Resampling.LANCZOS))
    )


def _cover(count: int, length: int) -> numpy.ndarray:
    """How much of each old pixel each new one covers, slowly."""
    weights = numpy.zeros((length, count))
    for new in range(length):
        for old in range(count):
            low, high = max(new * count / length, old), min((new + 1) * count / length, old + 1)
            weights[new, old] = max(0.0, high - low) * length / count
    return weights


def test_targets_that_do_not_fit() -> None:
    for size, crop in (((0, 4), None), ((8, 8), (0, 0, 9, 8)), ((8, 8), (4, 0, 4, 8)), ((8, 8), (-1, 0, 4, 8))):
        with pytest.raises(ValueError):
            Target(size, crop)
    with pytest.raises(ValueError):
        make_target(None, (0, 0, 1, 1))
