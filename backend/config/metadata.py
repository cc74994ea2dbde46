"""The settings inside a file that this project made: how they are spelled and how they are read back.

One JSON object under the key `k5_settings`: in the tags of an MP4, a text chunk of a PNG, the EXIF UserComment of a
WebP, the metadata of a safetensors file: `{"version": 1, "program": ..., "options": {...}, "seed": ..., ...}`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from backend.config.images import open_image
from backend.errors import UserError

SETTINGS_KEY = "k5_settings"
SETTINGS_VERSION = 1
EXIF_USER_COMMENT = 0x9286
EXIF_IFD = 0x8769
_MAX_HEADER_BYTES = 100_000_000
_MAX_SETTINGS_BYTES = 1_000_000


def encode_settings(settings: dict[str, Any]) -> str:
    """The settings as one line of ASCII JSON, which every container keeps unchanged."""
    return json.dumps(settings, ensure_ascii=True, sort_keys=True, allow_nan=False)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a clip, image or latent file of this project carries.

    Raises:
        UserError: the file is missing, of an unknown kind, unreadable, or carries no settings.
    """
    path = Path(path)
    readers = {
        ".mp4": _from_video,
        ".png": _from_png,
        ".webp": _from_webp,
        ".safetensors": _from_safetensors,
    }
    if not os.path.isfile(path):
        raise UserError(f"{path.name} does not exist. Choose another file.")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path.name} cannot hold settings. Choose an .mp4, .png, .webp or .latent.safetensors file.")
    text = reader(path)
    if not text:
        raise UserError(f"{path.name} carries no settings. Only files made by K5 Studio do.")
    try:
        settings = json.loads(text, parse_constant=_refuse) if len(text) <= _MAX_SETTINGS_BYTES else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or not isinstance(settings.get("options"), dict):
        raise UserError(f"The settings in {path.name} are damaged. Choose another file.")
    return settings


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _from_video(path: Path) -> str:
    # Imported here: the page starts without PyAV.
    import av
    from av.error import FFmpegError

    try:
        # The format is fixed: FFmpeg would take a playlist under this name for what it is, and open what it names.
        with av.open(str(path), format="mp4") as container:
            return container.metadata.get(SETTINGS_KEY, "")
    except (FFmpegError, OSError, ValueError):
        raise UserError(f"{path.name} is not a video that can be read. Choose another file.") from None


@contextmanager
def _opened_image(path: Path) -> Iterator[Image.Image]:
    try:
        with open_image(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, struct.error, Image.DecompressionBombError):
        raise UserError(f"{path.name} is not an image that can be read. Choose another file.") from None


def _from_png(path: Path) -> str:
    with _opened_image(path) as image:
        # `info` holds the texts in front of the pixels; `text` would decode the whole image first.
        return str(image.info.get(SETTINGS_KEY, ""))


def _from_webp(path: Path) -> str:
    with _opened_image(path) as image:
        comment = image.getexif().get_ifd(EXIF_IFD).get(EXIF_USER_COMMENT, b"")
    text = comment.decode("ascii", "replace") if isinstance(comment, bytes) else str(comment)
    text = text.removeprefix("ASCII\0\0\0")
    return text if text.startswith("{") else ""


def _from_safetensors(path: Path) -> str:
    try:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("header too long")
            header = json.loads(handle.read(length))
        return str(header.get("__metadata__", {}).get(SETTINGS_KEY, ""))
    except (OSError, ValueError, AttributeError, struct.error, RecursionError):
        raise UserError(f"{path.name} is not a safetensors file that can be read. Choose another file.") from None
