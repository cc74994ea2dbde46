"""The routes and verbs of the training form. Routes only read; verbs are called through Gradio, with its guard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import Response

from backend.errors import K5Error, Problems, UserError
from k5ui.datasets.arguments import Arguments
from k5ui.training.import_command import MAX_TEXT

if TYPE_CHECKING:
    from k5ui.services import Services

Verb = Callable[[Any], dict[str, Any]]
_LOG = logging.getLogger(__name__)


def training_routes(services: Services, answer: Callable[..., Response]) -> APIRouter:
    """`/training/form` and `/training/state`; `answer` makes a response of a value and a status."""
    routes = APIRouter(prefix="/training")

    @routes.get("/form")
    def form() -> Response:
        return answer(services.training.form())

    @routes.get("/state")
    def state() -> Response:
        return answer(services.training.state())

    return routes


def training_verbs(services: Services) -> list[Verb]:
    """What the form can ask for. Each verb takes one array and answers an object: {} or what is named here,
    {"error": sentence}, or {"problems": [{"field", "message"}]}.

    set_train [name, value|null] (an option, "dataset" or "prompts"); preset_train [id]; import_train [text] ->
    {"notes": [{name, kind, text}]}; start_train [{"queue": bool}] -> {"run": id}; clone_train [run id]; resume_train
    [run id or state folder]; reset_train []; undo_train [].
    """
    desk = services.training

    def set_train(arguments: Arguments) -> dict[str, Any]:
        name = arguments.text(0, 100)
        desk.set(name, arguments.setting(1))
        return {}

    def preset_train(arguments: Arguments) -> dict[str, Any]:
        desk.preset(arguments.text(0, 100))
        return {}

    def import_train(arguments: Arguments) -> dict[str, Any]:
        return {"notes": desk.take_text(arguments.text(0, MAX_TEXT))}

    def start_train(arguments: Arguments) -> dict[str, Any]:
        queue = arguments.table(0).get("queue")
        return {"run": desk.start(Arguments([queue]).switch(0))}

    def clone_train(arguments: Arguments) -> dict[str, Any]:
        desk.clone(arguments.text(0, 200))
        return {}

    def resume_train(arguments: Arguments) -> dict[str, Any]:
        desk.resume(arguments.text(0))
        return {}

    def reset_train(arguments: Arguments) -> dict[str, Any]:
        desk.reset()
        return {}

    def undo_train(arguments: Arguments) -> dict[str, Any]:
        desk.undo()
        return {}

    with_values = (set_train, preset_train, import_train, start_train, clone_train, resume_train)
    return [
        *(_verb(action, True) for action in with_values),
        *(_verb(action, False) for action in (reset_train, undo_train)),
    ]


def _verb(action: Callable[[Arguments], dict[str, Any]], takes_values: bool) -> Verb:
    name = getattr(action, "__name__", "verb")

    def call(arguments: Any) -> dict[str, Any]:
        if not takes_values and arguments != []:
            return {"error": "The page sent something that cannot be used. Load it again."}
        try:
            return action(Arguments(arguments))
        except UserError as error:
            if error.field is None:
                return {"error": error.message}
            return {"problems": [{"field": error.field, "message": error.message}]}
        except Problems as error:
            return {"problems": [{"field": item.field, "message": item.message} for item in error.problems]}
        except (K5Error, OSError) as error:
            _LOG.exception("The verb %s failed.", name)
            return {"error": f"This did not work: {error}"}

    call.__name__ = name
    return call
