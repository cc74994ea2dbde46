"""Images and videos as arrays of RGB: the functions that the rest of the project calls.

These functions work in this process. Where a file may be anything (a scan of somebody's folder, a long caching run),
use `MediaReader`, whose methods of the same names do the same in guarded processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray

from backend.data.decode import decode_numbers, resolve_wanted
from backend.data.formats import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaError, kind_of
from backend.data.images import read_image
from backend.data.probe import MediaInfo, probe
from backend.data.scaling import Box, Pixels, Size, Target, make_target, resize_pixels
from backend.data.timeline import TimelineCache
from backend.data.watchdog import MediaReader

__all__ = [
    "IMAGE_EXTENSIONS",
    "VIDEO_EXTENSIONS",
    "MediaError",
    "MediaInfo",
    "MediaReader",
    "decode_clip",
    "fit_image",
    "kind_of",
    "presentation_times",
    "probe",
    "read_image",
]


def presentation_times(path: str | Path) -> NDArray[numpy.float64]:
    """float64 [N]: when each frame of a video appears, in seconds, the first at 0; no frame is decoded.

    Raises:
        MediaError: broken, or a folder of frames, which has no times.
    """
    if os.path.isdir(path):
        raise MediaError(path, "is a folder of frames, which have numbers but no times. Give source_fps.")
    return TimelineCache(1).get(path).seconds


def fit_image(pixels: Pixels, scaled: Size, crop: Box | None = None) -> Pixels:
    """Scale uint8 [H, W, 3] to `scaled` (width, height), then keep `crop` (left, top, right, bottom).

    Area averages when no side grows, else Lanczos: the same as for the frames of a clip.
    """
    return resize_pixels(pixels, Target(scaled, crop))


def decode_clip(
    path: str | Path,
    wanted: Sequence[int] | Sequence[float],
    scaled: Size | None = None,
    crop: Box | None = None,
) -> Pixels:
    """Read the wanted frames of a video or of a folder of frames as uint8 [F, H, W, 3] RGB, in the order asked for.

    Args:
        wanted: frame numbers from 0 in the order in which frames are shown (integers), or seconds since the first
            frame (floats: the frame that is on screen then); repeated ones are decoded once.
        scaled: (width, height) that the whole frame, turned as it is seen, is brought to; None: its own.
        crop: (left, top, right, bottom) in the scaled frame.

    Memory: the result, and a few frames of the file's own size.

    Raises:
        MediaError: a wanted frame does not exist, is damaged, or needs a damaged one.
        ValueError: nothing is wanted, or the crop does not fit.
    """
    timelines = TimelineCache(1)
    numbers = resolve_wanted(path, wanted, timelines)
    target = make_target(scaled, crop)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, []).append(place)
    clip: list[Pixels] = []

    def put(number: int, pixels: Pixels) -> None:
        if not clip:
            clip.append(numpy.empty((len(numbers), *pixels.shape), dtype=numpy.uint8))
        clip[0][places[number]] = pixels

    decode_numbers(path, sorted(places), target, put, timelines)
    return clip[0]
