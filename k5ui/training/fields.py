"""The options of training as the page shows them: which there are, in which group, with which name and help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.config.options import OptionSpec, specs
from backend.config.tasks import TASKS
from backend.config.train import TrainOptions
from k5ui.text.loader import Texts
from k5ui.text.training_ru import HELP

SPECS: Mapping[str, OptionSpec] = {spec.name: spec for spec in specs(TrainOptions)}
#: Chosen in a part of the form of their own, so that no group shows them.
OWN_PARTS = ("task", "dataset_config", "cache_missing", "resume")
WEIGHTS = ("dit", "vae", "text_encoder_qwen", "text_encoder_clip")
BASICS = (
    "output_name", "network_dim", "learning_rate", "max_train_epochs", "max_train_steps", "save_every_n_epochs",
    "save_every_n_steps", "sample_every_n_epochs", "sample_every_n_steps",
)  # fmt: skip
_GROUPS = (
    "length", "memory", "compute", "optimizer", "schedule", "timesteps", "network", "conditions", "dataset",
    "validation", "samples", "saving", "tracking", "NABLA",
)  # fmt: skip


def place_of(name: str) -> str:
    """Where the page shows an option: "own", "weights", "basic" or "group"."""
    if name in OWN_PARTS:
        return "own"
    if name in WEIGHTS:
        return "weights"
    return "basic" if name in BASICS else "group"


def sheets(texts: Texts) -> list[dict[str, Any]]:
    """Every option for the script that draws the form: name, label, kind, list, choices, default, bounds, help, group,
    unit, level, path, place."""
    order = {group: number for number, group in enumerate(_GROUPS)}
    chosen = sorted(SPECS.values(), key=lambda spec: order.get(spec.group, len(order)))
    return [_sheet(spec, texts) for spec in chosen]


def groups(texts: Texts) -> list[dict[str, str]]:
    """The groups in the order of the page: name and title."""
    return [{"name": group, "title": texts(f"train.group.{group}")} for group in _GROUPS]


def title_of(name: str, texts: Texts) -> str:
    """An option in words; what is no option stays as it is."""
    return texts(f"train.field.{name}") if name in SPECS else name


def _sheet(spec: OptionSpec, texts: Texts) -> dict[str, Any]:
    choices = [[choice, choice] for choice in spec.choices]
    if spec.name == "task":
        choices = [[task.title, task.name] for task in TASKS.values()]
    elif spec.kind == "choice" and spec.optional:
        choices = [[texts("choice.default"), ""], *choices]
    return {
        "name": spec.name,
        "label": title_of(spec.name, texts),
        "kind": spec.kind,
        "list": spec.is_list,
        "choices": choices,
        "default": spec.default,
        "minimum": spec.minimum if spec.minimum is not None else spec.exclusive_minimum,
        "maximum": spec.maximum,
        "help": HELP.get(spec.name, spec.help) if texts.language == "ru" else spec.help,
        "group": spec.group,
        "unit": texts(f"train.unit.{spec.unit}") if spec.unit else "",
        "level": spec.level,
        "path": spec.path,
        "place": place_of(spec.name),
    }
