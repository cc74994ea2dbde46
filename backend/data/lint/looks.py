"""What a clip or a picture looks like in a few bytes, so that copies of it are recognised."""

from __future__ import annotations

import base64
from functools import cache
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from backend.data.lint.pictures import Numbers, cells, chroma, luma
from backend.data.scaling import Pixels

#: Places in a video, as parts of its length, at which it is looked at; five places tell clips of one scene apart.
MOMENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
WORDS = len(MOMENTS)
_SIDE, _KEPT = 32, 8
_LIGHT_FIELDS, _COLOUR_FIELDS = 8, 4
# Levels of contrast below which a picture has no structure that could be compared.
_FLAT = 2.0


class Look(NamedTuple):
    """Perceptual hashes of `WORDS` pictures (64 bits each, hexadecimal), and tiny pictures (base64 of bytes).

    The tiny pictures are brightness in 8 x 8 fields (0 to 255) and two colour differences in 4 x 4 (128: none).
    """

    hashes: str
    tiny: str


def look_of(pixels: Pixels) -> Look | None:
    """The look of uint8 [WORDS, H, W, 3]; None when a picture is flat, so that nothing tells it from other flat ones.

    Each hash says which of the 63 lowest spatial frequencies of the brightness, in 32 x 32 cells, lie above their
    median: the same after scaling, another encoding, and changes of brightness or contrast.
    """
    if min(pixels.shape[1:3]) < _LIGHT_FIELDS:
        return None
    bright = luma(pixels)
    small = _resized(bright)
    if small.std(axis=(1, 2)).min() < _FLAT:
        return None
    basis = _cosines()
    spectrum = (basis @ small @ basis.T).reshape(len(small), -1)
    spectrum[:, 0] = 0  # the mean brightness says nothing about structure
    bits = spectrum > numpy.median(spectrum[:, 1:], axis=1, keepdims=True)
    light = cells(bright, _LIGHT_FIELDS, _LIGHT_FIELDS).reshape(len(small), -1)
    fields = [cells(plane, _COLOUR_FIELDS, _COLOUR_FIELDS).reshape(len(small), -1) for plane in chroma(pixels, bright)]
    tiny = numpy.concatenate([light, *(field + 128 for field in fields)], axis=1)
    tiny = numpy.clip(numpy.rint(tiny), 0, 255).astype(numpy.uint8)
    return Look(numpy.packbits(bits, axis=1).tobytes().hex(), base64.b64encode(tiny.tobytes()).decode())


def still_views(pixels: Pixels) -> list[Pixels]:
    """The whole of uint8 [H, W, 3] and its four quarters: as many looks at a still as at a video."""
    height, width = pixels.shape[:2]
    y, x = max(1, height // 2), max(1, width // 2)
    return [pixels, pixels[:y, :x], pixels[:y, -x:], pixels[-y:, :x], pixels[-y:, -x:]]


def look_of_still(pixels: Pixels) -> Look | None:
    """The look of one picture, uint8 [H, W, 3]."""
    parts = [look_of(view[None]) for view in still_views(pixels)]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    tiny = b"".join(base64.b64decode(part.tiny) for part in whole)
    return Look("".join(part.hashes for part in whole), base64.b64encode(tiny).decode())


def unpack_bits(looks: list[Look]) -> NDArray[numpy.float32]:
    """float32 [N, 64 * WORDS] of -1 and 1: the dot product of two rows tells in how many bits they differ."""
    raw = numpy.frombuffer(bytes.fromhex("".join(look.hashes for look in looks)), dtype=numpy.uint8)
    bits = numpy.unpackbits(raw).reshape(len(looks), -1)
    return bits.astype(numpy.float32) * 2 - 1


def unpack_tiny(look: Look) -> tuple[Numbers, Numbers]:
    """float32 brightness [WORDS, 64] and colour differences [WORDS, 32] of a look."""
    raw = numpy.frombuffer(base64.b64decode(look.tiny), dtype=numpy.uint8).astype(numpy.float32).reshape(WORDS, -1)
    return raw[:, : _LIGHT_FIELDS**2], raw[:, _LIGHT_FIELDS**2 :] - 128


def _resized(bright: Numbers) -> Numbers:
    """[N, 32, 32] whatever the aspect; small pictures are repeated first, as fields cannot be smaller than a pixel."""
    for axis in (1, 2):
        times = -(-_SIDE // bright.shape[axis])
        bright = numpy.repeat(bright, times, axis=axis)
    return cells(bright, _SIDE, _SIDE)


@cache
def _cosines() -> Numbers:
    """The lowest rows of the discrete cosine transform (type 2), float32 [8, 32]."""
    place = (numpy.arange(_SIDE) + 0.5) * numpy.pi / _SIDE
    return numpy.cos(numpy.arange(_KEPT)[:, None] * place).astype(numpy.float32)
