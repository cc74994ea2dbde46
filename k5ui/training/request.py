"""What the Training tab asks for: its form, and the options of the run that the form becomes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.config.checks import is_hub_name
from backend.config.options import OptionSpec, from_mapping
from backend.config.tasks import TASKS
from backend.config.train import TrainOptions
from backend.errors import Problem, Problems, UserError
from k5ui.roots import Roots
from k5ui.settings import Settings
from k5ui.training.fields import SPECS, WEIGHTS

DEFAULT_TASK = "k5-demo-t2v"
#: Set by the page itself: the dataset that was chosen, the prompts that were written.
OWN = ("dataset_config",)


@dataclass(frozen=True)
class Wanted:
    """A training form: the dataset's id, the values that were given by option name, the sample prompts as lines.

    `source` is the run that a resumed training goes on from; empty if there is none.
    """

    dataset: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    prompts: str = ""
    source: str = ""

    @property
    def task(self) -> str:
        """The model that is trained."""
        return self.values.get("task", DEFAULT_TASK)

    def draft(self) -> dict[str, Any]:
        """The form as plain data, as `wanted` reads it."""
        return {
            "dataset": self.dataset,
            "values": dict(self.values),
            "prompts": self.prompts,
            "source": self.source,
        }


def wanted(draft: Mapping[str, Any]) -> Wanted:
    """The form as a draft has it; values of options that do not exist (any more) are left out."""
    given = draft.get("values")
    values = {name: value for name, value in given.items() if name in SPECS} if isinstance(given, dict) else {}
    if not isinstance(values.get("task", DEFAULT_TASK), str) or values.get("task", DEFAULT_TASK) not in TASKS:
        del values["task"]
    dataset, prompts, source = draft.get("dataset"), draft.get("prompts"), draft.get("source")
    return Wanted(
        dataset if isinstance(dataset, str) else None,
        values,
        prompts if isinstance(prompts, str) else "",
        source if isinstance(source, str) else "",
    )


def fitting(spec: OptionSpec, value: Any) -> Any:
    """A value of a form as the option takes it: empty text and an empty list are no value, a whole float an integer."""
    if isinstance(value, list):
        items = [_fitting_item(spec, item) for item in value]
        kept = [item for item in items if item is not None]
        return kept or None
    return _fitting_item(spec, value)


def _fitting_item(spec: OptionSpec, value: Any) -> Any:
    if isinstance(value, str):
        text = value.strip()
        return text or None
    if spec.kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


class TrainIntake:
    """Turns a form into `TrainOptions`: weights from the settings, paths made absolute and kept inside the roots."""

    def __init__(self, settings: Settings, roots: Roots, text_cache: Path) -> None:
        self._settings = settings
        self._roots = roots
        self._text_cache = text_cache

    def options(self, form: Wanted, dataset: Path | None, prompts: Path | None) -> TrainOptions:
        """The options of a form whose dataset lies at `dataset` and whose prompts were written to `prompts`.

        Raises:
            Problems: wrong types, values out of bounds, paths that may not be read.
        """
        clean = {name: value for name, value in form.values.items() if name not in OWN}
        clean["task"] = form.task
        problems: list[Problem] = []
        for name, value in clean.items():
            if SPECS[name].path is not None:
                clean[name], trouble = self._paths(name, value)
                problems += trouble
        weights = self._settings.weights_for(form.task)
        clean = {name: getattr(weights, name) for name in WEIGHTS if getattr(weights, name) is not None} | clean
        if TASKS[form.task].nabla is not None:
            clean.setdefault("nabla_resize", True)  # the Caching tab makes such sizes for these tasks
        if dataset is not None:
            clean["dataset_config"] = os.fspath(dataset)
        if prompts is not None:
            if "sample_prompts" in clean:
                problems.append(Problem("sample_prompts", "names a file, and prompts are written here. Keep one."))
            clean["sample_prompts"] = os.fspath(prompts)
            clean.setdefault("text_cache_dir", os.fspath(self._text_cache))
        try:
            options = from_mapping(TrainOptions, clean)
        except Problems as error:
            raise Problems([*problems, *error.problems]) from None
        if problems:
            raise Problems(problems)
        return options

    def _paths(self, name: str, value: Any) -> tuple[Any, list[Problem]]:
        items = value if isinstance(value, list) else [value]
        clean, problems = [], []
        for item in items:
            if not isinstance(item, str) or self._may_pass(name, item):
                clean.append(item)
                continue
            try:
                clean.append(self._roots.absolute(item, name))
            except UserError as error:
                clean.append(item)
                problems += error.problems
        return (clean if isinstance(value, list) else clean[0]), problems

    def _may_pass(self, name: str, path: str) -> bool:
        """Names of a hub, `latest`, and what the owner of this machine has set himself, which may lie anywhere."""
        if name == "resume" and path == "latest":
            return True
        if name.startswith("text_encoder") and is_hub_name(path):
            return True
        return name in WEIGHTS and path in _set_paths(self._settings.models().values())


def _set_paths(tables: Iterable[Mapping[str, str]]) -> set[str]:
    return {path for parts in tables for path in parts.values()}
