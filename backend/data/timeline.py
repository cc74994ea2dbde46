"""When each frame of a video is shown: read from the packets, without decoding."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
from av.error import FFmpegError
from numpy.typing import NDArray

from backend.data.container import open_video
from backend.data.formats import MediaError

_CHECK_EVERY = 64
_HALF_FRAME = 0.5
_FALLBACK_RATE = Fraction(25)


@dataclass(frozen=True)
class Timeline:
    """The frames of one video stream in the order in which they are shown.

    `ticks` int64 [N]: presentation times in units of `unit` seconds, ascending. `keys` int64: those of the frames
    from which decoding can start, hidden ones included. `complete`: the file was read to its end, else only the first
    N frames are known. `stamped`: the file gives every frame a time of its own; if not, `ticks` counts frames at the
    average rate, `keys` is empty and frames can only be found by counting from the start.
    `packets`: how many frames the file stores, hidden and undecodable ones included.
    """

    ticks: NDArray[numpy.int64]
    keys: NDArray[numpy.int64]
    unit: Fraction
    complete: bool
    stamped: bool
    packets: int

    @property
    def seconds(self) -> NDArray[numpy.float64]:
        """float64 [N]: when each frame appears, the first one at 0."""
        return (self.ticks - self.ticks[:1]).astype(numpy.float64) * float(self.unit)

    def key_before(self, tick: int) -> int | None:
        """The last key at or before a time; None when decoding has to start with the file."""
        place = int(numpy.searchsorted(self.keys, tick, side="right"))
        return int(self.keys[place - 1]) if place > 1 else None


def varies(seconds: NDArray[Any], measured_rate: float) -> bool:
    """Whether some frame is shown more than half a frame away from where the average rate would put it."""
    even = seconds[0] + numpy.arange(len(seconds)) / measured_rate
    return bool(numpy.abs(seconds - even).max() > _HALF_FRAME / measured_rate)


def read_timeline(path: str | Path, until: int | None = None, alive: Callable[[], None] | None = None) -> Timeline:
    """Read the packets of a video; with `until`, only as far as the place of frame number `until` is certain.

    A damaged end is left out. Frames that an edit list hides, and those before the first key, are not counted.

    Raises:
        MediaError: the file cannot be opened or holds no frame.
    """
    packets: list[tuple[int | None, bool, bool]] = []
    certain_before = None
    with open_video(path) as (container, stream):
        rate, unit = stream.average_rate or stream.guessed_rate or _FALLBACK_RATE, stream.time_base
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
                if len(packets) % _CHECK_EVERY:
                    continue
                if alive is not None:
                    alive()
                if until is not None and _certain(packets, packet.dts, until):
                    certain_before = packet.dts
                    break
        except FFmpegError:
            pass  # What comes after the damage is not there, and whoever asks for it is told so.
    timeline = _build(packets, unit or 1 / rate, rate, certain_before)
    if not len(timeline.ticks):
        raise MediaError(path, "holds no frame of video. Copy or convert it again.")
    return timeline


def _certain(packets: list[tuple[int | None, bool, bool]], decoded: int | None, until: int) -> bool:
    """No later packet can be shown before the last decoding time, so the frames up to it keep their places."""
    if decoded is None or len(packets) <= until:
        return False
    times = sorted(pts for pts, _, hidden in packets if pts is not None and not hidden)
    return len(times) > until and times[until] < decoded


def _build(
    packets: list[tuple[int | None, bool, bool]], unit: Fraction, rate: Fraction, certain_before: int | None
) -> Timeline:
    complete = certain_before is None
    first = next((place for place, (_, key, _) in enumerate(packets) if key), 0)
    usable = packets[first:]
    shown = [pts for pts, _, hidden in usable if not hidden]
    times = sorted(pts for pts in shown if pts is not None)
    if len(times) != len(shown) or len(set(times)) != len(times):
        ticks = numpy.arange(len(shown), dtype=numpy.int64)
        return Timeline(ticks, ticks[:0], 1 / Fraction(rate), complete, False, len(packets))
    keys = sorted(pts for pts, key, _ in usable if key and pts is not None)
    start = usable[0][0] if usable else None
    # Pictures that precede the first key in time need what was cut off before it.
    times = [pts for pts in times if start is None or pts >= start]
    if certain_before is not None:
        times = [pts for pts in times if pts < certain_before]
    return Timeline(_ticks(times), _ticks(keys), Fraction(unit), complete, True, len(packets))


def _ticks(values: list[int]) -> NDArray[numpy.int64]:
    return numpy.array(values, dtype=numpy.int64)


class TimelineCache:
    """The timelines of the last few files, so that many clips from one file read its packets once."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._known: OrderedDict[tuple[str, int, int], Timeline] = OrderedDict()

    def get(self, path: str | Path, until: int | None = None, alive: Callable[[], None] | None = None) -> Timeline:
        """`read_timeline`, remembered while the file keeps its size and time of change."""
        try:
            facts = os.stat(path)
        except OSError as error:
            raise MediaError(path, f"cannot be opened: {error.strerror or error}. Check the path.") from None
        key = (str(path), facts.st_size, facts.st_mtime_ns)
        known = self._known.pop(key, None)
        if known is None or not _reaches(known, until):
            known = read_timeline(path, until, alive)
            if not _reaches(known, until):
                known = read_timeline(path, None, alive)
        self._known[key] = known
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return known


def _reaches(timeline: Timeline, until: int | None) -> bool:
    return timeline.complete or (until is not None and len(timeline.ticks) > until)
