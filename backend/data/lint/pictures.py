"""Small pictures as numbers: brightness, colour, and coarse cells, all in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
from numpy.typing import NDArray

from backend.data.scaling import Pixels

Numbers = NDArray[numpy.float32]
_BLOCK = 64


def luma(pixels: Pixels) -> Numbers:
    """Brightness 0 to 255 of uint8 [..., 3] RGB as float32 [...], by the weights of ITU-R BT.601."""
    return pixels @ numpy.array([0.299, 0.587, 0.114], dtype=numpy.float32)


def chroma(pixels: Pixels, bright: Numbers) -> tuple[Numbers, Numbers]:
    """Blue and red difference, -128 to 128, of uint8 [..., 3] RGB whose brightness is `bright`."""
    blue = (pixels[..., 2].astype(numpy.float32) - bright) * numpy.float32(0.564)
    red = (pixels[..., 0].astype(numpy.float32) - bright) * numpy.float32(0.713)
    return blue, red


def cells(planes: NDArray[Any], columns: int, rows: int) -> Numbers:
    """Mean of each of `rows` x `columns` nearly equal fields of [..., H, W]; at most as many as there are pixels."""
    height, width = planes.shape[-2:]
    across = _edges(width, min(columns, width))
    down = _edges(height, min(rows, height))
    sums = numpy.add.reduceat(planes.astype(numpy.float32), down[:-1], axis=-2)
    sums = numpy.add.reduceat(sums, across[:-1], axis=-1)
    return (sums / (numpy.diff(down)[:, None] * numpy.diff(across))).astype(numpy.float32)


def in_blocks(function: Callable[[Pixels], NDArray[Any]], pixels: Pixels) -> NDArray[Any]:
    """`function` of uint8 [F, H, W, 3], 64 frames at a time: half a minute as float32 would be 140 MB."""
    return numpy.concatenate([function(pixels[start : start + _BLOCK]) for start in range(0, len(pixels), _BLOCK)])


def _edges(length: int, parts: int) -> NDArray[numpy.int64]:
    return numpy.arange(parts + 1, dtype=numpy.int64) * length // parts
