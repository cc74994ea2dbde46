"""Small pictures and clips for the page: WebP, and H.264 that every browser plays while it still loads."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
from av.video.frame import VideoFrame
from PIL import Image

from backend.data.scaling import Pixels
from backend.files import atomic_path

_BT709 = 1
_LIMITED_RANGE = 1


def write_webp(path: Path, pixels: Pixels, quality: int = 80) -> None:
    """Write uint8 [H, W, 3].

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, "WEBP", quality=quality, method=2)


def write_mp4(path: Path, frames: Iterable[Pixels], fps: int, crf: int) -> None:
    """Write frames, uint8 [H, W, 3] each with even sides, as H.264 in yuv420p, BT.709, its index in front.

    Raises:
        UserError: the disk is full or the folder cannot be written; and what `frames` raises.
    """
    with atomic_path(path) as temporary:
        options = {"movflags": "+faststart", "movie_timescale": str(1000 * fps)}
        with av.open(str(temporary), "w", options=options) as container:
            stream: Any = None
            for number, pixels in enumerate(frames):
                if stream is None:
                    stream = _stream(container, pixels.shape[1], pixels.shape[0], fps, crf)
                frame = VideoFrame.from_ndarray(numpy.ascontiguousarray(pixels), format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
                frame.pts, frame.time_base = number, Fraction(1, fps)
                container.mux(stream.encode(frame))
            if stream is not None:
                container.mux(stream.encode(None))


def _stream(container: Any, width: int, height: int, fps: int, crf: int) -> Any:
    stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.time_base = Fraction(1, fps)
    context = stream.codec_context
    context.thread_count = 1
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    return stream


def fitted(width: int, height: int, side: int, even: bool = False) -> tuple[int, int]:
    """The size whose long side is at most `side`, never larger than the source; sides at least 2, even if asked for."""
    scale = min(1.0, side / max(width, height))
    sides = max(2, round(width * scale)), max(2, round(height * scale))
    return (sides[0] // 2 * 2, sides[1] // 2 * 2) if even else sides
