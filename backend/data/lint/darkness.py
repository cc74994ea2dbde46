"""Black frames, and black bars beside the picture."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from backend.data.lint.pictures import Numbers, in_blocks, luma
from backend.data.scaling import Pixels

# Black: 99 of 100 pixels of the small picture are no brighter than this (of 255). Encoded black is 0 to 3, and a night
# scene in which anything can be seen has brighter pixels; one in a hundred may be a logo or noise.
BLACK_LEVEL = 16.0
# Bars: darker than black frames have to be, because dark floors and ceilings of real scenes are not exactly black.
_BAR_LEVEL = 10.0
# A bar ends sharply: in most frames half of the first whole line of the picture is brighter than this.
_EDGE_LEVEL = 30.0
_EDGE_SHARE = 0.5
# Bars come in pairs of the same width (to two lines of the small picture) and take at least 3 % of the side each;
# a dark edge on one side only is part of the scene.
_PAIR_DIFFERENCE = 2
_LEAST_SHARE = 0.03
_BAR_FRAMES = 96
# At least this share of the side must be picture.
_LEAST_PICTURE = 0.2

Bars = tuple[float, float, float, float]


def black_frames(pixels: Pixels) -> NDArray[numpy.bool_]:
    """bool [F]: which frames of uint8 [F, H, W, 3] show nothing but black."""
    return in_blocks(lambda block: numpy.percentile(luma(block), 99, axis=(1, 2)) <= BLACK_LEVEL, pixels)


def find_bars(pixels: Pixels) -> Bars | None:
    """Shares (left, top, right, bottom) of the sides of uint8 [F, H, W, 3] that black bars take; None: there are none.

    A line belongs to a bar if it is black in every frame that is not wholly black; at most 96 frames, evenly spread,
    are looked at.
    """
    sample = pixels[:: -(-len(pixels) // _BAR_FRAMES)]
    shown = luma(sample[~black_frames(sample)])
    if not len(shown):
        return None
    # Ringing of the codec may light up a few pixels of a bar.
    top, bottom = _pair(shown)
    left, right = _pair(shown.transpose(0, 2, 1))
    if not (top or left):
        return None
    height, width = shown.shape[1:]
    return tuple(round(value, 4) for value in (left / width, top / height, right / width, bottom / height))  # type: ignore[return-value]


def _pair(shown: Numbers) -> tuple[int, int]:
    """Lines of the bars at the beginning and the end of axis 1; (0, 0) without bars."""
    lines = numpy.percentile(shown, 98, axis=2)
    bright = numpy.flatnonzero(lines.max(axis=0) > _BAR_LEVEL)
    if not len(bright):
        return 0, 0
    count = shown.shape[1]
    first, last = int(bright[0]), count - 1 - int(bright[-1])
    fits = min(first, last) >= max(1, _LEAST_SHARE * count) and abs(first - last) <= _PAIR_DIFFERENCE
    if not fits or count - first - last < _LEAST_PICTURE * count:
        return 0, 0
    # The line at the edge may be half bar, half picture.
    edges = (shown[:, first + 1], shown[:, count - last - 2])
    sharp = all(numpy.median((edge > _EDGE_LEVEL).mean(axis=1)) >= _EDGE_SHARE for edge in edges)
    return (first, last) if sharp else (0, 0)
