"""What a dataset configuration says: typed tables, [general] inherited, every mistake listed with table and key.

The keys are those of musubi-tuner that have a meaning for Kandinsky 5, and some of ours. A key is looked up in its
[[datasets]] table, then in [general], then in the defaults. Fields of problems count tables from 0: datasets[0].
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from backend.config.dataset_text import decode, parse_text, read_bytes, shorten, value_problem
from backend.config.tasks import valid_frames
from backend.errors import Problem, Problems

Kind = Literal["image", "video"]
FrameExtraction = Literal["head", "chunk", "slide", "uniform", "full"]

SIZE_STEP = 16
_MIN_SIDE, _MAX_SIDE = 32, 8192
_MAX_FRAMES = 100_000
_MAX_PROBLEMS = 100
_MAX_DATASETS = 5000
_MAX_TEXT = 10_000
_MAX_EXCLUDED = 10_000
_MAX_IDENTITY = 4096

# Keys that other trainers accept for other model families, and what they are for: named, ignored.
FOREIGN_KEYS: Mapping[str, str] = {
    "control_directory": "models that edit or follow a control picture",
    "control_resolution": "image editing models",
    "no_resize_control": "image editing models",
    "flux_kontext_no_resize_control": "FLUX Kontext",
    "qwen_image_edit_no_resize_control": "Qwen-Image-Edit",
    "qwen_image_edit_control_resolution": "Qwen-Image-Edit",
    "multiple_target": "Qwen-Image-Layered",
    "fp_latent_window_size": "FramePack",
    "fp_1f_clean_indices": "FramePack",
    "fp_1f_target_index": "FramePack",
    "fp_1f_no_post": "FramePack",
}


def _fail(message: str) -> PydanticCustomError:
    # The sentence is a value of the template, so that braces in what a person wrote are no placeholders.
    return PydanticCustomError("dataset", "{sentence}", {"sentence": message})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _resolution(value: Any) -> tuple[int, int]:
    sides = [value, value] if _whole(value) else value
    if not isinstance(sides, list) or len(sides) != 2 or not all(_whole(side) for side in sides):
        raise _fail(f"must be one whole number or [width, height], not {shorten(value)}.")
    if not all(_MIN_SIDE <= side <= _MAX_SIDE for side in sides):
        raise _fail(f"must lie between {_MIN_SIDE} and {_MAX_SIDE} pixels, not {shorten(value)}.")
    return sides[0], sides[1]


def _target_frames(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(_whole(item) for item in value):
        raise _fail(f"must be a list of whole numbers such as [1, 25, 45], not {shorten(value)}.")
    if not all(1 <= item <= _MAX_FRAMES for item in value):
        raise _fail(f"must lie between 1 and {_MAX_FRAMES} frames, not {shorten(value)}.")
    return tuple(value)


def _source_fps(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(f'must be a number of frames per second or "auto", not {shorten(value)}.')
    if not math.isfinite(value) or not 0.1 <= value <= 1000:
        raise _fail(f"must lie between 0.1 and 1000 frames per second, not {shorten(value)}.")
    return float(value)


def _exclude(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise _fail(f'must be a list of paths or patterns such as ["a.mp4", "old/*"], not {shorten(value)}.')
    if len(value) > _MAX_EXCLUDED or any(len(item) > _MAX_IDENTITY for item in value):
        raise _fail(f"has more than {_MAX_EXCLUDED} entries, or one that is too long. Write patterns.")
    return tuple(value)


def _path(value: str) -> str:
    if not value.strip():
        raise _fail("is empty. Give a path.")
    return value


def _caption_extension(value: str) -> str:
    if not value.strip() or "/" in value or "\\" in value or len(value) > 60:
        raise _fail(f'must be the end of a file name such as ".txt", not {shorten(value) or "nothing"}.')
    return value if "." in value else f".{value}"


_PathText = Annotated[str, AfterValidator(_path)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class CommonKeys(_Table):
    """Keys of [general] and of every [[datasets]] table; None: not given."""

    resolution: Annotated[tuple[int, int] | None, PlainValidator(_resolution)] = Field(
        None, description="Target size, one number or [width, height]; an area when buckets are on."
    )
    enable_bucket: bool | None = Field(None, description="Keep aspect ratios: choose a size of the same area.")
    bucket_no_upscale: bool | None = Field(None, description="With buckets: smaller sources keep their own size.")
    caption_extension: Annotated[str, AfterValidator(_caption_extension)] | None = Field(
        None, description="End of the caption files' names."
    )
    batch_size: int | None = Field(None, ge=1, le=1024, description="Items of one size in a training step.")
    num_repeats: int | None = Field(None, ge=1, le=100_000, description="How often an epoch shows each item.")
    enabled: bool | None = Field(None, description="Off: the dataset stays in the file and is not used.")
    recursive: bool | None = Field(None, description="Also use the folders inside the folder.")
    caption_prefix: str | None = Field(
        None, max_length=_MAX_TEXT, description="Text before every caption, such as a trigger word."
    )
    caption_dropout: float | None = Field(None, ge=0, le=1, description="Share of steps trained without a caption.")
    validation_split: float | None = Field(None, ge=0, le=0.9, description="Share of the sources kept for validation.")
    exclude: Annotated[tuple[str, ...] | None, PlainValidator(_exclude)] = Field(
        None,
        description="Sources that are left out: paths inside the folder (or as the JSONL file has them) with /, or "
        "patterns with *, ? and [...]. The files stay.",
    )


class ImageKeys(CommonKeys):
    """Keys of a [[datasets]] table of images."""

    image_directory: _PathText | None = Field(None, description="Folder of images with captions beside them.")
    image_jsonl_file: _PathText | None = Field(None, description="JSONL file of image_path and caption.")
    cache_directory: _PathText | None = Field(None, description="Folder of the caches; each dataset its own.")


class VideoKeys(CommonKeys):
    """Keys of a [[datasets]] table of videos."""

    video_directory: _PathText | None = Field(None, description="Folder of videos with captions beside them.")
    video_jsonl_file: _PathText | None = Field(None, description="JSONL file of video_path and caption.")
    cache_directory: _PathText | None = Field(None, description="Folder of the caches; each dataset its own.")
    target_frames: Annotated[tuple[int, ...] | None, PlainValidator(_target_frames)] = Field(
        None, description="Clip lengths in frames, each 4n + 1."
    )
    frame_extraction: FrameExtraction | None = Field(None, description="Which clips of a video are used.")
    frame_stride: int | None = Field(None, ge=1, le=_MAX_FRAMES, description="slide: frames between two starts.")
    frame_sample: int | None = Field(None, ge=1, le=_MAX_FRAMES, description="uniform: clips of each length.")
    max_frames: int | None = Field(None, ge=1, le=_MAX_FRAMES, description="full: longest clip in frames.")
    source_fps: Annotated[float | Literal["auto"] | None, PlainValidator(_source_fps)] = Field(
        None, description='Rate of the sources, "auto" for each file\'s own; clips are then resampled to 24.'
    )


DEFAULTS: Mapping[str, Any] = {
    "resolution": (960, 544),
    "enable_bucket": False,
    "bucket_no_upscale": False,
    "caption_extension": ".txt",
    "batch_size": 1,
    "num_repeats": 1,
    "enabled": True,
    "recursive": False,
    "caption_prefix": "",
    "caption_dropout": 0.0,
    "validation_split": 0.0,
    "exclude": (),
    "target_frames": (1,),
    "frame_extraction": "head",
    "frame_stride": 1,
    "frame_sample": 1,
    "max_frames": 129,
    "source_fps": None,
}
_SOURCE_KEYS = ("image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file")
_VIDEO_ONLY = tuple(key for key in VideoKeys.model_fields if key not in ImageKeys.model_fields)
_ALL_KEYS = (*ImageKeys.model_fields, *_VIDEO_ONLY)


def dataset_ranges() -> dict[str, str]:
    """What is allowed for each key that has limits, in signs: "1 to 1024"; for the documentation."""
    ranges = {
        "resolution": f"{_MIN_SIDE} to {_MAX_SIDE} each",
        "target_frames": f"1 to {_MAX_FRAMES} each",
        "source_fps": "0.1 to 1000",
        "exclude": f"up to {_MAX_EXCLUDED} entries",
    }
    for key, field in VideoKeys.model_fields.items():
        limits = {name: getattr(part, name) for part in field.metadata for name in ("ge", "le") if hasattr(part, name)}
        if len(limits) == 2:
            ranges[key] = f"{limits['ge']} to {limits['le']}"
    return ranges


@dataclass(frozen=True)
class DatasetEntry:
    """One [[datasets]] table with everything settled.

    `resolution` is (width, height); with `enable_bucket` its area counts. `target_frames` are 4n + 1, sorted, without
    repeats. Of `source_directory` and `jsonl_file` exactly one is a path. Relative paths belong to the folder that the
    program was started in, as in other trainers.
    """

    index: int
    kind: Kind
    source_directory: Path | None
    jsonl_file: Path | None
    cache_directory: Path
    resolution: tuple[int, int]
    enable_bucket: bool
    bucket_no_upscale: bool
    caption_extension: str
    batch_size: int
    num_repeats: int
    target_frames: tuple[int, ...]
    frame_extraction: FrameExtraction
    frame_stride: int
    frame_sample: int
    max_frames: int
    source_fps: float | Literal["auto"] | None
    enabled: bool
    recursive: bool
    caption_prefix: str
    caption_dropout: float
    validation_split: float
    exclude: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        """The folder or the JSONL file that the dataset is read from."""
        path = self.source_directory or self.jsonl_file
        assert path is not None
        return path


@dataclass(frozen=True)
class DatasetConfig:
    """All datasets of a configuration in file order, disabled ones included, and what a person should know."""

    datasets: tuple[DatasetEntry, ...]
    notices: tuple[Problem, ...]

    @property
    def enabled(self) -> tuple[DatasetEntry, ...]:
        """The datasets that are used."""
        return tuple(entry for entry in self.datasets if entry.enabled)


def load_dataset_config(path: str | Path) -> DatasetConfig:
    """Read a TOML or JSON (by suffix) dataset configuration.

    Raises:
        Problems: everything that is wrong, each with its table and key; at most 100 are listed.
    """
    return dataset_config(parse_text(decode(read_bytes(path), path), path))


def dataset_config(values: Mapping[str, Any]) -> DatasetConfig:
    """Check the plain values of a configuration and settle every dataset.

    Raises:
        Problems: as `load_dataset_config`.
    """
    reader = _Reader()
    entries = reader.read(values)
    if reader.problems:
        problems = reader.problems[:_MAX_PROBLEMS]
        left = len(reader.problems) - len(problems)
        more = [Problem(None, f"{left} more problems are not listed. Correct these first.")] if left else []
        raise Problems([*problems, *more])
    return DatasetConfig(tuple(entries), tuple(reader.notices))


def check_sources(config: DatasetConfig) -> list[Problem]:
    """Problems of enabled datasets whose folder or JSONL file is not there."""
    problems = []
    for entry in config.enabled:
        folder = entry.source_directory is not None
        if not (os.path.isdir(entry.source) if folder else os.path.isfile(entry.source)):
            key = f"{entry.kind}_{'directory' if folder else 'jsonl_file'}"
            what = "folder" if folder else "file"
            problems.append(
                Problem(f"datasets[{entry.index}].{key}", f"{entry.source} is no {what} that exists. Check the path.")
            )
    return problems


class _Reader:
    """Collects problems and notices while the tables are read."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notices: list[Problem] = []

    def read(self, values: Mapping[str, Any]) -> list[DatasetEntry]:
        for key, value in values.items():
            if key not in ("general", "datasets"):
                self._unknown_top(key, value)
        general = values.get("general", {})
        tables = values.get("datasets")
        inherited: dict[str, Any] = {}
        if isinstance(general, dict):
            inherited = self._general(general)
        else:
            self._problem("general", f"must be a table: [general], not {shorten(general)}.")
        if tables is None:
            self._problem("datasets", "is missing. Add a [[datasets]] table with video_directory or image_directory.")
            return []
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            self._problem("datasets", "must be a list of tables, each under [[datasets]] (two brackets).")
            return []
        if len(tables) > _MAX_DATASETS:
            self._problem("datasets", f"has {len(tables)} tables; at most {_MAX_DATASETS} are read. Split the file.")
            return []
        entries = [self._dataset(index, table, inherited) for index, table in enumerate(tables)]
        whole = [entry for entry in entries if entry is not None]
        self._unique_caches(whole)
        return whole

    def _problem(self, field: str, message: str) -> None:
        self.problems.append(Problem(field, message))

    def _notice(self, field: str, message: str) -> None:
        self.notices.append(Problem(field, message))

    def _unknown_top(self, key: str, value: Any) -> None:
        name = shorten(key, 60)
        close = difflib.get_close_matches(name, ["general", "datasets"], n=1, cutoff=0.6)
        if close:
            self._problem(name, f"is not a table of a dataset configuration. Did you mean {close[0]}?")
        elif key in _ALL_KEYS or key in FOREIGN_KEYS:
            self._problem(name, "stands outside of a table. Put it under [general] or [[datasets]].")
        elif isinstance(value, dict):
            self._notice(name, "is not a table of a dataset configuration; it is ignored here and kept in the file.")
        else:
            self._problem(name, "is not a key of a dataset configuration. Remove it.")

    def _general(self, table: Mapping[str, Any]) -> dict[str, Any]:
        clean = self._known_keys("general", table, tuple(CommonKeys.model_fields), _ALL_KEYS)
        return self._validate("general", CommonKeys, clean)

    def _known_keys(
        self, where: str, table: Mapping[str, Any], allowed: tuple[str, ...], elsewhere: tuple[str, ...]
    ) -> dict[str, Any]:
        """The values of `table` that belong there; the rest becomes problems and notices."""
        clean: dict[str, Any] = {}
        for key, value in table.items():
            field = f"{where}.{shorten(key, 60)}"
            if key in FOREIGN_KEYS:
                self._notice(field, f"is for {FOREIGN_KEYS[key]} and means nothing to Kandinsky 5; it is ignored.")
            elif key in allowed:
                trouble = "is null. Give a value or remove the key." if value is None else value_problem(value)
                if trouble:
                    self._problem(field, trouble)
                else:
                    clean[key] = value
            elif key in elsewhere:
                place = "[[datasets]] tables" if where == "general" else "video datasets"
                self._problem(field, f"belongs to {place} only. Move or remove it.")
            else:
                self._problem(field, f"is not a key of a dataset.{self._did_you_mean(key, allowed)}")
        return clean

    def _did_you_mean(self, key: str, allowed: tuple[str, ...]) -> str:
        # Suggestions cost time; nobody reads the ninetieth, and nobody mistypes a key into 60 letters.
        if len(key) > 60 or len(self.problems) >= _MAX_PROBLEMS:
            return " Remove it."
        close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
        return f" Did you mean {close[0]}?" if close else " Remove it."

    def _validate(self, where: str, model: type[_Table], clean: Mapping[str, Any]) -> dict[str, Any]:
        try:
            settled = model.model_validate(clean)
        except ValidationError as error:
            self.problems += [_type_problem(where, details) for details in error.errors(include_url=False)]
            return {}
        found = {key: getattr(settled, key) for key in clean}
        if found.get("caption_extension", "") != clean.get("caption_extension", ""):
            self._notice(f"{where}.caption_extension", f"has no dot; {found['caption_extension']} is used.")
        return found

    def _dataset(self, index: int, table: Mapping[str, Any], inherited: Mapping[str, Any]) -> DatasetEntry | None:
        where = f"datasets[{index}]"
        before = len(self.problems)
        sources = [key for key in _SOURCE_KEYS if key in table]
        kind: Kind = "video" if any(key.startswith("video_") for key in sources) else "image"
        if not sources:
            guess: Kind = "video" if any(key in table for key in _VIDEO_ONLY) else "image"
            kind = guess
            self._problem(where, f"has no source. Give {guess}_directory or {guess}_jsonl_file.")
        elif len({key.split("_")[0] for key in sources}) > 1:
            self._problem(where, f"mixes {' and '.join(sources)}. Give images and videos one [[datasets]] table each.")
            table = {key: value for key, value in table.items() if not key.startswith("image_")}
        elif len(sources) > 1:
            self._problem(where, f"has two sources, {' and '.join(sources)}. Keep one of them.")
        model = VideoKeys if kind == "video" else ImageKeys
        clean = self._known_keys(where, table, tuple(model.model_fields), _ALL_KEYS)
        given = self._validate(where, model, clean)
        if not given.get("cache_directory") and "cache_directory" not in table and f"{kind}_jsonl_file" in table:
            self._problem(f"{where}.cache_directory", "is missing. A JSONL file has no folder of its own for caches.")
        if len(self.problems) > before:
            return None
        settled = {**DEFAULTS, **inherited, **given}
        entry = _entry(index, kind, settled)
        self._entry_notices(where, entry, given)
        return entry

    def _entry_notices(self, where: str, entry: DatasetEntry, given: Mapping[str, Any]) -> None:
        width, height = entry.resolution
        if not entry.enable_bucket and (width % SIZE_STEP or height % SIZE_STEP):
            down = (width // SIZE_STEP * SIZE_STEP, height // SIZE_STEP * SIZE_STEP)
            self._notice(
                f"{where}.resolution",
                f"{width} x {height} is not a multiple of {SIZE_STEP}; {down[0]} x {down[1]} is used.",
            )
        if "*" in entry.exclude:
            self._notice(f"{where}.exclude", "holds *, which leaves out every source.")
        if entry.jsonl_file is None and (lost := [item for item in entry.exclude if item.startswith("/")]):
            self._notice(
                f"{where}.exclude",
                f"holds {shorten(lost[0])}, which fits no source: paths are those inside the folder.",
            )
        if entry.kind == "image":
            return
        frames = given.get("target_frames")
        rounded = [f"{count} to {valid_frames(count)}" for count in frames or () if valid_frames(count) != count]
        if rounded:
            self._notice(f"{where}.target_frames", f"must be 4n + 1; rounded down: {shorten(', '.join(rounded))}.")
        if frames is None and entry.frame_extraction != "full":
            self._notice(f"{where}.target_frames", "is not given, so that each clip is a single frame. Give [25].")
        elif entry.frame_extraction == "chunk" and 1 in entry.target_frames:
            self._notice(f"{where}.target_frames", "holds 1, and chunk makes an item of every single frame of it.")
        if entry.frame_extraction == "full" and valid_frames(entry.max_frames) != entry.max_frames:
            self._notice(
                f"{where}.max_frames",
                f"must be 4n + 1; {entry.max_frames} is rounded down to {valid_frames(entry.max_frames)}.",
            )
        if entry.frame_extraction == "uniform" and entry.frame_sample == 1:
            self._notice(f"{where}.frame_sample", "is 1, so that uniform takes the first frames, as head does.")

    def _unique_caches(self, entries: list[DatasetEntry]) -> None:
        seen: dict[str, DatasetEntry] = {}
        for entry in entries:
            key = os.path.normcase(os.path.realpath(entry.cache_directory))
            first = seen.setdefault(key, entry)
            if first is not entry:
                self._problem(
                    f"datasets[{entry.index}].cache_directory",
                    f"{shorten(str(entry.cache_directory))} is also the cache of datasets[{first.index}]. "
                    "Give each dataset its own cache_directory.",
                )


def _entry(index: int, kind: Kind, settled: Mapping[str, Any]) -> DatasetEntry:
    folder, jsonl = settled.get(f"{kind}_directory"), settled.get(f"{kind}_jsonl_file")
    frames = sorted({valid_frames(count) for count in settled["target_frames"]})
    values = {key: settled[key] for key in DEFAULTS}
    values["target_frames"] = tuple(frames)
    return DatasetEntry(
        index=index,
        kind=kind,
        source_directory=Path(folder) if folder else None,
        jsonl_file=Path(jsonl) if jsonl else None,
        cache_directory=Path(settled.get("cache_directory") or folder or ""),
        **values,
    )


def _type_problem(where: str, details: ErrorDetails) -> Problem:
    field = ".".join([where, *(str(part) for part in details["loc"][:1])])
    context = details.get("ctx", {})
    given = shorten(details.get("input"))
    sentences = {
        "dataset": str(context.get("sentence")),
        "greater_than_equal": f"must be at least {context.get('ge')}, not {given}.",
        "less_than_equal": f"must be at most {context.get('le')}, not {given}.",
        "finite_number": f"must be a finite number, not {given}.",
        "int_type": f"must be a whole number, not {given}.",
        "float_type": f"must be a number, not {given}.",
        "string_type": f"must be text, not {given}.",
        "bool_type": f"must be true or false, not {given}.",
        "literal_error": f"must be one of {context.get('expected')}, not {given}.",
        "string_too_long": f"is too long: at most {context.get('max_length')} characters.",
    }
    return Problem(field, sentences.get(details["type"], f"{details['msg']} (given: {given})."))
