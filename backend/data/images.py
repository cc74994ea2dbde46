"""Still images as 8-bit RGB: turned as a person sees them, alpha over white, deep and printing colours brought down."""

from __future__ import annotations

import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from backend.config.images import IMAGE_FORMATS, MAX_PIXELS
from backend.data.formats import MediaError

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Clockwise degrees and whether the picture is mirrored first, for each EXIF orientation.
EXIF_ROTATIONS = {
    **{1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True)},
    **{5: (270, True), 6: (90, False), 7: (90, True), 8: (270, False)},
}
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error, EOFError)
# Filters of warnings belong to the whole process, and several threads read images.
_QUIET = threading.Lock()


def image_facts(path: str | Path) -> tuple[int, int, int, str]:
    """(width, height, EXIF orientation 1 to 8, format name) of an image; width and height as a person sees it.

    Raises:
        MediaError: missing, no image, or more than 100 million pixels.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        width, height = image.size
        name = (image.format or "").lower()
    return (height, width, orientation, name) if orientation in _TURNED else (width, height, orientation, name)


def read_image(path: str | Path) -> NDArray[numpy.uint8]:
    """Read a still image (the first picture of an animation) as uint8 [H, W, 3] RGB.

    EXIF orientation is applied. Transparent parts show white. Grey images of 16 bits keep their upper 8, rounded.
    CMYK is converted by Pillow's plain formula; colour profiles are not applied.

    Raises:
        MediaError: missing, broken, cut off, of a kind without a defined brightness (floating point), or too large.
    """
    with _opened(path) as image:
        try:
            image.load()
            orientation = _orientation(image)
            flat = _to_rgb(path, image)
            turn = _TURNS.get(orientation)
            return numpy.asarray(flat if turn is None else flat.transpose(turn)).copy()
        except MediaError:
            raise
        except _BROKEN as error:
            raise MediaError(path, f"is damaged or cut off ({_short(error)}). Copy or save it again.") from None
        except MemoryError:
            raise MediaError(path, "needs more memory than there is. Scale it down.") from None


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            formats = [name for name in (*IMAGE_FORMATS, "AVIF") if name in Image.OPEN]
            image = Image.open(path, formats=formats)
    except FileNotFoundError:
        raise MediaError(path, "does not exist. Check the path.") from None
    except Image.DecompressionBombError:
        raise MediaError(path, "has far more than 100 million pixels. Scale it down.") from None
    except UnidentifiedImageError:
        raise MediaError(path, "is not an image that can be read. Use PNG, JPEG or WebP.") from None
    except _BROKEN as error:
        raise MediaError(path, f"cannot be read as an image ({_short(error)}). Copy or save it again.") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise MediaError(path, f"has {width} x {height} pixels; at most 100 million are read. Scale it down.")
        yield image


def _orientation(image: Image.Image) -> int:
    """1 to 8; damaged EXIF data counts as none, as in every viewer."""
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return value if value in EXIF_ROTATIONS else 1


def _to_rgb(path: str | Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise MediaError(path, "holds floating-point numbers without a defined white. Save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        return _from_deep_grey(path, image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(path: str | Path, image: Image.Image) -> Image.Image:
    values: NDArray[Any] = numpy.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise MediaError(path, "holds numbers of more than 16 bits. Save it with 8 or 16 bits.")
    grey = ((values.astype(numpy.uint32) * 255 + 32767) // 65535).astype(numpy.uint8)
    return Image.fromarray(grey).convert("RGB")


def over_white(image: Image.Image) -> Image.Image:
    """Lay an RGBA image over white."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
