"""The Runs tab: one live part; its only event hands the settings of a run to Generate."""

from __future__ import annotations

import gradio as gr

from k5ui.live import part, run_verbs
from k5ui.services import Services


class RunsTab:
    """Builds the tab inside the current Blocks. `runs.clone` is the event that asks for the settings of a run."""

    def __init__(self, services: Services) -> None:
        self.runs: gr.HTML = part("runs", events=("clone",), verbs=run_verbs(services))
