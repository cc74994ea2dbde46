"""From a run back to a form: a finished training cloned, a training that goes on from one of its states."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backend.config.prompts import MAX_PROMPT_FILE_BYTES
from backend.config.tasks import TASKS
from backend.errors import UserError
from backend.jobs.store import Run
from k5ui.settings import Settings
from k5ui.training.fields import SPECS, WEIGHTS
from k5ui.training.request import DEFAULT_TASK, Wanted

CHECKPOINTS = "checkpoints"
INPUTS = "inputs"
PROMPTS = "prompts.txt"


def form_of_run(
    run: Run, options: Mapping[str, Any], settings: Settings, dataset_of: Callable[[str], str | None]
) -> Wanted:
    """The form that would start `run` again: what differs from the defaults, without what the page had set by itself.

    `dataset_of` gives the id of a dataset configuration, None if it cannot be opened (any more).

    Raises:
        UserError: the run is no training, or its options cannot be read.
    """
    if run.kind != "train":
        raise UserError("Only a training can be taken over here.")
    values = {
        name: value
        for name, value in options.items()
        if name in SPECS and value != SPECS[name].default and not (isinstance(value, list) and not value)
    }
    if not values:
        raise UserError(f"The options of the run {run.title!r} cannot be read.")
    task = values.get("task", DEFAULT_TASK)
    if task not in TASKS:
        del values["task"]
        task = DEFAULT_TASK
    weights = asdict(settings.weights_for(task))
    for name in WEIGHTS:
        if values.get(name) == weights[name]:
            values.pop(name, None)
    if TASKS[task].nabla is not None:
        values.pop("nabla_resize", None)
    path = values.pop("dataset_config", None)
    prompts = _own_prompts(run, values)
    values.pop("resume", None)
    return Wanted(dataset_of(path) if isinstance(path, str) else None, values, prompts)


def _own_prompts(run: Run, values: dict[str, Any]) -> str:
    """The lines that were written on the page; the options then name them no more."""
    path = run.folder / INPUTS / PROMPTS
    if values.get("sample_prompts") != os.fspath(path):
        return ""
    del values["sample_prompts"]
    values.pop("text_cache_dir", None)
    return read_lines(path)


def read_lines(path: Path) -> str:
    """The text of a prompt file, empty if it cannot be read or is something else than a file."""
    try:
        if not path.is_file():
            return ""
        with open(path, "rb") as handle:
            return handle.read(MAX_PROMPT_FILE_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return ""
