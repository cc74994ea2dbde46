"""From the values of a form to options that an engine can run on: weights filled in, paths checked, files kept."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from backend.config.checks import check_generate, is_hub_name
from backend.config.generate import GenerateOptions
from backend.config.images import image_size
from backend.config.options import OptionSpec, from_mapping, specs
from backend.config.prompts import read_prompt_file
from backend.config.tasks import TASKS
from backend.errors import Problem, Problems, UserError
from backend.files import atomic_path, safe_name, write_problem
from k5ui.roots import Roots
from k5ui.settings import WEIGHT_PARTS, Settings

MAX_IMAGE_BYTES = 100_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
IMAGE_FIELDS = ("image", "image_last")
#: Set by the app itself, whatever a request says: where the clip is written and where embeddings are kept.
OWN_FIELDS = ("output", "text_cache_dir")
_SEED_RANGE = 2**32
_LARGEST_SEED = 2**63 - 1
_SPECS = {spec.name: spec for spec in specs(GenerateOptions)}


class Intake:
    """Turns form values into `GenerateOptions` and keeps the files that they name.

    `upload_folder` is where Gradio puts files that were dropped on the page, `text_cache` the folder of text embeddings
    that all runs share, `draft_folder` a run folder that does not exist, for checking output paths.
    """

    def __init__(
        self, settings: Settings, roots: Roots, upload_folder: Path, text_cache: Path, draft_folder: Path
    ) -> None:
        self._settings = settings
        self._roots = roots
        self._uploads = Roots([upload_folder], exposed=True)
        self._text_cache = text_cache
        self._draft_folder = draft_folder

    def options(self, values: Mapping[str, Any]) -> GenerateOptions:
        """Options from the values of a form: empty fields mean the default, weights come from the settings.

        Raises:
            Problems: unknown keys, wrong types, values out of bounds, paths that may not be read.
        """
        clean = {key: _plain(_SPECS.get(key), value) for key, value in values.items() if key not in OWN_FIELDS}
        clean = {key: value for key, value in clean.items() if value is not None}
        problems: list[Problem] = []
        for key, spec in _SPECS.items():
            if spec.path is not None and key in clean:
                clean[key], trouble = self._paths(spec, clean[key])
                problems += trouble
        task = clean.get("task", GenerateOptions.model_fields["task"].default)
        if isinstance(task, str) and task in TASKS:
            weights = self._settings.weights_for(task)
            for part in WEIGHT_PARTS:
                clean.setdefault(part, getattr(weights, part))
            clean = {key: value for key, value in clean.items() if value is not None}
        clean["text_cache_dir"] = os.fspath(self._text_cache)
        try:
            options = from_mapping(GenerateOptions, clean)
        except Problems as error:
            raise Problems([*problems, *error.problems]) from None
        if problems:
            raise Problems(problems)
        return options

    def check(self, options: GenerateOptions) -> list[Problem]:
        """Every problem of `options`; in an exposed app a prompt file may name images inside the roots only."""
        outside = self._outside_images(options.from_file) if self._roots.exposed and options.from_file else []
        # Nothing more is said then: whether a file outside is there, and what it is, is nobody's business.
        return outside or check_generate(options, self._draft_folder)

    def _outside_images(self, prompt_file: str) -> list[Problem]:
        try:
            entries, _ = read_prompt_file(prompt_file)
        except UserError as error:
            return list(error.problems)
        problems = []
        for place, overrides in entries:
            for name in IMAGE_FIELDS:
                path = overrides.get(name)
                if isinstance(path, str):
                    try:
                        self._roots.absolute(path, "from_file")
                    except UserError as error:
                        problems.append(Problem("from_file", f"{place}: {error.message}"))
        return problems

    def _paths(self, spec: OptionSpec, value: Any) -> tuple[Any, list[Problem]]:
        """The value with every path made absolute and checked; what is not text is left to the check of types."""
        items = value if isinstance(value, list) else [value]
        clean, problems = [], []
        # The owner of this machine chose these, so they may lie anywhere.
        trusted = {path for parts in self._settings.models().values() for path in parts.values()}
        for item in items:
            hub_name = spec.name.startswith("text_encoder") and isinstance(item, str) and is_hub_name(item)
            if not isinstance(item, str) or hub_name or item in trusted:
                clean.append(item)
                continue
            try:
                clean.append(self._roots.absolute(item, spec.name))
            except UserError as error:
                clean.append(item)
                problems += error.problems
        return (clean if isinstance(value, list) else clean[0]), problems

    def keep_files(self, options: GenerateOptions, folder: Path) -> GenerateOptions:
        """Copy the files that may vanish into `folder` and name the copies: images, and what was dropped on the page.

        Raises:
            UserError: an image is none or too large, or the folder cannot be written.
        """
        changes: dict[str, Any] = {}
        for name in IMAGE_FIELDS:
            path = getattr(options, name)
            if path is not None:
                suffix = "." + check_image(path, name).lower()
                changes[name] = _copy(Path(path), folder / f"{name}{suffix}", name)
        for name in ("from_file", "latent_path"):
            path = getattr(options, name)
            if path is not None and self._uploads.allows(path):
                changes[name] = _copy(Path(path), folder / _kept_name(Path(path)), name)
        loras = [
            _copy(Path(path), folder / f"{index}-{_kept_name(Path(path))}", "lora_weight")
            if self._uploads.allows(path)
            else path
            for index, path in enumerate(options.lora_weight, 1)
        ]
        if loras != options.lora_weight:
            changes["lora_weight"] = loras
        return from_mapping(GenerateOptions, options.model_dump() | changes) if changes else options


def seeds(first: int, count: int) -> list[int]:
    """The seeds of `count` clips: the first (drawn if it is -1) and those that follow it."""
    start = secrets.randbelow(_SEED_RANGE) if first == -1 else first
    return [(start + index) % (_LARGEST_SEED + 1) for index in range(count)]


def check_image(path: str | Path, field: str | None = None) -> str:
    """Decode an image as a check and return its format (`PNG`, `JPEG`, `WEBP`, `BMP`, `TIFF`).

    Raises:
        UserError: missing, larger than 100 MB or 100 million pixels, cut off, or another kind of file.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if path.is_file() and path.stat().st_size > MAX_IMAGE_BYTES:
        raise UserError(f"{path.name} is larger than 100 MB. Scale it down.", field)
    image_size(path, field)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
            return str(image.format)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{path.name} is damaged or no image. Use PNG, JPEG or WebP.", field) from None


