"""Facts about still images and the size of the clip that follows from one; reads headers only."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from backend.errors import UserError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 100_000_000
_EXIF_ORIENTATION = 0x0112
_TURNED = {5, 6, 7, 8}


def image_size(path: str | Path, field: str | None = None) -> tuple[int, int]:
    """Width and height in pixels as a person sees the image (EXIF orientation applied).

    Raises:
        UserError: the file is missing, is no image, or has more than 100 million pixels.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist. Check the path of the image.", field)
    try:
        with open_image(path) as image:
            width, height = image.size
            # A PNG may be decoded to find its EXIF data, so not before its size is known to be bearable.
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if width * height <= MAX_PIXELS else 1
    except Image.DecompressionBombError:
        raise UserError(f"{path.name} has far more than 100 million pixels. Scale it down.", field) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise UserError(f"{path.name} is not an image that can be read. Use PNG, JPEG or WebP.", field) from None
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path.name} has {width} x {height} pixels; at most 100 million are read. Scale it down.", field
        )
    return (height, width) if orientation in _TURNED else (width, height)


def open_image(path: str | Path) -> Image.Image:
    """Open an image of a common format; Pillow's readers that start other programs (EPS) are left out.

    Pillow's warning about big images is silenced here: `image_size` refuses them with a sentence.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=IMAGE_FORMATS)


def size_for_image(width: int, height: int, max_area: int, multiple: int) -> tuple[int, int]:
    """Clip size for an image: its aspect, the task's area, sides rounded to `multiple`.

    Formula of the official image-to-video pipeline: k = sqrt(max_area / (w h)) / multiple, side = round(side k)
    multiple; small images are enlarged too. A side is never less than `multiple`.
    """
    scale = math.sqrt(max_area / (width * height)) / multiple
    return max(1, round(width * scale)) * multiple, max(1, round(height * scale)) * multiple
