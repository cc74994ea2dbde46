"""Looks at one image or video and says what is in it: black, frozen, cut, barred, and what it looks like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy

from backend.data.frames import TARGET_FPS, ClipRange
from backend.data.images import read_image
from backend.data.items import MediaFacts
from backend.data.lint.darkness import Bars, black_frames, find_bars
from backend.data.lint.frame_choice import (
    Run,
    clips_of,
    frame_times,
    look_frames,
    runs_of,
    used_stretches,
    wanted_frames,
)
from backend.data.lint.looks import Look, look_of, look_of_still
from backend.data.lint.motion import find_cuts, find_frozen
from backend.data.scaling import Pixels, Target, resize_pixels
from backend.data.scan import Source
from backend.data.watchdog import MediaReader

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry

# Pixels of the long side of the pictures that are looked at: faults that training sees are visible in them.
LONG_SIDE = 128
# A still is thinned out to about this before it is scaled exactly: an image of 100 million pixels would need 1 GB.
_THINNED = 1024
# Frames that must be black in a row: fewer are the end of a fade or a blink.
_BLACK_IN_A_ROW = 3
# A halt is reported from a second on, or from this part of the shortest clip on; drawings are often held for less.
_FROZEN_SECONDS = 1.0
_FROZEN_PART = 0.4
_FROZEN_LEAST = 5
_KEPT = 20

Span = tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """What is in one source.

    Attributes:
        frames: how many frames were looked at; `black` of them show nothing.
        black_seconds, frozen_seconds: stretches from and to, in seconds of the file; at most 20 of each.
        cuts: seconds at which another shot begins inside a clip, at most 20.
        cut_clips: how many of `clips` clips have such a cut.
        bars: shares (left, top, right, bottom) of the sides that black bars take, None without bars.
        look: what it looks like, None if it is flat.
    """

    frames: int
    black: int = 0
    black_seconds: tuple[Span, ...] = ()
    frozen: int = 0
    frozen_seconds: tuple[Span, ...] = ()
    cuts: tuple[float, ...] = ()
    cut_clips: int = 0
    clips: int = 0
    bars: Bars | None = None
    look: Look | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values that `from_json` takes back."""
        return asdict(self) | {"look": None if self.look is None else list(self.look)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measurement:
        """The measurement that `as_json` described."""
        look, bars = values["look"], values["bars"]
        known: dict[str, Any] = {name: int(values[name]) for name in _COUNTS}
        known |= {name: tuple((float(a), float(b)) for a, b in values[name]) for name in _SPANS}
        known["cuts"] = tuple(float(value) for value in values["cuts"])
        known["bars"] = None if bars is None else tuple(float(value) for value in bars)
        known["look"] = None if look is None else Look(str(look[0]), str(look[1]))
        return cls(**known)


_SPANS = ("black_seconds", "frozen_seconds")
_COUNTS = tuple(item.name for item in fields(Measurement) if item.type == "int")


def small_size(width: int, height: int) -> tuple[int, int]:
    """The size at which a source is looked at; never larger than it is."""
    scale = min(1.0, LONG_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def measure_still(location: str) -> Measurement:
    """Look at an image.

    Raises:
        MediaError: it is broken.
    """
    pixels = read_image(location)
    step = max(1, max(pixels.shape[:2]) // _THINNED)
    pixels = numpy.ascontiguousarray(pixels[::step, ::step])
    small = resize_pixels(pixels, Target(small_size(pixels.shape[1], pixels.shape[0])))
    black = int(black_frames(small[None])[0])
    return Measurement(1, black=black, bars=find_bars(small[None]), look=look_of_still(small))


def measure_video(source: Source, entry: DatasetEntry, media: MediaFacts, reader: MediaReader) -> Measurement:
    """Look at the frames of a video that its clips use (see `used_stretches`), and at five moments of the whole file.

    Frames come at the rate at which training sees them. Memory: at most 725 small pictures, 36 MB, and about 200 MB
    with everything that is computed from them, however long the file is.

    Raises:
        MediaError: a frame that is needed cannot be read, or reading hangs.
        Stopped: the reader was closed.
    """
    clips = clips_of(entry, media)
    if not clips:
        return Measurement(0)
    own = entry.source_fps == "auto" or media.variable_rate
    file_times: Sequence[float] = reader.presentation_times(source.location).tolist() if own and media.fps else ()
    runs = runs_of(used_stretches(clips), frame_times(entry, media, file_times))
    wanted = wanted_frames(runs, media)
    pixels = reader.decode_clip(source.location, wanted, small_size(media.width, media.height))
    place = {number: index for index, number in enumerate(wanted)}
    seconds = _clock(media, file_times)
    looks = pixels[[place[number] for number in look_frames(media)]]
    return _Video(clips, seconds, _frozen_least(clips, media, entry)).measure(
        [(run, pixels[[place[number] for number in run.numbers]]) for run in runs], look_of(looks)
    )


def _clock(media: MediaFacts, times: Sequence[float]) -> Sequence[float]:
    """When each frame of the file is shown, in seconds."""
    if len(times) >= media.frames:
        return times
    return [number / (media.fps or TARGET_FPS) for number in range(media.frames)]


def _frozen_least(clips: Sequence[ClipRange], media: MediaFacts, entry: DatasetEntry) -> int:
    """Frames that must stand still to be a halt."""
    own = media.fps or TARGET_FPS
    # Frames that resampling upwards repeats are looked at once.
    rate = min(TARGET_FPS, own) if entry.source_fps else own
    part = math.ceil(_FROZEN_PART * min(clip.frames for clip in clips))
    return max(_FROZEN_LEAST, min(round(_FROZEN_SECONDS * rate), part))


@dataclass
class _Video:
    """Collects what the runs of one video show."""

    clips: Sequence[ClipRange]
    seconds: Sequence[float]
    frozen_least: int
    black: list[Span] = field(default_factory=list)
    frozen: list[Span] = field(default_factory=list)
    cuts: list[tuple[int, float]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"frames": 0, "black": 0, "frozen": 0})

    def measure(self, runs: Sequence[tuple[Run, Pixels]], look: Look | None) -> Measurement:
        """The measurement of all runs together."""
        for run, pixels in runs:
            self.counts["frames"] += len(pixels)
            self._stand(run, pixels)
            self._cut(run, pixels)
        # A clip has a cut when frames of both shots are in it.
        inside = [{at for at, _ in self.cuts if clip.start < at < clip.end} for clip in self.clips]
        cutting = set().union(*inside)
        bars = find_bars(numpy.concatenate([pixels for _, pixels in runs]))
        return Measurement(
            **self.counts,
            black_seconds=tuple(self.black[:_KEPT]),
            frozen_seconds=tuple(self.frozen[:_KEPT]),
            cuts=tuple(sorted({second for at, second in self.cuts if at in cutting}))[:_KEPT],
            cut_clips=sum(bool(cut) for cut in inside),
            clips=len(self.clips),
            bars=bars,
            look=look,
        )

    def _stand(self, run: Run, pixels: Pixels) -> None:
        """Black stretches, and frozen ones that are not black."""
        dark = black_frames(pixels)
        for first, last in _spans(dark):
            if last - first >= min(_BLACK_IN_A_ROW, len(dark)):
                self.counts["black"] += last - first
                self.black.append(self._span(run, first, last))
        for first, last in find_frozen(pixels, self.frozen_least):
            if not dark[first:last].all():
                self.counts["frozen"] += last - first
                self.frozen.append(self._span(run, first, last))

    def _cut(self, run: Run, pixels: Pixels) -> None:
        for place, _ in find_cuts(pixels):
            self.cuts.append((run.start + run.places[place], round(self.seconds[run.numbers[place]], 3)))

    def _span(self, run: Run, first: int, last: int) -> Span:
        number = run.numbers[last - 1]
        end = self.seconds[number + 1] if number + 1 < len(self.seconds) else self.seconds[number] + self._frame()
        return round(self.seconds[run.numbers[first]], 3), round(end, 3)

    def _frame(self) -> float:
        """Seconds that the last frame is shown."""
        return self.seconds[-1] / (len(self.seconds) - 1) if len(self.seconds) > 1 else 1 / TARGET_FPS


def _spans(marks: Any) -> list[tuple[int, int]]:
    """Stretches (first, one past the last) of consecutive true values."""
    found = []
    place = 0
    for value, group in itertools.groupby(marks.tolist()):
        length = sum(1 for _ in group)
        if value:
            found.append((place, place + length))
        place += length
    return found
