"""The page: header, tabs in order, and what happens when somebody opens it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.errors import Problems
from k5ui.live import event_values, part, sentences
from k5ui.services import Services
from k5ui.tabs.caching import CachingTab
from k5ui.tabs.dataset import DatasetTab
from k5ui.tabs.generate import GenerateTab
from k5ui.tabs.runs import RunsTab
from k5ui.tabs.settings import SettingsTab
from k5ui.tabs.training import TrainingTab
from k5ui.text.loader import Words
from k5ui.theme import make_css, make_head, make_theme

TITLE = "K5 Studio"
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build(services: Services) -> gr.Blocks:
    """The page as Blocks, ready to be launched with `launch_options`; nothing is started here."""
    words = Words(lambda: services.settings.language)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:

        def retranslate() -> None:
            words.translate()
            refresh_page(page, services)

        part("header", verbs=[_preferences(services, retranslate)])
        with gr.Tabs(selected="generate", elem_id="k5-tabs"):
            with words.say(gr.Tab(id="generate", elem_id="k5-tab-generate"), label="tab.generate"):
                generate = GenerateTab(services, words)
            with words.say(gr.Tab(id="dataset", elem_id="k5-tab-dataset"), label="tab.dataset"):
                DatasetTab(services)
            with words.say(gr.Tab(id="caching", elem_id="k5-tab-caching"), label="tab.caching"):
                CachingTab(services, words)
            with words.say(gr.Tab(id="training", elem_id="k5-tab-training"), label="tab.training"):
                training = TrainingTab(services)
            with words.say(gr.Tab(id="runs", elem_id="k5-tab-runs"), label="tab.runs"):
                runs = RunsTab(services)
            with words.say(gr.Tab(id="settings", elem_id="k5-tab-settings"), label="tab.settings") as settings_tab:
                settings = SettingsTab(services, words, retranslate)
        generate.connect()
        settings.connect()

        def clone(event: gr.EventData) -> dict[Any, Any]:
            return generate.clone(event_values(event).get("run"))

        def use_lora(event: gr.EventData) -> Any:
            sent = event_values(event)
            try:
                return generate.use_lora(*services.live.lora(str(sent.get("run")), str(sent.get("saved"))))
            except Problems:  # gone since the page was drawn; the list of files says so at its next look
                return gr.skip()

        runs.runs.clone(clone, None, generate.outputs(), **_QUIET)
        for view in (runs.runs, training.live):
            view.lora(use_lora, None, generate.outputs(), **_QUIET)
        page.load(generate.load, None, generate.outputs(), **_QUIET)
        settings_tab.select(settings.load, None, settings.outputs(), **_QUIET)
    return page


def launch_options(services: Services) -> dict[str, Any]:
    """theme, css and head for `launch` or `mount_gradio_app`."""
    settings = services.settings
    return {"theme": make_theme(), "css": make_css(), "head": make_head(settings.language, settings.theme)}


def refresh_page(page: gr.Blocks, services: Services) -> None:
    """Make the next load of a running page follow the settings: texts of components, scripts' texts, theme."""
    page.head = make_head(services.settings.language, services.settings.theme)
    if hasattr(page, "config"):
        page.config = page.get_config_file()


def _preferences(services: Services, retranslate: Any) -> Any:
    def set_preference(arguments: Any) -> dict[str, Any]:
        """Keep theme or language: [name, value]; answers {} or {"error": sentence}."""
        if not (isinstance(arguments, list) and len(arguments) == 2 and arguments[0] in ("theme", "language")):
            return {"error": "The page sent no setting. Load it again."}
        try:
            services.settings.update(**{arguments[0]: str(arguments[1])})
        except Problems as error:
            return {"error": sentences(error)}
        retranslate()
        return {}

    return set_preference
