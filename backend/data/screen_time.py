"""Which frame is on screen at a moment: one rule for resampling, for decoding by time, and for counting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

# Seconds. Containers round presentation times to ticks, Matroska to milliseconds; the first time and a later one may
# each be half a tick off, and a frame that is late by no more than that is on screen.
_TOLERANCE = 1.1e-3


def tolerance(frames: int, seconds: float) -> float:
    """Seconds that a frame may be late: 1.1 ms, and at most a quarter of a frame of a video of this length."""
    return min(_TOLERANCE, seconds / (4 * frames)) if frames else 0.0


def shown_seconds(times: Sequence[float] | NDArray[numpy.float64]) -> float:
    """How long a video is: from its first time to its last, plus the mean duration of a frame; 0 for one frame."""
    if len(times) < 2:
        return 0.0
    span = float(times[-1]) - float(times[0])
    return span + span / (len(times) - 1)


def count_at_rate(frames: int, seconds: float, fps: float) -> int:
    """Frames at `fps` that a video of `frames` frames and `seconds` has; a single frame stays one, whatever its time.

    Frame k exists if it would be shown at k / fps before the end.
    """
    if frames < 2:
        return frames
    return max(1, math.ceil((seconds - tolerance(frames, seconds)) * fps))


def frames_at(
    times: Sequence[float] | NDArray[numpy.float64], moments: Sequence[float] | NDArray[numpy.float64]
) -> NDArray[numpy.int64]:
    """int64 [N]: the frame on screen at each of `moments` (seconds since the first frame).

    That is the last frame whose time has come (see `tolerance`); before the first it is the first, after the last the
    last. `times` are presentation times in seconds, ascending.
    """
    shown = numpy.asarray(times, dtype=numpy.float64)
    shown = shown - shown[0]
    late = tolerance(len(shown), shown_seconds(shown))
    places = numpy.searchsorted(shown, numpy.asarray(moments, dtype=numpy.float64) + late, side="right") - 1
    return numpy.maximum(places, 0).astype(numpy.int64)
