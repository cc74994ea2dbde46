"""Whether all that a dataset would read and write lies inside the folders of an exposed app."""

from __future__ import annotations

import os

from backend.config.dataset import DatasetConfig, DatasetEntry
from backend.data.scan import scan_dataset
from backend.errors import Problem, Problems, UserError
from k5ui.roots import Roots


def require_inside(config: DatasetConfig, roots: Roots) -> None:
    """Refuse datasets that lead an exposed app out of its roots: folders, files that a JSONL names, links inside.

    Raises:
        Problems: every folder outside, or the first source outside of each dataset.
    """
    if not roots.exposed:
        return
    problems = [problem for entry in config.enabled for problem in _outside(entry, roots)]
    if problems:
        raise Problems(problems)


def _outside(entry: DatasetEntry, roots: Roots) -> list[Problem]:
    source_key = f"{entry.kind}_{'directory' if entry.source_directory else 'jsonl_file'}"
    for key, path in ((source_key, entry.source), ("cache_directory", entry.cache_directory)):
        try:
            roots.absolute(os.fspath(path), f"datasets[{entry.index}].{key}")
        except UserError as error:
            return list(error.problems)
    for source in scan_dataset(entry).sources:
        for location in (source.location, source.caption_location):
            if location is not None and not roots.allows(location):
                sentence = f"names {source.identity}, which lies outside the folders that this app may read. Remove it."
                return [Problem(f"datasets[{entry.index}].{source_key}", sentence)]
    return []
