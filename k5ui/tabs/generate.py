"""The Generate tab: layout of the form, and what its events do. Every event ends at once; clips are made by jobs."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.processing_utils import save_file_to_cache

from backend.config.tasks import TASKS
from backend.errors import Problems, UserError
from k5ui import generate_form as rules
from k5ui.form import FIELD_ID, Form, image_field
from k5ui.live import event_values, part, run_verbs, sentences, slot
from k5ui.requests import check_image
from k5ui.roots import Roots
from k5ui.services import Services
from k5ui.text.loader import Words

DRAFT = "generate"
_SHOWN_BY_HAND = {
    "task",
    "prompt",
    "negative_prompt",
    *rules.IMAGE_FIELDS,
    "width",
    "height",
    "frames",
    "steps",
    "guidance",
    "seed",
}
_GROUP_ORDER = ("sampling", "output", "clip", "prompt", "compute", "memory", "model")
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class GenerateTab:
    """Builds the tab inside the current Blocks; `connect` adds the events, `load` is called when a page opens."""

    def __init__(self, services: Services, words: Words) -> None:
        self.services = services
        self.words = words
        self.form = Form(rules.SPECS.values(), words)
        with gr.Row(elem_classes="k5-columns"):
            with gr.Column(scale=4, min_width=320, elem_classes="k5-form"):
                self._basic_fields()
                self._advanced_fields()
                events = ("generate", "set", "command", "reset", "fromfile", "frame", "use")
                self.actions = part("actions", value={}, events=events)
            with gr.Column(scale=6, min_width=320, elem_classes="k5-side"):
                part("stage", verbs=run_verbs(services))

    # --- layout ---------------------------------------------------------------------------------------------------

    def _basic_fields(self) -> None:
        form, words = self.form, self.words
        slot("drop")
        tasks = [(task.title, task.name) for task in TASKS.values()]
        form.make("task", choices=tasks, filterable=True)
        slot("weights")
        prompt = form.make("prompt", lines=3, max_lines=12, autofocus=True)
        words.say(prompt, placeholder="generate.prompt_placeholder")
        slot("examples")
        with gr.Accordion("", open=False, elem_id="k5-negative") as negative:
            form.make("negative_prompt", lines=2, max_lines=8, placeholder=rules.default_negative(), show_label=False)
        words.say(negative, label="generate.negative")
        with gr.Accordion("", open=False, elem_id="k5-images") as self.images, gr.Row(elem_classes="k5-field-row"):
            for name in rules.IMAGE_FIELDS:
                self._image_field(name)
        words.say(self.images, label="generate.images")
        with gr.Row(elem_classes="k5-field-row"):
            form.make("width", min_width=80, placeholder="auto")
            form.make("height", min_width=80, placeholder="auto")
            form.make("frames", min_width=80)
        slot("sizes")
        slot("lengths")
        with gr.Row(elem_classes="k5-field-row"):
            form.make("steps", min_width=80)
            form.make("guidance", min_width=80)
            form.make("seed", min_width=80)
        slot("seed")
        form.add(rules.LORAS, part("loras", value=[], events=("edit",)))

    def _image_field(self, name: str) -> None:
        field = image_field(
            sources=["upload", "clipboard"], height=180, elem_classes="k5-image", elem_id=FIELD_ID + name, min_width=140
        )
        self.words.say(field, label=f"field.{name}")
        self.form.add(name, field)

    def _advanced_fields(self) -> None:
        form = self.form
        rest = [spec for name, spec in rules.SPECS.items() if name not in _SHOWN_BY_HAND | rules.LEFT_OUT]
        rest = [spec for spec in rest if spec.name not in rules.LORA_FIELDS]
        with gr.Accordion("", open=False, elem_id="k5-advanced", elem_classes="k5-advanced") as advanced:
            part("search")
            for group in sorted({spec.group for spec in rest}, key=_GROUP_ORDER.index):
                with gr.Column(elem_classes="k5-group"):
                    title = gr.HTML(elem_classes="k5-group-title", padding=False)
                    self.words.say(title, value=f"group.{group}")
                    for spec in rest:
                        if spec.group == group:
                            form.make(spec.name, info=True, elem_classes="k5-option")
        self.words.say(advanced, label="generate.advanced")

    # --- events ---------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Wire the events; each gets all fields as one mapping."""
        form, actions = self.form, self.actions
        everything = [*form.inputs, self.images, actions]
        inputs = form.inputs | {actions}
        edits = []
        for name, field in form.fields.items():
            if name == "task":
                continue
            if name == rules.LORAS:
                edits.append(field.edit)  # type: ignore[attr-defined]
            else:
                # A text field reports keys as `input`, but neither pasting nor deleting: `change` has both.
                late = name in rules.IMAGE_FIELDS or isinstance(field, gr.Textbox)
                edits.append(field.change if late else field.input)  # type: ignore[attr-defined]
        gr.on(edits, self._edited, inputs, actions, trigger_mode="always_last", concurrency_limit=4, **_QUIET)
        task = form.fields["task"]
        task.input(self._task_chosen, inputs, everything, **_QUIET)  # type: ignore[attr-defined]
        for name, handler in (
            ("generate", self._generate),
            ("set", self._set),
            ("command", self._command),
            ("reset", self._reset),
            ("fromfile", self._from_file),
            ("frame", self._frame),
            ("use", self._use),
        ):
            getattr(actions, name)(handler, inputs, everything, **_QUIET)

    def load(self) -> dict[Component, Any]:
        """The form as the draft says; for the load event of the page."""
        return self._fill(rules.restored(self.services.drafts.load(DRAFT)))

    def outputs(self) -> list[Any]:
        """What `load` and `clone` may change."""
        return [*self.form.inputs, self.images, self.actions]

    def clone(self, run_id: object) -> dict[Component, Any]:
        """Fill the form with the settings of a run."""
        return self._restore({"run": run_id})

    def use_lora(self, path: str, task: str) -> dict[Component, Any]:
        """Put a LoRA file into the form, alone and with strength 1, and choose the model that it was trained for."""
        texts = self.words.now
        values = rules.restored(self.services.drafts.load(DRAFT))
        if task in TASKS and task != values["task"]:
            values |= {"task": task, **rules.task_values(TASKS[task])}
        rows = [row for row in rules.lora_rows(values.get(rules.LORAS)) if row["path"] == path][:1]
        values[rules.LORAS] = rows or [{"path": path, "strength": 1.0}]
        return self._fill(values, note=texts("live.lora_used", name=Path(path).name))

    def _edited(self, data: Mapping[Component, Any]) -> Any:
        if not self._loaded(data):
            return gr.skip()
        values = self._read(data)
        draft = self.services.drafts.load(DRAFT)
        # A new task is settled by its own event, which finds the old one in the draft.
        self._save(values | ({"task": draft["task"]} if draft.get("task") in TASKS else {}))
        return {self.actions: self._state(values)}

    def _task_chosen(self, data: Mapping[Component, Any]) -> Any:
        if not self._loaded(data):
            return gr.skip()
        values = self._read(data)
        before = rules.restored(self.services.drafts.load(DRAFT))
        if before["task"] == values["task"]:
            return {self.actions: self._state(values)}
        old, new = rules.task_of(before), rules.task_of(values)
        changes = rules.task_values(new)
        known, suitable = (
            [example["prompt"] for example in rules.examples(task, self.words.now)] for task in (old, new)
        )
        if values.get("prompt") in (None, *known) and values.get("prompt") not in suitable:
            changes["prompt"] = suitable[0]
        if new.mode == "t2v":
            changes |= dict.fromkeys(rules.IMAGE_FIELDS)
        return self._fill(values | changes, only=changes | {"task": new.name})

    def _generate(self, data: Mapping[Component, Any], event: gr.EventData) -> dict[Component, Any]:
        values = self._read(data)
        self._save(values)
        count = event_values(event).get("count")
        texts = self.words.now
        try:
            runs = self.services.submit_generate(rules.request_values(values), count if isinstance(count, int) else 1)
        except Problems as error:
            rows = [rules.problem_row(problem, texts) for problem in error.problems]
            general = " ".join(problem.message for problem in error.problems if not problem.field)
            return {self.actions: self._state(values, problems=rows, refused=True, note=general, note_kind="bad")}
        note = texts("generate.queued_n", n=len(runs)) if len(runs) > 1 else ""
        return {self.actions: self._state(values, submitted=runs, note=note)}

    def _set(self, data: Mapping[Component, Any], event: gr.EventData) -> dict[Component, Any]:
        values = self._read(data)
        changes: dict[str, Any] = {}
        for name, value in event_values(event).items():
            if name == "seed" and value == "last":
                newest = self.services.clips(1)
                if not newest:
                    return {self.actions: self._state(values, note=self.words.now("generate.no_last_seed"))}
                changes[name] = newest[0].get("seed")
            elif name in ("width", "height", "frames", "seed") and (value is None or type(value) is int):
                changes[name] = value
        return self._fill(values | changes, only=changes)

    def _command(self, data: Mapping[Component, Any]) -> dict[Component, Any]:
        values = self._read(data)
        try:
            command = self.services.command_text(rules.request_values(values))
        except Problems as error:
            return {self.actions: self._state(values, note=str(error), note_kind="bad")}
        return {self.actions: self._state(values, command=command)}

    def _reset(self, _data: Mapping[Component, Any]) -> dict[Component, Any]:
        return self._fill(rules.first_values(), note=self.words.now("generate.reset_done"))

    def _from_file(self, data: Mapping[Component, Any], event: gr.EventData) -> dict[Component, Any]:
        return self._restore({"media": event_values(event).get("path")}, self._read(data))

    def _use(self, data: Mapping[Component, Any], event: gr.EventData) -> dict[Component, Any]:
        return self._restore(event_values(event), self._read(data))

    def _frame(self, data: Mapping[Component, Any], event: gr.EventData) -> dict[Component, Any]:
        values, texts = self._read(data), self.words.now
        path = event_values(event).get("path")
        try:
            image = self._uploaded(path)
        except UserError as error:
            return {self.actions: self._state(values, note=error.message, note_kind="bad")}
        old = rules.task_of(values)
        new = rules.image_task(old)
        changes: dict[str, Any] = {"image": image}
        note = texts("generate.frame_set")
        if new != old:
            changes |= {"task": new.name, **rules.task_values(new)}
            note = texts("generate.frame_other_model", title=new.title)
        return self._fill(values | changes, only=changes, note=note)

    def _loaded(self, data: Mapping[Component, Any]) -> bool:
        """Whether the page shows the draft already: fields may report a change while they are being filled."""
        state = data.get(self.actions)
        return isinstance(state, dict) and bool(state.get("task"))

    # --- helpers --------------------------------------------------------------------------------------------------

    def _read(self, data: Mapping[Component, Any]) -> dict[str, Any]:
        values = self.form.read(data)
        values[rules.LORAS] = rules.lora_rows(values.get(rules.LORAS))
        return values

    def _save(self, values: Mapping[str, Any]) -> None:
        self.services.drafts.save(DRAFT, dict(values))

    def _state(self, values: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
        """What the start bar shows; with `extra` it also acts once (a message, a command, a start)."""
        state = rules.describe(self.services, values, self.words.now) | {"help": self.form.help()}
        return state | extra | ({"turn": uuid.uuid4().hex} if extra else {})

    def _fill(
        self, values: dict[str, Any], only: Mapping[str, Any] | None = None, **extra: Any
    ) -> dict[Component, Any]:
        """Show values (all, or those of `only`), keep them as the draft, open what belongs to the task."""
        self._save(values)
        updates: dict[Any, Any] = self.form.write(values if only is None else {name: values[name] for name in only})
        updates[self.actions] = self._state(values, **extra)
        if only is None or "task" in only or "image" in only:
            has_image = any(values.get(name) for name in rules.IMAGE_FIELDS)
            updates[self.images] = gr.update(open=has_image or rules.task_of(values).mode == "i2v")
        return updates

    def _uploaded(self, path: object) -> str:
        """A file that the page has just uploaded, and nothing else.

        Raises:
            UserError: any other path.
        """
        if not isinstance(path, str):
            raise UserError("The page sent no file. Try again.")
        full = self.services.roots.absolute(path)
        if not Roots([self.services.upload_folder], exposed=True).allows(full):
            raise UserError("The page sent a file that was not uploaded. Try again.")
        return full

    def _restore(self, source: Mapping[str, Any], before: dict[str, Any] | None = None) -> dict[Component, Any]:
        """Fill the form from a clip, an uploaded file or a run; say what is missing."""
        texts = self.words.now
        try:
            settings = self._settings(source)
        except Problems as error:
            values = before or rules.restored(self.services.drafts.load(DRAFT))
            return {self.actions: self._state(values, note=sentences(error), note_kind="bad")}
        values = rules.form_values(self.services, settings)
        missing = [str(path) for path in settings.get("missing", [])]
        for name in rules.IMAGE_FIELDS:
            path = values.get(name)
            values[name] = None if path in missing or not path else self._kept(path)
        note = texts("generate.restored_missing", names=", ".join(missing)) if missing else texts("generate.restored")
        return self._fill(values, note=note, note_kind="bad" if missing else "")

    def _kept(self, path: str) -> str | None:
        """An image of a run as a file that the image field may show; a clip's settings may name any file, so it is
        copied to where the page can fetch it only if it is an image."""
        try:
            full = self.services.roots.absolute(path)
            check_image(full)
            return save_file_to_cache(full, cache_dir=str(self.services.upload_folder))
        except (OSError, UserError):
            return None

    def _settings(self, source: Mapping[str, Any]) -> dict[str, Any]:
        run_id, media = source.get("run"), source.get("media")
        if isinstance(run_id, str):
            run, view = self.services.run(run_id)
            return {"options": self.services.pages.options_of(run), "seed": view.seed}
        if isinstance(media, str):
            return self.services.settings_of(media)
        raise UserError("The page sent no clip. Load it again.")
