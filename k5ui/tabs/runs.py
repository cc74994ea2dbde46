"""The Runs tab: one live part; its events hand the settings of a run, or a LoRA that it has saved, to Generate."""

from __future__ import annotations

import gradio as gr

from k5ui.live import part
from k5ui.services import Services
from k5ui.tabs.training_live import EVENTS, live_view_verbs


class RunsTab:
    """Builds the tab inside the current Blocks. `runs.clone` is the event that asks for the settings of a run,
    `runs.lora` the one that asks for a LoRA file."""

    def __init__(self, services: Services) -> None:
        self.runs: gr.HTML = part("runs", events=("clone", *EVENTS), verbs=live_view_verbs(services))
