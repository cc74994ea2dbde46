"""Makes a dataset file from a folder: what is in it decides sizes, lengths and rates; comments say why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from backend.config.dataset import DatasetEntry, dataset_config
from backend.config.dataset_document import DatasetDocument, Value
from backend.config.tasks import valid_frames
from backend.data.items import MediaFacts, look_at, media_facts, usable_frames
from backend.data.scan import Source, scan_dataset
from backend.errors import UserError
from backend.files import safe_name
from k5ui.datasets.captions import CAPTION_SUFFIXES
from k5ui.datasets.readers import SharedReader

KINDS = ("video", "image")
TINY_SIDE = 128
_SAMPLES = 12
_LONGEST_CLIP = 121
_DEMO_CLIP = 17
_RATE_TOLERANCE = 0.01
_FPS = 24

_HEAD = """\
# Dataset made by K5 Studio from {folder}.
# What stands in [general] holds for every [[datasets]] table below, unless the table says otherwise.

[general]
{size}
# Captions: a text file beside each clip or image, of the same name.
caption_extension = "{extension}"
# Items of one size that a training step takes, and how often an epoch shows each item.
batch_size = 1
num_repeats = 1
"""
_SMALL = """\
# The sources are tiny, so everything is brought to 64 x 64, the size of the demo models.
resolution = [64, 64]
enable_bucket = false"""
_LARGE = """\
# About as many pixels as 512 x 512 in the aspect of each source; smaller sources keep their own size.
resolution = [512, 512]
enable_bucket = true
bucket_no_upscale = true"""


@dataclass(frozen=True)
class Found:
    """What a folder holds of one kind: how many sources, whether they lie in folders inside, and what some of them
    are."""

    count: int
    recursive: bool
    samples: tuple[MediaFacts, ...]
    extension: str

    @property
    def side(self) -> int:
        """The long side of the middle one; 0 if none could be looked at."""
        return median_low([max(media.width, media.height) for media in self.samples]) if self.samples else 0


def look_into(folder: Path, reader: SharedReader) -> dict[str, Found]:
    """What a folder holds, by kind; folders inside count only when there is nothing in the folder itself.

    Raises:
        UserError: it is no folder, cannot be read, or holds no images and no videos.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder that exists. Check the path.", "folder")
    found: dict[str, Found] = {}
    for recursive in (False, True):
        for kind in KINDS:
            sources = scan_dataset(_entry(kind, folder, {"recursive": recursive})).sources
            if sources:
                found[kind] = Found(len(sources), recursive, _samples(sources, reader), _extension(sources))
        if found:
            return found
    raise UserError(f"There are no images and no videos in {folder}. Choose another folder.", "folder")


def create(folder: Path, name: str | None, home: Path, caches: Path, reader: SharedReader) -> Path:
    """Write `<home>/<name>.toml` for a folder and return its path; caches go to `<caches>/<name>/<kind>`.

    Raises:
        UserError: see `look_into`; or the file cannot be written.
    """
    found = look_into(folder, reader)
    stem = _free_name(safe_name(name or folder.name, "dataset"), home, caches)
    first = next(iter(found.values()))
    tiny = 0 < max(item.side for item in found.values()) <= TINY_SIDE
    general: dict[str, Any] = {"resolution": 64} if tiny else {"resolution": 512, "enable_bucket": True}
    document = DatasetDocument.new(home / f"{stem}.toml")
    shown = folder.name if folder.name.isprintable() else "a folder"
    size = _SMALL if tiny else _LARGE
    document.replace_text(_HEAD.format(folder=shown.replace("\\", "/"), size=size, extension=first.extension))
    for kind, item in found.items():
        table = table_for(kind, folder, item, caches / stem / kind, general, tiny)
        document.replace_text(f"{document.text}\n{_note(kind, item, table)}\n")
        if item.extension != first.extension:
            table["caption_extension"] = item.extension
        document.add_dataset(table)
    document.config()
    document.save()
    return document.path


def table_for(
    kind: str, folder: Path, found: Found, cache: Path, general: Mapping[str, Any], tiny: bool
) -> dict[str, Value]:
    """The keys of a [[datasets]] table for a folder: lengths from its shortest clip, a rate where files are not at
    24."""
    table: dict[str, Value] = {f"{kind}_directory": os.fspath(folder), "cache_directory": os.fspath(cache)}
    if found.recursive:
        table["recursive"] = True
    if kind == "video":
        resample = any(media.seconds > 0 and not _is_24(media) for media in found.samples)
        if resample:
            table["source_fps"] = "auto"
        entry = _entry(kind, folder, dict(general) | ({"source_fps": "auto"} if resample else {}))
        lengths = [usable_frames(entry, media) for media in found.samples]
        longest = _DEMO_CLIP if tiny else _LONGEST_CLIP
        table["target_frames"] = [valid_frames(min([longest, *lengths]))]
        table["frame_extraction"] = "head"
    return table


def _is_24(media: MediaFacts) -> bool:
    return not media.variable_rate and abs(media.fps - _FPS) <= _FPS * _RATE_TOLERANCE


def _note(kind: str, found: Found, table: Mapping[str, Value]) -> str:
    lines = [f"# {found.count} {kind}{'s' if found.count != 1 else ''}."]
    if "source_fps" in table:
        lines.append('# source_fps = "auto": not all are at 24 frames a second, so clips are resampled to 24.')
    if kind == "video":
        lines.append("# target_frames are 4n + 1; head takes the first frames. The length fits the shortest one found.")
    return "\n".join(lines)


def _entry(kind: str, folder: Path, more: Mapping[str, Any]) -> DatasetEntry:
    table = {f"{kind}_directory": os.fspath(folder), **more}
    return dataset_config({"datasets": [table]}).datasets[0]


def _samples(sources: Sequence[Source], reader: SharedReader) -> tuple[MediaFacts, ...]:
    """Some sources over the whole list, those that can be read."""
    step = max(1, len(sources) // _SAMPLES)
    found: list[MediaFacts] = []
    for source in sources[::step][:_SAMPLES]:
        try:
            if source.kind == "image":
                found.append(look_at(source)[1])
            else:
                found.append(media_facts(reader.get().probe(source.location), source.path))
        except UserError:
            continue  # the look at the finished dataset names it
    return tuple(found)


def _extension(sources: Sequence[Source]) -> str:
    """The commonest ending of the caption files beside the sources, .txt if there are none."""
    stems = {os.path.splitext(source.location)[0] for source in sources}
    counts: Counter[str] = Counter()
    for folder in {os.path.dirname(stem) for stem in stems}:
        with os.scandir(folder) as items:
            ends = [(os.path.splitext(item.path)) for item in items]
        counts.update(end for stem, end in ends if end.lower() in CAPTION_SUFFIXES and stem in stems)
    return counts.most_common(1)[0][0] if counts else ".txt"


def _free_name(stem: str, home: Path, caches: Path) -> str:
    """A name that no dataset has and that no caches of an earlier one lie under."""
    for number in range(1, 10_000):
        name = stem if number == 1 else f"{stem}-{number}"
        if not os.path.lexists(home / f"{name}.toml") and not os.path.lexists(caches / name):
            return name
    raise UserError(f"There are too many datasets named {stem}. Give another name.", "name")


def free_cache(folder: Path, used: Sequence[str]) -> Path:
    """A cache folder beside `folder` that no table uses."""
    taken = {os.path.realpath(path) for path in used}
    for number in range(1, 10_000):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if os.path.realpath(candidate) not in taken and not os.path.lexists(candidate):
            return candidate
    raise UserError("There are too many cache folders here. Give cache_directory in the text.", "cache_directory")