def _plain(spec: OptionSpec | None, value: Any) -> Any:
    """What a widget gives, as the option's type: empty text is no value, a whole float is an integer."""
    if isinstance(value, str) and not value.strip() and (spec is None or spec.kind != "choice"):
        return None
    if spec is not None and spec.is_list and isinstance(value, list | tuple):
        return [item for item in (_plain_item(spec, item) for item in value) if item is not None]
    return _plain_item(spec, value)


def _plain_item(spec: OptionSpec | None, value: Any) -> Any:
    if spec is not None and spec.kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    return None if isinstance(value, str) and not value.strip() else value


def _kept_name(path: Path) -> str:
    """The file's name in characters that every system accepts, its ending kept (`.latent.safetensors` as a whole)."""
    stem, dot, ending = path.name.partition(".latent.safetensors")
    if not dot:
        stem, dot, ending = path.stem, path.suffix, ""
    return safe_name(stem, "file") + dot.lower() + ending


def _copy(source: Path, target: Path, field: str) -> str:
    """Copy a file whole; within one disk a hard link is enough for large ones, which nobody changes in place."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if field == "lora_weight":
            with suppress(OSError):
                os.link(source.resolve(), target)
                return os.fspath(target)
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    except FileNotFoundError:
        raise UserError(f"{source.name} is gone. Choose it again.", field) from None
    except OSError as error:
        problem = write_problem(error, target, field)
        raise (
            UserError(f"{source.name} cannot be copied: {error.strerror}.", field) if problem is error else problem
        ) from error
    return os.fspath(target)
