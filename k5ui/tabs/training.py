"""The Training tab: the form on the left (static/training.js, fed by api/training), the live view on the right."""

from __future__ import annotations

import gradio as gr

from k5ui.live import part
from k5ui.services import Services
from k5ui.tabs.training_live import training_live
from k5ui.training_api import training_verbs


class TrainingTab:
    """Builds the tab inside the current Blocks. `live.lora` is the event that asks for a LoRA file in Generate."""

    def __init__(self, services: Services) -> None:
        with gr.Row(elem_id="k5-training"):
            part("training-form", verbs=training_verbs(services))
            self.live: gr.HTML = training_live(services)
