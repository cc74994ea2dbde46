"""Frozen stretches and hard cuts in a run of consecutive frames."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from backend.data.lint.pictures import Numbers, cells, chroma, in_blocks, luma
from backend.data.scaling import Pixels

# Cuts are looked for in pictures of about 32 cells, where grain, ringing and small moving things are averaged away.
_CUT_CELLS = 32
# A thing may move by two cells (6 % of the picture) from one frame to the next without counting as change at all.
_REACH = 2
# Brightness is measured in units of the picture's own contrast, so that light switched on in one scene is little
# change; below this contrast (levels of 255) it is not stretched further, else the noise of black pictures would be.
_LEAST_CONTRAST = 12.0
# Change from which a cut is possible at all: real cuts measured 0.2 to 0.5, the fastest motion in one shot 0.09.
CUT_CHANGE = 0.12
# A cut must stand out from its surroundings by this factor: during fast motion and fades every frame changes much.
_CUT_FACTOR = 4.0
_SURROUNDINGS = 12
# What looks again as before within this many frames (half a second) was a flash or a strobe light, no cut.
_FLASH = 12
_RETURN = 0.5

# Frozen: no field of about 4 x 4 pixels of the small picture departs by more levels from the first one of the stretch.
# Compression of a still picture stays below this, the slowest pan or zoom leaves it within a second.
FROZEN_CHANGE = 3.0
_FROZEN_FIELD = 4


def find_cuts(pixels: Pixels) -> list[tuple[int, float]]:
    """Frames of uint8 [F, H, W, 3] that begin another shot, and how much of the picture's contrast changed there.

    Frames must follow each other in time. A frame is compared with the one before it in a way that forgives motion,
    brightness and flashes; see the constants. What remains must be large in itself and far above the frames around.
    """
    if len(pixels) < 2:
        return []
    planes = in_blocks(_cut_planes, pixels)
    change = _changes(planes[:-1], planes[1:])
    cuts = []
    for place in numpy.flatnonzero(change >= CUT_CHANGE):
        around = numpy.delete(change, place)[max(0, place - _SURROUNDINGS) : place + _SURROUNDINGS]
        usual = float(numpy.percentile(around, 85)) if len(around) else 0.0
        if change[place] >= _CUT_FACTOR * usual and not _returns(planes, int(place), float(change[place])):
            cuts.append((int(place) + 1, round(float(change[place]), 3)))
    return cuts


def _cut_planes(pixels: Pixels) -> Numbers:
    """float32 [F, 3, rows, columns]: brightness without its mean, and two colour differences, in units of contrast."""
    height, width = pixels.shape[1:3]
    scale = _CUT_CELLS / max(height, width)
    columns, rows = max(4, round(width * scale)), max(4, round(height * scale))
    bright = luma(pixels)
    blue, red = chroma(pixels, bright)
    bright = cells(bright, columns, rows)
    mean = bright.mean(axis=(1, 2), keepdims=True)
    contrast = numpy.maximum(bright.std(axis=(1, 2), keepdims=True), _LEAST_CONTRAST)
    # Colour grows with light as contrast does.
    colours = [cells(plane, columns, rows) / contrast for plane in (blue, red)]
    return numpy.stack([(bright - mean) / contrast, *colours], axis=1).astype(numpy.float32)


def _changes(before: Numbers, after: Numbers) -> NDArray[numpy.float32]:
    """float32 [N]: mean departure of each picture from what lay nearby in the other one, both ways."""
    both = _departure(before, after) + _departure(after, before)
    return (both / 2).astype(numpy.float32)


def _departure(known: Numbers, seen: Numbers) -> NDArray[numpy.float32]:
    low, high = _nearby(known, numpy.minimum), _nearby(known, numpy.maximum)
    outside = numpy.maximum(numpy.maximum(seen - high, low - seen), 0)
    return outside.max(axis=1).mean(axis=(1, 2)).astype(numpy.float32)


def _nearby(planes: Numbers, choose: numpy.ufunc) -> Numbers:
    """Smallest or largest value within `_REACH` cells, along rows and then columns."""
    for axis in (2, 3):
        margins = [(0, 0)] * 4
        margins[axis] = (_REACH, _REACH)
        padded = numpy.pad(planes, margins, mode="edge")
        length = planes.shape[axis]
        planes = choose.reduce(
            [padded.take(range(offset, offset + length), axis=axis) for offset in range(2 * _REACH + 1)]
        )
    return planes


def _returns(planes: Numbers, place: int, change: float) -> bool:
    """Whether the picture after a change was there shortly before it, or the one before it comes back shortly after."""
    before, after = planes[place], planes[place + 1]
    later = planes[place + 2 : place + 2 + _FLASH]
    earlier = planes[max(0, place - _FLASH) : place]
    for picture, others in ((before, later), (after, earlier)):
        if len(others) and _changes(numpy.broadcast_to(picture, others.shape), others).min() < _RETURN * change:
            return True
    return False


def find_frozen(pixels: Pixels, shortest: int) -> list[tuple[int, int]]:
    """Stretches (first frame, one past the last) of at least `shortest` frames of uint8 [F, H, W, 3] that stand still.

    Every frame is compared with the first one of its stretch, so that slow motion adds up and is not taken for a halt.
    """
    fields = in_blocks(_frozen_fields, pixels)
    found = []
    start = 0
    for place in range(1, len(fields) + 1):
        if place < len(fields) and numpy.abs(fields[place] - fields[start]).max() <= FROZEN_CHANGE:
            continue
        if place - start >= shortest:
            found.append((start, place))
        start = place
    return found


def _frozen_fields(pixels: Pixels) -> Numbers:
    """float32 [F, 3, rows, columns], levels; colours too: green on equally bright grey moves in them alone."""
    height, width = pixels.shape[1:3]
    bright = luma(pixels)
    planes = numpy.stack([bright, *chroma(pixels, bright)], axis=1)
    return cells(planes, -(-width // _FROZEN_FIELD), -(-height // _FROZEN_FIELD))
