"""The routes and verbs of the Caching tab. Routes only read; verbs are called through Gradio, with its guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from fastapi import Path as PathParameter
from starlette.responses import Response

from backend.errors import Problems, UserError

if TYPE_CHECKING:
    from k5ui.services import Services

Verb = Callable[[Any], dict[str, Any]]
DatasetId = Annotated[str, PathParameter(max_length=100)]


def caching_routes(services: Services, answer: Callable[..., Response]) -> APIRouter:
    """`/caching` and `/caching/{dataset id}`; `answer` makes a response of a value and a status."""
    routes = APIRouter(prefix="/caching")

    @routes.get("")
    def overview() -> Response:
        return answer(services.caching.overview())

    @routes.get("/{dataset}")
    def page(dataset: DatasetId) -> Response:
        try:
            return answer(services.caching.page(dataset))
        except UserError:
            return answer({"error": "There is nothing here."}, 404)

    return routes


def caching_verbs(services: Services) -> list[Verb]:
    """What the tab can ask for. Each verb takes one array and answers an object: {} or what is named here,
    {"error": sentence}, or {"problems": [{"field", "message"}]}.

    cache [id, "all" | "latents" | "text" | "stale", options] -> {"runs": ids}; check [id]; prune [id]; stop [id];
    change ["dataset" | "again" | option, value].
    """
    desk = services.caching

    def cache(arguments: Any) -> dict[str, Any]:
        dataset, what, *more = _texts(arguments, 2)
        options = more[0] if more and isinstance(more[0], dict) else None
        return {"runs": desk.cache(dataset, what, options)}

    def check(arguments: Any) -> dict[str, Any]:
        desk.check(_texts(arguments, 1)[0])
        return {}

    def prune(arguments: Any) -> dict[str, Any]:
        desk.prune(_texts(arguments, 1)[0])
        return {}

    def stop(arguments: Any) -> dict[str, Any]:
        desk.stop(_texts(arguments, 1)[0])
        return {}

    def change(arguments: Any) -> dict[str, Any]:
        name, *more = _texts(arguments, 1)
        desk.change(name, more[0] if more else None)
        return {}

    return [_answering(verb) for verb in (cache, check, prune, stop, change)]


def _texts(arguments: Any, count: int) -> list[Any]:
    """The arguments, of which the first `count` must be texts.

    Raises:
        UserError: the page sent something else.
    """
    given = arguments if isinstance(arguments, list) else [arguments]
    if len(given) < count or not all(isinstance(item, str) for item in given[:count]):
        raise UserError("The page sent no dataset. Load it again.")
    return given


def _answering(verb: Verb) -> Verb:
    def call(arguments: Any) -> dict[str, Any]:
        try:
            return verb(arguments)
        except UserError as error:
            if error.field is None:
                return {"error": error.message}
            return {"problems": [{"field": error.field, "message": error.message}]}
        except Problems as error:
            return {"problems": [{"field": item.field, "message": item.message} for item in error.problems]}

    call.__name__ = verb.__name__
    return call
