"""Which frames of a video make its clips: ranges by extraction mode, and source frames for a resampled rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from backend.config.dataset import DatasetEntry
from backend.config.tasks import valid_frames
from backend.data.screen_time import count_at_rate, frames_at, shown_seconds

TARGET_FPS = 24


@dataclass(frozen=True, order=True)
class ClipRange:
    """`frames` frames (4n + 1) from frame `start` of the (resampled) video, both counted from 0."""

    start: int
    frames: int

    @property
    def end(self) -> int:
        """One past the last frame."""
        return self.start + self.frames


def clip_ranges(frame_count: int, entry: DatasetEntry) -> list[ClipRange]:
    """The clips of a video of `frame_count` frames, lengths in ascending order, starts in ascending order in each.

    head: the first frames. chunk: pieces one after the other, the remainder is dropped. slide: starts `frame_stride`
    apart. uniform: `frame_sample` starts evenly from the first to the last possible one, rounded down (a short video
    may give one start several times, which is kept once; one sample is head). full: one clip of the whole video, at
    most `max_frames`, rounded down to 4n + 1. A length that does not fit gives nothing; see `shortest_clip`.
    """
    if frame_count < 1:
        return []
    if entry.frame_extraction == "full":
        return [ClipRange(0, valid_frames(min(frame_count, entry.max_frames)))]
    found: list[ClipRange] = []
    for frames in entry.target_frames:
        last = frame_count - frames
        if last >= 0:
            found += [ClipRange(start, frames) for start in _starts(last, frames, entry)]
    return found


def _starts(last: int, frames: int, entry: DatasetEntry) -> Sequence[int]:
    """Ascending starts of clips of `frames` frames, none after `last`."""
    if entry.frame_extraction == "chunk":
        return range(0, last + 1, frames)
    if entry.frame_extraction == "slide":
        return range(0, last + 1, entry.frame_stride)
    if entry.frame_extraction == "uniform" and entry.frame_sample > 1:
        gaps = entry.frame_sample - 1
        # More samples than starts would walk over every start many times.
        if gaps >= last:
            return range(last + 1)
        return sorted({last * index // gaps for index in range(entry.frame_sample)})
    return [0]


def shortest_clip(entry: DatasetEntry) -> int:
    """Frames that a video must have (after resampling) to give any clip."""
    return 1 if entry.frame_extraction == "full" else entry.target_frames[0]


def needed_frames(entry: DatasetEntry) -> int | None:
    """Frames from the start that all clips together may need, None: up to the end (a decoder may stop after these)."""
    if entry.frame_extraction == "head" or (entry.frame_extraction == "uniform" and entry.frame_sample == 1):
        return entry.target_frames[-1]
    return valid_frames(entry.max_frames) if entry.frame_extraction == "full" else None


def resampled_count(times: Sequence[float] | NDArray[numpy.float64]) -> int:
    """Frames at 24 a second of a video whose frames are shown at `times` (seconds, ascending)."""
    return count_at_rate(len(times), shown_seconds(times), TARGET_FPS)


def resample_times(
    times: Sequence[float] | NDArray[numpy.float64], *, start: int = 0, frames: int | None = None
) -> list[int]:
    """Source frame of each of `frames` frames (default: all to the end) from frame `start` of the video at 24 a second.

    `times` are presentation times in seconds, ascending, at any spacing. Frame k is shown at times[0] + k / 24 and is
    the source frame that is on screen then (see `backend.data.screen_time`): frames are dropped when the source is
    faster and repeated when it is slower, so the speed stays.

    Raises:
        ValueError: the times do not ascend, or the range leaves the video.
    """
    shown = numpy.asarray(times, dtype=numpy.float64)
    if (numpy.diff(shown) < 0).any():
        raise ValueError("Presentation times must ascend.")
    count = resampled_count(shown)
    frames = count - start if frames is None else frames
    if start < 0 or frames < 0 or start + frames > count:
        raise ValueError(f"Frames {start} to {start + frames} are not all in a video of {count} frames.")
    if not frames:
        return []
    return frames_at(shown, numpy.arange(start, start + frames) / TARGET_FPS).tolist()


def constant_rate_times(frame_count: int, source_fps: float) -> NDArray[numpy.float64]:
    """Presentation times in seconds of `frame_count` frames at a stated constant rate; for a given `source_fps`."""
    return numpy.arange(frame_count) / source_fps
