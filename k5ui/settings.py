"""What the app remembers for a workspace: where the models lie, language, theme, folder of LoRAs. One TOML file."""

from __future__ import annotations

import threading
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from backend.config.checkpoint import identify
from backend.config.checks import is_hub_name
from backend.config.tasks import TASKS, WeightPaths, default_weights
from backend.errors import Problem, Problems, UserError
from backend.files import write_atomic
from k5ui.roots import Roots

Language = Literal["en", "ru"]
Theme = Literal["auto", "light", "dark"]
LANGUAGES: tuple[str, ...] = get_args(Language)
THEMES: tuple[str, ...] = get_args(Theme)
#: The name under which the parts that all real tasks share are kept: VAE and text encoders.
SHARED = "shared"
WEIGHT_PARTS = tuple(part.name for part in fields(WeightPaths))


class _Weights(BaseModel):
    """The table of one task, or the shared one."""

    model_config = ConfigDict(extra="ignore", strict=True)
    dit: str | None = None
    vae: str | None = None
    text_encoder_qwen: str | None = None
    text_encoder_clip: str | None = None


class _Document(BaseModel):
    """The whole file; keys of later versions are kept in the file and ignored here."""

    model_config = ConfigDict(extra="ignore", strict=True)
    language: Language = "en"
    theme: Theme = "auto"
    lora_folder: str | None = None
    models: dict[str, _Weights] = Field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """What a model path turned out to be: whether it is usable, and one line for people."""

    ok: bool
    text: str


