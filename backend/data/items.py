"""What a dataset's sources become: items, each one clip or still with its bucket and the names of its caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from backend.data.buckets import Bucket, Nabla, choose_bucket
from backend.data.cache_names import latent_cache_name, text_cache_name
from backend.data.frames import ClipRange, clip_ranges, resampled_count, shortest_clip
from backend.data.probe import MediaInfo, probe
from backend.data.scan import Source
from backend.data.stamps import Stamp, stamp_of
from backend.errors import UserError

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry


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
    """

    source: Source
    media: MediaFacts
    clip: ClipRange | None
    bucket: Bucket
    latent_name: str
    text_name: str
    stamp: Stamp

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
        raise UserError(f"{source.location} cannot be read: {error.strerror or error}. Check the file.") from error


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
    buckets: dict[tuple[int, int], Bucket] = {}
    clips: dict[MediaFacts, list[ClipRange]] = {}
    for source in sources:
        try:
            stamp, media = look(source)
            size = media[:2]
            bucket = buckets.get(size)
            if bucket is None:
                bucket = buckets[size] = choose_bucket(size, entry, nabla=nabla)
        except UserError as error:
            plan.skipped.append(Skipped(source, error.message, True))
            continue
        text_name = text_cache_name(source.name)
        if source.kind == "image":
            name = latent_cache_name(source.name, media.width, media.height)
            plan.items.append(Item(source, media, None, bucket, name, text_name, stamp))
            continue
        ranges = clips.get(media)
        if ranges is None:
            ranges = clips[media] = clip_ranges(usable_frames(entry, media), entry)
        if not ranges:
            plan.skipped.append(Skipped(source, _too_short(entry, media), False))
        for clip in ranges:
            name = latent_cache_name(source.name, bucket.width, bucket.height, clip.start, clip.frames)
            plan.items.append(Item(source, media, clip, bucket, name, text_name, stamp))
    return plan


def usable_frames(entry: DatasetEntry, media: MediaFacts) -> int:
    """How many frames there are to choose clips from: the stored ones, or those after resampling to 24 a second."""
    rate = media.fps if entry.source_fps == "auto" else entry.source_fps
    return resampled_count([0.0], end=media.frames / rate) if rate else media.frames


def _too_short(entry: DatasetEntry, media: MediaFacts) -> str:
    return f"has {usable_frames(entry, media)} frames, and the shortest clip of this dataset has {shortest_clip(entry)}"
