"""Everything that the Caching tab asks for: the state of the caches, starting, stopping, tidying up."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from backend.data.ledger import DatasetLedger, check_dataset
from backend.data.prune import prune
from backend.errors import K5Error, Problems, UserError
from backend.files import existing_parent, require_free_space
from backend.jobs.states import JobState
from k5ui.caching.keeper import Keeper
from k5ui.caching.ledgers import Books, keep_books, recipes
from k5ui.caching.pace import expected_seconds, note_work
from k5ui.caching.request import (
    KINDS,
    SPECS,
    Kind,
    Wanted,
    What,
    latent_options,
    problems_of,
    text_options,
    wanted,
)
from k5ui.caching.runs import CacheRuns, Viewed, at_work, last_pages, live_page
from k5ui.datasets.inside import require_inside
from k5ui.datasets.keys import source_key
from k5ui.text.loader import Texts

if TYPE_CHECKING:
    from backend.config.dataset import DatasetConfig
    from backend.jobs.view import RunView
    from k5ui.datasets.known import KnownDataset
    from k5ui.services import Services

DRAFT = "caching"
_MAX_TEXT = 400


class CachingDesk:
    """Caching in one workspace. Methods may be called from any thread; none of them looks at a dataset itself but in a
    thread of its own, so all end at once."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._runs = CacheRuns(services.store, services.pages.options_of)
        self._books = Keeper(self._check)
        self._notes: dict[str, dict[str, Any]] = {}

    # --- the form -------------------------------------------------------------------------------------------------

    def overview(self) -> dict[str, Any]:
        """The known datasets, which one is chosen, and the form as it was left."""
        draft = self._services.drafts.load(DRAFT)
        form = wanted(draft)
        known = self._services.datasets.list()
        chosen = draft.get("dataset")
        if chosen not in [dataset.id for dataset in known]:
            chosen = known[0].id if known else None
        return {
            "datasets": [{"id": dataset.id, "name": dataset.name, "path": str(dataset.path)} for dataset in known],
            "chosen": chosen,
            "values": dict(form.values),
            "again": form.again,
        }

    def change(self, name: str, value: Any) -> None:
        """Keep one choice of the form: "dataset", "again", or an option (None: its default).

        Raises:
            UserError: there is no such choice.
        """
        draft = self._services.drafts.load(DRAFT)
        if name == "dataset" and isinstance(value, str):
            draft["dataset"] = self._services.datasets.get(value).id
        elif name == "again" and isinstance(value, bool):
            draft["again"] = value
        elif name in SPECS and (value is None or isinstance(value, bool | int | float | str)):
            form = wanted(draft)
            text = value.strip()[:_MAX_TEXT] if isinstance(value, str) else value
            kept = {key: item for key, item in form.values.items() if key != name}
            draft["values"] = kept if text in (None, "") else kept | {name: text}
        else:
            raise UserError("The page sent a setting that caching does not have. Load it again.")
        self._services.drafts.save(DRAFT, draft)

    def _form(self) -> Wanted:
        return wanted(self._services.drafts.load(DRAFT))

    # --- the state ------------------------------------------------------------------------------------------------

    def page(self, dataset: str) -> dict[str, Any]:
        """GET api/caching/{id}: the newest known state of the caches, what is left to do, and the runs.

        Raises:
            UserError: there is no such dataset.
        """
        known = self._services.datasets.get(dataset)
        form = self._form()
        runs = self._runs.of_dataset(known.path)
        active = at_work(runs)
        kept = self._books.look(known.id, self._reasons(known, form, runs), _progress(active))
        books: Books | None = kept.value
        return {
            "id": known.id,
            "name": known.name,
            "path": str(known.path),
            "checking": kept.working,
            "checked": kept.checked,
            "error": kept.error,
            "entries": books.entries if books else [],
            "ready": books.ready if books else False,
            "problems": books.problems if books else [],
            "needs": self._needs(books, form) if books else None,
            "runs": [live_page(viewed, self._frame(known, viewed[1])) for viewed in active],
            "last": last_pages(runs),
            "note": self._notes.get(known.id),
        }

    def _frame(self, known: KnownDataset, view: RunView) -> str | None:
        """The address of a picture of the item at work; None before the dataset has been looked through."""
        if not view.item_name or view.dataset is None:
            return None
        key = source_key(view.dataset, view.item_name)
        snapshot = self._services.datasets.scans.look(known, 0.0).snapshot
        return f"datasets/{known.id}/thumb/{key}" if snapshot is not None and key in snapshot.by_key else None

    def _reasons(self, known: KnownDataset, form: Wanted, runs: list[Viewed]) -> tuple[Any, ...]:
        """What makes the state old at once when it changes."""
        try:
            facts = known.path.stat()
            stamp = (facts.st_mtime_ns, facts.st_size)
        except OSError:
            stamp = None
        weights = self._services.settings.weights_for(form.task)
        states = tuple((run.id, view.state) for run, view in runs[:20])
        values = {key: item for key, item in form.values.items() if item is not None}
        return stamp, weights, tuple(sorted(values.items())), states, self._services.settings.language

    def _check(self, dataset: str) -> Books:
        texts = Texts(self._services.settings.language)
        known = self._services.datasets.get(dataset)
        config = self._config(dataset)
        gpu = self._services.device.has_gpu
        return keep_books(config, known.path, self._form(), self._services.settings, texts, gpu=gpu)

    def _config(self, dataset: str) -> DatasetConfig:
        """What the configuration says now; an exposed app reads and writes inside its roots only.

        Raises:
            Problems: everything that is wrong with it, or something outside of the roots.
        """
        config = self._services.datasets.config(dataset)
        require_inside(config, self._services.roots)
        return config

    def _needs(self, books: Books, form: Wanted) -> dict[str, Any]:
        """Space and time of what is left to do, and of everything again; None where nobody can know."""
        todo = books.everything if form.again else books.pending
        free = [shutil.disk_usage(existing_parent(folder)).free for folder in books.folders if _is_there(folder)]
        seconds: dict[str, float | None] = {}
        for kind in KINDS:
            try:
                options = _options(kind, form, None, self._services).model_dump()
            except Problems:
                seconds[kind] = None
                continue
            seconds[kind] = expected_seconds(self._runs.measured(kind, options), todo.work[kind])
        return {
            kind: {"items": todo.work[kind].items, "bytes": todo.bytes[kind], "seconds": seconds[kind]}
            for kind in KINDS
        } | {"pending": {kind: books.pending.work[kind].items for kind in KINDS}, "free": min(free, default=None)}

    def check(self, dataset: str) -> None:
        """Look at all caches again, now.

        Raises:
            UserError: there is no such dataset.
        """
        self._books.ask(self._services.datasets.get(dataset).id)

    # --- runs -----------------------------------------------------------------------------------------------------

    def cache(self, dataset: str, what: str, options: Mapping[str, Any] | None = None) -> list[str]:
        """Put the runs for "all", "latents", "text", or "stale" (kinds with something left to do) into the queue.

        `options` replace choices of the form, `again` among them. Nothing is queued unless all of it can be.

        Raises:
            Problems: everything that keeps it from starting, each at its field.
        """
        known = self._services.datasets.get(dataset)
        form = _replaced(self._form(), options or {}, what)
        runs = self._runs.of_dataset(known.path)
        active = at_work(runs)
        books: Books | None = self._books.look(
            known.id, self._reasons(known, self._form(), runs), _progress(active)
        ).value
        kinds = _kinds(what, books)
        if any(run.kind in kinds for run, _ in active):
            raise UserError("This dataset is being cached already. Stop it first, or wait until it is done.")
        self._config(known.id)
        problems = problems_of(kinds, form, known.path, self._services.settings)
        if problems:
            raise Problems(problems)
        todo = (books.everything if form.again else books.pending) if books else None
        if todo is not None and books is not None:
            for folder in books.folders[:1]:
                require_free_space(folder, sum(todo.bytes[kind] for kind in kinds))
        made: list[str] = []
        try:
            for kind in kinds:
                settled = _options(kind, form, known.path, self._services)
                run = self._services.store.create(kind, settled, known.name)
                made.append(run.id)
                if todo is not None:
                    note_work(run.folder, todo.work[kind])
            for run_id in made:
                self._services.enqueue(run_id)
        except K5Error:
            for run_id in made:
                with suppress(K5Error):
                    self._services.trash(run_id)
            raise
        return made

    def stop(self, dataset: str) -> None:
        """Stop what works on a dataset after the item at work, and take what waits out of the queue.

        What is cached stays; the next start continues there.

        Raises:
            UserError: there is no such dataset, or nothing works on it.
        """
        known = self._services.datasets.get(dataset)
        active = at_work(self._runs.of_dataset(known.path))
        if not active:
            raise UserError("Nothing is being cached for this dataset.")
        # Those that wait first: else the next one would begin when the one at work has ended.
        for run, view in sorted(active, key=lambda item: item[1].state is not JobState.QUEUED):
            if view.state is JobState.QUEUED:
                self._services.trash(run.id)
            elif view.state is not JobState.STOPPING:
                self._services.stop(run.id)

    # --- tidying up -----------------------------------------------------------------------------------------------

    def prune(self, dataset: str) -> None:
        """Begin to move the orphans of a dataset to the trash of its cache folders; `note` of the page says the result.

        Raises:
            UserError: there is no such dataset, or it is being cached.
        """
        known = self._services.datasets.get(dataset)
        if at_work(self._runs.of_dataset(known.path)):
            raise UserError("This dataset is being cached. Tidy up when that is done, or stop it first.")
        self._books.run(known.id, lambda: self._prune(known.id))

    def _prune(self, dataset: str) -> None:
        texts = Texts(self._services.settings.language)
        kind = ""
        try:
            results = prune(self._ledgers(dataset))
            moved = [result for result in results if result.moved]
            text = texts("caching.pruned_none")
            if moved:
                count, size = sum(len(result.moved) for result in moved), sum(result.bytes for result in moved)
                where = ", ".join(str(result.trash) for result in moved)
                text = texts("caching.pruned", n=count, mb=f"{size / 1e6:.1f}", where=where)
        except K5Error as error:
            text, kind = str(error), "bad"
        self._notes[dataset] = {"turn": time.time_ns() // 1_000_000, "text": text, "kind": kind}

    def _ledgers(self, dataset: str) -> list[DatasetLedger]:
        path = self._services.datasets.get(dataset).path
        latents, text = recipes(self._form(), path, self._services.settings)
        config = self._config(dataset)
        return [check_dataset(entry, latents=latents, text=text) for entry in config.enabled]


def _progress(active: list[Viewed]) -> Any:
    return [(run.id, view.phase, view.step) for run, view in active]


def _is_there(folder: Path) -> bool:
    return existing_parent(folder).is_dir()


def _options(kind: Kind, form: Wanted, path: Path | None, services: Services) -> Any:
    make = latent_options if kind == "cache_latents" else text_options
    return make(form, path, services.settings)


def _replaced(form: Wanted, options: Mapping[str, Any], what: str) -> Wanted:
    again = options.get("again", form.again) is True and what != "stale"
    values = {key: item for key, item in options.items() if key in SPECS}
    return wanted({"values": {**form.values, **values}, "again": again})


def _kinds(what: str, books: Books | None) -> tuple[Kind, ...]:
    if what not in get_args(What):
        raise UserError("The page asked for something that caching does not do. Load it again.")
    if what == "latents":
        return ("cache_latents",)
    if what == "text":
        return ("cache_text",)
    if what == "all" or books is None:
        return KINDS
    kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if books.pending.work[kind].items)
    if not kinds:
        raise UserError("Everything is cached and up to date.")
    return kinds
