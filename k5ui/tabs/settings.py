"""The Settings tab: where the weights lie, workspace, theme and language, versions."""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import gradio as gr

from backend.config.checks import check_weights
from backend.config.generate import GenerateOptions
from backend.config.options import from_mapping
from backend.config.tasks import TASKS
from backend.errors import Problems
from k5ui.live import sentences
from k5ui.services import Services
from k5ui.settings import SHARED, WEIGHT_PARTS
from k5ui.text.loader import Texts, Words

SHARED_PARTS = tuple(part for part in WEIGHT_PARTS if part != "dit")
_PACKAGES = ("gradio", "torch", "diffusers", "transformers", "safetensors", "av")
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_FIRST_REAL = next(task.name for task in TASKS.values() if not task.is_demo)


class SettingsTab:
    """Builds the tab inside the current Blocks. `retranslate` makes the next load of the page speak a new language."""

    def __init__(self, services: Services, words: Words, retranslate: Callable[[], None]) -> None:
        self.services = services
        self.words = words
        self._retranslate = retranslate
        with gr.Row(elem_classes="k5-columns"):
            with gr.Column(scale=6, min_width=320, elem_classes="k5-form"):
                self._models()
            with gr.Column(scale=4, min_width=320, elem_classes="k5-form"):
                self._page()

    def _models(self) -> None:
        words = self.words
        self._heading("settings.models", "settings.models_text")
        tasks = [(task.title, task.name) for task in TASKS.values() if not task.is_demo]
        self.task = words.say(gr.Dropdown(choices=tasks, value=_FIRST_REAL, elem_id="k5-s-task"), label="settings.task")
        self.fields: dict[str, gr.Textbox] = {}
        self.lines: dict[str, gr.HTML] = {}
        for part in WEIGHT_PARTS:
            field = gr.Textbox(max_lines=1, elem_id=f"k5-s-{part}")
            self.fields[part] = words.say(field, label=f"field.{part}")
            self.lines[part] = gr.HTML(elem_classes="k5-check-line", padding=False)
        self.lora_folder = words.say(
            gr.Textbox(max_lines=1, elem_id="k5-s-lora_folder"),
            label="settings.lora_folder",
            info="settings.lora_folder_info",
        )
        self.lora_line = gr.HTML(elem_classes="k5-check-line", padding=False)
        self.save = words.say(gr.Button(variant="primary", elem_id="k5-s-save"), value="settings.save")
        self._heading("settings.overview")
        self.overview = gr.HTML(padding=False)

    def _page(self) -> None:
        words, settings = self.words, self.services.settings
        self._heading("settings.page")
        themes = ("auto", "light", "dark")
        self.theme = words.say(
            gr.Radio(value=settings.theme, elem_id="k5-s-theme"),
            label="settings.theme",
            info="settings.theme_info",
            choices=lambda texts: [(texts(f"settings.theme.{name}"), name) for name in themes],
        )
        self.language = words.say(
            gr.Radio(choices=[("English", "en"), ("Русский", "ru")], value=settings.language, elem_id="k5-s-language"),
            label="settings.language",
            info="settings.language_info",
        )
        self._heading("settings.workspace", "settings.workspace_text")
        gr.HTML(f"<code>{html.escape(str(self.services.workspace))}</code>", padding=False, elem_classes="k5-path")
        self._heading("settings.about", "settings.about_text")
        rows = "".join(f"<b>{html.escape(name)}</b><span>{html.escape(number)}</span>" for name, number in versions())
        gr.HTML(f'<div class="k5-checks">{rows}</div>', padding=False)

    def _heading(self, key: str, text: str | None = None) -> None:
        def make(texts: Texts) -> str:
            paragraph = f'<p class="k5-muted">{html.escape(texts(text))}</p>' if text else ""
            return f'<h2 class="k5-title">{html.escape(texts(key))}</h2>{paragraph}'

        self.words.say(gr.HTML(padding=False), value=make)

    # --- events ---------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Wire the events."""
        inputs = {self.task, self.lora_folder, *self.fields.values()}
        shown = self.outputs()
        self.task.input(self._show_task, {self.task}, shown, **_QUIET)
        self.save.click(self._save, inputs, shown, **_QUIET)
        for field in (*self.fields.values(), self.lora_folder):
            field.submit(self._save, inputs, shown, **_QUIET)
        self.theme.input(
            self._set_theme, {self.theme}, None, js="(theme) => { K5.setTheme(theme); return [theme]; }", **_QUIET
        )
        self.language.input(self._set_language, {self.language}, None, **_QUIET).then(
            None, None, None, js="() => { location.reload(); }", api_visibility="private"
        )

    def outputs(self) -> list[Any]:
        """What `load` changes."""
        fields = [self.task, *self.fields.values(), *self.lines.values(), self.lora_folder, self.lora_line]
        return [*fields, self.overview, self.theme, self.language]

    def load(self) -> dict[Any, Any]:
        """The settings as they are now; for the load event of the page."""
        settings = self.services.settings
        return self._shown(_FIRST_REAL) | {
            self.task: _FIRST_REAL,
            self.lora_folder: settings.lora_folder or "",
            self.theme: settings.theme,
            self.language: settings.language,
        }

    def _show_task(self, data: dict[Any, Any]) -> dict[Any, Any]:
        return self._shown(data[self.task])

    def _save(self, data: dict[Any, Any]) -> dict[Any, Any]:
        task = data[self.task]
        settings = self.services.settings
        texts = {part: str(data[field] or "").strip() for part, field in self.fields.items()}
        try:
            settings.set_weights(task, dit=texts["dit"], **dict.fromkeys(SHARED_PARTS))
            settings.set_weights(SHARED, **{part: texts[part] for part in SHARED_PARTS})
        except Problems as error:
            return {self.lines[p.field]: _line(False, p.message) for p in error.problems if p.field in self.lines}
        try:
            settings.update(lora_folder=str(data[self.lora_folder] or "").strip() or None)
        except Problems as error:
            return self._shown(task) | {self.lora_line: _line(False, sentences(error))}
        return self._shown(task) | {self.lora_folder: settings.lora_folder or ""}

    def _shown(self, task: str) -> dict[Any, Any]:
        """The four paths of a task with what their headers say, and the table of all tasks."""
        weights = self.services.settings.weights_for(task)
        problems = self._problems(task)
        updates: dict[Any, Any] = {}
        for part, field in self.fields.items():
            path = getattr(weights, part)
            found = self.services.settings.inspect(path, part)
            wrong = problems.get(part) if found.ok else None
            updates[field] = gr.update(value=path or "", info=self._whose(part, task))
            updates[self.lines[part]] = _line(found.ok and not wrong, wrong or found.text)
        folder = self.services.settings.lora_folder
        found = f"{len(self.services.lora_files())} × .safetensors" if not folder or os.path.isdir(folder) else ""
        missing = self.words.now("settings.folder_missing")
        return updates | {self.overview: self._overview(), self.lora_line: _line(bool(found), found or missing)}

    def _whose(self, part: str, task: str) -> str:
        if part == "dit":
            return self.words.now("settings.for_task", checkpoint=TASKS[task].checkpoint)
        return self.words.now("settings.shared")

    def _problems(self, task: str) -> dict[str, str]:
        """What the engine's own check says about the weights of a task, by part."""
        given = {name: path for name, path in vars(self.services.settings.weights_for(task)).items() if path}
        try:
            found = check_weights(from_mapping(GenerateOptions, {"task": task, **given}))
        except Problems as error:
            found = list(error.problems)
        return {problem.field: problem.message for problem in found if problem.field}

    def _overview(self) -> str:
        texts = self.words.now
        rows = []
        for task in TASKS.values():
            missing = [texts(f"field.{part}") for part in self._problems(task.name) if part in WEIGHT_PARTS]
            text = texts("settings.missing", parts=", ".join(missing)) if missing else texts("settings.ready")
            if task.is_demo and not missing:
                text = texts("settings.embedded")
            rows.append(f"<b>{html.escape(task.title)}</b>{_line(not missing, text)}")
        return f'<div class="k5-checks">{"".join(rows)}</div>'

    def _set_theme(self, data: dict[Any, Any]) -> None:
        self.services.settings.update(theme=data[self.theme])

    def _set_language(self, data: dict[Any, Any]) -> None:
        self.services.settings.update(language=data[self.language])
        self._retranslate()


def _line(ok: bool, text: str) -> str:
    mark = "✓" if ok else "–"
    return f'<span class="k5-check {"ok" if ok else "no"}"><i aria-hidden="true">{mark}</i> {html.escape(text)}</span>'


def versions() -> list[tuple[str, str]]:
    """Names and versions of what a report of a fault should name."""
    found = [("Python", platform.python_version()), ("System", f"{platform.system()} {platform.machine()}")]
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "-"))
    return found
