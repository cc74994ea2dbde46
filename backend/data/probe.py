"""What an image or a video is, found quickly: headers, the index, and at most one decoded frame."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
from av.error import FFmpegError
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from backend.data.container import open_video
from backend.data.formats import MediaError, kind_of
from backend.data.frame_folders import frame_files
from backend.data.images import EXIF_ROTATIONS, image_facts
from backend.data.scaling import orientation_of, seen_size
from backend.data.screen_time import shown_seconds
from backend.data.timeline import TimelineCache, varies

# Rates in headers are rounded, measured ones too; a header that is further off is not believed.
_RATE_TOLERANCE = 0.01
# Seconds: twice what the coarsest usual clock of a file, 1/600 s, rounds.
_ROUNDING = 2e-3


@dataclass(frozen=True)
class MediaInfo:
    """An image, a video or a folder of frames.

    `width` and `height` are those that a person sees: turned, and with pixels made square. `frames`, `fps` (the average
    rate as the header says it, if that is no more than 1 % off) and `seconds` (measured, to the end of the last frame):
    an image has 1, None, None; a folder of frames has no rate. `variable_rate`: some frame is
    shown more than half a frame away from its place at the average rate. `rotation`: clockwise degrees that were
    applied to the stored picture, mirrored left to right before if `mirrored`.
    """

    kind: str
    width: int
    height: int
    frames: int
    fps: float | None
    seconds: float | None
    codec: str
    variable_rate: bool = False
    rotation: int = 0
    mirrored: bool = False


def probe(path: str | Path, timelines: TimelineCache | None = None) -> MediaInfo:
    """Look at a media file; no pixel of an image is decoded, one frame of a video.

    The number of frames comes from the index of an MP4 or MOV file where PyAV offers it, else from the packets.

    Raises:
        MediaError: missing, broken, cut off, or of an unknown kind.
    """
    if os.path.isdir(path):
        files = frame_files(path)
        width, height, _, _ = image_facts(files[0])
        return MediaInfo("video", width, height, len(files), None, None, "images")
    kind = kind_of(path)
    if kind is None:
        raise MediaError(path, "is neither an image nor a video by its extension. Rename or convert it.")
    if kind == "image":
        width, height, orientation, codec = image_facts(path)
        rotation, mirrored = EXIF_ROTATIONS[orientation]
        return MediaInfo("image", width, height, 1, None, None, codec, rotation=rotation, mirrored=mirrored)
    return _probe_video(path, timelines or TimelineCache(1))


def _probe_video(path: str | Path, timelines: TimelineCache) -> MediaInfo:
    with open_video(path) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        said = stream.average_rate or stream.guessed_rate
        stored, is_mov = stream.frames, container.format.name.startswith("mov")
        seconds = _index_seconds(path, stream) if is_mov and stored else None
        frame = _first_frame(path, container, stream)
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    fps, variable = (None, True) if seconds is None else _rate(seconds, said)
    # Decoding times have the gaps of presentation times in another order, so only an even rate can be told by them.
    if seconds is None or not _even(seconds):
        timeline = timelines.get(path)
        if is_mov and timeline.packets < stored:
            raise MediaError(path, f"is cut off: {timeline.packets} of {stored} frames are there. Copy it again.")
        seconds = timeline.seconds
        fps, variable = _rate(seconds, said)
    count = len(seconds)
    length = shown_seconds(seconds) or (1 / fps if fps else None)
    width, height = seen_size(frame, aspect)
    orientation = orientation_of(frame)
    return MediaInfo(
        *("video", width, height, count, fps, length, codec, variable),
        rotation=orientation.degrees,
        mirrored=orientation.mirrored,
    )


def _even(seconds: NDArray[numpy.float64]) -> bool:
    """Whether frames follow each other at one rate, but for the rounding of their times."""
    even = numpy.linspace(seconds[0], seconds[-1], len(seconds))
    return bool(numpy.abs(seconds - even).max() <= _ROUNDING)


def _rate(seconds: NDArray[numpy.float64], said: Fraction | None) -> tuple[float | None, bool]:
    """The average rate, as exact as the header says it, and whether the frames keep to it."""
    span = float(seconds[-1] - seconds[0])
    if len(seconds) < 2 or span <= 0:
        return (float(said) if said else None), False
    measured = (len(seconds) - 1) / span
    if said and abs(float(said) / measured - 1) < _RATE_TOLERANCE:
        # Counts are exact, times are rounded: the measured rate decides about places, the said one is reported.
        return float(said), varies(seconds, measured)
    return measured, varies(seconds, measured)


def _index_seconds(path: str | Path, stream: Any) -> NDArray[numpy.float64] | None:
    """Decoding times of the frames that an MP4 index lists and shows; None if this PyAV does not give the index.

    Decoding times have the gaps of presentation times, in another order: enough for the count and a steady rate.

    Raises:
        MediaError: the index points behind the end of the file.
    """
    entries = list(getattr(stream, "index_entries", ()))
    if not entries or len(entries) < stream.frames:
        return None
    end, size = max(entry.pos + entry.size for entry in entries), os.path.getsize(path)
    if end > size:
        raise MediaError(path, f"is cut off: {size} of at least {end} bytes are there. Copy it again.")
    first = next((place for place, entry in enumerate(entries) if entry.is_keyframe), 0)
    times = [entry.timestamp for entry in entries[first:] if not entry.is_discard]
    if not times:
        return None
    return (numpy.array(times, dtype=numpy.int64) - times[0]).astype(numpy.float64) * float(stream.time_base)


def _first_frame(path: str | Path, container: Any, stream: Any) -> VideoFrame:
    failure = "no frame can be decoded"
    try:
        for packet in container.demux(stream):
            try:
                for frame in packet.decode():
                    return frame
            except FFmpegError as error:
                failure = error.strerror or failure
    except FFmpegError as error:
        failure = error.strerror or failure
    raise MediaError(path, f"is broken ({failure}). Copy or convert it again.")
