"""A folder of images as a video: its pictures in the order of their names, all of one size."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from backend.data.formats import MediaError, kind_of
from backend.data.images import read_image
from backend.data.scaling import Pixels, Target, resize_pixels


def frame_files(folder: str | Path) -> list[Path]:
    """The images of a folder, numbers in their names compared as numbers (frame_9 before frame_10).

    Raises:
        MediaError: the folder cannot be read or holds no image.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if kind_of(entry.name) == "image" and entry.name[0] != "."]
    except OSError as error:
        raise MediaError(folder, f"cannot be opened: {error.strerror or error}. Check the path.") from None
    if not names:
        raise MediaError(folder, "is a folder without images. Give a video or a folder of frames.")
    return [Path(folder) / name for name in sorted(names, key=_natural)]


def _natural(name: str) -> tuple[list[tuple[int, int | str]], str]:
    parts = re.findall(r"[0-9]+|[^0-9]+", name.lower())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts], name


def read_frames(
    folder: str | Path,
    numbers: Sequence[int],
    target: Target | None,
    put: Callable[[int, Pixels], None],
    alive: Callable[[], None],
) -> None:
    """Give the frames of these ascending numbers to `put`, scaled and cropped; one is in memory at a time.

    Raises:
        MediaError: there are fewer frames, one is broken, or their sizes differ.
    """
    files = frame_files(folder)
    if numbers[-1] >= len(files):
        raise MediaError(folder, f"has {len(files)} frames; frame {numbers[-1]} (from 0) was asked for.")
    first: tuple[int, int] | None = None
    for number in numbers:
        pixels = read_image(files[number])
        size = (pixels.shape[1], pixels.shape[0])
        first = first or size
        if size != first:
            raise MediaError(
                files[number],
                f"is {size[0]} x {size[1]}, other frames of its folder are {first[0]} x {first[1]}. Make them equal.",
            )
        put(number, resize_pixels(pixels, target or Target(size)))
        alive()
