"""The page docs/dataset.md: every key of a dataset configuration, from the definitions, and an example."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.config.dataset import DEFAULTS, FOREIGN_KEYS, CommonKeys, ImageKeys, VideoKeys, dataset_ranges

DATASET_PAGE = Path(__file__).resolve().parents[2] / "docs" / "dataset.md"

#: A complete configuration; a test loads it.
EXAMPLE = """[general]                              # holds for every dataset below that does not say otherwise
resolution = [768, 512]                # width, height
enable_bucket = true                   # keep aspect ratios, same area
caption_extension = ".txt"
caption_prefix = "sks style"           # a trigger word before every caption

[[datasets]]
video_directory = "data/clips"         # a.mp4 with a.txt beside it
cache_directory = "cache/clips"        # each dataset its own
target_frames = [25, 49]               # each 4n + 1
frame_extraction = "uniform"
frame_sample = 4                       # four clips of each length
source_fps = "auto"                    # resample to 24 frames a second, whatever the files have
recursive = true
exclude = ["broken.mp4", "drafts/*"]

[[datasets]]
video_jsonl_file = "data/long.jsonl"   # {"video_path": "long.mp4", "caption": "..."} on each line
cache_directory = "cache/long"
frame_extraction = "full"
max_frames = 121
batch_size = 1

[[datasets]]
image_directory = "data/stills"
cache_directory = "cache/stills"
bucket_no_upscale = true
num_repeats = 5
caption_dropout = 0.1
validation_split = 0.05
"""

_INTRODUCTION = """# Dataset configuration

Written by `make docs` from the definitions of the keys; do not edit by hand.

A dataset configuration is a TOML file (or JSON of the same structure) with an optional table `[general]` and one table
`[[datasets]]` for each folder or JSONL file. A key is looked up in its `[[datasets]]` table, then in `[general]`, then
in the defaults. Everything that is wrong is listed at once, with table and key. Relative paths belong to the folder
that the program is started in.

Images are PNG, JPEG, WebP, BMP and AVIF, videos MP4, WebM, AVI, MKV, MOV, FLV, WMV, M4V and MPEG, in any letter case. A
caption is a text file in UTF-8 with the name of its source and `caption_extension`, or stands in the JSONL file. In a
JSONL file a video may be a folder of images, which are its frames in the order of their names.
"""

_WORDS = {
    "resolution": "whole number or `[width, height]`",
    "target_frames": "list of whole numbers",
    "source_fps": 'number or `"auto"`',
    "exclude": "list of text",
    "frame_extraction": "one of `head`, `chunk`, `slide`, `uniform`, `full`",
    "image_directory": "folder",
    "video_directory": "folder",
    "cache_directory": "folder",
    "image_jsonl_file": "file",
    "video_jsonl_file": "file",
}
_DEFAULT_WORDS = {
    "cache_directory": "the source's folder; required with JSONL",
    "image_directory": "this or `image_jsonl_file`",
    "image_jsonl_file": "this or `image_directory`",
    "video_directory": "this or `video_jsonl_file`",
    "video_jsonl_file": "this or `video_directory`",
    "source_fps": "frames as they are",
}
_EXTRACTION = """## Which frames become clips

| `frame_extraction` | Clips of a video, for each length in `target_frames` |
| --- | --- |
| `head` | the first frames |
| `chunk` | one piece after the other; what is left over is dropped |
| `slide` | starts `frame_stride` frames apart |
| `uniform` | `frame_sample` starts evenly from the first to the last possible one |
| `full` | one clip of the whole video, at most `max_frames`, rounded down to 4n + 1, without `target_frames` |

Videos that are too short for every length are listed with the reason, never dropped in silence. With `source_fps` a
video is first brought to 24 frames a second: frame k is the one that is on screen at k / 24 seconds, so frames are left
out of a faster source and repeated of a slower one. A number means that the source has exactly this rate; `"auto"`
takes the times in each file.
"""


_IGNORED = """## Keys that are ignored

Other trainers have them for other models. They give a notice and stay in the file.

"""


def dataset_page() -> str:
    """The whole page as Markdown."""
    common = list(CommonKeys.model_fields)
    images = [key for key in ImageKeys.model_fields if key not in common]
    videos = [key for key in VideoKeys.model_fields if key not in common]
    parts = [
        _INTRODUCTION,
        "## Keys of `[general]` and of every `[[datasets]]` table\n\n" + _key_table(common),
        "## Keys of `[[datasets]]` tables of images\n\n" + _key_table(images),
        "## Keys of `[[datasets]]` tables of videos\n\n" + _key_table(videos),
        _EXTRACTION,
        _IGNORED + _table(["Key", "For"], [[f"`{key}`", meaning] for key, meaning in FOREIGN_KEYS.items()]),
        f"## Example\n\n```toml\n{EXAMPLE}```\n",
    ]
    return "\n".join(parts)


def _key_table(keys: list[str]) -> str:
    ranges = dataset_ranges()
    rows = [[f"`{key}`", _type(key), _default(key), ranges.get(key, ""), _meaning(key)] for key in keys]
    return _table(["Key", "Type", "Default", "Range", "Meaning"], rows)


def _meaning(key: str) -> str:
    fields: Mapping[str, Any] = {**ImageKeys.model_fields, **VideoKeys.model_fields}
    return str(fields[key].description).replace("|", "\\|")


def _type(key: str) -> str:
    if key in _WORDS:
        return _WORDS[key]
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[type(DEFAULTS[key])]


def _default(key: str) -> str:
    if key in _DEFAULT_WORDS:
        return _DEFAULT_WORDS[key]
    value = DEFAULTS[key]
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
