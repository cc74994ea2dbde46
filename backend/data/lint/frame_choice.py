"""Which frames of a video are looked at: those that its clips use, at most half a minute of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from backend.data.frames import (
    TARGET_FPS,
    ClipRange,
    clip_ranges,
    constant_rate_times,
    resample_times,
    resampled_count,
)
from backend.data.items import MediaFacts, usable_frames
from backend.data.lint.looks import MOMENTS

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry

Seconds = NDArray[numpy.float64]

# 30 s at 24 frames a second; as small pictures 20 MB.
MOST_FRAMES = 720
# Of more than that, stretches of four seconds are looked at: long enough to tell a cut from fast motion, and a halt.
_STRETCH = 96


@dataclass(frozen=True)
class Run:
    """Consecutive frames of the (resampled) video from `start` on: `numbers` are the source frames, `places` where in
    the run each of them is shown first (they differ when a slower source is resampled upwards)."""

    start: int
    places: tuple[int, ...]
    numbers: tuple[int, ...]


def used_stretches(clips: Sequence[ClipRange], limit: int = MOST_FRAMES) -> list[tuple[int, int]]:
    """Stretches (first frame, one past the last) of the (resampled) video that clips use, ascending, not touching.

    When they are longer than `limit` frames together: stretches of 96 frames spread evenly over them, first and last
    included, as many as fit.
    """
    merged: list[tuple[int, int]] = []
    for clip in sorted(clips):
        if merged and clip.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], clip.end))
        else:
            merged.append((clip.start, clip.end))
    total = sum(end - start for start, end in merged)
    if total <= limit:
        return merged
    count = max(2, limit // _STRETCH)
    offsets = [(total - _STRETCH) * index // (count - 1) for index in range(count)]
    return [piece for offset in offsets for piece in _pieces(merged, offset, offset + _STRETCH)]


def _pieces(stretches: Sequence[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """The part from `first` to `last` of the stretches laid end to end."""
    found, passed = [], 0
    for start, end in stretches:
        low, high = max(first, passed), min(last, passed + end - start)
        if low < high:
            found.append((start + low - passed, start + high - passed))
        passed += end - start
    return found


def frame_times(entry: DatasetEntry, media: MediaFacts, times: Sequence[float]) -> Seconds | None:
    """Seconds at which the source frames are shown as the dataset takes them; None: frames are taken as they are.

    `times` are the file's own, which count with source_fps = "auto" only.
    """
    if entry.source_fps is None:
        return None
    if entry.source_fps == "auto":
        return numpy.asarray(times) if len(times) else constant_rate_times(media.frames, media.fps or TARGET_FPS)
    return constant_rate_times(media.frames, entry.source_fps)


def runs_of(stretches: Sequence[tuple[int, int]], times: Seconds | None) -> list[Run]:
    """The source frames of stretches of the video, resampled to 24 a second if there are `times`."""
    runs = []
    for start, end in stretches:
        if times is None:
            numbers = list(range(start, end))
        else:
            # The rate of a file may promise a frame or two more than its times give.
            count = max(0, min(end, resampled_count(times)) - start)
            numbers = resample_times(times, start=start, frames=count) if count else []
        firsts = [place for place, number in enumerate(numbers) if place == 0 or number != numbers[place - 1]]
        if firsts:
            runs.append(Run(start, tuple(firsts), tuple(numbers[place] for place in firsts)))
    return runs


def wanted_frames(runs: Sequence[Run], media: MediaFacts) -> list[int]:
    """All source frames to decode, ascending: those of the runs, and those at which looks are taken."""
    moments = look_frames(media)
    return sorted({*itertools.chain.from_iterable(run.numbers for run in runs), *moments})


def look_frames(media: MediaFacts) -> list[int]:
    """The frames of the whole file at which its look is taken, whatever the dataset uses of it."""
    return [min(media.frames - 1, int(moment * media.frames)) for moment in MOMENTS]


def clips_of(entry: DatasetEntry, media: MediaFacts) -> list[ClipRange]:
    """The clips that the dataset makes of a video."""
    return clip_ranges(usable_frames(entry, media), entry)