class Settings:
    """Reads and writes `path`. Comments and unknown keys of the file survive; a damaged file is never overwritten.

    Raises:
        UserError: the file exists and is not TOML, or holds values of the wrong kind.
    """

    def __init__(self, path: str | Path, roots: Roots) -> None:
        self.path = Path(path)
        self._roots = roots
        self._guard = threading.RLock()
        self._stamp: int | None = -1
        self._values = _Document()
        self._document()

    @property
    def language(self) -> str:
        """`en` or `ru`."""
        return self._document().language

    @property
    def theme(self) -> str:
        """`auto`, `light` or `dark`."""
        return self._document().theme

    @property
    def lora_folder(self) -> str | None:
        """The folder whose LoRAs the page offers, besides the workspace's own `loras`."""
        return self._document().lora_folder

    def weights_for(self, task: str) -> WeightPaths:
        """Where the parts of `task` lie: its own entry, else (DiT) that of a task with the same checkpoint, else the
        shared entry, else what belongs to the task (the embedded demo, the hub names of the text encoders).

        Raises:
            UserError: there is no such task.
        """
        preset = TASKS.get(task)
        if preset is None:
            raise UserError(f"{task[:60]!r} is not a task. Choose one of the list.", "task")
        models, defaults = self._document().models, asdict(default_weights(preset))
        if preset.is_demo:
            return WeightPaths(**defaults | _given(models.get(task)))
        siblings = [models.get(name) for name, other in TASKS.items() if other.checkpoint == preset.checkpoint]
        same_file = {"dit": next((weights.dit for weights in siblings if weights and weights.dit), None)}
        return WeightPaths(**defaults | same_file | _given(models.get(SHARED)) | _given(models.get(task)))

    def models(self) -> dict[str, dict[str, str]]:
        """The paths that were set, by task name or `shared`, then by part; for the table of the settings page."""
        return {name: _given(weights) for name, weights in self._document().models.items()}

    def set_weights(self, task: str, **paths: str | None) -> None:
        """Set or (None, empty) forget paths of a task, or of `shared`; the files need not be there yet.

        Raises:
            Problems: unknown task or part, no path, or (exposed) a path outside the roots.
        """
        if task != SHARED and task not in TASKS:
            raise UserError(f"{task[:60]!r} is not a task. Choose one of the list.", "task")
        clean: dict[str, str | None] = {}
        problems: list[Problem] = []
        for part, path in paths.items():
            if part not in WEIGHT_PARTS or (task == SHARED and part == "dit"):
                problems.append(Problem(part, "is not a part of this model."))
                continue
            try:
                clean[part] = self.clean_path(part, path)
            except UserError as error:
                problems += error.problems
        if problems:
            raise Problems(problems)

        def change(document: tomlkit.TOMLDocument) -> None:
            models = document.setdefault("models", tomlkit.table(is_super_table=True))
            _put_all(models.setdefault(task, tomlkit.table()), clean)

        self._change(change)

    def update(self, **values: str | None) -> None:
        """Set language, theme or lora_folder; None goes back to the default.

        Raises:
            Problems: an unknown key or value, or (exposed) a folder outside the roots.
        """
        problems = [
            Problem(key, f"must be one of {', '.join(choices)}, not {str(values[key])[:40]!r}.")
            for key, choices in (("language", LANGUAGES), ("theme", THEMES))
            if values.get(key) is not None and values[key] not in choices
        ]
        problems += [Problem(key, "is not a setting.") for key in values.keys() - {"language", "theme", "lora_folder"}]
        clean = dict(values)
        if values.get("lora_folder"):
            try:
                clean["lora_folder"] = self._roots.absolute(str(values["lora_folder"]), "lora_folder")
            except UserError as error:
                problems += error.problems
        if problems:
            raise Problems(problems)
        self._change(lambda document: _put_all(document, clean))

    def clean_path(self, part: str, path: str | None) -> str | None:
        """A model path as it is kept: None if empty, hub names of text encoders as they are, all else absolute.

        Raises:
            UserError: not a path, or (exposed) outside the roots.
        """
        text = (path or "").strip()
        if not text:
            return None
        if part.startswith("text_encoder") and is_hub_name(text):
            return text
        return self._roots.absolute(text, part)

    def inspect(self, path: str | None, part: str = "dit") -> Inspection:
        """Say in one line what lies at a model path, from its header alone."""
        try:
            clean = self.clean_path(part, path)
            if clean is None:
                return Inspection(False, "Not set.")
            if part.startswith("text_encoder") and is_hub_name(clean):
                return Inspection(True, f"{clean}: a name on the model hub; loaded from this computer's hub cache.")
            info = identify(clean)
        except UserError as error:
            return Inspection(False, error.message)
        wanted = {"dit": "dit", "vae": "vae", "text_encoder_qwen": "text_encoder", "text_encoder_clip": "clip"}.get(
            part
        )
        if info.unsupported:
            return Inspection(False, info.unsupported)
        return Inspection(info.kind == wanted, info.summary)

    def _document(self) -> _Document:
        """The values of the file, read again only when it changed."""
        with self._guard:
            try:
                stamp = self.path.stat().st_mtime_ns
            except OSError:
                stamp = None
            if stamp != self._stamp:
                self._values = _parse(self.path) if stamp is not None else _Document()
                self._stamp = stamp
            return self._values

    def _change(self, change: Any) -> None:
        with self._guard:
            text = self.path.read_text("utf-8") if self.path.is_file() else ""
            document = tomlkit.parse(text)
            change(document)
            new = tomlkit.dumps(document)
            _check(tomllib.loads(new), self.path)
            if new != text:
                write_atomic(self.path, new)


def _given(weights: _Weights | None) -> dict[str, str]:
    return {name: path for name, path in (weights.model_dump() if weights else {}).items() if path}


def _put_all(table: Any, values: dict[str, str | None]) -> None:
    for key, value in values.items():
        if value:
            table[key] = value
        elif key in table:
            del table[key]


def _parse(path: Path) -> _Document:
    try:
        return _check(tomllib.loads(path.read_text("utf-8")), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid TOML: {error}. Correct it, or rename it to start with empty settings."
        ) from None


def _check(values: dict[str, Any], path: Path) -> _Document:
    try:
        return _Document.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}. Correct it, or remove the line.") from None
