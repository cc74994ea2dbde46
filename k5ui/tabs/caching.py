"""The Caching tab: one live part, drawn by static/caching.js from api/caching, with the options as their definition."""

from __future__ import annotations

from typing import Any

from backend.config.options import OptionSpec
from backend.config.tasks import TASKS
from k5ui.caching.request import COMMON, DEFAULT_TASK, LATENTS, SPECS, TEXT
from k5ui.caching_api import caching_verbs
from k5ui.form import label_of
from k5ui.live import part
from k5ui.services import Services
from k5ui.text.caching_ru import HELP
from k5ui.text.loader import Texts, Words

_GROUPS = (("work", COMMON), ("latents", LATENTS), ("text", TEXT))


class CachingTab:
    """Builds the tab inside the current Blocks."""

    def __init__(self, services: Services, words: Words) -> None:
        words.say(part("caching", value={}, verbs=caching_verbs(services)), value=form_of)


def form_of(texts: Texts) -> dict[str, Any]:
    """The fields of the form, in the language of the page: name, kind, label, help, choices, default."""
    task = _field(SPECS["task"], texts) | {
        "choices": [[task.title, task.name] for task in TASKS.values()],
        "default": DEFAULT_TASK,
        "help": texts("caching.task_help"),
    }
    groups = [
        {
            "title": texts(f"caching.group.{name}"),
            "options": [_field(SPECS[option], texts) for option in options if option != "task"],
        }
        for name, options in _GROUPS
    ]
    return {"task": task, "groups": groups}


def _field(spec: OptionSpec, texts: Texts) -> dict[str, Any]:
    label = texts("caching.field.dtype") if spec.name == "dtype" else label_of(spec, texts)
    choices = [[choice, choice] for choice in spec.choices] if spec.kind == "choice" else None
    if choices is not None and spec.optional:
        choices = [[texts("choice.default"), ""], *choices]
    sentence = HELP.get(spec.name, spec.help) if texts.language == "ru" else spec.help
    return {
        "name": spec.name,
        "kind": spec.kind,
        "label": label,
        "help": sentence,
        "choices": choices,
        "default": spec.default,
        "placeholder": texts("choice.default") if spec.default is None else str(spec.default),
    }
