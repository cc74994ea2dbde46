"""Our own parts of the page: one element each, drawn by static/*.js, fed by the routes of api.py.

A part may call verbs on the server (`server_functions`) and fire events of its own (named in `events`); a progress tick
changes no Gradio component.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from backend.errors import Problems
from k5ui.services import Services

Verb = Callable[[Any], dict[str, Any]]


def part(name: str, *, value: Any = "", events: Sequence[str] = (), verbs: Sequence[Verb] = ()) -> gr.HTML:
    """An element that the script `K5.parts[name]` fills.

    `value` goes to the script as data and is never markup. `events` are the events that the script may trigger.
    """
    named = " ".join(f"'{event}'" for event in events)
    return gr.HTML(
        value=value,
        html_template='<div class="k5-root"></div>',
        js_on_load=f"K5.mount('{name}', {{element, props, trigger, server, watch, upload}}); /* events: {named} */",
        server_functions=list(verbs) or None,
        elem_id=f"k5-{name}",
        apply_default_css=False,
        container=False,
        padding=False,
    )


def slot(name: str) -> gr.HTML:
    """An empty place in the form that the script of another part fills."""
    return gr.HTML(
        value="",
        html_template=f'<div class="k5-root"><div class="k5-slot" id="k5-slot-{name}"></div></div>',
        js_on_load="",
        apply_default_css=False,
        container=False,
        padding=False,
    )


def event_values(event: gr.EventData) -> dict[str, Any]:
    """What a script sent with its event; nothing in it is trusted."""
    data = event._data
    return data if isinstance(data, dict) else {}


def run_verbs(services: Services) -> list[Verb]:
    """The verbs on one run: stop, kill, dequeue, trash. Each takes [run id] and answers {} or {"error": sentence}."""

    def verb(name: str, action: Callable[[str], None]) -> Verb:
        def call(arguments: Any) -> dict[str, Any]:
            run_id = arguments[0] if isinstance(arguments, list) and arguments else arguments
            if not isinstance(run_id, str):
                return {"error": "The page sent no run. Load it again."}
            try:
                action(run_id)
            except Problems as error:
                return {"error": sentences(error)}
            return {}

        call.__name__ = name
        return call

    return [
        verb("stop", services.stop),
        verb("dequeue", services.stop),
        verb("kill", services.kill),
        verb("trash", services.trash),
    ]


def sentences(error: Problems) -> str:
    """All problems of an error as one text."""
    return " ".join(problem.message for problem in error.problems)
