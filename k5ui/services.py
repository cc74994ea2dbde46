"""Everything that the page can ask for, without Gradio: submit, check, stop, list, remember. No globals."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from backend.config.generate import GenerateOptions
from backend.config.metadata import read_settings
from backend.config.options import specs, to_command_text, to_toml
from backend.config.tasks import DEMO_WEIGHTS, TASKS
from backend.errors import K5Error, Problem, Problems, UserError
from backend.files import require_free_space, write_atomic
from backend.jobs import runner
from backend.jobs.facts import OPTIONS_FILE
from backend.jobs.queue import JobQueue
from backend.jobs.states import JobState
from backend.jobs.store import Run, RunStore
from backend.jobs.supervisor import ENTRIES
from backend.jobs.view import RunView, view_run
from k5ui.caching.desk import CachingDesk
from k5ui.datasets.library import DatasetLibrary
from k5ui.device import DeviceMonitor
from k5ui.drafts import Drafts
from k5ui.forecast import PastRun, forecast, workload
from k5ui.media import MediaIds
from k5ui.requests import Intake, seeds
from k5ui.roots import Roots
from k5ui.settings import Settings
from k5ui.training.desk import TrainingDesk
from k5ui.training.live import LiveTrainings
from k5ui.views import RunPages

MAX_COUNT = 64
_FRESH_SECONDS = 0.4
_LISTED_RUNS = 200
_PAST_RUNS = 50
_LORA_DEPTH = 2
_LOG = logging.getLogger(__name__)


class Services:
    """One workspace and what can be done in it.

    `roots` are folders that requests may read besides the workspace when `exposed`.
    Methods may be called from any thread and end within a second.

    Raises:
        UserError: the workspace or its settings cannot be used.
    """

    def __init__(self, workspace: str | Path, roots: Iterable[str | Path] = (), exposed: bool = False) -> None:
        self.workspace = Path(workspace).absolute()
        self.exposed = exposed
        self.upload_folder = upload_folder(self.workspace)
        self.roots = Roots([self.workspace, DEMO_WEIGHTS, *roots], exposed)
        self.store = RunStore(self.workspace)
        self.queue = JobQueue(self.store)
        self.settings = Settings(self.workspace / "settings.toml", self.roots)
        self.drafts = Drafts(self.workspace / "drafts")
        self.media = MediaIds(self.store.runs_folder, self.workspace / ".secret")
        self.datasets = DatasetLibrary(self.workspace, self.roots)
        self.device = DeviceMonitor()
        self.pages = RunPages(self.media)
        self.caching = CachingDesk(self)
        self.training = TrainingDesk(self)
        self.live = LiveTrainings(self)
        cache = self.workspace / "cache" / "text"
        draft_run = self.store.runs_folder / "new"
        self._intake = Intake(self.settings, self.roots, self.upload_folder, cache, draft_run)
        self._guard = threading.Lock()
        self._seen: tuple[float, list[tuple[Run, RunView]]] = (float("-inf"), [])
        self._signature: Any = None
        self._version = 0

    def start(self) -> None:
        """Begin to work the queue off."""
        self.queue.start_thread()

    def close(self) -> None:
        """Stop working the queue off; jobs that run go on."""
        self.queue.close()
        self.datasets.close()

    # --- requests -------------------------------------------------------------------------------------------------

    def check_generate(self, values: Mapping[str, Any]) -> tuple[list[Problem], dict[str, Any]]:
        """Every problem of a form, and the facts about it (see `forecast`; empty while the form cannot be read)."""
        try:
            options = self._intake.options(values)
        except Problems as error:
            return list(error.problems), {}
        return self._intake.check(options), forecast(options, self._past_runs(), self.device.has_gpu)

    def submit_generate(self, values: Mapping[str, Any], count: int = 1) -> list[str]:
        """Make `count` runs from a form, with seeds that follow each other, and put them into the queue.

        Nothing is queued unless all of them could be made.

        Raises:
            Problems: everything that is wrong with the form; no space; the workspace cannot be written.
        """
        if type(count) is not int or not 1 <= count <= MAX_COUNT:
            raise UserError(f"Choose a number of clips from 1 to {MAX_COUNT}.", "count")
        options = self._intake.options(values)
        problems = self._intake.check(options)
        if problems:
            raise Problems(problems)
        facts = forecast(options, (), self.device.has_gpu)
        require_free_space(self.workspace, (facts["disk_bytes"] or 0) * count)
        runs: list[str] = []
        try:
            for seed in seeds(options.seed, count):
                runs.append(self._create(options.model_copy(update={"seed": seed})))
            for run_id in runs:
                self.queue.enqueue(run_id)
        except K5Error:
            for run_id in runs:
                with suppress(K5Error):
                    self.store.trash(run_id)
            raise
        finally:
            self._forget()
        return runs

    def _create(self, options: GenerateOptions) -> str:
        run = self.store.create("generate", options, _title(options))
        try:
            kept = self._intake.keep_files(options, run.folder / "inputs")
            if kept != options:  # not in the queue yet, so nobody has read the first version
                write_atomic(run.folder / OPTIONS_FILE, to_toml(kept))
        except K5Error:
            self.store.trash(run.id)
            raise
        return run.id

    def command_text(self, values: Mapping[str, Any]) -> str:
        """The form as a command line for people.

        Raises:
            Problems: the form cannot be read.
        """
        return to_command_text(self._intake.options(values), ENTRIES["generate"])

    def settings_of(self, source: str) -> dict[str, Any]:
        """The settings inside a clip: a media id, or the path of a file that was dropped on the page.

        `missing` is added: the files that its options name and that are not here (any more).

        Raises:
            UserError: no such clip, a path that may not be read, or no settings inside.
        """
        found = self.media.resolve(source)
        if found is not None:
            path = found.path
        else:
            path = Path(self.roots.absolute(source))
            if not Roots([self.upload_folder, self.workspace], exposed=True).allows(path):
                raise UserError("There is no such clip. Drop the file on the page.")
        settings = read_settings(path)
        return settings | {"missing": self._missing_files(settings["options"])}

    def _missing_files(self, options: Mapping[str, Any]) -> list[str]:
        missing = []
        for spec in specs(GenerateOptions):
            value = options.get(spec.name)
            if spec.path == "file" and value:
                named = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
                missing += [item for item in named if self._is_missing(item)]
        return missing

    def _is_missing(self, path: str) -> bool:
        try:
            return not os.path.isfile(self.roots.absolute(path))
        except UserError:
            return True

    # --- runs -----------------------------------------------------------------------------------------------------

    def stop(self, run_id: str) -> None:
        """Ask a run to stop between two steps; one that waits leaves the queue.

        Raises:
            UserError: unknown run, or one that has ended.
        """
        run = self.store.get(run_id)
        try:
            if view_run(run).state is JobState.QUEUED:
                self.queue.remove(run_id)
            else:
                runner.request(run, "stop")
        finally:
            self._forget()

    def kill(self, run_id: str) -> None:
        """End a run by force; this takes some seconds and goes on after the call.

        Raises:
            UserError: unknown run, or one that is not working.
        """
        run = self.store.get(run_id)
        if not view_run(run).state.alive:
            raise UserError(f"The run '{run.title}' is not working, so there is nothing to end.")
        threading.Thread(target=self._kill, args=(run,), name=f"kill {run.id}", daemon=True).start()

    def _kill(self, run: Run) -> None:
        try:
            runner.kill(run)
        except (K5Error, OSError):
            _LOG.exception("Run %s could not be ended.", run.id)
        self._forget()

    def trash(self, run_id: str) -> None:
        """Move a run that does not work (any more) to the trash folder of the workspace.

        Raises:
            UserError: unknown run, or one that works.
        """
        self.store.trash(run_id)
        self._forget()

    def enqueue(self, run_id: str) -> None:
        """Put a run that was never started at the end of the queue.

        Raises:
            UserError: unknown run, or one that was started before.
        """
        self.queue.enqueue(run_id)
        self._forget()

    def move(self, run_id: str, position: int) -> None:
        """Put a waiting run at a place of the queue, 0 for the next.

        Raises:
            UserError: it does not wait.
        """
        self.queue.move(run_id, position)
        self._forget()

    def runs(self, limit: int = 100) -> list[RunView]:
        """The newest runs."""
        return [view for _, view in self._views()[:limit]]

    def run(self, run_id: str) -> tuple[Run, RunView]:
        """One run as it is now.

        Raises:
            UserError: there is none of this name.
        """
        run = self.store.get(run_id)
        return run, view_run(run)

    def run_pages(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest runs as GET /api/runs lists them."""
        return [self.pages.summary(run, view) for run, view in self._views()[:limit]]

    def clips(self, limit: int = 60) -> list[dict[str, Any]]:
        """The newest clips and images of all runs: media, url, name, kind, width, height, frames, fps, seconds, seed,
        prompt, item, task, run_id, title, created (seconds since 1970)."""
        clips: list[dict[str, Any]] = []
        for run, view in self._views():
            if len(clips) >= limit:
                break
            clips += self.pages.clips(run, view)
        return clips[:limit]

    def status(self) -> dict[str, Any]:
        """What the header shows; `version` grows whenever the lists of runs or clips or the queue have changed."""
        views, waiting = self._views(), self.queue.pending()
        signature = ([(view.id, view.state, len(view.outputs)) for _, view in views], waiting)
        with self._guard:
            if signature != self._signature:
                self._signature, self._version = signature, self._version + 1
            version = self._version
        working = next(((run, view) for run, view in views if view.state.alive), None)
        return {
            "running": self.pages.summary(*working) if working else None,
            "queue": waiting,
            "queue_problem": self.queue.problem,
            "device": self.device_status(),
            "version": version,
        }

    def device_status(self) -> dict[str, Any]:
        """See `DeviceMonitor.status`."""
        return self.device.status()

    def lora_files(self) -> list[dict[str, str]]:
        """LoRA files to choose from, by name: those of the workspace's `loras` folder and of the folder in the
        settings, two levels deep; each with `name` (path inside its folder) and `path`."""
        found: dict[str, str] = {}
        for folder in (self.workspace / "loras", Path(self.settings.lora_folder or "")):
            if folder != Path("") and folder.is_dir():
                for depth in range(_LORA_DEPTH):
                    for path in folder.glob("*/" * depth + "*.safetensors"):
                        found.setdefault(os.fspath(path), path.relative_to(folder).as_posix())
        return [{"name": name, "path": path} for path, name in sorted(found.items(), key=lambda item: item[1].lower())]

    def _views(self) -> list[tuple[Run, RunView]]:
        """Newest runs with their views; several polls within a moment share one reading."""
        with self._guard:
            moment, views = self._seen
            if time.monotonic() - moment >= _FRESH_SECONDS:
                views = [(run, view_run(run)) for run in self.store.list()[:_LISTED_RUNS]]
                self._seen = (time.monotonic(), views)
            return views

    def _forget(self) -> None:
        """The next poll reads again: something has just been changed from here."""
        with self._guard:
            self._seen = (float("-inf"), [])

    def _past_runs(self) -> list[PastRun]:
        ended = [(run, view) for run, view in self._views() if view.kind == "generate" and view.seconds is not None]
        past = []
        for run, view in [item for item in ended if item[1].state is JobState.FINISHED][:_PAST_RUNS]:
            work = workload(self.pages.options_of(run))
            if work is not None and view.seconds is not None:
                past.append(PastRun(work, view.seconds))
        return past


def upload_folder(workspace: Path) -> Path:
    """Where Gradio keeps what was dropped on the page; emptied at every start and by age."""
    return workspace / "cache" / "uploads"


def _title(options: GenerateOptions) -> str:
    if options.prompt and options.prompt.strip():
        return " ".join(options.prompt.split())[:120]
    named = options.from_file or options.latent_path
    return Path(named).name if named else TASKS[options.task].title
