"""The datasets of one workspace, as the services of the app hold them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.config.dataset import DatasetConfig, load_dataset_config
from backend.config.dataset_document import DatasetDocument
from backend.errors import Problem, Problems, UserError
from k5ui.datasets.caption_journal import CaptionJournal
from k5ui.datasets.findings import Ignored, Reports
from k5ui.datasets.keys import SOURCE_KEY
from k5ui.datasets.known import KnownDataset, KnownFiles
from k5ui.datasets.previews import Previews
from k5ui.datasets.readers import SharedReader
from k5ui.datasets.scans import Scans
from k5ui.datasets.snapshot import Row, Snapshot
from k5ui.roots import Roots

#: How long a request waits for a look that goes on: small datasets are then shown whole at once.
WAIT_SECONDS = 0.25
_PATH_KEYS = tuple(f"{kind}_{end}" for kind in ("image", "video") for end in ("directory", "jsonl_file"))


class DatasetLibrary:
    """Every known dataset, and what works on them: looks, pictures, undo journals, findings.

    Methods may be called from any thread.
    """

    def __init__(self, workspace: str | Path, roots: Roots) -> None:
        self.workspace = Path(workspace)
        self.roots = roots
        self.folder = self.workspace / "datasets"
        self.caches = self.workspace / "cache" / "datasets"
        self.known = KnownFiles(self.folder, roots)
        self.reader = SharedReader()
        self.scans = Scans(roots, self.reader)
        self.previews = Previews(self.workspace / "cache" / "previews", self.reader)
        self.ignored = Ignored(self.folder / "ignored")
        self.reports = Reports()
        self._guard = threading.Lock()
        self._journals: dict[str, CaptionJournal] = {}

    def list(self) -> list[KnownDataset]:
        """All known datasets by name; empty in a new workspace."""
        return self.known.list()

    def get(self, dataset: str) -> KnownDataset:
        """The dataset of this id.

        Raises:
            UserError: there is none in the list.
        """
        return self.known.get(dataset)

    def config(self, dataset: str) -> DatasetConfig:
        """What the configuration of a dataset says now.

        Raises:
            UserError: there is none in the list.
            Problems: everything that is wrong with it.
        """
        return load_dataset_config(self.get(dataset).path)

    def snapshot(self, dataset: KnownDataset) -> Snapshot:
        """What the dataset consists of.

        Raises:
            UserError: the first look has not ended yet.
        """
        snapshot = self.scans.look(dataset, WAIT_SECONDS).snapshot
        if snapshot is None:
            raise UserError("The dataset is being looked at. Wait until its items are shown.")
        return snapshot

    def row(self, dataset: KnownDataset, key: str) -> tuple[Snapshot, Row]:
        """The source of a key; exposed apps make sure again that it lies inside the roots.

        Raises:
            UserError: no such source (any more), or one that may not be read.
        """
        snapshot = self.snapshot(dataset)
        row = snapshot.by_key.get(key) if isinstance(key, str) and SOURCE_KEY.fullmatch(key) else None
        if row is None or not row.allowed or (self.roots.exposed and not self.roots.allows(row.source.location)):
            raise UserError("There is no such item (any more). Load the page again.")
        return snapshot, row

    def journal(self, dataset: KnownDataset) -> CaptionJournal:
        """The changes of captions that can be undone."""
        with self._guard:
            if dataset.id not in self._journals:
                path = self.folder / "undo" / f"{dataset.id}.jsonl"
                self._journals[dataset.id] = CaptionJournal(path, self.roots)
            return self._journals[dataset.id]

    def check_paths(self, document: DatasetDocument) -> None:
        """Refuse a dataset file that leads an exposed app out of its roots, for reading or for writing caches.

        Raises:
            Problems: every such path.
        """
        if not self.roots.exposed:
            return
        problems = [
            problem
            for index, table in enumerate(document.datasets)
            for problem in self._path_problems(f"datasets[{index}]", table)
        ]
        if problems:
            raise Problems(problems)

    def _path_problems(self, where: str, table: Mapping[str, Any]) -> list[Problem]:
        problems: list[Problem] = []
        for key in (*_PATH_KEYS, "cache_directory"):
            path = table.get(key)
            if isinstance(path, str):
                try:
                    self.roots.absolute(os.path.join(os.getcwd(), path), f"{where}.{key}")
                except UserError as error:
                    problems += error.problems
        return problems

    def close(self) -> None:
        """End what goes on in the background."""
        self.reader.close()
        self.scans.close()
        self.previews.close()
