"""The routes and verbs of live trainings. Routes only read; verbs are called through Gradio, with its guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Path as PathParameter
from starlette.responses import Response

from backend.errors import Problems, UserError
from k5ui.training.compare import compare
from k5ui.training.live import MAX_POINTS, SMOOTHING, Window

if TYPE_CHECKING:
    from k5ui.services import Services

Answer = Callable[..., Response]
Verb = Callable[[Any], dict[str, Any]]
_LARGEST = 2**53
RunId = Annotated[str, PathParameter(max_length=200)]
AskedRun = Annotated[str, Query(max_length=200)]
Rows = Annotated[int, Query(ge=0, le=_LARGEST)]
Step = Annotated[int | None, Query(ge=0, le=_LARGEST)]
Text = Annotated[str, Query(max_length=8000)]


def live_routes(services: Services, answer: Answer) -> APIRouter:
    """`/live`, `/live/compare`, `/live/{run}` and its `/series`; `answer` makes a response of a value and a status."""
    routes = APIRouter(prefix="/live")

    def found(make: Callable[[], dict[str, Any]]) -> Response:
        try:
            return answer(make())
        except UserError:
            return answer({"error": "There is nothing here."}, 404)

    @routes.get("")
    def trainings() -> Response:
        return answer({"trainings": services.live.list()})

    @routes.get("/compare")
    def compared(a: AskedRun, b: AskedRun) -> Response:
        return found(lambda: _compared(services, a, b))

    @routes.get("/{run}")
    def page(run: RunId, version: Text = "", chain: bool = False) -> Response:
        return found(lambda: services.live.page(run, version, chain))

    @routes.get("/{run}/series")
    def series(
        run: RunId,
        since: Rows = 0,
        key: Text = "",
        points: Annotated[int, Query(ge=10, le=MAX_POINTS)] = MAX_POINTS,
        first: Step = None,
        last: Step = None,
        smoothing: Annotated[int, Query(ge=0, lt=len(SMOOTHING))] = 2,
        chain: bool = False,
        validations: Annotated[int, Query(ge=-1, le=_LARGEST)] = -1,
    ) -> Response:
        window = Window(since, key, points, first, last, smoothing, chain, validations)
        return found(lambda: services.live.series(run, window))

    return routes


def _compared(services: Services, a: str, b: str) -> dict[str, Any]:
    """Two runs by name, and the rows of `compare`."""
    (left, view_a), (right, view_b) = services.run(a), services.run(b)
    sides = [(view.kind, services.pages.options_of(run)) for run, view in ((left, view_a), (right, view_b))]
    rows = compare(sides[0], sides[1])
    about = [
        {"id": run.id, "title": run.title, "kind": view.kind, "created": run.created, "state": view.state.value}
        for run, view in ((left, view_a), (right, view_b))
    ]
    return {"a": about[0], "b": about[1], "rows": rows}


def live_verbs(services: Services) -> list[Verb]:
    """What the live view can ask for: ask_train [run, request] -> {} or {"error": sentence}."""

    def ask_train(arguments: Any) -> dict[str, Any]:
        if not (isinstance(arguments, list) and len(arguments) == 2 and all(isinstance(a, str) for a in arguments)):
            return {"error": "The page sent no training. Load it again."}
        try:
            services.live.ask(*arguments)
        except Problems as error:
            return {"error": " ".join(problem.message for problem in error.problems)}
        return {}

    return [ask_train]
