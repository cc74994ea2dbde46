"""What a dataset's sources become: items, each one clip or still with its bucket and the names of its caches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
from numpy.typing import NDArray

from backend.data.buckets import Bucket, Nabla, ResizePlan, plan_source, resize_plan
from backend.data.cache_names import latent_cache_name, text_cache_name
from backend.data.frames import (
    TARGET_FPS,
    ClipRange,
    clip_ranges,
    constant_rate_times,
    resample_times,
    resampled_count,
    shortest_clip,
)
from backend.data.probe import MediaInfo, probe
from backend.data.scan import Source
from backend.data.screen_time import count_at_rate
from backend.data.stamps import Stamp, stamp_of
from backend.errors import UserError

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry


# A strip of 1 x 30,000 pixels that covers 512 x 512 would take gigabytes before it is cropped.
_MAX_SCALED_PIXELS = 200_000_000
# The bucket, the size to crop to before a stretch to it, and why the source cannot be used.
_Sizes = tuple[Bucket, Bucket | None, str | None]


class MediaFacts(NamedTuple):
    """What the items need to know of a source: size as a person sees it, frames (1: a still), frames per second."""

    width: int
    height: int
    frames: int
    fps: float
    seconds: float
    variable_rate: bool


class Item(NamedTuple):
    """One clip or one still of a dataset.

    Attributes:
        source: where it comes from.
        media: what the source is.
        clip: first frame and number of pixel frames, after resampling if the dataset resamples; None for a still.
        bucket: width and height in pixels that it is encoded in.
        latent_name, text_name: file names of its caches.
        stamp: the source as it was looked at.
        cropped: the size that the source covers and is cropped to, if that is then stretched to the bucket; else None.
    """

    source: Source
    media: MediaFacts
    clip: ClipRange | None
    bucket: Bucket
    latent_name: str
    text_name: str
    stamp: Stamp
    cropped: Bucket | None = None

    @property
    def resize_plan(self) -> ResizePlan:
        """How the source is scaled and cropped; where `cropped` is given, the result is stretched to the bucket."""
        return resize_plan(self.media[:2], self.cropped or self.bucket)

    @property
    def frames(self) -> int:
        """Pixel frames; 1 for a still."""
        return 1 if self.clip is None else self.clip.frames

    @property
    def named_size(self) -> tuple[int, int]:
        """Width and height in the name of the latent cache: the source's for a still, the bucket's for a clip."""
        if self.clip is None:
            return self.media.width, self.media.height
        return self.bucket.width, self.bucket.height


# What `Item(...)` does, without the call of a Python function: there may be very many.
_MAKE = functools.partial(tuple.__new__, Item)
# A range of frames, None for a still, and what stands behind the source's key in the name of its cache.
_Clip = tuple[ClipRange | None, str]


class Skipped(NamedTuple):
    """A source without items and why; `broken` ones could not be read, the others do not fit the settings."""

    source: Source
    reason: str
    broken: bool


@dataclass
class ItemPlan:
    """All items of a dataset in the order of its sources, and the sources that give none."""

    items: list[Item] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


Look = Callable[[Source], tuple[Stamp, MediaFacts]]


def look_at(source: Source) -> tuple[Stamp, MediaFacts]:
    """Stamp and probe a source.

    Raises:
        UserError: it is broken or gone.
    """
    # The stamp comes first: a change while the file is probed must not go unnoticed.
    stamp = source_stamp(source)
    return stamp, media_facts(probe(source.location), source.path)


def source_stamp(source: Source) -> Stamp:
    """The stamp of a source.

    Raises:
        UserError: it is gone or cannot be looked at.
    """
    try:
        return stamp_of(source.location)
    except OSError as error:
        raise source_problem(source.location, error) from error


def source_problem(location: str, error: OSError) -> UserError:
    """What to say of a source that cannot be looked at."""
    return UserError(f"{location} cannot be read: {error.strerror or error}. Check the file.")


def media_facts(info: MediaInfo, path: Path) -> MediaFacts:
    """The part of a probe's result that items depend on.

    Raises:
        UserError: nobody knows how many frames a video has.
    """
    if info.kind == "image":
        return MediaFacts(info.width, info.height, 1, 0.0, 0.0, False)
    if not info.frames:
        raise UserError(f"{path} does not tell how many frames it has. Convert it.")
    return MediaFacts(
        info.width, info.height, info.frames, float(info.fps or 0), float(info.seconds or 0), bool(info.variable_rate)
    )


def build_items(
    entry: DatasetEntry, sources: Iterable[Source], *, nabla: Nabla = False, look: Look = look_at
) -> ItemPlan:
    """Turn sources into items.

    `nabla` asks for sides in multiples of 128 pixels. `look` gives stamp and facts of a source; the ledger passes one
    that remembers them.
    """
    plan = ItemPlan()
    sizes: dict[tuple[int, int], _Sizes] = {}
    clips: dict[MediaFacts, list[_Clip]] = {}
    keep = plan.items.append
    for source in sources:
        try:
            stamp, media = look(source)
            size = media[:2]
            if size not in sizes:
                sizes[size] = _sizes(size, entry, nabla)
        except UserError as error:
            plan.skipped.append(Skipped(source, error.message, True))
            continue
        bucket, cropped, trouble = sizes[size]
        if trouble is not None:
            plan.skipped.append(Skipped(source, trouble, False))
            continue
        found = clips.get(media)
        if found is None:
            found = clips[media] = _clips(entry, media, bucket)
        if not found:
            plan.skipped.append(Skipped(source, _too_short(entry, media), False))
        key = source.name
        text_name = text_cache_name(key)
        for clip, ending in found:
            keep(_MAKE((source, media, clip, bucket, key + ending, text_name, stamp, cropped)))
    return plan


def _clips(entry: DatasetEntry, media: MediaFacts, bucket: Bucket) -> list[_Clip]:
    if entry.kind == "image":
        return [(None, latent_cache_name("", media.width, media.height))]
    ranges = clip_ranges(usable_frames(entry, media), entry)
    return [(clip, latent_cache_name("", bucket.width, bucket.height, clip.start, clip.frames)) for clip in ranges]


def _sizes(size: tuple[int, int], entry: DatasetEntry, nabla: Nabla) -> _Sizes:
    bucket, resize = plan_source(size, entry, nabla=nabla)
    cropped = Bucket(*resize.size)
    trouble = None
    if resize.scaled[0] * resize.scaled[1] > _MAX_SCALED_PIXELS:
        trouble = f"is {size[0]} x {size[1]}, too narrow to be cropped to {cropped.width} x {cropped.height}"
    return bucket, None if cropped == bucket else cropped, trouble


def usable_frames(entry: DatasetEntry, media: MediaFacts) -> int:
    """How many frames there are to choose clips from: the stored ones, or those after resampling to 24 a second."""
    if entry.source_fps is None or (entry.source_fps == "auto" and media.seconds <= 0):
        return media.frames
    seconds = media.seconds if entry.source_fps == "auto" else media.frames / entry.source_fps
    return count_at_rate(media.frames, seconds, TARGET_FPS)


def needs_times(entry: DatasetEntry, item: Item) -> bool:
    """Whether the frames of an item are chosen by the presentation times of its file (`source_fps = "auto"`)."""
    return item.clip is not None and entry.source_fps == "auto" and item.media.seconds > 0


def source_frame_numbers(
    entry: DatasetEntry, item: Item, presentation_times: Sequence[float] | NDArray[numpy.float64] | None = None
) -> list[int]:
    """The frames of its source (counted from 0 in the order in which they are shown) that an item consists of.

    As many as `item.frames`, ascending; a frame stands twice where the source is slower than 24 a second. Without
    `source_fps` frames are taken as they are, by number. With a number they are resampled as if the source had exactly
    that rate, with "auto" by the real times: `presentation_times` (seconds, ascending, all frames of the file) are
    needed when `needs_times` says so and are not looked at otherwise. A still is [0].

    Raises:
        UserError: the file ends before the clip does, so it is not what it was when it was looked at.
        ValueError: times are needed and there are none.
    """
    clip = item.clip
    if clip is None:
        return [0]
    if entry.source_fps is None or (entry.source_fps == "auto" and not needs_times(entry, item)):
        return list(range(clip.start, clip.end))
    if entry.source_fps == "auto":
        if presentation_times is None or not len(presentation_times):
            raise ValueError("The frames of this item are chosen by presentation times, and there are none.")
        times = numpy.asarray(presentation_times, dtype=numpy.float64)
    else:
        times = constant_rate_times(item.media.frames, entry.source_fps)
    count = resampled_count(times)
    # Rounded times may make the last frame fall just behind the end; the frame before it is then still on screen.
    if clip.end > count + 1:
        raise UserError(
            f"{item.source.location} ends after {count / TARGET_FPS:.2f} s, and a clip of it goes to "
            f"{clip.end / TARGET_FPS:.2f} s. It changed since it was looked at; look at the dataset again."
        )
    numbers = resample_times(times, start=clip.start, frames=min(clip.end, count) - clip.start)
    return numbers + [len(times) - 1] * (clip.frames - len(numbers))


def _too_short(entry: DatasetEntry, media: MediaFacts) -> str:
    return f"has {usable_frames(entry, media)} frames, and the shortest clip of this dataset has {shortest_clip(entry)}"
