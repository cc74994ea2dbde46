"""The live view of trainings: the part of the Training tab, and the verbs that it needs wherever it stands."""

from __future__ import annotations

import gradio as gr

from k5ui.live import Verb, part, run_verbs
from k5ui.live_api import live_verbs
from k5ui.services import Services
from k5ui.training_api import training_verbs

#: What the view may trigger: a LoRA file that is to stand in the form of Generate.
EVENTS = ("lora",)
_FROM_FORM = ("clone_train", "resume_train")


def training_live(services: Services) -> gr.HTML:
    """The element that static/training_live.js fills; for the right half of the Training tab."""
    return part("training-live", events=EVENTS, verbs=live_view_verbs(services))


def live_view_verbs(services: Services) -> list[Verb]:
    """The verbs on runs, the requests of a training, and what hands a training to the form."""
    handed = [verb for verb in training_verbs(services) if getattr(verb, "__name__", "") in _FROM_FORM]
    return [*run_verbs(services), *live_verbs(services), *handed]
