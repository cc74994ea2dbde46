"""Which dataset configurations the page knows: those in the workspace, and those that a person opened."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import UserError
from backend.files import write_atomic
from k5ui.datasets.keys import DATASET_ID, dataset_id
from k5ui.roots import Roots

SUFFIXES = (".toml", ".json")
LIST_FILE = "known.json"
_MAX_LIST_BYTES = 4_000_000
_MAX_FILES = 2000


@dataclass(frozen=True)
class KnownDataset:
    """A dataset configuration: its id, the name that is shown, and where it lies (absolute)."""

    id: str
    name: str
    path: Path


class KnownFiles:
    """The list of datasets: `*.toml` and `*.json` of `folder`, and the files in `known.json` there.

    Files that a person took off the list stay where they are. When the app is exposed, files outside of the roots do
    not exist here. Safe to use from several threads.
    """

    def __init__(self, folder: str | Path, roots: Roots) -> None:
        self.folder = Path(folder)
        self._roots = roots
        self._guard = threading.Lock()

    def list(self) -> list[KnownDataset]:
        """All known datasets by name; files that are gone are left out, unless a person opened them."""
        opened, hidden = self._read()
        paths = [path for path in self._own() if os.fspath(path) not in hidden]
        paths += [path for path in map(Path, opened) if path not in paths]
        found = [self._dataset(path) for path in paths if not self._roots.exposed or self._roots.allows(path)]
        return sorted(found, key=lambda dataset: (dataset.name.lower(), os.fspath(dataset.path)))

    def get(self, dataset: str) -> KnownDataset:
        """The dataset of this id.

        Raises:
            UserError: there is none in the list.
        """
        if isinstance(dataset, str) and DATASET_ID.fullmatch(dataset):
            for known in self.list():
                if known.id == dataset:
                    return known
        raise UserError("This dataset is not in the list (any more). Open its file.")

    def add(self, path: str) -> KnownDataset:
        """Put a file on the list; it is there after a restart too.

        Raises:
            UserError: no such file, neither TOML nor JSON, outside of the roots, or too many files.
        """
        full = Path(self._roots.absolute(path, "path"))
        if full.suffix.lower() not in SUFFIXES:
            raise UserError(f"{full.name} is not a dataset configuration. Choose a .toml or .json file.", "path")
        if not full.is_file():
            raise UserError(f"{full} does not exist. Check the path.", "path")
        with self._guard:
            opened, hidden = self._read()
            if len(opened) >= _MAX_FILES:
                raise UserError(f"The list already holds {_MAX_FILES} datasets. Take some off the list.", "path")
            name = os.fspath(full)
            if full not in self._own() and name not in opened:
                opened.append(name)
            self._write(opened, [item for item in hidden if item != name])
        return self._dataset(full)

    def forget(self, dataset: str) -> None:
        """Take a dataset off the list; its file stays.

        Raises:
            UserError: it is not on the list.
        """
        name = os.fspath(self.get(dataset).path)
        with self._guard:
            opened, hidden = self._read()
            self._write([item for item in opened if item != name], [*(item for item in hidden if item != name), name])

    def _dataset(self, path: Path) -> KnownDataset:
        return KnownDataset(dataset_id(path), path.stem, path)

    def _own(self) -> list[Path]:
        try:
            with os.scandir(self.folder) as items:
                names = [item.name for item in items if item.is_file()]
        except OSError:
            return []
        wanted = [name for name in names if name.lower().endswith(SUFFIXES) and name[0] != "." and name != LIST_FILE]
        return [self.folder.absolute() / name for name in sorted(wanted)]

    def _read(self) -> tuple[list[str], list[str]]:
        """(files that were opened, files that were taken off); a damaged list counts as empty."""
        try:
            with open(self.folder / LIST_FILE, "rb") as handle:
                content = handle.read(_MAX_LIST_BYTES + 1)
            values = json.loads(content) if len(content) <= _MAX_LIST_BYTES else {}
        except (OSError, ValueError, RecursionError):
            values = {}
        table: dict[str, Any] = values if isinstance(values, dict) else {}
        return _paths(table.get("files")), _paths(table.get("hidden"))

    def _write(self, opened: list[str], hidden: list[str]) -> None:
        values = {"version": 1, "files": opened, "hidden": hidden}
        write_atomic(self.folder / LIST_FILE, json.dumps(values, indent=1) + "\n")


def _paths(values: Any) -> list[str]:
    items = values if isinstance(values, list) else []
    return [item for item in items if isinstance(item, str) and os.path.isabs(item) and item.isprintable()]
