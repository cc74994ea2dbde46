"""The Dataset tab: one live part, drawn by static/dataset*.js; what it changes goes through the verbs of datasets."""

from __future__ import annotations

import gradio as gr

from k5ui.datasets.verbs import dataset_verbs
from k5ui.live import part, run_verbs
from k5ui.services import Services


class DatasetTab:
    """Builds the tab inside the current Blocks; the verbs of runs are there to stop a check."""

    def __init__(self, services: Services) -> None:
        self.dataset: gr.HTML = part("dataset", verbs=[*dataset_verbs(services), *run_verbs(services)])
