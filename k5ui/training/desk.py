"""Everything that the left half of the Training tab asks for: the form, what it means, starting, cloning, resuming."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.config.checks import weight_paths
from backend.config.options import to_command_text, to_toml
from backend.config.state_record import read_record
from backend.config.train import TrainOptions
from backend.config.train_checks import check_train, makes_samples
from backend.errors import K5Error, Problem, Problems, UserError
from backend.files import require_free_space, write_atomic
from backend.jobs.facts import OPTIONS_FILE
from backend.jobs.states import JobState
from backend.jobs.supervisor import ENTRIES
from k5ui.caching.keeper import Keeper, Kept
from k5ui.caching.runs import CacheRuns, at_work
from k5ui.datasets.inside import require_inside
from k5ui.text.loader import Texts
from k5ui.training import presets
from k5ui.training.exposed import refusals
from k5ui.training.fields import SPECS, WEIGHTS, groups, sheets
from k5ui.training.history import CHECKPOINTS, INPUTS, PROMPTS, form_of_run
from k5ui.training.import_command import Note, import_text, note_table
from k5ui.training.pace import Paces, note_plan
from k5ui.training.request import TrainIntake, Wanted, fitting, wanted
from k5ui.training.resuming import Resumed, compare_with_state, newest_state
from k5ui.training.stock import Stock, stock_line, take_stock
from k5ui.training.summary import batch_size_of, forecast, length_of

if TYPE_CHECKING:
    from k5ui.datasets.known import KnownDataset
    from k5ui.services import Services

DRAFT = "training"
MAX_PROMPTS = 200_000
_MAX_TEXT = 8000
_MAX_ITEMS = 500
_FRESH_SECONDS = 2.5
_SPARE_BYTES = 50_000_000


@dataclass(frozen=True)
class _Looked:
    """A form as it is now: what it means, what is wrong with it, what is known of its dataset."""

    form: Wanted
    dataset: KnownDataset | None
    options: TrainOptions | None
    problems: tuple[Problem, ...]
    kept: Kept | None
    resumed: Resumed | None

    @property
    def stock(self) -> Stock | None:
        """The dataset and its caches; None: not known (yet)."""
        return self.kept.value if self.kept is not None else None


class TrainingDesk:
    """The training form of one workspace. Methods may be called from any thread and end within a second."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._roots = services.roots
        self._intake = TrainIntake(services.settings, services.roots, services.workspace / "cache" / "text")
        self._cache_runs = CacheRuns(services.store, services.pages.options_of)
        self._stocks = Keeper(self._take_stock)
        self._paces = Paces(services.store, services.pages.options_of)
        self._guard = threading.RLock()
        self._seen: tuple[str, float, _Looked] | None = None

    # --- the form -------------------------------------------------------------------------------------------------

    def form(self) -> dict[str, Any]:
        """GET api/training/form: the state, and the definitions that do not change: specs, groups, presets."""
        texts = self._texts()
        fixed = {"specs": sheets(texts), "groups": groups(texts), "presets": presets.preset_table(texts)}
        return fixed | self.state()

    def state(self) -> dict[str, Any]:
        """GET api/training/state: values, problems, summary, dataset, weights, command, preset, resume, revision."""
        with self._guard:
            draft = self._services.drafts.load(DRAFT)
            looked = self._look(wanted(draft))
        texts, form, options = self._texts(), looked.form, looked.options
        dataset = self._dataset_page(looked, texts)
        summary = self._summary(looked, texts) if options is not None else None
        return {
            "revision": _revision(draft),
            "values": dict(form.values) | {"task": form.task},
            "prompts": form.prompts,
            "problems": [{"field": problem.field, "message": problem.message} for problem in looked.problems],
            "summary": summary,
            "dataset": dataset,
            "datasets": [{"id": item.id, "name": item.name} for item in self._services.datasets.list()],
            "weights": self._weights_page(looked),
            "command": to_command_text(_for_people(options, form), ENTRIES["train"]) if options is not None else "",
            "preset": presets.matching(form.values),
            "resume": looked.resumed.page(form.source) if looked.resumed is not None else None,
            "changed": len(form.values),
            "undo": isinstance(draft.get("before"), dict),
        }

    def set(self, name: str, value: Any) -> None:
        """Keep one choice: an option (None: its default), "dataset" (an id) or "prompts" (text).

        Raises:
            UserError: there is no such choice.
        """
        with self._guard:
            form = self._form()
            if name == "dataset" and isinstance(value, str):
                form = replace(form, dataset=self._services.datasets.get(value).id)
            elif name == "prompts" and (value is None or isinstance(value, str)):
                if len(value or "") > MAX_PROMPTS:
                    raise UserError("The prompts are longer than 200,000 letters. Use a prompt file.")
                form = replace(form, prompts=(value or "").replace("\0", ""))
            elif name in SPECS and name != "dataset_config" and _is_plain(value):
                kept = fitting(SPECS[name], value)
                values = {key: item for key, item in form.values.items() if key != name}
                form = replace(form, values=values if kept is None else values | {name: kept})
            else:
                raise UserError("The page sent a setting that training does not have. Load it again.")
            self._keep(form, self._services.drafts.load(DRAFT).get("before"))

    def preset(self, name: str) -> None:
        """Begin with the values of a preset.

        Raises:
            UserError: there is none of this name.
        """
        with self._guard:
            form = self._form()
            values = presets.apply(name, form.values)
            if values is None:
                raise UserError("There is no such preset. Load the page again.")
            self._replace(replace(form, values=values))

    def take_text(self, text: str) -> list[Mapping[str, str]]:
        """Fill the form from a command line, a script or TOML; returns what is to know: name, kind, text.

        Raises:
            UserError: there is no training in it.
        """
        texts = self._texts()
        found = import_text(text, texts)
        with self._guard:
            form = self._form()
            values, notes, dataset = dict(found.values), list(found.notes), form.dataset
            path = values.pop("dataset_config", None)
            if path is not None:
                dataset = self._open_dataset(path)
                if dataset is None:
                    notes.append(Note("dataset_config", "unknown", texts("train.import.no_dataset", path=path[:200])))
            prompts = "" if "sample_prompts" in values else form.prompts
            self._replace(Wanted(dataset, values, prompts))
        return note_table(notes)

    def clone(self, run_id: str) -> None:
        """Fill the form with the options of a training.

        Raises:
            UserError: no such run, or it is no training.
        """
        self._replace(self._form_of(run_id))

    def resume(self, what: str) -> None:
        """Fill the form so that it goes on: from the newest whole state of a training (its id), or from a state folder.

        Raises:
            UserError: no such run, no whole state there, or (exposed) outside of the roots.
        """
        if os.sep not in what and "/" not in what:
            form = self._form_of(what)
            run, _ = self._services.run(what)
            folders = [run.folder / CHECKPOINTS]
            if isinstance(form.values.get("output_dir"), str):
                folders.append(Path(self._roots.absolute(form.values["output_dir"], "output_dir")))
            state = newest_state(folders, form.values.get("output_name", SPECS["output_name"].default))
            if state is None:
                raise UserError(f"{run.title!r} has saved no whole state. Only a training with save_state can go on.")
            form = replace(form, source=run.id)
        else:
            state, form = Path(self._roots.absolute(what, "resume")), replace(self._form(), source="")
            read_record(state)
        self._replace(replace(form, values={**form.values, "resume": os.fspath(state)}))

    def reset(self) -> None:
        """Empty the form; the chosen dataset stays."""
        self._replace(Wanted(self._form().dataset))

    def undo(self) -> None:
        """Take back the last change of the whole form.

        Raises:
            UserError: there is none.
        """
        with self._guard:
            before = self._services.drafts.load(DRAFT).get("before")
            if not isinstance(before, dict):
                raise UserError("There is nothing to take back.")
            self._keep(wanted(before), None)

    # --- starting -------------------------------------------------------------------------------------------------

    def start(self, queue: bool) -> str:
        """Make a run of the form and put it into the queue: next in turn, or (`queue`) at its end. Returns its id.

        Raises:
            Problems: everything that keeps it from starting, each at its field; no space; the workspace cannot be
                written.
        """
        with self._guard:
            self._seen = None
            looked = self._look(self._form())
            if looked.problems or looked.options is None or looked.dataset is None:
                raise Problems(looked.problems or [Problem("dataset_config", self._texts()("train.no_dataset"))])
            require_inside(self._services.datasets.config(looked.dataset.id), self._roots)
            summary = self._summary(looked, self._texts())
            require_free_space(self._save_folder(looked.options), (summary["disk_bytes"] or 0) + _SPARE_BYTES)
            return self._enqueue(looked, queue)

    def _enqueue(self, looked: _Looked, queue: bool) -> str:
        options = looked.options
        assert options is not None
        run = self._services.store.create("train", options, options.output_name)
        try:
            if looked.form.prompts.strip():
                path = run.folder / INPUTS / PROMPTS
                write_atomic(path, looked.form.prompts)
                kept = options.model_copy(update={"sample_prompts": os.fspath(path)})
                write_atomic(run.folder / OPTIONS_FILE, to_toml(kept))  # nobody has read the first version yet
            if looked.stock is not None:
                note_plan(run.folder, batch_size_of(looked.stock, options))
            self._services.enqueue(run.id)
        except K5Error:
            with suppress(K5Error):
                self._services.trash(run.id)
            raise
        if not queue:
            with suppress(UserError):  # it has been started already
                self._services.move(run.id, 0)
        return run.id

    # --- parts ----------------------------------------------------------------------------------------------------

    def _texts(self) -> Texts:
        return Texts(self._services.settings.language)

    def _form(self) -> Wanted:
        return wanted(self._services.drafts.load(DRAFT))

    def _replace(self, form: Wanted) -> None:
        """Change the form as a whole; what it was before can be had back."""
        with self._guard:
            self._keep(form, self._form().draft())

    def _keep(self, form: Wanted, before: Any) -> None:
        revision = _revision(self._services.drafts.load(DRAFT)) + 1
        self._services.drafts.save(DRAFT, form.draft() | {"revision": revision, "before": before})
        self._seen = None

    def _form_of(self, run_id: str) -> Wanted:
        run, _ = self._services.run(run_id)
        return form_of_run(run, self._services.pages.options_of(run), self._services.settings, self._open_dataset)

    def _open_dataset(self, path: str) -> str | None:
        with suppress(UserError):
            return self._services.datasets.known.add(path).id
        return None

    def _look(self, form: Wanted) -> _Looked:
        """The form as it is; what follows from it is kept for a moment, because pages ask again and again."""
        mark = json.dumps([form.draft(), self._services.settings.language], sort_keys=True)
        if self._seen is not None and self._seen[0] == mark and time.monotonic() - self._seen[1] < _FRESH_SECONDS:
            return self._seen[2]
        looked = self._look_anew(form)
        waiting = looked.kept is not None and looked.kept.working
        self._seen = None if waiting else (mark, time.monotonic(), looked)
        return looked

    def _look_anew(self, form: Wanted) -> _Looked:
        dataset = self._dataset(form)
        kept = self._stock(dataset, form)
        prompts = self._write_prompts(form)
        try:
            options = self._intake.options(form, dataset.path if dataset is not None else None, prompts)
        except Problems as error:
            return _Looked(form, dataset, None, error.problems, kept, None)
        refused = refusals(options, self._roots)
        if refused:  # nothing more is said: whether a file outside is there is nobody's business
            return _Looked(form, dataset, None, tuple(refused), kept, None)
        resumed = compare_with_state(options) if options.resume not in (None, "latest") else None
        problems = self._problems(options, dataset, kept)
        if resumed is not None:
            problems += [Problem("resume", message) for message in resumed.impossible]
            length = length_of(options, kept.value if kept is not None else None)
            if length is not None and resumed.position is not None and resumed.position.step >= length.total_steps:
                done = {"done": resumed.position.step, "total": length.total_steps}
                problems.append(Problem("resume", self._texts()("train.resume_done", **done)))
        return _Looked(form, dataset, options, tuple(dict.fromkeys(problems)), kept, resumed)

    def _problems(self, options: TrainOptions, dataset: KnownDataset | None, kept: Kept | None) -> list[Problem]:
        texts = self._texts()
        problems = check_train(options, self._services.store.runs_folder / "new")
        if dataset is None:
            problems = [problem for problem in problems if problem.field != "dataset_config"]
            return [*problems, Problem("dataset_config", texts("train.no_dataset"))]
        if kept is None or options.show_timesteps is not None:
            return problems
        if kept.error is not None:
            return [*problems, Problem("dataset_config", kept.error)]
        stock: Stock | None = kept.value
        if stock is None:
            return [*problems, Problem("dataset_config", texts("train.stock.looking"))]
        problems += [Problem("dataset_config", sentence) for sentence in stock.problems]
        if not stock.items and not stock.problems:
            problems.append(Problem("dataset_config", texts("train.stock.empty")))
        elif any(stock.missing.values()) and not options.cache_missing:
            problems.append(Problem("cache_missing", texts("train.stock.not_ready")))
        return problems

    def _dataset(self, form: Wanted) -> KnownDataset | None:
        known = self._services.datasets.list()
        chosen = next((dataset for dataset in known if dataset.id == form.dataset), None)
        return chosen or (known[0] if known else None)

    def _write_prompts(self, form: Wanted) -> Path | None:
        """The prompts of the form as a file, which is how the engine checks and reads them."""
        if not form.prompts.strip():
            return None
        path = self._services.drafts.folder / f"{DRAFT}_{PROMPTS}"
        content = form.prompts.encode("utf-8", "replace")
        if not path.is_file() or path.read_bytes() != content:
            write_atomic(path, content)
        return path

    def _stock_options(self, form: Wanted) -> TrainOptions:
        """The part of the options that decides which caches fit; wrong values elsewhere do not matter.

        Raises:
            Problems: what of it is wrong.
        """
        names = (*WEIGHTS, "task", "nabla_resize", "nabla_stretch")
        values = {name: form.values[name] for name in names if name in form.values}
        return self._intake.options(Wanted(values=values), None, None)

    def _stock(self, dataset: KnownDataset | None, form: Wanted) -> Kept | None:
        """What is known of the caches; None without a dataset, or while nobody can say what they are compared with."""
        if dataset is None:
            return None
        try:
            options = self._stock_options(form)
        except Problems:
            return None
        try:
            facts = dataset.path.stat()
            stamp = (facts.st_mtime_ns, facts.st_size)
        except OSError:
            stamp = None
        runs = self._cache_runs.of_dataset(dataset.path)
        states = tuple((run.id, view.state) for run, view in runs[:20])
        trainings = tuple(view.id for view in self._services.runs() if view.kind == "train" and view.state.alive)
        weights = (weight_paths(options), options.nabla_resize, options.nabla_stretch)
        reasons = (stamp, weights, states, trainings, self._services.settings.language)
        progress = [(run.id, view.phase, view.step) for run, view in at_work(runs)]
        return self._stocks.look(dataset.id, reasons, progress)

    def _take_stock(self, dataset_id: str) -> Stock:
        config = self._services.datasets.config(dataset_id)
        require_inside(config, self._roots)
        return take_stock(config, self._stock_options(self._form()), gpu=self._services.device.has_gpu)

    def _save_folder(self, options: TrainOptions) -> Path:
        return Path(options.output_dir) if options.output_dir is not None else self._services.store.runs_folder

    def _summary(self, looked: _Looked, texts: Texts) -> dict[str, Any]:
        options, stock = looked.options, looked.stock
        assert options is not None
        pace = self._paces.find(options.model_dump(), batch_size_of(stock, options)) if stock is not None else None
        position = looked.resumed.position if looked.resumed is not None else None
        done = position.step if position is not None else 0
        return forecast(options, stock, pace, self._save_folder(options), texts, done)

    def _dataset_page(self, looked: _Looked, texts: Texts) -> dict[str, Any] | None:
        if looked.dataset is None:
            return None
        kept, stock = looked.kept, looked.stock
        line = stock_line(stock, texts) if stock is not None else texts("train.stock.looking")
        if kept is not None and kept.error is not None:
            line = kept.error
        busy = [view.state for _, view in self._cache_runs.of_dataset(looked.dataset.path)]
        return {
            "id": looked.dataset.id,
            "name": looked.dataset.name,
            "line": line,
            "ready": stock.ready if stock is not None else False,
            "can_cache": stock is not None and not stock.problems and any(stock.missing.values()),
            "states": dict(stock.states) if stock is not None else {},
            "checking": kept.working if kept is not None else False,
            "caching": any(state.alive or state is JobState.QUEUED for state in busy),
            "held": stock.held if stock is not None else False,
        }

    def _weights_page(self, looked: _Looked) -> dict[str, dict[str, Any]]:
        """For each part its path, whether it fits, one line about it, who named it, and whether it is needed."""
        settings, options = self._services.settings, looked.options
        defaults = settings.weights_for(looked.form.task)
        extra = options is not None and (makes_samples(options) or options.cache_missing)
        page = {}
        for part in WEIGHTS:
            given = looked.form.values.get(part)
            path = given if isinstance(given, str) else getattr(defaults, part)
            trusted = given is None or options is not None
            found = settings.inspect(path, part) if trusted else None
            page[part] = {
                "path": path,
                "given": given is not None,
                "ok": found is not None and found.ok,
                "text": found.text if found is not None else "",
                "needed": part == "dit" or extra,
            }
        return page


def _for_people(options: TrainOptions, form: Wanted) -> TrainOptions:
    """The options as a person would type them: prompts of the page in a file of their own, a folder for the results."""
    changes: dict[str, Any] = {}
    if form.prompts.strip():
        changes["sample_prompts"] = PROMPTS
        if "text_cache_dir" not in form.values:
            changes["text_cache_dir"] = None
    if options.output_dir is None:
        changes["output_dir"] = "output"
    return options.model_copy(update=changes)


def _revision(draft: Mapping[str, Any]) -> int:
    number = draft.get("revision")
    return number if type(number) is int and 0 <= number < 1 << 50 else 0


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    if len(items) > _MAX_ITEMS:
        return False
    plain = all(item is None or isinstance(item, bool | int | str) or _is_number(item) for item in items)
    return plain and all(len(item) <= _MAX_TEXT and "\0" not in item for item in items if isinstance(item, str))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
