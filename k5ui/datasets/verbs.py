"""What the page can do with datasets: each verb takes one JSON array and answers an object, trouble in sentences.

{"error": sentence} or {"problems": [{field, message}]} say why nothing was done; "conflict": true is added when the
file is not what the page shows any more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.config.dataset_document import DatasetDocument
from backend.errors import K5Error, Problems, UserError
from k5ui.datasets import creating, documents, linting
from k5ui.datasets.arguments import Arguments, text_of
from k5ui.datasets.caption_changes import change_captions, set_caption, step
from k5ui.datasets.caption_journal import CaptionJournal
from k5ui.datasets.known import KnownDataset
from k5ui.datasets.library import DatasetLibrary
from k5ui.datasets.pages import problem_list
from k5ui.datasets.replacing import Replacement
from k5ui.datasets.snapshot import Row
from k5ui.services import Services

_MAX_TEXT = 100_000
_MAX_CAPTION = 1 << 20
_LOG = logging.getLogger(__name__)
Answer = dict[str, Any]
Verb = Callable[[Any], Answer]


def dataset_verbs(services: Services) -> list[Verb]:
    """The verbs of the Dataset tab, named as in the scripts that call them."""
    files, contents, checks = _FileVerbs(services), _ContentVerbs(services), _CheckVerbs(services)
    actions: list[Callable[[Arguments], Answer]] = [
        *(files.new_dataset, files.open_dataset, files.forget_dataset, files.set_key, files.add_entry),
        *(files.remove_entry, files.save_text),
        *(contents.set_caption, contents.change_captions, contents.undo_captions, contents.redo_captions),
        *(contents.exclude, checks.check, checks.ignore_findings, checks.fix_finding),
    ]
    return [_verb(action) for action in actions]


def _verb(action: Callable[[Arguments], Answer]) -> Verb:
    name = getattr(action, "__name__", "verb")

    def call(arguments: Any) -> Answer:
        try:
            return action(Arguments(arguments))
        except documents.Conflict as error:
            return {"error": error.message, "conflict": True}
        except UserError as error:
            if error.field is None:
                return {"error": error.message}
            return {"error": error.message, "problems": problem_list(error.problems)}
        except Problems as error:
            return {"problems": problem_list(error.problems)}
        except (K5Error, OSError) as error:
            _LOG.exception("The verb %s failed.", name)
            return {"error": f"This did not work: {error}"}

    call.__name__ = name
    return call


class _Verbs:
    def __init__(self, services: Services) -> None:
        self.services = services
        self.library: DatasetLibrary = services.datasets

    def dataset(self, arguments: Arguments) -> KnownDataset:
        return self.library.get(arguments.text(0, 100))

    def change(self, dataset: KnownDataset, revision: str, change: Callable[[DatasetDocument], None]) -> Answer:
        """Change a dataset file; nothing that leads an exposed app out of its roots is written."""

        def checked(document: DatasetDocument) -> None:
            change(document)
            self.library.check_paths(document)

        after = documents.change_document(dataset.path, revision, checked)
        self.library.scans.refresh(dataset)
        return {"revision": after}


class _FileVerbs(_Verbs):
    """Dataset files: made, opened, changed."""

    def new_dataset(self, arguments: Arguments) -> Answer:
        """[folder, name|null] -> {"id"}."""
        folder = Path(self.library.roots.absolute(arguments.path(0), "folder"))
        name = arguments.text_or_none(1, 100)
        path = creating.create(folder, name, self.library.folder, self.library.caches, self.library.reader)
        return {"id": self._shown(self.library.known.add(os.fspath(path)))}

    def open_dataset(self, arguments: Arguments) -> Answer:
        """[path] -> {"id"}."""
        return {"id": self._shown(self.library.known.add(arguments.path(0)))}

    def _shown(self, dataset: KnownDataset) -> str:
        self.library.scans.look(dataset)
        return dataset.id

    def forget_dataset(self, arguments: Arguments) -> Answer:
        """[id] -> {}; the file stays."""
        self.library.known.forget(arguments.text(0, 100))
        return {}

    def set_key(self, arguments: Arguments) -> Answer:
        """[id, revision, "general"|index, key, value|null] -> {"revision"}."""
        dataset, place, key = self.dataset(arguments), arguments.place(2), arguments.text(3, 100)
        value = arguments.setting(4)
        return self.change(
            dataset, arguments.text(1, 100), lambda document: documents.set_key(document, place, key, value)
        )

    def add_entry(self, arguments: Arguments) -> Answer:
        """[id, revision, folder, "video"|"image"] -> {"revision", "index"}."""
        dataset, kind = self.dataset(arguments), arguments.text(3, 10)
        folder = Path(self.library.roots.absolute(arguments.path(2), "folder"))
        found = creating.look_into(folder, self.library.reader).get(kind)
        if found is None:
            what = "videos" if kind == "video" else "images"
            raise UserError(f"There are no {what} in {folder}. Choose another folder or kind.", "folder")
        place: list[int] = []

        def add(document: DatasetDocument) -> None:
            used = [str(table.get("cache_directory", "")) for table in document.datasets]
            cache = creating.free_cache(self.library.caches / dataset.path.stem / kind, used)
            general = {key: document.general[key] for key in ("resolution",) if key in document.general}
            tiny = 0 < found.side <= creating.TINY_SIDE
            place.append(document.add_dataset(creating.table_for(kind, folder, found, cache, general, tiny)))
            document.config()

        return self.change(dataset, arguments.text(1, 100), add) | {"index": place[-1]}

    def remove_entry(self, arguments: Arguments) -> Answer:
        """[id, revision, index] -> {"revision"}; folders and caches stay."""
        dataset, index = self.dataset(arguments), arguments.index(2)
        return self.change(dataset, arguments.text(1, 100), lambda document: document.remove_dataset(index))

    def save_text(self, arguments: Arguments) -> Answer:
        """[id, revision, text] -> {"revision"}."""
        dataset, text = self.dataset(arguments), arguments.text(2, _MAX_TEXT)
        return self.change(dataset, arguments.text(1, 100), lambda document: document.replace_text(text))


class _ContentVerbs(_Verbs):
    """Captions, and which sources are used."""

    def set_caption(self, arguments: Arguments) -> Answer:
        """[id, key, caption_revision, text] -> {"caption_revision"}."""
        dataset, key, revision = self.dataset(arguments), arguments.text(1, 100), arguments.text(2, 100)
        return set_caption(self.library, dataset, key, revision, arguments.text(3, _MAX_CAPTION, empty=True))

    def change_captions(self, arguments: Arguments) -> Answer:
        """[id, entry|null, keys|null, {find, replace, regex, prefix, suffix}, dry] -> see `caption_changes`."""
        dataset, entry, keys = self.dataset(arguments), arguments.index_or_none(1), arguments.texts_or_none(2)
        table = arguments.table(3)
        find, replace, prefix, suffix = (text_of(table, key) for key in ("find", "replace", "prefix", "suffix"))
        how = Replacement(find, replace, table.get("regex") is True, prefix, suffix)
        return change_captions(self.library, dataset, entry, keys, how, arguments.switch(4))

    def undo_captions(self, arguments: Arguments) -> Answer:
        """[id] -> {"changed", "left", "conflicts"}."""
        return step(self.library, self.dataset(arguments), CaptionJournal.undo)

    def redo_captions(self, arguments: Arguments) -> Answer:
        """[id] -> {"changed", "left", "conflicts"}."""
        return step(self.library, self.dataset(arguments), CaptionJournal.redo)

    def exclude(self, arguments: Arguments) -> Answer:
        """[id, keys, on] -> {"revision"}: sources that are left out, or used again."""
        dataset, keys, on = self.dataset(arguments), arguments.texts(1), arguments.switch(2)
        rows = _rows(self.library, dataset, keys)
        return exclude_rows(self, dataset, rows, on)


class _CheckVerbs(_Verbs):
    """Lint: starting a check, and what is done about its findings."""

    def check(self, arguments: Arguments) -> Answer:
        """[id, trigger_word|null] -> {"run"}."""
        dataset = self.dataset(arguments)
        return {"run": linting.start_check(self.services, dataset, arguments.text_or_none(1, linting.MAX_TRIGGER))}

    def ignore_findings(self, arguments: Arguments) -> Answer:
        """[id, finding ids, on] -> {}."""
        dataset, ids, on = self.dataset(arguments), arguments.texts(1, 100), arguments.switch(2)
        self.library.ignored.change(dataset.id, ids, on)
        return {}

    def fix_finding(self, arguments: Arguments) -> Answer:
        """[id, finding id, fix, keys|null] -> {"revision"}: exclude, set_source_fps_auto or add_prefix.

        Of near duplicates and equal captions the first source stays, unless `keys` says which ones go.
        """
        dataset, wanted, fix = self.dataset(arguments), arguments.text(1, 100), arguments.text(2, 100)
        page = linting.lint_page(self.services, dataset)
        finding = next((item for item in page["findings"] if item["id"] == wanted), None)
        if finding is None or fix not in finding["fixes"]:
            raise UserError("There is no such finding (any more). Load the page again.")
        if fix == "exclude":
            several = finding["kind"] in ("near_duplicate", "equal_captions")
            keys = arguments.texts_or_none(3) or finding["keys"][1 if several else 0 :]
            if not set(keys) <= set(finding["keys"]):
                raise UserError("There is no such item in this finding. Load the page again.")
            return exclude_rows(self, dataset, _rows(self.library, dataset, keys), True)
        _, revision = documents.read_document(dataset.path)
        index = finding["dataset"]
        if fix == "set_source_fps_auto":
            return self.change(
                dataset, revision, lambda document: documents.set_key(document, index, "source_fps", "auto")
            )
        if fix == "add_prefix":
            word = finding["values"].get("trigger_word") or page["trigger_word"]
            if not isinstance(word, str) or not word.strip():
                raise UserError("The check had no trigger word. Write caption_prefix in the settings of the dataset.")
            return self.change(dataset, revision, lambda document: _add_prefix(document, index, word.strip()))
        raise UserError("This finding is repaired in the page.")


def _rows(library: DatasetLibrary, dataset: KnownDataset, keys: list[str]) -> list[Row]:
    known = library.snapshot(dataset).by_key
    if not keys or not all(key in known for key in keys):
        raise UserError("There is no such item (any more). Load the page again.")
    return [known[key] for key in dict.fromkeys(keys)]


def exclude_rows(verbs: _Verbs, dataset: KnownDataset, rows: list[Row], on: bool) -> Answer:
    """Leave sources out of their tables, or take them back."""
    changes: dict[int, list[str]] = {}
    for row in rows:
        changes.setdefault(row.entry, []).append(row.source.identity)
    _, revision = documents.read_document(dataset.path)

    def change(document: DatasetDocument) -> None:
        for index, identities in changes.items():
            documents.exclude(document, index, identities, on)

    answer = verbs.change(dataset, revision, change)
    verbs.library.scans.look(dataset, 0.25)
    return answer


def _add_prefix(document: DatasetDocument, index: int, word: str) -> None:
    tables = document.datasets
    own = tables[index] if index < len(tables) else {}
    given = own.get("caption_prefix", document.general.get("caption_prefix", ""))
    before = given if isinstance(given, str) else ""
    if word not in before:
        documents.set_key(document, index, "caption_prefix", f"{word} {before}".strip())
