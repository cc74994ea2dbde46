"""The pixels of an item, exactly as training sees them: what is cached, and what the page shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray
from PIL import Image

from backend.data.items import Item, needs_times, source_frame_numbers
from backend.data.scaling import Pixels

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry
    from backend.data.watchdog import MediaReader


def item_numbers(reader: MediaReader, entry: DatasetEntry, item: Item) -> list[int]:
    """`source_frame_numbers`, with the presentation times read from the file where they are needed.

    Raises:
        UserError: the file is broken, or ends before the clip does.
        Stopped: the reader was closed.
    """
    times: NDArray[numpy.float64] | None = None
    if needs_times(entry, item):
        times = reader.presentation_times(item.source.location)
    return source_frame_numbers(entry, item, times)


def read_item(reader: MediaReader, entry: DatasetEntry, item: Item, numbers: Sequence[int] | None = None) -> Pixels:
    """Read a clip or a still as uint8 [F, H, W, 3] RGB: F is `item.frames`, W x H its bucket.

    The frames are `item_numbers`; the source is scaled to cover and cropped by `item.resize_plan`, and stretched to the
    bucket where the item asks for that. Everything is decoded in the reader's guarded processes.

    Args:
        numbers: other frames of the source instead, as few as eight for a strip of pictures; no effect on a still.

    Raises:
        UserError: the file is broken or hangs, or ends before the clip does; never a part of the clip.
        Stopped: the reader was closed.
    """
    plan = item.resize_plan
    location = item.source.location
    if item.clip is None:
        pixels = reader.read_image(location, plan.scaled, plan.crop)[None]
    else:
        if numbers is None:
            numbers = item_numbers(reader, entry, item)
        pixels = reader.decode_clip(location, list(numbers), plan.scaled, plan.crop)
    return pixels if item.cropped is None else _stretched(pixels, item.bucket.width, item.bucket.height)


def _stretched(pixels: Pixels, width: int, height: int) -> Pixels:
    """Bilinear, as other trainers stretch for NABLA; sides only grow."""
    result = numpy.empty((len(pixels), height, width, 3), dtype=numpy.uint8)
    for number, frame in enumerate(pixels):
        result[number] = numpy.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    return result
