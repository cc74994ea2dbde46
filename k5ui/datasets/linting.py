"""Checks of datasets: starts the job that looks for trouble, and shows what the newest one found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from backend.config.cache import CheckDatasetOptions
from backend.config.dataset import DatasetConfig
from backend.config.options import from_mapping
from backend.config.tasks import TASKS, default_weights
from backend.errors import K5Error, UserError
from backend.files import write_atomic
from backend.jobs.states import JobState
from backend.jobs.store import Run
from backend.jobs.view import RunView, view_run
from k5ui.datasets import findings
from k5ui.datasets.creating import TINY_SIDE
from k5ui.datasets.documents import read_document
from k5ui.datasets.inside import require_inside
from k5ui.datasets.known import KnownDataset
from k5ui.services import Services

MAX_TRIGGER = 200
_RUNS_LOOKED_AT = 300
_DEMO_TASK = "k5-demo-t2v"
_REAL_TASK = "k5-lite-t2v-5s-sd"


def lint_page(services: Services, dataset: KnownDataset) -> dict[str, Any]:
    """The newest check of a dataset (`run`, null for none), and what the newest finished one found."""
    found = _checks(services, dataset)
    finished, report = _newest_report(services, found)
    ignored = services.datasets.ignored.ids(dataset.id)
    rows = [finding | {"ignored": finding["id"] in ignored} for finding in report["findings"]] if report else []
    newest = found[0] if found else None
    return {
        "run": services.pages.summary(*newest) if newest else None,
        "stale": finished is not None and _is_stale(finished, dataset),
        "trigger_word": services.pages.options_of(finished).get("trigger_word") if finished else None,
        "checked": report["checked"] if report else 0,
        "sources": report["sources"] if report else 0,
        "findings": rows,
        "counts": findings.counts(rows),
    }


def short_findings(services: Services, dataset: KnownDataset) -> dict[str, list[dict[str, Any]]]:
    """Findings that are not ignored as {id, kind, severity}, by the key of their sources."""
    return findings.by_key(lint_page(services, dataset)["findings"])


def start_check(services: Services, dataset: KnownDataset, trigger: str | None) -> str:
    """Put a check into the queue; returns the id of its run.

    Raises:
        Problems: the dataset file is wrong or leads an exposed app out of its roots; the workspace cannot be written.
    """
    config = services.datasets.config(dataset.id)
    require_inside(config, services.roots)
    _, revision = read_document(dataset.path)
    values = {
        "dataset_config": os.fspath(dataset.path),
        "trigger_word": (trigger or "").strip() or None,
        "text_encoder_qwen": _tokenizer(services, config),
    }
    options = from_mapping(CheckDatasetOptions, {key: value for key, value in values.items() if value is not None})
    run = services.store.create(findings.CHECK_KIND, options, f"Check of {dataset.name}")
    try:
        write_atomic(run.folder / findings.REVISION_FILE, revision + "\n")
        services.enqueue(run.id)
    except K5Error:
        services.trash(run.id)
        raise
    return run.id


def _tokenizer(services: Services, config: DatasetConfig) -> str | None:
    """The folder of the text encoder that counts tokens: the demo's for a dataset of its size, else the one of the
    settings if it lies on this computer."""
    small = all(max(entry.resolution) <= TINY_SIDE for entry in config.datasets)
    paths = default_weights(TASKS[_DEMO_TASK]) if small else services.settings.weights_for(_REAL_TASK)
    path = paths.text_encoder_qwen
    return path if path and os.path.isdir(path) else None


def _checks(services: Services, dataset: KnownDataset) -> list[tuple[Run, RunView]]:
    """The checks of a dataset, newest first."""
    runs = [run for run in services.store.list()[:_RUNS_LOOKED_AT] if run.kind == findings.CHECK_KIND]
    path = os.fspath(dataset.path)
    own = [run for run in runs if _same_file(services.pages.options_of(run).get("dataset_config"), path)]
    return [(run, view_run(run)) for run in own]


def _same_file(given: Any, path: str) -> bool:
    return isinstance(given, str) and os.path.abspath(given) == path


def _newest_report(services: Services, found: list[tuple[Run, RunView]]) -> tuple[Run | None, dict[str, Any] | None]:
    for run, view in found:
        if view.state is JobState.FINISHED:
            report = services.datasets.reports.read(run.folder)
            if report is not None:
                return run, report
    return None, None


def _is_stale(run: Run, dataset: KnownDataset) -> bool:
    """Whether the dataset file is another one than the check has read."""
    try:
        revision = read_document(dataset.path)[1]
    except UserError:
        return True
    try:
        return (run.folder / findings.REVISION_FILE).read_text("ascii").strip() != revision
    except (OSError, UnicodeDecodeError):  # a check that was started in a terminal
        return Path(dataset.path).stat().st_mtime > run.created
