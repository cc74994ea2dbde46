"""The read-only routes that the page polls: status, runs, journal and log by offset, clips, media by opaque id.

Nothing is changed here, so a forged GET can do no harm; changes go through Gradio's events. Every answer is JSON but
the media; what does not exist, may not be read or is spelled oddly is a 404 that does not say which.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Path as PathParameter
from starlette.responses import FileResponse, Response

from backend.errors import UserError
from backend.events import read_events
from backend.jobs.facts import EVENTS_FILE, LOG_FILE
from backend.jobs.store import Run
from k5ui.caching_api import caching_routes
from k5ui.dataset_api import dataset_routes
from k5ui.live_api import live_routes
from k5ui.services import Services
from k5ui.training_api import training_routes

MAX_LOG_BYTES = 64 << 10
_LARGEST = 2**53
_MEDIA_POLICY = "default-src 'none'; media-src 'self'; img-src 'self'; style-src 'unsafe-inline'; sandbox"

RunId = Annotated[str, PathParameter(max_length=200)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class Json(Response):
    """JSON in ASCII, so that any text that a run holds can be sent; never kept by the browser."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(content, status_code, {"cache-control": "no-store"})

    def render(self, content: Any) -> bytes:
        """The content as bytes; NaN and infinity are an error of ours, because no JSON reader takes them."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def router(services: Services) -> APIRouter:
    """All routes, below `/api`."""
    routes = APIRouter(prefix="/api")

    @routes.get("/status")
    def status() -> Response:
        return Json(services.status())

    @routes.get("/runs")
    def runs(limit: Limit = 100) -> Response:
        return Json({"runs": services.run_pages(limit)})

    @routes.get("/runs/{run_id}")
    def run(run_id: RunId) -> Response:
        try:
            return Json(services.pages.detail(*services.run(run_id)))
        except UserError:
            return not_found()

    @routes.get("/runs/{run_id}/events")
    def events(run_id: RunId, since: Annotated[int, Query(ge=0, le=_LARGEST)] = 0) -> Response:
        found = _find(services, run_id)
        return not_found() if found is None else Json(events_page(services, found, since))

    @routes.get("/runs/{run_id}/log")
    def log(run_id: RunId, offset: Annotated[int, Query(ge=-_LARGEST, le=_LARGEST)] = 0) -> Response:
        found = _find(services, run_id)
        return not_found() if found is None else Json(log_page(found.folder / LOG_FILE, offset))

    @routes.get("/clips")
    def clips(limit: Limit = 60) -> Response:
        return Json({"clips": services.clips(limit)})

    @routes.api_route("/media/{media}", methods=["GET", "HEAD"])
    def media(media: str, download: bool = False) -> Response:
        return media_response(services, media, download)

    routes.include_router(caching_routes(services, Json))
    routes.include_router(training_routes(services, Json))
    routes.include_router(dataset_routes(services, Json))
    routes.include_router(live_routes(services, Json))

    @routes.api_route("/{rest:path}", methods=["GET", "HEAD"])
    def nothing(rest: str) -> Response:
        return not_found()

    return routes


def not_found() -> Response:
    """The same answer for everything that is not there."""
    return Json({"error": "There is nothing here."}, 404)


def events_page(services: Services, run: Run, since: int) -> dict[str, Any]:
    """The journal's records after byte `since`; `offset` is where to go on, `gap` tells of missing records, `more` of
    records that are left. `sample` records carry the output as the page shows it."""
    page = read_events(run.folder / EVENTS_FILE, since)
    records = []
    for record in page.records:
        if record["type"] == "sample":
            record = record | {"output": services.pages.output(run.id, record)}
        records.append(record)
    return {
        "records": records,
        "offset": page.offset,
        "gap": page.gap,
        "more": page.more,
        "restarted": page.restarted,
    }


def log_page(path: Path, offset: int) -> dict[str, Any]:
    """At most 64 KiB of a log as text, from byte `offset`; a negative offset counts from the end.

    `offset` of the answer is where to go on; a character that is cut at the end is left for the next call. An offset
    behind the end (the log was replaced) starts again from 0.
    """
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = max(0, size + offset) if offset < 0 else offset if offset <= size else 0
            handle.seek(start)
            content = handle.read(MAX_LOG_BYTES)
    except OSError:
        return {"text": "", "offset": 0, "size": 0}
    if offset < 0 and start > 0:
        broken = next((index for index, byte in enumerate(content[:4]) if byte & 0xC0 != 0x80), 0)
        content, start = content[broken:], start + broken
    if start + len(content) < size or len(content) == MAX_LOG_BYTES:
        content = content[: len(content) - _cut_character(content)]
    return {"text": content.decode("utf-8", "replace"), "offset": start + len(content), "size": size}


def _cut_character(content: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character that goes on behind it."""
    for back in range(1, min(3, len(content)) + 1):
        byte = content[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if length > back else 0
    return 0


def media_response(services: Services, media: str, download: bool) -> Response:
    """The file behind a media id, in parts if the browser asks for a range; with `download` under its own name."""
    found = services.media.resolve(media)
    if found is None or _find(services, found.run_id) is None:
        return not_found()
    headers = {"cache-control": "private, max-age=86400", "content-security-policy": _MEDIA_POLICY}
    name = found.path.name if download or found.content_type == "application/octet-stream" else None
    return FileResponse(found.path, media_type=found.content_type, headers=headers, filename=name)


def _find(services: Services, run_id: str) -> Run | None:
    try:
        return services.store.get(run_id)
    except UserError:
        return None
